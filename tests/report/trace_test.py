"""Traces against independent facts: recorded reports, the plain-Python memory, words by hand."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atommem_jax.learning import environment, rollout
from atommem_jax.report import replay, trace
from atommem_jax.types import ActionKind, Phase, Response
from tests.helpers import memory_reference, tiny

EPISODES = (0, 3, 4)
WIDTH = 40  # of the responses written here
KINDS = [kind for kind in ActionKind if kind != ActionKind.NONE]


@functools.cache
def make_setting(eviction: str) -> environment.Setting:
    """The tiny setting with a table so small that creates must evict."""
    setting = tiny.make_parts().setting(tiny.make_shape())
    memory = dataclasses.replace(setting.limits.memory, slots=4, eviction=eviction)
    limits = dataclasses.replace(setting.limits, memory=memory)
    return dataclasses.replace(setting, limits=limits)


@functools.partial(jax.jit, static_argnames="length")
def _play(setting, episodes, rows, length):
    """Plays what is written in rows [B, chunks + questions, R]; every second row is a program's."""
    chunks = episodes.chunks.shape[1]

    def policy(views, episodes, keys):
        del episodes, keys
        at = jnp.where(views.chunk >= 0, views.chunk, chunks + jnp.maximum(views.question, 0))
        tokens = jnp.take_along_axis(rows, at[:, None, None], axis=1)[:, 0]
        size = tokens.shape[0]
        return Response.of_program(tokens, jnp.full(size, length, jnp.int32), scripted=at % 2 == 1)

    ids = jnp.arange(7, 7 + rows.shape[0], dtype=jnp.int32)
    return rollout.run(setting, policy, episodes, ids, jax.random.key(0))


def play(eviction: str, rows: np.ndarray):
    episodes, aliases = tiny.make_episodes(EPISODES)
    setting = make_setting(eviction)
    trajectories = _play(setting, episodes, jnp.asarray(rows, jnp.int32), WIDTH)
    return setting, jax.device_get(trajectories), jax.device_get(episodes), aliases


def pad(ids: list[int]) -> list[int]:
    tokenizer = tiny.make_tokenizer()
    assert len(ids) < WIDTH
    return [*ids, tokenizer.eos_id, *[tokenizer.pad_id] * (WIDTH - len(ids) - 1)]


@functools.cache
def play_random(eviction: str):
    """Random turns: full tables, bad targets, open tags, empty and long texts, wrong phases."""
    shape = tiny.make_shape()
    rng = np.random.default_rng(0)
    words = tiny.make_tokenizer().encode("Drurvin works at Mostex. Nurdox is in Lurava.")

    def write() -> list[int]:
        ids: list[int] = []
        for _ in range(rng.integers(1, 4)):
            kind = rng.choice([*[ActionKind.CREATE] * 6, *KINDS])
            target = rng.integers(0, 5) if kind in (ActionKind.UPDATE, ActionKind.DELETE) else 0
            length = 0 if kind == ActionKind.DELETE else rng.choice([0, 1, 1, 3, 3, 11])
            text = rng.choice(words, length).tolist()
            ids += tiny.spell_action(ActionKind(kind), text, int(target), rng.random() < 0.9)
        return pad(ids[: WIDTH - 1])

    count = shape.chunks + shape.questions
    rows = np.array([[write() for _ in range(count)] for _ in EPISODES])
    return play(eviction, rows)


@functools.cache
def play_model():
    """An untrained model under the grammar."""
    episodes, aliases = tiny.make_episodes(EPISODES)
    trajectories = tiny.play(tiny.make_params(scale=0.3), episodes, EPISODES, seed=5)
    setting = tiny.make_parts().setting(tiny.make_shape())
    return setting, jax.device_get(trajectories), jax.device_get(episodes), aliases


PLAYED = {
    "lru": functools.partial(play_random, "lru"),
    "oldest": functools.partial(play_random, "oldest"),
    "reject": functools.partial(play_random, "reject"),
    "model": play_model,
}


def describe(played):
    setting, trajectories, episodes, aliases = played
    return trace.describe(setting, trajectories, episodes, tiny.make_tokenizer(), aliases)


