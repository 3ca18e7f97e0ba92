"""Samples of several questions over many documents, for multi-hop question answering.

What is published is read by `multihop_files`. A sample is a row of documents and one or more
questions about them (AtomMem, section 4):

- The documents that support the questions are always among them. Those that the questions were
  published with come next, then documents of other questions of the same split, until there are
  `documents`. They are shuffled with a seed of the sample's own.
- A fact is a sentence. A document opens with "Document 3: Title"; it starts a new chunk where it
  does not fit into the rest of one, and opens again wherever it is continued.
- Sentences lean on pronouns, so what is stored is the note "Title: sentence" without its last full
  stop, and the title is the subject. The standing query over a sample is the text of its questions.
"""

import dataclasses
import enum
import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from atommem_jax.tasks import builders
from atommem_jax.tasks.multihop_files import (
    SPLITS,
    Corpus,
    Document,
    MultihopQaConfig,
    SourceQuestion,
    data_file,
    read,
)


class FactCategory(enum.IntEnum):
    """What a sentence is to the questions of its sample."""

    SUPPORT = 0
    SAME_DOCUMENT = 1  # another sentence of a document that supports one
    DISTRACTOR = 2


# ---------------------------------------------------------------------------------------------
# Samples


def generate(config: MultihopQaConfig, corpus: Corpus, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples (`schema.Example`) of 'train', 'validation' or 'test'.

    Which questions share a sample follows from `config.seed`.

    Raises ValueError where there are too few questions or documents for one sample.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: train, validation, test.")
    questions = list(corpus.splits[split])
    fewest, most = config.questions
    if len(questions) < fewest:
        raise ValueError(
            f"config.task.data_file {config.data_file!r} leaves {len(questions)} questions to the "
            f"split {split!r}; needed: {fewest} or more. Take a larger file, or change "
            "config.task.test_every or validation_every."
        )
    pool = _Pool(config, corpus, split)
    rng = random.Random(f"{config.seed}/{split}")
    rng.shuffle(questions)
    index = start = 0
    while start + fewest <= len(questions):
        if config.max_examples and index >= config.max_examples:
            break
        count = fewest
        if most > fewest and rng.random() < 0.5:
            count = rng.randint(fewest + 1, most)
        yield _make_example(config, index, questions[start : start + count], pool)
        index, start = index + 1, start + count


class _Pool:
    """The documents that may stand in the samples of a split."""

    def __init__(self, config: MultihopQaConfig, corpus: Corpus, split: str):
        self._config = config
        self._split = split
        self._elsewhere = {
            document
            for other in SPLITS
            if other != split
            for question in corpus.splits[other]
            for document in question.supporting()
        }
        questions = corpus.splits[split]
        self._all = self._allowed(doc for question in questions for doc in question.documents)

    def _allowed(self, documents: Iterable[Document]) -> list[Document]:
        return [
            document
            for document in dict.fromkeys(documents)
            if document.sentences and document not in self._elsewhere
        ]

    def draw(self, rng: random.Random, group: Sequence[SourceQuestion]) -> list[Document]:
        """The documents of a sample in random order. Raises ValueError where they are too few."""
        size = self._config.documents
        chosen = dict.fromkeys(doc for question in group for doc in question.supporting())
        if len(chosen) > size:
            names = ", ".join(question.id for question in group)
            raise ValueError(
                f"config.task.documents is {size}, but {len(chosen)} documents support the "
                f"questions {names}; raise it, or lower config.task.questions."
            )
        own = self._allowed(doc for question in group for doc in question.documents)
        rng.shuffle(own)
        chosen |= dict.fromkeys(own[:size])
        if len(chosen) < size:
            # As many as are in the sample already may be drawn a second time.
            chosen |= dict.fromkeys(rng.sample(self._all, min(size, len(self._all))))
        chosen = dict.fromkeys(itertools.islice(chosen, size))
        if len(chosen) < size:
            raise ValueError(
                f"config.task.documents is {size}, but the questions of the split "
                f"{self._split!r} come with {len(self._all)} different documents; lower it, take "
                "a larger file, or change config.task.test_every or validation_every."
            )
        documents = list(chosen)
        rng.shuffle(documents)
        return documents


def _make_example(
    config: MultihopQaConfig, index: int, group: Sequence[SourceQuestion], pool: _Pool
) -> dict[str, Any]:
    # A seed of its own: what stands where does not depend on the samples before it.
    rng = random.Random(f"{config.seed}/{'/'.join(question.id for question in group)}")
    documents = pool.draw(rng, group)
    wanted = {
        (question.documents[number], sentence)
        for question in group
        for number, sentence in question.support
    }
    chunks, numbers = _lay_out(config, documents, wanted)
    questions = [
        {
            "text": question.text,
            "aliases": list(question.aliases),
            "needs": [numbers[question.documents[d], s] for d, s in question.support],
        }
        for question in group
    ]
    return {
        "id": index,
        "chunks": chunks,
        "questions": questions,
        "focus": " ".join(question.text for question in group),
    }


def _lay_out(
    config: MultihopQaConfig, documents: Sequence[Document], wanted: set[tuple[Document, int]]
) -> tuple[list[list[dict]], dict[tuple[Document, int], int]]:
    """Chunks of facts, and the number of the fact that each sentence became."""
    chunks: list[list[dict]] = []
    numbers: dict[tuple[Document, int], int] = {}
    supporting = {document for document, _ in wanted}
    room = _Room(config)
    for place, document in enumerate(documents, start=1):
        sizes = [len(sentence.split()) for sentence in document.sentences]
        opened = False  # in the last chunk
        for number, sentence in enumerate(document.sentences):
            # At first all of the document should fit; what goes on in a new chunk goes on there.
            ahead = sizes[number : number + 1] if opened else sizes[number:]
            if not chunks or not room.fits(ahead, opened):
                chunks.append([])
                room, opened = _Room(config), False
            room.take(sizes[number], opened)
            support = (document, number) in wanted
            category = FactCategory.DISTRACTOR
            if document in supporting:
                category = FactCategory.SUPPORT if support else FactCategory.SAME_DOCUMENT
            fact = {
                "text": sentence if opened else f"Document {place}: {document.title}\n{sentence}",
                "note": _note(document.title, sentence),
                "subject": document.title,
                "support": support,
                "supersedes": -1,
                "category": int(category),
            }
            opened = True
            numbers[document, number] = len(numbers)
            chunks[-1].append(fact)
    return chunks, numbers


class _Room:
    """What is left of a chunk."""

    def __init__(self, config: MultihopQaConfig):
        self._documents = config.documents_per_chunk or math.inf
        self._sentences = config.chunk_sentences or math.inf
        self._words = config.chunk_words or math.inf

    def fits(self, sizes: Sequence[int], opened: bool) -> bool:
        """Is there room for sentences of so many words, of a document that is open already?"""
        return (
            (opened or self._documents >= 1)
            and len(sizes) <= self._sentences
            and sum(sizes) <= self._words
        )

    def take(self, words: int, opened: bool) -> None:
        """Uses room for one sentence."""
        self._documents -= not opened
        self._sentences -= 1
        self._words -= words


def _note(title: str, sentence: str) -> str:
    return (f"{title}: {sentence}" if title else sentence).removesuffix(".")


# ---------------------------------------------------------------------------------------------
# Building


class MultihopQa(builders.ExampleBuilder):
    """HotpotQA, 2WikiMultihopQA or MuSiQue."""

    # 1.1.0: MuSiQue's paragraphs are cut into sentences by `language.sentences`.
    VERSION = tfds.core.Version("1.1.0")
    DESCRIPTION = "Questions over several documents of Wikipedia among others."

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        task = self.builder_config.task
        corpus = read(task)
        return {
            split: self._generate_examples(task, corpus, split)
            for split in ("train", "validation", "test")
        }

    def _generate_examples(
        self, task: MultihopQaConfig, corpus: Corpus, split: str
    ) -> Iterator[tuple[int, dict[str, str]]]:
        return self.store(generate(task, corpus, split))


def make_builder(config: MultihopQaConfig, data_root: str) -> MultihopQa:
    """The TFDS builder of `config`, with a directory of its own under `data_root`.

    The directory depends on what the file says, not on where it lies. Raises FileNotFoundError
    where it is missing.
    """
    with open(data_file(config), "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    fields = dataclasses.replace(config, data_file=content)
    digest = hashlib.sha256(repr(fields).encode()).hexdigest()[:12]
    return MultihopQa(
        config=builders.TaskBuilderConfig(name=f"{config.dataset}_{digest}", task=config),
        data_dir=data_root,
        file_format="array_record",
    )
