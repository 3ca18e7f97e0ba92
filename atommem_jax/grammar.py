"""The action protocol, compiled for a tokenizer into automata over its tokens.

A `Protocol` is data: the names of the tags and of the targets. `compile_grammar` turns it into
two automata over symbols (the 256 bytes, one symbol for each reserved token, end, pad and
"junk", which is every other token without bytes) and runs the bytes of all tokens through them
on the host, so that a tag may take one token or several. Tokens with the same effect share a
class, which keeps the tables small for any vocabulary.

* STRICT, for masks. READING permits up to `max_actions` actions other than answers, ANSWERING
  one read or answer, FINAL one answer; then eos. A state is one int32: `count * num_states +
  base`. `allowed` admits a token only if the turn can still end well within its budget.
* LENIENT, for `parse`. It reads anything: text outside of actions is skipped, and so are close
  tags there; an open tag always starts a new action, and leaves an open one unclosed.

What the lenient reading takes for the text of an action: the tokens from the first that lies
wholly after the open tag (and the target) up to the last token boundary at which no part of a
tag is pending, that is, at which what was read does not end in the beginning of an open tag or
of the action's own close tag. A token that straddles a tag is thus no text. An unreadable target
is text. Close tags of other actions, when spelled in bytes, are text as well; a reserved token
that has no place where it stands ends the action unclosed, so no reserved id is ever text.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from atommem_jax import tokenizer as tokenizer_lib
from atommem_jax.types import ActionKind, Actions, Phase

_TARGETED = (ActionKind.UPDATE, ActionKind.DELETE)
_MAY_BE_EMPTY = (ActionKind.SCRATCHPAD, ActionKind.DELETE)
_PERMITTED = {
    Phase.READING: tuple(kind for kind in ActionKind if kind not in (0, ActionKind.ANSWER)),
    Phase.ANSWERING: (ActionKind.READ, ActionKind.ANSWER),
    Phase.FINAL: (ActionKind.ANSWER,),
}
_FAR = 1 << 29  # more tokens than any budget: acceptance is out of reach


@dataclasses.dataclass(frozen=True)
class Tag:
    """How one kind of action is written: `open`, the target if any, the text, `close`.

    Attributes:
      kind: what the action is.
      open: literal that starts the action.
      close: literal that ends it; several kinds may share one.
      target: the literal of a target with `{}` for its number, such as "<{}>" or "Memory {}:";
        None for kinds without a target.
    """

    kind: ActionKind
    open: str
    close: str
    target: str | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The action language.

    Attributes:
      name: for messages and reports.
      tags: one a kind; kinds without a tag do not exist in this protocol.
      max_target: largest number a target can have (K of the memory).
      free_text: whether masks admit text between actions. Parsing always skips it.

    Raises ValueError on construction for a tag that repeats or contains another, a kind given
    twice, no answer tag, or a target that is missing, out of place or without its braces.
    """

    name: str
    tags: tuple[Tag, ...]
    max_target: int
    free_text: bool = False

    def __post_init__(self) -> None:
        if self.max_target < 1:
            raise ValueError(
                f"max_target: found {self.max_target}; allowed are 1 and more. Use the number of "
                "entries that the memory shows."
            )
        kinds = [tag.kind for tag in self.tags]
        if len(set(kinds)) < len(kinds) or ActionKind.ANSWER not in kinds or 0 in kinds:
            raise ValueError(
                f"tags: found the kinds {[kind.name for kind in kinds]}; allowed are distinct "
                "kinds other than NONE, with ANSWER among them. Give each kind one Tag."
            )
        for tag in self.tags:
            self._check_target(tag)
        opens = [tag.open for tag in self.tags]
        literals = [*opens, *{tag.close: None for tag in self.tags}]
        for i, one in enumerate(literals):
            for other in literals[:i] + literals[i + 1 :]:
                if one in other:
                    raise ValueError(
                        f"tags: found {one!r} within {other!r}; allowed are literals none of "
                        "which is empty, repeats or contains another (close tags may be shared). "
                        "Rename one of them."
                    )

    def _check_target(self, tag: Tag) -> None:
        if (tag.target is not None) != (tag.kind in _TARGETED):
            raise ValueError(
                f"target: found {tag.target!r} in the tag of {tag.kind.name}; allowed is a target "
                "for UPDATE and DELETE, and None for the others. Correct the Tag."
            )
        if tag.target is None:
            return
        before, braces, after = tag.target.partition("{}")
        if not braces or "{" in before + after or "}" in before + after:
            raise ValueError(
                f"target: found {tag.target!r}; allowed is a text with one '{{}}' where the "
                "number stands, such as 'Memory {}:'. Add the braces."
            )
        if (after or tag.close)[0].isdigit():
            raise ValueError(
                f"target: found {tag.target!r} before {tag.close!r}, with a digit right after the "
                "number; allowed is any other character there. Add one to the target."
            )
        tags = [literal for other in self.tags for literal in (other.open, other.close)]
        for literal in self.write_targets(tag.kind):
            if any(literal in other or other in literal for other in tags):
                raise ValueError(
                    f"target: found {literal!r}, which contains a tag or is part of one; allowed "
                    "are other texts. Rename the target or the tag."
                )

    def find_tag(self, kind: ActionKind) -> Tag:
        """The tag of `kind`. Raises KeyError if the protocol has none."""
        for tag in self.tags:
            if tag.kind == kind:
                return tag
        raise KeyError(f"protocol {self.name!r} has no tag for {ActionKind(kind).name}")

    def write_targets(self, kind: ActionKind) -> tuple[str, ...]:
        """The literals of targets 1..max_target; empty for kinds without a target."""
        target = self.find_tag(kind).target
        if target is None:
            return ()
        return tuple(target.replace("{}", str(i)) for i in range(1, self.max_target + 1))

    def reserved_names(self) -> tuple[str, ...]:
        """All literals once each: what to reserve in a tokenizer trained for this protocol."""
        literals = [literal for tag in self.tags for literal in (tag.open, tag.close)]
        literals += [literal for tag in self.tags for literal in self.write_targets(tag.kind)]
        return tuple(dict.fromkeys(literals))


