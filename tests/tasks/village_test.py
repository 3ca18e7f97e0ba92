"""A small reader of English reads the chronicles back; they are judged by what they say."""

import collections
import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest

from atommem_jax.tasks import builders, village
from atommem_jax.tasks.village import FactCategory, VillageConfig, generate
from tests.helpers import village_reference as reference


def flatten(example: dict) -> list[dict]:
    return [fact for chunk in example["chunks"] for fact in chunk]


def texts(example: dict) -> list[list[str]]:
    return [[fact["text"] for fact in chunk] for chunk in example["chunks"]]


def find_asked(example: dict) -> dict[str, str]:
    """Kind of question -> whom it is about."""
    return dict(reference.asked(question["text"]) for question in example["questions"])


@st.composite
def samples(draw):
    fewest = draw(st.integers(1, 3))
    config = VillageConfig(
        facts_per_chunk=draw(st.integers(1, 3)),
        rounds=(fewest, draw(st.integers(fewest, 3))),
        oldest_lost=draw(st.sampled_from([0.0, 0.8, 1.0])),
        others=draw(st.sampled_from([0.0, 0.5, 2.0])),
        scales=(1, 2, 8),
        seed=draw(st.integers(0, 1000)),
    )
    split = draw(st.sampled_from(sorted(builders.split_sizes(config))))
    return config, split, draw(st.integers(0, 10_000))


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(samples())
def test_who_remembers_everything_answers_all_questions(sample):
    example = generate(*sample)
    questions = [question["text"] for question in example["questions"]]
    assert [[answer] for answer in reference.solve(texts(example), questions)] == [
        question["aliases"] for question in example["questions"]
    ]
    assert sorted(find_asked(example)) == ["bells", "city", "thing"]
    # The subject of a question is its first word, which is all that a query of one token holds.
    subjects = {*example["focus"].split(), "Bells"}
    assert {question.split()[0] for question in questions} == subjects


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(samples())
def test_labels_are_what_the_sentences_say(sample):
    example = generate(*sample)
    facts = flatten(example)
    said = [reference.read(fact["text"]) for fact in facts]
    asked = find_asked(example)
    firms = [s.object for s in said if s.subject == asked["city"]]
    relations = {"works": "EMPLOYER", "now": "CORRECTION", "in": "CITY", "gets": "GETS",
                 "loses": "LOSES", "horn": "SOUND", "number": "NUMBER"}  # fmt: skip
    entry = -1
    for number, (fact, s) in enumerate(zip(facts, said, strict=True)):
        assert fact["subject"] == s.subject
        mine = s.subject in asked.values() or (s.relation == "in" and s.subject == firms[-1])
        if s.relation == "bell":
            expected = FactCategory.BELL
        else:
            expected = FactCategory[("" if mine else "OTHER_") + relations[s.relation]]
        assert fact["category"] == expected
        assert fact["support"] == (expected <= FactCategory.BELL)
        replaces = expected in (FactCategory.CORRECTION, FactCategory.CITY)
        assert fact["supersedes"] == (entry if replaces else -1)
        if expected in (FactCategory.EMPLOYER, FactCategory.CORRECTION):
            entry = number
    for question in example["questions"]:
        kind, subject = reference.asked(question["text"])
        [answer] = question["aliases"]
        needed = [said[i] for i in question["needs"]]
        if kind == "city":
            assert [s.object for s in needed] == [firms[-1], answer]
        elif kind == "thing":
            assert [(s.relation, s.subject, s.object) for s in needed] == [
                ("gets", subject, answer)
            ]
        else:
            assert {s.relation for s in needed} == {"bell"}
            assert question["needs"] == [i for i, s in enumerate(said) if s.relation == "bell"]


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(samples())
def test_the_story_can_be_kept_in_three_entries(sample):
    config, split, index = sample
    example = generate(config, split, index)
    asked = find_asked(example)
    held, last_want = [], None
    for chunk in texts(example):
        assert 1 <= len(chunk) <= config.facts_per_chunk
        said = [reference.read(text) for text in chunk]
        for s in said:
            if s.subject == asked["thing"] and s.relation == "gets":
                held.append(s.object)
                assert len(held) <= 2
                assert len({thing.split()[1] for thing in held}) == len(held)
            if s.subject == asked["thing"] and s.relation == "loses":
                held.remove(s.object)
        wants = [s.subject for s in said if s.relation == "now" and s.subject == asked["city"]]
        wants += [s.object for s in said if s.relation == "loses" and s.subject == asked["thing"]]
        assert len(wants) <= 1
        rings = any(s.relation == "bell" for s in said)
        assert sum(s.relation == "in" for s in said) <= (0 if rings else 1)
        if rings and wants:
            assert wants[0] != last_want, "nothing tells whether the bell has been counted"
        last_want = wants[0] if wants else last_want


