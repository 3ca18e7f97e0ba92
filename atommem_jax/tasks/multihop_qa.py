"""Samples of several questions over many documents, for multi-hop question answering.

What is published is read by `multihop_files`. A sample is a row of documents and one or more
questions about them (AtomMem, section 4):

- The documents that support the questions are always among them. Those that the questions were
  published with come next, then documents of other questions of the same split and of the corpus
  file, until there are as many as the split asks for. They are shuffled with a seed of the sample's
  own.
- A document that supports a question of one split stands in no sample of another; but test samples
  are of `test_file` and the corpus alone where there is a file of its own for training.
- A fact is a sentence. A document opens with "Document 3: Title"; it starts a new chunk where it
  does not fit into the rest of one, and opens again wherever it is continued.
- Sentences lean on pronouns, so what is stored is the note "Title: sentence" without its last full
  stop, and the title is the subject. The standing query over a sample is the text of its questions.
"""

import collections
import dataclasses
import enum
import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from atommem_jax.parallel import processes
from atommem_jax.tasks import builders
from atommem_jax.tasks.multihop_files import (
    SPLITS,
    Corpus,
    MultihopQaConfig,
    SourceQuestion,
    find_files,
    read,
)
from atommem_jax.tasks.passages import Document


class FactCategory(enum.IntEnum):
    """What a sentence is to the questions of its sample."""

    SUPPORT = 0
    SAME_DOCUMENT = 1  # another sentence of a document that supports one
    DISTRACTOR = 2


# ---------------------------------------------------------------------------------------------
# Samples


def generate(config: MultihopQaConfig, corpus: Corpus, split: str) -> Iterator[dict[str, Any]]:
    """The examples (`schema.Example`) of one of `config.sizes`.

    Which questions share a sample follows from `config.seed`; those of all test splits are the
    same.

    Raises ValueError, before the first example, where there are too few questions or documents.
    """
    if split not in config.sizes:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(config.sizes)}.")
    part = split.partition("_")[0]
    questions = list(corpus.splits[part])
    if len(questions) < config.questions[0]:
        files = " and ".join(f"config.task.{name} {path!r}" for name, path in config.files.items())
        raise ValueError(
            f"{files} leaves {len(questions)} questions to the split {split!r}; needed: "
            f"{config.questions[0]} or more. Take a larger file, or change "
            "config.task.test_every or validation_every."
        )
    pool = _Pool(config, corpus, split)
    rng = random.Random(f"{config.seed}/{part}")
    rng.shuffle(questions)
    return (
        _make_example(config, index, group, pool)
        for index, group in enumerate(_group(config, questions, rng, config.limit(split)))
    )


def _group(
    config: MultihopQaConfig, questions: Sequence[SourceQuestion], rng: random.Random, limit: int
) -> Iterator[Sequence[SourceQuestion]]:
    """The questions of each sample; of `limit` samples, 0 for all."""
    fewest, most = config.questions
    made = start = 0
    while start + fewest <= len(questions) and (made < limit or not limit):
        count = fewest
        if most > fewest and rng.random() < 0.5:
            count = rng.randint(fewest + 1, most)
        yield questions[start : start + count]
        made, start = made + 1, start + count


