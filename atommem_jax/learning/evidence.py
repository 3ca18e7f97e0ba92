"""What a needed fact says, as words, and whether a text of the memory holds it.

What counts as holding a fact is judged by words, in the normal form of `reward.normalise`, so that
a policy may say it otherwise than its teacher. Let the *object* of a fact be those of its words
which the question hangs on: the canonical answer, where the fact contains all of it, and the
subject of another needed fact, where it contains all of that. A text holds the fact if

- it has every word of its note (of its sentence, where it has no note); or
- it has every word of the object, and at least half of the words of a subject: the fact's own, or
  that of another needed fact, whose entry may have been rewritten with it (but not one that the
  object itself names); where no needed fact has a subject, none is asked for; or
- the fact has no object (the answer says "yes"), and the text has at least half of its words.

A text also *carries on* a fact if it names its subject beside the object of a fact that comes after
it in `needs`: "Ralda works at Silver Anchor" has done its duty once "Ralda North Plululia" says
where that is.

Facts that are counted (all about the same subject or none; the answer is their number, and stands
in none of them) are held by a number, among no other words than those of the facts and of the
question: after the third of them "three", or "bells three", holds all three. The number must be
there before the next one comes.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from atommem_jax.learning import reward
from atommem_jax.types import EMPTY, Episode

Decode = Callable[[Sequence[int]], str]

_ENOUGH = 0.5  # of the words of a subject, or of a fact without an object
_NUMBERS = dict(
    enumerate(
        (
            *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
            *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
            *("eighteen", "nineteen", "twenty"),
        ),
        start=1,
    )
)


class Reader:
    """Token ids to the set of their words; each distinct text is decoded once."""

    def __init__(self, decode: Decode):
        self._decode = decode
        self._known: dict[tuple[int, ...], frozenset[str]] = {(): frozenset()}

    def __call__(self, ids: Sequence[int]) -> frozenset[str]:
        """The words of a text."""
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = frozenset(reward.normalise(self._decode(key)).split())
        return self._known[key]


@dataclasses.dataclass(frozen=True)
class Need:
    """A needed fact, as words."""

    fact: int
    chunk: int
    content: frozenset[str]  # of its note, else of its sentence
    subject: frozenset[str]
    object: frozenset[str]
    owners: tuple[frozenset[str], ...]  # subjects under which an entry may hold it; its own first
    counted: bool
    asked: frozenset[str]  # words of the question

    def names(self, words: frozenset[str]) -> bool:
        """Whether a text of these words says whom the fact is about."""
        return any(_has_most(words, owner) for owner in self.owners)

    def resembles(self, words: frozenset[str]) -> bool:
        """Whether a text of these words seems to be meant for it, though it does not hold it."""
        if self.counted:
            return any(text <= words for number in _NUMBERS for text in _write_number(number))
        return self.names(words) or bool(words & (self.object or self.content))

    def share(self, words: frozenset[str]) -> frozenset[str]:
        """Those of the words that the fact, or whom it is about, brought in."""
        return words & self.content.union(*self.owners)


def read_needs(episode: Episode, q: int, read: Reader) -> list[Need]:
    """The facts that question q needs, in the order of `needs`."""
    a = episode.annotations
    facts = a.start.shape[1]
    indices = [int(index) for index in a.needs[q] if index != EMPTY]
    places = [divmod(index, facts) for index in indices]
    contents, subjects = [], []
    for c, u in places:
        tokens = np.asarray(episode.chunks[c])[int(a.start[c, u]) :][: int(a.length[c, u])]
        if a.note.shape[-1] and a.note_length[c, u]:
            tokens = np.asarray(a.note[c, u])[: int(a.note_length[c, u])]
        contents.append(read(tokens.tolist()))
        subjects.append(read(tokens[: int(a.subject_length[c, u])].tolist()) & contents[-1])
    gold = read(np.asarray(a.gold[q])[: int(a.gold_length[q])].tolist())
    asked = read(np.asarray(episode.questions[q])[: int(episode.question_lengths[q])].tolist())
    counted = (
        len(set(subjects)) == 1
        and gold in _write_number(len(indices))
        and not any(gold <= content for content in contents)
    )
    needs = []
    for n, (c, _) in enumerate(places):
        others = [other for k, other in enumerate(subjects) if k != n and other != subjects[n]]
        hangs_on = [words for words in (gold, *others) if words and words <= contents[n]]
        found = frozenset[str]().union(*hangs_on)
        owners = [subjects[n], *(words for words in others if not words <= found)]
        owners = [owner for owner in owners if owner]
        needs.append(
            Need(indices[n], c, contents[n], subjects[n], found, tuple(owners), counted, asked)
        )
    return needs


def _write_number(number: int) -> tuple[frozenset[str], ...]:
    """As a word, and in digits."""
    return tuple(frozenset({text}) for text in (_NUMBERS.get(number, ""), f"{number}") if text)


def _has_most(words: frozenset[str], part: frozenset[str]) -> bool:
    return len(words & part) >= _ENOUGH * len(part)


def holds(words: frozenset[str], needs: Sequence[Need], n: int, seen: Sequence[bool]) -> bool:
    """Whether a text of these words holds need n, or carries it on.

    seen: which of the needs have been read by then.
    """
    need = needs[n]
    if not words:
        return False
    if need.counted:
        rest = words - need.content - need.asked
        return any(rest in _write_number(count) for count in range(n + 1, sum(seen) + 1))
    if need.content <= words:
        return True
    if not need.object:
        return _has_most(words, need.content)
    if need.object <= words and (need.names(words) or not need.owners):
        return True
    later = (k for k in range(n + 1, len(needs)) if seen[k] and needs[k].object)
    named = bool(need.subject) and _has_most(words, need.subject)
    return named and any(needs[k].object <= words for k in later)
