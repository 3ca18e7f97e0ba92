"""What the memory of a trajectory held after each turn, from its record alone, on the host.

A `Trajectory` records what was shown and written, not the table in between. `recover` applies the
written actions once more, in plain Python, and says for each what it changed: which entry came,
which was rewritten, and which went. It computes no retrieval: what was shown is in the record.

So it needs only turns in which something was written. A turn without an applied action leaves the
table and the standing query as they were; the next turn shows the same entries again, and
touches them later. A record without such turns gives the same tables, evictions included.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from atommem_jax.types import EMPTY, PERMITTED, ActionKind, MemoryState, Phase, Trajectory

SCRATCHPAD = -2
"""In the place of a slot: the scratchpad."""

Text = tuple[int, ...]  # token ids

_NEEDS_TEXT = (ActionKind.CREATE, ActionKind.READ, ActionKind.UPDATE, ActionKind.ANSWER)
_REPORTED = ("applied", "rejected", "evicted")


@dataclasses.dataclass(frozen=True)
class Change:
    """What one action did to an entry, or to the scratchpad."""

    kind: ActionKind
    slot: int  # or SCRATCHPAD
    before: Text  # what lay there; empty where nothing did
    after: Text  # empty where nothing lies there now

    @property
    def evicts(self) -> bool:
        """Whether an entry made room for another."""
        return self.kind == ActionKind.CREATE and bool(self.before)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A text that was to be stored, and was not."""

    kind: ActionKind
    text: Text


@dataclasses.dataclass(frozen=True)
class Step:
    """One turn that took place."""

    row: int  # of the record
    phase: Phase
    chunk: int  # or EMPTY
    question: int  # or EMPTY
    shown: tuple[tuple[int, Text], ...]  # (slot, entry), best first
    changes: tuple[Change, ...]  # in the order in which they were made
    refusals: tuple[Refusal, ...]


def recover(
    trajectory: Trajectory, eviction: str, start: MemoryState | None = None
) -> Iterator[Step]:
    """The turns of one trajectory, with what each changed.

    Args:
      trajectory: without a leading axis, on the host. Turns that wrote nothing may be missing.
      eviction: of the memory that it was played with.
      start: what was remembered before the first turn, without a leading axis; None for nothing.

    Raises ValueError where the record says otherwise than its own actions: another `eviction` or
    `start`, or turns are missing in which something was written.
    """
    turns = trajectory.turns
    table = _Table.of(trajectory.memory, eviction, start)
    rows = np.flatnonzero(turns.live)
    columns = {
        name: np.asarray(getattr(turns, name))[rows].tolist()
        for name in ("phase", "chunk", "question", "shown", "shown_entries")
    }
    actions = turns.actions
    written = {
        name: np.asarray(getattr(actions, name))[rows].tolist()
        for name in ("kind", "target", "text", "length", "well_formed", "count")
    }
    reported = {name: np.asarray(getattr(turns.report, name))[rows] for name in _REPORTED}
    for i, row in enumerate(rows.tolist()):
        shown = table.show(columns["shown"][i])
        _check_shown(row, shown, columns["shown_entries"][i], columns["shown"][i])
        phase = Phase(columns["phase"][i])
        changes, refusals, counts = [], [], np.zeros_like(reported["applied"][i])
        for a in range(written["count"][i]):
            one = {name: column[i][a] for name, column in written.items() if name != "count"}
            kind = ActionKind(one["kind"])
            text = tuple(one["text"][: one["length"]])
            sound = one["well_formed"] and kind in PERMITTED[phase]
            sound = sound and (one["length"] > 0 or kind not in _NEEDS_TEXT)
            change = table.apply(kind, one["target"], text) if sound else None
            if change is None:
                if kind in (ActionKind.CREATE, ActionKind.UPDATE) and text:
                    refusals.append(Refusal(kind, text))
                continue
            counts[kind] += 1
            if change.slot != EMPTY:
                changes.append(change)
        if (counts != reported["applied"][i]).any():
            _refuse(row, f"applied {reported['applied'][i].tolist()}, by its actions {counts}")
        yield Step(
            row=row,
            phase=phase,
            chunk=columns["chunk"][i],
            question=columns["question"][i],
            shown=shown,
            changes=tuple(changes),
            refusals=tuple(refusals),
        )


