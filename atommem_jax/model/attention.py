"""Softmax attention: plain einsums anywhere, a blocked Pallas kernel for long prompts on TPU, and
what JAX has for GPUs.

Rows are left-padded (see `transformer`): `start[b]` is the first column of row b that holds a
token. The implementations of `causal` agree on columns that hold a token; what they give for
padding is finite and read by nothing.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from atommem_jax.model.quantized import Quantized, Stored, dequantize
from atommem_jax.parallel import program

IMPLEMENTATIONS = ("auto", "plain", "splash", "fused")

SAVED = "attention"
"""Name of the kernel's results, for a rematerialisation policy that keeps them."""

LANES = 128
"""The kernel's lengths are multiples of this."""

_LONG = 1024  # columns from which "auto" takes the kernel
_BLOCK = 512  # at most, queries and keys a step of the kernel
_SHARE, _LEAST = 8, 128  # plain: at most so many blocks of queries, of at least so many columns
_MASKED = -1e30  # finite, so that a row with nothing to attend to stays free of NaN


Before = tuple[Stored, Stored, Bool[Array, "B 1 F"]]
"""Keys and values [B kv_heads F depth] that all columns may attend to, and which there are."""


def attend(
    queries: Float[Array, "B heads T depth"],
    keys: Sequence[Stored],
    values: Sequence[Stored],
    mask: Bool[Array, "B T S"],
    before: Before | None = None,
    *,
    key_axes: str = "sd",
) -> Float[Array, "B heads T depth"]:
    """Softmax attention; each key/value head serves heads / kv_heads query heads.

    keys, values: [B kv_heads _ depth] in one or more pieces, which have S slots together. In int8
      they have a scale a head and slot, which scores and weights are multiplied by.
    before: a piece more, before them.
    key_axes: "ds" where the keys are [B kv_heads depth _].
    """
    if before is not None:
        there = jnp.broadcast_to(before[2], (*mask.shape[:2], before[2].shape[2]))
        keys, values = (before[0], *keys), (before[1], *values)
        mask = jnp.concatenate([there, mask], axis=2)
    batch, heads, length, depth = queries.shape
    kv_heads = keys[0].shape[1]
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads, length, depth)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def score(piece):
        if not isinstance(piece, Quantized):
            return dot(f"bkgtd,bk{key_axes}->bkgts", grouped, piece)
        plain = piece.values.astype(queries.dtype)
        return dot(f"bkgtd,bk{key_axes}->bkgts", grouped, plain) * _by_slot(piece.scale)

    def combine(weights, piece):
        if isinstance(piece, Quantized):
            weights, piece = weights * _by_slot(piece.scale), piece.values
        dtype = queries.dtype
        return dot("bkgts,bksd->bkgtd", weights.astype(dtype), piece.astype(dtype))

    scores = jnp.concatenate([score(piece) for piece in keys], axis=-1) * depth**-0.5
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    ends = np.cumsum([piece.shape[2] for piece in values])[:-1]
    pieces = zip(jnp.split(weights, ends, axis=-1), values, strict=True)
    # Divided in the end: there are fewer channels than slots, and less to differentiate.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = functools.reduce(jnp.add, [combine(w, v) for w, v in pieces]) / total
    return out.reshape(batch, heads, length, depth).astype(queries.dtype)


def _by_slot(scale: Array) -> Float[Array, "B kv_heads 1 1 S"]:
    """A scale a slot as scores and weights have it, whether slots lie in rows or columns."""
    return scale.reshape(*scale.shape[:2], 1, 1, -1)


