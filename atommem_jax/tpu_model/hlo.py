"""What a compiled program sends between devices, read from its optimised HLO text.

`compiled.as_text()` lists computations; a `while` runs one of them again and again, and XLA's own
cost analysis counts its body once. Here every collective comes with the loops it stands in, how
often each turns, and the mesh axes it spans:

    traffic = hlo.read(compiled.as_text(), {"data": 2, "fsdp": 4, "tensor": 2}, {"decode": 32})
    traffic.totals()                       # {"all-gather": Total(count=..., bytes=...), ...}
    traffic.inside("decode", "all-gather", weights_only=True)    # [] is what one hopes for

Loops. A trip count is taken from `known_trip_count` (XLA:CPU writes it) or derived from the loop's
condition, `counter < constant` (XLA:TPU does not write it). Others end when data says so: they are
named after the `jax.named_scope` that they were traced in, and the caller says how often they turn.
A loop that is neither known nor given counts once and is listed in `Traffic.unknown_loops`.

Bytes. `moved` is what one device sends (and receives) in one execution, with the algorithm that is
optimal on a ring of n devices; P is the payload, the operand of the operation on one device:

    all-gather          (n - 1) P             = (n - 1)/n of the result
    reduce-scatter      (n - 1)/n P
    all-reduce          2 (n - 1)/n P         a reduce-scatter, then an all-gather
    all-to-all          (n - 1)/n P           injected; hops on the way are not counted
    collective-permute  P                     to a neighbour
    broadcast           P

Padding of tiled layouts is left out. A reduction over a few bytes costs latency, not bandwidth.

What XLA:TPU does to collectives, and how it is counted: one that overlaps with computation appears
in several fusions with the same channel, and counts once; `all-reduce-scatter` fusions are
reduce-scatters; between slices an operation is a pair of host transfers around one on each slice.
Of the branches of a conditional the one that moves most counts, once.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from atommem_jax.tpu_model.device_groups import axes_of, read_groups
from atommem_jax.tpu_model.hlo_text import (
    Computation,
    HloError,
    Instruction,
    Module,
    count_bytes,
    parse,
)
from atommem_jax.tpu_model.loops import Loop, count_trips, list_scopes, scope_names
from atommem_jax.tpu_model.provenance import find_argument, find_readers, is_prefix

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
"""Operations between devices, as HLO spells them. `ragged-all-to-all` counts as `all-to-all`."""

DCN_AXIS = "dcn"
"""Stands for the data-centre network between slices."""

_FUSED_WITH_WORK = "async_collective_fusion_config"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between devices, as often as its loops execute it.

    Attributes:
      kind: one of KINDS.
      name: of the instruction.
      op_name: where it was traced; that of its fusion where the compiler made it. Where it names no
        place within its loop, as of weights that JAX 0.12 gathers: the scope of all who read it.
      payload: bytes of its operand on one device.
      result: bytes of its result on one device.
      group_size: devices that take part in one group.
      axes: the mesh axes that differ within a group, or (UNKNOWN_AXIS,).
      moved: bytes that a device sends in one execution; see the module.
      loops: that it stands in, outermost first.
      times: executions: the product of their trips, unknown ones once.
      taken: False in the branches of a conditional that do not count.
      weight: name of the program's argument whose values it moves unchanged; '' for activations
        and gradients.
      overlapped: whether the schedule starts it ahead of its use, beside computation.
    """

    kind: str
    name: str
    op_name: str
    payload: int
    result: int
    group_size: int
    axes: tuple[str, ...]
    moved: float
    loops: tuple[Loop, ...]
    times: int
    taken: bool = True
    weight: str = ""
    overlapped: bool = False

    @property
    def total(self) -> float:
        """Bytes a device sends in all executions."""
        return self.moved * self.times if self.taken else 0.0

    def is_in(self, scope: str) -> bool:
        """Whether it, or a loop that it stands in, was traced within `jax.named_scope(scope)`."""
        paths = [self.op_name, *(loop.path for loop in self.loops)]
        return any(scope in list_scopes(path) for path in paths)


