"""An agent on a person's own documents, with the smallest checkpoints there can be."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from atommem_jax.agent import build, load
from atommem_jax.config import ConfigError
from atommem_jax.documents import conversation, transcript
from atommem_jax.model import transformer as model_lib
from atommem_jax.weights.checkpoint import Checkpointer
from tests.conftest import COMPILATION_CACHE, ROOT
from tests.helpers import runs, tiny
from tests.language import chat_test
from tests.report import page_test

EXAMPLE = 3  # of the tiny examples: the document


@pytest.fixture(autouse=True)
def _cache(monkeypatch):
    """Scripts called in this process keep its own compilation cache."""
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))


def save_checkpoint(folder, config, tokenizer, params, progress) -> str:
    with Checkpointer(folder / "checkpoints", best_metric="em") as checkpointer:
        checkpointer.save(
            7,
            {"train": {"params": params}},
            config=config.to_dict(),
            tokenizer=tokenizer.to_bytes(),
            data_state=b"",
            progress=progress,
        )
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model that read one sentence a part, as `train.py` leaves it."""
    return save_checkpoint(
        tmp_path_factory.mktemp("trained"),
        tiny.make_config(),
        tiny.make_tokenizer(),
        tiny.make_params(scale=0.3),
        {"stage": "rl", "stage_step": 1, "shape": dataclasses.asdict(tiny.make_shape())},
    )


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory):
    """Of a chat model, as `convert.py` leaves it."""
    config = tiny.make_config().replace(
        {"prompt": "chat", "protocol.name": "atommem", "model.match_features": False}
    )
    tokenizer = chat_test.make_tokenizer()
    model = build.build(config, tokenizer).agent.model
    params = tiny.disturb(model_lib.init_params(model, jax.random.key(0)), 0.3)
    return save_checkpoint(tmp_path_factory.mktemp("chat"), config, tokenizer, params, {})


def make_facts() -> list[str]:
    return [fact["text"] for chunk in tiny.make_examples()[EXAMPLE]["chunks"] for fact in chunk]


def make_questions() -> list[str]:
    """Three: two of the document, and one of another."""
    examples = tiny.make_examples()
    asked = [question["text"] for example in examples for question in example["questions"]]
    return list(dict.fromkeys(asked))[:3]


@pytest.fixture
def document(tmp_path):
    """The facts as a person might have them: wrapped, with a page break."""
    file, facts = tmp_path / "notes.txt", make_facts()
    middle = len(facts) // 2
    text = "\n".join(facts[:middle]) + "\n\f" + "  ".join(facts[middle:]) + "\n"
    file.write_text(text, encoding="utf-8")
    return str(file)


def read_episodes(folder) -> list[dict]:
    return json.loads(page_test.Page(folder / "index.html").scripts["data"])["episodes"]


def fold(episode) -> dict[int, str]:
    """The table after the last turn, from what the page is given."""
    table = {entry["slot"]: entry["text"] for entry in episode["start"]}
    for turn in episode["turns"]:
        for change in turn["changes"]:
            table.pop(change["slot"], None)
            if change["after"] is not None:
                table[change["slot"]] = change["after"]
    return table