def causal(
    queries: Float[Array, "B heads T depth"],
    keys: Float[Array, "B kv_heads T depth"],
    values: Float[Array, "B kv_heads T depth"],
    start: Int[Array, " B"],
    before: Before | None = None,
    *,
    implementation: str = "auto",
    interpret: bool = False,
) -> Float[Array, "B heads T depth"]:
    """Attention of whole rows to themselves and what came before, from column `start` on.

    before: what stands before the rows.
    implementation: "splash" never holds T x T scores and needs T to be a multiple of `LANES`;
      "plain" computes scores in blocks of queries, each with the keys up to its end: half of the
      work, in pieces that stay in a CPU's cache; "fused" is what JAX has for GPUs, with cuDNN's
      kernel where that takes the inputs; "auto" takes "splash" on a TPU for rows of 1,024 columns
      and more, and "fused" on a GPU.
    interpret: runs the kernel's program without a TPU, slowly.

    Raises ValueError for a length that the kernel cannot have.
    """
    length = queries.shape[2]
    if _use_splash(implementation, length):
        if length % LANES:
            raise ValueError(
                f"model.attention={implementation!r} needs rows of a multiple of {LANES} columns, "
                f"found {length}; pad them, or set model.attention='plain'"
            )
        kernel = functools.partial(_splash, interpret=interpret)
        real = jnp.arange(length, dtype=jnp.int32)[None] >= start[:, None]
        if before is not None:
            keys, values = _put_before(before, keys, values)
            real = jnp.concatenate([before[2][:, 0], real], axis=1)
        heads, shared = ("rows", "heads", None, None), ("rows", "kv_heads", None, None)
        run = program.by_hand(kernel, specs=(heads, shared, shared, ("rows", None)), out=heads)
        return run(queries, keys, values, real)
    if _use_fused(implementation):
        return _fused(queries, keys, values, start, before)
    blocks = []
    for first in range(0, length, block := query_block(length)):
        last = min(first + block, length)
        columns = jnp.arange(last, dtype=jnp.int32)
        mask = (columns[None, None, :] <= columns[None, first:, None]) & (
            columns[None, None, :] >= start[:, None, None]
        )
        seen = (keys[:, :, :last],), (values[:, :, :last],)
        blocks.append(attend(queries[:, :, first:last], *seen, mask, before))
    return jnp.concatenate(blocks, axis=2)


def _put_before(before: Before, keys: Array, values: Array) -> tuple[Array, Array]:
    """Keys and values in one piece, for kernels that know of no scales."""
    first = (dequantize(x, keys.dtype) for x in before[:2])
    pairs = zip(first, (keys, values), strict=True)
    joined = [jnp.concatenate(pair, axis=2) for pair in pairs]
    return joined[0], joined[1]


def query_block(length: int) -> int:
    """Queries that "plain" takes at a time, of rows of `length` columns."""
    return max(-(-length // _SHARE), _LEAST)


def row_multiple(implementation: str, length: int) -> int:
    """What the length of rows of about `length` columns should be a multiple of."""
    return LANES if _use_splash(implementation, length) else 1


def _use_splash(implementation: str, length: int) -> bool:
    if implementation == "auto":
        return program.platform() == "tpu" and length >= _LONG
    return implementation == "splash"


def _use_fused(implementation: str) -> bool:
    if implementation == "auto":
        return program.platform() == "gpu"
    return implementation == "fused"


def _fused(queries, keys, values, start, before):
    """`jax.nn.dot_product_attention`, whose axes are [B T heads depth]."""
    columns = jnp.arange(queries.shape[2], dtype=jnp.int32)
    real = columns[None] >= start[:, None]
    # Padding attends to itself: no row is without anything to attend to.
    ahead = (columns[None, :] - columns[:, None])[None]
    mask = ((ahead < 0) & real[:, None]) | (ahead == 0)
    if before is not None:
        keys, values = _put_before(before, keys, values)
        there = jnp.broadcast_to(before[2], (*mask.shape[:2], before[2].shape[2]))
        mask = jnp.concatenate([there, mask], axis=2)
    depth = queries.shape[3]
    takes = queries.dtype in (jnp.bfloat16, jnp.float16) and depth <= 128 and depth % 8 == 0
    queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))
    out = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        mask=mask[:, None],
        implementation="cudnn" if takes and program.platform() == "gpu" else "xla",
    )
    return out.swapaxes(1, 2)


def _splash(queries, keys, values, real, *, interpret):
    """The kernel on one device's rows and heads; `real` says which keys there are [B F + T]."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import, seldom needed

    _, heads, length, depth = queries.shape
    count = keys.shape[2]
    block = next(b for b in (_BLOCK, 256, LANES) if length % b == 0 and count % b == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash_attention.MultiHeadMask(
        [splash_attention.CausalMask((length, count), count - length) for _ in range(heads)]
    )
    kernel = splash_attention.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=SAVED, interpret=interpret
    )
    # Padding attends to padding: no row is without anything to attend to.
    segments = real.astype(jnp.int32)
    run = jax.vmap(
        lambda q, k, v, s: kernel(q, k, v, splash_attention.SegmentIds(s[count - length :], s))
    )
    return run(queries * jnp.asarray(depth**-0.5, queries.dtype), keys, values, segments)
