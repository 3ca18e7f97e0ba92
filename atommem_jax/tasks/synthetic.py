"""Streaming multi-hop questions over a made-up world: who works where, and in which city.

A document states, one short sentence at a time, where a few asked persons work, that some of them
have changed employer, and in which city companies are, among sentences that do not matter. The
questions are known from the start, so a memory that keeps what counts, corrects what changed and
leaves out the rest answers all of them with a few entries, however long the document is.

The generator is a pure function of (config, split, index). Documents of the splits `test_1x`,
`test_2x`, ... ask the same questions at the same index; only the number of other facts differs.

Held-out combinations: a (person, company) or (company, city) pair belongs to exactly one of
train, validation and test, and no sentence of a split states a pair of another part. What is
learned in training is the procedure, not who works where.
"""

import dataclasses
import enum
import functools
import hashlib
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from atommem_jax.tasks import builders
from atommem_jax.tasks.builders import check_scales, read_split, refuse


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ONSETS = _words("b d f g h j k l m n p r s t v z br dr gr kl pl tr")
_ENDINGS = {
    "person": ("tan", "da", "vin", "mo", "sek", "la", "ron", "bi"),
    "company": ("tex", "dox", "nix", "bax"),
    "city": ("eno", "ora", "ulia", "ano", "ipol", "ava"),
}
_COUNTS = {"person": 40, "company": 32, "city": 24}
_LIKES = _words(
    "tea jazz chess rain opera soup poetry hiking honey snow sailing judo pasta yoga bread dancing"
)
_PRODUCTS = _words(
    "lamps boats pianos shoes clocks tents kites drums bricks maps chairs knives bells pens rugs "
    "vases"
)
_PARTS = {"test": 1 / 4, "validation": 1 / 8, "train": 5 / 8}
_MAX_FACTS = 800
_MAX_QUESTIONS = 10
_MAX_CHAIN_COMPANIES = 24


class FactCategory(enum.IntEnum):
    """What a sentence is about; the label that statistics are kept by."""

    EMPLOYER = 0  # first employer of an asked person
    CORRECTION = 1  # the employer that replaces it
    CITY = 2  # city of an asked person's final employer
    DECOY_CITY = 3  # city of an asked person's former employer, or of an unrelated company
    LIKES = 4
    MAKES = 5
    OTHER_EMPLOYER = 6
    OTHER_CORRECTION = 7
    OTHER_CITY = 8


_CORRECTIONS = (FactCategory.CORRECTION, FactCategory.OTHER_CORRECTION)


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Knobs of the generator. Raises ValueError where they cannot be met together."""

    base_facts: int = 12  # sentences in a document at scale 1
    facts_per_chunk: int = 1
    questions: tuple[int, int] = (2, 2)  # fewest, most; see `generate`
    two_hop: float = 1.0  # probability that a question asks for the city, not the company
    correction: float = 0.7  # probability that an employer is corrected later
    decoys: int = 1  # misleading city sentences per asked person
    train_examples: int = 20_000
    test_examples: int = 512  # in each test split and in validation
    scales: tuple[int, ...] = (1, 2, 4, 8)  # document lengths to test at, times base_facts
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "questions", tuple(self.questions))
        object.__setattr__(self, "scales", tuple(self.scales))
        if not (len(self.questions) == 2 and 1 <= self.questions[0] <= self.questions[1]):
            refuse("questions", self.questions, "(fewest, most) with 1 <= fewest <= most")
        most = self.questions[1]
        if most > _MAX_QUESTIONS:
            refuse("questions", self.questions, f"at most {_MAX_QUESTIONS} questions")
        for name in ("two_hop", "correction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                refuse(name, getattr(self, name), "a probability in [0, 1]")
        for name in ("facts_per_chunk", "train_examples", "test_examples"):
            if getattr(self, name) < 1:
                refuse(name, getattr(self, name), "an integer of at least 1")
        if self.decoys < 0 or most * (1 + max(1, self.decoys)) > _MAX_CHAIN_COMPANIES:
            allowed = f"0 or more, with questions * (1 + decoys) <= {_MAX_CHAIN_COMPANIES}"
            refuse("decoys", self.decoys, f"{allowed}; questions goes up to {most}")
        if self.base_facts < most * (3 + self.decoys):
            allowed = f"at least questions * (3 + decoys) = {most * (3 + self.decoys)}"
            refuse("base_facts", self.base_facts, f"{allowed}; raise it or ask fewer questions")
        check_scales(self)
        if self.base_facts * max(self.scales) > _MAX_FACTS:
            allowed = f"base_facts * scale <= {_MAX_FACTS}; base_facts is {self.base_facts}"
            refuse("scales", self.scales, f"{allowed}; the world has no more to tell")


@dataclasses.dataclass(frozen=True)
class World:
    """All names, and which pairs each part of the data may state."""

    persons: tuple[str, ...]
    companies: tuple[str, ...]
    cities: tuple[str, ...]
    likes: tuple[str, ...]
    products: tuple[str, ...]
    employers: Mapping[str, Mapping[str, tuple[str, ...]]]  # part -> person -> companies
    locations: Mapping[str, Mapping[str, tuple[str, ...]]]  # part -> company -> cities


def _stable_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@functools.cache
def make_world() -> World:
    """Coins the names and splits the pairs. Always the same world, on every machine."""
    # Every stem is consonants, one vowel, one consonant, so no stem can start another one, and
    # names built on different stems are never prefixes of each other.
    stems = sorted(
        (onset + vowel + coda for onset in _ONSETS for vowel in "aeiou" for coda in "lmnrst"),
        key=_stable_hash,
    )
    names = {}
    for kind, count in _COUNTS.items():
        endings = _ENDINGS[kind]
        names[kind] = tuple(
            (stems.pop() + endings[i % len(endings)]).capitalize() for i in range(count)
        )
    return World(
        persons=names["person"],
        companies=names["company"],
        cities=names["city"],
        likes=_LIKES,
        products=_PRODUCTS,
        employers=split_pairs(names["person"], names["company"]),
        locations=split_pairs(names["company"], names["city"]),
    )


def split_pairs(
    subjects: tuple[str, ...], objects: tuple[str, ...]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """part -> subject -> its objects. Ranks, not thresholds: every subject gets its share."""
    parts: dict[str, dict[str, tuple[str, ...]]] = {part: {} for part in _PARTS}
    for subject in subjects:
        ranked = sorted(objects, key=lambda other: _stable_hash(f"{subject}/{other}"))
        start = 0
        for part, share in _PARTS.items():
            stop = start + int(share * len(objects))
            parts[part][subject] = tuple(ranked[start:stop])
            start = stop
    return parts


class _Chain(NamedTuple):
    """One asked person's story."""

    person: str
    employers: tuple[str, ...]  # one, or two where corrected
    city: str  # of the last employer
    decoys: tuple[tuple[str, str], ...]  # (company, city)
    two_hop: bool


