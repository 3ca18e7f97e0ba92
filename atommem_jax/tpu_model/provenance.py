"""Where values come from, and where they go: what a collective moves, and for whom."""

import itertools
from collections.abc import Iterator

from atommem_jax.tpu_model.hlo_text import (
    JOIN,
    Computation,
    Instruction,
    Module,
    element_of,
    is_carried,
)

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
    "dynamic-slice",
    "optimization-barrier",
    "pad",
    "reshape",
    "slice",
    "slice-done",
    "slice-start",
    "transpose",
}
_AUXILIARY = {"parameter", "constant", "tuple", "get-tuple-element", "iota", "broadcast"}


def find_argument(module: Module, computation: Computation, name: str) -> str:
    """The argument of the program whose values an instruction holds unchanged, or ''.

    Unchanged are values that were sliced, cast, copied or gathered, in loops and branches too. What
    cannot be followed gives '': where that would be trusted, look at sizes as well.
    """
    return _Tracer(module).find(computation, name)


def find_readers(module: Module, computation: Computation, name: str, outside: str) -> str:
    """The innermost path in the traced program that holds all who compute with a value.

    Readers are looked for behind what only moves the value, and behind what names no place within
    the loop that all of this stands in, whose path is `outside`.

    Returns:
      The path, `jit(f)/turns/while/body/prefill`, or of one reader alone its whole op_name; ''
      where the value leaves its computation, so that not all of its readers are known.
    """
    paths: list[str] = []
    seen, waiting = {name}, [name]
    while waiting:
        value = waiting.pop()
        if value == computation.root:
            return ""
        for reader in computation.instructions.values():
            if value not in reader.operands or reader.name in seen:
                continue
            seen.add(reader.name)
            only_moved = reader.operands[0] == value and _moves(module, reader)
            if only_moved or is_prefix(reader.op_name, outside):
                waiting.append(reader.name)
            else:
                paths.append(reader.op_name)
    steps = zip(*(path.split("/") for path in paths), strict=False)  # as far as the shortest goes
    shared = itertools.takewhile(lambda step: len(set(step)) == 1, steps)
    return "/".join(step[0] for step in shared)


def is_prefix(op_name: str, path: str) -> bool:
    """Whether an op_name, which may be empty, says no more than a part of `path`."""
    return f"{path}/".startswith(f"{op_name}/" if op_name else "")


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
            element = element_of(instruction)
            return (
                None
                if element is None
                else self._find_element(computation, instruction.operands[0], element)
            )
        if _moves(self.module, instruction) and instruction.operands:
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
            if outer is not None:
                return self._find_carried(*outer, element)
            passed = self.module.passed_to(computation.name, int(state.arguments))
            return None if passed is None else self._find_element(*passed, element)
        if state.opcode == "while":
            return self._find_carried(computation, state, element)
        return None

    def _find_carried(self, computation, loop: Instruction, element: int) -> str | None:
        """An element of a loop's state, if no turn changes it."""
        if not is_carried(self.module, loop, element):
            return None
        return self._find_element(computation, loop.operands[0], element)

    def _find_argument(self, computation: Computation, parameter: Instruction) -> str | None:
        if computation is self.module.entry:
            return parameter.op_name or parameter.name
        passed = self.module.passed_to(computation.name, int(parameter.arguments))
        return None if passed is None else self._find(*passed)


def _moves(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction's result holds values of its operands in another place or form."""
    if instruction.opcode == "fusion":
        inner = module.computations.get(instruction.called("calls") or "")
        return inner is not None and _only_moves(module, inner)
    return instruction.opcode in _MOVES or JOIN in instruction.attributes


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
