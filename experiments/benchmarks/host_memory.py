"""The slot table as an agent framework keeps it: one object a trajectory, Python lists, an index.

The semantics are those of `memory.slot_table`, so that a rollout
can be driven from the host with the same results. Vectors live in an index of the trajectory's
own: FAISS, one call an operation, or a NumPy matrix. Texts are embedded for all trajectories of
a turn at once, which no framework that asks an embedding service one by one does: a courtesy.

Keys lie on the grid of `memory.slot_table`, where a float32 dot product is exact; so peers show
the same entries as ours, but for the order in which an index lists ties.
"""

import dataclasses
import heapq
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from atommem_jax.config import MemoryConfig
from atommem_jax.memory.embedding import HashedBagOfTokens
from atommem_jax.memory.slot_table import GRID
from atommem_jax.types import EMPTY, ActionKind

Text = list[int]


@dataclasses.dataclass
class HostAction:
    """One action as parsed on the host."""

    kind: ActionKind
    target: int = 0
    text: Text = dataclasses.field(default_factory=list)
    well_formed: bool = True


class Index(Protocol):
    """Vectors by slot."""

    def put(self, slot: int, key: np.ndarray) -> None:
        """Adds the vector [D], or replaces the one there."""

    def fill(self, keys: np.ndarray) -> None:
        """Sets slots 0..n-1 to the rows of `keys` [n, D]."""

    def remove(self, slot: int) -> None:
        """Frees the slot."""

    def search(self, key: np.ndarray, count: int) -> list[int]:
        """At most `count` slots, the most similar first."""


class FaissIndex:
    """An exact FAISS index that adds, removes and searches by id."""

    def __init__(self, sizes: MemoryConfig):
        import faiss

        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(sizes.key_dim))
        self._used: set[int] = set()

    def put(self, slot: int, key: np.ndarray) -> None:
        ids = np.array([slot], np.int64)
        if slot in self._used:
            self._index.remove_ids(ids)
        self._index.add_with_ids(key[None], ids)
        self._used.add(slot)

    def fill(self, keys: np.ndarray) -> None:
        self._index.add_with_ids(keys, np.arange(len(keys), dtype=np.int64))
        self._used.update(range(len(keys)))

    def remove(self, slot: int) -> None:
        self._index.remove_ids(np.array([slot], np.int64))
        self._used.remove(slot)

    def search(self, key: np.ndarray, count: int) -> list[int]:
        _, ids = self._index.search(key[None], min(count, len(self._used)))
        return ids[0].tolist()


class NumpyIndex:
    """A matrix with a row a slot; a free row scores -1, below any cosine worth showing."""

    def __init__(self, sizes: MemoryConfig):
        self._keys = np.zeros((sizes.slots, sizes.key_dim), np.float32)
        self._offset = np.full(sizes.slots, -4.0, np.float32)
        self._used = 0

    def put(self, slot: int, key: np.ndarray) -> None:
        self._used += int(self._offset[slot] != 0)
        self._keys[slot] = key
        self._offset[slot] = 0.0

    def fill(self, keys: np.ndarray) -> None:
        self._keys[: len(keys)] = keys
        self._offset[: len(keys)] = 0.0
        self._used = len(keys)

    def remove(self, slot: int) -> None:
        self._offset[slot] = -4.0
        self._used -= 1

    def search(self, key: np.ndarray, count: int) -> list[int]:
        scores = self._keys @ key + self._offset
        count = min(count, self._used)
        if count < len(scores):
            best = np.argpartition(-scores, count - 1)[:count] if count else scores[:0].argsort()
        else:
            best = np.arange(len(scores))
        best = np.sort(best)  # so that equal scores go to the lower slot
        return best[np.argsort(-scores[best], kind="stable")].tolist()