def compact(max_target: int, *, free_text: bool = False) -> Protocol:
    """One reserved token a tag and a target, for tokenizers trained here."""
    tags = tuple(
        Tag(kind, f"<{kind.name.lower()}>", "<end>", "<{}>" if kind in _TARGETED else None)
        for kind in ActionKind
        if kind
    )
    return Protocol("compact", tags, max_target, free_text)


def atommem(max_target: int, *, free_text: bool = False) -> Protocol:
    """The tags of the paper (arXiv 2601.08323), for pretrained tokenizers."""
    names = {
        ActionKind.CREATE: "create_memory",
        ActionKind.READ: "read_memory",
        ActionKind.UPDATE: "update_memory",
        ActionKind.DELETE: "delete_memory",
        ActionKind.SCRATCHPAD: "scratchpad",
        ActionKind.ANSWER: "answer",
    }
    targets = {ActionKind.UPDATE: "Memory {}:", ActionKind.DELETE: "Memory {}"}
    tags = tuple(Tag(k, f"<{n}>", f"</{n}>", targets.get(k)) for k, n in names.items())
    return Protocol("atommem", tags, max_target, free_text)


def spell(tokenizer: tokenizer_lib.Tokenizer, literal: str) -> tuple[int, ...]:
    """The ids of a tag or target: its reserved token if there is one, else its bytes."""
    if literal in tokenizer.reserved:
        return (tokenizer.reserved[literal],)
    ids = tokenizer.encode(literal)
    if b"".join(tokenizer.token_bytes[i] for i in ids) == literal.encode():
        return tuple(ids)
    of_byte = {piece: i for i, piece in enumerate(tokenizer.token_bytes) if len(piece) == 1}
    return tuple(of_byte[bytes([byte])] for byte in literal.encode())


