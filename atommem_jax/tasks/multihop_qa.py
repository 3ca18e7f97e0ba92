"""HotpotQA, 2WikiMultihopQA and MuSiQue from the files that their authors publish.

Sources: Yang et al., arXiv 1809.09600; Ho et al., arXiv 2011.01060; Trivedi et al., arXiv
2108.00573. A sample is a row of documents and one or more questions about them (AtomMem,
section 4):

- The documents that support the questions are always among them. Those that the questions were
  published with come next, then documents of other questions of the same split, until there are
  `documents`. They are shuffled with a seed of the sample's own.
- A fact is a sentence. A document opens with "Document 3: Title"; it starts a new chunk where it
  does not fit into the rest of one, and opens again wherever it is continued.
- Sentences lean on pronouns, so what is stored is the note "Title: sentence" without its last full
  stop, and the title is the subject. The standing query over a sample is the text of its questions.

What supports a question, and in which order it is needed, is published: by HotpotQA and
2WikiMultihopQA as sentences; by MuSiQue as a paragraph for each step of the question's
decomposition. Of that paragraph the sentence that holds the step's answer is taken, of several the
one with most words of the step's question, of none all (`split_sentences` is a rule of thumb).

Left out, and counted (`Corpus.left_out`), are questions without an answer, those of which a
supporting fact names no sentence (HotpotQA has indices past the end of a paragraph), those longer
than the config allows, and those that would tie two splits: a question's split is a hash of its
id, and where it shares a supporting document with a question of test, or of validation, training
goes without it. A document that supports a question of one split stands in no sample of another.
Other documents may.
"""

import collections
import dataclasses
import enum
import hashlib
import itertools
import json
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from absl import logging

from atommem_jax.tasks import builders

_SOURCES = {
    "hotpotqa": "hotpot_train_v1.1.json or hotpot_dev_distractor_v1.json from "
    "https://hotpotqa.github.io",
    "2wikimultihopqa": "train.json or dev.json of data_ids_april7.zip from "
    "https://github.com/Alab-NII/2wikimultihop",
    "musique": "musique_ans_v1.0_train.jsonl or musique_ans_v1.0_dev.jsonl of musique_v1.0.zip "
    "from https://github.com/StonyBrookNLP/musique",
}
# The most documents that support one question.
_HOPS = {"hotpotqa": 2, "2wikimultihopqa": 4, "musique": 4}
_SPLITS = ("test", "validation", "train")  # the first has the first say on a document

# Where a sentence ends: at a stop and white space before what can open one, or, as is often the
# case in MuSiQue, at a full stop that lacks the white space. \u2018 to \u201d are curved quotes.
_END = re.compile(
    r"[.!?][\"'\u2019\u201d)\]]*\s+(?=[\"'\u2018\u201c(\[]*[A-Z0-9])|"
    r"(?<=[a-z]{2})\.(?=[A-Z][a-z])"
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'\u2018\u201c.])"
    r"(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|Rev|Hon|Gen|Col|Capt|Lt|Sgt|Maj|Gov|Sen|Rep|Pres|St|Mt|Ft|Nos?|"
    r"Vol|vs|c|ca|cf|b|d|r|approx|e\.g|i\.e|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.$"
)


class FactCategory(enum.IntEnum):
    """What a sentence is to the questions of its sample."""

    SUPPORT = 0
    SAME_DOCUMENT = 1  # another sentence of a document that supports one
    DISTRACTOR = 2


