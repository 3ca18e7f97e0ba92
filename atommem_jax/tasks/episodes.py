"""From examples (text) to Episode arrays in batches: one road for every data set family.

A family is a TFDS builder that writes examples of the schema below, one JSON text a record.
`prepare` runs it once and reads it back; `fit_shape` finds the static sizes; `encode` makes one
example an Episode; `batches` and `iterate_split` stack episodes for training and evaluation.

Nothing here is random but the order of training samples, and that is a function of the seed.
"""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import jax
import numpy as np
from jaxtyping import Int

from atommem_jax.tokenizer import Tokenizer
from atommem_jax.types import EMPTY, Annotations, Episode


class Fact(TypedDict):
    """One sentence of a document, and what is worth storing of it.

    That is the sentence itself, or a `note`: other words, which follow from the sentence and from
    what was stored before it. It has the form of an answer, without a full stop.
    """

    text: str
    note: NotRequired[str]  # stored instead of the text; without it, or where '', the text is
    subject: str  # leading words of what is stored that name what it is about; '' where unknown
    support: bool  # worth storing, as far as was known when it was read
    supersedes: int  # number of the fact whose entry it replaces, or -1
    category: int  # the family's own label, for statistics


class Question(TypedDict):
    """One question; `aliases` are the accepted answers, the canonical one first."""

    text: str
    aliases: list[str]
    needs: list[int]  # numbers of the facts that answer it, in the order in which they are used
    focus: NotRequired[str]


class Example(TypedDict):
    """One sample. Its facts are numbered 0, 1, ... in reading order, over all chunks."""

    id: int  # number of the sample within its split
    chunks: list[list[Fact]]
    questions: list[Question]
    focus: str  # a good standing query over all questions


# ---------------------------------------------------------------------------------------------
# Preparing and reading


class Split(Sequence[Example]):
    """The examples of one split, decoded when they are asked for."""

    def __init__(self, records: Any):
        """Wraps a TFDS data source whose records have the one field `example`."""
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a split of {len(self)}")
        return json.loads(self._records[index % len(self)]["example"])

    def __iter__(self) -> Iterator[Example]:
        block = 1024  # the record reader is several times faster for many at once
        for first in range(0, len(self), block):
            rows = range(first, min(first + block, len(self)))
            yield from (
                json.loads(record["example"]) for record in self._records.__getitems__(rows)
            )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared data set: its directory and its splits by name."""

    directory: str
    splits: Mapping[str, Split]

    def split(self, name: str) -> Split:
        """The examples of split `name`. Raises KeyError, naming the splits that there are."""
        if name not in self.splits:
            raise KeyError(f"split is {name!r}; {self.directory} has: {', '.join(self.splits)}.")
        return self.splits[name]


def prepare(task: Mapping[str, Any], data_root: str | os.PathLike[str]) -> Dataset:
    """Writes the data set that `task` describes under `data_root`, unless it is there already.

    Args:
      task: `name` is the family, 'synthetic', 'babi' or 'multihop_qa'; the rest are fields of its
        config class, `SyntheticConfig`, `BabiConfig` or `MultihopQaConfig`.
      data_root: directory of all prepared data sets; made where it does not exist. Processes that
        share it on one machine wait for each other.

    Raises:
      ValueError: an unknown family or field, or a value that the family does not allow.
      FileNotFoundError: files that the family reads are not there.
    """
    import tensorflow_datasets as tfds  # half a second that readers of plain examples can save

    fields = dict(task)
    name = fields.pop("name", None)
    make_config, make_builder = _family(name)
    known = [field.name for field in dataclasses.fields(make_config)]
    for field in fields:
        if field not in known:
            allowed = ", ".join(known)
            raise ValueError(f"config.task.{field} is no field of task {name!r}; it has {allowed}.")
    os.makedirs(data_root, exist_ok=True)
    config = make_config(**fields)
    with _lock(os.path.join(data_root, f".{name}.lock")):
        # Made under the lock too: a builder looks for prepared data only when it is made.
        builder = make_builder(config, os.fspath(data_root))
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return Dataset(
        directory=str(builder.data_dir),
        splits={split: Split(builder.as_data_source(split=split)) for split in builder.info.splits},
    )


def _family(name: str | None) -> tuple[Any, Callable[[Any, str], Any]]:
    if name == "synthetic":
        from atommem_jax.tasks import synthetic

        return synthetic.SyntheticConfig, synthetic.make_builder
    if name == "babi":
        from atommem_jax.tasks import babi

        return babi.BabiConfig, babi.make_builder
    if name == "multihop_qa":
        from atommem_jax.tasks import multihop_qa

        return multihop_qa.MultihopQaConfig, multihop_qa.make_builder
    raise ValueError(f"config.task.name is {name!r}; allowed: 'synthetic', 'babi', 'multihop_qa'.")


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a crash
        yield


def tokenizer_texts(dataset: Dataset) -> Iterator[str]:
    """Yields each different text of the train split once: what a tokenizer may be trained on."""
    seen: set[str] = set()
    for example in dataset.split("train"):
        for text in _texts(example):
            if text not in seen:
                seen.add(text)
                yield text


def _texts(example: Example) -> Iterator[str]:
    for fact in _concatenate(example["chunks"]):
        yield fact["text"]
        if fact.get("note"):
            yield fact["note"]
    for question in example["questions"]:
        yield question["text"]
        yield from question["aliases"]
    yield example["focus"]


# ---------------------------------------------------------------------------------------------
# Encoding


@dataclasses.dataclass(frozen=True)
class EpisodeShape:
    """The static sizes of an Episode, all in tokens or items."""

    chunks: int  # C
    chunk_length: int  # Lc
    facts: int  # U, a chunk
    questions: int  # Q
    question_length: int  # Lq
    needs: int  # M, a question
    answer_length: int  # G
    query_length: int  # Y
    note_length: int = 0  # W

    def join(self, other: "EpisodeShape") -> "EpisodeShape":
        """The smallest shape that holds what either holds."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return EpisodeShape(*map(max, mine, theirs))