@flax.struct.dataclass
class Grammar:
    """A protocol compiled for a tokenizer. S base states, C classes of tokens, V tokens."""

    classes: Int[Array, " V"]
    step: Int[Array, "S C"]  # next base state + S * actions opened
    need: Int[Array, "3 S C"]  # tokens needed after this one; row: actions left, 2 for more
    starts: Int[Array, " phases"]
    parse_classes: Int[Array, " V"]
    parse_step: Int[Array, "S2 C2"]
    parse_event: Int[Array, "S2 C2"]  # row of `events`
    events: Int[Array, "E 7"]  # see _Event
    needs_target: Bool[Array, " kinds"]
    max_actions: int = flax.struct.field(pytree_node=False)
    max_text: int = flax.struct.field(pytree_node=False)
    vocab_size: int = flax.struct.field(pytree_node=False)
    pad_id: int = flax.struct.field(pytree_node=False)
    eos_id: int = flax.struct.field(pytree_node=False)
    least_tokens: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def num_states(self) -> int:
        """Base states S; a state is below S * (max_actions + 1)."""
        return self.step.shape[0]

    def min_tokens(self, phase: int) -> int:
        """Host side: the tokens, eos included, of the shortest turn of `phase`.

        A budget below it cannot be met. Raises ValueError for an unknown phase.
        """
        return self.least_tokens[_check_phase(phase)]

    def start(self, phase: int | Int[Array, ""]) -> Int[Array, ""]:
        """The state before the first token of a turn. In Phase.DONE only padding follows.

        Raises ValueError for an unknown phase given as a Python int.
        """
        return self.starts[_check_phase(phase) if isinstance(phase, int) else phase]

    def advance(self, state: Int[Array, ""], token: Int[Array, ""]) -> Int[Array, ""]:
        """The state after `token`. Eos always leads to the terminal state, which is never left."""
        base = state % self.num_states
        after = state - base + self.step[base, self.classes[token]]
        return jnp.where(after < self.num_states * (self.max_actions + 1), after, _DEAD)

    def allowed(self, state: Int[Array, ""], remaining: int | Int[Array, ""]) -> Bool[Array, " V"]:
        """The tokens after which the turn can still end well.

        `remaining` counts the tokens left in the budget, this one included. The mask is never
        all False: after eos it holds pad alone; where the turn cannot end well any more (which a
        masked turn with a budget of at least `min_tokens` never meets) it holds eos alone.
        """
        base, count = state % self.num_states, state // self.num_states
        room = jnp.minimum(self.max_actions - count, 2)
        admitted = self.need[room, base] <= remaining - 1
        cut_off = jnp.arange(self.step.shape[1]) == self.classes[self.eos_id]
        return jnp.where(admitted.any(), admitted, cut_off)[self.classes]

    def states(self, phase: int | Int[Array, ""], response: Int[Array, " R"]) -> Int[Array, " R"]:
        """The state before each token of `response`."""

        def step(state, token):
            return self.advance(state, token), state

        return jax.lax.scan(step, self.start(phase), response)[1]

    def masks(self, phase: int | Int[Array, ""], response: Int[Array, " R"]) -> Bool[Array, "R V"]:
        """The mask under which each token of `response` was drawn with a budget of R."""
        remaining = response.shape[0] - jnp.arange(response.shape[0], dtype=jnp.int32)
        return jax.vmap(self.allowed)(self.states(phase, response), remaining)

    def parse(self, response: Int[Array, " R"], length: int | Int[Array, ""]) -> Actions:
        """The actions written in the first `length` tokens, up to eos or pad.

        Actions past `max_actions` are dropped; `text` is cut to `max_text`, `length` is not. The
        phase is not judged. `well_formed` is False for an action that is not closed, a target
        that is missing or unreadable, and a delete with text. A readable number outside
        1..max_target gives target 0.
        """
        size = response.shape[0]
        positions = jnp.arange(size + 1, dtype=jnp.int32)
        padded = jnp.pad(response, (0, 1), constant_values=self.pad_id)
        tokens = jnp.where(positions < length, padded, self.eos_id)
        read = _Reading.empty(self.max_actions)

        def step(carry, inputs):
            state, read = carry
            position, token = inputs
            group = self.parse_classes[token]
            event = _Event(*self.events[self.parse_event[state, group]])
            return (self.parse_step[state, group], read.record(event, position)), None

        (_, read), _ = jax.lax.scan(step, (jnp.int32(0), read), (positions, tokens))
        column = jnp.arange(self.max_text, dtype=jnp.int32)[None]
        length = read.end - read.start
        source = jnp.minimum(read.start[:, None] + column, size)
        return Actions(
            kind=read.kind,
            target=read.target,
            text=jnp.where(column < length[:, None], padded[source], self.pad_id),
            length=length,
            well_formed=read.closed & (read.readable | ~self.needs_target[read.kind]),
            count=jnp.minimum(read.count, self.max_actions),
        )


