"""The slot tables of all trajectories as NumPy arrays, changed in place: the strongest host rival.

What one would write by hand without JAX: retrieval is one batched product, and each of the A
actions of a turn is a handful of masked writes over all trajectories at once.
"""

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from atommem_jax.config import MemoryConfig
from atommem_jax.types import EMPTY, ActionKind
from experiments.benchmarks.host_memory import HostEmbedding


class NumpyTables:
    """B tables with the semantics of `memory.slot_table`."""

    def __init__(self, count: int, sizes: MemoryConfig, embed: HostEmbedding, pad_key: int):
        """`pad_key` is the id by which `embed` knows padding; texts are stored with it."""
        s, b = sizes, count
        self.sizes, self.embed, self.pad = sizes, embed, pad_key
        self.entries = np.full((b, s.slots, s.entry_length), pad_key, np.int32)
        self.keys = np.zeros((b, s.slots, s.key_dim), np.float32)
        self.valid = np.zeros((b, s.slots), bool)
        self.created = np.zeros((b, s.slots), np.int32)
        self.touched = np.zeros((b, s.slots), np.int32)
        self.clock = np.zeros(b, np.int32)
        self.scratchpad = np.full((b, s.scratchpad_length), pad_key, np.int32)
        self.query = np.full((b, s.query_length), pad_key, np.int32)
        self.query_key = np.zeros((b, s.key_dim), np.float32)
        self.stale = np.ones(b, bool)  # the query has not been embedded yet
        self.shown = np.full((b, s.shown), EMPTY, np.int32)

    def fill(self, entries: Int[Array, "B N L"], keys: Float[Array, "B N D"]) -> None:
        """Fills empty tables from slot 0 up, one create after the other."""
        count = entries.shape[1]
        self.entries[:, :count], self.keys[:, :count] = entries, keys
        self.valid[:, :count] = True
        self.created[:, :count] = self.touched[:, :count] = np.arange(1, count + 1)
        self.clock[:] = count

    def set_query(self, rows: Int[Array, " n"], query: Int[Array, "n W"]) -> None:
        """New standing queries, padded with the pad key and cut to their cap."""
        width = min(self.sizes.query_length, query.shape[1])
        self.query[rows] = self.pad
        self.query[rows, :width] = query[:, :width]
        self.stale[rows] = True

    def retrieve(self) -> Int[Array, "B K L"]:
        """Shows the entries nearest to the standing query; returns their texts, best first."""
        (rows,) = np.nonzero(self.stale)
        if len(rows):
            self.query_key[rows] = self.embed.embed_padded(self.query[rows])
            self.stale[:] = False
        scores = np.matmul(self.keys, self.query_key[:, :, None])[..., 0]
        candidates = self.valid & (self.query[:, :1] != self.pad)
        scores = np.where(candidates, scores, -np.inf)
        count = self.sizes.shown
        best = np.arange(scores.shape[1])[None].repeat(len(scores), axis=0)
        if count < scores.shape[1]:
            best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        best = np.sort(best, axis=1)  # so that equal scores go to the lower slot
        top = np.take_along_axis(scores, best, axis=1)
        order = np.argsort(-top, axis=1, kind="stable")
        best, found = (np.take_along_axis(x, order, axis=1) for x in (best, top > -np.inf))
        self.clock += found.any(axis=1)
        row, column = np.nonzero(found)
        self.touched[row, best[row, column]] = self.clock[row]
        self.shown = np.where(found, best, EMPTY)
        texts = np.take_along_axis(self.entries, np.maximum(self.shown, 0)[..., None], axis=1)
        return np.where(found[..., None], texts, self.pad)

    def transition(
        self,
        kind: Int[Array, "B A"],
        target: Int[Array, "B A"],
        text: Int[Array, "B A X"],
        permitted: Bool[Array, " kinds"],
    ) -> Bool[Array, "B A"]:
        """Applies the actions in order; texts are padded with the pad key. Tells what applied."""
        width = self.sizes.entry_length
        entry = np.full((*kind.shape, width), self.pad, np.int32)
        entry[..., : min(width, text.shape[2])] = text[..., :width]
        stored = np.isin(kind, (ActionKind.CREATE, ActionKind.UPDATE))
        keys = np.zeros((*kind.shape, self.sizes.key_dim), np.float32)
        keys[stored] = self.embed.embed_padded(entry[stored])
        optional = np.isin(kind, (ActionKind.DELETE, ActionKind.SCRATCHPAD))
        sound = permitted[kind] & (optional | (text[..., 0] != self.pad))
        applied = np.zeros(kind.shape, bool)
        for a in range(kind.shape[1]):
            applied[:, a] = self._apply(
                kind[:, a], target[:, a], entry[:, a], keys[:, a], text[:, a], sound[:, a]
            )
        return applied

    def _apply(self, kind, target, entry, keys, text, sound):
        """One action of every trajectory."""
        everyone = np.arange(len(kind))
        in_range = (target >= 1) & (target <= self.sizes.shown)
        aimed = self.shown[everyone, np.clip(target - 1, 0, self.sizes.shown - 1)]
        aimed = np.where(in_range, aimed, EMPTY)
        create = sound & (kind == ActionKind.CREATE)
        update = sound & (kind == ActionKind.UPDATE) & (aimed != EMPTY)
        delete = sound & (kind == ActionKind.DELETE) & (aimed != EMPTY)
        read = sound & (kind == ActionKind.READ)
        note = sound & (kind == ActionKind.SCRATCHPAD)
        if self.sizes.eviction == "reject":
            create &= ~self.valid.all(axis=1)
        applied = create | update | delete | read | note
        self.clock += applied

        (new,) = np.nonzero(create)
        if len(new):
            full = self.valid[new].all(axis=1)
            age = self.created if self.sizes.eviction == "oldest" else self.touched
            room = np.where(full, age[new].argmin(axis=1), self.valid[new].argmin(axis=1))
            self._hide(new[full], room[full])
            self.created[new, room] = self.clock[new]
            self._write(new, room, entry, keys)
        (old,) = np.nonzero(update)
        self._write(old, aimed[old], entry, keys)
        (gone,) = np.nonzero(delete)
        self.valid[gone, aimed[gone]] = False
        self._hide(gone, aimed[gone])
        (asked,) = np.nonzero(read)
        self.set_query(asked, text[asked])
        (noted,) = np.nonzero(note)
        width = min(self.sizes.scratchpad_length, text.shape[1])
        self.scratchpad[noted] = self.pad
        self.scratchpad[noted, :width] = text[noted, :width]
        return applied

    def _write(self, rows, slots, entry, keys) -> None:
        self.entries[rows, slots] = entry[rows]
        self.keys[rows, slots] = keys[rows]
        self.valid[rows, slots] = True
        self.touched[rows, slots] = self.clock[rows]

    def _hide(self, rows, slots) -> None:
        """Entries that are gone can no longer be reached through their numbers."""
        shown = self.shown[rows]
        self.shown[rows] = np.where(shown == slots[:, None], EMPTY, shown)
