"""Low-rank adaptation (Hu et al., 2021): a frozen base, and a small trainable part beside it.

A matrix W [in, out] of the base gets two more, A [in, rank] and B [rank, out], and the layer
computes x W + (alpha / rank) (x A) B: the branch lies in `matrices.Adapter`. A starts random
and B at zero, so that training starts from the base. What is trained are the adapters and the value
head, which no base that was published has; everything else is frozen. It has no gradient and no
moments, and it is in no checkpoint: `fingerprint` says which base the adapters belong to.

Parameters stay one tree of nested dicts. The adapter of `layers/query/kernel` is
`layers/query_lora/a` and `layers/query_lora/b`, those of the embedding and of an untied readout
are `embedder_lora` and `head_lora`. Three functions go between the forms of it:

    partition: all parameters → (trainable, frozen)       what a step differentiates, and the rest
    join:      (trainable, frozen) → all parameters       what the learner computes with
    merge:     all parameters → those of a plain model    W + ΔW: for exports, and for rollouts
                                                          of a model that computes in float32

With `rank` 0 there are no adapters: the frozen part is None, and nothing is other than without.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from atommem_jax.config import LoraConfig

PyTree = Any

SUFFIX = "_lora"
"""Of a matrix' name, for the name of its adapter."""

_TRAINABLE = re.compile(rf"(^|/)\w+{SUFFIX}/[ab]$|^value_head/")


def partition(params: PyTree, config: LoraConfig) -> tuple[PyTree, PyTree | None]:
    """(trainable, frozen): nested dicts that share no leaf; (params, None) without adapters.

    Leaves may be arrays, shapes or placements.
    """
    if not config.rank:
        return params, None
    flat = traverse_util.flatten_dict(params, sep="/")
    trainable = {path: leaf for path, leaf in flat.items() if _TRAINABLE.search(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return _unflatten(trainable), _unflatten(frozen)


def join(trainable: PyTree, frozen: PyTree | None) -> PyTree:
    """All parameters; undoes `partition`.

    Raises ValueError for a leaf that both have.
    """
    if frozen is None:
        return trainable
    flat = traverse_util.flatten_dict(trainable, sep="/")
    rest = traverse_util.flatten_dict(frozen, sep="/")
    both = sorted(flat.keys() & rest.keys())
    if both:
        raise ValueError(
            f"parameter {both[0]} is trainable and frozen; pass the two parts of one `partition`"
        )
    return _unflatten(flat | rest)


def _unflatten(flat: Mapping[str, Any]) -> PyTree:
    return traverse_util.unflatten_dict(flat, sep="/")


def merge(params: PyTree, config: LoraConfig) -> PyTree:
    """Parameters of the plain model that computes the same: W + (alpha / rank) A B, in float32.

    All leaves come back as float32; `params` itself without adapters.
    """
    if not config.rank:
        return params

    flat = traverse_util.flatten_dict(params, sep="/")
    merged = {}
    for path, leaf in flat.items():
        if f"{SUFFIX}/" in path:
            continue
        merged[path] = leaf.astype(jnp.float32)
        module, _, name = path.rpartition("/")
        if name == "bias":  # beside its matrix, and not adapted
            continue
        for matrix in (path, module):  # a matrix is a leaf, or holds one
            if f"{matrix}{SUFFIX}/a" in flat:
                a, b = (flat[f"{matrix}{SUFFIX}/{factor}"] for factor in "ab")
                merged[path] += _product(a, b, config.scale)
    return _unflatten(merged)


def _product(
    a: Float[Array, "*layers in rank"], b: Float[Array, "*layers rank out"], scale: float
) -> Float[Array, "*layers in out"]:
    # A TPU would multiply float32 in bfloat16: too coarse for what is added to a weight.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