def _check_phase(phase: int) -> int:
    if phase not in list(Phase):
        names = ", ".join(f"{known.name}={known.value}" for known in Phase)
        raise ValueError(f"phase: found {phase}; allowed are {names}. Pass a types.Phase.")
    return int(phase)


class _Event(NamedTuple):
    """What the lenient automaton reports of one token. "Old" is the action it found open."""

    target: Any  # target read for the old action: 0 out of range, -1 none read
    late: Any  # that target ended within this token, not before it
    closed: Any  # the old action was closed as it should be
    opened: Any  # kind of the action that began, or 0
    new_target: Any  # as `target`, for the action that began
    header: Any  # the token ended where a target is still being read
    clean: Any  # the token ended in an action, with no part of a tag pending


@flax.struct.dataclass
class _Reading:
    """What has been read so far: rows of actions, and where the last header may have ended."""

    kind: Int[Array, " A"]
    target: Int[Array, " A"]
    start: Int[Array, " A"]
    end: Int[Array, " A"]
    closed: Bool[Array, " A"]
    readable: Bool[Array, " A"]
    count: Int[Array, ""]
    header_end: Int[Array, ""]

    @classmethod
    def empty(cls, rows: int) -> "_Reading":
        none, no = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
        return cls(none, none, none, none, no, no, jnp.int32(0), jnp.int32(0))

    def record(self, event: _Event, position: Int[Array, ""]) -> "_Reading":
        """Rows after the token at `position`. Writes past the last row are dropped."""
        rows = jnp.arange(self.kind.shape[0])
        after = position + 1
        old = rows == self.count - 1
        got = old & (event.target >= 0)
        first = jnp.where(event.late > 0, after, self.header_end)

        count = self.count + jnp.minimum(event.opened, 1)
        current = rows == count - 1
        new = current & (event.opened > 0)
        start = jnp.where(new, after, jnp.where(got, first, self.start))
        end = jnp.where(new, after, jnp.where(got, first, self.end))
        target = jnp.where(got, event.target, self.target)
        return _Reading(
            kind=jnp.where(new, event.opened, self.kind),
            target=jnp.where(new, jnp.maximum(event.new_target, 0), target),
            start=start,
            end=jnp.where(current & (event.clean > 0), after, end),
            closed=self.closed | (old & (event.closed > 0)),
            readable=self.readable | got | (new & (event.new_target >= 0)),
            count=count,
            header_end=jnp.where(event.header > 0, after, self.header_end),
        )


# Compilation, on the host. A symbol is an int: a byte, 256 and more for a reserved token, or one
# of the negative numbers below. A node is the tuple of symbols that may be the beginning of a tag.

_Symbols = tuple[int, ...]
_State = tuple[Any, ...]

_EOS, _PAD, _JUNK, _EDGE = -1, -2, -3, -4  # _EDGE ends the symbols of every token
_DEAD, _DONE = 0, 1  # base states of the strict automaton
_DIGITS = frozenset(b"0123456789")
_STRADDLED, _EMPTY, _FILLED = range(3)  # text so far: see _Strict


class _Output(NamedTuple):
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

    def read(self, progress: _State, symbol: int) -> tuple[_State | None, int, bool]:
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


class _Spec:
    """A protocol in symbols of a tokenizer, shared by the two automata."""

    def __init__(self, protocol: Protocol, tokenizer: tokenizer_lib.Tokenizer):
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

    def _spell(self, literal: str) -> _Symbols:
        if literal in self.reserved:
            return (self.reserved[literal],)
        return tuple(literal.encode())

    def follow(self, kind: ActionKind, node: _Symbols, symbol: int) -> _Symbols:
        """The longest end of what was read that begins an open tag or the close tag of `kind`."""
        node = (*node, symbol)
        while node not in self.prefixes[kind]:
            node = node[1:]
        return node

    def begin_target(self, kind: ActionKind) -> _State | None:
        return self.targets[kind].initial if kind in self.targets else None


