"""Where values come from: which argument of a program a collective moves, if any."""

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
        if opcode == "fusion":
            inner = self.module.computations.get(instruction.called("calls") or "")
            if inner is None or not _only_moves(self.module, inner):
                return None
            return self._find(computation, instruction.operands[0])
        if (opcode in _MOVES or JOIN in instruction.attributes) and instruction.operands:
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
