"""Batches, from the host to the devices and back.

With several processes each holds some rows of a batch. Which ones follows from the devices of the
mesh (`process_rows`), so that processes whose devices share a row read the same data. `shard` makes
one array of what all of them hold; `fetch` and `gather_rows` are the ways back to the host.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from atommem_jax.parallel.mesh import batch_shards, describe_batch_axes
from atommem_jax.parallel.rules import BATCH


@functools.lru_cache(maxsize=256)
def process_rows(mesh: Mesh, size: int) -> Int[np.ndarray, " rows"]:
    """The rows, of a batch of `size`, that lie on devices of this process; ascending, read-only.

    Processes between which no batch axis runs hold the same rows.

    Raises ValueError where the batch does not divide over the mesh, or none of its devices is
    this process's.
    """
    shards = batch_shards(mesh)
    if size % shards:
        raise ValueError(
            f"a batch of {size} does not divide over {describe_batch_axes(mesh)}; choose a "
            "multiple of it, or fewer devices"
        )
    held = _batch_layout(mesh).addressable_devices_indices_map((size,)).values()
    if not held:
        raise ValueError(
            f"process {jax.process_index()} has none of the {mesh.size} devices of the mesh; set "
            "mesh.data to 0, so that all devices of all processes are used"
        )
    spans = sorted({index[0].indices(size)[:2] for index in held if index is not None})
    rows = np.concatenate([np.arange(*span) for span in spans])
    rows.setflags(write=False)
    return rows


def whole_size(mesh: Mesh, rows: int) -> int:
    """Rows of the batch of which this process holds `rows`.

    Raises ValueError where they do not divide over this process's devices.
    """
    shards = batch_shards(mesh)
    here = len(process_rows(mesh, shards))
    if rows % here:
        where = "" if here == shards else f" (of which this process has {here})"
        raise ValueError(
            f"a batch of {rows} does not divide over {describe_batch_axes(mesh)}{where}; choose a "
            "multiple of it, or fewer devices"
        )
    return rows // here * shards


def shard(tree: Any, mesh: Mesh) -> Any:
    """Places a host batch: the leading axis of every leaf over the batch axes of the mesh.

    With several processes `tree` holds the rows of `process_rows`, in their order.

    Raises ValueError where the leading axis does not divide.
    """
    sizes = {leaf.shape[0]: whole_size(mesh, leaf.shape[0]) for leaf in jax.tree.leaves(tree)}
    layout = _batch_layout(mesh)
    if layout.is_fully_addressable:
        return jax.device_put(tree, layout)

    def place(leaf: Any) -> jax.Array:
        size = sizes[leaf.shape[0]]
        rows = process_rows(mesh, size)

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(size)
            first = int(np.searchsorted(rows, start))
            return leaf[first : first + stop - start]

        return jax.make_array_from_callback((size, *leaf.shape[1:]), layout, read)

    with jax.transfer_guard_host_to_device("allow"):  # as explicit as device_put
        return jax.tree.map(place, jax.device_get(tree))


def fetch(tree: Any) -> Any:
    """NumPy copies of a batch: the rows that this process holds, in the order of `shard`."""
    if _is_here(tree):
        return jax.device_get(tree)

    def held(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_replicated:
            return jax.device_get(leaf)
        shards = {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}
        return np.concatenate(jax.device_get([shards[start] for start in sorted(shards)]))

    return jax.tree.map(held, tree)


def gather_rows(tree: Any, mesh: Mesh) -> Any:
    """The rows of all processes, in order and on the host of each, from those of `process_rows`.

    A collective; for what is small, such as rewards.
    """
    if _batch_layout(mesh).is_fully_addressable:
        return tree
    return jax.device_get(_replicating(mesh)(shard(tree, mesh)))


def choose_rows(first: Any, second: Any, rows: Int[np.ndarray, " B"], mesh: Mesh) -> Any:
    """Rows of two sharded batches of B, by their numbers in one behind the other: a batch of B.

    A collective with several processes, which all pass the same `rows`.
    """
    return _choosing(mesh)(first, second, replicate(np.asarray(rows, np.int32), mesh))


@functools.cache
def _choosing(mesh: Mesh):
    def choose(first, second, rows):
        return jax.tree.map(
            lambda a, b: jnp.take(jnp.concatenate([a, b]), rows, axis=0), first, second
        )

    return jax.jit(choose, out_shardings=_batch_layout(mesh))


def first_rows(tree: Any, count: int) -> Any:
    """The first `count` rows of a sharded batch; a collective with several processes."""
    if not _is_here(tree):
        first = jax.tree.leaves(tree)[0]
        if count == first.shape[0]:
            return tree
        # Whole on every process: what is left need not divide over the devices.
        tree = _replicating(first.sharding.mesh)(tree)
    return jax.tree.map(lambda x: x[:count], tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places the whole of every leaf on every device; every process passes the same values."""
    layout = NamedSharding(mesh, PartitionSpec())
    if layout.is_fully_addressable:
        return jax.device_put(tree, layout)
    # Not device_put: it would compare the values between processes, leaf by leaf.
    with jax.transfer_guard("allow"):
        return jax.tree.map(functools.partial(_replicate_leaf, layout), tree)


def _replicate_leaf(layout: NamedSharding, leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            return jax.device_put(leaf, layout)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = _replicate_leaf(layout, jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, layout, lambda index: host[index])


def _is_here(tree: Any) -> bool:
    """Whether this process holds all of every leaf."""
    return all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree))


@functools.cache
def _replicating(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _batch_layout(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH))
