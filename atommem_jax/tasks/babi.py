"""bAbI question answering, tasks 1 to 3, read from the published files.

Source: Weston et al., "Towards AI-Complete Question Answering", arXiv 1502.05698; the English
10k files of `tasks_1-20_v1-2`. One example is made per question: the sentences of its story up to
it, and that question. The published supporting sentences become `needs`.

What a teacher is told (`support`, `supersedes`) follows from the question alone and from what has
been read so far, never from the answer:

Task 1, "Where is Mary?". Each sentence about the asked person is worth storing, and replaces the
one before it.

Tasks 2 and 3, "Where is the milk?", "Where was the milk before the garden?". Anyone may turn out
to carry the asked object, so where each person goes is worth storing, and so is each sentence in
which the asked object changes hands; those about other objects are not. What replaces what:

- A move replaces the last move of the same person, unless that one still tells a place where the
  object has been: in task 2, that of a person who has put it down there and left it; in task 3,
  which asks where it was before, any place to which the object came or where it lay.
- Task 2: picking up or putting down the object replaces the last such sentence.
- Task 3: nothing replaces such a sentence; the object's path has to be told from them.
"""

import dataclasses
import enum
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from atommem_jax.tasks import builders

_STEMS = {
    1: "qa1_single-supporting-fact",
    2: "qa2_two-supporting-facts",
    3: "qa3_three-supporting-facts",
}
_SOURCE = (
    "download tasks_1-20_v1-2.tar.gz from the bAbI project (https://fb.ai/babi), unpack it, and "
    "set --config.task.data_dir to its folder 'en-10k'"
)
_LINE = re.compile(
    r"(?P<number>\d+) (?:(?P<sentence>[^\t|?]+\.)|"
    r"(?P<question>[^\t|?]+\?)\s*[\t|](?P<answer>[^\t|]+)[\t|](?P<supporting>[\d ]+))"
)
_SENTENCE = re.compile(
    r"(?P<person>[A-Z]\w*) (?:"
    r"(?P<move>(?:moved|went|travelled|journeyed|went back) to the \w+)|"
    r"(?P<take>(?:took|got|grabbed|picked up) the (?P<taken>\w+)(?: there)?)|"
    r"(?P<drop>(?:dropped|left|discarded|put down) the (?P<dropped>\w+)(?: there)?)"
    r")\."
)
_QUESTIONS = {
    1: re.compile(r"Where is (\w+)\?"),
    2: re.compile(r"Where is the (\w+)\?"),
    3: re.compile(r"Where was the (\w+) before the \w+\?"),
}


class FactCategory(enum.IntEnum):
    """What a sentence is about; OTHER_ means that the question is not about it."""

    MOVE = 0  # task 1: of the asked person; tasks 2 and 3: of anyone
    TAKE = 1
    DROP = 2
    OTHER_MOVE = 3
    OTHER_TAKE = 4
    OTHER_DROP = 5


@dataclasses.dataclass(frozen=True)
class BabiConfig:
    """Which task to read, and from where. Raises ValueError or FileNotFoundError."""

    task: int = 1
    data_dir: str = ""  # the folder that holds qa1_single-supporting-fact_train.txt and so on
    facts_per_chunk: int = 1
    validation_every: int = 10  # every so many-th training story goes to validation instead

    def __post_init__(self):
        if self.task not in _STEMS:
            raise ValueError(f"config.task.task is {self.task!r}; allowed: 1, 2 or 3.")
        if self.facts_per_chunk < 1:
            found = self.facts_per_chunk
            raise ValueError(f"config.task.facts_per_chunk is {found!r}; allowed: 1 or more.")
        if self.validation_every < 2:
            found = self.validation_every
            raise ValueError(f"config.task.validation_every is {found!r}; allowed: 2 or more.")


class _Line(NamedTuple):
    number: int  # as published; starts at 1 in each story
    text: str
    answer: str | None  # None in a sentence
    supporting: tuple[int, ...]  # line numbers


class _Event(NamedTuple):
    """What a sentence says."""

    person: str
    kind: str  # 'move', 'take' or 'drop'
    thing: str | None  # the object taken or dropped


def data_file(config: BabiConfig, part: str) -> str:
    """Path of the published file, `part` being 'train' or 'test'; it exists.

    Raises FileNotFoundError, saying where the files come from, where it does not.
    """
    path = os.path.join(config.data_dir, f"{_STEMS[config.task]}_{part}.txt")
    if not config.data_dir or not os.path.isfile(path):
        found = config.data_dir or "not set"
        raise FileNotFoundError(
            f"config.task.data_dir is {found}: {os.path.basename(path)} is not there; {_SOURCE}."
        )
    return path


