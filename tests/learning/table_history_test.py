"""Tables recovered on the host are those of the exact replay, with and without idle turns."""

import dataclasses

import jax
import numpy as np
import pytest

from atommem_jax.learning import table_history
from atommem_jax.learning.table_history import SCRATCHPAD
from atommem_jax.report import replay
from tests.report import trace_test

PLAYED = trace_test.PLAYED


def read(state) -> dict[int, tuple[int, ...]]:
    """Slot -> entry of one MemoryState, without the code under test."""
    held = {
        slot: tuple(state.entries[slot, : state.lengths[slot]].tolist())
        for slot in range(len(state.valid))
        if state.valid[slot]
    }
    pad = tuple(state.scratchpad[: state.scratchpad_length].tolist())
    return held | ({SCRATCHPAD: pad} if pad else {})


def fold(steps):
    """The table after each step."""
    table: dict[int, tuple[int, ...]] = {}
    for step in steps:
        for change in step.changes:
            assert table.pop(change.slot, ()) == change.before
            if change.after:
                table[change.slot] = change.after
        yield dict(table)


def take(tree, b):
    return jax.tree.map(lambda leaf: leaf[b], tree)


@pytest.mark.parametrize("name", PLAYED)
def test_every_table_is_that_of_the_replay(name):
    setting, trajectories, episodes, _ = PLAYED[name]()
    exact = replay.replay(setting, trajectories, episodes)
    eviction = setting.limits.memory.eviction
    for b in range(len(trajectories.id)):
        steps = list(table_history.recover(take(trajectories, b), eviction))
        live = np.flatnonzero(trajectories.turns.live[b])
        assert [step.row for step in steps] == live.tolist()
        for step, table in zip(steps, fold(steps), strict=True):
            assert table == read(jax.tree.map(lambda x, t=step.row, b=b: x[b, t], exact.after))
        assert table == read(take(trajectories.memory, b))


@pytest.mark.parametrize("name", ["lru", "oldest", "reject"])
def test_turns_that_wrote_nothing_are_not_needed(name):
    setting, trajectories, _, _ = PLAYED[name]()
    eviction = setting.limits.memory.eviction
    left_out = 0
    for b in range(len(trajectories.id)):
        whole = take(trajectories, b)
        applied = whole.turns.report.applied.sum(axis=-1) > 0
        left_out += int((whole.turns.live & ~applied).sum())
        rows = np.flatnonzero(applied)
        part = whole.replace(turns=jax.tree.map(lambda x, rows=rows: x[rows], whole.turns))
        (*_, last) = fold(table_history.recover(part, eviction))
        assert last == read(whole.memory)
    assert left_out


def test_evictions_and_refusals_are_told():
    _, trajectories, _, _ = PLAYED["lru"]()
    steps = list(table_history.recover(take(trajectories, 0), "lru"))
    evicted = trajectories.turns.report.evicted[0].sum()
    assert sum(change.evicts for step in steps for change in step.changes) == evicted > 0
    _, trajectories, _, _ = PLAYED["reject"]()
    steps = list(table_history.recover(take(trajectories, 0), "reject"))
    assert any(step.refusals for step in steps)


def test_a_record_of_another_memory_is_refused():
    _, trajectories, _, _ = PLAYED["lru"]()
    whole = take(trajectories, 0)
    assert whole.turns.report.evicted.any()
    with pytest.raises(ValueError, match=r"turn \d+ of the record .* Pass them as they were"):
        list(table_history.recover(whole, "reject"))
    late = dataclasses.replace(
        whole, turns=jax.tree.map(lambda leaf: leaf[whole.turns.live][8:], whole.turns)
    )
    with pytest.raises(ValueError, match="of the record"):
        list(table_history.recover(late, "lru"))