def test_the_script_reads_answers_and_is_asked_more(checkpoint, document, tmp_path):
    first, second, third = make_questions()
    command = [
        sys.executable,
        str(ROOT / "experiments" / "answer.py"),
        f"--checkpoint={checkpoint}",
        f"--document={document}",
        f"--question={first}",
        f"--question={second}",
        "--interactive",
        f"--out={tmp_path / 'trace'}",
        f"--save_memory={tmp_path / 'kept.npz'}",
        "--temperature=1",
    ]
    far = "far " * 30
    done = subprocess.run(
        command,
        input=f"{far}\n{third}\n\n{first}\n",  # after the empty line nothing is read
        env=runs.make_environment() | {"COLUMNS": "72"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed, facts = done.stdout, make_facts()

    # Each part is announced before what the turn did with it.
    heads = re.findall(r"^\[ *[\d.]+ s\] part (\d+)/(\d+) of notes.txt( again)?$", printed, re.M)
    assert [int(i) for i, _, again in heads if not again] == list(range(1, len(facts) + 1))
    assert {count for _, count, _ in heads} == {str(len(facts))}
    for fact in facts:
        assert re.search(rf"^  text +{re.escape(fact)}$", printed, re.M)
    assert re.search(r"^  create .* \[applied", printed, re.M)
    assert f"question={far.strip()}: has" in printed.replace("\n", " ")
    for question in (first, second, third):
        assert re.search(rf"^  question  {re.escape(question)}\n  answer ", printed, re.M)
    assert "\x1b" not in printed

    page = page_test.Page(tmp_path / "trace" / "index.html")
    assert f"trace: {tmp_path / 'trace' / 'index.html'}" in printed
    assert "notes.txt" in "".join(page.text)
    read, asked = read_episodes(tmp_path / "trace")
    assert read["chunks"] == facts
    assert [q["text"] for q in read["questions"]] == [first, second]
    assert [q["text"] for q in asked["questions"]] == [third]
    assert (read["em"], asked["em"], asked["chunks"], read["start"]) == (None, None, [], [])
    assert {e["slot"]: e["text"] for e in asked["start"]} == fold(read) != {}
    assert len(heads) == sum(turn["phase"] == "reading" for turn in read["turns"])
    with np.load(tmp_path / "kept.npz") as kept:
        assert kept["valid"].sum() == len(fold(asked))


def run(checkpoint, tmp_path, name, lines=(), **options):
    options = {"out": str(tmp_path / name)} | options
    answers = conversation.run(conversation.Options(checkpoint=checkpoint, **options), iter(lines))
    return answers, read_episodes(tmp_path / name)


def test_a_memory_that_was_kept_goes_on_as_if_it_had_never_ended(
    checkpoint, document, tmp_path, capsys
):
    first, second, third = make_questions()
    heat = {"temperature": 1.0, "seed": 5}
    whole, (read, asked, again) = run(
        checkpoint, tmp_path, "whole", [second, third], documents=[document], questions=[first],
        interactive=True, **heat,
    )  # fmt: skip
    kept = str(tmp_path / "kept.npz")
    one, (only,) = run(
        checkpoint, tmp_path, "one", documents=[document], questions=[first], save_memory=kept,
        **heat,
    )  # fmt: skip
    two, (later,) = run(
        checkpoint, tmp_path, "two", questions=[second], load_memory=kept, save_memory=kept, **heat
    )
    three, (last,) = run(checkpoint, tmp_path, "three", questions=[third], load_memory=kept, **heat)
    assert whole == one + two + three
    assert (read, asked, again) == (only, later, last)
    assert [e["episode"] for e in (read, asked, again)] == [0, 1, 2]
    assert f"{kept}: {len(fold(read))} entries, of notes.txt" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--load_memory=.*memory\.slots=6 \(here: 9\)"):
        run(
            checkpoint, tmp_path, "four", questions=[third], load_memory=kept,
            settings=["memory.slots=9"],
        )  # fmt: skip
    # An answer comes with what its own turn was shown.
    for told, episode in zip(whole, (read, asked, again), strict=True):
        assert told.text == episode["questions"][0]["answer"]
        assert told.shown == episode["turns"][-1]["shown"]
        assert [e["cosine"] for e in told.shown] == sorted(
            (e["cosine"] for e in told.shown), reverse=True
        )


def test_a_chat_model_reads_parts_of_many_sentences(chat_checkpoint, document, tmp_path, capsys):
    settings = [
        "memory.entry_length=24", "memory.query_length=24", "memory.shown=2",
        "rollout.response_length=80", "rollout.max_actions=2",
    ]  # fmt: skip
    (told,), (episode,) = run(
        chat_checkpoint, tmp_path, "out", documents=[document, document],
        questions=[make_questions()[0]], settings=settings, chunk_tokens=30,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "entries of up to 24 tokens, 2 shown" in printed
    # No part is of two documents, and each holds several sentences with the breaks between them.
    half = len(episode["chunks"]) // 2
    assert 1 < half < len(make_facts())
    assert episode["chunks"][:half] == episode["chunks"][half:]
    assert "".join("".join(episode["chunks"][:half]).split()) == "".join(
        "".join(make_facts()).split()
    )
    assert any("\n" in chunk for chunk in episode["chunks"])
    texts = [entry["text"] for entry in told.shown]
    encode = chat_test.make_tokenizer().encode
    assert all(len(encode(text)) <= 24 for text in texts)
    assert len(texts) <= 2


def test_longer_sentences_are_cut_with_a_note(checkpoint, tmp_path, capsys):
    file = tmp_path / "prose.md"
    file.write_text("# Report\n\nThe committee, which met on Tuesday, approved it.\n")
    _, (episode,) = run(
        checkpoint, tmp_path, "out", documents=[str(file)], questions=[make_questions()[0]]
    )
    limit, encode = tiny.make_shape().chunk_length, tiny.make_tokenizer().encode
    assert all(len(encode(chunk)) <= limit for chunk in episode["chunks"])
    assert "".join("".join(episode["chunks"]).split()) == "".join(file.read_text().split())
    assert re.search(r"note: \d+ of its pieces are cut from sentences", capsys.readouterr().out)


def test_what_cannot_be_is_refused_before_anything_is_played(checkpoint, document, tmp_path):
    question = make_questions()[0]

    def refuse(message, **options):
        options = {"documents": [document], "questions": [question]} | options
        with pytest.raises(ConfigError, match=message):
            run(checkpoint, tmp_path, "out", **options)

    refuse(r"--document is missing: .* --load_memory", documents=[])
    refuse(r"--question is missing: .* --interactive", questions=[])
    refuse(r"--out=.*notes.txt: is a file; pass a folder", out=document)
    refuse(r"--document=.*: is a folder", documents=[str(tmp_path)])
    refuse(r"--save_memory=.*: is a folder", save_memory=str(tmp_path))
    refuse(r"--save_memory=.*: there is no folder", save_memory=str(tmp_path / "a" / "b.npz"))
    refuse(r"--question: is empty", questions=[" "])
    refuse(
        rf"--question=.*: has \d+ tokens, and up to {tiny.make_shape().question_length} are read; "
        r".*--question_tokens=\d+",
        questions=["why " * 40],
    )
    refuse(r"--chunk_tokens=1: too few for notes.txt .*raise it", chunk_tokens=1)
    refuse(r"--set=model.width=8: allowed is FIELD=VALUE", settings=["model.width=8"])
    assert not (tmp_path / "out").exists()


def test_sizes_of_a_checkpoint_can_be_set():
    config = tiny.make_config()
    changed = load.override(
        config, ["memory.slots=9", "rollout.constrained=false", "rollout.top_p=0.5"]
    )
    assert (changed.memory.slots, changed.rollout.constrained, changed.rollout.top_p) == (
        9,
        False,
        0.5,
    )
    assert config.memory.slots == 6
    assert load.override(config, []) is config
    for setting, message in [
        ("memory.slots", "--set=memory.slots: allowed is FIELD=VALUE"),
        ("memory=3", "memory is a section"),
        ("memory.slot=9", "did you mean 'memory.slots'"),
        ("memory.slots=many", "--set=memory.slots=many: 'many' is no int; it was 6"),
        ("memory.slots=2", "memory.shown=4 is more than memory.slots=2"),
        ("rollout.constrained=1", "allowed is true or false"),
        ("rollout.top_p=2", "top_p=2.0: allowed is above 0.0"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            load.override(config, [setting])


def test_a_checkpoint_knows_the_shape_that_it_was_trained_on(checkpoint, chat_checkpoint):
    assert load.load(checkpoint).trained_shape == tiny.make_shape()
    assert load.load(chat_checkpoint).trained_shape is None


# ---------------------------------------------------------------------------------------------
# Words


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


def test_a_page_of_a_document_without_questions(checkpoint, document, tmp_path):
    answers, (episode,) = run(checkpoint, tmp_path, "out", documents=[document], interactive=True)
    assert (answers, episode["questions"], episode["em"]) == ([], [], None)
    assert {turn["phase"] for turn in episode["turns"]} == {"reading"}
