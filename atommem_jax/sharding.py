"""The device mesh, and data parallelism over it.

Trajectories are sharded over the mesh axis `data`; parameters are replicated. The functions
that `data_parallel` wraps run once per device on its own trajectories (`jax.shard_map`), so a
device's rollout ends when *its* episodes end, and its packed micro-batches are its own: there
is no collective inside a decode or accumulation loop, only `total` and `largest` of the few
results that concern all devices.

A host without an accelerator can be split into several devices (`--config.mesh.cpu_devices`):
small models then use all cores, and the laptop runs the code path of the pod.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"


def make_mesh(data: int = 0, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` devices (0: all of them) on the axis `data`.

    Raises ValueError where there are fewer devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    data = data or len(devices)
    if not 1 <= data <= len(devices):
        raise ValueError(
            f"mesh.data={data}: there are {len(devices)} devices; set it to 0 for all of them, or "
            "raise mesh.cpu_devices on a host without an accelerator"
        )
    return Mesh(np.array(devices[:data]), (DATA,), axis_types=(AxisType.Auto,))


@functools.cache
def single() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(1)


def shard(tree: Any, mesh: Mesh) -> Any:
    """Places a host batch: the leading axis of every leaf over the mesh axis `data`.

    Raises ValueError where the leading axis does not divide.
    """
    for leaf in jax.tree.leaves(tree):
        if leaf.shape[0] % mesh.shape[DATA]:
            raise ValueError(
                f"a batch of {leaf.shape[0]} does not divide over mesh.data={mesh.shape[DATA]}; "
                "choose a multiple of it, or fewer devices"
            )
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(DATA)))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places the whole of every leaf on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def data_parallel(
    function: Callable[..., Any], mesh: Mesh, *, sharded: Sequence[bool], sharded_out: Any
) -> Callable[..., Any]:
    """`function` on each device's share of the arguments that are `sharded`.

    sharded: one flag a positional argument; the others are whole on every device.
    sharded_out: a flag, or a tuple of flags, for the results. A result that is not sharded must
      be the same on every device, as it is after `total` or `largest`.
    """

    def spec(flag: Any) -> Any:
        if isinstance(flag, tuple):
            return tuple(spec(f) for f in flag)
        return PartitionSpec(DATA) if flag else PartitionSpec()

    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(spec(flag) for flag in sharded),
        out_specs=spec(sharded_out),
        check_vma=False,
    )


def total(tree: Any) -> Any:
    """Sums over the devices; inside `data_parallel` only."""
    return jax.lax.psum(tree, DATA)


def largest(tree: Any) -> Any:
    """The maximum over the devices; inside `data_parallel` only."""
    return jax.lax.pmax(tree, DATA)


def first_row(rows: int) -> jax.Array:
    """Index, in the whole batch, of the first of this device's `rows` rows."""
    return jax.lax.axis_index(DATA) * rows
