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
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

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

UNKNOWN_AXIS = "?"
"""Stands for the axes of a group that is no block of the mesh, or cannot be read."""

_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    "bf16": 16,
    "c64": 64,
    "c128": 128,
}
_SHAPE = re.compile(r"\b(pred|token|opaque|bf16|[sufc]\d+\w*)\[([\d,<= ]*)\]")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_KNOWN_TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')

# Operations whose result holds the values of their operand, in another place or form.
_MOVES = {
    "all-gather",
    "bitcast",
    "bitcast-convert",
    "collective-permute",
    "concatenate",
    "convert",
    "copy",
    "copy-done",
    "copy-start",
    "custom-call",
    "dynamic-slice",
    "optimization-barrier",
    "pad",
    "reshape",
    "slice",
    "slice-done",
    "slice-start",
    "transpose",
}
# The compiler moves values between memories, whole or in pieces that it joins again.
_COPIES = {
    "bitcast",
    "convert",
    "copy",
    "copy-done",
    "copy-start",
    "slice-done",
    "slice-start",
}
_FUSED_WITH_WORK = "async_collective_fusion_config"
_JOIN = 'custom_call_target="ConcatBitcast"'
_AUXILIARY = {"parameter", "constant", "tuple", "get-tuple-element", "iota", "broadcast"}


class HloError(ValueError):
    """The text is not what XLA prints for a compiled program."""


# ------------------------------------------------------------------ text -> instructions


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `attributes` is all that follows the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # the text between the parentheses
    attributes: str

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, `jit(f)/decode/while/...`; may be empty."""
        found = _OP_NAME.search(self.attributes)
        return re.sub(r"\\(.)", r"\1", found[1]) if found else ""

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """Computations of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        pair = (self.called("true_computation"), self.called("false_computation"))
        return [name for name in pair if name]


@dataclasses.dataclass
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""


