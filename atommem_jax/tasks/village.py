"""Village chronicles: a task in which every operation of the memory is needed.

A chronicle tells of two persons who are asked about, among many who are not. One changes employer
several times, and the city of the last employer is told at the end; the other gets and loses
things; and now and then a bell rings. Three questions are known from the start: in which city
the one works, what the other still has, and how many bells rang.

    Mosek now works at Silver Anchor. Barla finds the red lamp. A bell sounds.

Names of firms, cities and things are two words out of small sets, so that an entry (whom it is
about, and a name) has three tokens and cannot hold two facts, and half of a name says little. With
three slots of three tokens, one entry shown, a scratchpad and a query of one token, no eviction
and two actions a turn (`experiments/configs/village.py`) each operation is then worth a quarter
of the score and more: without Update a new employer costs the actions that the rest of the chunk
needs, without Delete a lost thing keeps its slot, and what is to be changed must be shown, which
takes a Read. `experiments/validity.py` measures this with scripts.

The generator is a pure function of (config, split, index). Documents of the splits `test_1x`,
`test_2x`, ... tell the same story at the same index, with the same questions and answers; longer
ones have more chunks about others in between.

Held-out combinations: a (person, firm), (firm, city) or (person, thing) pair belongs to exactly one
of train, validation and test, and no sentence of a split states a pair of another part.
"""

import dataclasses
import enum
import functools
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds

from atommem_jax.tasks import builders, synthetic
from atommem_jax.tasks.builders import check_scales, read_split, refuse
from atommem_jax.tasks.schema import Example, Fact, Question

FACTS_PER_CHUNK = 3
"""Facts of a chunk of the story, before it is cut into smaller ones."""

BELLS = "Bells"
"""First word of the question about the bells."""

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
"""Number words: what the bells are counted in, up to the most that ring."""

_FIRMS = (
    "Silver Golden Copper Iron Amber Crystal Scarlet Velvet",
    "Anchor Harbour Lantern Falcon Compass Orchard Bridge Mill",
)
_THINGS = (
    "red blue green white black yellow brown grey",
    "lamp kettle drum clock rug chair kite map",
)
_DIRECTIONS = "North South East West Upper Lower New Old"
_MAX_SCALE = 64


class FactCategory(enum.IntEnum):
    """What a sentence is about; the label that statistics are kept by."""

    EMPLOYER = 0  # first employer of the asked person
    CORRECTION = 1  # the employer that replaces it
    CITY = 2  # city of the asked person's final employer
    GETS = 3
    LOSES = 4
    BELL = 5
    OTHER_EMPLOYER = 6
    OTHER_CORRECTION = 7
    OTHER_CITY = 8  # of another firm, often of one that shares a word with the asked person's
    OTHER_GETS = 9
    OTHER_LOSES = 10
    OTHER_SOUND = 11  # a horn, which nobody asks about
    OTHER_NUMBER = 12  # of a house, which nobody asks about


class Relation(enum.IntEnum):
    """What a sentence says, whomever it is about: all that a reader has to know of its words."""

    WORKS = 0
    NOW = 1  # works there from now on
    IN = 2
    GETS = 3
    LOSES = 4
    BELL = 5
    HORN = 6
    NUMBER = 7


RELATIONS: Mapping[FactCategory, Relation] = {
    FactCategory.EMPLOYER: Relation.WORKS,
    FactCategory.CORRECTION: Relation.NOW,
    FactCategory.CITY: Relation.IN,
    FactCategory.GETS: Relation.GETS,
    FactCategory.LOSES: Relation.LOSES,
    FactCategory.BELL: Relation.BELL,
    FactCategory.OTHER_EMPLOYER: Relation.WORKS,
    FactCategory.OTHER_CORRECTION: Relation.NOW,
    FactCategory.OTHER_CITY: Relation.IN,
    FactCategory.OTHER_GETS: Relation.GETS,
    FactCategory.OTHER_LOSES: Relation.LOSES,
    FactCategory.OTHER_SOUND: Relation.HORN,
    FactCategory.OTHER_NUMBER: Relation.NUMBER,
}

