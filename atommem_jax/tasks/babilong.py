"""BABILong: bAbI stories hidden in books, at any length (Kuratov et al., arXiv 2406.10149).

The facts of a bAbI story are scattered, in their order and at random places, among consecutive
sentences of books (`background`), so that a document has a given number of tokens, as the agent's
own tokenizer counts them. Where the books end they begin again: ten million tokens are more than
four books have. One example is made per question, as in `babi`, from which the facts and what is
worth storing of them come. In task 1 too it is a note, "Mary kitchen", and with `everyone` there
is one of each person, whoever is asked for: where four facts are read at once, that teaches four
times which person went to which place.

Training hides a story in up to `train_tokens`, most often in few. It puts the persons of the
stories in the place of some names of its books (`decoys`): books have a John of their own, of whom
a reader that looks for names alone would take notes. And into some of their sentences it puts a
piece of what the stories say of persons, "went to the kitchen" (`decoy_phrases`): others go there
too. Every test split hides the same stories, in as many tokens as its name says: `test_0k` holds no
other sentence, `test_1m` a million tokens. The last `test_books` books, by name, are read in tests
only.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from atommem_jax import text_files
from atommem_jax.config import paths
from atommem_jax.language import sentences
from atommem_jax.tasks import babi, babi_simulator, builders
from atommem_jax.tasks.schema import Background, Example, Fact
from atommem_jax.types import EMPTY

_SOURCE = "a folder of plain text (*.txt), one file a book; set --config.task.books to it"
_SHORTEST = 50  # tokens, about: those of a story alone
_LENGTH = re.compile(r"(\d+)([km])")
_FILES = {"train": "train.txt", "test": "test.txt"}

LENGTHS = ("0k", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "256k", "512k", "1m", "10m")
"""Splits of the benchmark, and one of ten million."""

PERSONS = babi_simulator.PERSONS
"""Of the stories."""

PUBLISHED: dict[int, tuple[tuple[str, tuple[int, int], float], ...]] = {
    1: (
        ("ARMT, 137M, fine-tuned", (50_000_000, 50_000_000), 0.799),
        ("RMT, 137M, fine-tuned", (128_000, 128_000), 0.991),
        ("retrieval, large models: about", (1_000, 10_000_000), 0.6),
    ),
    2: (("RMT, 137M, fine-tuned", (32_000, 32_000), 0.874),),
    3: (
        ("RMT with retrieval, 137M, fine-tuned", (16_000, 16_000), 0.72),
        ("RMT, 137M, fine-tuned", (10_000_000, 10_000_000), 0.21),
    ),
}
"""By task: a model, least and most tokens, accuracy: of other models and budgets, to compare with.

