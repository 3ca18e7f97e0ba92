"""Numbers in int8, with one float32 scale for all that lie along an axis.

Rollouts may keep two things so: the key/value cache, with a scale for each head and position, and
the matrices of the model, with one for each output channel. The scale makes the largest number of
its axis 127, and the others are rounded to whole ones: none is off by more than half a scale. A
product takes the int8 values as they are, and its result the scale.
"""

import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Int8

from atommem_jax.config import LAYERS

INT8 = "int8"

_LARGEST = 127
_MATRIX = re.compile(rf"layers/({'|'.join(LAYERS)})/kernel|embedder/embedding|head")


@flax.struct.dataclass
class Quantized:
    """`values * scale`. The axis that shares a scale stays, of length 1.

    So all that moves, cuts or joins axes other than that one does to the scale what it does to the
    values: map it over the leaves.
    """

    values: Int8[Array, "*shape"]
    scale: Float[Array, "*shape_but_for_the_axis"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape


Stored = Array | Quantized
"""What a cache holds."""


def quantize(x: Float[Array, "*shape"], axis: int) -> Quantized:
    """In int8, with one scale for what lies along `axis`; zeros have scale 0."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / _LARGEST
    values = jnp.round(x / jnp.where(scale > 0, scale, 1.0))
    return Quantized(values.astype(jnp.int8), scale)


def dequantize(x: Stored, dtype: Any) -> Array:
    """The numbers themselves, as `dtype`."""
    if isinstance(x, Quantized):
        return (x.values.astype(jnp.float32) * x.scale).astype(dtype)
    return x


def quantize_matrices(params: Any) -> Any:
    """Parameters whose matrices, embeddings and readout are int8, one scale an output channel.

    The scale lies beside what it belongs to: `layers/query/scale` of `layers/query/kernel`,
    `embedder/scale` of `embedder/embedding` and `head_scale` of `head`; `Transformer` looks for it
    there. A token is the channel of an embedding, which is read out with too. Everything else,
    adapters included, stays as it is.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in [path for path in flat if _MATRIX.fullmatch(path)]:
        module, _, leaf = path.rpartition("/")
        found = quantize(flat[path], axis=-1 if leaf == "embedding" else -2)
        flat[path] = found.values
        flat[f"{module}/scale" if module else f"{path}_scale"] = found.scale
    return traverse_util.unflatten_dict(flat, sep="/")


def swap_axes(x: Stored, first: int, second: int) -> Any:
    """`jnp.swapaxes` of plain numbers or int8 ones."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, first, second), x)