# ---------------------------------------------------------------------------------------------
# Replay


@pytest.mark.parametrize("name", PLAYED)
def test_what_became_of_single_actions_adds_up_to_the_report(name):
    setting, trajectories, episodes, _ = PLAYED[name]()
    played = replay.replay(setting, trajectories, episodes)
    live = trajectories.turns.live
    for field in ("attempted", "applied", "invalid", "rejected", "truncated", "evicted"):
        single = getattr(played.fates, field)
        assert single.max() <= 1
        recorded = getattr(trajectories.turns.report, field)
        np.testing.assert_array_equal(single.sum(axis=2)[live], recorded[live])


def test_the_random_turns_meet_every_fate():
    fates: dict[str, set] = {}
    for name in ("lru", "oldest", "reject"):
        told = [a for e in describe(PLAYED[name]()) for t in e["turns"] for a in t["actions"]]
        fates[name] = {fate for action in told for fate in action["fates"]}
        assert {"applied", "invalid", "truncated"} <= fates[name]
    assert "evicted" in fates["lru"] & fates["oldest"]
    assert "rejected" in fates["reject"]
    assert "evicted" not in fates["reject"]


@pytest.mark.parametrize("name", PLAYED)
def test_tables_and_fates_agree_with_the_plain_memory(name):
    played = PLAYED[name]()
    setting, trajectories, _, _ = played
    decode = tiny.make_tokenizer().decode
    config, answer = setting.limits.memory, setting.grammar.max_text
    caps = memory_reference.Caps(
        entry=config.entry_length,
        scratchpad=config.scratchpad_length,
        query=config.query_length,
        answer=answer,
        shown=config.shown,
    )
    allowed = {
        "reading": set(memory_reference.KINDS) - {"answer"},
        "answering": {"read", "answer"},
        "final": {"answer"},
    }
    for b, episode in enumerate(describe(played)):
        reference = memory_reference.Memory(config.slots, caps)
        table: dict[int, str] = {}
        live = np.flatnonzero(trajectories.turns.live[b])
        for t, turn in zip(live, episode["turns"], strict=True):
            reference.shown = [None] * config.shown
            for entry in turn["shown"]:
                reference.shown[entry["number"] - 1] = entry["slot"]
                assert table[entry["slot"]] == entry["text"]
            reference.clock += bool(turn["shown"])
            for entry in turn["shown"]:
                reference.slots[entry["slot"]].touched = reference.clock
            assert turn["entries"][0] == len(table) == trajectories.turns.occupancy[b, t]

            actions = jax.tree.map(lambda x, b=b, t=t: x[b, t], trajectories.turns.actions)
            for a, told in enumerate(turn["actions"]):
                written = memory_reference.Action(
                    kind=ActionKind(int(actions.kind[a])).name.lower(),
                    target=int(actions.target[a]),
                    text=actions.text[a].tolist() + [0] * 100,
                    well_formed=bool(actions.well_formed[a]),
                )
                written.text = written.text[: actions.length[a]]
                assert told["kind"] == written.kind
                outcomes = reference._act(written, allowed[turn["phase"]], config.eviction)
                assert set(told["fates"]) == set(outcomes)

            for change in turn["changes"]:
                assert change["before"] == table.pop(change["slot"], None)
                if change["after"] is not None:
                    table[change["slot"]] = change["after"]
            expected = {
                slot: decode(entry.text) for slot, entry in enumerate(reference.slots) if entry
            }
            assert table == expected
            assert turn["entries"][1] == len(expected)
            after = "".join(text for what, text in turn["scratchpad"] if what != "removed")
            assert after == decode(reference.scratchpad)


