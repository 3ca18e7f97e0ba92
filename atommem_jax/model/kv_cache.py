"""What a row has been through: the keys and values of its tokens, at their slots.

A row is addressed by *slots*: prompts are left-padded to a common width, so that decoding writes
the same slot in every row. `start[b]` is the first slot of row b that holds a token; its rotary
position is 0. That one integer per row gives positions and the attention mask.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from atommem_jax.model import attention
from atommem_jax.model.quantized import Quantized, Stored, quantize
from atommem_jax.parallel.program import constrain


@flax.struct.dataclass
class Prefix:
    """Keys and values of what a row begins with, for all layers; within a layer, its own.

    They stand before the row's first slot, and may be those of several rows that begin alike.
    """

    keys: Stored  # [*layers B kv_heads F head_width]
    values: Stored  # the same
    length: Int[Array, " B"]  # tokens: the first of the F

    @property
    def before(self) -> attention.Before:
        """What attention gets of one layer."""
        there = jnp.arange(self.values.shape[-2])[None, None] < self.length[:, None, None]
        return self.keys, self.values, there

    def repeat_length(self) -> "Prefix":
        """The length once for each layer, as a scan over layers wants it."""
        layers = self.values.shape[0]
        return self.replace(length=jnp.broadcast_to(self.length, (layers, *self.length.shape)))

    def place_by_rows(self, heads: int) -> "Prefix":
        """Each device has all `heads` of some rows, and each head once: not its copies."""

        def place(x: Array) -> Array:
            return constrain(x[:, :, :: x.shape[2] // heads], None, "rows", None, None, None)

        keys, values = jax.tree.map(place, (self.keys, self.values))
        return self.replace(keys=keys, values=values)

    def of_layer(self, i: int | Int[Array, ""]) -> "Prefix":
        """What one layer has of it."""
        keys, values = jax.tree.map(lambda x: x[i], (self.keys, self.values))
        return self.replace(keys=keys, values=values)


@flax.struct.dataclass
class Cache:
    """Keys and values of the slots written so far, for all layers; within a layer, its own.

    Those of the prompt are written once and then only read: decoding would spend most of its time
    copying them from step to step. What it writes lies apart, in the slots behind them.

    In int8 a head has a scale at every slot, see `quantized`.
    """

    keys: Stored  # [*layers B kv_heads slots head_width]
    values: Stored  # the same
    later_keys: Stored  # [*layers B kv_heads more head_width]
    later_values: Stored  # the same
    recent: Int[Array, "B token_shift"]  # the last tokens, oldest first
    prefix: Prefix | None = None  # before the first slot

    @property
    def prompt_slots(self) -> int:
        """Slots that are only read."""
        return self.values.shape[-2]

    @property
    def slots(self) -> int:
        """All slots, written or not."""
        return self.prompt_slots + self.later_values.shape[-2]

    def extend(self, slots: int) -> "Cache":
        """Room for `slots` more slots, which hold zeros until they are written."""
        pad = [(0, 0)] * 3 + [(0, slots), (0, 0)]
        later = self.later_keys, self.later_values
        keys, values = jax.tree.map(lambda x: jnp.pad(x, pad), later)
        return self.replace(later_keys=keys, later_values=values)


def list_slots(index: int | Int[Array, "*B"], length: int) -> Int[Array, "#B T"]:
    """The slots index .. index + length - 1, of every row or of each row."""
    return jnp.reshape(index, (-1, 1)) + jnp.arange(length, dtype=jnp.int32)[None]


def count_positions(
    start: Int[Array, " B"], slots: Int[Array, "#B T"], prefix: Prefix | None = None
) -> Int[Array, "B T"]:
    """Rotary positions of the tokens at `slots`: a row's first token has 0, or follows a prefix."""
    before = 0 if prefix is None else prefix.length[:, None]
    return jnp.maximum(slots - start[:, None], 0) + before


def mask_slots(
    start: Int[Array, " B"], slots: Int[Array, "#B T"], count: int
) -> Bool[Array, "B T count"]:
    """Which of a cache's `count` slots the tokens at `slots` attend to: none later than theirs."""
    key_slots = jnp.arange(count, dtype=jnp.int32)
    return (key_slots[None, None, :] <= slots[:, :, None]) & (
        key_slots[None, None, :] >= start[:, None, None]
    )


def mask_pieces(
    start: Int[Array, " B"], slots: Int[Array, "#B T"], count: int
) -> Bool[Array, "B T count+T"]:
    """`mask_slots` where what stands at `slots` is not among the cache's, but follows them."""
    first = jnp.broadcast_to(slots[:, :1], slots.shape)
    written = mask_slots(start, first - 1, count)
    new = (slots[:, None, :] <= slots[:, :, None]) & (slots[:, None, :] >= start[:, None, None])
    return jnp.concatenate([written, new], axis=2)


def like_stored(old: Stored, new: Array, *, axis: int) -> Stored:
    """`new` as `old` is kept: where that is int8, with a scale for the vectors along `axis`."""
    return quantize(new, axis=axis) if isinstance(old, Quantized) else new


def write_slots(
    old: Stored, new: Stored, index: int | Int[Array, "*B"], *, axis: int, rows: int = 0
) -> Stored:
    """`old` with `new` at `index` of an axis, the same in every row or one for each.

    rows: the axis that they lie along.
    """

    def write(old, new):
        if jnp.ndim(index) == 0:
            return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis)
        write_row = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
        return jax.vmap(write_row, (rows, rows, 0), rows)(old, new, index)

    return jax.tree.map(write, old, new)
