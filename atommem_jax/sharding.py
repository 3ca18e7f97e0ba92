"""The device mesh, where parameters lie on it, and programs that run over it.

The mesh has three axes. `data` holds replicas of the parameters: whole slices of a pod, or all
devices of a laptop. `fsdp` splits the parameters and the batch alike: a layer is gathered when it
is needed. `tensor` splits heads, the MLP and the vocabulary. A batch lies over `data` and `fsdp`.

Two wrappers make a program of a function of a batch.

* `data_parallel`, for rollouts: the function runs once for each share of the batch
  (`jax.shard_map`), so that its loops end when *their* episodes end. Parameters lie by the rules
  `ROLLOUT`, over `tensor` alone, which is left to the compiler: nothing is gathered in a decode
  loop.
* `replicated`, for updates. Where parameters are whole on every device it does the same: each
  device packs and accumulates its own micro-batches, and `total` sums once. Where they are split,
  by the rules `TRAINING`, the function sees the whole batch, and the compiler partitions it.

Rules are two tables. `PARAMETERS` gives the logical axes of each parameter by its path, and a
rule set maps logical axes to mesh axes. Optimiser moments have the paths of their parameters.

With several processes each holds some rows of a batch. Which ones follows from the devices of the
mesh (`process_rows`), so that processes whose devices share a row read the same data. `shard` makes
one array of what all of them hold, `fetch` and `collect` are the ways back to the host.

A host without an accelerator can be split into several devices (`--config.mesh.cpu_devices`):
small models then use all cores, and the laptop runs the code path of the pod.
"""

import contextvars
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
BATCH = (DATA, FSDP)
"""The mesh axes that a batch of trajectories lies over."""

_AXES = (DATA, FSDP, TENSOR)

PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Of adapters A follows the input of its matrix and B the output; the rank is whole everywhere.
    (r"embedder_lora/a", ("vocab", None)),
    (r"layers/(query|key|value|gate|up)_lora/a", (None, "embed", None)),
    (r"layers/out_lora/a", (None, "heads", None)),
    (r"layers/down_lora/a", (None, "mlp", None)),
    (r"head_lora/a", ("embed", None)),
    (r"layers/query_lora/b", (None, None, "heads")),
    (r"layers/(key|value)_lora/b", (None, None, "kv_heads")),
    (r"layers/(gate|up)_lora/b", (None, None, "mlp")),
    (r"layers/(out|down)_lora/b", (None, None, "embed")),
    (r"embedder_lora/b", (None, "embed")),
    (r"head_lora/b", (None, "vocab")),
    (r"embedder/embedding", ("vocab", "embed")),
    (r"head", ("embed", "vocab")),
    (r"layers/query/kernel", (None, "embed", "heads")),
    (r"layers/(key|value)/kernel", (None, "embed", "kv_heads")),
    (r"layers/out/kernel", (None, "heads", "embed")),
    (r"layers/(gate|up)/kernel", (None, "embed", "mlp")),
    (r"layers/down/kernel", (None, "mlp", "embed")),
    (r"layers/\w+_norm/scale", (None, None)),
    (r"final_norm/scale", (None,)),
    (r"features/kernel", (None, "embed")),
    (r"shift", (None, "embed")),
    (r"value_head/kernel", ("embed", None)),
    (r"value_head/bias", (None,)),
    (r"ns_coeffs", (None,)),  # not of the model: Muon's constants
)
"""Path of a parameter -> logical axes of its dimensions. The first rule that matches counts."""

TRAINING: Mapping[str, str | tuple[str, ...]] = {
    "rows": BATCH,
    "embed": FSDP,
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
}
"""Logical axis -> mesh axis, for updates; axes that are not named are whole everywhere."""

ROLLOUT: Mapping[str, Any] = {name: axis for name, axis in TRAINING.items() if axis == TENSOR}
"""The same for rollouts."""

_FIELDS = {
    "embed": "model.width",
    "vocab": "the vocabulary",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
    "mlp": "model.mlp_width",
}


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
    return Mesh(grid, _AXES, axis_types=(AxisType.Auto,) * len(_AXES))


@functools.cache
def single() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(1, devices=jax.devices()[:1])