@pytest.mark.parametrize(
    ("field", "break_it"),
    [
        (
            "report",
            lambda t: {"report": dataclasses.replace(t.report, applied=t.report.applied + 1)},
        ),
        ("occupancy", lambda t: {"occupancy": t.occupancy + 1}),
        ("shown", lambda t: {"shown": t.shown[..., ::-1] + 1}),
        ("turns", lambda t: {"response": np.roll(t.response, 1, axis=1)}),
    ],
)
def test_a_record_that_is_not_reproduced_is_refused(field, break_it):
    setting, trajectories, episodes, _ = play_random("lru")
    turns = dataclasses.replace(trajectories.turns, **break_it(trajectories.turns))
    broken = dataclasses.replace(trajectories, turns=turns)
    matches = "does not reproduce" if field == "turns" else f"{field}.*does not reproduce"
    with pytest.raises(ValueError, match=matches):
        replay.replay(setting, broken, episodes)


def test_another_setting_is_refused():
    _, trajectories, episodes, _ = play_random("lru")
    with pytest.raises(ValueError, match="setting and the episode that it was played with"):
        replay.replay(make_setting("reject"), trajectories, episodes)


# ---------------------------------------------------------------------------------------------
# Words


@functools.cache
def play_by_hand():
    """One story, told in every episode's first chunks."""
    encode = tiny.make_tokenizer().encode
    shape = tiny.make_shape()
    a, b, c = (encode(text) for text in ("Mostex", "Nurdox", "Lurava"))
    create, read, update, delete, scratchpad, answer = (
        functools.partial(tiny.spell_action, kind) for kind in KINDS
    )
    story = [
        create(a) + create(b) + read(a),
        update(c, 1) + delete((), 1) + update(b, 1),
        create(()) + answer(a) + create(c, closed=False),
        scratchpad(b) + create(c) + update(a, 4),
        create(a) + create(a) + create((a * 11)[:11]),
    ]
    rows = [pad(ids) for ids in story]
    rows += [pad([])] * (shape.chunks - len(rows))
    rows += [pad(answer(a)), pad([])]
    return play("lru", np.array([rows[: shape.chunks + shape.questions]] * len(EPISODES)))


def test_a_story_in_words():
    setting, _, _, aliases = play_by_hand()
    assert setting.limits.memory.scratchpad_length == 1
    episode = describe(play_by_hand())[0]
    first, second, third, fourth, fifth = episode["turns"][:5]
    assert first["response"] == "<create>Mostex<end><create>Nurdox<end><read>Mostex<end>"
    assert first["shown"] == []
    assert first["changes"] == [
        {"slot": 0, "events": ["added"], "before": None, "after": "Mostex"},
        {"slot": 1, "events": ["added"], "before": None, "after": "Nurdox"},
    ]
    # The query's own words are nearest.
    assert second["query"] == "Mostex"
    assert [(e["number"], e["slot"], e["text"]) for e in second["shown"]] == [
        (1, 0, "Mostex"),
        (2, 1, "Nurdox"),
    ]
    assert second["shown"][0]["cosine"] == pytest.approx(1.0, abs=1e-3)
    assert [action["fates"] for action in second["actions"]] == [
        ["applied"],
        ["applied"],
        ["invalid"],
    ]
    assert [action["was"] for action in second["actions"]] == ["Mostex", "Lurava", ""]
    assert second["actions"][2]["why"] == "Memory 1 was deleted or evicted earlier in this turn"
    assert second["changes"] == [
        {"slot": 0, "events": ["updated", "deleted"], "before": "Mostex", "after": None}
    ]
    assert [action["why"] for action in third["actions"]] == [
        "it has no text",
        "not allowed while reading",
        "malformed: not closed, or its target cannot be read",
    ]
    assert third["changes"] == []
    assert fourth["scratchpad"] == [["added", fourth["actions"][0].get("kept", "Nurdox")]]
    assert fourth["actions"][2]["why"] == "nothing is shown as Memory 4"
    assert fifth["entries"] == [2, 4]
    # Slot 0 was filled again before slot 1, but slot 1 has been shown in every turn.
    last = fifth["actions"][2]
    assert last["fates"] == ["applied", "truncated", "evicted"]
    assert (last["tokens"], last["kept_tokens"]) == (11, setting.limits.memory.entry_length)
    assert last["text"].startswith(last["kept"])
    assert [turn["scripted"] for turn in episode["turns"][:4]] == [False, True, False, True]
    assert [question["gold"] for question in episode["questions"]] == aliases[0]
    assert episode["questions"][0]["answer"] == "Mostex"
    assert episode["questions"][0]["em"] == float("Mostex" in aliases[0][0])