# A sentence begins with the name of its subject and ends with that of its object.
_WORDINGS: Mapping[Relation, tuple[str, ...]] = {
    Relation.WORKS: ("{} works at {}.", "{} has a job at {}.", "{} is employed by {}."),
    Relation.NOW: ("{} now works at {}.", "{} has moved to {}.", "{} is now employed by {}."),
    Relation.IN: ("{} is in {}.", "{} lies in {}.", "{} can be found in {}."),
    Relation.GETS: ("{} gets the {}.", "{} finds the {}.", "{} buys the {}."),
    Relation.LOSES: ("{} loses the {}.", "{} sells the {}.", "{} gives away the {}."),
    Relation.BELL: ("A bell sounds.", "A bell is heard.", "A bell sounds from afar."),
    Relation.HORN: ("A horn sounds.", "A horn is heard.", "A horn sounds from afar."),
    Relation.NUMBER: ("{} lives at number {}.", "{} sleeps in room {}."),
}
_CITY_QUESTIONS = ("{} works in which city?", "{} has a job in which city?")
_THING_QUESTIONS = ("{} still has which thing?", "{} has which thing left?")
_BELL_QUESTIONS = (f"{BELLS} are heard how many times?", f"{BELLS} are heard: how many?")


@dataclasses.dataclass(frozen=True)
class VillageConfig:
    """Knobs of the generator. Raises ValueError where one is out of its range."""

    facts_per_chunk: int = FACTS_PER_CHUNK  # fewer cut the same story into more chunks
    rounds: tuple[int, int] = (2, 3)  # fewest, most: changes of employer, each with a thing
    oldest_lost: float = 0.8  # probability that of two things the older one is lost
    others: float = 0.5  # chunks about others alone, for each of the story's, at scale 1
    train_examples: int = 20_000
    test_examples: int = 512  # in each test split and in validation
    scales: tuple[int, ...] = (1, 2, 4, 8)  # document lengths to test at, times the story's
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "rounds", tuple(self.rounds))
        object.__setattr__(self, "scales", tuple(self.scales))
        if not 1 <= self.facts_per_chunk <= FACTS_PER_CHUNK:
            refuse("facts_per_chunk", self.facts_per_chunk, f"1 to {FACTS_PER_CHUNK}")
        if not (len(self.rounds) == 2 and 1 <= self.rounds[0] <= self.rounds[1] <= 3):
            refuse("rounds", self.rounds, "(fewest, most) with 1 <= fewest <= most <= 3")
        for name, most in (("oldest_lost", 1), ("others", 2)):
            if not 0.0 <= getattr(self, name) <= most:
                refuse(name, getattr(self, name), f"0 to {most}")
        for name in ("train_examples", "test_examples"):
            if getattr(self, name) < 1:
                refuse(name, getattr(self, name), "an integer of at least 1")
        check_scales(self)
        if max(self.scales) > _MAX_SCALE:
            refuse("scales", self.scales, f"integers up to {_MAX_SCALE}")


@dataclasses.dataclass(frozen=True)
class World:
    """All names, and which pairs each part of the data may state."""

    persons: tuple[str, ...]
    firms: tuple[str, ...]
    cities: tuple[str, ...]
    things: tuple[str, ...]
    employers: Mapping[str, Mapping[str, tuple[str, ...]]]  # part -> person -> firms
    locations: Mapping[str, Mapping[str, tuple[str, ...]]]  # part -> firm -> cities
    goods: Mapping[str, Mapping[str, tuple[str, ...]]]  # part -> person -> things


@functools.cache
def make_world() -> World:
    """Coins the names and splits the pairs. Always the same world, on every machine."""
    coined = synthetic.make_world()
    firms, things = _pair_words(*_FIRMS), _pair_words(*_THINGS)
    cities = _pair_words(_DIRECTIONS, " ".join(coined.cities[:8]))
    return World(
        persons=coined.persons,
        firms=firms,
        cities=cities,
        things=things,
        employers=synthetic.split_pairs(coined.persons, firms),
        locations=synthetic.split_pairs(firms, cities),
        goods=synthetic.split_pairs(coined.persons, things),
    )


def _pair_words(first: str, second: str) -> tuple[str, ...]:
    return tuple(f"{a} {b}" for a in first.split() for b in second.split())


class _Told(NamedTuple):
    """A fact before it is put into words."""

    category: FactCategory
    subject: str = ""
    object: str = ""

    @property
    def relation(self) -> Relation:
        return RELATIONS[self.category]


@dataclasses.dataclass(frozen=True)
class _Story:
    """What is asked about, in blocks of chunks between which others may be told of."""

    part: str
    worker: str
    firms: tuple[str, ...]  # in the order of employment
    city: str
    holder: str
    things: tuple[str, ...]  # in the order in which they are got
    kept: str
    bells: int
    blocks: tuple[tuple[tuple[_Told, ...], ...], ...]


