"""The files of HotpotQA, 2WikiMultihopQA and MuSiQue, read as questions with their documents.

Sources: Yang et al., arXiv 1809.09600; Ho et al., arXiv 2011.01060; Trivedi et al., arXiv
2108.00573.

What supports a question, and in which order it is needed, is published: by HotpotQA and
2WikiMultihopQA as sentences; by MuSiQue as a paragraph for each step of the question's
decomposition. Of that paragraph the sentence that holds the step's answer is taken, of several the
one with most words of the step's question, of none all (`split_sentences` is a rule of thumb).

Left out, and counted (`Corpus.left_out`), are questions without an answer, those of which a
supporting fact names no sentence (HotpotQA has indices past the end of a paragraph), those longer
than the config allows, and those that would tie two splits.

Of one file a question's split is a hash of its id. Of two, `train_file` has train and validation,
told apart by the same hash, and `test_file` is test. Where a question shares a supporting document
with one of test, or of validation, training goes without it. So test is what its file and
`corpus_file` say, whatever an agent was trained on.
"""

import collections
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from atommem_jax import text_files
from atommem_jax.config import paths
from atommem_jax.tasks.passages import Document, clean, cut, read_passages, split_sentences

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
SPLITS = ("test", "validation", "train")  # the first has the first say on a document
_FILES = ("train_file", "test_file", "data_file", "corpus_file")


@dataclasses.dataclass(frozen=True)
class MultihopQaConfig:
    """Which files to read, and how samples are made of them. Raises ValueError.

    `questions` is a range (fewest, most): half of the samples have the fewest, the others uniformly
    more; (1, 10) is the paper's law. Every question of a split is asked once; up to fewest - 1 are
    left over. Limits of 0 are none. A chunk ends before the first limit that it would exceed.

    One of the files of questions is enough: it then has all splits. Of `train_file` and `test_file`
    each has its own. With `test_documents` (200, 400) there are splits `test_200` and `test_400` in
    place of `test`, of the same questions; a smaller sample's documents are among a larger one's.
    """

    dataset: str = "hotpotqa"  # or '2wikimultihopqa', 'musique'
    train_file: str = ""  # a published file, with answers
    test_file: str = ""  # the same
    data_file: str = ""  # what `train_file` was called when there was no other
    corpus_file: str = ""  # a pool of further documents, see `passages`; '' for none
    documents: int = 10  # a sample
    test_documents: tuple[int, ...] = ()  # of test samples, a split each; () for `documents`
    questions: tuple[int, int] = (1, 1)
    documents_per_chunk: int = 1
    chunk_sentences: int = 0
    chunk_words: int = 0  # titles aside
    chunk_tokens: int = 0  # in place of all of these: chunks are filled up, see `packing`
    chunk_overlap: int = 0  # tokens of a chunk that repeat the one before, at the most
    max_sentence_words: int = 0  # a longer one is split into facts of at most so many words
    max_question_words: int = 0  # questions with more are left out
    max_answer_words: int = 0  # questions with more in their answer are left out
    test_every: int = 10  # one question of a lone file in so many goes to test; 1 for all
    validation_every: int = 10  # and one in so many of the others to validation
    max_examples: int = 0  # in a split
    max_test_examples: int = 0  # in validation and each test split; 0 for `max_examples`
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "questions", tuple(self.questions))
        object.__setattr__(self, "test_documents", tuple(self.test_documents))
        for name in _FILES:
            object.__setattr__(self, name, paths.expand(getattr(self, name)))
        if self.data_file and self.train_file not in ("", self.data_file):
            _refuse("data_file", self.data_file, "'' beside task.train_file, its name of today")
        if self.dataset not in _SOURCES:
            _refuse("dataset", self.dataset, ", ".join(map(repr, _SOURCES)))
        if not (len(self.questions) == 2 and 1 <= self.questions[0] <= self.questions[1]):
            _refuse("questions", self.questions, "(fewest, most) with 1 <= fewest <= most")
        self._check_documents()
        limits = ("documents_per_chunk", "chunk_sentences", "chunk_words")
        for name in (
            *limits,
            "max_sentence_words",
            "max_question_words",
            "max_answer_words",
            "max_examples",
            "max_test_examples",
        ):
            if getattr(self, name) < 0:
                _refuse(name, getattr(self, name), "1 or more, or 0 for no limit")
        if self.chunk_tokens < 0:
            _refuse("chunk_tokens", self.chunk_tokens, "1 or more, or 0 for the other limits")
        if not 0 <= self.chunk_overlap < max(self.chunk_tokens, 1):
            _refuse(
                "chunk_overlap", self.chunk_overlap, "0 or more, below config.task.chunk_tokens"
            )
        if not self.chunk_tokens and not any(getattr(self, name) for name in limits):
            _refuse(limits[0], 0, f"1 or more, unless {limits[1]} or {limits[2]} limits a chunk")
        if self.test_every < 1:
            _refuse("test_every", self.test_every, "2 or more, or 1 for all")
        if self.validation_every < 2:
            _refuse("validation_every", self.validation_every, "2 or more")

    def _check_documents(self) -> None:
        least = _HOPS[self.dataset] * self.questions[1]
        sizes = {"documents": self.documents}
        for number, size in enumerate(self.test_documents):
            sizes[f"test_documents[{number}]"] = size
        for name, size in sizes.items():
            if size < least:
                allowed = (
                    f"at least {least}: up to {_HOPS[self.dataset]} documents support each of up "
                    f"to {self.questions[1]} questions; raise it, or lower config.task.questions"
                )
                _refuse(name, size, allowed)
        if len(set(self.test_documents)) < len(self.test_documents):
            _refuse("test_documents", self.test_documents, "each number once")

    @property
    def files(self) -> dict[str, str]:
        """The files of questions that are set, by field; the first is trained on."""
        train = "train_file" if self.train_file else "data_file"
        return {name: getattr(self, name) for name in (train, "test_file") if getattr(self, name)}

    @property
    def sizes(self) -> dict[str, int]:
        """Documents of a sample, by split."""
        tests = {f"test_{size}": size for size in self.test_documents}
        tests = tests or {"test": self.documents}
        if self.test_every == 1 and len(self.files) < 2:
            return tests
        return {"train": self.documents, "validation": self.documents} | tests

    def limit(self, split: str) -> int:
        """The most samples of a split; 0 for no limit."""
        return (split != "train" and self.max_test_examples) or self.max_examples

    @property
    def sentence_words(self) -> int:
        """The most words of a fact; 0 for no limit."""
        words = 0 if self.chunk_tokens else self.chunk_words
        limits = [limit for limit in (self.max_sentence_words, words) if limit]
        return min(limits, default=0)


