"""Low-rank adaptation (Hu et al., 2021): a frozen base, and a small trainable part beside it.

A matrix W [in, out] of the base gets two more, A [in, rank] and B [rank, out], and the layer
computes x W + (alpha / rank) (x A) B: the branch lies in `model.Adapter`. A starts random and B
at zero, so that training starts from the base. What is trained are the adapters and the value
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

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

PyTree = Any

SUFFIX = "_lora"
"""Of a matrix' name, for the name of its adapter."""

LAYERS = ("query", "key", "value", "out", "gate", "up", "down")
"""Names of the matrices of a layer: the default targets."""

_TRAINABLE = re.compile(rf"(^|/)\w+{SUFFIX}/[ab]$|^value_head/")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which matrices are adapted, and how."""

    rank: int = 0  # 0 turns it off: all parameters are trained
    alpha: float = 16.0  # the branch is scaled by alpha / rank
    # Regular expressions for the names of matrices: the end of a path, from a slash on.
    targets: tuple[str, ...] = LAYERS
    base_dtype: str = "float32"  # that the frozen part is kept in while it is trained on

    def validate(self, matrices: Sequence[str], dtype: str, prefix: str = "lora") -> None:
        """Raises ValueError, naming field, value and allowed values.

        Args:
          matrices: paths that can be adapted, such as those of `ModelConfig.matrices`.
          dtype: that the model computes in.
          prefix: of the fields' names.
        """
        if self.rank < 0 or self.alpha <= 0:
            raise ValueError(
                f"{prefix}.rank={self.rank} and {prefix}.alpha={self.alpha}: allowed are a rank of "
                "0 (off) or more, and an alpha above 0"
            )
        if self.base_dtype not in ("float32", dtype):
            raise ValueError(
                f"{prefix}.base_dtype={self.base_dtype!r}: allowed are 'float32' and "
                f"model.dtype={dtype!r}, to which the base is cast anyway where it is used"
            )
        if not self.rank:
            return
        if not self.targets:
            raise ValueError(
                f"{prefix}.targets is empty and {prefix}.rank={self.rank}: name some of "
                f"{', '.join(matrices)}, or set {prefix}.rank=0"
            )
        for target in self.targets:
            try:
                found = any(_matches(target, path) for path in matrices)
            except re.error as error:
                raise ValueError(
                    f"{prefix}.targets: {target!r} is no regular expression ({error})"
                ) from error
            if not found:
                raise ValueError(
                    f"{prefix}.targets: {target!r} matches no matrix of the model; there are "
                    f"{', '.join(matrices)}"
                )

    def adapts(self, path: str) -> bool:
        """Whether the matrix at `path`, such as 'layers/query', has an adapter."""
        return self.rank > 0 and any(_matches(target, path) for target in self.targets)

    @property
    def scale(self) -> float:
        """Of the branch."""
        return self.alpha / self.rank if self.rank else 0.0


def _matches(target: str, path: str) -> bool:
    return re.search(rf"(^|/)({target})$", path) is not None


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

    def walk(tree: PyTree) -> PyTree:
        merged = {}
        for name, part in tree.items():
            if name.endswith(SUFFIX):
                continue
            adapter = tree.get(name + SUFFIX)
            if adapter is not None:
                change = _product(adapter, config.scale)
                merged[name] = jax.tree.map(lambda w, d=change: w.astype(jnp.float32) + d, part)
            elif isinstance(part, Mapping):
                merged[name] = walk(part)
            else:
                merged[name] = part.astype(jnp.float32)
        return merged

    return walk(params)


def _product(adapter: Mapping[str, Array], scale: float) -> Float[Array, "*layers in out"]:
    # A TPU would multiply float32 in bfloat16: too coarse for what is added to a weight.
    a, b = adapter["a"].astype(jnp.float32), adapter["b"].astype(jnp.float32)
    return scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