def batch_shards(mesh: Mesh) -> int:
    """Into how many shares a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def _batch_axes(mesh: Mesh) -> str:
    return " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in BATCH)


# ---------------------------------------------------------------------------------------------
# Batches: from the host to the devices, and back


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
            f"a batch of {size} does not divide over {_batch_axes(mesh)}; choose a multiple of "
            "it, or fewer devices"
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
            f"a batch of {rows} does not divide over {_batch_axes(mesh)}{where}; choose a multiple "
            "of it, or fewer devices"
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


def collect(tree: Any, mesh: Mesh) -> Any:
    """The rows of all processes, in order and on the host of each, from those of `process_rows`.

    A collective; for what is small, such as rewards.
    """
    if _batch_layout(mesh).is_fully_addressable:
        return tree
    return jax.device_get(_replicating(mesh)(shard(tree, mesh)))


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


# ---------------------------------------------------------------------------------------------
# Parameters


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parameters of one model lie, and all that follows their paths.

    `num_heads` and `num_kv_heads` are the units that must not be cut: a head lies on one device.
    """

    num_heads: int
    num_kv_heads: int

    def specs(self, tree: Any, mesh: Mesh, rules: Mapping[str, Any] = TRAINING) -> Any:
        """A PartitionSpec for every leaf: parameters, or a training state that holds them.

        Counters, factored moments and other leaves without the shape of their parameter are whole
        everywhere. Raises ValueError, naming the field, for a parameter that no rule matches and
        for an axis that does not divide.
        """

        def spec(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return self._spec(name, leaf.shape, mesh, rules)

        return jax.tree_util.tree_map_with_path(spec, tree)

    def shardings(self, tree: Any, mesh: Mesh, rules: Mapping[str, Any] = TRAINING) -> Any:
        """`specs` as NamedShardings: for `jax.jit`, `jax.device_put` and restores."""
        specs = self.specs(tree, mesh, rules)
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    def _spec(
        self, name: str, shape: tuple[int, ...], mesh: Any, rules: Mapping[str, Any]
    ) -> PartitionSpec:
        if not shape:
            return PartitionSpec()
        axes = next((a for rule, a in PARAMETERS if re.search(rf"(^|/){rule}$", name)), None)
        if axes is None:
            raise ValueError(
                f"parameter {name} {list(shape)}: no rule of sharding.PARAMETERS matches it; add "
                "one that names its logical axes"
            )
        if len(axes) != len(shape) or 1 in shape[-2:]:
            return PartitionSpec()  # a factored moment, or a dimension of one
        entries = []
        for logical, size in zip(axes, shape, strict=True):
            axis = rules.get(logical) if logical else None
            entries.append(
                axis if axis and self._divides(logical, size, mesh, axis, name) else None
            )
        return PartitionSpec(*entries)

    def _divides(self, logical, size, mesh, axis, name) -> bool:
        """Whether to split. False for key/value heads that every device needs; or raises."""
        count = mesh.shape[axis]
        if count == 1:
            return False
        units = {"heads": self.num_heads, "kv_heads": self.num_kv_heads}.get(logical, size)
        if units % count == 0:
            return True
        if logical == "kv_heads" and count % units == 0:
            return False  # fewer heads than devices: each device computes the one it needs
        raise ValueError(
            f"{name}: {_FIELDS[logical]}={units} does not divide over mesh.{axis}={count}; choose "
            f"a divisor of {units} for mesh.{axis}"
        )

    def constrain(self, tree: Any, *, by_replica: bool = False) -> Any:
        """Inside a program: keeps parameters, gradients or moments where `TRAINING` puts them.

        by_replica: every leaf has a leading axis of replicas, as what `sharding.by_replica` gives.
        """
        mesh = _partitioned()
        if mesh is None:
            return tree
        axes = _partitioned_axes(mesh)
        rules = {name: _present(axis, axes) for name, axis in TRAINING.items()}
        leading = (DATA,) if by_replica else ()

        def place(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            spec = self._spec(name, leaf.shape[len(leading) :], mesh, rules)
            return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*leading, *spec))

        return jax.tree_util.tree_map_with_path(place, tree)


# ---------------------------------------------------------------------------------------------
# Inside a program


_in_replica = contextvars.ContextVar("in_replica", default=False)
"""Whether what is being traced is the part of one replica, see `by_replica`."""


def _automatic_axes(mesh: Any) -> list[str]:
    """Axes that are the compiler's here, rather than ours by hand."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Auto]


def _partitioned_axes(mesh: Any) -> list[str]:
    """Those of them that have more than one device, and that a dimension may lie over here."""
    taken = (DATA,) if _in_replica.get() else ()
    return [name for name in _automatic_axes(mesh) if mesh.shape[name] > 1 and name not in taken]


def _partitioned() -> Any | None:
    """The mesh of the program being traced; None where the compiler has nothing to partition."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and _partitioned_axes(mesh) else None


def _present(
    axis: str | tuple[str, ...] | None, axes: Sequence[str]
) -> str | tuple[str, ...] | None:
    """What of a mesh axis, or of several, is among `axes`."""
    if isinstance(axis, tuple):
        return tuple(name for name in axis if name in axes) or None
    return axis if axis in axes else None


