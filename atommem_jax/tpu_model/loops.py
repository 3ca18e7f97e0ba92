"""Loops of a compiled program: their names, and how often they turn."""

import dataclasses
import re

from atommem_jax.tpu_model.hlo_text import (
    Computation,
    Instruction,
    Module,
    behind_copies,
    constant_of,
    element_of,
    is_carried,
)

_KNOWN_TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')


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
    inner = [re.sub(r"^(?:\w*\()*", "", part).rstrip(")") for part in parts]
    return [name for name in inner if name]


# What JAX itself puts into paths; `eval_jaxpr` is the `closed_call` of JAX 0.12.
_PLUMBING = {
    *("body", "checkpoint", "closed_call", "cond", "eval_jaxpr"),
    *("rematted_computation", "shard_map"),
}


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
    at = element_of(counter)
    if direction is None or direction[1] != "LT" or at is None or bound is None:
        return None
    limit = constant_of(bound)
    if limit is None:
        element = element_of(bound)
        limit = None if element is None else _carried(module, computation, loop, element)
    first = _initial(module, computation, loop, at)
    step = _step(module, body, at)
    if limit is None or first is None or not step:
        return None
    return max(-(-(limit - first) // step), 0)


def _initial(
    module: Module, computation: Computation, loop: Instruction, element: int
) -> int | None:
    """The constant that element `element` of a loop's state starts as."""
    state = behind_copies(module, computation, loop.operands[0])
    if state is None or state.opcode != "tuple" or element >= len(state.operands):
        return None
    start = behind_copies(module, computation, state.operands[element])
    constant = constant_of(start)
    outer = module.caller_of(computation.name)
    if constant is not None or outer is None:
        return constant
    inherited = element_of(start)
    return None if inherited is None else _carried(module, *outer, inherited)


def _carried(
    module: Module, computation: Computation, loop: Instruction, element: int
) -> int | None:
    """The constant that an element of a loop's state is from the first turn to the last."""
    if not is_carried(module, loop, element):
        return None
    return _initial(module, computation, loop, element)


def _step(module: Module, body: Computation, element: int) -> int | None:
    """What the body adds to the counter."""
    root = body.instructions[body.root]
    if root.opcode != "tuple" or element >= len(root.operands):
        return None
    add = behind_copies(module, body, root.operands[element])
    if add is not None and add.opcode == "fusion":  # the counters of JAX's loops advance by one
        return 1 if "add" in add.name or "wrapped_add" in (add.called("calls") or "") else None
    if add is None or add.opcode != "add":
        return None
    constants = [constant_of(behind_copies(module, body, name)) for name in add.operands]
    counters = [element_of(behind_copies(module, body, name)) for name in add.operands]
    found = [value for value in constants if value is not None]
    return found[0] if len(found) == 1 and element in counters else None
