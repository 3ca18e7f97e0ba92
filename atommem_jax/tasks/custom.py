"""A task of one's own: a function of the user gives the samples of each split.

    def samples(split):  # 'train', 'validation' or 'test'
        yield {
            "chunks": [["Ada keeps a cat.", "It rains."], ["Bo keeps a dog."]],
            "questions": [{"text": "Which animal does Bo keep?", "aliases": ["dog"]}],
        }

The scripted teacher of the supervised stage needs to know more: which sentences are worth storing
(`{"text": ..., "support": True}` in place of a text) and which of them, counted from 0 over all
chunks, each question needs (`"needs": [2]`).
"""

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NotRequired, TypedDict

import tensorflow_datasets as tfds

from atommem_jax.config import check
from atommem_jax.tasks import builders, user_functions
from atommem_jax.tasks.schema import Example, Fact, Question
from atommem_jax.types import EMPTY

SPLITS = ("train", "validation", "test")


class Sample(TypedDict):
    """What the function of the user yields: an `Example` of which much may be left out."""

    chunks: list[list[Any]]  # texts, or `Fact`s of which all but the text may be left out
    questions: list[Any]  # `Question`s; `needs` may be left out
    focus: NotRequired[str]  # a good standing query over all questions; by default all of them


class FactCategory(enum.IntEnum):
    """None: facts of a user's samples are not told apart in statistics."""


@dataclasses.dataclass(frozen=True)
class CustomConfig:
    """Where the samples come from. Raises ConfigError where there is no such function."""

    source: str = ""  # 'FILE.py:FUNCTION' or 'MODULE:FUNCTION'

    def __post_init__(self):
        self.find()

    def find(self) -> Callable[[str], Iterable[Sample]]:
        """The function that gives the samples of a split."""
        return user_functions.find(self.source, "config.task.source")


_FACT: Fact = {
    "text": "", "note": "", "subject": "", "support": False, "supersedes": EMPTY, "category": EMPTY,
}  # fmt: skip


def complete(sample: Mapping[str, Any], number: int, split: str) -> Example:
    """The example of a sample. Raises ConfigError, naming the sample, for one that is none."""
    where = f"sample {number} of {split}"
    check(
        isinstance(sample, Mapping),
        f"{where} is a {type(sample).__name__}: allowed is a dict with chunks and questions",
    )
    _check_fields(where, sample, ("chunks", "questions"), ("focus",))
    questions = [_complete_question(where, question) for question in sample["questions"]]
    return {
        "id": number,
        "chunks": [[_complete_fact(where, fact) for fact in chunk] for chunk in sample["chunks"]],
        "questions": questions,
        "focus": sample.get("focus") or " ".join(question["text"] for question in questions),
    }


def _complete_fact(where: str, fact: Any) -> Fact:
    if isinstance(fact, str):
        return {**_FACT, "text": fact}
    check(isinstance(fact, Mapping), f"{where}: a fact is {fact!r}; allowed is a text or a dict")
    _check_fields(f"{where}: a fact", fact, ("text",), ("note", "subject", "support", "supersedes"))
    return {**_FACT, **fact}


def _complete_question(where: str, question: Any) -> Question:
    check(isinstance(question, Mapping), f"{where}: a question is {question!r}; allowed is a dict")
    _check_fields(f"{where}: a question", question, ("text", "aliases"), ("needs", "focus"))
    aliases = question["aliases"]
    check(
        isinstance(aliases, (list, tuple)) and bool(aliases),
        f"{where}: aliases are {aliases!r}; allowed is a list of accepted answers, the best first",
    )
    return {"needs": [], **question}  # type: ignore[typeddict-item]


def _check_fields(
    where: str, found: Mapping[str, Any], needed: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    missing = [name for name in needed if name not in found]
    check(not missing, f"{where} has no {' and no '.join(missing)}; it has {', '.join(found)}")
    unknown = [name for name in found if name not in (*needed, *optional)]
    check(
        not unknown,
        f"{where} has an unknown field {', '.join(unknown)}; allowed are "
        f"{', '.join((*needed, *optional))}",
    )


class Custom(builders.ExampleBuilder):
    """The samples of a user's function as a data set."""

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = "Samples that a function of the user gives."

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        samples = self.builder_config.task.find()(split)
        return self.store(complete(sample, number, split) for number, sample in enumerate(samples))


def make_builder(config: CustomConfig, data_root: str) -> Custom:
    """The TFDS builder of `config`; a source that has changed is prepared again, beside the old."""
    function = config.find()
    content = repr(function.__qualname__).encode() + user_functions.read_source(function)
    return Custom.make(
        f"{function.__name__}_{hashlib.sha256(content).hexdigest()[:12]}", config, data_root
    )