def generate(config: VillageConfig, split: str, index: int) -> Example:
    """Makes one example.

    The story is told in chunks of at most three facts. First come the employer of the one and the
    first thing of the other; then rounds of two chunks, {new employer, new thing, a bell} and {a
    thing is lost}; last the city. Chunks with room are filled up with facts about others and with
    more bells, and the facts of a chunk are shuffled. Chunks about others alone stand at any place
    but within a round: at scale 1 `others` for each of the story's, so that a learner meets parts
    in which nothing is to be done; a document n times as long has n times as many chunks.

    Raises ValueError if `split` is none of `builders.split_sizes(config)`.
    """
    part, scale = read_split(config, split)
    rng = random.Random(f"{config.seed}/{part}/{index}")
    story = _draw_story(rng, config, part)
    asks = rng.sample(range(3), 3)
    wording = rng.randrange(2)

    rng = random.Random(f"{config.seed}/{part}/{index}/{scale}")
    told_chunks = sum(map(len, story.blocks))
    length = int(scale or 1) * round(told_chunks * (1 + config.others))
    chunks = _fill(rng, story, length)
    told = [fact for chunk in chunks for fact in chunk]
    facts = [_write(rng, fact) for fact in told]
    _number(facts, told)
    size = config.facts_per_chunk
    starts = [sum(map(len, chunks[:c])) for c in range(len(chunks))]
    cut = [
        facts[start + first : start + min(first + size, len(chunk))]
        for start, chunk in zip(starts, chunks, strict=True)
        for first in range(0, len(chunk), size)
    ]
    questions = _ask(story, told, wording)
    return {
        "id": index,
        "chunks": cut,
        "questions": [questions[i] for i in asks],
        "focus": f"{story.worker} {story.holder}",
    }


def _draw_story(rng: random.Random, config: VillageConfig, part: str) -> _Story:
    world = make_world()
    # Every number of bells is as likely, so that a guess of it is worth little.
    fewest, most = config.rounds
    bells = rng.randint(fewest, _most_bells(most))
    rounds = rng.choice([r for r in range(fewest, most + 1) if r <= bells <= _most_bells(r)])
    while True:  # a person may have too few things of different kinds in this part: then another
        worker, holder = rng.sample(world.persons, 2)
        goods = world.goods[part][holder]
        kinds = {thing.split()[1]: thing for thing in rng.sample(goods, len(goods))}
        if len(kinds) > rounds and len(world.employers[part][worker]) > rounds:
            break
    firms = rng.sample(world.employers[part][worker], rounds + 1)
    things = rng.sample(sorted(kinds.values()), rounds + 1)
    city = rng.choice(world.locations[part][firms[-1]])

    first = [
        [_Told(FactCategory.EMPLOYER, worker, firms[0])],
        [_Told(FactCategory.GETS, holder, things[0])],
    ]
    rng.shuffle(first)
    blocks = [[chunk] for chunk in first]
    kept = things[0]
    for firm, thing in zip(firms[1:], things[1:], strict=True):
        change = [
            _Told(FactCategory.CORRECTION, worker, firm),
            _Told(FactCategory.GETS, holder, thing),
            _Told(FactCategory.BELL),
        ]
        lost, kept = (kept, thing) if rng.random() < config.oldest_lost else (thing, kept)
        blocks.append([change, [_Told(FactCategory.LOSES, holder, lost)]])
    # More bells ring where there is room, and where no firm is looked for: see `_fill`.
    quiet = [chunk for block in blocks for chunk in block if len(chunk) == 1]
    for chunk in rng.sample(quiet, bells - rounds):
        chunk.append(_Told(FactCategory.BELL))
    blocks.append([[_Told(FactCategory.CITY, firms[-1], city)]])
    return _Story(
        part=part,
        worker=worker,
        firms=tuple(firms),
        city=city,
        holder=holder,
        things=tuple(things),
        kept=kept,
        bells=bells,
        blocks=tuple(tuple(tuple(chunk) for chunk in block) for block in blocks),
    )


def _most_bells(rounds: int) -> int:
    """One in each round's first chunk, and in every chunk that the city is not told in."""
    return 2 * rounds + 2


