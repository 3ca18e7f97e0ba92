"""The device mesh: replicas x fsdp x tensor, on a laptop, a slice or several.

Rollouts may see the same devices as another mesh (`reshape_for_rollouts`): what an update splits
over `fsdp`, to gather layer by layer, decoding wants to stay where it is and be multiplied there.

A host without an accelerator can be split into several devices (`--config.mesh.cpu_devices`):
small models then use all cores, and the laptop runs the code path of the pod.
"""

import contextlib
import functools
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from atommem_jax.parallel.rules import AXES, BATCH, DATA, FSDP, TENSOR

INNER = "inner"
"""See `refine`."""


def make_mesh(
    data: int = 0,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    slices: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of data x fsdp x tensor devices.

    Args:
      data: replicas; 0 takes as many as there are devices for.
      fsdp: devices that share the parameters of a replica.
      tensor: devices that share every matrix product. Neighbours in the network.
      slices: TPU slices joined by the data-centre network, which only `data` crosses.
      devices: by default all of them, of all processes.

    Raises ValueError, naming the field, where the devices do not suffice or do not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name, value in (("fsdp", fsdp), ("tensor", tensor), ("slices", slices)):
        if value < 1:
            raise ValueError(f"mesh.{name}={value}: must be at least 1")
    inner = fsdp * tensor
    data = data or max(len(devices) // inner, 1)
    if not 1 <= data * inner <= len(devices):
        raise ValueError(
            f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor} needs {data * inner} "
            f"devices and there are {len(devices)} devices; set mesh.data to 0 for all of them, "
            "or raise mesh.cpu_devices on a host without an accelerator"
        )
    if data % slices:
        raise ValueError(
            f"mesh.data={data} does not divide over mesh.slices={slices}: every slice holds whole "
            "replicas; choose a multiple"
        )
    shape = (data, fsdp, tensor)
    is_whole = len(devices) == data * inner
    devices = devices[: data * inner]
    if devices[0].platform != "tpu" or not is_whole:  # a part of a slice need not be a box
        grid = np.array(devices).reshape(shape)
    elif slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp, tensor),
            (slices, 1, 1),
            devices=devices,
            allow_split_physical_axes=True,
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def reshape_for_rollouts(mesh: Mesh, tensor: int) -> Mesh:
    """The same devices with `tensor` of each replica on the axis of that name, the rest on `fsdp`.

    Neighbours on the axes `fsdp` and `tensor` of `mesh` share a matrix product, so that a replica
    has fewer shares of the batch, with more rows each.

    Args:
      mesh: that is trained on.
      tensor: `mesh.rollout_tensor`; 0 for that of `mesh`.

    Raises ValueError, naming the field, for what is no multiple of the axis `tensor`, or does not
    divide a replica.
    """
    if tensor in (0, mesh.shape[TENSOR]):
        return mesh
    whole = mesh.shape[FSDP] * mesh.shape[TENSOR]
    if tensor % mesh.shape[TENSOR] or whole % tensor:
        sizes = range(mesh.shape[TENSOR], whole + 1, mesh.shape[TENSOR])
        allowed = ", ".join(str(size) for size in sizes if whole % size == 0)
        raise ValueError(
            f"mesh.rollout_tensor={tensor}: allowed are 0 (as mesh.tensor) and {allowed}: "
            f"multiples of mesh.tensor={mesh.shape[TENSOR]} that divide mesh.fsdp x mesh.tensor = "
            f"{whole}; choose one of them"
        )
    grid = mesh.devices.reshape(-1, whole // tensor, tensor)
    return Mesh(grid, AXES, axis_types=mesh.axis_types)


def refine(mesh: Mesh, rollouts: Mesh) -> Mesh:
    """A mesh with an axis more, of which the axes of both are whole axes or products of them.

    `inner` is what updates have on `fsdp` and rollouts on `tensor`. A program that uses both meshes
    needs it: the partitioner wants one mesh that can express all shardings of a program.
    """
    inner = mesh.shape[FSDP] // rollouts.shape[FSDP]
    grid = mesh.devices.reshape(-1, rollouts.shape[FSDP], inner, mesh.shape[TENSOR])
    return Mesh(grid, (DATA, FSDP, INNER, TENSOR), axis_types=(AxisType.Auto,) * grid.ndim)


@functools.cache
def single() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(1, devices=jax.devices()[:1])


def batch_shards(mesh: Mesh) -> int:
    """Into how many shares a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def describe_batch_axes(mesh: Mesh) -> str:
    return " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in BATCH)


def splits_parameters(mesh: Mesh) -> bool:
    """Whether no device holds all parameters while they are trained."""
    return mesh.shape[FSDP] * mesh.shape[TENSOR] > 1


_CACHE_BYTES = 4 << 30


def prepare_devices(cpu_devices: int) -> None:
    """Splits a host without an accelerator into devices, and sets the compilation cache.

    Call it before anything else touches JAX's devices: opening a checkpoint does. The persistent
    compilation cache makes the second start of a script much faster.
    """
    cache = os.path.expanduser(os.environ.get("ATOMMEM_CACHE", "~/.cache/atommem_jax/programs"))
    jax.config.update("jax_compilation_cache_dir", cache)
    # JAX locks the folder only where its size is limited, and several runs may share it.
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Without effect where the devices exist already, as in a script that trains twice.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cpu_devices)