@dataclasses.dataclass
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation

    def caller_of(self, body: str) -> tuple[Computation, Instruction] | None:
        """The `while` that runs the computation `body`, and where it stands."""
        return self._loops.get(body)

    @functools.cached_property
    def _loops(self) -> dict[str | None, tuple[Computation, Instruction]]:
        return {
            instruction.called("body"): (computation, instruction)
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "while"
        }

    @functools.cached_property
    def callers(self) -> dict[str | None, tuple[Computation, Instruction]]:
        """By name of a computation, the fusion or call that runs it, and where that stands."""
        return {
            instruction.called("to_apply" if instruction.opcode == "call" else "calls"): (
                computation,
                instruction,
            )
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode in ("fusion", "call", "async-start")
        }


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`. Raises HloError where it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry = None
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and "->" in line:
                current = Computation(header[2])
                computations[current.name] = current
                entry = current if header[1] else entry
            continue
        if line.startswith("}"):
            current = None
            continue
        instruction = _parse_instruction(line)
        if instruction is not None:
            current.instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                current.root = instruction.name
    if entry is None:
        raise HloError(
            "no ENTRY computation: pass the optimised HLO of jax.jit(f).lower(...).compile()"
            f".as_text(); what was passed starts with {text[:60]!r}"
        )
    return Module(computations, entry)


def _parse_instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest = match[3]
    end = _matching(rest, 0) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:]
    opcode = _OPCODE.match(rest)
    if opcode is None:
        return None
    close = _matching(rest, opcode.end() - 1)
    arguments = rest[opcode.end() : close - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(match[2], shape, opcode[1], operands, arguments, rest[close:])


def _matching(text: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    raise HloError(f"a parenthesis is not closed in {text[start : start + 80]!r}")


def count_bytes(shape: str) -> int:
    """Bytes of a shape, all of its arrays if it is a tuple, without the padding of its layout.

    Raises HloError for an element type that is not known.
    """
    bits = 0
    for kind, sizes in _SHAPE.findall(shape):
        dims = [int(size.lstrip("<= ")) for size in sizes.split(",") if size.strip()]
        bits += _bits(kind) * math.prod(dims)
    return -(-bits // 8)


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    found = re.match(r"[sufc](\d+)", kind)
    if found is None:
        raise HloError(f"element type {kind!r} is not known")
    return int(found[1])


# ------------------------------------------------------------------ loops


@dataclasses.dataclass(frozen=True)
class Loop:
    """A `while`.

    Attributes:
      name: the scope that it was traced in (the innermost `jax.named_scope` or module since the
        enclosing loop); the instruction's name where there is none.
      path: its whole op_name.
      trips: how often it turns; None where that is neither known nor given.
      source: 'known' (to the compiler), 'given' (by the caller) or 'unknown'.
    """

    name: str
    path: str
    trips: int | None
    source: str


def scope_names(op_name: str) -> list[str]:
    """The scopes that a loop was traced in, since the enclosing loop, outermost first.

    `jit(f)/turns/while/body/transpose(jvp(layers))/while` -> ["layers"].
    """
    own = re.split(r"(?:^|/)while/body(?:/|$)", op_name)[-1]
    own = re.sub(r"(^|/)while(/cond.*)?$", "", own)
    return [name for name in list_scopes(own) if name not in _PLUMBING]


def list_scopes(op_name: str) -> list[str]:
    """All scopes of an op_name: `jit(f)/transpose(jvp(layers))/add` -> ["layers", "add"]."""
    parts = [part for part in op_name.split("/") if not part.startswith(("jit(", "pjit("))]
    inner = [re.sub(r"^(?:\w*\()*|\)*$", "", part) for part in parts]
    return [name for name in inner if name]


_PLUMBING = {"closed_call", "checkpoint", "rematted_computation", "shard_map", "body", "cond"}


def count_trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop turns, where the program says so; else None."""
    written = _KNOWN_TRIPS.search(loop.attributes)
    if written:
        return int(written[1])
    condition = module.computations.get(loop.called("condition") or "")
    body = module.computations.get(loop.called("body") or "")
    if condition is None or body is None:
        return None
    root = condition.instructions[condition.root]
    if root.opcode != "compare" or len(root.operands) != 2:
        return None
    direction = re.search(r"direction=(\w+)", root.attributes)
    counter, bound = (condition.instructions.get(name) for name in root.operands)
    at = _element(counter)
    if direction is None or direction[1] != "LT" or at is None or bound is None:
        return None
    limit = _constant(bound)
    if limit is None:
        element = _element(bound)
        limit = None if element is None else _carried(module, computation, loop, element)
    first = _initial(module, computation, loop, at)
    step = _step(module, body, at)
    if limit is None or first is None or not step:
        return None
    return max(-(-(limit - first) // step), 0)


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def _element(instruction: Instruction | None) -> int | None:
    """k of `get-tuple-element(...), index=k`."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else None


def _behind_copies(module: Module, computation: Computation, name: str) -> Instruction | None:
    """What a value is a copy of: also looks through loops that only carry it."""
    instruction = computation.instructions.get(name)
    while instruction is not None:
        if instruction.opcode in _COPIES or _JOIN in instruction.attributes:
            name = instruction.operands[0]
        elif instruction.opcode == "get-tuple-element":
            loop = computation.instructions.get(instruction.operands[0])
            element = _element(instruction)
            if loop is None or loop.opcode != "while" or element is None:
                return instruction
            state = computation.instructions.get(loop.operands[0])
            if state is None or state.opcode != "tuple" or not _is_carried(module, loop, element):
                return instruction
            name = state.operands[element]
        else:
            return instruction
        instruction = computation.instructions.get(name)
    return None


def _is_carried(module: Module, loop: Instruction, element: int) -> bool:
    """Whether an element of a loop's state is the same from the first turn to the last."""
    body = module.computations[loop.called("body") or ""]
    root = body.instructions[body.root]
    if root.opcode != "tuple" or element >= len(root.operands):
        return False
    source = _behind_copies(module, body, root.operands[element])
    return (
        _element(source) == element
        and source is not None
        and body.instructions[source.operands[0]].opcode == "parameter"
    )


def _initial(
    module: Module, computation: Computation, loop: Instruction, element: int
) -> int | None:
    """The constant that element `element` of a loop's state starts as."""
    state = _behind_copies(module, computation, loop.operands[0])
    if state is None or state.opcode != "tuple" or element >= len(state.operands):
        return None
    start = _behind_copies(module, computation, state.operands[element])
    constant = _constant(start)
    outer = module.caller_of(computation.name)
    if constant is not None or outer is None:
        return constant
    inherited = _element(start)
    return None if inherited is None else _carried(module, *outer, inherited)


def _carried(
    module: Module, computation: Computation, loop: Instruction, element: int
) -> int | None:
    """The constant that an element of a loop's state is from the first turn to the last."""
    if not _is_carried(module, loop, element):
        return None
    return _initial(module, computation, loop, element)


def _step(module: Module, body: Computation, element: int) -> int | None:
    """What the body adds to the counter."""
    root = body.instructions[body.root]
    if root.opcode != "tuple" or element >= len(root.operands):
        return None
    add = _behind_copies(module, body, root.operands[element])
    if add is not None and add.opcode == "fusion":
        return 1 if "add" in add.name or "wrapped_add" in (add.called("calls") or "") else None
    if add is None or add.opcode != "add":
        return None
    constants = [_constant(_behind_copies(module, body, name)) for name in add.operands]
    counters = [_element(_behind_copies(module, body, name)) for name in add.operands]
    found = [value for value in constants if value is not None]
    return found[0] if len(found) == 1 and element in counters else None


# ------------------------------------------------------------------ collectives


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between devices, as often as its loops execute it.

    Attributes:
      kind: one of KINDS.
      name: of the instruction.
      op_name: where it was traced; that of its fusion where the compiler made it.
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
            groups = _read_groups(instruction.attributes, math.prod(self.mesh.values()))
            axes, size = _axes_of(groups, self.mesh), max(map(len, groups), default=1)
        result = count_bytes(instruction.shape)
        if instruction.opcode == "send" or instruction.opcode.endswith("-start"):
            # The shape holds operands and results.
            result = payload * size if kind == "all-gather" else payload
        elif kind == "reduce-scatter" and instruction.opcode == "all-reduce":
            result = payload // size
        weight = ""
        if operands and operands[0] is not None:
            weight = _Tracer(self.module).find(computation, operands[0].name)
        return Collective(
            kind=kind,
            name=instruction.name,
            op_name=instruction.op_name,
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


# ------------------------------------------------------------------ groups of devices


def _read_groups(attributes: str, devices: int) -> list[list[int]]:
    """Groups of devices, in each of the ways that HLO writes them. [] where they cannot be read."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if pairs:
        found = [sorted({int(a), int(b)}) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return [pair for pair in found if len(pair) == 2]
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if listed:
        groups = [[int(k) for k in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [list(range(devices))]  # {} is everybody
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        ids = _iota(iota[3], iota[4])
        return ids.reshape(int(iota[1]), int(iota[2])).tolist()
    named = re.search(r"replica_groups=@?mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes)
    if named:
        return _read_mesh_groups(named[1], named[2], named[3])
    return []


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers 0 .. 7 as a 2 x 4 matrix, transposed."""
    shape = [int(size) for size in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids


def _read_mesh_groups(axes: str, device_ids: str, names: str) -> list[list[int]]:
    """`mesh['a'=2,'b'=4] {'b'}`, and sub-axes such as `'b':(2)2`: groups along the named axes."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)
    if device_ids.strip(", ") and order is None:
        return []
    ids = np.arange(math.prod(sizes.values())) if order is None else _iota(order[1], order[2])
    # Cut each axis into (before, size, after) where a sub-axis is named.
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", names)
    shape: list[int] = []
    inside: list[bool] = []
    for name, size in sizes.items():
        parts = sorted((int(pre or 1), int(sub or size)) for n, pre, sub in wanted if n == name)
        at = 1
        for pre, sub in parts:
            shape += [pre // at, sub]
            inside += [False, True]
            at = pre * sub
        shape.append(size // at)
        inside.append(False)
    ids = ids.reshape(shape)
    outer = [axis for axis, within in enumerate(inside) if not within]
    inner = [axis for axis, within in enumerate(inside) if within]
    width = math.prod(shape[axis] for axis in inner)
    return ids.transpose(outer + inner).reshape(-1, width).tolist()


def _axes_of(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    if not groups:
        return (UNKNOWN_AXIS,)
    devices = math.prod(mesh.values())
    largest = max(max(group) for group in groups)
    if largest >= devices:
        raise HloError(
            f"the program runs on device {largest} and the mesh {dict(mesh)} has {devices} "
            "devices; pass the sizes of the mesh that it was compiled for"
        )
    differing: set[str] = set()
    for group in groups:
        places = np.array(np.unravel_index(list(group), tuple(mesh.values())))
        for name, along in zip(mesh, places, strict=True):
            if len(set(along.tolist())) > 1:
                differing.add(name)
    return tuple(name for name in mesh if name in differing)


# ------------------------------------------------------------------ where values come from


class _Tracer:
    """Follows values back through what only moves them, to an argument of the program."""

    def __init__(self, module: Module):
        self.module = module
        self.steps = 0

    def find(self, computation: Computation, name: str) -> str:
        """The argument's name, or '' where something was computed on the way."""
        return self._find(computation, name) or ""

    def _find(self, computation: Computation, name: str) -> str | None:
        self.steps += 1
        instruction = computation.instructions.get(name)
        if instruction is None or self.steps > 200:
            return None
        opcode = instruction.opcode
        if opcode == "parameter":
            return self._find_argument(computation, instruction)
        if opcode == "get-tuple-element":
            element = _element(instruction)
            return (
                None
                if element is None
                else self._find_element(computation, instruction.operands[0], element)
            )
        if opcode == "fusion":
            inner = self.module.computations.get(instruction.called("calls") or "")
            if inner is None or not _only_moves(self.module, inner):
                return None
            return self._find(computation, instruction.operands[0])
        if opcode in _MOVES and instruction.operands:
            return self._find(computation, instruction.operands[0])
        return None

    def _find_element(self, computation: Computation, name: str, element: int) -> str | None:
        state = computation.instructions.get(name)
        if state is None:
            return None
        if state.opcode == "tuple":
            return self._find(computation, state.operands[element])
        if state.opcode == "parameter":
            outer = self.module.caller_of(computation.name)
            if outer is None:
                return self._find_argument(computation, state)
            return self._find_carried(*outer, element)
        if state.opcode == "while":
            return self._find_carried(computation, state, element)
        return None

    def _find_carried(self, computation, loop: Instruction, element: int) -> str | None:
        """An element of a loop's state, if no turn changes it."""
        if not _is_carried(self.module, loop, element):
            return None
        return self._find_element(computation, loop.operands[0], element)

    def _find_argument(self, computation: Computation, parameter: Instruction) -> str | None:
        if computation is self.module.entry:
            return parameter.op_name or parameter.name
        caller = self.module.callers.get(computation.name)
        if caller is None:
            return None
        outer, instruction = caller
        return self._find(outer, instruction.operands[int(parameter.arguments)])


def _only_moves(module: Module, computation: Computation) -> bool:
    """Whether a fusion changes no value: it slices, casts and copies."""
    return all(
        instruction.opcode in _MOVES | _AUXILIARY
        or (
            instruction.opcode == "fusion"
            and _only_moves(module, module.computations[instruction.called("calls") or ""])
        )
        for instruction in _feeding_root(computation)
    )


def _feeding_root(computation: Computation) -> Iterator[Instruction]:
    """Instructions on the way to the root along first operands."""
    name = computation.root
    while name in computation.instructions:
        instruction = computation.instructions[name]
        yield instruction
        name = instruction.operands[0] if instruction.operands else ""
