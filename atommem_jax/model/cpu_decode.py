"""Decoding as a CPU wants it: the layers unstacked, their matrices and keys the other way round.

A loop that runs stacked layers copies the matrices of each before it uses them, where the compiler
cannot multiply by a part of an array, as on a CPU: three times the memory traffic of decoding. And
a few rows are multiplied nearly twice as fast there if what they meet lies in columns: matrices
[out, in] come first in the product, and keys are kept [head_width, slots].

So before the loop `arrange_params` and `arrange_cache` put both so, and `forward` and `logits` take
the place of `Transformer.__call__` and `Transformer.logits` for a few tokens a row. The mathematics
is that of `transformer`; nothing of it is written here again. `SamplerConfig.cpu_decode` turns it
on.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from atommem_jax.model import attention
from atommem_jax.model.kv_cache import (
    Cache,
    Prefix,
    count_positions,
    like_stored,
    list_slots,
    mask_slots,
    write_slots,
)
from atommem_jax.model.matrices import dot_general, multiply
from atommem_jax.model.quantized import Stored, swap_axes
from atommem_jax.model.transformer import Block, Transformer


@flax.struct.dataclass
class CpuParams:
    """Parameters of a model, and once more those of its layers."""

    whole: Any  # as `Transformer` has them
    layers: tuple[Any, ...]  # of each layer, matrices [out, in]


@flax.struct.dataclass
class CpuLayer:
    """What a `Cache` holds of one layer, keys in columns."""

    keys: Stored  # [B kv_heads head_width slots]
    values: Stored  # [B kv_heads slots head_width]
    later_keys: Stored  # [B kv_heads head_width more]
    later_values: Stored  # [B kv_heads more head_width]
    prefix: Prefix | None  # with its keys in columns


@flax.struct.dataclass
class CpuCache:
    """What a `Cache` holds."""

    layers: tuple[CpuLayer, ...]
    recent: Int[Array, "B token_shift"]  # the last tokens, oldest first

    @property
    def prompt_slots(self) -> int:
        """Slots that are only read."""
        return self.layers[0].values.shape[2]


def arrange_params(params: Any) -> CpuParams:
    """Call it outside of the loop, in which nothing of it should be done again."""
    stacked = params["layers"]
    count = jax.tree.leaves(stacked)[0].shape[0]
    layers = (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count))
    return CpuParams(params, tuple(map(_transpose_matrices, layers)))


def _transpose_matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.T if x.ndim == 2 else x, params)


def arrange_cache(cache: Cache) -> CpuCache:
    prefix = cache.prefix
    if prefix is not None:
        prefix = prefix.replace(keys=swap_axes(prefix.keys, 3, 4))
    keys, later_keys = swap_axes(cache.keys, 3, 4), swap_axes(cache.later_keys, 3, 4)
    stacked = keys, cache.values, later_keys, cache.later_values

    def take(i: int) -> CpuLayer:
        keys, values, later_keys, later_values = jax.tree.map(lambda x: x[i], stacked)
        before = None if prefix is None else prefix.of_layer(i)
        return CpuLayer(keys, values, later_keys, later_values, before)

    return CpuCache(tuple(take(i) for i in range(cache.values.shape[0])), cache.recent)


def forward(
    model: Transformer,
    params: CpuParams,
    tokens: Int[Array, "B T"],
    start: Int[Array, " B"],
    *,
    features: Bool[Array, "B T F"] | None,
    cache: CpuCache,
    index: Int[Array, "*B"],
) -> tuple[Float[Array, "B T width"], CpuCache]:
    """`Transformer.__call__` with a cache, one layer after the other instead of in a scan."""

    prompt_slots, prefix = cache.prompt_slots, cache.layers[0].prefix
    more = cache.layers[0].later_values.shape[2]

    def run(model: Transformer) -> tuple[Array, CpuCache]:
        window = jnp.concatenate([cache.recent, tokens], axis=1)
        x = model.embed(window, features)
        slots = list_slots(index, tokens.shape[1])
        positions = count_positions(start, slots, prefix)
        mask = mask_slots(start, slots, prompt_slots + more)
        block = _CpuBlock(model.config, True, multiply_rows, parent=None)
        layers = []
        for own, layer in zip(cache.layers, params.layers, strict=True):
            variables = {"params": _transpose_matrices(layer)}
            x, (keys, values) = block.apply(
                variables, x, own, start, positions, mask, index - prompt_slots
            )
            layers.append(own.replace(later_keys=keys, later_values=values))
        return model.final_norm(x), CpuCache(tuple(layers), window[:, tokens.shape[1] :])

    return model.apply({"params": params.whole}, method=run)


class _CpuBlock(Block):
    """A layer whose cache has its keys in columns."""

    @nn.nowrap
    def attend_cached(self, q, k, v, cache, mask, index):
        k = like_stored(cache.later_keys, jnp.swapaxes(k, 2, 3), axis=2)
        v = like_stored(cache.later_values, v, axis=3)
        k = write_slots(cache.later_keys, k, index, axis=3)
        v = write_slots(cache.later_values, v, index, axis=2)
        pieces = (cache.keys, k), (cache.values, v)
        before = None if cache.prefix is None else cache.prefix.before
        return attention.attend(q, *pieces, mask, before, key_axes="ds"), (k, v)


def logits(
    model: Transformer, params: CpuParams, hidden: Float[Array, "B width"]
) -> Float[Array, "B V"]:
    """`Transformer.logits` of a few rows."""
    # The table of a tied model lies [V, width] already; a cast of it would be a copy.
    in_columns = model.config.tie_embeddings and hidden.dtype == jnp.float32
    product = multiply_rows if in_columns else multiply
    return model.apply({"params": params.whole}, hidden, product=product, method="logits")


def multiply_rows(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
    """`matrices.dot_general` of rows [B, in] or [B, T, in] and a matrix, which comes first.

    The matrix should be the transpose of one that lies [out, in]. The barriers keep the compiler
    from turning the product round.
    """
    assert dimension_numbers == (((lhs.ndim - 1,), (0,)), ((), ()))
    rows = lhs.reshape(-1, lhs.shape[-1])
    columns = jax.lax.optimization_barrier(rows.T)
    contracted = (((1,), (0,)), ((), ()))
    out = dot_general(rhs.T, columns, contracted, precision, preferred_element_type)
    return jax.lax.optimization_barrier(out).T.reshape(*lhs.shape[:-1], -1)
