"""Automata that read the action protocol symbol by symbol, on the host.

A symbol is an int: a byte, 256 and more for a reserved token, or one of the negative constants
below. States are tuples. A node, within a state, is the tuple of the last symbols that may be the
beginning of a tag.

* STRICT, for masks. READING permits actions other than answers, as many as `grammar` counts,
  ANSWERING one read or answer, FINAL one answer; then eos. Anything else is dead.
* LENIENT, for parsing. It reads anything: text outside of actions is skipped, and so are close
  tags there; an open tag always starts a new action, and leaves an open one unclosed.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from atommem_jax.language.protocol import Protocol, Tag
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.types import PERMITTED, ActionKind, Phase

Symbols = tuple[int, ...]
State = tuple[Any, ...]

EOS, PAD = -1, -2
JUNK = -3
"""Any other token without bytes."""
EDGE = -4
"""Ends the symbols of every token."""

DEAD, DONE = 0, 1
"""Places in `Strict.starts` of the states of a turn that went wrong and of one that has ended."""

_DIGITS = frozenset(b"0123456789")
_STRADDLED, _EMPTY, _FILLED = range(3)  # text so far: see Strict
_MAY_BE_EMPTY = (ActionKind.SCRATCHPAD, ActionKind.DELETE)


class Output(NamedTuple):
    """What an automaton reports of one symbol."""

    opened: int = 0
    closed: bool = False
    target: int = -1
    inclusive: bool = False  # the symbol was the last of the target, not the first behind it


class _Target:
    """Reads the target literal of one tag, symbol by symbol."""

    def __init__(self, tag: Tag, protocol: Protocol, reserved: dict[str, int]):
        literals = protocol.write_targets(tag.kind)
        found = [literal for literal in literals if literal in reserved]
        if found and len(found) < len(literals):
            missing = next(literal for literal in literals if literal not in reserved)
            raise ValueError(
                f"max_target: found {protocol.max_target}, but the tokenizer reserves "
                f"{found[0]!r} and not {missing!r}; allowed are tokenizers that reserve all "
                "targets or none. Train it with Protocol.reserved_names()."
            )
        self.symbols = {reserved[literal]: i + 1 for i, literal in enumerate(found)}
        assert tag.target is not None
        before, _, after = tag.target.partition("{}")
        self.before, self.after = before.encode(), after.encode()
        self.numbers = {str(i): i for i in range(1, protocol.max_target + 1)}
        self.initial = (0, "")

    def read(self, progress: State, symbol: int) -> tuple[State | None, int, bool]:
        """(progress or None when over, value or -1 if unreadable, whether symbol is part of it).

        Progress is (bytes matched of what surrounds the number, digits).
        """
        if self.symbols:
            return None, self.symbols.get(symbol, -1), True
        matched, digits = progress
        over = matched - len(self.before)  # bytes matched behind the number
        if over < 0:
            fits = symbol == self.before[matched]
            return ((matched + 1, ""), 0, True) if fits else (None, -1, True)
        if over == 0 and symbol in _DIGITS:
            longer = digits + chr(symbol)
            known = any(number.startswith(longer) for number in self.numbers)
            return (matched, longer if known else "?"), 0, True
        value = self.numbers.get(digits, 0)
        if not digits or (self.after and symbol != self.after[over]):
            return None, -1, True
        if not self.after:
            return None, value, False
        if over + 1 == len(self.after):
            return None, value, True
        return (matched + 1, digits), 0, True


class Spec:
    """A protocol in symbols of a tokenizer, shared by the two automata."""

    def __init__(self, protocol: Protocol, tokenizer: Tokenizer):
        names = [name for name in protocol.reserved_names() if name in tokenizer.reserved]
        self.reserved = {name: 256 + i for i, name in enumerate(names)}
        self.free_text = protocol.free_text
        self.opens = {self._spell(tag.open): tag.kind for tag in protocol.tags}
        self.closes = {tag.kind: self._spell(tag.close) for tag in protocol.tags}
        self.targets = {
            tag.kind: _Target(tag, protocol, self.reserved) for tag in protocol.tags if tag.target
        }
        self.prefixes = {
            kind: _list_prefixes([*self.opens, close]) for kind, close in self.closes.items()
        }
        self.prefixes[ActionKind.NONE] = _list_prefixes(self.opens)
        literal_bytes = {byte for name in protocol.reserved_names() for byte in name.encode()}
        self.bytes = sorted(literal_bytes | _DIGITS)

    def _spell(self, literal: str) -> Symbols:
        if literal in self.reserved:
            return (self.reserved[literal],)
        return tuple(literal.encode())

    def follow(self, kind: ActionKind, node: Symbols, symbol: int) -> Symbols:
        """The longest end of what was read that begins an open tag or the close tag of `kind`."""
        node = (*node, symbol)
        while node not in self.prefixes[kind]:
            node = node[1:]
        return node

    def begin_target(self, kind: ActionKind) -> State | None:
        return self.targets[kind].initial if kind in self.targets else None


def _list_prefixes(literals: Iterable[Symbols]) -> set[Symbols]:
    return {literal[:n] for literal in literals for n in range(len(literal) + 1)}


class Lenient:
    """States: ("outside", node), ("inside", kind, target progress, node, clean), ("over",).

    `clean`: what followed the header is a beginning of the close tag; always True but in deletes.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        self.starts: list[State] = [("outside", ())]

    def step(self, state: State, symbol: int) -> tuple[State, Output]:
        spec, outside = self.spec, self.starts[0]
        if symbol == EDGE or state == ("over",):
            return state, Output()
        if state[0] == "outside":
            if symbol in (EOS, PAD):
                return ("over",), Output()
            node = spec.follow(ActionKind.NONE, state[1], symbol)
            return self._enter(node) if node in spec.opens else (("outside", node), Output())

        _, kind, progress, node, clean = state
        after = spec.follow(kind, node, symbol)
        if progress is not None:
            progress, value, inclusive = spec.targets[kind].read(progress, symbol)
            if progress is not None:
                return ("inside", kind, progress, after, True), Output()
            if value >= 0 and inclusive:
                return ("inside", kind, None, (), True), Output(target=value, inclusive=True)
            if value >= 0:
                state, output = self.step(("inside", kind, None, (), True), symbol)
                return state, output._replace(target=value)
        if symbol in (EOS, PAD):
            return ("over",), Output()
        if after in spec.opens:
            return self._enter(after)
        if after == spec.closes[kind]:
            return outside, Output(closed=clean)
        if not 0 <= symbol < 256:
            return outside, Output()
        if kind == ActionKind.DELETE:
            whole = after == (*node, symbol)
            clean = clean and whole and spec.closes[kind][: len(after)] == after
        return ("inside", kind, None, after, clean), Output()

    def in_header(self, state: State) -> bool:
        """Whether a target is still being read."""
        return state[0] == "inside" and state[2] is not None

    def in_text(self, state: State) -> bool:
        """Whether an action is open, with no part of a tag pending."""
        return state[0] == "inside" and state[3] == ()

    def _enter(self, node: Symbols) -> tuple[State, Output]:
        kind = self.spec.opens[node]
        return ("inside", kind, self.spec.begin_target(kind), (), True), Output(opened=kind)


