"""Simulated stories are held against a reader of their text, and against the published ones."""

import collections
import itertools
import re

import pytest

from atommem_jax.tasks import babi, babi_simulator, babilong
from tests.tasks import babi_test

MOVES = "moved|went|travelled|journeyed"
TAKES = "took|got|grabbed|picked"


def answer(sentences: list[str], question: str) -> str:
    """Reads a story from its end: the thing's places one after another, as its words tell them."""
    thing, place = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question).groups()
    where, visited, carried = {}, [], None
    for sentence in sentences:
        person, verb, *_, last = sentence.rstrip(".").split()
        if verb in MOVES and "the" in sentence and last in babi_simulator.PLACES:
            where[person] = last
            visited += [last] if carried == person else []
        elif f"the {thing}" in sentence:
            visited += [where[person]] if person in where else []
            carried = person if verb in TAKES else None
    places = [name for name, _ in itertools.groupby(visited)]
    latest = max(i for i, name in enumerate(places) if name == place)
    return places[latest - 1]


def test_questions_are_answered_by_what_the_sentences_say():
    stories = list(babi_simulator.simulate(60, seed=1))
    for story in stories:
        assert [line.number for line in story] == list(range(1, len(story) + 1))
        asked = [line for line in story if line.answer is not None]
        assert len(asked) == 5
        for line in asked:
            before = [other.text for other in story[: line.number - 1] if other.answer is None]
            assert answer(before, line.text) == line.answer
            assert all(story[number - 1].answer is None for number in line.supporting)
            told, came, left = line.supporting
            assert told >= came > left
    texts = ["\n".join(line.text for line in story) for story in stories]
    assert len(set(texts)) == len(texts)
    again = list(babi_simulator.simulate(60, seed=1))
    assert again == stories
    assert next(babi_simulator.simulate(1, seed=2)) != stories[0]


def describe(stories) -> dict[str, float]:
    """Shares of what is done, and means: sentences, how far back what is asked for lies."""
    verbs, means = collections.Counter(), collections.defaultdict(list)
    for story in stories:
        told = [line.text.split()[1] for line in story if line.answer is None]
        verbs.update("move" if v in MOVES else "take" if v in TAKES else "drop" for v in told)
        means["sentences"].append(len(told))
        means["first"].append(next(i for i, line in enumerate(story) if line.answer is not None))
        for line in story:
            if line.answer is not None:
                _, came, left = line.supporting
                means["came"].append(line.number - came)
                means["left"].append(line.number - left)
    shares = {name: count / verbs.total() for name, count in verbs.items()}
    return shares | {name: sum(found) / len(found) for name, found in means.items()}


def test_they_are_like_the_published_ones(shared_data):
    folder = shared_data / "babi"
    if not folder.is_dir():
        pytest.skip(f"no bAbI files at {folder}")
    path = babi.data_file(babi.BabiConfig(3, str(folder)), "train")
    published = describe(babi.read_stories(path))
    made = describe(list(babi_simulator.simulate(200, seed=0)))
    for name, expected in published.items():
        assert made[name] == pytest.approx(expected, rel=0.25), name


def test_they_train_beside_the_published_ones_and_nothing_else(tmp_path):
    folder = babi_test.write(tmp_path, 3, babi_test.TASK3).data_dir
    babi_test.write(tmp_path, 3, babi_test.TASK3, "test")
    plain, more = (babi.BabiConfig(3, folder, 1, 1000, count) for count in (0, 4))
    alone, beside = (list(babi.generate(config, "train")) for config in (plain, more))
    assert beside[: len(alone)] == alone
    assert len(beside) == len(alone) + 20
    for example in beside:
        babi_test.check_notes(example)
    for part in ("validation", "test"):
        assert list(babi.generate(plain, part)) == list(babi.generate(more, part))
    assert babilong.BabilongConfig(task=3, simulated_stories=4).stories().simulated_stories == 4


@pytest.mark.parametrize("fields", [{"task": 1, "simulated_stories": 5}, {"simulated_stories": -1}])
def test_other_tasks_have_enough(fields):
    with pytest.raises(ValueError, match=r"simulated_stories is .*; allowed: 0 or more"):
        babi.BabiConfig(**fields)
