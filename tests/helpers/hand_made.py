"""Trajectories written by hand, word by word: the record of an episode that nobody played.

What each action does is taken from the plain-Python memory (`memory_reference`), and what is shown
is said by the test, so that nothing here is the code under test.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from atommem_jax.tasks import encoding
from atommem_jax.types import (
    EMPTY,
    NUM_KINDS,
    ActionKind,
    Actions,
    Episode,
    MemoryState,
    Phase,
    Report,
    Trajectory,
    Turns,
)
from tests.helpers import memory_reference

SLOTS, SHOWN, ENTRY, PAD = 3, 2, 6, 5
MOST_ACTIONS = 3


class Words:
    """A tokenizer whose tokens are the words between spaces."""

    pad_id, eos_id = 0, 1

    def __init__(self):
        self._words = ["<pad>", "<eos>"]

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self._words:
                self._words.append(word)
        return [self._words.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self._words[i] for i in ids if i > 1)


WORDS: Any = Words()


def fact(text: str, subject: str = "", note: str = "", supersedes: int = EMPTY) -> dict:
    """One sentence, as tasks write it."""
    return {
        "text": text, "subject": subject, "note": note, "support": True,
        "supersedes": supersedes, "category": 0,
    }  # fmt: skip


def make_episode(chunks: list[list[dict]], *questions: tuple[str, str, list[int]]) -> Episode:
    """An episode of facts by chunk, and questions: (text, answer, needed facts)."""
    example: Any = {
        "id": 0,
        "chunks": chunks,
        "questions": [{"text": t, "aliases": [a], "needs": needs} for t, a, needs in questions],
        "focus": "",
    }
    return encoding.encode(example, WORDS, encoding.fit_shape([example], WORDS))


@dataclasses.dataclass
class Turn:
    """One turn: the chunk shown or the question put, the slots shown, and what was written."""

    actions: Sequence[tuple] = ()  # (kind, text), (kind, target) or (kind, target, text)
    chunk: int = EMPTY
    question: int = EMPTY
    shown: Sequence[int] = ()


def reads(chunk: int, *actions: tuple, shown: Sequence[int] = ()) -> Turn:
    """A reading turn."""
    return Turn(actions, chunk=chunk, shown=shown)


def asks(question: int = 0, *, shown: Sequence[int] = (), answer: str = "dunno") -> Turn:
    """An answering turn."""
    return Turn([("answer", answer)], question=question, shown=shown)


def _write(action: tuple) -> memory_reference.Action:
    kind, *rest = action
    target = rest.pop(0) if kind in ("update", "delete") else 0
    text = WORDS.encode(rest[0]) if rest else []
    return memory_reference.Action(kind=kind, target=target, text=text)


def record(turns: Sequence[Turn], eviction: str = "lru", slots: int = SLOTS):
    """The Trajectory of these turns: only the fields that a life cycle reads are real."""
    caps = memory_reference.Caps(entry=ENTRY, scratchpad=PAD, query=PAD, answer=PAD, shown=SHOWN)
    memory = memory_reference.Memory(slots, caps)
    width = ENTRY + 4
    count = len(turns)
    shape = (count, MOST_ACTIONS)
    kind, target, length = (np.zeros(shape, np.int32) for _ in range(3))
    text = np.zeros((*shape, width), np.int32)
    shown_entries = np.zeros((count, SHOWN, ENTRY), np.int32)
    shown = np.full((count, SHOWN), EMPTY, np.int32)
    outcomes = {name: np.zeros((count, NUM_KINDS), np.int32) for name in memory_reference.OUTCOMES}
    for t, turn in enumerate(turns):
        memory.shown = [*turn.shown, *[None] * (SHOWN - len(turn.shown))]
        memory.clock += bool(turn.shown)
        for k, slot in enumerate(turn.shown):
            entry = memory.slots[slot]
            assert entry is not None, f"turn {t} shows slot {slot}, which is free"
            entry.touched = memory.clock
            shown[t, k] = slot
            shown_entries[t, k, : len(entry.text)] = entry.text
        allowed = {"answer", "read"} if turn.question != EMPTY else set(memory_reference.KINDS)
        for a, action in enumerate(map(_write, turn.actions)):
            number = ActionKind[action.kind.upper()]
            kind[t, a], target[t, a], length[t, a] = number, action.target, len(action.text)
            text[t, a, : len(action.text)] = action.text
            for outcome in memory._act(action, allowed, eviction):
                outcomes[outcome][t, number] += 1
    phase = [Phase.READING if turn.question == EMPTY else Phase.ANSWERING for turn in turns]
    return _assemble(
        memory,
        live=np.ones(count, bool),
        phase=np.array(phase, np.int32),
        chunk=np.array([turn.chunk for turn in turns], np.int32),
        question=np.array([turn.question for turn in turns], np.int32),
        actions=Actions(
            kind=kind,
            target=target,
            text=text,
            length=length,
            well_formed=kind > 0,
            count=np.array([len(turn.actions) for turn in turns], np.int32),
        ),
        report=Report(**outcomes),
        shown=shown,
        shown_entries=shown_entries,
    )


def _assemble(memory: memory_reference.Memory, **fields: Any):
    none: Any = None
    blank = {f.name: none for f in dataclasses.fields(Turns)}
    slots = len(memory.slots)
    state = {f.name: none for f in dataclasses.fields(MemoryState)}
    state |= {
        "entries": np.zeros((slots, ENTRY), np.int32),
        "scratchpad": np.zeros(PAD, np.int32),
    }
    return Trajectory(
        id=np.int32(0),
        turns=Turns(**(blank | fields)),
        answers=none,
        answer_lengths=none,
        answer_log_prob=none,
        memory=MemoryState(**state),
    )
