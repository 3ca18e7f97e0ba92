"""Optimised HLO text as data: computations of instructions, and the constants that loops carry."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    "bf16": 16,
    "c64": 64,
    "c128": 128,
}
_SHAPE = re.compile(r"\b(pred|token|opaque|bf16|[sufc]\d++\w*+)\[([\d,<= ]*)\]")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')

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
JOIN = 'custom_call_target="ConcatBitcast"'
"""In the attributes of an operation that joins such pieces."""

# The attribute that names the computation which an operation runs once.
_CALLED = {"fusion": "calls", "async-start": "calls", "call": "to_apply"}


class HloError(ValueError):
    """The text is not what XLA prints for a compiled program."""


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

    def passed_to(self, computation: str, parameter: int) -> tuple[Computation, str] | None:
        """What a fusion, call or conditional passes as a parameter, and where that stands."""
        found = self._callers.get(computation)
        if found is None:
            return None
        outer, instruction = found
        if instruction.opcode == "conditional":  # the first operand chooses
            parameter = 1 + instruction.branches.index(computation)
        if parameter >= len(instruction.operands):
            return None
        return outer, instruction.operands[parameter]

    @functools.cached_property
    def _callers(self) -> dict[str, tuple[Computation, Instruction]]:
        callers: dict[str, tuple[Computation, Instruction]] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                if instruction.opcode == "conditional":
                    names = instruction.branches
                else:
                    attribute = _CALLED.get(instruction.opcode, "")
                    names = [instruction.called(attribute) or ""] if attribute else []
                callers.update(dict.fromkeys(names, (computation, instruction)))
        return callers


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`. Raises HloError where it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry = None
    current: Computation | None = None
    for line in _join_lines(text):
        if current is None:
            header = _HEADER.match(line)
            if header and "->" in line:
                current = Computation(header[2])
                computations[current.name] = current
                entry = current if header[1] else entry
            continue
        if line.rstrip() == "}":
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


def _join_lines(text: str) -> Iterator[str]:
    """Lines; an instruction whose attributes hold line breaks (kernels do) becomes one."""
    pending = ""
    for line in text.splitlines():
        starts = not line or line[0] in " %" or line.startswith(("ENTRY", "HloModule"))
        if pending and (starts or line.rstrip() == "}"):
            yield pending
            pending = line
        else:
            pending = f"{pending} {line}" if pending else line
    yield pending


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


# ------------------------------------------------------------------ values


def constant_of(instruction: Instruction | None) -> int | None:
    """The value of an integer constant; None for all else."""
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def element_of(instruction: Instruction | None) -> int | None:
    """k of `get-tuple-element(...), index=k`; None for all else."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else None


def behind_copies(module: Module, computation: Computation, name: str) -> Instruction | None:
    """What a value is a copy of: also looks through loops that only carry it."""
    instruction = computation.instructions.get(name)
    while instruction is not None:
        if instruction.opcode in _COPIES or JOIN in instruction.attributes:
            name = instruction.operands[0]
        elif instruction.opcode == "get-tuple-element":
            loop = computation.instructions.get(instruction.operands[0])
            element = element_of(instruction)
            if loop is None or loop.opcode != "while" or element is None:
                return instruction
            state = computation.instructions.get(loop.operands[0])
            if state is None or state.opcode != "tuple" or not is_carried(module, loop, element):
                return instruction
            name = state.operands[element]
        else:
            return instruction
        instruction = computation.instructions.get(name)
    return None


def is_carried(module: Module, loop: Instruction, element: int) -> bool:
    """Whether an element of a loop's state is the same from the first turn to the last."""
    body = module.computations[loop.called("body") or ""]
    root = body.instructions[body.root]
    if root.opcode != "tuple" or element >= len(root.operands):
        return False
    source = behind_copies(module, body, root.operands[element])
    return (
        element_of(source) == element
        and source is not None
        and body.instructions[source.operands[0]].opcode == "parameter"
    )