def test_no_firm_is_said_to_be_in_two_cities():
    config = VillageConfig()
    for index in range(100):
        said = [reference.read(f["text"]) for f in flatten(generate(config, "test_8x", index))]
        places = [s.subject for s in said if s.relation == "in"]
        assert len(set(places)) == len(places)


def test_names_are_one_or_two_different_words():
    world = village.make_world()
    assert [len(names) for names in (world.persons, world.firms, world.cities, world.things)] == [
        40, 64, 64, 64
    ]  # fmt: skip
    words = [*world.persons, *village.NUMBERS, village.BELLS]
    for names in (world.firms, world.cities, world.things):
        first, second = zip(*(name.split() for name in names), strict=True)
        words += [*set(first), *set(second)]
    assert len(set(words)) == len(words)


def _stated_pairs(config: VillageConfig, split: str, count: int) -> set[tuple[str, str]]:
    said = (
        reference.read(f["text"]) for i in range(count) for f in flatten(generate(config, split, i))
    )
    return {(s.subject, s.object) for s in said if s.relation not in ("bell", "horn", "number")}


def test_no_pair_of_one_part_is_stated_in_another():
    config = VillageConfig()
    train = _stated_pairs(config, "train", 3000)
    validation = _stated_pairs(config, "validation_1x", 300)
    test = _stated_pairs(config, "test_1x", 300) | _stated_pairs(config, "test_8x", 100)
    assert not train & test
    assert not train & validation
    assert not validation & test
    assert {word for pair in test for name in pair for word in name.split()} <= {
        word for pair in train for name in pair for word in name.split()
    }


def test_longer_documents_tell_the_same_story():
    config = VillageConfig()
    for index in range(20):
        short, long = generate(config, "test_1x", index), generate(config, "test_8x", index)
        assert [(q["text"], q["aliases"]) for q in short["questions"]] == [
            (q["text"], q["aliases"]) for q in long["questions"]
        ]
        assert len(long["chunks"]) == 8 * len(short["chunks"])


def test_a_document_has_parts_about_others_alone_at_every_scale():
    for split in ("train", "test_1x"):
        shares = []
        for index in range(50):
            chunks = generate(VillageConfig(), split, index)["chunks"]
            alone = [not any(fact["support"] for fact in chunk) for chunk in chunks]
            shares.append(sum(alone) / len(alone))
        assert all(0.25 < share < 0.4 for share in shares)  # a third: half as many as the story's


def test_smaller_chunks_tell_the_same_document():
    whole, cut = (generate(VillageConfig(facts_per_chunk=size), "train", 5) for size in (3, 1))
    assert [f["text"] for f in flatten(whole)] == [f["text"] for f in flatten(cut)]
    assert whole["questions"] == cut["questions"]
    assert {len(chunk) for chunk in cut["chunks"]} == {1}


def test_every_number_of_bells_is_as_likely():
    config = VillageConfig()
    found = collections.Counter(
        question["aliases"][0]
        for index in range(2800)
        for question in generate(config, "train", index)["questions"]
        if question["text"].startswith("Bells")
    )
    assert set(found) == set(reference.NUMBERS[1:])
    assert all(abs(count - 400) < 100 for count in found.values())  # standard error 18