@dataclasses.dataclass(frozen=True)
class MultihopQaConfig:
    """Which file to read, and how samples are made of it. Raises ValueError.

    `questions` is a range (fewest, most): half of the samples have the fewest, the others uniformly
    more; (1, 10) is the paper's law. Every question of a split is asked once; up to fewest - 1 are
    left over. Limits of 0 are none. A chunk ends before the first limit that it would exceed.
    """

    dataset: str = "hotpotqa"  # or '2wikimultihopqa', 'musique'
    data_file: str = ""  # the published file, with answers
    documents: int = 10  # a sample
    questions: tuple[int, int] = (1, 1)
    documents_per_chunk: int = 1
    chunk_sentences: int = 0
    chunk_words: int = 0  # titles aside
    max_sentence_words: int = 0  # a longer one is split into facts of at most so many words
    max_question_words: int = 0  # questions with more are left out
    max_answer_words: int = 0  # questions with more in their answer are left out
    test_every: int = 10  # one question in so many goes to test
    validation_every: int = 10  # and one in so many of the others to validation
    max_examples: int = 0  # in a split
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "questions", tuple(self.questions))
        if self.dataset not in _SOURCES:
            _refuse("dataset", self.dataset, ", ".join(map(repr, _SOURCES)))
        if not (len(self.questions) == 2 and 1 <= self.questions[0] <= self.questions[1]):
            _refuse("questions", self.questions, "(fewest, most) with 1 <= fewest <= most")
        least = _HOPS[self.dataset] * self.questions[1]
        if self.documents < least:
            allowed = (
                f"at least {least}: up to {_HOPS[self.dataset]} documents support each of up to "
                f"{self.questions[1]} questions; raise it, or lower config.task.questions"
            )
            _refuse("documents", self.documents, allowed)
        limits = ("documents_per_chunk", "chunk_sentences", "chunk_words")
        for name in (
            *limits,
            "max_sentence_words",
            "max_question_words",
            "max_answer_words",
            "max_examples",
        ):
            if getattr(self, name) < 0:
                _refuse(name, getattr(self, name), "1 or more, or 0 for no limit")
        if not any(getattr(self, name) for name in limits):
            _refuse(limits[0], 0, f"1 or more, unless {limits[1]} or {limits[2]} limits a chunk")
        for name in ("test_every", "validation_every"):
            if getattr(self, name) < 2:
                _refuse(name, getattr(self, name), "2 or more")

    @property
    def sentence_words(self) -> int:
        """The most words of a fact; 0 for no limit."""
        limits = [limit for limit in (self.max_sentence_words, self.chunk_words) if limit]
        return min(limits, default=0)


def _refuse(field: str, found: object, allowed: str) -> None:
    raise ValueError(f"config.task.{field} is {found!r}; allowed: {allowed}.")


class Document(NamedTuple):
    """A paragraph; two of the same title and text are the same."""

    title: str
    sentences: tuple[str, ...]


