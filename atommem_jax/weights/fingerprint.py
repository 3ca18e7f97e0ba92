"""Fingerprints of trees of arrays: which leaves changed, and whether two bases are the same.

They depend on paths, shapes, dtypes and every bit, and not on how an array is sharded.
"""

import collections
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

PyTree = Any


def describe(tree: PyTree) -> dict[str, list[Any]]:
    """Returns {path: [shape, dtype]} of the leaves; dataclasses and dicts give the same paths.

    Raises ValueError for a leaf that is no array, or is a typed PRNG key.
    """
    leaves = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(
                f"state leaf '{path}' is {leaf!r}, a {type(leaf).__name__}; a state holds arrays: "
                "wrap it with jnp.asarray and a dtype."
            )
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"state leaf '{path}' is a typed PRNG key ({leaf.dtype}); keep "
                "jax.random.key_data(key), which is uint32."
            )
        leaves[path] = [list(leaf.shape), str(leaf.dtype)]
    return leaves


def fingerprints(leaves: Sequence[Any]) -> list[int]:
    """A number for each array that a change of any one value, or of their order, changes.

    It depends on bits and places alone, not on how an array is sharded: a sum of integers.
    """
    together = collections.defaultdict(list)  # one program for all that lie on the same devices
    for number, leaf in enumerate(leaves):
        devices = frozenset(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else None
        together[devices].append(number)
    result = [0] * len(leaves)
    for numbers in together.values():
        sums = jax.device_get(_fingerprint_all([leaves[number] for number in numbers]))
        for number, found in zip(numbers, sums, strict=True):
            result[number] = int(found)
    return result


@jax.jit
def _fingerprint_all(leaves: list[Array]) -> list[UInt32[Array, ""]]:
    return [_fingerprint(leaf) for leaf in leaves]


def _fingerprint(leaf: Array) -> UInt32[Array, ""]:
    """Sums the value and place of every entry, mixed; sums of integers have no order."""
    width = 8 * leaf.dtype.itemsize
    if leaf.dtype == jnp.bool_:
        bits = leaf.astype(jnp.uint32)
    else:  # 8 bytes become two words
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{min(width, 32)}"))
        bits = bits.astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        # An index for each axis, and no reshape: that would move what is sharded.
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place * jnp.uint32(size) + along
    mixed = bits ^ (place * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> jnp.uint32(16)), dtype=jnp.uint32)


def describe_exactly(tree: PyTree) -> dict[str, list[Any]]:
    """Returns {path: [shape, dtype, fingerprint]}; see `describe`."""
    leaves = describe(tree)
    with jax.transfer_guard("allow"):
        numbers = fingerprints(jax.tree.leaves(tree))
    return {path: [*leaf, n] for (path, leaf), n in zip(leaves.items(), numbers, strict=True)}


def find_changed(saved: Mapping[str, list[Any]], tree: PyTree) -> list[str]:
    """Paths whose fingerprint is not the one saved; where none was saved, a leaf passes.

    saved: as `describe_exactly` returned it, or, from before there were any, `describe`.
    """
    paths = describe(tree)
    numbers = fingerprints(jax.tree.leaves(tree))
    return [
        path
        for path, number in zip(paths, numbers, strict=True)
        if saved[path][2:] not in ([], [number])
    ]


def find_differences(
    tree: PyTree, saved: Mapping[str, list[Any]], *, partial: bool = False
) -> list[str]:
    """What keeps `tree` from being filled with what was saved: a clause for each such leaf.

    Args:
      tree: of arrays or `jax.ShapeDtypeStruct`.
      saved: as `describe_exactly` returned it.
      partial: `tree` may be a part of what was saved.
    """
    asked = describe(tree)
    kept = {path: leaf[:2] for path, leaf in saved.items()}
    changed = [
        f"{path} is {_show(kept[path])}, asked for {_show(asked[path])}"
        for path in kept
        if path in asked and asked[path] != kept[path]
    ]
    unknown = [f"{path} {_show(asked[path])} was not saved" for path in asked if path not in kept]
    left_out = [f"{path} {_show(kept[path])} has no place" for path in kept if path not in asked]
    return changed + unknown + ([] if partial else left_out)


def _show(leaf: list[Any]) -> str:
    shape, dtype = leaf
    return f"{dtype}[{','.join(map(str, shape))}]"


def fingerprint_base(frozen: PyTree) -> str:
    """16 hexadecimal digits that another base does not have.

    They depend on the path, shape, dtype and every bit of each leaf, and not on how it is sharded.
    With several processes all of them call it.
    """
    with jax.transfer_guard("allow"):
        numbers = fingerprints(jax.tree.leaves(frozen))
    described = [[*pair, n] for pair, n in zip(describe(frozen).items(), numbers, strict=True)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