class _Tokens(NamedTuple):
    """An example in token ids, not yet padded."""

    chunks: list[list[list[int]]]  # chunk -> fact -> ids
    questions: list[list[int]]
    answers: list[list[int]]
    focus: list[int]
    notes: list[list[list[int]]]  # chunk -> fact -> ids; none where the fact has no note

    def shape(self, example: Example) -> EpisodeShape:
        return EpisodeShape(
            chunks=len(self.chunks),
            chunk_length=max((sum(map(len, chunk)) for chunk in self.chunks), default=0),
            facts=max(map(len, self.chunks), default=0),
            questions=len(self.questions),
            question_length=max(map(len, self.questions), default=0),
            needs=max((len(question["needs"]) for question in example["questions"]), default=0),
            answer_length=max(map(len, self.answers), default=0),
            query_length=len(self.focus),
            note_length=max(map(len, _concatenate(self.notes)), default=0),
        )


class TextEncoder:
    """A tokenizer's `encode` as texts in a row need it; remembers, as sentences recur often."""

    def __init__(self, tokenizer: Tokenizer):
        self._encode = tokenizer.encode
        self._known: dict[str, list[int]] = {}
        self.pad_id = tokenizer.pad_id
        # SentencePiece puts a space before every text itself, a byte-level BPE does not.
        joined = tokenizer.decode(tokenizer.encode("a") + tokenizer.encode("b"))
        self.separator = "" if joined == "a b" else " "

    def __call__(self, text: str, first: bool = True) -> list[int]:
        """Token ids of `text`; with the space before it where it is not the first in a row."""
        text = text if first else self.separator + text
        if text not in self._known:
            if len(self._known) >= 1 << 16:
                self._known.clear()
            self._known[text] = list(self._encode(text))
        return self._known[text]