def read_start(memory: MemoryState | None) -> dict[int, Text]:
    """Slot -> entry of a memory without a leading axis, with the scratchpad; nothing of None."""
    if memory is None:
        return {}
    entries, lengths = np.asarray(memory.entries).tolist(), np.asarray(memory.lengths).tolist()
    held = {
        int(slot): tuple(entries[slot][: lengths[slot]]) for slot in np.flatnonzero(memory.valid)
    }
    size = int(memory.scratchpad_length)
    if size:
        held[SCRATCHPAD] = tuple(np.asarray(memory.scratchpad)[:size].tolist())
    return held


def _check_shown(row: int, shown, entries: list[list[int]], slots: list[int]) -> None:
    recorded = [(slot, entries[k]) for k, slot in enumerate(slots) if slot != EMPTY]
    for (slot, text), (_, tokens) in zip(shown, recorded, strict=True):
        if list(text) != tokens[: len(text)] or not text:
            _refuse(row, f"showed in slot {slot} another entry than was written there")


def _refuse(row: int, found: str) -> None:
    raise ValueError(
        f"turn {row} of the record {found}; allowed is a record with every turn that wrote "
        "something, and the eviction and the memory that it started with. Pass them as they were "
        "for the rollout."
    )


class _Table:
    """The slot table in plain Python, for one trajectory; see docs/memory.md."""

    def __init__(self, slots: int, entry_length: int, scratchpad_length: int, eviction: str):
        self.slots, self.eviction = slots, eviction
        self.entry_length, self.scratchpad_length = entry_length, scratchpad_length
        self.texts: dict[int, Text] = {}
        self.created: dict[int, int] = {}
        self.touched: dict[int, int] = {}
        self.clock = 0
        self.shown: list[int] = []

    @classmethod
    def of(cls, memory: MemoryState, eviction: str, start: MemoryState | None) -> "_Table":
        """A table of the sizes of `memory`, holding what `start` does."""
        slots, entry_length = memory.entries.shape
        table = cls(slots, entry_length, memory.scratchpad.shape[0], eviction)
        if start is not None:
            table.texts = read_start(start)
            taken = [slot for slot in table.texts if slot != SCRATCHPAD]
            table.created = {slot: int(start.created[slot]) for slot in taken}
            table.touched = {slot: int(start.touched[slot]) for slot in taken}
            table.clock = int(start.clock)
        return table

    def show(self, slots: list[int]) -> tuple[tuple[int, Text], ...]:
        """The start of a turn: what is shown is touched."""
        self.shown = list(slots)
        found = [slot for slot in slots if slot != EMPTY]
        self.clock += bool(found)
        self.touched |= dict.fromkeys(found, self.clock)
        return tuple((slot, self.texts.get(slot, ())) for slot in found)

    def apply(self, kind: ActionKind, target: int, text: Text) -> Change | None:
        """One sound action; None where it is refused. A change of no slot changed no entry."""
        slot = EMPTY
        if kind in (ActionKind.UPDATE, ActionKind.DELETE):
            slot = self.shown[target - 1] if 1 <= target <= len(self.shown) else EMPTY
            if slot == EMPTY:
                return None
        if kind == ActionKind.CREATE:
            slot = self._find_room()
            if slot == EMPTY:
                return None
        self.clock += kind != ActionKind.ANSWER
        if kind == ActionKind.SCRATCHPAD:
            return self._write(kind, SCRATCHPAD, text[: self.scratchpad_length])
        if slot == EMPTY:
            return Change(kind, EMPTY, (), ())
        if kind == ActionKind.DELETE or (kind == ActionKind.CREATE and slot in self.texts):
            self.shown = [EMPTY if other == slot else other for other in self.shown]
        self.touched[slot] = self.clock
        if kind == ActionKind.CREATE:
            self.created[slot] = self.clock
        return self._write(
            kind, slot, () if kind == ActionKind.DELETE else text[: self.entry_length]
        )

    def _write(self, kind: ActionKind, slot: int, text: Text) -> Change:
        before = self.texts.pop(slot, ())
        if text:
            self.texts[slot] = text
        return Change(kind, slot, before, text)

    def _find_room(self) -> int:
        """The lowest free slot, else the one that is evicted, else EMPTY."""
        free = next((slot for slot in range(self.slots) if slot not in self.texts), EMPTY)
        if free != EMPTY or self.eviction == "reject":
            return free
        age = self.created if self.eviction == "oldest" else self.touched
        return min(range(self.slots), key=lambda slot: (age[slot], slot))
