"""Programs that run over a mesh, and what is said of sharding inside of them.

Two wrappers make a program of a function of a batch.

* `data_parallel`, for rollouts: the function runs once for each share of the batch
  (`jax.shard_map`), so that its loops end when *their* episodes end. Parameters lie by the rules
  `ROLLOUT`, over `tensor` alone, which is left to the compiler: nothing is gathered in a decode
  loop.
* `fsdp_parallel`, for updates. Where parameters are whole on every device it does the same: each
  device packs and accumulates its own micro-batches, and `psum` sums once. Where they are split,
  by the rules `TRAINING`, the function sees the whole batch, and the compiler partitions it.
"""

import contextlib
import contextvars
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from atommem_jax.parallel.mesh import splits_parameters
from atommem_jax.parallel.rules import AXES, BATCH, DATA, FSDP, TENSOR, TRAINING, Layout

ROWS = PartitionSpec(BATCH)
"""Of a program's argument or result: each share has its own rows of the leading axis."""

WHOLE = PartitionSpec()
"""Of a program's argument or result: every share has all of it."""

_BY_ROWS: Mapping[str, Any] = {"rows": TENSOR, "draws": TENSOR}
"""Logical axis -> mesh axis within `rows_over_tensor`."""

_rules: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "rules", default=TRAINING
)
"""What logical axes mean in what is being traced."""

_devices: contextvars.ContextVar[Any] = contextvars.ContextVar("devices", default=None)
"""The mesh that what is being traced is for, see `platform`."""

_in_replica = contextvars.ContextVar("in_replica", default=False)
"""Whether what is being traced is the part of one replica, see `vmap_over_data`."""


def platform() -> str:
    """Of the devices that the program being traced is for, 'cpu', 'gpu' or 'tpu'.

    Those of its mesh, which may be described here and stand elsewhere; without a mesh the default.
    """
    mesh = _devices.get()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _traced_for(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments):
        token = _devices.set(mesh)
        try:
            return function(*arguments)
        finally:
            _devices.reset(token)

    return run


def _automatic_axes(mesh: Any) -> list[str]:
    """Axes that are the compiler's here, rather than ours by hand."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Auto]


def partitioned_axes(mesh: Any) -> list[str]:
    """Those of them that have more than one device, and that a dimension may lie over here."""
    taken = (DATA,) if _in_replica.get() else ()
    return [name for name in _automatic_axes(mesh) if mesh.shape[name] > 1 and name not in taken]


def partitioned_mesh() -> Any | None:
    """The mesh of the program being traced; None where the compiler has nothing to partition."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and partitioned_axes(mesh) else None


def _present(
    axis: str | tuple[str, ...] | None, axes: Sequence[str]
) -> str | tuple[str, ...] | None:
    """What of a mesh axis, or of several, is among `axes`."""
    if isinstance(axis, tuple):
        return tuple(name for name in axis if name in axes) or None
    return axis if axis in axes else None