def test_a_trace_is_plain_data_about_the_episode():
    played = play_model()
    described = describe(played)
    assert json.loads(json.dumps(described)) == described
    examples = tiny.make_examples()
    for number, b, episode in zip(EPISODES, range(3), described, strict=True):
        example = examples[number]
        assert episode["episode"] == example["id"]
        assert episode["trajectory"] == number
        assert episode["chunks"] == [chunk[0]["text"] for chunk in example["chunks"]]
        asked = [question["text"] for question in example["questions"]]
        assert [question["text"] for question in episode["questions"]] == asked
        assert len(episode["turns"]) == played[1].turns.live[b].sum()
        assert {turn["phase"] for turn in episode["turns"]} <= {p.name.lower() for p in Phase}


# ---------------------------------------------------------------------------------------------
# Small things

TEXTS = st.text(st.sampled_from("ab \n"), max_size=12)


@given(TEXTS, TEXTS)
def test_a_diff_spells_both_texts(before, after):
    runs = trace.diff(before, after)
    assert "".join(text for what, text in runs if what != "added") == before
    assert "".join(text for what, text in runs if what != "removed") == after
    assert all(text for _, text in runs)
    if before == after:
        assert {what for what, _ in runs} <= {"same"}


def test_a_diff_goes_by_words():
    assert trace.diff("Ann works at Foo.", "Ann works at Bar now.") == [
        ["same", "Ann works at"],
        ["removed", " Foo."],
        ["added", " Bar now."],
    ]


@pytest.mark.parametrize(
    ("em", "count", "rows"),
    [
        ([1, 0, 1, 0.5, 1, 0], 4, [0, 1, 2, 3]),
        ([1, 1, 1, 0], 3, [0, 1, 3]),
        ([1, 1, 1], 2, [0, 1]),
        ([0, 0, 0, 1], 3, [0, 1, 3]),
        ([0, 0, 0], 2, [0, 1]),
        ([0, 1], 5, [0, 1]),
        ([0, 1], 0, []),
        ([1, 0], 1, [1]),
    ],
)
def test_right_and_wrong_episodes_are_mixed(em, count, rows):
    assert trace.choose(em, count) == rows


# ---------------------------------------------------------------------------------------------
# The facts behind an answer


@pytest.mark.parametrize("name", PLAYED)
def test_the_facts_of_every_question_are_followed(name):
    _, _, episodes, _ = PLAYED[name]()
    decode = tiny.make_tokenizer().decode
    for b, episode in enumerate(describe(PLAYED[name]())):
        a = episodes.annotations
        for q, question in enumerate(episode["questions"]):
            assert (question["stage"] is None) == (question["em"] == 1)
            needs = a.needs[b, q][a.needs[b, q] >= 0]
            assert len(question["facts"]) == len(needs)
            for fact, index in zip(question["facts"], needs.tolist(), strict=True):
                c, u = divmod(index, a.start.shape[2])
                first, size = a.start[b, c, u], a.length[b, c, u]
                sentence = decode(episodes.chunks[b, c, first : first + size].tolist())
                assert (fact["chunk"], fact["text"]) == (c, sentence.strip())
                turns = [turn for turn, what in fact["events"] if what == "seen"]
                shown = [t for t, turn in enumerate(episode["turns"]) if turn["chunk"] == c]
                assert turns == shown
                places = [turn for turn, _ in [*fact["events"], *fact["holders"]]]
                assert all(0 <= turn < len(episode["turns"]) for turn in places)
    json.dumps(describe(PLAYED[name]()), allow_nan=False)


def test_what_nobody_knows_the_answer_to_has_no_stage():
    setting, trajectories, episodes, aliases = play_model()
    unknown = [[[] for _ in accepted] for accepted in aliases]
    for accepted in (unknown, [[] for _ in aliases]):
        described = trace.describe(setting, trajectories, episodes, tiny.make_tokenizer(), accepted)
        assert all("stage" not in question for e in described for question in e["questions"])