ARMT: Rodkin et al., arXiv 2407.04841; retrieval: Kuratov et al., arXiv 2406.10149; RMT: the results
that the authors of the benchmark publish with it (huggingface.co/spaces/RMT-team/babilong).
"""

FactCategory = babi.FactCategory
"""Of the facts; sentences of books have none."""


@dataclasses.dataclass(frozen=True)
class BabilongConfig:
    """Which stories, which books, how long. Raises ValueError or FileNotFoundError."""

    task: int = 1  # of bAbI: 1, 2 or 3
    data_dir: str = ""  # as of `babi.BabiConfig`
    books: str = ""  # a folder of plain text
    test_books: int = 4  # of which so many, the last by name, are for tests only
    chunk_tokens: int = 128
    train_tokens: tuple[int, int] = (0, 2000)  # least and most of a training document
    train_examples: int = 10_000  # at most one a question
    test_examples: int = 200  # of each test split; at most one a question
    lengths: tuple[str, ...] = LENGTHS
    decoys: float = 0.2  # share of the names in training books that are persons of the stories
    decoy_phrases: float = 0.0  # share of their sentences that a piece of a story's is put into
    everyone: bool = True  # task 1: everyone's place is worth storing, not the asked one's alone
    validation_every: int = 10
    simulated_stories: int = 0  # as of `babi.BabiConfig`

    def __post_init__(self):
        object.__setattr__(self, "books", paths.expand(self.books))
        self.stories()
        for field, least in (("test_books", 1), ("chunk_tokens", 16)):
            found = getattr(self, field)
            if found < least:
                raise ValueError(f"config.task.{field} is {found!r}; allowed: {least} or more.")
        for field in ("train_examples", "test_examples"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"config.task.{field} is {getattr(self, field)!r}; allowed: 1 or more."
                )
        if len(self.train_tokens) != 2 or not 0 <= self.train_tokens[0] <= self.train_tokens[1]:
            raise ValueError(
                f"config.task.train_tokens is {self.train_tokens!r}; allowed: (least, most), with "
                "0 <= least <= most."
            )
        for field in ("decoys", "decoy_phrases"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(
                    f"config.task.{field} is {getattr(self, field)!r}; allowed: 0.0 to 1.0."
                )
        for name in self.lengths:
            count_tokens(name)
        if not self.lengths:
            raise ValueError("config.task.lengths is (); allowed: one or more, such as '1k', '1m'.")

    def stories(self) -> babi.BabiConfig:
        """Of the bAbI files."""
        return babi.BabiConfig(
            task=self.task,
            data_dir=self.data_dir,
            validation_every=self.validation_every,
            simulated_stories=self.simulated_stories,
        )


def count_tokens(length: str) -> int:
    """Tokens of a length such as '4k' (4,000) or '1m' (1,000,000). Raises ValueError for others."""
    matched = _LENGTH.fullmatch(length)
    if matched is None:
        raise ValueError(
            f"config.task.lengths has {length!r}; allowed are thousands and millions of tokens, "
            "such as '0k', '64k' or '10m'."
        )
    return int(matched[1]) * {"k": 1_000, "m": 1_000_000}[matched[2]]


def occurs_in_answer(answer: str, aliases: Sequence[str]) -> float:
    """The benchmark's own score: 1.0 where the first sentence of the answer has the target in it.

    Case does not count (their `compare_answers`, section 3).
    """
    first = re.split(r"[.\n]", answer.strip().lower(), maxsplit=1)[0]
    return float(any(alias.lower() in first for alias in aliases))


def list_books(config: BabilongConfig) -> dict[str, list[pathlib.Path]]:
    """The books of 'train' and of 'test', by name. Raises FileNotFoundError where they are few."""
    folder = pathlib.Path(config.books)
    found = sorted(folder.glob("*.txt")) if config.books else []
    if len(found) <= config.test_books:
        where = config.books or "not set"
        raise FileNotFoundError(
            f"config.task.books is {where}: {len(found)} books are there, and more than "
            f"config.task.test_books={config.test_books} are needed; it must be {_SOURCE}."
        )
    cut = len(found) - config.test_books
    return {"train": found[:cut], "test": found[cut:]}


def generate(config: BabilongConfig, split: str, books: str) -> Iterator[dict[str, Any]]:
    """Yields the examples of 'train', 'validation', or 'test_' and one of the lengths.

    `books` is the folder of their sentences, under that of all data sets.
    """
    part, _, length = split.partition("_")
    stories: list[Any] = list(babi.generate(config.stories(), part))
    rng = np.random.default_rng([int.from_bytes(part.encode(), "big"), len(stories)])
    most = config.train_examples if part == "train" else config.test_examples
    # The same questions at every length, from all over the file.
    chosen = np.sort(rng.permutation(len(stories))[:most])
    sizes = _draw_sizes(rng, len(chosen), *config.train_tokens)
    seeds = rng.integers(2**31, size=len(chosen))
    for index, number in enumerate(chosen):
        example = stories[number]
        recipe: Background = {
            "file": f"{books}/{_FILES['test' if part == 'test' else 'train']}",
            "tokens": count_tokens(length) if length else int(sizes[index]),
            "chunk_tokens": config.chunk_tokens,
            "seed": int(seeds[index]),
        }
        if part == "train":
            recipe |= {
                "decoys": config.decoys,
                "decoy_words": list(PERSONS),
                "decoy_phrases": config.decoy_phrases,
            }
        yield {
            **example,
            "id": index,
            "chunks": [_note_facts(example, config)],
            "background": recipe,
        }


def _draw_sizes(
    rng: np.random.Generator, count: int, least: int, most: int
) -> Int[np.ndarray, " count"]:
    """Lengths of training documents: log-uniform, so that many are dense and some are long."""
    low, high = np.log(least + _SHORTEST), np.log(most + _SHORTEST)
    return np.exp(rng.uniform(low, high, size=count)).astype(int) - _SHORTEST


def _note_facts(example: Example, config: BabilongConfig) -> list[Fact]:
    """The facts of a story; in task 1 with their notes, which the other tasks have already."""
    facts = [fact for chunk in example["chunks"] for fact in chunk]
    if config.task > 1:
        return facts
    noted: list[Fact] = []
    latest: dict[str, int] = {}  # person -> the fact that tells the place
    for number, fact in enumerate(facts):
        fact = fact.copy()
        person, place = fact["subject"], fact["text"].rstrip(".").split()[-1]
        if config.everyone or fact["support"]:
            fact |= {"support": True, "note": f"{person} {place}"}
            fact["supersedes"] = latest.get(person, EMPTY)
            latest[person] = number
        noted.append(fact)
    return noted


@dataclasses.dataclass(eq=False)
class BabilongBuilderConfig(builders.TaskBuilderConfig):
    """What TFDS names a prepared data set by, and the folder of its books."""

    books: str = ""


class Babilong(builders.ExampleBuilder):
    """bAbI stories in books."""

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = "Stories of bAbI tasks 1 to 3 among sentences of books (BABILong)."

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        lengths = self.builder_config.task.lengths
        names = ["train", "validation", *(f"test_{length}" for length in lengths)]
        return {name: self._generate_examples(name) for name in names}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        c = self.builder_config
        return self.store(generate(c.task, split, c.books))


def make_builder(config: BabilongConfig, data_root: str) -> Babilong:
    """The TFDS builder of `config`, with a directory of its own under `data_root`.

    The sentences of the books are written beside it, one a line, from where they are read when a
    document is laid out. Raises FileNotFoundError where a file is missing.
    """
    folder = write_books(config, data_root)
    fields = repr(dataclasses.replace(config, data_dir="", books=""))
    # A field that came later leaves what was prepared before it where it is.
    digest = hashlib.sha256(fields.replace(", simulated_stories=0", "").encode())
    digest.update(folder.encode())
    for part in ("train", "test"):
        digest.update(pathlib.Path(babi.data_file(config.stories(), part)).read_bytes())
    return Babilong(
        config=BabilongBuilderConfig(
            name=f"qa{config.task}_{digest.hexdigest()[:12]}", task=config, books=folder
        ),
        data_dir=data_root,
        file_format="array_record",
    )


def write_books(config: BabilongConfig, data_root: str) -> str:
    """Writes the sentences of the books under `data_root`, and returns the name of the folder.

    It depends on what the books say, and on which of them are for tests.
    """
    books = list_books(config)
    digest = hashlib.sha256()
    for part, found in books.items():
        digest.update(part.encode())
        for book in found:
            digest.update(book.read_bytes())
    folder = f"books_{digest.hexdigest()[:12]}"
    os.makedirs(os.path.join(data_root, folder), exist_ok=True)
    for part, name in _FILES.items():
        path = os.path.join(data_root, folder, name)
        if not os.path.exists(path):
            paths.write_text(path, "\n".join(split_books(books[part])) + "\n")
    return folder


def split_books(books: Sequence[pathlib.Path]) -> Iterator[str]:
    """The sentences of books, one after the other, each on one line."""
    for path in books:
        for sentence in sentences.split(text_files.read_text(path)):
            line = " ".join(sentence.split())
            if line:
                yield line
