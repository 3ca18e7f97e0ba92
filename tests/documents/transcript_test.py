"""What an agent does, in lines for a terminal."""

from atommem_jax.documents import transcript


def test_text_cannot_steer_the_terminal():
    told = transcript.clean("a\x1b[31mred\r\n\x07b\u202ec\u2028d")
    assert told.isprintable()
    assert told == "a\ufffd[31mred \ufffdb\ufffdc d"
    assert transcript.clean("x" * 500, 101) == f"{'x' * 48} ... {'x' * 48}"


def test_what_became_of_an_action_is_told(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    action = {
        "kind": "create", "target": None, "text": "one two three", "fates": ["applied"],
        "slot": 0, "was": "", "tokens": 3,
    }  # fmt: skip
    cut = {"fates": ["applied", "truncated", "evicted"], "kept": "one", "kept_tokens": 1}
    turn = {
        "query": "who",
        "shown": [{"number": 1, "slot": 4, "text": "an entry " * 8, "cosine": 0.625}],
        "actions": [
            action,
            action | cut | {"was": "old"},
            action | {"kind": "update", "target": 2, "was": "old"},
            action | {"kind": "delete", "target": 7, "text": "", "fates": ["invalid"], "why": "no"},
        ],
    }
    assert transcript.tell_turn(turn).splitlines() == [
        "  query     who",
        "  shown     1 (0.62) an entry an entry an entry an entry an",
        "            entry an entry an entry an entry",
        "  create    one two three [applied]",
        "  create    one [applied; truncated to 1 of 3 tokens;",
        "            evicted: old]",
        "  update 2  one two three [applied; was: old]",
        "  delete 7  [invalid; no]",
    ]
    assert transcript.tell_turn(turn | {"actions": [], "shown": [], "query": ""}) == (
        "  did       nothing"
    )
    assert transcript.tell_answer("Who?", "", []).splitlines() == [
        "  question  Who?",
        "  answer    (none)",
        "  from      no entry: none was shown",
    ]