def _list_prefixes(literals: Iterable[_Symbols]) -> set[_Symbols]:
    return {literal[:n] for literal in literals for n in range(len(literal) + 1)}


class _Lenient:
    """States: ("outside", node), ("inside", kind, target progress, node, clean), ("over",).

    `clean`: what followed the header is a beginning of the close tag; always True but in deletes.
    """

    def __init__(self, spec: _Spec):
        self.spec = spec
        self.starts: list[_State] = [("outside", ())]

    def step(self, state: _State, symbol: int) -> tuple[_State, _Output]:
        spec, outside = self.spec, self.starts[0]
        if symbol == _EDGE or state == ("over",):
            return state, _Output()
        if state[0] == "outside":
            if symbol in (_EOS, _PAD):
                return ("over",), _Output()
            node = spec.follow(ActionKind.NONE, state[1], symbol)
            return self._enter(node) if node in spec.opens else (("outside", node), _Output())

        _, kind, progress, node, clean = state
        after = spec.follow(kind, node, symbol)
        if progress is not None:
            progress, value, inclusive = spec.targets[kind].read(progress, symbol)
            if progress is not None:
                return ("inside", kind, progress, after, True), _Output()
            if value >= 0 and inclusive:
                return ("inside", kind, None, (), True), _Output(target=value, inclusive=True)
            if value >= 0:
                state, output = self.step(("inside", kind, None, (), True), symbol)
                return state, output._replace(target=value)
        if symbol in (_EOS, _PAD):
            return ("over",), _Output()
        if after in spec.opens:
            return self._enter(after)
        if after == spec.closes[kind]:
            return outside, _Output(closed=clean)
        if not 0 <= symbol < 256:
            return outside, _Output()
        if kind == ActionKind.DELETE:
            whole = after == (*node, symbol)
            clean = clean and whole and spec.closes[kind][: len(after)] == after
        return ("inside", kind, None, after, clean), _Output()

    def _enter(self, node: _Symbols) -> tuple[_State, _Output]:
        kind = self.spec.opens[node]
        return ("inside", kind, self.spec.begin_target(kind), (), True), _Output(opened=kind)


class _Strict:
    """States: dead, done, ("between", phase, node), ("inside", kind, target progress, fill, node).

    `fill` says whether `parse` would find text: STRADDLED, the header ended within this token;
    EMPTY, it ended before; FILLED, a token of text has ended with no part of a tag pending.
    """

    def __init__(self, spec: _Spec):
        self.spec = spec
        self.between: _State = ("between", Phase.READING, ())
        phases = [("between", phase, ()) for phase in _PERMITTED]
        self.starts: list[_State] = [("dead",), ("done",), *phases]

    def step(self, state: _State, symbol: int) -> tuple[_State, _Output]:
        if state[0] == "between":
            return self._step_between(state, symbol)
        if state[0] == "inside":
            return self._step_inside(state, symbol)
        stays = state == ("done",) and symbol in (_PAD, _EDGE)
        return (state if stays else ("dead",)), _Output()

    def _step_between(self, state: _State, symbol: int) -> tuple[_State, _Output]:
        spec, dead = self.spec, (("dead",), _Output())
        _, phase, node = state
        if symbol == _EDGE:
            return state, _Output()
        if symbol == _EOS:
            ends = phase == Phase.READING and (spec.free_text or not node)
            return (("done",), _Output()) if ends else dead
        after = spec.follow(ActionKind.NONE, node, symbol)
        if after in spec.opens:
            kind = spec.opens[after]
            fill = _FILLED if kind in _MAY_BE_EMPTY else _STRADDLED
            entered = ("inside", kind, spec.begin_target(kind), fill, ())
            return (entered, _Output(opened=kind)) if kind in _PERMITTED[phase] else dead
        if after == (*node, symbol) or (spec.free_text and 0 <= symbol < 256):
            return ("between", phase, after), _Output()
        return dead

    def _step_inside(self, state: _State, symbol: int) -> tuple[_State, _Output]:
        spec, dead = self.spec, (("dead",), _Output())
        _, kind, progress, fill, node = state
        if symbol == _EDGE:
            if fill == _STRADDLED:
                fill = _EMPTY
            elif progress is None and not node:
                fill = _FILLED
            return ("inside", kind, progress, fill, node), _Output()
        if progress is not None:
            progress, value, inclusive = spec.targets[kind].read(progress, symbol)
            touched = fill if kind in _MAY_BE_EMPTY else _STRADDLED
            if progress is not None:
                return ("inside", kind, progress, touched, ()), _Output()
            if value < 1:
                return dead
            if inclusive:
                return ("inside", kind, None, touched, ()), _Output()
        after = spec.follow(kind, node, symbol)
        if after == spec.closes[kind]:
            return (self.between, _Output()) if fill == _FILLED else dead
        if after in spec.opens or not 0 <= symbol < 256:
            return dead
        closing = after == (*node, symbol) and spec.closes[kind][: len(after)] == after
        if kind == ActionKind.DELETE and not closing:
            return dead
        return ("inside", kind, None, fill, after), _Output()


