"""Scripted teachers: the clean one solves everything, and every rate moves what it names."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.agent import build
from atommem_jax.config import TeacherConfig
from atommem_jax.language import protocol as protocol_lib
from atommem_jax.learning import rollout
from atommem_jax.tasks import teacher
from atommem_jax.tasks.teacher import SCRIPTED
from atommem_jax.types import EMPTY, ActionKind, Phase
from tests.helpers import tiny

RATES = [f.name for f in dataclasses.fields(TeacherConfig) if f.name != "scratchpad_only"]
EPISODES = range(tiny.EXAMPLES)


@functools.partial(jax.jit, static_argnames="scratchpad_only")
def _play(setting, rates, episodes, ids, seed, scratchpad_only):
    # Traced rates: one program for all teachers.
    config = TeacherConfig(**rates, scratchpad_only=scratchpad_only)
    policy = teacher.policy(config, tiny.make_parts().script)
    return rollout.run(setting, policy, episodes, ids, seed)


def play(seed=0, scratchpad_only=False, episodes=None, **rates):
    """Every tiny episode once. Returns trajectories with NumPy leaves."""
    episodes = tiny_episodes() if episodes is None else episodes
    clean = dataclasses.asdict(TeacherConfig())
    rates = {name: jnp.float32(rates.get(name, clean[name])) for name in RATES}
    setting = tiny.make_parts().setting(tiny.make_shape())
    ids = np.arange(len(EPISODES), dtype=np.int32)
    played = _play(setting, rates, episodes, ids, jax.random.key(seed), scratchpad_only)
    return jax.device_get(played)


@functools.cache
def tiny_episodes():
    return jax.device_get(tiny.make_episodes(EPISODES)[0])


def count(played, kind, fate="applied", phase=None):
    """Actions of a kind, per episode."""
    counts = getattr(played.turns.report, fate)[..., kind]
    return (counts if phase is None else counts * (played.turns.phase == phase)).sum(axis=1)


def facts():
    """(support, correction, real) [B C], one fact a chunk."""
    a = tiny_episodes().annotations
    return a.support[..., 0], a.supersedes[..., 0] != EMPTY, a.length[..., 0] > 0


def fact_tokens(b, chunk):
    a = tiny_episodes().annotations
    start, length = int(a.start[b, chunk, 0]), int(a.length[b, chunk, 0])
    return tiny_episodes().chunks[b, chunk, start : start + length].tolist()


def stored(played, b):
    """The texts in memory at the end."""
    memory = jax.tree.map(lambda x: x[b], played.memory)
    return sorted(
        memory.entries[slot, : memory.lengths[slot]].tolist()
        for slot in np.flatnonzero(memory.valid)
    )


def asked():
    return (
        np.arange(tiny_episodes().questions.shape[1])[None] < tiny_episodes().num_questions[:, None]
    )


def solved(played):
    a = tiny_episodes().annotations
    width = a.gold.shape[2]
    same = (played.answers[..., :width] == a.gold).all(-1) & (
        played.answer_lengths == a.gold_length
    )
    return same[asked()]


def test_the_samples_hold_what_these_tests_need():
    support, correction, real = facts()
    assert (support & correction).sum() >= 5
    assert (~support & real).sum() >= 20
    assert (tiny_episodes().num_questions == 1).any()
    assert (tiny_episodes().num_questions == 2).any()


def test_the_clean_teacher_solves_everything_without_waste():
    played = play()
    support, correction, _ = facts()
    assert solved(played).all()
    assert not played.turns.report.invalid.any()
    assert not played.turns.report.truncated.any()
    np.testing.assert_array_equal(count(played, ActionKind.UPDATE), (support & correction).sum(1))
    np.testing.assert_array_equal(count(played, ActionKind.CREATE), (support & ~correction).sum(1))
    np.testing.assert_array_equal(count(played, ActionKind.DELETE), 0)
    replaced = tiny_episodes().annotations.supersedes[..., 0]
    for b in EPISODES:
        gone = set(replaced[b][support[b] & correction[b]].tolist())
        kept = [c for c in np.flatnonzero(support[b]) if c not in gone]
        assert stored(played, b) == sorted(fact_tokens(b, c) for c in kept)


def test_the_standing_query_is_set_at_the_first_chunk():
    played, never = play(), play(set_query=0.0)
    np.testing.assert_array_equal(count(played, ActionKind.READ, phase=Phase.READING), 1)
    np.testing.assert_array_equal(count(never, ActionKind.READ, phase=Phase.READING), 0)
    a = tiny_episodes().annotations
    for b in EPISODES:
        focus = a.focus[b, : a.focus_length[b]].tolist()
        assert played.turns.report.applied[b, 0, ActionKind.READ] == 1
        actions = jax.tree.map(lambda x, b=b: x[b, 0], played.turns.actions)
        assert actions.kind[0] == ActionKind.READ
        assert actions.text[0, : actions.length[0]].tolist() == focus


@pytest.mark.parametrize(
    ("support_rate", "distractor_rate"), [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.7, 0.4)]
)
def test_store_rates_decide_what_is_stored(support_rate, distractor_rate):
    played = play(store_support=support_rate, store_distractor=distractor_rate)
    support, _, real = facts()
    written = np.zeros(support.shape, bool)
    turns = played.turns
    edits = (
        turns.report.applied[..., ActionKind.CREATE] + turns.report.applied[..., ActionKind.UPDATE]
    )
    for b, t in zip(*np.nonzero(edits), strict=True):
        assert not written[b, turns.chunk[b, t]], "a fact was stored twice"
        written[b, turns.chunk[b, t]] = True
    for kind, rate in [(support, support_rate), (~support & real, distractor_rate)]:
        chances = kind.sum()
        slack = 4 * np.sqrt(chances * rate * (1 - rate))
        assert abs(written[kind].sum() - rate * chances) <= slack
    assert not written[~real].any()


def test_corrections_are_updated_or_deleted_or_left():
    support, correction, _ = facts()
    corrections = (support & correction).sum(axis=1)
    left, deleted = play(update_shown=0.0), play(update_shown=0.0, delete=1.0)
    for played in (left, deleted):
        np.testing.assert_array_equal(count(played, ActionKind.UPDATE), 0)
        np.testing.assert_array_equal(count(played, ActionKind.CREATE), support.sum(axis=1))
    np.testing.assert_array_equal(count(left, ActionKind.DELETE), 0)
    np.testing.assert_array_equal(count(deleted, ActionKind.DELETE), corrections)
    # Deleting and creating leaves the same texts as updating.
    for b in EPISODES:
        assert stored(deleted, b) == stored(play(), b)
        assert len(stored(left, b)) == len(stored(deleted, b)) + corrections[b]


def test_missing_facts_are_read_for_by_their_subject():
    reads = play(store_support=0.6, store_distractor=1.0)
    none = play(store_support=0.6, store_distractor=1.0, read_missing=0.0)
    badly = play(store_support=0.6, store_distractor=1.0, read_badly=1.0)
    assert count(none, ActionKind.READ, phase=Phase.ANSWERING).sum() == 0
    assert (none.turns.phase != Phase.FINAL).all()

    a = tiny_episodes().annotations
    for played in (reads, badly):
        turns = played.turns
        has_read = turns.report.applied[..., ActionKind.READ] > 0
        asked_for = several = 0
        for b, t in zip(*np.nonzero(turns.phase == Phase.ANSWERING), strict=True):
            q = turns.question[b, t]
            entries = [[i for i in entry if i] for entry in turns.shown_entries[b, t].tolist()]
            missing = [c for c in a.needs[b, q] if c != EMPTY and fact_tokens(b, c) not in entries]
            assert has_read[b, t] == bool(missing)
            if not missing:
                continue
            asked_for += 1
            query = turns.actions.text[b, t, 0, : turns.actions.length[b, t, 0]].tolist()
            if played is badly:
                question = tiny_episodes().questions[b, q, : tiny_episodes().question_lengths[b, q]]
                assert query == question[-2:].tolist()
            else:  # the first that is missing, as the second hop is known by the first, and
                # then what is shown already, lest it be lost
                seen = [c for c in a.needs[b, q] if c != EMPTY and c not in missing]
                subjects = [
                    tuple(fact_tokens(b, c)[: a.subject_length[b, c, 0]])
                    for c in (missing[0], *seen)
                ]
                assert query == [i for subject in dict.fromkeys(subjects) for i in subject]
                several += len(set(subjects)) > 1
        assert asked_for >= 10
        assert several or played is badly


def test_an_unknown_answer_is_the_end_of_the_best_entry_shown():
    played = play(answer_known=0.0, read_missing=0.0)
    turns = played.turns
    gold_length = tiny_episodes().annotations.gold_length
    seen = 0
    for b, t in zip(*np.nonzero(turns.question != EMPTY), strict=True):
        if not turns.live[b, t]:
            continue
        q = turns.question[b, t]
        best = turns.shown_entries[b, t, 0].tolist()
        best = [token for token in best if token != tiny.make_tokenizer().pad_id]
        given = played.answers[b, q, : played.answer_lengths[b, q]].tolist()
        assert given == best[:-1][-gold_length[b, q] :]
        seen += 1
    assert seen == asked().sum()


def test_the_scratchpad_teacher_stores_nothing():
    played = play(scratchpad_only=True)
    for kind in (ActionKind.CREATE, ActionKind.UPDATE, ActionKind.DELETE):
        assert count(played, kind, "attempted").sum() == 0
    support, _, _ = facts()
    np.testing.assert_array_equal(count(played, ActionKind.SCRATCHPAD), support.sum(axis=1))
    for b in EPISODES:
        last = fact_tokens(b, np.flatnonzero(support[b])[-1])
        assert played.memory.scratchpad[b].tolist() == [last[-2]]  # before the full stop
    assert 0 < solved(played).mean() < 1


def play_with_notes(tokens):
    """The scratchpad teacher with room for so many tokens: (trajectories, expected notes)."""
    config = tiny.make_config().replace(
        {"memory.scratchpad_length": tokens, "rollout.response_length": 24}
    )
    parts = build.build(config, tiny.make_tokenizer())
    policy = teacher.policy(TeacherConfig(scratchpad_only=True), parts.script)
    run = jax.jit(functools.partial(rollout.run, parts.setting(tiny.make_shape()), policy))
    ids = np.arange(len(EPISODES), dtype=np.int32)
    played = jax.device_get(run(tiny_episodes(), ids, jax.random.key(0)))
    support, _, _ = facts()
    expected = []
    for b in EPISODES:
        notes = []
        for chunk in np.flatnonzero(support[b]):
            words = fact_tokens(b, chunk)
            notes = [pair for pair in notes if pair[0] != words[0]]
            notes = [*notes, (words[0], words[-2])][-(tokens // 2) :]
        expected.append([token for pair in notes for token in pair])
    return played, expected


@pytest.mark.parametrize("tokens", [2, 5, 12])
def test_longer_notes_are_pairs_of_subject_and_object(tokens):
    played, expected = play_with_notes(tokens)
    for b in EPISODES:
        length = played.memory.scratchpad_length[b]
        assert played.memory.scratchpad[b, :length].tolist() == expected[b]
    share = solved(played).mean()
    assert share == 1.0 if tokens == 12 else share < 1.0  # room for all that is asked, or not


def test_a_teacher_without_memory_guesses():
    played = play(**_rates("no_memory"))
    assert not played.turns.occupancy.any()
    assert solved(played).mean() < 0.2
    assert (played.answer_lengths[asked()] > 0).all()


@functools.cache
def noted_episodes():
    """The same, but what is to be stored of a fact is written backwards, without its full stop.

    Facts of every third chunk have no note.
    """
    a = tiny_episodes().annotations
    width = int(a.length.max()) - 1
    note = np.full((*a.length.shape, width), tiny.make_tokenizer().pad_id, np.int32)
    note_length = np.zeros(a.length.shape, np.int32)
    for b, c in zip(*np.nonzero(a.length[..., 0]), strict=True):
        if c % 3:
            text = fact_tokens(b, c)[-2::-1]
            note[b, c, 0, : len(text)], note_length[b, c, 0] = text, len(text)
    return tiny_episodes().replace(annotations=a.replace(note=note, note_length=note_length))


def stored_tokens(b, chunk):
    return fact_tokens(b, chunk)[-2::-1] if chunk % 3 else fact_tokens(b, chunk)


def test_notes_are_stored_updated_and_recognised():
    played = play(episodes=noted_episodes())
    support, correction, _ = facts()
    assert solved(played).all()
    assert not played.turns.report.invalid.any()
    np.testing.assert_array_equal(count(played, ActionKind.UPDATE), (support & correction).sum(1))
    replaced = tiny_episodes().annotations.supersedes[..., 0]
    for b in EPISODES:
        gone = set(replaced[b][support[b] & correction[b]].tolist())
        kept = [c for c in np.flatnonzero(support[b]) if c not in gone]
        assert stored(played, b) == sorted(stored_tokens(b, c) for c in kept)


def test_the_end_of_a_note_is_a_guess():
    played = play(episodes=noted_episodes(), answer_known=0.0, read_missing=0.0)
    last = play(episodes=noted_episodes(), scratchpad_only=True)
    turns = played.turns
    gold_length = tiny_episodes().annotations.gold_length
    support, _, _ = facts()
    for b, t in zip(*np.nonzero(turns.live & (turns.question != EMPTY)), strict=True):
        q = turns.question[b, t]
        best = turns.shown_entries[b, t, 0].tolist()
        best = [token for token in best if token != tiny.make_tokenizer().pad_id]
        given = played.answers[b, q, : played.answer_lengths[b, q]].tolist()
        assert given == best[-gold_length[b, q] :]
    for b in EPISODES:
        newest = stored_tokens(b, np.flatnonzero(support[b])[-1])
        assert last.memory.scratchpad[b].tolist() == newest[-1:]


def _rates(name):
    rates = dataclasses.asdict(SCRIPTED[name])
    return {key: value for key, value in rates.items() if key in RATES}


@pytest.mark.parametrize("name", SCRIPTED)
def test_every_response_is_a_sound_turn_that_ends(name):
    played = play(seed=4, scratchpad_only=SCRIPTED[name].scratchpad_only, **_rates(name))
    turns = played.turns
    live = turns.live
    ends = np.take_along_axis(
        turns.response, np.maximum(turns.response_lengths - 1, 0)[..., None], 2
    )
    assert (ends[..., 0][live] == tiny.make_tokenizer().eos_id).all()
    rows = np.arange(turns.actions.kind.shape[2]) < turns.actions.count[..., None]
    assert turns.actions.well_formed[rows].all()
    assert not turns.report.invalid.any()
    # The grammar admits what the teacher writes: SFT can score every one of its tokens.
    table = tiny.make_parts().agent.grammar
    masks = jax.jit(jax.vmap(table.masks))(turns.phase[live], turns.response[live])
    chosen = np.take_along_axis(np.asarray(masks), turns.response[live][..., None], axis=2)[..., 0]
    real = np.arange(turns.response.shape[2]) < turns.response_lengths[live][:, None]
    assert chosen[real].all()
    assert not turns.log_probs.any()


def test_a_script_writes_the_tokens_of_the_protocol():
    script = tiny.make_parts().script
    text = jnp.asarray(tiny.make_tokenizer().encode("Anna")[:1] * 3, jnp.int32)
    yes, no = jnp.ones((), bool), jnp.zeros((), bool)
    row, length = script.write(
        [
            script.action(ActionKind.UPDATE, yes, text, 2, target=jnp.int32(3)),
            script.action(ActionKind.CREATE, no, text, 3),
            script.action(ActionKind.DELETE, yes, target=jnp.int32(1)),
        ]
    )
    expected = [
        *tiny.spell_action(ActionKind.UPDATE, text[:2].tolist(), target=3),
        *tiny.spell_action(ActionKind.DELETE, target=1),
        tiny.make_tokenizer().eos_id,
    ]
    assert int(length) == len(expected)
    assert row[: len(expected)].tolist() == expected
    assert not (np.asarray(row[len(expected) :]) != script.pad_id).any()


def test_targets_of_several_widths_are_refused():
    protocol = protocol_lib.atommem(12)
    with pytest.raises(ValueError, match=r"protocol 'atommem': targets take .* one width"):
        teacher.Script.compile(protocol, tiny.make_tokenizer(), response_length=9, max_text=4)


def test_validate_names_the_rate():
    for config in SCRIPTED.values():
        config.validate()
    with pytest.raises(ValueError, match=r"teacher\.update_shown=1\.5: allowed is 0\.0 to 1\.0"):
        TeacherConfig(update_shown=1.5).validate()
