"""A world in which people walk and carry things: further stories of bAbI's third task.

Of the published files (Weston et al., arXiv 1502.05698) the small one of task 3 has 200 stories for
training, which a model learns by heart. `simulate` makes as many as are wanted, with their persons,
places, things and words. No sentence is taken from them; the numbers below were chosen so that
stories are alike: the shares of moving, taking and dropping, how long a story is, and how many
lines back lies what a question asks for. A test compares these.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

PERSONS = ("Daniel", "John", "Mary", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")

_MOVES = ("moved to", "went to", "travelled to", "journeyed to", "went back to")
_TAKES = ("took", "got", "grabbed", "picked up")
_DROPS = ("dropped", "left", "discarded", "put down")
_THERE = 0.2  # share of what is taken or dropped with a "there"
_MOVE = 0.42  # share of sentences in which somebody moves, where something else could be done
_BACK = (0.4, 0.35, 0.25)  # how often a question is tried with the last place, and those before
_NEAR, _FADE = 10, 0.8  # each line more since the arrival at the earlier place: so much rarer
_QUESTIONS = 5  # of a story


class Line(NamedTuple):
    """Of a story: a sentence, or a question."""

    number: int  # as published; starts at 1 in each story
    text: str
    answer: str | None  # None in a sentence
    supporting: tuple[int, ...]  # line numbers


@dataclasses.dataclass
class _Thing:
    """Where a thing has been: each place that was told of, with the number of its line."""

    holder: str | None = None
    places: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    told: int = 0  # line of the last sentence about it

    def arrive(self, place: str | None, line: int) -> None:
        """It is there now, if that is known."""
        self.told = line
        if place is not None and (not self.places or self.places[-1][0] != place):
            self.places.append((place, line))


def simulate(count: int, seed: int) -> Iterator[list[Line]]:
    """Yields stories of task 3 with five questions each, as `babi.read_stories` returns them."""
    for number in range(count):
        yield _make_story(np.random.default_rng([seed, number]))


def _make_story(rng: np.random.Generator) -> list[Line]:
    lines: list[Line] = []
    where: dict[str, str] = {}  # person -> place that was told
    things = {name: _Thing() for name in THINGS}
    asked = 0
    while asked < _QUESTIONS:
        for _ in range(2):
            lines.append(_act(rng, len(lines) + 1, where, things))
        question = _ask(rng, len(lines) + 1, things)
        if question is not None:
            lines.append(question)
            asked += 1
    return lines


def _act(
    rng: np.random.Generator, number: int, where: dict[str, str], things: dict[str, _Thing]
) -> Line:
    """Somebody moves, takes something that lies there or is nowhere yet, or drops something."""
    person = str(rng.choice(PERSONS))
    here = where.get(person)
    if rng.random() >= _MOVE:
        held = [name for name, thing in things.items() if thing.holder == person]
        near = [name for name, thing in things.items() if _is_near(thing, here)]
        if held or near:
            takes = bool(near) and (not held or rng.random() < 0.5)
            name = str(rng.choice(near if takes else held))
            things[name].holder = person if takes else None
            things[name].arrive(here, number)
            verb = rng.choice(_TAKES if takes else _DROPS)
            end = " there" if rng.random() < _THERE else ""
            return Line(number, f"{person} {verb} the {name}{end}.", None, ())
    place = str(rng.choice([place for place in PLACES if place != here]))
    where[person] = place
    for thing in things.values():
        if thing.holder == person:
            thing.arrive(place, number)
    return Line(number, f"{person} {rng.choice(_MOVES)} the {place}.", None, ())


def _is_near(thing: _Thing, here: str | None) -> bool:
    if thing.holder is not None or here is None:
        return False
    return not thing.places or thing.places[-1][0] == here


def _ask(rng: np.random.Generator, number: int, things: dict[str, _Thing]) -> Line | None:
    """Where something was before one of its places, the likelier the less long ago that is."""
    name = str(rng.choice(THINGS))
    thing = things[name]
    if len(thing.places) < 2:
        return None
    back = min(int(rng.choice(len(_BACK), p=_BACK)), len(thing.places) - 2)
    place = thing.places[-1 - back][0]
    # The latest arrival at a place counts, as in the published questions.
    last = max(i for i, (other, _) in enumerate(thing.places) if other == place)
    if last == 0:
        return None
    (before, left), (_, came) = thing.places[last - 1], thing.places[last]
    if rng.random() >= _FADE ** max(number - left - _NEAR, 0):
        return None
    text = f"Where was the {name} before the {place}?"
    return Line(number, text, before, (thing.told, came, left))