class HostMemory:
    """One trajectory's memory. `retrieve` starts a turn and `apply` ends it."""

    def __init__(self, sizes: MemoryConfig, index: Callable[[MemoryConfig], Any]):
        self.sizes = sizes
        self.index: Index = index(sizes)
        # In order of age, the next to be evicted first: every touch moves an entry to the end.
        self.entries: dict[int, Text] = {}
        self.free = list(range(sizes.slots))  # a heap
        self.scratchpad: Text = []
        self.query: Text = []
        self.query_key: np.ndarray | None = None  # None: not embedded yet
        self.shown: list[int] = []

    def fill(self, texts: Sequence[Text], keys: np.ndarray) -> None:
        """Fills an empty table from slot 0 up: as many creates would, in one call."""
        self.entries = dict(enumerate(texts))
        self.free = list(range(len(texts), self.sizes.slots))
        self.index.fill(keys)

    def set_query(self, text: Text) -> None:
        """A new standing query, cut to its cap."""
        self.query, self.query_key = text[: self.sizes.query_length], None

    def retrieve(self) -> list[Text]:
        """Shows the entries nearest to the standing query; returns their texts, best first."""
        self.shown = []
        if self.query and self.entries:
            self.shown = self.index.search(self.query_key, self.sizes.shown)
            if self.sizes.eviction == "lru":
                for slot in sorted(self.shown):
                    self._touch(slot)
        return [self.entries[slot] for slot in self.shown]

    def apply(self, action: HostAction, permitted: frozenset, key: np.ndarray | None) -> bool:
        """Applies one action; `key` is that of its text if it is stored. Tells if it was done."""
        kind, text = action.kind, action.text
        if kind not in permitted or not action.well_formed:
            return False
        if not text and kind not in (ActionKind.DELETE, ActionKind.SCRATCHPAD):
            return False
        slot = EMPTY
        if kind in (ActionKind.UPDATE, ActionKind.DELETE):
            if not 1 <= action.target <= len(self.shown):
                return False
            slot = self.shown[action.target - 1]
            if slot == EMPTY:
                return False
        if kind == ActionKind.CREATE:
            if not self.free and self.sizes.eviction == "reject":
                return False
            slot = self._make_room()
            self.entries[slot] = text[: self.sizes.entry_length]
            self.index.put(slot, key)
        elif kind == ActionKind.UPDATE:
            self.entries[slot] = text[: self.sizes.entry_length]
            if self.sizes.eviction == "lru":
                self._touch(slot)
            self.index.put(slot, key)
        elif kind == ActionKind.DELETE:
            self._forget(slot)
            self.index.remove(slot)
            heapq.heappush(self.free, slot)
        elif kind == ActionKind.READ:
            self.set_query(text)
        elif kind == ActionKind.SCRATCHPAD:
            self.scratchpad = text[: self.sizes.scratchpad_length]
        return True

    def _touch(self, slot: int) -> None:
        self.entries[slot] = self.entries.pop(slot)

    def _make_room(self) -> int:
        if self.free:
            return heapq.heappop(self.free)
        slot = next(iter(self.entries))
        self._forget(slot)
        return slot

    def _forget(self, slot: int) -> None:
        """The entry can no longer be reached through its number, whoever takes the slot."""
        del self.entries[slot]
        self.shown = [EMPTY if shown == slot else shown for shown in self.shown]


class HostEmbedding:
    """The keys of `HashedBagOfTokens`, bit for bit, in NumPy; on the grid of the table."""

    def __init__(self, embed: HashedBagOfTokens):
        # The text of one token embeds to its signs, divided by the root of the width.
        tokens = jnp.arange(embed.vocab_size, dtype=jnp.int32)[:, None]
        keys = embed(tokens, jnp.ones(embed.vocab_size, jnp.int32))
        signs = np.sign(np.asarray(keys))
        if embed.weights:
            signs *= np.frombuffer(embed.weights, np.uint8)[:, None]
        self._signs = np.concatenate([signs, np.zeros((1, embed.dim), np.float32)])
        self._pad = embed.vocab_size

    def __call__(self, texts: Sequence[Text]) -> np.ndarray:
        """Keys [n, D] of texts, in one call; float32 sums of signs are exact."""
        width = max(map(len, texts), default=0)
        tokens = np.array([text + [self._pad] * (width - len(text)) for text in texts], np.intp)
        return self.embed_padded(tokens.reshape(len(texts), width))

    def embed_padded(self, tokens: np.ndarray) -> np.ndarray:
        """Keys of token ids [n, L] in which `vocab_size` marks padding."""
        sums = np.zeros((len(tokens), self._signs.shape[1]), np.float32)
        for column in tokens.T:  # a gather of one column stays within the cache
            sums += self._signs[column]
        square = np.maximum(np.einsum("nd,nd->n", sums, sums), 1.0)
        return np.rint(sums / np.sqrt(square)[:, None] / GRID) * np.float32(GRID)


def retrieve_all(memories: Sequence[HostMemory], embed: HostEmbedding) -> list[list[Text]]:
    """Starts a turn of several trajectories: embeds new queries, then searches one by one."""
    fresh = [memory for memory in memories if memory.query_key is None]
    if fresh:
        keys = embed([memory.query for memory in fresh])
        for memory, key in zip(fresh, keys, strict=True):
            memory.query_key = key
    return [memory.retrieve() for memory in memories]


def apply_all(
    memories: Sequence[HostMemory],
    actions: Sequence[Sequence[HostAction]],
    permitted: Sequence[frozenset],
    embed: HostEmbedding,
) -> list[list[bool]]:
    """Ends a turn: embeds all new entries, then applies actions one by one, in order."""
    stored = (ActionKind.CREATE, ActionKind.UPDATE)
    texts = [
        action.text[: memory.sizes.entry_length]
        for memory, written in zip(memories, actions, strict=True)
        for action in written
        if action.kind in stored
    ]
    keys = iter(embed(texts) if texts else ())
    return [
        [
            memory.apply(action, allowed, next(keys) if action.kind in stored else None)
            for action in written
        ]
        for memory, written, allowed in zip(memories, actions, permitted, strict=True)
    ]
