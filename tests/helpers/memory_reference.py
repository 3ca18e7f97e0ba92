"""The semantics of the slot table in plain Python: what `memory.slot_table` must agree with.

Texts are lists of token ids; nothing is padded. A free slot is None. The only arithmetic is in
the similarity function that the caller provides.
"""

import dataclasses
from collections.abc import Callable

KINDS = ("create", "read", "update", "delete", "scratchpad", "answer")
CREATE, READ, UPDATE, DELETE, SCRATCHPAD, ANSWER = KINDS
OUTCOMES = ("attempted", "applied", "invalid", "rejected", "truncated", "evicted")


@dataclasses.dataclass
class Entry:
    text: list[int]
    created: int
    touched: int


@dataclasses.dataclass
class Action:
    kind: str
    target: int = 0
    text: list[int] = dataclasses.field(default_factory=list)
    well_formed: bool = True


@dataclasses.dataclass
class Caps:
    """Most tokens of each kind of text, and most entries shown."""

    entry: int
    scratchpad: int
    query: int
    answer: int
    shown: int


class Memory:
    """One trajectory's memory, changed in place."""

    def __init__(self, slots: int, caps: Caps) -> None:
        self.slots: list[Entry | None] = [None] * slots
        self.caps = caps
        self.clock = 0
        self.scratchpad: list[int] = []
        self.query: list[int] = []
        self.shown: list[int | None] = [None] * caps.shown  # slot numbers

    def retrieve(self, similarity: Callable[[list[int], list[int]], float]) -> list[float]:
        """Shows the best entries for the standing query; returns their similarities."""
        found = []
        if self.query:
            found = [
                (-similarity(self.query, entry.text), slot)
                for slot, entry in enumerate(self.slots)
                if entry is not None
            ]
        found = sorted(found)[: self.caps.shown]
        blank = self.caps.shown - len(found)
        self.shown = [slot for _, slot in found] + [None] * blank
        if found:
            self.clock += 1
            for _, slot in found:
                self.slots[slot].touched = self.clock
        return [-score for score, _ in found] + [0.0] * blank

    def set_query(self, text: list[int]) -> None:
        self.query = text[: self.caps.query]

    def transition(
        self, actions: list[Action], permitted: set[str], eviction: str
    ) -> dict[tuple[str, str], int]:
        """Applies a turn; returns counts by (outcome, kind), zeros included."""
        report = {(outcome, kind): 0 for outcome in OUTCOMES for kind in KINDS}
        for action in actions:
            report["attempted", action.kind] += 1
            for outcome in self._act(action, permitted, eviction):
                report[outcome, action.kind] += 1
        return report

    def _act(self, action: Action, permitted: set[str], eviction: str) -> list[str]:
        kind, text = action.kind, action.text
        if kind not in permitted or not action.well_formed:
            return ["invalid"]
        if kind in (CREATE, READ, UPDATE, ANSWER) and not text:
            return ["invalid"]

        slot = None
        if kind in (UPDATE, DELETE):
            if 1 <= action.target <= len(self.shown):
                slot = self.shown[action.target - 1]
            if slot is None:
                return ["invalid"]

        outcomes = ["applied"]
        if kind == CREATE:
            if None in self.slots:
                slot = self.slots.index(None)
            elif eviction == "reject":
                return ["rejected"]
            else:
                slot = self._free_the_stalest(eviction)
                outcomes.append("evicted")
        if kind != ANSWER:
            self.clock += 1

        if kind == CREATE:
            self.slots[slot] = Entry(text[: self.caps.entry], self.clock, self.clock)
        elif kind == UPDATE:
            self.slots[slot].text = text[: self.caps.entry]
            self.slots[slot].touched = self.clock
        elif kind == DELETE:
            self._free(slot)
        elif kind == READ:
            self.set_query(text)
        elif kind == SCRATCHPAD:
            self.scratchpad = text[: self.caps.scratchpad]

        cap = {
            CREATE: self.caps.entry,
            UPDATE: self.caps.entry,
            READ: self.caps.query,
            SCRATCHPAD: self.caps.scratchpad,
            ANSWER: self.caps.answer,
        }.get(kind)
        if cap is not None and len(text) > cap:
            outcomes.append("truncated")
        return outcomes

    def _free_the_stalest(self, eviction: str) -> int:
        def age(slot: int) -> int:
            entry = self.slots[slot]
            return {"lru": entry.touched, "oldest": entry.created}[eviction]

        slot = min(range(len(self.slots)), key=age)  # the first of the equals
        self._free(slot)
        return slot

    def _free(self, slot: int) -> None:
        """The entry can no longer be reached through its number, whoever takes the slot."""
        self.slots[slot] = None
        self.shown = [None if shown == slot else shown for shown in self.shown]