def generate(config: SyntheticConfig, split: str, index: int) -> dict[str, Any]:
    """Makes one example (`schema.Example`).

    The number of questions is the fewest allowed in half of the examples, else uniform over the
    rest of the range (the paper: one in half of the samples, else 2 to 10). Every question asks
    about another person, and no two asked persons have an employer in common. The order in a
    person's story is employer, correction, then the city sentences; the stories and all other
    sentences are interleaved uniformly at random.

    Raises ValueError if `split` is none of `builders.split_sizes(config)`.
    """
    part, scale = read_split(config, split)
    rng = random.Random(f"{config.seed}/{part}/{index}")
    fewest, most = config.questions
    count = fewest
    if most > fewest and rng.random() < 0.5:
        count = rng.randint(fewest + 1, most)
    chains = _draw_chains(rng, config, part, count)
    groups = [_tell_chain(rng, chain) for chain in chains]
    room = config.base_facts * int(scale or 1) - sum(map(len, groups))
    groups += _draw_distractors(rng, config, part, chains, room)

    facts, numbers = _interleave(rng, groups)
    size = config.facts_per_chunk
    order = rng.sample(range(count), count)
    return {
        "id": index,
        "chunks": [facts[start : start + size] for start in range(0, len(facts), size)],
        "questions": [_ask(chains[i], groups[i], numbers[i]) for i in order],
        "focus": " ".join(chains[i].person for i in order),
    }


def _draw_chains(
    rng: random.Random, config: SyntheticConfig, part: str, count: int
) -> list[_Chain]:
    """Draws the stories of `count` asked persons, with no company in two of them."""
    world = make_world()
    employers, locations = world.employers[part], world.locations[part]
    while True:  # few companies are allowed per person: now and then a draw runs out of them
        persons = iter(rng.sample(world.persons, len(world.persons)))
        free = set(world.companies)
        chains: list[_Chain] = []
        for _ in range(count):
            # Decided before the person is, so that persons short of companies do not bias it.
            jobs = 2 if rng.random() < config.correction else 1
            for person in persons:
                open_to = [company for company in employers[person] if company in free]
                if len(open_to) >= jobs:
                    break
            else:
                break
            works = rng.sample(open_to, jobs)
            free.difference_update(works)
            city = rng.choice(locations[works[-1]])
            misleading = works[:-1][: config.decoys]
            unrelated = rng.sample(
                [company for company in world.companies if company in free],
                config.decoys - len(misleading),
            )
            free.difference_update(unrelated)
            decoys = tuple(
                (company, rng.choice([c for c in locations[company] if c != city]))
                for company in misleading + unrelated
            )
            two_hop = rng.random() < config.two_hop
            chains.append(_Chain(person, tuple(works), city, decoys, two_hop))
        if len(chains) == count:
            return chains