def _logical_spec(logical: Sequence[str | None], axes: Sequence[str]) -> PartitionSpec:
    rules = _rules.get()
    return PartitionSpec(*(_present(rules.get(name), axes) if name else None for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Says which mesh axis each dimension of an activation lies over, by logical name.

    Without effect where there is no mesh, or no axis of it left to the compiler.
    """
    mesh = partitioned_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _logical_spec(logical, partitioned_axes(mesh)))


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """What is traced within has all of each array on every device: a model beside the policy's."""
    token = _rules.set({})
    try:
        yield
    finally:
        _rules.reset(token)


def constrain_params(layout: Layout, tree: Any, *, leading_data_axis: bool = False) -> Any:
    """Inside a program: keeps parameters, gradients or moments where `TRAINING` puts them.

    leading_data_axis: every leaf has a leading axis of replicas, as what `vmap_over_data` returns.
    """
    mesh = partitioned_mesh()
    if mesh is None:
        return tree
    axes = partitioned_axes(mesh)
    rules = {name: _present(axis, axes) for name, axis in TRAINING.items()}
    leading = (DATA,) if leading_data_axis else ()

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = layout.spec(name, leaf.shape[len(leading) :], mesh, rules)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*leading, *spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def whole(tree: Any) -> Any:
    """Says that every device holds all of each leaf."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def partition_size(logical: str) -> int:
    """Into how many parts the compiler splits a logical axis in the program being traced."""
    mesh = partitioned_mesh()
    if mesh is None:
        return 1
    axes = _present(_rules.get().get(logical), partitioned_axes(mesh)) or ()
    return math.prod(mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes))


@contextlib.contextmanager
def rows_over_tensor(rows: int) -> Iterator[bool]:
    """In what is traced within, `tensor` splits rows, and matrices are whole where they are used.

    For `rows` so long that it costs less to gather a matrix than to sum what it gives. Yields
    whether it does so: without a tensor axis, or where rows do not divide over it, all stays as it
    is. Only inside `data_parallel`, whose axes of the batch are not the compiler's.
    """
    mesh = partitioned_mesh()
    axes = [] if mesh is None else partitioned_axes(mesh)
    if mesh is None or axes != [TENSOR] or rows % mesh.shape[TENSOR]:
        yield False
        return
    token = _rules.set(_BY_ROWS)
    try:
        yield True
    finally:
        _rules.reset(token)


def by_hand(function: Callable[..., Any], *, specs: Sequence[Any], out: Any) -> Callable[..., Any]:
    """`function` on each device's part, over the axes that the compiler would partition.

    For kernels that it cannot partition. specs, out: a tuple of logical names for each argument
    and for the result. Just `function` where there is nothing to partition.
    """
    mesh = partitioned_mesh()
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


def data_axis_size() -> int:
    """Replicas of the parameters that the program being traced is partitioned over."""
    mesh = partitioned_mesh()
    return mesh.shape[DATA] if mesh is not None and DATA in partitioned_axes(mesh) else 1


def vmap_over_data(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`function` of each replica's rows: what it returns gets a leading axis of replicas.

    Rows, the leading axis of every leaf of its argument, must divide over `data_axis_size`. What
    is summed over rows in `function` stays on its replica: a loop that adds gradients up meets the
    others only when it is over, and not in every round.
    """
    replicas = data_axis_size()

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
    mesh = partitioned_mesh()
    return FSDP if mesh is not None and FSDP in partitioned_axes(mesh) else None


def data_parallel(
    function: Callable[..., Any], mesh: Mesh, *, rows: Sequence[str], out: Any
) -> Callable[..., Any]:
    """`function` on each share of the batch, which is cut over the axes `BATCH`.

    Args:
      function: takes its arguments by position.
      mesh: whose devices the shares are for.
      rows: names of the parameters of `function` that are cut: the leading axis of each of their
        leaves has a row for every trajectory. The others are whole for every share.
      out: `ROWS` or `WHOLE`, or a tuple of them, for the results. One that is `WHOLE` must be the
        same for every share, as it is after `psum` or `pmax`.

    Raises ValueError for a name in `rows` that is no parameter.
    """
    specs = _argument_specs(function, rows)
    # There is nothing for the compiler to do on an axis of one device.
    alone = [name for name in AXES if mesh.shape[name] == 1]
    return jax.shard_map(
        _traced_for(mesh, function),
        mesh=mesh,
        axis_names={*BATCH, *alone},
        in_specs=specs,
        out_specs=out,
        check_vma=False,
    )


def _argument_specs(function: Callable[..., Any], rows: Sequence[str]) -> tuple[PartitionSpec, ...]:
    names = list(inspect.signature(function).parameters)
    unknown = [name for name in rows if name not in names]
    if unknown:
        raise ValueError(
            f"rows={tuple(rows)}: {unknown[0]!r} is no parameter of {_name(function)}; it has "
            f"{', '.join(names)}"
        )
    return tuple(ROWS if name in rows else WHOLE for name in names)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))


def fsdp_parallel(
    function: Callable[..., Any], mesh: Mesh, *, rows: Sequence[str], out: Any
) -> Callable[..., Any]:
    """`data_parallel` where parameters are whole on every device; else `function` of all rows.

    `psum` and `pmax` make the two compute the same. Raises ValueError as `data_parallel`.
    """
    if not splits_parameters(mesh):
        return data_parallel(function, mesh, rows=rows, out=out)
    _argument_specs(function, rows)  # a wrong name should not wait for another mesh

    def on_all(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return _traced_for(mesh, function)(*arguments)

    return on_all


def _by_share() -> bool:
    """Whether the program being traced sees one share of the batch."""
    return DATA in jax.sharding.get_abstract_mesh().manual_axes


def psum(tree: Any) -> Any:
    """Sums over the shares; inside `data_parallel` and `fsdp_parallel`."""
    return jax.lax.psum(tree, BATCH) if _by_share() else tree


def pmax(tree: Any) -> Any:
    """The maximum over the shares; inside `data_parallel` and `fsdp_parallel`."""
    return jax.lax.pmax(tree, BATCH) if _by_share() else tree


def count_rows(rows: int) -> int:
    """Rows that the program being traced sees when each share has `rows`."""
    return rows if _by_share() else rows * partition_size("rows")