class _Pool:
    """The documents that may stand in the samples of a split.

    Raises ValueError where they are fewer than a sample has.
    """

    def __init__(self, config: MultihopQaConfig, corpus: Corpus, split: str):
        self._config = config
        self._split = split
        self._size = config.sizes[split]
        # A smaller sample is the beginning of the largest of the same questions.
        sizes = (size for name, size in config.sizes.items() if name.startswith("test"))
        self._largest = max(sizes) if split.startswith("test") else self._size
        part = split.partition("_")[0]
        others = [other for other in SPLITS if other != part]
        if part == "test" and len(config.files) == 2:
            others = []
        self._elsewhere = {
            document.identity
            for other in others
            for question in corpus.splits[other]
            for document in question.supporting()
        }
        own = self._allowed(doc for q in corpus.splits[part] for doc in q.documents)
        self._all = self._allowed(itertools.chain(own, corpus.pool))
        self._check_size(len(own))

    def _allowed(self, documents: Iterable[Document]) -> list[Document]:
        found: dict[str, Document] = {}
        for document in documents:
            if document.sentences and document.identity not in self._elsewhere:
                found.setdefault(document.identity, document)
        return list(found.values())

    def _check_size(self, own: int) -> None:
        short = self._size - len(self._all)
        if short <= 0:
            return
        field = "test_documents" if "_" in self._split else "documents"
        further = (
            f", and config.task.corpus_file adds {len(self._all) - own} others"
            if self._config.corpus_file
            else ""
        )
        raise ValueError(
            f"config.task.{field} is {self._size}, but the questions of the split "
            f"{self._split!r} come with {own} different documents{further}. {short} more would be "
            f"enough: name a file of at least {self._size - own} further passages as "
            "config.task.corpus_file, take a larger file of questions, lower "
            f"config.task.{field}, or change config.task.test_every or validation_every."
        )

    def draw(self, rng: random.Random, group: Sequence[SourceQuestion]) -> list[Document]:
        """The documents of a sample in random order. Raises ValueError where they are too few."""
        size = self._size
        chosen = list(dict.fromkeys(doc for question in group for doc in question.supporting()))
        if len(chosen) > size:
            names = ", ".join(question.id for question in group)
            raise ValueError(
                f"config.task.documents is {size}, but {len(chosen)} documents support the "
                f"questions {names}; raise it, or lower config.task.questions."
            )
        own = self._allowed(doc for question in group for doc in question.documents)
        rng.shuffle(own)
        seen = {document.identity for document in chosen}
        own = [document for document in own if document.identity not in seen]
        chosen += own[: size - len(chosen)]
        if len(chosen) < self._largest:
            # As many as are in the sample already may be drawn a second time.
            drawn = rng.sample(self._all, min(self._largest, len(self._all)))
            seen = {document.identity for document in chosen}
            drawn = [document for document in drawn if document.identity not in seen]
            chosen += drawn[: size - len(chosen)]
        rng.shuffle(chosen)
        return chosen


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
    example = {
        "id": index,
        "chunks": chunks,
        "questions": questions,
        "focus": " ".join(question.text for question in group),
    }
    if config.chunk_tokens:
        overlap = config.chunk_overlap
        example["packing"] = {"chunk_tokens": config.chunk_tokens, "overlap": overlap}
    return example


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
        limits = config.documents_per_chunk, config.chunk_sentences, config.chunk_words
        if config.chunk_tokens:
            limits = 1, 0, 0  # what is read is packed once there is a tokenizer
        self._documents, self._sentences, self._words = (limit or math.inf for limit in limits)

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
        # Whatever is short of something is refused here, before the first split is written.
        made = {split: generate(task, corpus, split) for split in task.sizes}
        for reason, count in corpus.left_out.items():
            processes.say(f"{task.dataset}: {count} questions left out: {reason}")
        return {split: self._generate_examples(split, examples) for split, examples in made.items()}

    def _generate_examples(
        self, split: str, examples: Iterator[dict[str, Any]]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        return self.store(_count(f"{self.builder_config.task.dataset} {split}", examples))


def _count(name: str, examples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same examples; when they are over, it prints what they came to."""
    total: collections.Counter[str] = collections.Counter()
    for example in examples:
        yield example
        facts = [fact for chunk in example["chunks"] for fact in chunk]
        total["samples"] += 1
        total["questions"] += len(example["questions"])
        total["chunks"] += len(example["chunks"])
        total["sentences"] += len(facts)
        total["words"] += sum(len(fact["text"].split()) for fact in facts)
    processes.say(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in total.items()))


def make_builder(config: MultihopQaConfig, data_root: str) -> MultihopQa:
    """The TFDS builder of `config`, with a directory of its own under `data_root`.

    The directory depends on what the files say, not on where they lie. Raises FileNotFoundError
    where one is missing.
    """
    contents = {}
    for name, path in find_files(config).items():
        with open(path, "rb") as file:
            contents[name] = hashlib.file_digest(file, "sha256").hexdigest()
    fields = dataclasses.replace(config, **contents)
    digest = hashlib.sha256(repr(fields).encode()).hexdigest()[:12]
    return MultihopQa.make(f"{config.dataset}_{digest}", config, data_root)
