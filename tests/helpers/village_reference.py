"""The village in plain Python: a reader of its sentences, and a keeper on the reference memory.

Texts are words. Nothing here knows how the documents are made or how the script of
`atommem_jax.tasks.keeper` is written: it is what both must agree with.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

from tests.helpers import memory_reference
from tests.helpers.memory_reference import Action

SENTENCES = {
    "works": r"(\w+) (?:works at|has a job at|is employed by) (\w+ \w+)\.",
    "now": r"(\w+) (?:now works at|has moved to|is now employed by) (\w+ \w+)\.",
    "in": r"(\w+ \w+) (?:is in|lies in|can be found in) (\w+ \w+)\.",
    "gets": r"(\w+) (?:gets|finds|buys) the (\w+ \w+)\.",
    "loses": r"(\w+) (?:loses|sells|gives away) the (\w+ \w+)\.",
    "bell": r"A bell (?:sounds|is heard|sounds from afar)()()\.",
    "horn": r"A horn (?:sounds|is heard|sounds from afar)()()\.",
    "number": r"(\w+) (?:lives at number|sleeps in room) (\w+)\.",
}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


class Said(NamedTuple):
    relation: str
    subject: str
    object: str


def read(text: str) -> Said:
    """What a sentence says; fails unless exactly one reading fits."""
    [found] = [
        Said(relation, *match.groups())
        for relation, pattern in SENTENCES.items()
        if (match := re.fullmatch(pattern, text))
    ]
    return found


def asked(question: str) -> tuple[str, str]:
    """(what kind of question, whom it is about)."""
    subject = question.split()[0]
    if subject == "Bells":
        return "bells", subject
    return ("city" if question.endswith("in which city?") else "thing"), subject


def solve(chunks: list[list[str]], questions: list[str]) -> list[str]:
    """The answers, by someone who remembers everything."""
    said = [read(text) for chunk in chunks for text in chunk]
    answers = []
    for kind, subject in map(asked, questions):
        if kind == "bells":
            answers.append(NUMBERS[sum(s.relation == "bell" for s in said) - 1])
        elif kind == "thing":
            held: list[str] = []
            for s in said:
                if s.subject == subject and s.relation == "gets":
                    held.append(s.object)
                if s.subject == subject and s.relation == "loses":
                    held.remove(s.object)
            [left] = held
            answers.append(left)
        else:
            firm = [s.object for s in said if s.subject == subject][-1]
            [city] = [s.object for s in said if s.relation == "in" and s.subject == firm]
            answers.append(city)
    return answers


@dataclasses.dataclass
class Keeper:
    """The clean script and what is left of it without some kinds of action."""

    lacks: tuple[str, ...] = ()
    order: tuple[str, ...] = ("thing", "city", "bells")
    recycle: bool = False
    tally: bool = False
    resets: bool = False  # as the ablated scripts do

    def read_chunk(self, sentences, questions, shown, query, note, most) -> list[Action]:
        people = {who for kind, who in map(asked, questions) if kind != "bells"}
        worker = next(who for kind, who in map(asked, questions) if kind == "city")
        facts = [read(text) for text in sentences]
        facts = [f for f in facts if f.relation in ("in", "bell") or f.subject in people]
        facts = [f for f in facts if f.relation != "number"]
        facts.sort(key=lambda fact: self.order.index(self._serves(fact)))
        wants = [word for fact in facts if (word := self._wanted(fact))]
        if "read" in self.lacks:
            wants = []
        rings = [f for f in facts if f.relation == "bell"]
        counts = [Action("scratchpad", text=[_next(note)])] if not self.tally else []
        if wants and query not in wants:
            return [Action("read", text=[wants[0]])] + counts * bool(rings)
        actions: list[Action] = []
        for fact in facts:
            if fact.relation == "bell" and not self.tally:
                done = [] if wants else list(counts)
            else:
                done = self._edit(fact, shown, worker)
            if len(actions) + len(done) <= most:
                actions += done
        actions = [a for a in actions if a.kind not in self.lacks]
        edits = [a for a in actions if a.kind in ("create", "update", "delete")]
        if self.resets and edits and len(actions) < most:
            actions.append(Action("read", text=["city"]))
        return actions

    def _serves(self, fact: Said) -> str:
        if fact.relation == "bell":
            return "bells"
        return "thing" if fact.relation in ("gets", "loses") else "city"

    def _wanted(self, fact: Said) -> str | None:
        """The word that finds the entry that the fact changes."""
        if fact.relation in ("now", "in"):
            return fact.subject.split()[-1]
        if fact.relation == "loses":
            return fact.object.split()[-1]
        marks = {"gets": self.recycle and "A", "bell": self.tally and "Bells"}
        return marks.get(fact.relation) or None

    def _edit(self, fact: Said, shown: list[str], worker: str) -> list[Action]:
        new = [fact.subject, *fact.object.split()]
        if fact.relation == "works":
            return [Action("create", text=new)]
        if fact.relation == "now":
            return (
                self._replace(new) if shown[:1] == [fact.subject] else [Action("create", text=new)]
            )
        if fact.relation == "in":
            known = shown == [worker, *fact.subject.split()]
            return self._replace([worker, *fact.object.split()]) if known else []
        if fact.relation == "gets":
            if self.recycle and shown[:1] == ["A"]:
                return [Action("update", 1, new)]
            return [Action("create", text=new)]
        if fact.relation == "loses" and shown == new:
            if "delete" not in self.lacks:
                return [Action("delete", 1)]
            return [Action("update", 1, ["A"] * 3)] if self.recycle else []
        if fact.relation == "bell" and self.tally:
            if shown[:1] == ["Bells"]:
                return [Action("update", 1, ["Bells", _next(shown[1])])]
            return [Action("create", text=["Bells", "one"])]
        return []

    def _replace(self, new: list[str]) -> list[Action]:
        if "update" not in self.lacks:
            return [Action("update", 1, new)]
        return [Action("delete", 1), Action("create", text=new)]

    def answer(self, question: str, shown: list[str], note: str | None) -> list[str]:
        if asked(question)[0] == "bells":
            count = shown[1] if self.tally and shown[:1] == ["Bells"] else None
            count = count if self.tally else note
            return [count or "five"]
        return shown[1:] if len(shown) == 3 else question.split()[:1]


def _next(number: str | None) -> str:
    """The number after it; the first where there is none."""
    return "one" if number is None else NUMBERS[min(NUMBERS.index(number) + 1, 7)]


def play(
    keeper: Keeper,
    example: dict,
    similarity: Callable[[list[str], list[str]], float],
    *,
    slots: int = 3,
    most_actions: int = 2,
) -> tuple[list[str], dict[str, int]]:
    """Answers, and how many actions of each kind were applied."""
    caps = memory_reference.Caps(entry=3, scratchpad=1, query=1, answer=2, shown=1)
    memory = memory_reference.Memory(slots, caps)
    questions = [question["text"] for question in example["questions"]]
    applied = dict.fromkeys(memory_reference.KINDS, 0)

    def look() -> tuple[list[str], str | None, str | None]:
        memory.retrieve(similarity)
        slot = memory.shown[0]
        shown = [] if slot is None else memory.slots[slot].text
        return shown, *(words[0] if words else None for words in (memory.query, memory.scratchpad))

    def act(actions: list[Action], permitted: set[str]) -> dict:
        report = memory.transition(actions, permitted, "reject")
        for kind in applied:
            applied[kind] += report["applied", kind]
        return report

    for chunk in example["chunks"]:
        sentences = [fact["text"] for fact in chunk]
        for turn in range(2):
            actions = keeper.read_chunk(sentences, questions, *look(), most_actions)
            report = act(actions, set(memory_reference.KINDS) - {"answer"})
            edits = sum(report["applied", kind] for kind in ("create", "update", "delete"))
            if turn or edits or not report["applied", "read"]:
                break
    answers = []
    firms = ["Anchor", "Harbour", "Lantern", "Falcon", "Compass", "Orchard", "Bridge", "Mill"]
    for question in questions:
        memory.set_query(question.split())
        shown, _, note = look()
        can_read = "read" not in keeper.lacks and asked(question)[0] != "bells"
        if can_read and shown[:1] == question.split()[:1] and shown[2] in firms:
            act([Action("read", text=shown[2:])], {"read", "answer"})
            shown, _, note = look()
        answers.append(" ".join(keeper.answer(question, shown, note)))
        act([Action("answer", text=answers[-1].split())], {"read", "answer"})
    return answers, applied