def _refuse(field: str, found: object, allowed: str) -> None:
    raise ValueError(f"config.task.{field} is {found!r}; allowed: {allowed}.")


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

    splits: Mapping[str, Sequence[SourceQuestion]]  # 'train', 'validation', 'test'
    left_out: Mapping[str, int]  # reason -> number of questions
    pool: Sequence[Document] = ()  # of the corpus file


# ---------------------------------------------------------------------------------------------
# Reading


class _LeftOut(Exception):
    """Why a question is not used."""


def find_files(config: MultihopQaConfig) -> dict[str, str]:
    """Field -> path of every file that is to be read; all of them exist.

    Raises FileNotFoundError, saying where a file comes from, where it does not, or none is named.
    """
    files = config.files or {"train_file": ""}
    for name, path in files.items():
        if not os.path.isfile(path):
            found = f"{path!r}, which is no file" if path else "not set, nor is test_file"
            raise FileNotFoundError(
                f"config.task.{name} is {found}; download {_SOURCES[config.dataset]}, and set "
                f"--config.task.{name} to its path."
            )
    if config.corpus_file and not os.path.isfile(config.corpus_file):
        raise FileNotFoundError(
            f"config.task.corpus_file is {config.corpus_file!r}, which is no file; set it to one "
            "of passages (JSON with title and text), or to nothing."
        )
    return files | ({"corpus_file": config.corpus_file} if config.corpus_file else {})