def _tokenize(example: Example, encode_text: TextEncoder, partial: bool = False) -> _Tokens:
    chunks = [
        [encode_text(fact["text"], first=u == 0) for u, fact in enumerate(chunk)]
        for chunk in example["chunks"]
    ]
    questions = [encode_text(question["text"]) for question in example["questions"]]
    for name, texts in [("chunks", _concatenate(chunks)), ("questions", questions)]:
        if not (texts or partial) or not all(texts):
            raise ValueError(
                f"example {example['id']}: {name} has no text, or one without any token; allowed: "
                "one or more texts, none empty. Correct the data set's builder."
            )
    answers = [encode_text(question["aliases"][0]) for question in example["questions"]]
    notes = [
        [encode_text(fact["note"]) if fact.get("note") else [] for fact in chunk]
        for chunk in example["chunks"]
    ]
    return _Tokens(chunks, questions, answers, encode_text(example["focus"]), notes)


def _concatenate(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def fit_shape(examples: Iterable[Example], tokenizer: Tokenizer) -> EpisodeShape:
    """The smallest shape that holds all of `examples`; reads and tokenises each once.

    Raises ValueError where there are none, or where one has no facts or questions.
    """
    encode_text = TextEncoder(tokenizer)
    fitted = None
    for example in examples:
        shape = _tokenize(example, encode_text).shape(example)
        fitted = shape if fitted is None else fitted.join(shape)
    if fitted is None:
        raise ValueError("examples is empty; pass a split with at least one example.")
    return fitted


def longest_support(
    examples: Iterable[Example], tokenizer: Tokenizer, *, cap: int
) -> tuple[int, int]:
    """(tokens, facts): the most that is worth storing of any one chunk.

    cap: tokens to which the text of each fact is cut.
    """
    encode_text = TextEncoder(tokenizer)
    tokens = facts = 0
    for example in examples:
        for chunk in example["chunks"]:
            stored = [fact.get("note") or fact["text"] for fact in chunk if fact["support"]]
            sizes = [min(len(encode_text(text, first=False)), cap) for text in stored]
            tokens, facts = max(tokens, sum(sizes)), max(facts, len(sizes))
    return tokens, facts


def encode(
    example: Example, tokenizer: Tokenizer, shape: EpisodeShape, *, partial: bool = False
) -> Episode:
    """Makes one example an Episode with NumPy leaves (int32, bool), padded to `shape`.

    The tokens of a chunk are those of its facts, one after the other, so that each fact is an
    exact span; a fact that follows another one begins with the space between them. A note is
    encoded alone. Where there is no fact, category is EMPTY.

    partial: it may lack chunks, or questions: a document that is read before anyone asks, and a
      question about what was read before.

    Raises ValueError, naming the field and both sizes, where the example does not fit `shape`,
    and where a fact number is none of the example's.
    """
    return _encode(example, TextEncoder(tokenizer), shape, partial)


def _encode(
    example: Example, encode_text: TextEncoder, shape: EpisodeShape, partial: bool = False
) -> Episode:
    pad_id = encode_text.pad_id
    tokens = _tokenize(example, encode_text, partial)
    _check_fits(example, tokens.shape(example), shape)
    chunks = [_concatenate(chunk) for chunk in tokens.chunks]
    # Any: the leaves are NumPy's, Episode says JAX's; a batch goes to the devices later, as one.
    leaves: dict[str, Any] = {
        "id": np.int32(example["id"]),
        "chunks": _pad_rows(chunks, (shape.chunks, shape.chunk_length), pad_id),
        "chunk_lengths": _lengths(chunks, shape.chunks),
        "num_chunks": np.int32(len(chunks)),
        "questions": _pad_rows(tokens.questions, (shape.questions, shape.question_length), pad_id),
        "question_lengths": _lengths(tokens.questions, shape.questions),
        "num_questions": np.int32(len(tokens.questions)),
    }
    return Episode(annotations=_annotate(example, tokens, encode_text, shape), **leaves)


def _annotate(
    example: Example,
    tokens: _Tokens,
    encode_text: TextEncoder,
    shape: EpisodeShape,
) -> Annotations:
    pad_id = encode_text.pad_id
    grid = (shape.chunks, shape.facts)
    start, length, subject_length, note_length = (np.zeros(grid, np.int32) for _ in range(4))
    note = np.full((*grid, shape.note_length), pad_id, np.int32)
    support = np.zeros(grid, np.bool_)
    supersedes, category = (np.full(grid, EMPTY, np.int32) for _ in range(2))
    places = [
        c * shape.facts + u for c, chunk in enumerate(tokens.chunks) for u in range(len(chunk))
    ]

    def flat(number: int) -> int:
        if not 0 <= number < len(places):
            raise ValueError(
                f"example {example['id']}: a `needs` or `supersedes` is {number}; allowed: its "
                f"facts, 0 to {len(places) - 1}. Correct the data set's builder."
            )
        return places[number]

    for c, chunk in enumerate(example["chunks"]):
        position = 0
        for u, fact in enumerate(chunk):
            ids, noted = tokens.chunks[c][u], tokens.notes[c][u]
            subject = encode_text(fact["subject"], first=u == 0 or bool(noted))
            start[c, u], length[c, u] = position, len(ids)
            note[c, u, : len(noted)], note_length[c, u] = noted, len(noted)
            subject_length[c, u] = _common_prefix(noted or ids, subject)
            support[c, u] = fact["support"]
            if fact["supersedes"] != EMPTY:
                supersedes[c, u] = flat(fact["supersedes"])
            category[c, u] = fact["category"]
            position += len(ids)
    needs = [[flat(number) for number in question["needs"]] for question in example["questions"]]
    leaves: dict[str, Any] = {
        "start": start,
        "length": length,
        "note": note,
        "note_length": note_length,
        "subject_length": subject_length,
        "support": support,
        "supersedes": supersedes,
        "category": category,
        "needs": _pad_rows(needs, (shape.questions, shape.needs), EMPTY),
        "gold": _pad_rows(tokens.answers, (shape.questions, shape.answer_length), pad_id),
        "gold_length": _lengths(tokens.answers, shape.questions),
        "focus": _pad_rows([tokens.focus], (1, shape.query_length), pad_id)[0],
        "focus_length": np.int32(len(tokens.focus)),
    }
    return Annotations(**leaves)


def _common_prefix(ids: list[int], subject: list[int]) -> int:
    """Tokens of `ids` that name the subject, at least one where there is a subject.

    A tokenizer may merge the end of the subject with what follows it, hence the comparison.
    """
    same = 0
    while same < min(len(ids), len(subject)) and ids[same] == subject[same]:
        same += 1
    return max(same, min(1, len(subject)))


def _pad_rows(rows: list[list[int]], shape: tuple[int, int], fill: int) -> np.ndarray:
    padded = np.full(shape, fill, np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def _lengths(rows: list[list[int]], count: int) -> np.ndarray:
    lengths = np.zeros(count, np.int32)
    lengths[: len(rows)] = [len(row) for row in rows]
    return lengths


def _check_fits(example: Example, found: EpisodeShape, shape: EpisodeShape) -> None:
    for field in dataclasses.fields(EpisodeShape):
        size, cap = getattr(found, field.name), getattr(shape, field.name)
        if size > cap:
            raise ValueError(
                f"example {example['id']}: {field.name} is {size}, but the shape allows {cap}; "
                f"raise {field.name} or take the shape that fit_shape gives for this split."
            )


# ---------------------------------------------------------------------------------------------
# Batches


class EpisodeBatch(NamedTuple):
    """Episodes stacked on a leading axis B, and what the host needs to score them."""

    episodes: Episode  # NumPy leaves, each with a leading B
    aliases: list[list[list[str]]]  # sample -> question -> accepted answers; not padded
    ids: Int[np.ndarray, " B"]


class EncodedDataset(Sequence[tuple[Episode, list[list[str]]]]):
    """Random access to encoded samples with their aliases; each is tokenised once.

    What was encoded is kept up to about `cache_bytes`; samples past that are encoded each time.
    """

    def __init__(
        self,
        source: Sequence[Example],
        tokenizer: Tokenizer,
        shape: EpisodeShape,
        cache_bytes: int = 1 << 30,
    ):
        self._source = source
        self._encode_text = TextEncoder(tokenizer)
        self._shape = shape
        self._room = cache_bytes
        self._cache: dict[int, tuple[Episode, list[list[str]]]] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        index = int(index)
        if index in self._cache:
            return self._cache[index]
        example = self._source[index]
        episode = _encode(example, self._encode_text, self._shape)
        sample = (episode, [question["aliases"] for question in example["questions"]])
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(episode))
        if size <= self._room:
            self._room -= size
            self._cache[index] = sample
        return sample

    def stack(self, indices: Iterable[int]) -> EpisodeBatch:
        """The batch of the samples numbered `indices`, in that order."""
        samples = [self[index] for index in indices]
        episodes = jax.tree.map(lambda *leaves: np.stack(leaves), *[s[0] for s in samples])
        return EpisodeBatch(episodes, [s[1] for s in samples], episodes.id)


def batches(
    source: Sequence[Example],
    tokenizer: Tokenizer,
    shape: EpisodeShape,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> Any:
    """A grain iterator (`grain.DatasetIterator`) over EpisodeBatch for training.

    Batch k is a function of (seed, batch_size, k) alone, and of it the iterator gives `rows`, by
    default all: those that this process holds (`sharding.process_rows`). So `get_state()` counts
    batches, is the same on every process, and may be given to `set_state` of an iterator with
    other rows. Every epoch has a new order. Batches run over the end of an epoch; only what is
    left after `num_epochs` (None: without end) and does not fill a batch is dropped.

    Raises ValueError where `batch_size` is below 1 or larger than all samples of all epochs, or
    `rows` are none of a batch.
    """
    rows = _check_rows(batch_size, rows)
    encoded = EncodedDataset(source, tokenizer, shape)
    if num_epochs is not None and len(source) * num_epochs < batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, but {num_epochs} epochs of {len(source)} samples are "
            f"{len(source) * num_epochs}; lower batch_size or raise num_epochs."
        )
    return shuffled(
        encoded.stack,
        len(source),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        num_epochs=num_epochs,
        rows=rows,
    )


def shuffled(
    stack: Callable[[Int[np.ndarray, " rows"]], Any],
    count: int,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    rows: Int[np.ndarray, " rows"],
) -> Any:
    """As `batches`, of any samples: `stack` makes a batch of some of the numbers below `count`."""
    import grain  # imported here: it takes over a second, and evaluation does without it

    # Numbers are shuffled and batched, then each process makes its own rows only.
    order = grain.MapDataset.range(count)
    if shuffle:
        order = order.shuffle(seed=seed)
    order = order.repeat(num_epochs).batch(batch_size, drop_remainder=True)
    samples = order.map(lambda indices: stack(indices[rows]))
    return iter(samples.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def iterate_split(
    source: Sequence[Example],
    tokenizer: Tokenizer,
    shape: EpisodeShape,
    *,
    batch_size: int,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> Iterator[tuple[EpisodeBatch, int]]:
    """Yields (batch, real) until every sample of a split was in exactly one batch, in order.

    The last batch is filled up with copies of the split's last sample; only the first `real` rows
    count. `rows` are those of each batch to yield, by default all: those that this process holds.
    `batch_size` and `real` count the rows of all processes, so that each yields as many batches.

    Raises ValueError as `batches` does.
    """
    rows = _check_rows(batch_size, rows)
    encoded = EncodedDataset(source, tokenizer, shape, cache_bytes=0)
    for first in range(0, len(source), batch_size):
        indices = np.minimum(first + rows, len(source) - 1)
        yield encoded.stack(indices.tolist()), min(batch_size, len(source) - first)


def _check_rows(batch_size: int, rows: Int[np.ndarray, " rows"] | None) -> Int[np.ndarray, " rows"]:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: 1 or more.")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not rows.size or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(
            f"rows are {rows.tolist()} of a batch of {batch_size}; allowed: one or more of 0 to "
            f"{batch_size - 1}. Take them from sharding.process_rows(mesh, batch_size)."
        )
    return rows