class _Tokens(NamedTuple):
    """The vocabulary in symbol columns: token v is `flat[offsets[v] : offsets[v] + lengths[v]]`."""

    flat: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    columns: list[int]  # symbol of each column; the last is _EDGE


class _Effects(NamedTuple):
    """Effect of each class of tokens from each state; arrays [S, C] but for `classes` [V]."""

    classes: np.ndarray
    state: np.ndarray
    opened: np.ndarray
    closed: np.ndarray
    target: np.ndarray
    late: np.ndarray
    new_target: np.ndarray
    overflow: np.ndarray


def _list_tokens(spec: _Spec, tokenizer: tokenizer_lib.Tokenizer) -> _Tokens:
    other = next((byte for byte in range(256) if byte not in spec.bytes), None)
    kept = [*spec.bytes, *([] if other is None else [other])]
    columns = [*kept, *spec.reserved.values(), _EOS, _PAD, _JUNK, _EDGE]
    column_of = {symbol: i for i, symbol in enumerate(columns)}
    of_byte = np.array([column_of.get(byte, column_of.get(other or 0, 0)) for byte in range(256)])
    special = {tokenizer.reserved[name]: symbol for name, symbol in spec.reserved.items()}
    special |= {tokenizer.eos_id: _EOS, tokenizer.pad_id: _PAD}
    pieces = [b"\0" if i in special else p or b"\0" for i, p in enumerate(tokenizer.token_bytes)]
    lengths = np.array([len(piece) for piece in pieces])
    offsets = np.cumsum(lengths) - lengths
    flat = of_byte[np.frombuffer(b"".join(pieces), np.uint8)]
    for i, piece in enumerate(tokenizer.token_bytes):
        if i in special or not piece:
            flat[offsets[i]] = column_of[special.get(i, _JUNK)]
    return _Tokens(flat, offsets, lengths, columns)


def _tabulate(
    step: Callable[[_State, int], tuple[_State, _Output]], starts: list[_State], columns: list[int]
) -> tuple[list[_State], np.ndarray]:
    """All states reachable from `starts`, and int16 [5, S, columns]: next state and output."""
    states, index, rows = list(starts), {state: i for i, state in enumerate(starts)}, []
    for state in states:  # grows while it is walked
        row = []
        for symbol in columns:
            after, output = step(state, symbol)
            if after not in index:
                index[after] = len(states)
                states.append(after)
            row.append((index[after], *output))
        rows.append(row)
    return states, np.moveaxis(np.array(rows, np.int16), -1, 0)