def read(config: MultihopQaConfig) -> Corpus:
    """Reads the published files and splits their questions.

    Raises FileNotFoundError where there is none, and ValueError, naming file, record and field,
    where it is of another kind.
    """
    files = find_files(config)
    corpus = files.pop("corpus_file", "")
    left_out: collections.Counter[str] = collections.Counter()
    found = [_read_questions(config, path, left_out) for path in files.values()]
    drawn = _draw_two(config, *found) if len(found) == 2 else _draw_one(config, *found)
    splits = _part(drawn, left_out)
    for reason, count in left_out.items():
        logging.info("%s: %d questions left out: %s", " ".join(files.values()), count, reason)
    pool = read_passages(corpus, "config.task.corpus_file", config.sentence_words) if corpus else ()
    return Corpus(splits, left_out, pool)


def _read_questions(
    config: MultihopQaConfig, path: str, left_out: collections.Counter[str]
) -> list[SourceQuestion]:
    make = _read_musique if config.dataset == "musique" else _read_listed
    questions = []
    for number, record in enumerate(text_files.read_records(path), start=1):
        try:
            question = make(config, _Record(record, f"{path}, record {number}", config.dataset))
            _check_length(config, question)
            questions.append(question)
        except _LeftOut as error:
            left_out[str(error)] += 1
    return questions


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
        found = split_sentences(text)
        texts[part.get("idx", int)] = paragraphs.add(title, found), found
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
        place, found = texts.get(number, (-1, []))
        support.append(paragraphs.places(place, _find_answer(found, answer, asked)))
    aliases = [record.get("answer", str), *record.get("answer_aliases", list)]
    return paragraphs.ask(record, record.get("id", str), aliases, support)


def _find_answer(texts: Sequence[str], answer: str, asked: str) -> list[int]:
    """The sentence that answers a step, or all of them where none holds the answer."""
    pattern = re.compile(rf"(?<!\w){re.escape(clean(answer))}(?!\w)", re.IGNORECASE)
    holds = [number for number, text in enumerate(texts) if pattern.search(text)]
    if not holds:
        return list(range(len(texts)))
    words = _words(asked)
    return [max(holds, key=lambda number: len(words & _words(texts[number])))]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


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
            parts = cut(sentence, self._limit)
            first = len(pieces)
            places.append([(len(self._documents), first + i) for i in range(len(parts))])
            pieces += parts
        self._documents.append(Document(clean(title), tuple(pieces)))
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
        text = clean(record.get("question", str))
        if not all(isinstance(alias, str) for alias in aliases):
            raise record.error("has 'answer_aliases' that are not [text, ...]")
        aliases = [clean(alias) for alias in aliases]
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


def _hash(question: SourceQuestion) -> int:
    return int.from_bytes(hashlib.sha256(question.id.encode()).digest()[:8], "big")


def _draw_one(
    config: MultihopQaConfig, questions: Sequence[SourceQuestion]
) -> dict[str, list[SourceQuestion]]:
    """The splits of a lone file."""
    drawn: dict[str, list[SourceQuestion]] = {split: [] for split in SPLITS}
    for question in questions:
        rest, for_test = divmod(_hash(question), config.test_every)
        split = "train" if rest % config.validation_every else "validation"
        drawn["test" if not for_test else split].append(question)
    return drawn


def _draw_two(
    config: MultihopQaConfig, train: Sequence[SourceQuestion], test: Sequence[SourceQuestion]
) -> dict[str, list[SourceQuestion]]:
    """The splits of a file to train on and one to test on."""
    for_validation = [_hash(question) % config.validation_every == 0 for question in train]
    return {
        "test": list(test),
        "validation": list(itertools.compress(train, for_validation)),
        "train": [q for q, held in zip(train, for_validation, strict=True) if not held],
    }


def _part(
    drawn: Mapping[str, Sequence[SourceQuestion]], left_out: collections.Counter[str]
) -> dict[str, list[SourceQuestion]]:
    """The splits without questions that share a supporting document with another split."""
    splits = {}
    taken: set[str] = set()
    for split in SPLITS:
        kept = [q for q in drawn[split] if taken.isdisjoint(d.identity for d in q.supporting())]
        if len(kept) < len(drawn[split]):
            reason = f"of {split}, with a supporting document of a question of another split"
            left_out[reason] += len(drawn[split]) - len(kept)
        taken.update(document.identity for question in kept for document in question.supporting())
        splits[split] = kept
    return splits
