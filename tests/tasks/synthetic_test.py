"""A small reader of English reads the documents back; they are judged by what they say."""

import collections
import dataclasses
import itertools
import re
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest

from atommem_jax.tasks import builders, synthetic
from atommem_jax.tasks.synthetic import FactCategory, SyntheticConfig, generate

SENTENCES = {
    "employer": re.compile(r"(\w+) works at (\w+)\."),
    "correction": re.compile(r"(\w+) now works at (\w+)\."),
    "city": re.compile(r"(\w+) is in (\w+)\."),
    "likes": re.compile(r"(\w+) likes (\w+)\."),
    "makes": re.compile(r"(\w+) makes (\w+)\."),
}


class Statement(NamedTuple):
    relation: str
    subject: str
    value: str


def read(text: str) -> Statement:
    [found] = [
        Statement(relation, *matched.groups())
        for relation, pattern in SENTENCES.items()
        if (matched := pattern.fullmatch(text))
    ]
    return found


def flatten(example: dict) -> list[dict]:
    return [fact for chunk in example["chunks"] for fact in chunk]


def asked_person(question: dict) -> str:
    return re.fullmatch(r"Which (?:city|company) does (\w+) work (?:in|at)\?", question["text"])[1]


@st.composite
def samples(draw):
    most = draw(st.integers(1, 10))
    decoys = draw(st.integers(0, min(3, 24 // most - 1)))
    config = SyntheticConfig(
        base_facts=draw(st.integers(most * (3 + decoys), 60)),
        facts_per_chunk=draw(st.integers(1, 5)),
        questions=(draw(st.integers(1, most)), most),
        two_hop=draw(st.sampled_from([0.0, 0.5, 1.0])),
        correction=draw(st.sampled_from([0.0, 0.7, 1.0])),
        decoys=decoys,
        seed=draw(st.integers(0, 1000)),
    )
    split = draw(st.sampled_from(sorted(builders.split_sizes(config))))
    return config, split, draw(st.integers(0, 10_000))


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(samples())
def test_document_says_what_its_labels_claim(sample):
    config, split, index = sample
    example = generate(config, split, index)
    facts = flatten(example)
    told = [read(fact["text"]) for fact in facts]
    scale = int(split.partition("_")[2].removesuffix("x") or 1)

    assert len(facts) == config.base_facts * scale
    assert {len(chunk) for chunk in example["chunks"][:-1]} <= {config.facts_per_chunk}
    assert 1 <= len(example["chunks"][-1]) <= config.facts_per_chunk
    assert len(set(told)) == len(told), "a sentence is repeated"
    assert config.questions[0] <= len(example["questions"]) <= config.questions[1]

    employer, city = {}, {}  # subject -> number of the fact that holds now
    supported = set()
    for number, (fact, said) in enumerate(zip(facts, told, strict=True)):
        assert fact["subject"] == said.subject
        supersedes = -1
        if said.relation == "employer":
            assert said.subject not in employer, "contradicts an earlier employer"
            employer[said.subject] = number
        elif said.relation == "correction":
            supersedes = employer[said.subject]  # there is one to correct
            assert told[supersedes].value != said.value
            employer[said.subject] = number
        elif said.relation == "city":
            assert said.subject not in city, "contradicts an earlier city"
            city[said.subject] = number
        assert fact["supersedes"] == supersedes

    final_companies = []
    for question in example["questions"]:
        person = asked_person(question)
        chain = [employer[person]]
        company = told[chain[0]].value
        answer = company
        supported |= {
            i
            for i, said in enumerate(told)
            if said.subject == person and "work" in facts[i]["text"]
        }
        if "Which city" in question["text"]:
            chain.append(city[company])
            answer = told[city[company]].value
            supported.add(city[company])
        assert question["aliases"] == [answer]
        assert question["needs"] == chain
        assert city[company] > employer[person], "the city came before the employer was known"
        final_companies.append(company)
    assert len(set(final_companies)) == len(final_companies)
    assert {i for i, fact in enumerate(facts) if fact["support"]} == supported
    assert example["focus"].split() == [asked_person(q) for q in example["questions"]]


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(samples())
def test_categories_tell_asked_facts_decoys_and_distractors_apart(sample):
    config, split, index = sample
    example = generate(config, split, index)
    facts = flatten(example)
    told = [read(fact["text"]) for fact in facts]
    asked = {asked_person(question) for question in example["questions"]}
    jobs = collections.defaultdict(list)  # asked person -> companies, oldest first
    for said in told:
        if said.relation in ("employer", "correction") and said.subject in asked:
            jobs[said.subject].append(said.value)
    final = {companies[-1] for companies in jobs.values()}
    former = {companies[0] for companies in jobs.values() if len(companies) == 2}

    decoys = [i for i, fact in enumerate(facts) if fact["category"] == FactCategory.DECOY_CITY]
    assert len(decoys) == config.decoys * len(asked)
    if config.decoys:
        assert former <= {told[i].subject for i in decoys}
    for i, (fact, said) in enumerate(zip(facts, told, strict=True)):
        other = "" if said.subject in asked else "OTHER_"
        if said.relation in ("employer", "correction"):
            expected = FactCategory[other + said.relation.upper()]
        elif said.relation != "city":
            expected = FactCategory[said.relation.upper()]
        elif said.subject in final:
            expected = FactCategory.CITY
        else:
            expected = FactCategory.DECOY_CITY if i in decoys else FactCategory.OTHER_CITY
        assert fact["category"] == expected
    # The city of a former employer is told only once the reader can know that it is former.
    for person, companies in jobs.items():
        corrected = (
            told.index(Statement("correction", person, companies[-1]))
            if len(companies) == 2
            else -1
        )
        cities = [i for i in decoys if told[i].subject == companies[0]]
        assert all(i > corrected for i in cities)
        # and it would be a wrong answer
        answers = [said.value for said in told if said[:2] == ("city", companies[-1])]
        assert all(told[i].value not in answers for i in cities)


def test_names_are_distinct_capitalised_and_no_prefix_of_each_other():
    world = synthetic.make_world()
    names = [*world.persons, *world.companies, *world.cities]
    assert (len(world.persons), len(world.companies), len(world.cities)) == (40, 32, 24)
    assert len(world.likes) == len(world.products) == 16
    everything = [*names, *world.likes, *world.products]
    assert len(set(everything)) == len(everything)
    assert all(re.fullmatch(r"[A-Z][a-z]{3,9}", name) for name in names)
    # Three consonants in a row at most, and a vowel to speak them with.
    assert not any(re.search(r"[^aeiou]{4}", name.lower()) for name in names)
    ordered = sorted(everything)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))


def test_same_seed_split_and_index_give_the_same_example():
    config = SyntheticConfig()
    assert generate(config, "train", 3) == generate(SyntheticConfig(), "train", 3)
    variants = [
        generate(config, "train", 4),
        generate(config, "test_1x", 3),
        generate(config, "validation_1x", 3),
        generate(dataclasses.replace(config, seed=1), "train", 3),
    ]
    texts = [str(example["chunks"]) for example in [generate(config, "train", 3), *variants]]
    assert len(set(texts)) == len(texts)


def test_known_example_stays_what_it_was():
    # Prepared data is not written anew unless VERSION changes: whoever changes what the generator
    # makes has to change that, and this test.
    example = generate(SyntheticConfig(), "train", 7)
    assert synthetic.Synthetic.VERSION == "1.0.0"
    assert [fact["text"] for fact in flatten(example)] == [
        "Drustan works at Filnix.",
        "Barsek likes dancing.",
        "Barsek works at Dotdox.",
        "Jorbi works at Konbax.",
        "Barsek now works at Tomdox.",
        "Tomdox is in Henava.",
        "Jorbi now works at Grendox.",
        "Dotdox is in Voseno.",
        "Grusnix is in Plululia.",
        "Konbax is in Trolava.",
        "Drustan now works at Dremtex.",
        "Grendox is in Hureno.",
    ]


def _stated_pairs(config: SyntheticConfig, split: str, count: int) -> set[tuple[str, str]]:
    told = (read(f["text"]) for i in range(count) for f in flatten(generate(config, split, i)))
    return {
        (said.subject, said.value)
        for said in told
        if said.relation in ("employer", "correction", "city")
    }


def test_no_pair_of_one_part_is_stated_in_another():
    config = SyntheticConfig()
    train = _stated_pairs(config, "train", 4000)
    validation = _stated_pairs(config, "validation_1x", 500)
    test = _stated_pairs(config, "test_1x", 300) | _stated_pairs(config, "test_8x", 200)
    assert not train & test
    assert not train & validation
    assert not validation & test
    # 40 persons x 20 companies and 32 companies x 15 cities may be stated in training. Nearly all
    # are: what is missing from training is held out, not merely rare.
    assert len(train) > 0.98 * (40 * 20 + 32 * 15)
    # Every name of the test documents is known from training.
    known = {name for pair in train for name in pair}
    assert {name for pair in test for name in pair} <= known


def test_longer_test_documents_ask_the_same_questions():
    config = SyntheticConfig()
    for index in range(20):
        short, long = generate(config, "test_1x", index), generate(config, "test_8x", index)
        strip = [
            sorted((q["text"], q["aliases"][0]) for q in example["questions"])
            for example in (short, long)
        ]
        assert strip[0] == strip[1]
        assert len(flatten(long)) == 8 * len(flatten(short))


def test_half_of_the_samples_ask_one_question_and_the_rest_are_uniform():
    config = SyntheticConfig(questions=(1, 10), base_facts=40)
    count = 2000
    found = collections.Counter(
        len(generate(config, "train", i)["questions"]) for i in range(count)
    )
    assert abs(found[1] / count - 0.5) < 0.05
    for number in range(2, 11):  # standard error .005
        assert abs(found[number] / count - 1 / 18) < 0.025


def test_corrections_and_hops_occur_as_often_as_configured():
    config = SyntheticConfig(two_hop=0.3, correction=0.7)
    examples = [generate(config, "train", i) for i in range(1500)]
    categories = collections.Counter(f["category"] for e in examples for f in flatten(e))
    corrected = categories[FactCategory.CORRECTION] / categories[FactCategory.EMPLOYER]
    assert abs(corrected - 0.7) < 0.04
    cities = [q["text"].startswith("Which city") for e in examples for q in e["questions"]]
    assert abs(sum(cities) / len(cities) - 0.3) < 0.04
    assert set(categories) == set(FactCategory)


def test_correction_rate_does_not_suffer_from_few_companies_per_person():
    config = SyntheticConfig(questions=(10, 10), base_facts=40)
    facts = [f for i in range(150) for f in flatten(generate(config, "validation_1x", i))]
    categories = collections.Counter(fact["category"] for fact in facts)
    corrected = categories[FactCategory.CORRECTION] / categories[FactCategory.EMPLOYER]
    assert abs(corrected - 0.7) < 0.05


def test_supporting_facts_stand_at_different_places_in_each_sample():
    # The public code shuffled with one seed: the support was at the same places in all samples.
    places = [
        tuple(
            i
            for i, f in enumerate(flatten(generate(SyntheticConfig(), "test_1x", k)))
            if f["support"]
        )
        for k in range(200)
    ]
    assert len(set(places)) > 100
    assert {i for place in places for i in place} == set(range(12))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"questions": (0, 2)}, "task.questions is .0, 2."),
        ({"questions": (3, 2)}, "1 <= fewest <= most"),
        ({"questions": (1, 11), "base_facts": 100}, "at most 10"),
        ({"two_hop": 1.5}, "task.two_hop is 1.5"),
        ({"correction": -0.1}, "task.correction is -0.1"),
        ({"facts_per_chunk": 0}, "task.facts_per_chunk is 0"),
        ({"train_examples": 0}, "task.train_examples is 0"),
        ({"base_facts": 7}, "task.base_facts is 7.*= 8"),
        ({"decoys": -1}, "task.decoys is -1"),
        ({"decoys": 12, "base_facts": 90}, "task.decoys is 12"),
        ({"scales": ()}, "task.scales is"),
        ({"scales": (1, 1)}, "distinct"),
        ({"scales": (1, 100)}, "base_facts . scale <= 800"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**fields)


def test_fullest_world_can_still_be_told():
    config = SyntheticConfig(base_facts=100, scales=(8,), questions=(10, 10))
    facts = flatten(generate(config, "test_8x", 0))
    assert len({fact["text"] for fact in facts}) == 800


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split is 'test_3x'; allowed: train, validation_1x"):
        generate(SyntheticConfig(), "test_3x", 0)