def _logical_spec(logical: Sequence[str | None], axes: Sequence[str]) -> PartitionSpec:
    return PartitionSpec(*(_present(TRAINING[name], axes) if name else None for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Says which mesh axis each dimension of an activation lies over, by logical name.

    Without effect where there is no mesh, or no axis of it left to the compiler.
    """
    mesh = _partitioned()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _logical_spec(logical, _partitioned_axes(mesh)))


def whole(tree: Any) -> Any:
    """Says that every device holds all of each leaf."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def partition_size(logical: str) -> int:
    """Into how many parts the compiler splits a logical axis in the program being traced."""
    mesh = _partitioned()
    if mesh is None:
        return 1
    axes = _present(TRAINING[logical], _partitioned_axes(mesh)) or ()
    return math.prod(mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes))


def by_hand(function: Callable[..., Any], *, specs: Sequence[Any], out: Any) -> Callable[..., Any]:
    """`function` on each device's part, over the axes that the compiler would partition.

    For kernels that it cannot partition. specs, out: a tuple of logical names for each argument
    and for the result. Just `function` where there is nothing to partition.
    """
    mesh = _partitioned()
    if mesh is None:
        return function
    # Axes of one device are named too: what is not named is summed over in the backward pass.
    names = _automatic_axes(mesh)
    axes = [name for name in names if name != DATA or not _in_replica.get()]
    return jax.shard_map(
        function,
        mesh=mesh,
        axis_names=set(names),
        in_specs=tuple(_logical_spec(logical, axes) for logical in specs),
        out_specs=_logical_spec(out, axes),
        check_vma=False,
    )


def count_replicas() -> int:
    """Replicas of the parameters that the program being traced is partitioned over."""
    mesh = _partitioned()
    return mesh.shape[DATA] if mesh is not None and DATA in _partitioned_axes(mesh) else 1


def by_replica(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`function` of each replica's rows: what it returns gets a leading axis of replicas.

    Rows, the leading axis of every leaf of its argument, must divide over `count_replicas`. What
    is summed over rows in `function` stays on its replica: a loop that adds gradients up meets the
    others only when it is over, and not in every round.
    """
    replicas = count_replicas()

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(replicas, x.shape[0] // replicas, *x.shape[1:])
        rest = (None,) * (x.ndim - 2)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(DATA, _rows(), *rest))

    def run(rows: Any) -> Any:
        parts = jax.tree.map(split, rows)
        token = _in_replica.set(True)
        try:
            return jax.vmap(function, spmd_axis_name=DATA)(parts)
        finally:
            _in_replica.reset(token)

    return run


def _rows() -> str | None:
    """The axis that the rows of one replica lie over, if there is one."""
    mesh = _partitioned()
    return FSDP if mesh is not None and FSDP in _partitioned_axes(mesh) else None


def data_parallel(
    function: Callable[..., Any], mesh: Mesh, *, sharded: Sequence[bool], sharded_out: Any
) -> Callable[..., Any]:
    """`function` on each share of the batch: what is `sharded`, cut over the axes `BATCH`.

    sharded: one flag a positional argument; the others are whole for every share.
    sharded_out: a flag, or a tuple of flags, for the results. A result that is not sharded must
      be the same for every share, as it is after `total` or `largest`.
    """

    def spec(flag: Any) -> Any:
        if isinstance(flag, tuple):
            return tuple(spec(f) for f in flag)
        return PartitionSpec(BATCH) if flag else PartitionSpec()

    # There is nothing for the compiler to do on an axis of one device.
    alone = [name for name in _AXES if mesh.shape[name] == 1]
    return jax.shard_map(
        function,
        mesh=mesh,
        axis_names={*BATCH, *alone},
        in_specs=tuple(spec(flag) for flag in sharded),
        out_specs=spec(sharded_out),
        check_vma=False,
    )


def splits_parameters(mesh: Mesh) -> bool:
    """Whether no device holds all parameters while they are trained."""
    return mesh.shape[FSDP] * mesh.shape[TENSOR] > 1


def replicated(
    function: Callable[..., Any], mesh: Mesh, *, sharded: Sequence[bool], sharded_out: Any
) -> Callable[..., Any]:
    """`data_parallel` where parameters are whole on every device; else `function` of all rows.

    `total`, `largest` and `first_row` make the two compute the same.
    """
    if not splits_parameters(mesh):
        return data_parallel(function, mesh, sharded=sharded, sharded_out=sharded_out)

    def on_all(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return on_all


def _by_share() -> bool:
    """Whether the program being traced sees one share of the batch."""
    return DATA in jax.sharding.get_abstract_mesh().manual_axes


def total(tree: Any) -> Any:
    """Sums over the shares; inside `data_parallel` and `replicated`."""
    return jax.lax.psum(tree, BATCH) if _by_share() else tree


def largest(tree: Any) -> Any:
    """The maximum over the shares; inside `data_parallel` and `replicated`."""
    return jax.lax.pmax(tree, BATCH) if _by_share() else tree


def first_row(rows: int) -> jax.Array | int:
    """Index, in the whole batch, of the first of this share's `rows` rows."""
    return jax.lax.axis_index(BATCH) * rows if _by_share() else 0


def count_rows(rows: int) -> int:
    """Rows that the program being traced sees when each share has `rows`."""
    return rows if _by_share() else rows * partition_size("rows")
