"""Episodes stacked in batches: an endless shuffled stream for training, one pass for evaluation.

Nothing here is random but the order of training samples, and that is a function of the seed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.tasks.encoding import EpisodeShape, EpisodeStream, TextEncoder, encode_with
from atommem_jax.tasks.schema import Example
from atommem_jax.types import Episode


class EpisodeBatch(NamedTuple):
    """Episodes stacked on a leading axis B, and what the host needs to score them."""

    episodes: Episode  # NumPy leaves, each with a leading B
    aliases: list[list[list[str]]]  # sample -> question -> accepted answers; not padded
    ids: Int[np.ndarray, " B"]


class StreamBatch(NamedTuple):
    """Documents that are read window after window, and what the host needs to score them."""

    streams: Sequence[EpisodeStream]
    questions: list[list[str]]  # sample -> question, as text
    aliases: list[list[list[str]]]  # sample -> question -> accepted answers
    ids: Int[np.ndarray, " B"]

    def window(self, first: Int[np.ndarray, " B"]) -> Episode:
        """The windows from chunks `first` on, stacked as the episodes of an `EpisodeBatch`."""
        windows = [
            stream.window(int(chunk)) for stream, chunk in zip(self.streams, first, strict=True)
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *windows)

    @property
    def tokens_read(self) -> Int[np.ndarray, " B"]:
        """Tokens of each document before its last window."""
        return np.array([stream.tokens_read for stream in self.streams])


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
        episode = encode_with(example, self._encode_text, self._shape)
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
    default all: those that this process holds (`host_batches.process_rows`). So `get_state()`
    counts batches, is the same on every process, and may be given to `set_state` of an iterator
    with other rows. Every epoch has a new order. Batches run over the end of an epoch; only what
    is left after `num_epochs` (None: without end) and does not fill a batch is dropped.

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
    encoded = EncodedDataset(source, tokenizer, shape, cache_bytes=0)
    for indices, real in _cut_split(len(source), batch_size, rows):
        yield encoded.stack(indices), real


def stream_split(
    source: Sequence[Example],
    tokenizer: Tokenizer,
    shape: EpisodeShape,
    *,
    batch_size: int,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> Iterator[tuple[StreamBatch, int]]:
    """As `iterate_split`, of documents that are read in windows of `shape.chunks` chunks."""
    encode_text = TextEncoder(tokenizer)
    for indices, real in _cut_split(len(source), batch_size, rows):
        examples = [source[i] for i in indices]
        batch = StreamBatch(
            streams=[EpisodeStream(example, encode_text, shape) for example in examples],
            questions=[[q["text"] for q in example["questions"]] for example in examples],
            aliases=[[q["aliases"] for q in example["questions"]] for example in examples],
            ids=np.array([example["id"] for example in examples]),
        )
        yield batch, real


def _cut_split(
    count: int, batch_size: int, rows: Int[np.ndarray, " rows"] | None
) -> Iterator[tuple[list[int], int]]:
    rows = _check_rows(batch_size, rows)
    for first in range(0, count, batch_size):
        indices = np.minimum(first + rows, count - 1)
        yield indices.tolist(), min(batch_size, count - first)


def _check_rows(batch_size: int, rows: Int[np.ndarray, " rows"] | None) -> Int[np.ndarray, " rows"]:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: 1 or more.")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not rows.size or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(
            f"rows are {rows.tolist()} of a batch of {batch_size}; allowed: one or more of 0 to "
            f"{batch_size - 1}. Take them from host_batches.process_rows(mesh, batch_size)."
        )
    return rows