def _run_tokens(table: np.ndarray, tokens: _Tokens) -> _Effects:
    """Runs every token from every state, byte position by byte position over all tokens at once.

    Beginnings of tokens with the same effect from all states are the same to what follows: each
    distinct one is worked out once, so the cost hardly depends on the size of the vocabulary.
    """
    size = table.shape[1]
    identity = np.zeros((7, size), np.int16)
    identity[0] = np.arange(size)
    identity[3] = identity[5] = -1
    effects, index = [identity], {identity.tobytes(): 0}
    reached = np.zeros(len(tokens.lengths), np.int64)
    width = len(tokens.columns)
    for position in range(tokens.lengths.max() + 1):
        active = np.flatnonzero(tokens.lengths >= position)
        column = np.full(len(active), width - 1)  # past its last symbol: the edge
        within = tokens.lengths[active] > position
        column[within] = tokens.flat[tokens.offsets[active[within]] + position]
        pairs, which = np.unique(reached[active] * width + column, return_inverse=True)
        ids = np.empty(len(pairs), np.int64)
        for i, pair in enumerate(pairs):
            effect = _extend(effects[pair // width], table[:, :, pair % width], position)
            ids[i] = index.setdefault(effect.tobytes(), len(effects))
            if ids[i] == len(effects):
                effects.append(effect)
        reached[active] = ids[which]
    used, classes = np.unique(reached, return_inverse=True)
    return _Effects(classes, *np.stack([effects[i] for i in used], -1).astype(np.int64))


def _extend(effect: np.ndarray, symbol: np.ndarray, position: int) -> np.ndarray:
    """`effect` [7, S] (rows as in _Effects) followed by one symbol, whose table is [5, S]."""
    state, opened, closed, target, late, new_target, overflow = effect
    after, opens, closes, value, inclusive = symbol[:, state]
    fresh = opened > 0  # what happens now happens to an action that began in this token
    old_value, new_value = (value >= 0) & ~fresh, (value >= 0) & fresh
    return np.stack(
        [
            after,
            np.where(opens > 0, opens, opened),
            closed | closes,
            np.where(old_value, value, target),
            np.where(old_value, inclusive | (position > 0), late),
            np.where(new_value, value, new_target),
            overflow | (fresh & ((opens > 0) | (closes > 0))),
        ]
    ).astype(np.int16)


def _measure(effects: _Effects) -> tuple[np.ndarray, np.ndarray]:
    """Least tokens to acceptance [S] if an action may still open, and `Grammar.need` [3, S, C].

    An action never shortens a turn once a required one is under way, so two cases are enough:
    none may open, or one may and none after it. Both are lengths of real turns.
    """
    state, opens = effects.state, effects.opened > 0
    closed_in = np.full(state.shape[0], _FAR)  # no further action may open
    closed_in[_DONE] = 0
    more_in = closed_in
    for _ in range(state.shape[0]):
        step_closed = np.where(opens, _FAR, closed_in[state])
        step_more = np.where(opens, closed_in[state], more_in[state])
        new_closed = np.minimum(closed_in, step_closed.min(1) + 1)
        new_more = np.minimum(more_in, step_more.min(1) + 1)
        if (new_closed == closed_in).all() and (new_more == more_in).all():
            break
        closed_in, more_in = new_closed, new_more
    none_left = np.where(opens, _FAR, closed_in[state])
    one_left = np.where(opens, closed_in[state], more_in[state])
    return more_in, np.stack([none_left, one_left, more_in[state]])


def _check_tokenizer(tokenizer: tokenizer_lib.Tokenizer) -> None:
    size, ids = tokenizer.vocab_size, {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    if len(tokenizer.token_bytes) != size:
        raise ValueError(
            f"token_bytes: found {len(tokenizer.token_bytes)}; allowed is one for each of the "
            f"{size} ids. Pad it with b'' for unused ids."
        )
    for field, value in ids.items():
        if value is None or not 0 <= value < size or tokenizer.token_bytes[value]:
            raise ValueError(
                f"{field}: found {value} in the tokenizer; allowed is an id in 0..{size - 1} that "
                "stands for no bytes. Give the tokenizer such a token."
            )
    if tokenizer.eos_id == tokenizer.pad_id:
        raise ValueError(
            f"pad_id: found {tokenizer.pad_id}, which is also eos_id; allowed is another id. Give "
            "the tokenizer a token of its own for padding."
        )


def compile_grammar(
    protocol: Protocol, tokenizer: tokenizer_lib.Tokenizer, *, max_actions: int, max_text: int
) -> Grammar:
    """Compiles `protocol` for `tokenizer`, on the host.

    Args:
      protocol: the tags; each literal is one reserved token if the tokenizer has it under that
        name, and the bytes of the literal otherwise.
      tokenizer: any `Tokenizer`.
      max_actions: rows A of the parsed Actions, and the most actions a masked turn can hold.
      max_text: width X of their text.

    Raises ValueError for sizes below 1, a tokenizer without eos or pad, with only some of the
    targets reserved or unable to spell a phase's tags, and for one with a token in which two
    actions begin, or one begins and ends.
    """
    for field, value in (("max_actions", max_actions), ("max_text", max_text)):
        if value < 1:
            raise ValueError(f"{field}: found {value}; allowed are 1 and more. Raise it.")
    _check_tokenizer(tokenizer)
    spec = _Spec(protocol, tokenizer)
    tokens = _list_tokens(spec, tokenizer)
    strict, lenient = _Strict(spec), _Lenient(spec)

    _, table = _tabulate(strict.step, strict.starts, tokens.columns)
    masked = _run_tokens(table, tokens)
    least, need = _measure(masked)
    size = masked.state.shape[0]
    step = masked.state + size * (masked.opened > 0)
    step[:, masked.classes[tokenizer.eos_id]] = _DONE
    step[_DONE] = _DONE
    need[:, _DONE, masked.classes[tokenizer.pad_id]] = -_FAR  # padding is beyond the budget
    shortest = [int(least[2 + phase]) for phase in _PERMITTED]
    if max(shortest) >= _FAR:
        raise ValueError(
            f"protocol: found {protocol.name!r}, with a phase of which no turn can be written "
            "with this tokenizer; allowed are tags that its tokens can spell. Reserve them."
        )

    states, table = _tabulate(lenient.step, lenient.starts, tokens.columns)
    parsed = _run_tokens(table, tokens)
    if parsed.overflow.any():
        group = int(np.flatnonzero(parsed.overflow.any(0))[0])
        token = int(np.flatnonzero(parsed.classes == group)[0])
        raise ValueError(
            f"tags: found the token {tokenizer.token_bytes[token]!r}, which begins an action and "
            "ends it or begins another; allowed is one begun a token. Choose longer tags."
        )
    inside = np.array([state[0] == "inside" for state in states])
    header = np.array([state[0] == "inside" and state[2] is not None for state in states])
    pending = np.array([state[0] == "inside" and state[3] != () for state in states])
    fields = _Event(
        target=parsed.target,
        late=parsed.late,
        closed=parsed.closed,
        opened=parsed.opened,
        new_target=parsed.new_target,
        header=header[parsed.state],
        clean=(inside & ~pending)[parsed.state],
    )
    events, event = _pack(fields)

    # One action is all that the answering phases permit: they start with the others spent.
    spent = size * (max_actions - 1)
    starts = [2 + Phase.READING, spent + 2 + Phase.ANSWERING, spent + 2 + Phase.FINAL, _DONE]
    kinds = [kind in spec.targets for kind in ActionKind]
    return Grammar(
        classes=jnp.asarray(masked.classes, jnp.int32),
        step=jnp.asarray(step, jnp.int32),
        need=jnp.asarray(need, jnp.int32),
        starts=jnp.asarray(starts, jnp.int32),
        parse_classes=jnp.asarray(parsed.classes, jnp.int32),
        parse_step=jnp.asarray(parsed.state, jnp.int32),
        parse_event=jnp.asarray(event, jnp.int32),
        events=jnp.asarray(events, jnp.int32),
        needs_target=jnp.asarray(kinds),
        max_actions=max_actions,
        max_text=max_text,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        least_tokens=(*shortest, 0),
    )


def _pack(fields: _Event) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows [E, 7] of `fields`, whose arrays are [S, C], and the row of each cell."""
    code = np.zeros(fields.target.shape, np.int64)
    for values in fields:
        code = code * (int(values.max()) + 2) + values + 1
    _, first, which = np.unique(code, return_index=True, return_inverse=True)
    rows = np.stack([np.asarray(values, np.int64).ravel()[first] for values in fields], -1)
    return rows, which.reshape(code.shape)