class SourceQuestion(NamedTuple):
    """A published question with the paragraphs that it came with."""

    id: str
    text: str
    aliases: tuple[str, ...]
    documents: tuple[Document, ...]
    support: tuple[tuple[int, int], ...]  # (document, sentence), in the order of the hops

    def supporting(self) -> list[Document]:
        """The documents that hold its support, each once."""
        return list(dict.fromkeys(self.documents[number] for number, _ in self.support))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The questions of each split in the order of the file, and why others were left out."""

    splits: Mapping[str, Sequence[SourceQuestion]]
    left_out: Mapping[str, int]  # reason -> number of questions


# ---------------------------------------------------------------------------------------------
# Reading


class _LeftOut(Exception):
    """Why a question is not used."""


def data_file(config: MultihopQaConfig) -> str:
    """Path of the published file; it exists.

    Raises FileNotFoundError, saying where the file comes from, where it does not.
    """
    if not os.path.isfile(config.data_file):
        found = f"{config.data_file!r}, which is no file" if config.data_file else "not set"
        raise FileNotFoundError(
            f"config.task.data_file is {found}; download {_SOURCES[config.dataset]}, and set "
            "--config.task.data_file to its path."
        )
    return config.data_file


def read(config: MultihopQaConfig) -> Corpus:
    """Reads the published file and splits its questions.

    Raises FileNotFoundError where there is none, and ValueError, naming file, record and field,
    where it is of another kind.
    """
    path = data_file(config)
    records = _read_lines(path) if config.dataset == "musique" else _read_list(path)
    make = _read_musique if config.dataset == "musique" else _read_listed
    left_out: collections.Counter[str] = collections.Counter()
    questions = []
    for number, record in enumerate(records, start=1):
        try:
            question = make(config, _Record(record, f"{path}, record {number}", config.dataset))
            _check_length(config, question)
            questions.append(question)
        except _LeftOut as error:
            left_out[str(error)] += 1
    splits = _split(config, questions, left_out)
    for reason, count in left_out.items():
        logging.info("%s: %d questions left out: %s", path, count, reason)
    return Corpus(splits, left_out)


def _read_list(path: str) -> Iterable[Any]:
    with open(path, encoding="utf-8") as file:
        try:
            records = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON ({error}); allowed: a JSON list.") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a JSON {type(records).__name__}; allowed: a list.")
    return records


def _read_lines(path: str) -> Iterator[Any]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, record {number} is no JSON ({error}); allowed: JSON lines."
                ) from error


@dataclasses.dataclass(frozen=True)
class _Record:
    """A published record, whose fields are checked as they are read."""

    fields: Any
    place: str  # file and number
    dataset: str

    def get(self, name: str, kind: type) -> Any:
        """Raises ValueError where the field is absent or of another type."""
        if not isinstance(self.fields, dict):
            found = f"is a JSON {type(self.fields).__name__}, no object"
        elif name not in self.fields:
            found = f"has no field {name!r}"
        elif not isinstance(self.fields[name], kind):
            found = f"has a field {name!r} that is a {type(self.fields[name]).__name__}"
        else:
            return self.fields[name]
        raise self.error(f"{found}; allowed: a {kind.__name__}")

    def error(self, found: str) -> ValueError:
        """An error that says where it is and which files are right."""
        return ValueError(
            f"{self.place} {found}. config.task.dataset is {self.dataset!r}: take "
            f"{_SOURCES[self.dataset]} (published test files have no answers)."
        )


def _read_listed(config: MultihopQaConfig, record: _Record) -> SourceQuestion:
    """HotpotQA and 2WikiMultihopQA."""
    paragraphs = _Paragraphs(config.sentence_words)
    numbers: dict[str, int] = {}  # by title; of two with one title the first is meant
    for item in record.get("context", list):
        if not _has_form(item, str, list) or not all(isinstance(s, str) for s in item[1]):
            raise record.error("has a 'context' that is not [[title, [sentence, ...]], ...]")
        numbers.setdefault(item[0], paragraphs.add(*item))
    support = []
    for item in record.get("supporting_facts", list):
        if not _has_form(item, str, int):
            raise record.error("has 'supporting_facts' that are not [[title, number], ...]")
        title, sentence = item
        support.append(paragraphs.places(numbers.get(title, -1), [sentence]))
    return paragraphs.ask(record, record.get("_id", str), [record.get("answer", str)], support)


def _has_form(item: Any, *kinds: type) -> bool:
    return (
        isinstance(item, list)
        and len(item) == len(kinds)
        and all(isinstance(part, kind) for part, kind in zip(item, kinds, strict=True))
    )


def _read_musique(config: MultihopQaConfig, record: _Record) -> SourceQuestion:
    paragraphs = _Paragraphs(config.sentence_words)
    texts: dict[int, tuple[int, list[str]]] = {}  # by published number
    for item in record.get("paragraphs", list):
        part = dataclasses.replace(record, fields=item)
        title, text = part.get("title", str), part.get("paragraph_text", str)
        sentences = split_sentences(text)
        texts[part.get("idx", int)] = paragraphs.add(title, sentences), sentences
    if not record.fields.get("answerable", True):
        raise _LeftOut("it is marked as not answerable")
    support: list[list[tuple[int, int]]] = []
    answers: list[str] = []
    for item in record.get("question_decomposition", list):
        step = dataclasses.replace(record, fields=item)
        asked, answer = step.get("question", str), step.get("answer", str)
        for hop, earlier in enumerate(answers, start=1):
            asked = asked.replace(f"#{hop}", earlier)
        answers.append(answer)
        # Null in MuSiQue's unanswerable questions.
        number = (
            -1
            if item.get("paragraph_support_idx") is None
            else step.get("paragraph_support_idx", int)
        )
        place, sentences = texts.get(number, (-1, []))
        support.append(paragraphs.places(place, _find_answer(sentences, answer, asked)))
    aliases = [record.get("answer", str), *record.get("answer_aliases", list)]
    return paragraphs.ask(record, record.get("id", str), aliases, support)


def _find_answer(sentences: Sequence[str], answer: str, asked: str) -> list[int]:
    """The sentence that answers a step, or all of them where none holds the answer."""
    pattern = re.compile(rf"(?<!\w){re.escape(_clean(answer))}(?!\w)", re.IGNORECASE)
    holds = [number for number, text in enumerate(sentences) if pattern.search(text)]
    if not holds:
        return list(range(len(sentences)))
    words = _words(asked)
    return [max(holds, key=lambda number: len(words & _words(sentences[number])))]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _clean(text: str) -> str:
    return " ".join(text.split())


def split_sentences(text: str) -> list[str]:
    """Sentences of a paragraph, in order; only white space is lost.

    A sentence ends at a full stop, exclamation or question mark (and the quotes or brackets that
    it closes) before white space and a capital or a digit, but not at an initial or a common
    abbreviation; and at a full stop between "word" and "Word" without white space.
    """
    text = _clean(text)
    sentences, start = [], 0
    for match in _END.finditer(text):
        head = text[start : match.start() + 1]
        if not _ABBREVIATION.search(head):
            sentences.append(text[start : match.end()].strip())
            start = match.end()
    sentences.append(text[start:])
    return [sentence for sentence in sentences if sentence]


class _Paragraphs:
    """The paragraphs of one record; sentences that are too long become several."""

    def __init__(self, sentence_words: int):
        self._limit = sentence_words
        self._documents: list[Document] = []
        self._places: list[list[list[tuple[int, int]]]] = []  # paragraph -> sentence -> support

    def add(self, title: str, sentences: Sequence[str]) -> int:
        """Adds one and returns its number."""
        pieces: list[str] = []
        places = []
        for sentence in sentences:
            words = sentence.split()
            size = self._limit or max(1, len(words))
            cut = [" ".join(words[i : i + size]) for i in range(0, len(words), size)]
            first = len(pieces)
            places.append([(len(self._documents), first + i) for i in range(len(cut))])
            pieces += cut
        self._documents.append(Document(_clean(title), tuple(pieces)))
        self._places.append(places)
        return len(self._places) - 1

    def places(self, paragraph: int, sentences: Sequence[int]) -> list[tuple[int, int]]:
        """(document, sentence) of what these sentences, as published, became; [] if nothing."""
        if not 0 <= paragraph < len(self._places):
            return []
        known = self._places[paragraph]
        if not all(0 <= sentence < len(known) for sentence in sentences):
            return []
        return [place for sentence in sentences for place in known[sentence]]

    def ask(
        self,
        record: _Record,
        name: str,
        aliases: Sequence[str],
        support: Sequence[Sequence[tuple[int, int]]],
    ) -> SourceQuestion:
        """The question. Raises _LeftOut where a part of its support, or its answer, is nothing."""
        text = _clean(record.get("question", str))
        if not all(isinstance(alias, str) for alias in aliases):
            raise record.error("has 'answer_aliases' that are not [text, ...]")
        aliases = [_clean(alias) for alias in aliases]
        if not text or not aliases[0]:
            raise _LeftOut("it has no text, or no answer")
        if not support or not all(support):
            raise _LeftOut("a supporting fact names no sentence")
        return SourceQuestion(
            id=name,
            text=text,
            aliases=tuple(dict.fromkeys(alias for alias in aliases if alias)),
            documents=tuple(self._documents),
            support=tuple(dict.fromkeys(place for places in support for place in places)),
        )


def _check_length(config: MultihopQaConfig, question: SourceQuestion) -> None:
    for name, text in [("question", question.text), ("answer", question.aliases[0])]:
        most = getattr(config, f"max_{name}_words")
        if most and len(text.split()) > most:
            raise _LeftOut(f"its {name} has more than config.task.max_{name}_words={most} words")


def _split(
    config: MultihopQaConfig,
    questions: Sequence[SourceQuestion],
    left_out: collections.Counter[str],
) -> dict[str, list[SourceQuestion]]:
    drawn: dict[str, list[SourceQuestion]] = {split: [] for split in _SPLITS}
    for question in questions:
        number = int.from_bytes(hashlib.sha256(question.id.encode()).digest()[:8], "big")
        rest, for_test = divmod(number, config.test_every)
        split = "train" if rest % config.validation_every else "validation"
        drawn["test" if not for_test else split].append(question)
    taken: set[Document] = set()
    for split in _SPLITS:
        kept = [question for question in drawn[split] if taken.isdisjoint(question.supporting())]
        if len(kept) < len(drawn[split]):
            reason = f"of {split}, with a supporting document of a question of another split"
            left_out[reason] += len(drawn[split]) - len(kept)
        taken.update(document for question in kept for document in question.supporting())
        drawn[split] = kept
    return drawn


# ---------------------------------------------------------------------------------------------
# Samples


def generate(config: MultihopQaConfig, corpus: Corpus, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples (`schema.Example`) of 'train', 'validation' or 'test'.

    Which questions share a sample follows from `config.seed`.

    Raises ValueError where there are too few questions or documents for one sample.
    """
    if split not in _SPLITS:
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
            for other in _SPLITS
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

    VERSION = tfds.core.Version("1.0.0")
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
