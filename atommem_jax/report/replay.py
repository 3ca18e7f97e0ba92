"""Replays trajectories exactly, to learn what their records leave out.

A `Trajectory` records what a policy saw and wrote, but neither the table after each turn nor what
became of each single action. Both follow from the record: `replay` feeds the recorded responses
through the turn loop again, applies each turn's actions once more one at a time, and refuses a
record that it does not reproduce.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from atommem_jax.learning import environment
from atommem_jax.memory import slot_table
from atommem_jax.types import (
    EMPTY,
    Actions,
    Episode,
    MemoryState,
    Report,
    Response,
    Trajectory,
    Turns,
    permitted_kinds,
)


@flax.struct.dataclass
class Replay:
    """What a trajectory does not record; with a leading B for a batch."""

    before: MemoryState  # after retrieval, as the turn saw it; fields lead with T
    after: MemoryState  # after the turn's actions; fields lead with T
    fates: Report  # of each action alone; fields are "T A kinds", and sum over A to the turn's
    slots: Int[Array, "T A"]  # slot that the action changed, or EMPTY
    ousted: Int[Array, "T A L"]  # entry of that slot just before
    ousted_lengths: Int[Array, "T A"]  # 0 where the slot was free
    permitted: Bool[Array, "T kinds"]
    written: Int[Array, "T A R"]  # text of each action, not cut to any width


def replay(
    setting: environment.Setting,
    trajectories: Trajectory,
    episodes: Episode,
    start: MemoryState | None = None,
) -> Replay:
    """Plays recorded trajectories [B] again, without their policy.

    Args:
      setting: the one they were played in.
      trajectories: with fields [B, ...], on the host or on one device.
      episodes: theirs, in the same order.
      start: what was remembered before the first turn, with fields [B, ...]; None for nothing.

    Raises ValueError where the record is not reproduced: another setting, episode or start.
    """
    turns, played, reached = _replay(setting, trajectories.turns, episodes, start)
    record, again = jax.device_get((trajectories.turns, turns))
    live = record.live
    for field in ("phase", "chunk", "question", "shown", "shown_entries", "occupancy"):
        _check_same(field, getattr(record, field), getattr(again, field), live)
    for part in ("report", "actions"):
        jax.tree.map_with_path(
            lambda path, x, y, part=part: _check_same(
                part + jax.tree_util.keystr(path), x, y, live
            ),
            getattr(record, part),
            getattr(again, part),
        )
    jax.tree.map_with_path(
        lambda path, x, y: _check_same("memory" + jax.tree_util.keystr(path), x, y),
        jax.device_get(_drop_keys(trajectories.memory)),
        jax.device_get(_drop_keys(reached)),
    )
    return jax.device_get(played)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
def _replay(
    setting: environment.Setting, turns: Turns, episode: Episode, start: MemoryState | None
) -> tuple[Turns, Replay, MemoryState]:
    """(the record made again, what it lacked, memory at the end) of one trajectory."""

    def play(env, row: Turns):
        seen, view, _ = environment.begin_turn(setting, env, episode)
        response = Response(
            tokens=row.response,
            lengths=row.response_lengths,
            log_probs=row.log_probs,
            values=row.values,
            scripted=row.scripted,
            passes=row.passes,
            lanes=row.lanes,
            width=row.width,
        )
        ended, actions, report = environment.end_turn(setting, seen, episode, response)
        again = dataclasses.replace(
            row,
            phase=view.phase,
            chunk=view.chunk,
            question=view.question,
            actions=actions,
            report=report,
            shown=seen.memory.shown,
            shown_entries=view.observation.shown,
            occupancy=slot_table.occupancy(seen.memory),
        )
        lacked = recover(setting, seen.memory, ended.memory, again)
        env = jax.tree.map(lambda new, old: jnp.where(row.live, new, old), ended, env)
        return env, (again, lacked)

    env, (again, lacked) = jax.lax.scan(play, environment.start(setting, episode, start), turns)
    return again, lacked, env.memory


def recover(
    setting: environment.Setting, before: MemoryState, after: MemoryState, turn: Turns
) -> Replay:
    """What the record of one turn lacks; no leading axes."""
    wide = dataclasses.replace(setting.grammar, max_text=turn.response.shape[-1])
    permitted = permitted_kinds(turn.phase)
    fates, slots, *ousted = _apply_one_by_one(setting, before, turn.actions, permitted)
    return Replay(
        before=_drop_keys(before),
        after=_drop_keys(after),
        fates=fates,
        slots=slots,
        ousted=ousted[0],
        ousted_lengths=ousted[1],
        permitted=permitted,
        written=wide.parse(turn.response, turn.response_lengths).text,
    )


def _apply_one_by_one(
    setting: environment.Setting,
    state: MemoryState,
    actions: Actions,
    permitted: Bool[Array, " kinds"],
) -> tuple[Report, Int[Array, " A"], Int[Array, "A L"], Int[Array, " A"]]:
    """Fates, slots, and the entries that lay there, of a turn's actions in the order written."""

    def apply(state: MemoryState, action: Actions):
        alone = jax.tree.map(lambda x: x[None], action)
        new, report = slot_table.transition(
            state,
            dataclasses.replace(alone, count=action.count),
            permitted=permitted,
            eviction=setting.limits.memory.eviction,
            embed=setting.embed,
            pad_id=setting.pad_id,
        )
        # Whatever is done to a slot either ends its entry or touches it at a new tick.
        changed = (new.touched != state.touched) | (new.valid != state.valid)
        slot = jnp.where(changed.any(), jnp.argmax(changed), EMPTY).astype(jnp.int32)
        return new, (report, slot, state.entries[slot], jnp.where(slot < 0, 0, state.lengths[slot]))

    # Rows past the count are of kind NONE, which is never attempted.
    singles = dataclasses.replace(actions, count=jnp.ones_like(actions.kind))
    return jax.lax.scan(apply, state, singles)[1]


def _drop_keys(state: MemoryState) -> MemoryState:
    """Keys are the widest part of the table, and follow from the entries."""
    return dataclasses.replace(state, keys=state.keys[..., :0])


def _check_same(field: str, recorded, replayed, live=None) -> None:
    differs = np.asarray(recorded) != np.asarray(replayed)
    rows = differs if live is None else differs[live]
    if rows.any():
        where = np.argwhere(differs)[0]
        raise ValueError(
            f"{field}: trajectory {where[0]} recorded what its replay does not reproduce "
            f"({int(rows.sum())} values differ); allowed is the setting and the episode that it "
            "was played with, and the memory that it started from. Pass them as they were for the "
            "rollout."
        )