def read_stories(path: str) -> list[list[_Line]]:
    """Reads a published file: 'ID text', or 'ID question<TAB>answer<TAB>supporting IDs'.

    Copies of the files in circulation separate the fields with '|' instead, which is read too.
    Raises ValueError, naming file and line, where a line has neither form.
    """
    stories: list[list[_Line]] = []
    with open(path, encoding="utf-8") as file:
        for row, raw in enumerate(file, start=1):
            matched = _LINE.fullmatch(raw.strip())
            if matched is None or (not stories and matched["number"] != "1"):
                raise ValueError(
                    f"{path}, line {row}: {raw.strip()!r} is neither 'ID sentence.' nor "
                    f"'ID question?<TAB>answer<TAB>supporting IDs'; {_SOURCE}."
                )
            if matched["number"] == "1":
                stories.append([])
            supporting = tuple(map(int, (matched["supporting"] or "").split()))
            text = matched["sentence"] or matched["question"]
            stories[-1].append(_Line(int(matched["number"]), text, matched["answer"], supporting))
    return stories


def generate(config: BabiConfig, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples (`episodes.Example`) of 'train', 'validation' or 'test' in file order.

    Validation takes whole stories out of the training file, so that it shares none with training.
    """
    stories = read_stories(data_file(config, "test" if split == "test" else "train"))
    every = config.validation_every
    if split == "validation":
        stories = stories[every - 1 :: every]
    elif split == "train":
        stories = [story for i, story in enumerate(stories) if (i + 1) % every]
    elif split != "test":
        raise ValueError(f"split is {split!r}; allowed: train, validation, test.")
    index = 0
    for story in stories:
        for position, line in enumerate(story):
            if line.answer is not None:
                yield _make_example(config, index, story[:position], line)
                index += 1


def _make_example(
    config: BabiConfig, index: int, before: Sequence[_Line], asked: _Line
) -> dict[str, Any]:
    sentences = [line for line in before if line.answer is None]
    numbers = {line.number: fact for fact, line in enumerate(sentences)}
    matched = _QUESTIONS[config.task].fullmatch(asked.text)
    if matched is None:
        raise ValueError(
            f"{_STEMS[config.task]}: question {asked.text!r} has not the form of task "
            f"{config.task}; {_SOURCE}."
        )
    focus = matched[1]
    facts = _label([line.text for line in sentences], config.task, focus)
    size = config.facts_per_chunk
    question = {
        "text": asked.text,
        "aliases": [asked.answer],
        "needs": [numbers[number] for number in asked.supporting],
    }
    return {
        "id": index,
        "chunks": [facts[start : start + size] for start in range(0, len(facts), size)],
        "questions": [question],
        "focus": focus,
    }


@functools.lru_cache(maxsize=4096)  # the files hold a few hundred different sentences
def _understand(text: str) -> _Event:
    matched = _SENTENCE.fullmatch(text)
    if matched is None:
        raise ValueError(f"the sentence {text!r} is none that bAbI tasks 1 to 3 use; {_SOURCE}.")
    kind = next(kind for kind in ("move", "take", "drop") if matched[kind])
    return _Event(matched["person"], kind, matched["taken"] or matched["dropped"])


def _label(texts: Iterable[str], task: int, asked: str) -> list[dict[str, Any]]:
    """The sentences as facts; the module's docstring gives the rules."""
    facts: list[dict[str, Any]] = []
    last_move: dict[str, int] = {}
    kept: set[int] = set()  # moves that tell where the object is or has been
    last_change = -1  # the last sentence in which the object changed hands
    holder = None
    for number, text in enumerate(texts):
        event = _understand(text)
        supersedes = -1
        if event.kind == "move":
            support = task > 1 or event.person == asked
            previous = last_move.get(event.person, -1)
            if support and previous not in kept:
                supersedes = previous
            last_move[event.person] = number
            if task == 3 and event.person == holder:
                kept.add(number)
        else:
            support = task > 1 and event.thing == asked
            if support:
                supersedes = last_change if task == 2 else -1
                last_change = number
                holder = event.person if event.kind == "take" else None
                if task == 3 or event.kind == "drop":
                    kept.add(last_move.get(event.person, -1))
                if task == 2 and event.kind == "take":
                    kept.clear()  # it is no longer where it was put down
        category = FactCategory[("" if support else "OTHER_") + event.kind.upper()]
        facts.append(
            {
                "text": text,
                "subject": event.person,
                "support": support,
                "supersedes": supersedes,
                "category": int(category),
            }
        )
    return facts


class Babi(builders.ExampleBuilder):
    """bAbI tasks 1 to 3 (https://fb.ai/babi)."""

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = "bAbI tasks 1 to 3, one example per question."

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        return self.store(generate(self.builder_config.task, split))


def make_builder(config: BabiConfig, data_root: str) -> Babi:
    """The TFDS builder of `config`, with a directory of its own under `data_root`.

    The directory depends on what the files say, so that other files under the same path are not
    mistaken for those already prepared. Raises FileNotFoundError where a file is missing.
    """
    digest = hashlib.sha256(f"{config.facts_per_chunk}/{config.validation_every}".encode())
    for part in ("train", "test"):
        with open(data_file(config, part), "rb") as file:
            digest.update(file.read())
    return Babi(
        config=builders.TaskBuilderConfig(
            name=f"qa{config.task}_{digest.hexdigest()[:12]}", task=config
        ),
        data_dir=data_root,
        file_format="array_record",
    )