def test_the_older_thing_is_lost_as_often_as_configured():
    for rate in (0.0, 0.8, 1.0):
        config = VillageConfig(rounds=(1, 1), oldest_lost=rate)
        older = 0
        for index in range(500):
            example = generate(config, "train", index)
            thing = find_asked(example)["thing"]
            said = [reference.read(fact["text"]) for fact in flatten(example)]
            got, lost = (
                [s.object for s in said if s.subject == thing and s.relation == relation]
                for relation in ("gets", "loses")
            )
            older += lost == got[:1]
        assert abs(older / 500 - rate) < 0.08


def test_known_example_stays_what_it_was():
    # Prepared data is not written anew unless VERSION changes: whoever changes what the generator
    # makes has to change that, and this test.
    assert village.Village.VERSION == "1.0.0"
    assert texts(generate(VillageConfig(rounds=(2, 2)), "train", 7)) == KNOWN


def test_same_seed_split_and_index_give_the_same_example():
    config = VillageConfig()
    assert generate(config, "train", 3) == generate(VillageConfig(), "train", 3)
    variants = [
        generate(config, "train", 4),
        generate(config, "test_1x", 3),
        generate(dataclasses.replace(config, seed=1), "train", 3),
    ]
    assert len({str(e["chunks"]) for e in [generate(config, "train", 3), *variants]}) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"facts_per_chunk": 0}, "task.facts_per_chunk is 0; allowed: 1 to 3"),
        ({"facts_per_chunk": 4}, "task.facts_per_chunk is 4"),
        ({"rounds": (0, 2)}, "task.rounds is .0, 2."),
        ({"rounds": (3, 2)}, "1 <= fewest <= most <= 3"),
        ({"rounds": (2, 4)}, "task.rounds is .2, 4."),
        ({"oldest_lost": 1.5}, "task.oldest_lost is 1.5"),
        ({"others": -0.5}, "task.others is -0.5"),
        ({"train_examples": 0}, "task.train_examples is 0"),
        ({"scales": ()}, "task.scales is"),
        ({"scales": (1, 1)}, "distinct"),
        ({"scales": (1, 100)}, "up to 64"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VillageConfig(**fields)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split is 'test_3x'; allowed: train, validation_1x"):
        generate(VillageConfig(), "test_3x", 0)


KNOWN = [
    [
        "Bralvin loses the red clock.",
        "Mesron finds the red kite.",
        "Brenvin gives away the blue drum.",
    ],
    [
        "Bralvin loses the red drum.",
        "Iron Lantern is in Upper Klemeno.",
        "Josla has a job at Amber Lantern.",
    ],
    ["Normo gets the blue chair.", "Pemda gives away the green lamp.", "Pemda gets the red clock."],
    [
        "Klinron works at Amber Anchor.",
        "Silver Harbour lies in New Peseno.",
        "Klolvin is employed by Silver Lantern.",
    ],
    ["Klolvin now works at Amber Lantern.", "Normo buys the red kite.", "A bell is heard."],
    [
        "Copper Lantern can be found in Upper Plululia.",
        "Mummo is employed by Amber Lantern.",
        "Normo sells the blue chair.",
    ],
    [
        "Klolvin is now employed by Copper Falcon.",
        "Normo buys the brown kettle.",
        "A bell sounds from afar.",
    ],
    [
        "Normo gives away the red kite.",
        "Danron has a job at Silver Lantern.",
        "Silver Orchard can be found in Old Renipol.",
    ],
    [
        "Copper Falcon is in West Plululia.",
        "Grormo gives away the yellow kite.",
        "Venbi works at Amber Lantern.",
    ],
    ["Copper Anchor is in New Klomano.", "Pemda sells the red drum.", "Klinron buys the red kite."],
]