class Strict:
    """States: dead, done, ("between", phase, node), ("inside", kind, target progress, fill, node).

    `fill` says whether `parse` would find text: STRADDLED, the header ended within this token;
    EMPTY, it ended before; FILLED, a token of text has ended with no part of a tag pending.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        self.between: State = ("between", Phase.READING, ())
        phases = [("between", phase, ()) for phase in Phase if phase != Phase.DONE]
        self.starts: list[State] = [("dead",), ("done",), *phases]
        self.first = (*range(2, len(self.starts)), DONE)  # per Phase, its place in `starts`

    def step(self, state: State, symbol: int) -> tuple[State, Output]:
        if state[0] == "between":
            return self._step_between(state, symbol)
        if state[0] == "inside":
            return self._step_inside(state, symbol)
        stays = state == ("done",) and symbol in (PAD, EDGE)
        return (state if stays else ("dead",)), Output()

    def _step_between(self, state: State, symbol: int) -> tuple[State, Output]:
        spec, dead = self.spec, (("dead",), Output())
        _, phase, node = state
        if symbol == EDGE:
            return state, Output()
        if symbol == EOS:
            ends = phase == Phase.READING and (spec.free_text or not node)
            return (("done",), Output()) if ends else dead
        after = spec.follow(ActionKind.NONE, node, symbol)
        if after in spec.opens:
            kind = spec.opens[after]
            fill = _FILLED if kind in _MAY_BE_EMPTY else _STRADDLED
            entered = ("inside", kind, spec.begin_target(kind), fill, ())
            return (entered, Output(opened=kind)) if kind in PERMITTED[phase] else dead
        if after == (*node, symbol) or (spec.free_text and 0 <= symbol < 256):
            return ("between", phase, after), Output()
        return dead

    def _step_inside(self, state: State, symbol: int) -> tuple[State, Output]:
        spec, dead = self.spec, (("dead",), Output())
        _, kind, progress, fill, node = state
        if symbol == EDGE:
            if fill == _STRADDLED:
                fill = _EMPTY
            elif progress is None and not node:
                fill = _FILLED
            return ("inside", kind, progress, fill, node), Output()
        if progress is not None:
            progress, value, inclusive = spec.targets[kind].read(progress, symbol)
            touched = fill if kind in _MAY_BE_EMPTY else _STRADDLED
            if progress is not None:
                return ("inside", kind, progress, touched, ()), Output()
            if value < 1:
                return dead
            if inclusive:
                return ("inside", kind, None, touched, ()), Output()
        after = spec.follow(kind, node, symbol)
        if after == spec.closes[kind]:
            return (self.between, Output()) if fill == _FILLED else dead
        if after in spec.opens or not 0 <= symbol < 256:
            return dead
        closing = after == (*node, symbol) and spec.closes[kind][: len(after)] == after
        if kind == ActionKind.DELETE and not closing:
            return dead
        return ("inside", kind, None, fill, after), Output()