def _fill(rng: random.Random, story: _Story, length: int) -> list[list[_Told]]:
    """The `length` chunks of a document: the story's, filled up, and those about others.

    At most one fact of a chunk tells where a firm is, and none of a chunk in which a bell rings:
    there the standing query tells whether the chunk has been read before, and so whether the bell
    has been counted.
    """
    located = {story.firms[-1]}  # firms whose city is told
    distract = functools.partial(_draw_distractor, rng, story, located)
    blocks = []
    for block in story.blocks:
        filled = []
        for chunk in block:
            facts = list(chunk)
            while len(facts) < FACTS_PER_CHUNK:
                relations = {fact.relation for fact in facts}
                facts.append(distract(not relations & {Relation.IN, Relation.BELL}))
            filled.append(facts)
        blocks.append(filled)
    for _ in range(length - sum(map(len, blocks))):
        others = [distract(True), *(distract(False) for _ in range(FACTS_PER_CHUNK - 1))]
        blocks.insert(rng.randrange(len(blocks) + 1), [others])
    chunks = [facts for filled in blocks for facts in filled]
    for facts in chunks:
        rng.shuffle(facts)
    return chunks


def _draw_distractor(
    rng: random.Random, story: _Story, located: set[str], may_locate: bool
) -> _Told:
    """A fact about others, often with a firm or a thing that the story has too.

    located: firms whose city has been told; a firm that is drawn is added.
    """
    world = make_world()
    part = story.part
    if may_locate and rng.random() < 0.35:
        words = {word for firm in story.firms for word in firm.split()}
        near = [firm for firm in world.firms if words & set(firm.split())]
        free = [f for f in (near if rng.random() < 0.7 else world.firms) if f not in located]
        if free:
            firm = rng.choice(free)
            located.add(firm)
            return _Told(FactCategory.OTHER_CITY, firm, rng.choice(world.locations[part][firm]))
    person = rng.choice([p for p in world.persons if p not in (story.worker, story.holder)])
    kind = rng.random()
    if kind < 0.05:
        return _Told(FactCategory.OTHER_SOUND)
    if kind < 0.1:
        return _Told(FactCategory.OTHER_NUMBER, person, rng.choice(NUMBERS))
    if kind < 0.55:
        firm = _prefer(rng, world.employers[part][person], story.firms)
        first = rng.random() < 0.6
        category = FactCategory.OTHER_EMPLOYER if first else FactCategory.OTHER_CORRECTION
        return _Told(category, person, firm)
    thing = _prefer(rng, world.goods[part][person], story.things)
    category = FactCategory.OTHER_GETS if rng.random() < 0.6 else FactCategory.OTHER_LOSES
    return _Told(category, person, thing)


def _prefer(rng: random.Random, names: Sequence[str], liked: Sequence[str]) -> str:
    """One of `names`, in a third of the cases one that is liked too, where there is any."""
    both = [name for name in names if name in liked]
    return rng.choice(both if both and rng.random() < 1 / 3 else names)


def _write(rng: random.Random, told: _Told) -> Fact:
    text = rng.choice(_WORDINGS[told.relation]).format(told.subject, told.object)
    return {
        "text": text,
        "subject": told.subject,
        "support": told.category <= FactCategory.BELL,
        "supersedes": -1,  # see `_number`
        "category": int(told.category),
    }


def _number(facts: list[Fact], told: list[_Told]) -> None:
    """Says of each employer, and of the city, the number of the fact whose entry it replaces."""
    entry = -1
    for number, (fact, what) in enumerate(zip(facts, told, strict=True)):
        if what.category in (FactCategory.CORRECTION, FactCategory.CITY):
            fact["supersedes"] = entry
        if what.category in (FactCategory.EMPLOYER, FactCategory.CORRECTION):
            entry = number


def _ask(story: _Story, told: list[_Told], wording: int) -> list[Question]:
    """The questions: about the city, the thing and the bells."""

    def find(*wanted: _Told) -> list[int]:
        return [number for number, fact in enumerate(told) if fact in wanted]

    firm = story.firms[-1]
    job = _Told(FactCategory.CORRECTION, story.worker, firm)
    city = find(job, _Told(FactCategory.CITY, firm, story.city))
    thing = find(_Told(FactCategory.GETS, story.holder, story.kept))
    asked = [
        (_CITY_QUESTIONS[wording].format(story.worker), story.city, city),
        (_THING_QUESTIONS[wording].format(story.holder), story.kept, thing),
        (_BELL_QUESTIONS[wording], NUMBERS[story.bells - 1], find(_Told(FactCategory.BELL))),
    ]
    return [{"text": text, "aliases": [answer], "needs": needs} for text, answer, needs in asked]


class Village(builders.GeneratedBuilder):
    """The chronicles as a data set."""

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = "Streaming questions about two persons of a made-up village, and its bells."
    GENERATE = staticmethod(generate)


def make_builder(config: VillageConfig, data_root: str) -> Village:
    """The TFDS builder of `config`, with a directory of its own under `data_root`."""
    name = builders.name_by_digest(f"chunks{config.facts_per_chunk}", config)
    return Village.make(name, config, data_root)
