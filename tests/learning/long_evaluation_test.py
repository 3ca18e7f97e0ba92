"""Segments come to what a rollout over the whole comes to, wherever they are cut or killed."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.learning import environment, evaluation, long_evaluation, rollout
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.tasks import batches, encoding, teacher
from tests.helpers import tiers, tiny

BATCH = 5
EVICTION = tiny.make_config().memory.eviction


@functools.cache
def make_params():
    return tiny.make_params(scale=0.3)


def make_policy(params, scripted):
    """The model; or a script that reads, and forgets some facts, while the model answers."""
    model = rollout.model_policy(tiny.make_parts().agent, params, jnp.float32(1.0))
    if not scripted:
        return model
    rates = teacher.TeacherConfig(store_support=0.7, update_shown=0.0, set_query=0.5)
    return rollout.by_phase(teacher.policy(rates, tiny.make_parts().script), model)


@functools.cache
def make_shape(window: int):
    return encoding.fit_shape(tiny.make_examples(), tiny.make_tokenizer(), window)


@functools.partial(jax.jit, static_argnums=4)
def _play_whole(setting, params, episodes, ids, scripted):
    return rollout.run(setting, make_policy(params, scripted), episodes, ids, jax.random.key(3))


@functools.cache
def whole(scripted=False):
    """(records, statistics, trajectories) of rollouts over the whole."""
    played = []

    def play(episodes, ids):
        setting = tiny.make_parts().setting(tiny.make_shape())
        played.append(jax.device_get(_play_whole(setting, make_params(), episodes, ids, scripted)))
        return played[-1]

    split = batches.iterate_split(
        tiny.make_examples(), tiny.make_tokenizer(), tiny.make_shape(), batch_size=BATCH
    )
    decode = tiny.make_tokenizer().decode
    return *evaluation.evaluate(play, split, decode, eviction=EVICTION), played


class Segments:
    """A player that can be killed before a segment of a given number."""

    def __init__(self, window: int, die_at: int = -1, scripted: bool = False):
        self.scripted = scripted
        self.turns, self.setting = window, tiny.make_parts().setting(make_shape(window))
        self.die_at, self.played = die_at, 0
        self.records = []

    def start(self, episodes):
        return jax.vmap(environment.start, in_axes=(None, 0))(self.setting, episodes)

    def play(self, env, episodes, ids, first_turn):
        if self.played == self.die_at:
            raise KeyboardInterrupt
        self.played += 1
        env, turns = _play_segment(
            self.setting,
            make_params(),
            env,
            episodes,
            ids,
            jnp.int32(first_turn),
            self.turns,
            self.scripted,
        )
        self.records.append((first_turn, jax.device_get(turns)))
        return env, turns


@functools.partial(jax.jit, static_argnums=(6, 7))
def _play_segment(setting, params, env, episodes, ids, first_turn, turns, scripted):
    env, records = rollout.run_segment(
        setting,
        make_policy(params, scripted),
        env,
        episodes,
        ids,
        jax.random.key(3),
        first_turn,
        turns,
    )
    return env, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), records)


def run(player, saved=None, save=None, **hooks):
    split = batches.stream_split(
        tiny.make_examples(), tiny.make_tokenizer(), make_shape(player.turns), batch_size=BATCH
    )
    return long_evaluation.LongEvaluation(
        player,
        tiny.make_tokenizer().decode,
        mesh_lib.single(),
        eviction=EVICTION,
        save=save,
        **hooks,
    ).run(split, saved)


def same_records(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.pop("log_prob") == pytest.approx(other["log_prob"], abs=1e-5)
        assert one == {name: value for name, value in other.items() if name != "log_prob"}


@pytest.mark.parametrize("window", tiers.first([3, 1, 50]))
def test_segments_of_any_length_come_to_the_whole(window):
    player = Segments(window)
    records, statistics = run(player)
    same_records(records, whole()[0])
    expected = {name: value for name, value in whole()[1].items() if name != "unanswered"}
    for name in ("tokens", "tokens_per_pass", "lane_utilisation"):  # sums, or of other groups
        statistics.pop(name), expected.pop(name)
    # Means of batches there, of all turns here: what is per episode is the same.
    per_episode = [name for name in expected if "/" in name] + ["turns", "reading_turns"]
    assert {n: statistics[n] for n in per_episode} == pytest.approx(
        {n: expected[n] for n in per_episode}, rel=1e-5
    )


@pytest.mark.long
def test_answers_break_where_they_do_in_the_whole():
    expected, _, _ = whole(scripted=True)
    assert len({record["stage"] for record in expected}) > 1
    records, _ = run(Segments(2, scripted=True))
    same_records(records, expected)


def test_every_turn_is_the_same_turn():
    window = 4
    player = Segments(window)
    run(player)
    batch = -1
    for first, turns in player.records:
        batch += first == 0
        reference = whole()[2][batch].turns
        last = min(window, reference.live.shape[1] - first)
        for field in ("live", "phase", "chunk", "question", "prompt", "response", "shown"):
            ours = getattr(turns, field)[:, :last]
            theirs = getattr(reference, field)[:, first : first + last]
            np.testing.assert_array_equal(ours, theirs, err_msg=field)
    assert batch == len(whole()[2]) - 1


@pytest.mark.parametrize("die_at", [1, 4, 9])
def test_what_was_killed_goes_on_where_it_stood(die_at, monkeypatch):
    monkeypatch.setattr(long_evaluation, "SEGMENTS_BETWEEN_SAVES", 2)
    kept = []

    def save(saved):
        kept.append(json.dumps(dataclasses.asdict(saved)))

    with pytest.raises(KeyboardInterrupt):
        run(Segments(3, die_at), save=save)
    saved = long_evaluation.Saved(**json.loads(kept[-1])) if kept else None
    player, told = Segments(3), []
    records, statistics = run(player, saved, on_tokens=told.append)
    same_records(json.loads(json.dumps(records)), json.loads(json.dumps(whole()[0])))
    complete, everything = Segments(3), []
    expected = run(complete, on_tokens=everything.append)[1]
    assert statistics == pytest.approx(expected, rel=1e-6)
    assert player.played < complete.played or not kept
    assert sum(told) + (saved.tokens if saved else 0) == sum(everything)


def test_a_state_of_another_agent_is_refused():
    packed = long_evaluation._pack({"a": np.zeros(3)})
    with pytest.raises(ValueError, match="of another agent; remove it"):
        long_evaluation._unpack(packed, {"a": np.zeros(4)})


def test_tokens_read_are_those_of_the_documents():
    told = []
    run(Segments(3), on_tokens=told.append)
    tokenizer = tiny.make_tokenizer()
    per_document = [encoding.count_tokens(example, tokenizer) for example in tiny.make_examples()]
    # The last batch is filled up with copies of the last document.
    copies = -len(per_document) % BATCH
    assert sum(told) == sum(per_document) + copies * per_document[-1]


def test_a_stream_holds_one_window_and_goes_forward_only():
    tokenizer = tiny.make_tokenizer()
    example = tiny.make_examples()[0]
    stream = encoding.EpisodeStream(example, encoding.TextEncoder(tokenizer), make_shape(2))
    whole_episode = encoding.encode(example, tokenizer, tiny.make_shape())
    for first in (0, 1, 4, 6):
        window = stream.window(first)
        assert window.first_chunk == first
        length = int(window.chunk_lengths[0])
        if first < 6:
            np.testing.assert_array_equal(
                window.chunks[0, :length], whole_episode.chunks[first, :length]
            )
        assert (window.num_chunks == 6) == (first + 2 >= 6)
        assert stream.tokens_read == whole_episode.chunk_lengths[:first].sum()
    with pytest.raises(ValueError, match="first is 2, but the document was read to chunk 6"):
        stream.window(2)
