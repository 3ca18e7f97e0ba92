"""Where each wrong answer broke: the way of every fact that a question needs, turn by turn.

A fact is seen, stored, kept, shown when it is needed, and used. `follow` says of each needed fact
how far it came, and of each wrong answer the *first* break, in the order of the turns, in the chain
of its facts:

    unseen         the record ends before the part that states it
    not_written    the part was read, and nothing was written of it
    refused        a text that holds it was written, but the memory took none: no room, no target
    miswritten     something was written of it, but not all that the question needs
    corrupted      an Update, or a new scratchpad, was meant for it and lost what mattered
    overwritten    an Update, or a new scratchpad, put something else in its place
    deleted        by a Delete
    evicted        by a Create that found no room
    not_shown      it lay in memory, but was not among what the question's turns were shown
    not_used       all was shown, and the answer is wrong all the same
    unknown        nobody knows which facts the question needs

What counts as holding a fact is said in `evidence`.
"""

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from atommem_jax.learning import evidence, table_history
from atommem_jax.learning.evidence import Decode, Need, Reader, read_needs
from atommem_jax.learning.table_history import SCRATCHPAD, Change, Step, Text
from atommem_jax.types import EMPTY, ActionKind, Episode, MemoryState, Phase, Trajectory


class Stage(enum.StrEnum):
    """Where a chain broke; in the order in which a fact passes through."""

    UNSEEN = "unseen"
    NOT_WRITTEN = "not_written"
    REFUSED = "refused"
    MISWRITTEN = "miswritten"
    CORRUPTED = "corrupted"
    OVERWRITTEN = "overwritten"
    DELETED = "deleted"
    EVICTED = "evicted"
    NOT_SHOWN = "not_shown"
    NOT_USED = "not_used"
    UNKNOWN = "unknown"


STAGES: tuple[str, ...] = tuple(stage.value for stage in Stage)


_SILENT = (Stage.NOT_WRITTEN, Stage.REFUSED, Stage.MISWRITTEN, Stage.NOT_SHOWN)
"""Stages at which nothing happens to the table."""


class Event(NamedTuple):
    """Something that happened to a fact."""

    row: int  # turn of the record
    what: str  # 'seen', 'stored', 'carried', 'shown', or the stage at which it broke


@dataclasses.dataclass(frozen=True)
class FactPath:
    """The way of one needed fact through the turns."""

    fact: int  # its flat index, see `Annotations`
    chunk: int
    events: tuple[Event, ...]
    holders: tuple[
        tuple[int, tuple[int, ...]], ...
    ]  # (row, slots that hold it after it), at changes
    stage: Stage | None  # where it broke; None if it was there when it was needed
    broke: int  # row of that turn, or EMPTY
    updates: int | None  # of the entry that first held it; None where none did
    survived: float  # share left after them of the fact's words that the entry had at first


@dataclasses.dataclass(frozen=True)
class QuestionPath:
    """The facts of one question, and where its answer broke."""

    stage: Stage | None  # None where the answer is right
    facts: tuple[FactPath, ...]  # in the order of `needs`

    def describe(self) -> dict[str, Any]:
        """What a record of the question keeps: `stage`, and `drift` as (updates, share left)."""
        drift = [[f.updates, round(f.survived, 4)] for f in self.facts if f.updates is not None]
        return {"stage": self.stage and self.stage.value, "drift": drift}


def follow(
    trajectory: Trajectory,
    episode: Episode,
    right: Sequence[bool] | Bool[np.ndarray, " Q"],
    *,
    decode: Decode,
    eviction: str,
    start: MemoryState | None = None,
) -> list[QuestionPath]:
    """The paths of all questions of one episode.

    Args:
      trajectory: without a leading axis, on the host. Turns in which nothing was written may be
        missing, as long as those that put a question are there.
      episode: its own, without a leading axis.
      right: which questions were answered right.
      decode: token ids -> text.
      eviction: of the memory that it was played with.
      start: what was remembered before the first turn; None for nothing.

    Raises ValueError as `table_history.recover` does.
    """
    steps = list(table_history.recover(trajectory, eviction, start))
    read = Reader(decode)
    held = table_history.read_start(start)
    paths = []
    for q in range(int(episode.num_questions)):
        needs = read_needs(episode, q, read)
        facts = [_Follower(steps, needs, n, q, read, held).follow() for n in range(len(needs))]
        paths.append(QuestionPath(None if right[q] else _find_first(facts), tuple(facts)))
    return paths


def shrink(trajectories: Trajectory) -> Trajectory:
    """Without prompts and responses, most of a record, which no life cycle needs: to be fetched."""
    turns = trajectories.turns
    # In their place something small that is there already: nothing is computed.
    small = turns.live
    return trajectories.replace(
        turns=turns.replace(prompt=small, response=small, log_probs=small),
    )