def _state(category: FactCategory, subject: str, rest: str, support: bool = False) -> dict:
    return {
        "text": f"{subject} {rest}.",
        "subject": subject,
        "support": support,
        "supersedes": -1,  # numbered once the order of the document is known
        "category": int(category),
    }


def _tell_chain(rng: random.Random, chain: _Chain) -> list[dict]:
    """The sentences of one story in the order in which the document must state them."""
    facts = [_state(FactCategory.EMPLOYER, chain.person, f"works at {chain.employers[0]}", True)]
    for company in chain.employers[1:]:
        facts.append(_state(FactCategory.CORRECTION, chain.person, f"now works at {company}", True))
    cities = [_state(FactCategory.CITY, chain.employers[-1], f"is in {chain.city}", chain.two_hop)]
    for company, city in chain.decoys:
        cities.append(_state(FactCategory.DECOY_CITY, company, f"is in {city}"))
    rng.shuffle(cities)
    return facts + cities


def _draw_distractors(
    rng: random.Random, config: SyntheticConfig, part: str, chains: list[_Chain], count: int
) -> list[list[dict]]:
    """Draws `count` sentences that answer nothing, as groups whose inner order is kept.

    Half of the likes are of asked persons and half of the products of their employers, so that a
    name alone does not tell what matters.
    """
    world = make_world()
    asked = [chain.person for chain in chains]
    relevant = [company for chain in chains for company in chain.employers]
    told = set(relevant).union(company for chain in chains for company, _ in chain.decoys)
    others = [person for person in world.persons if person not in asked]
    elsewhere = [company for company in world.companies if company not in told]
    rng.shuffle(others)
    rng.shuffle(elsewhere)
    groups: list[list[dict]] = []
    stated: set[str] = set()
    while count > 0:
        kind = rng.random()
        if kind < 0.3 and others:
            person = others.pop()
            jobs = 2 if count > 1 and rng.random() < config.correction else 1
            works = rng.sample(world.employers[part][person], jobs)
            group = [_state(FactCategory.OTHER_EMPLOYER, person, f"works at {works[0]}")]
            for company in works[1:]:
                group.append(
                    _state(FactCategory.OTHER_CORRECTION, person, f"now works at {company}")
                )
        elif kind < 0.45 and elsewhere:
            company = elsewhere.pop()
            city = rng.choice(world.locations[part][company])
            group = [_state(FactCategory.OTHER_CITY, company, f"is in {city}")]
        elif kind < 0.7:
            company = rng.choice(relevant if rng.random() < 0.5 else world.companies)
            group = [_state(FactCategory.MAKES, company, f"makes {rng.choice(_PRODUCTS)}")]
        else:
            person = rng.choice(asked if rng.random() < 0.5 else world.persons)
            group = [_state(FactCategory.LIKES, person, f"likes {rng.choice(_LIKES)}")]
        if group[0]["text"] in stated:
            continue
        stated.add(group[0]["text"])
        groups.append(group)
        count -= len(group)
    return groups


def _interleave(rng: random.Random, groups: list[list[dict]]) -> tuple[list[dict], list[list[int]]]:
    """Merges the groups in random order, keeping each one's own. Also returns the fact numbers."""
    order = [i for i, group in enumerate(groups) for _ in group]
    rng.shuffle(order)
    facts: list[dict] = []
    numbers: list[list[int]] = [[] for _ in groups]
    for i in order:
        fact = groups[i][len(numbers[i])]
        if fact["category"] in _CORRECTIONS:
            fact["supersedes"] = numbers[i][-1]
        numbers[i].append(len(facts))
        facts.append(fact)
    return facts, numbers


def _ask(chain: _Chain, group: list[dict], numbers: list[int]) -> dict[str, Any]:
    needs = [numbers[len(chain.employers) - 1]]
    if not chain.two_hop:
        text = f"Which company does {chain.person} work at?"
        return {"text": text, "aliases": [chain.employers[-1]], "needs": needs}
    categories = [fact["category"] for fact in group]
    needs.append(numbers[categories.index(FactCategory.CITY)])
    text = f"Which city does {chain.person} work in?"
    return {"text": text, "aliases": [chain.city], "needs": needs}


class Synthetic(builders.GeneratedBuilder):
    """The generated world as a data set."""

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = "Streaming multi-hop questions over a made-up world."
    GENERATE = staticmethod(generate)


def make_builder(config: SyntheticConfig, data_root: str) -> Synthetic:
    """The TFDS builder of `config`, with a directory of its own under `data_root`."""
    name = builders.name_by_digest(f"facts{config.base_facts}", config)
    return Synthetic.make(name, config, data_root)