@dataclasses.dataclass(frozen=True)
class Total:
    """Executions, and bytes that one device sends in them."""

    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives and loops of a program."""

    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...]

    @property
    def unknown_loops(self) -> tuple[Loop, ...]:
        """Loops that hold collectives, counted once for want of a trip count."""
        holding = {loop for each in self.collectives for loop in each.loops}
        return tuple(loop for loop in self.loops if loop.trips is None and loop in holding)

    def totals(self) -> dict[str, Total]:
        """By kind, in the order of KINDS."""
        return _sum_by(self.collectives, lambda each: each.kind, KINDS)

    def by_axes(self) -> dict[str, Total]:
        """By mesh axes, joined by '+'."""
        return _sum_by(self.collectives, lambda each: "+".join(each.axes))

    def by_kind_and_axes(self) -> dict[tuple[str, str], Total]:
        """By kind and mesh axes."""
        return _sum_by(self.collectives, lambda each: (each.kind, "+".join(each.axes)))

    def bytes_over(self, axes: Iterable[str]) -> float:
        """Bytes a device sends in operations that span any of `axes`."""
        wanted = set(axes)
        return sum(each.total for each in self.collectives if wanted & set(each.axes))

    def inside(
        self,
        scope: str,
        kind: str | None = None,
        *,
        more_than: int = 0,
        weights_only: bool = False,
    ) -> list[Collective]:
        """Collectives in a loop named `scope`, or in a loop within it, all branches included.

        Args:
          scope: a `jax.named_scope` around the loop, e.g. "decode".
          kind: one of KINDS; None for all.
          more_than: bytes of the result on one device.
          weights_only: only those that move values of the program's arguments unchanged, as the
            gathering of a sharded weight does.

        Raises HloError where no loop has that name: an empty list would then say nothing.
        """
        if not any(scope in scope_names(loop.path) for loop in self.loops):
            names = sorted({loop.name for loop in self.loops})
            raise HloError(
                f"no loop stands in the scope {scope!r}; the loops of this program are "
                f"{', '.join(names) or 'none'}: put jax.named_scope({scope!r}) around it"
            )
        return [
            each
            for each in self.collectives
            if any(scope in scope_names(loop.path) for loop in each.loops)
            and kind in (None, each.kind)
            and each.result > more_than
            and (each.weight or not weights_only)
        ]


def _sum_by(collectives, key, order=()):
    sums: dict = {}
    for each in collectives:
        if each.taken:
            old = sums.get(key(each), Total(0, 0.0))
            sums[key(each)] = Total(old.count + each.times, old.bytes + each.total)
    ordered = [name for name in order if name in sums]
    return {name: sums[name] for name in [*ordered, *(n for n in sums if n not in ordered)]}


def bytes_moved(kind: str, payload: float, group_size: int) -> float:
    """Bytes that one device of `group_size` sends, for an operand of `payload` bytes; see above.

    Raises HloError for a kind that is not one of KINDS.
    """
    n = group_size
    factors = {
        "all-gather": n - 1.0,
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1.0,
        "collective-broadcast": 1.0 if n > 1 else 0.0,
    }
    if kind not in factors:
        raise HloError(f"collective {kind!r} is not known: allowed are {', '.join(KINDS)}")
    return factors[kind] * payload


def read(
    text: str,
    mesh: Mapping[str, int],
    trips: Mapping[str, int] | None = None,
    *,
    slices: int = 1,
) -> Traffic:
    """All collectives of a compiled program.

    Args:
      text: `compiled.as_text()`.
      mesh: sizes of the mesh axes in order. Device k of the program is `mesh.devices.flat[k]`.
      trips: how often loops turn that end when data says so, by the scope they were traced in.
      slices: that the program runs on.

    Raises HloError where the text cannot be read, or holds more devices than the mesh.
    """
    return _Reader(parse(text), dict(mesh), dict(trips or {}), slices).read()


class _Reader:
    """Walks a module from its entry."""

    def __init__(self, module: Module, mesh: dict[str, int], trips: dict[str, int], slices: int):
        self.module, self.mesh, self.trips, self.slices = module, mesh, trips, slices
        self.loops: dict[Loop, None] = {}

    def read(self) -> Traffic:
        found = self.visit(self.module.entry, ())
        return Traffic(tuple(found), tuple(self.loops))

    def visit(
        self,
        computation: Computation,
        loops: tuple[Loop, ...],
        started: set[tuple[str, str]] | None = None,
    ) -> list[Collective]:
        """`started`: (kind, channel) of overlapped collectives that the caller has counted."""
        found: list[Collective] = []
        started = set() if started is None else started
        for instruction in computation.instructions.values():
            found += self.visit_instruction(computation, instruction, loops, started)
        return found

    def visit_instruction(self, computation, instruction, loops, started) -> list[Collective]:
        opcode = instruction.opcode
        if opcode == "while":
            loop = self.name_loop(computation, instruction)
            self.loops[loop] = None
            body = self.module.computations[instruction.called("body")]
            return self.visit(body, (*loops, loop))
        if opcode == "conditional":
            return self.visit_branches(instruction, loops)
        if opcode in ("fusion", "call", "async-start"):
            name = instruction.called("to_apply" if opcode == "call" else "calls")
            inner = self.module.computations.get(name or "")
            found = [] if inner is None else self.visit(inner, loops, started)
            return [
                dataclasses.replace(
                    each,
                    op_name=each.op_name or instruction.op_name,
                    overlapped=each.overlapped or opcode == "async-start",
                )
                for each in found
            ]
        kind = _kind(instruction)
        if kind is None:
            return []
        if _FUSED_WITH_WORK in instruction.attributes:
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = (kind, channel[1] if channel else instruction.name)
            if key in started:
                return []
            started.add(key)
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        return [self.describe(computation, instruction, kind, loops)]

    def visit_branches(self, instruction, loops) -> list[Collective]:
        branches = [
            self.visit(self.module.computations[name], loops) for name in instruction.branches
        ]
        if not branches:
            return []
        costs = [sum(each.total for each in branch) for branch in branches]
        counted = costs.index(max(costs))
        return [
            each if at == counted else dataclasses.replace(each, taken=False)
            for at, branch in enumerate(branches)
            for each in branch
        ]

    def name_loop(self, computation: Computation, instruction: Instruction) -> Loop:
        path = instruction.op_name or self.path_of_condition(instruction)
        scopes = scope_names(path)
        name = scopes[-1] if scopes else instruction.name
        trips = count_trips(self.module, computation, instruction)
        if trips is not None:
            return Loop(name, path, trips, "known")
        for scope in reversed(scopes):
            if scope in self.trips:
                return Loop(scope, path, self.trips[scope], "given")
        return Loop(name, path, None, "unknown")

    def path_of_condition(self, instruction: Instruction) -> str:
        condition = self.module.computations.get(instruction.called("condition") or "")
        if condition is None:
            return ""
        path = condition.instructions[condition.root].op_name
        return path.rsplit("/cond/", 1)[0] if "/cond/" in path else ""

    def describe(self, computation, instruction, kind, loops) -> Collective:
        operands = [computation.instructions.get(name) for name in instruction.operands]
        payload = sum(count_bytes(operand.shape) for operand in operands if operand is not None)
        if instruction.opcode == "send":
            axes: tuple[str, ...] = (DCN_AXIS,)
            size = self.slices
        else:
            groups = read_groups(instruction.attributes, math.prod(self.mesh.values()))
            axes, size = axes_of(groups, self.mesh), max(map(len, groups), default=1)
        result = count_bytes(instruction.shape)
        if instruction.opcode == "send" or instruction.opcode.endswith("-start"):
            # The shape holds operands and results.
            result = payload * size if kind == "all-gather" else payload
        elif kind == "reduce-scatter" and instruction.opcode == "all-reduce":
            result = payload // size
        op_name, loop = instruction.op_name, loops[-1].path if loops else ""
        if is_prefix(op_name, loop):
            op_name = find_readers(self.module, computation, instruction.name, loop) or op_name
        weight = ""
        if operands and operands[0] is not None:
            weight = find_argument(self.module, computation, operands[0].name)
        return Collective(
            kind=kind,
            name=instruction.name,
            op_name=op_name,
            payload=payload,
            result=result,
            group_size=size,
            axes=axes,
            moved=bytes_moved(kind, payload, size),
            loops=loops,
            times=math.prod(loop.trips or (0 if loop.trips == 0 else 1) for loop in loops),
            weight=weight,
            overlapped=_is_overlapped(instruction),
        )


def _is_overlapped(instruction: Instruction) -> bool:
    return (
        instruction.opcode.endswith("-start")
        or instruction.opcode == "send"
        or _FUSED_WITH_WORK in instruction.attributes
    )


def _kind(instruction: Instruction) -> str | None:
    """The kind of a collective, counted where it starts; None for all else."""
    if instruction.opcode == "send":
        between = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        if between is None:
            return None
        name = between[1].lower().replace("_", "-")
        return name if name in KINDS else "collective-permute"
    name = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
    return name if name in KINDS else None