def follow_batch(
    trajectories: Trajectory,
    episodes: Episode,
    right: Bool[np.ndarray, "B Q"],
    *,
    decode: Decode,
    eviction: str,
) -> list[list[QuestionPath]]:
    """The paths of all questions of a batch; see `follow`."""
    paths = []
    for b in range(trajectories.turns.live.shape[0]):
        trajectory, episode = jax.tree.map(lambda leaf, b=b: leaf[b], (trajectories, episodes))
        paths.append(follow(trajectory, episode, right[b], decode=decode, eviction=eviction))
    return paths


def _find_first(facts: Sequence[FactPath]) -> Stage:
    """The stage of a wrong answer: of its earliest break; within a turn, the earlier stage."""
    if not facts:
        return Stage.UNKNOWN
    order = list(Stage)
    broken = [(f.broke, order.index(f.stage), f.stage) for f in facts if f.stage is not None]
    return min(broken)[2] if broken else Stage.NOT_USED


# ---------------------------------------------------------------------------------------------
# Counting


def count_stages(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many wrong answers broke at each stage, for the stages that occur, in their order."""
    found = [record["stage"] for record in records if record.get("stage")]
    return {stage: found.count(stage) for stage in STAGES if stage in found}


def share_stages(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`stage/NAME` for every stage: the share of all questions whose answer broke there."""
    counts = count_stages(records)
    return {f"stage/{stage}": counts.get(stage, 0) / len(records) for stage in STAGES}


def average_drift(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By the number of Updates of an entry: `facts` that it held, and the mean `share` left."""
    shares: dict[str, list[float]] = {}
    for record in records:
        for updates, share in record.get("drift", ()):
            shares.setdefault(f"{updates}" if updates < 3 else "3+", []).append(share)
    return {
        updates: {"facts": len(found), "share": sum(found) / len(found)}
        for updates, found in sorted(shares.items())
    }


def render(
    counts: Mapping[str, Mapping[str, int]], questions: Mapping[str, int], right: bool = True
) -> str:
    """A table: a row a split (or a method), a column a stage that occurs in any of them.

    Args:
      counts: of each row, by stage.
      questions: of each row.
      right: whether no answer was wrong, where no stage is counted.
    """
    stages = [stage for stage in STAGES if any(stage in row for row in counts.values())]
    if not stages and not right:
        return "wrong answers are not followed: no facts are known, or none went through a memory"
    if not stages:
        return "no wrong answer: no chain of facts broke"
    width = max(map(len, [*counts, "wrong, by first break"]))
    heads = [stage.replace("_", " ") for stage in stages]
    lines = [f"{'wrong, by first break':{width}}  " + "  ".join(["questions", "wrong", *heads])]
    for name, row in counts.items():
        cells = [f"{questions[name]:9d}", f"{sum(row.values()):5d}"]
        cells += [
            f"{row.get(stage, 0):{len(head)}d}" for stage, head in zip(stages, heads, strict=True)
        ]
        lines.append(f"{name:{width}}  " + "  ".join(cells))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# The way of one fact


class _Follower:
    """One needed fact of a question: what became of it, in one pass over the steps."""

    def __init__(
        self,
        steps: Sequence[Step],
        needs: Sequence[Need],
        n: int,
        q: int,
        read: Reader,
        held: Mapping[int, Text],
    ):
        self.steps, self.needs, self.n, self.read = steps, needs, n, read
        self.need = needs[n]
        self.first = [_find_reading(steps, need.chunk) for need in needs]
        self.asked = [i for i, step in enumerate(steps) if step.question == q]
        self.end = self.asked[0] if self.asked else len(steps)
        self.table = dict(held)
        self.events: list[Event] = []
        self.holders: list[tuple[int, tuple[int, ...]]] = []
        self.lost: tuple[int, Stage] | None = None  # (step, how), while it is
        self.gone: tuple[int, Stage] | None = None  # of a count that began anew after a loss
        self.stored = False  # in time
        self.line: int | None = None  # slot of the entry that first held it
        self.updates: int | None = None
        self.brought: frozenset[str] = frozenset()  # words of the fact that this entry had then
        self.survived = 1.0

    def follow(self) -> FactPath:
        """Goes through the steps."""
        begun = self.first[self.n]
        for i, step in enumerate(self.steps):
            if begun <= i and step.chunk == self.need.chunk:
                self.events.append(Event(step.row, "seen"))
            self._pass(i, step, judged=begun <= i <= self.end)
        stage, broke = self._judge()
        if stage in _SILENT:
            self.events.append(Event(broke, stage.value))
        return FactPath(
            fact=self.need.fact,
            chunk=self.need.chunk,
            events=tuple(sorted(self.events, key=lambda event: event.row)),
            holders=tuple(self.holders),
            stage=stage,
            broke=broke,
            updates=self.updates,
            survived=self.survived,
        )

    def _pass(self, i: int, step: Step, judged: bool) -> None:
        """One turn: what holds the fact after it, and which action took it away."""
        before = self._find_holders(i) if judged and step.changes else ()
        held, cause = bool(before), None
        for change in step.changes:
            self._drift(change)
            self.table.pop(change.slot, None)
            if change.after:
                self.table[change.slot] = change.after
            if judged:
                now = bool(self._find_holders(i))
                cause = self._name_loss(change) if held and not now else cause
                held = now
        if i in self.asked and any(self._is_held(text, i) for text in self._find_displayed(step)):
            self.events.append(Event(step.row, "shown"))
        # Nothing changes what is held but a change, and that a fact is seen.
        if judged and (step.changes or i in self.first):
            self._note(i, step.row, cause)

    def _note(self, i: int, row: int, cause: Stage | None) -> None:
        now = self._find_holders(i)
        last = self.holders[-1][1] if self.holders else ()
        if now and not last:
            self.events.append(Event(row, "stored"))
            self.stored |= i < self._find_limit()
            if self.lost is not None and self.gone is None and self._begins_anew(i):
                self.gone = self.lost
            self.lost = None
            if self.line is None and now[0] != SCRATCHPAD and not self.need.counted:
                self.line, self.updates = now[0], 0
                self.brought = self.need.share(self.read(self.table[now[0]]))
        elif last and not now:
            stage = cause or Stage.OVERWRITTEN
            self.events.append(Event(row, stage.value))
            self.lost = (i, stage)
        elif now != last:
            self.events.append(Event(row, "carried"))
        if now != last:
            self.holders.append((row, now))

    def _begins_anew(self, i: int) -> bool:
        """Whether a count that was lost stands again, but short of what was seen since."""
        seen = [k for k, first in enumerate(self.first) if first <= i]
        return self.need.counted and not any(
            self._is_held(text, i, seen[-1]) for text in self.table.values()
        )

    def _judge(self) -> tuple[Stage | None, int]:
        """Where it broke, and in which turn."""
        begun, limit = self.first[self.n], self._find_limit()
        last = self.steps[-1].row if self.steps else EMPTY
        if begun >= len(self.steps):
            return Stage.UNSEEN, last + 1
        if not self.stored:
            told = [step for step in self.steps[begun:limit] if step.chunk == self.need.chunk]
            return self._explain(told), (told[-1] if told else self.steps[begun]).row
        lost = self.gone or self.lost
        if lost is not None:
            return lost[1], self.steps[lost[0]].row
        if not any(event.what == "shown" for event in self.events):
            return Stage.NOT_SHOWN, self.steps[self.asked[-1]].row if self.asked else last
        return None, EMPTY

    def _explain(self, told: Sequence[Step]) -> Stage:
        """Why the turns that were shown the fact did not store it."""
        seen = [True] * len(self.needs)
        refused = [self.read(refusal.text) for step in told for refusal in step.refusals]
        if any(evidence.holds(words, self.needs, self.n, seen) for words in refused):
            return Stage.REFUSED
        written = [self.read(change.after) for step in told for change in step.changes]
        tried = any(self.need.resembles(words) for words in [*written, *refused])
        return Stage.MISWRITTEN if tried else Stage.NOT_WRITTEN

    def _find_limit(self) -> int:
        """The step before which it must be stored: after the question, or the next of a count."""
        begun = self.first[self.n]
        if not self.need.counted:
            return self.end + 1
        if self.steps[begun].chunk != self.need.chunk:
            return begun  # the turn that saw it is not recorded, so that it counted nothing
        return min([*(i for i in self.first if i > begun), self.end + 1])

    def _find_holders(self, i: int) -> tuple[int, ...]:
        """Slots, the scratchpad last, whose text holds it after step i."""
        found = [slot for slot, text in self.table.items() if self._is_held(text, i)]
        return tuple(sorted(found, key=lambda slot: (slot == SCRATCHPAD, slot)))

    def _is_held(self, text: Text, i: int, n: int | None = None) -> bool:
        """Whether a text holds the fact, or that of number n, after step i."""
        seen = [first <= i for first in self.first]
        return evidence.holds(self.read(text), self.needs, self.n if n is None else n, seen)

    def _find_displayed(self, step: Step) -> list[Text]:
        """What a turn sees of the memory: the entries shown, and the scratchpad."""
        return [*(text for _, text in step.shown), self.table.get(SCRATCHPAD, ())]

    def _name_loss(self, change: Change) -> Stage:
        if change.kind == ActionKind.DELETE:
            return Stage.DELETED
        if change.kind == ActionKind.CREATE:
            return Stage.EVICTED
        meant = self.need.resembles(self.read(change.after))
        return Stage.CORRUPTED if meant else Stage.OVERWRITTEN

    def _drift(self, change: Change) -> None:
        """An Update of the entry that first held it; other ends of the entry end the count."""
        if change.slot != self.line:
            return
        carried = self._is_held(change.after, len(self.steps)) and not (
            self.need.object <= self.read(change.after)
        )
        if change.kind != ActionKind.UPDATE or carried:
            self.line = EMPTY
            return
        self.updates = (self.updates or 0) + 1
        left = self.brought & self.read(change.after)
        self.survived = len(left) / len(self.brought)


def _find_reading(steps: Sequence[Step], chunk: int) -> int:
    """The first step by which a chunk has been read; their number where the record ends before.

    A document is read in order: a later chunk, or a question, says that it was.
    """
    return next(
        (i for i, s in enumerate(steps) if s.phase != Phase.READING or s.chunk >= chunk),
        len(steps),
    )
