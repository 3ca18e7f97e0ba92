"""The action protocol on the device: masks for sampling, and parsing of what was sampled.

`compile_grammar` takes the two automata of a protocol over the tokens of a tokenizer (see
`automaton` and `token_tables`) and adds the count of actions:

* STRICT, for masks. A state is one int32: `count * num_states + base`. `allowed` admits a token
  only if the turn can still end well within its budget.
* LENIENT, for `parse`, which reads anything.

What the lenient reading takes for the text of an action: the tokens from the first that lies
wholly after the open tag (and the target) up to the last token boundary at which no part of a
tag is pending, that is, at which what was read does not end in the beginning of an open tag or
of the action's own close tag. A token that straddles a tag is thus no text. An unreadable target
is text. Close tags of other actions, when spelled in bytes, are text as well; a reserved token
that has no place where it stands ends the action unclosed, so no reserved id is ever text.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from atommem_jax.language.automaton import DEAD
from atommem_jax.language.protocol import Protocol
from atommem_jax.language.token_tables import Event, compile_tables
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.types import ActionKind, Actions, Phase


@flax.struct.dataclass
class Grammar:
    """A protocol compiled for a tokenizer. S base states, C classes of tokens, V tokens."""

    classes: Int[Array, " V"]
    class_sizes: Int[Array, " C"]  # tokens in it
    class_tokens: Int[Array, " C"]  # one of them
    step: Int[Array, "S C"]  # next base state + S * actions opened
    need: Int[Array, "3 S C"]  # tokens needed after this one; row: actions left, 2 for more
    starts: Int[Array, " phases"]
    parse_classes: Int[Array, " V"]
    parse_step: Int[Array, "S2 C2"]
    parse_event: Int[Array, "S2 C2"]  # row of `events`
    events: Int[Array, "E 7"]  # see token_tables.Event
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
        return jnp.where(after < self.num_states * (self.max_actions + 1), after, DEAD)

    def allowed(self, state: Int[Array, ""], remaining: int | Int[Array, ""]) -> Bool[Array, " V"]:
        """The tokens after which the turn can still end well.

        `remaining` counts the tokens left in the budget, this one included. The mask is never
        all False: after eos it holds pad alone; where the turn cannot end well any more (which a
        masked turn with a budget of at least `min_tokens` never meets) it holds eos alone.
        """
        return self._allowed_classes(state, remaining)[self.classes]

    def forced(self, state: Int[Array, ""], remaining: int | Int[Array, ""]) -> Int[Array, ""]:
        """The only token that `allowed` admits; -1 where there are several."""
        admitted = self._allowed_classes(state, remaining)
        alone = jnp.sum(jnp.where(admitted, self.class_sizes, 0)) == 1
        return jnp.where(alone, self.class_tokens[jnp.argmax(admitted)], -1)

    def _allowed_classes(
        self, state: Int[Array, ""], remaining: int | Int[Array, ""]
    ) -> Bool[Array, " C"]:
        base, count = state % self.num_states, state // self.num_states
        room = jnp.minimum(self.max_actions - count, 2)
        admitted = self.need[room, base] <= remaining - 1
        cut_off = jnp.arange(self.step.shape[1]) == self.classes[self.eos_id]
        return jnp.where(admitted.any(), admitted, cut_off)

    def states(self, phase: int | Int[Array, ""], response: Int[Array, " R"]) -> Int[Array, " R"]:
        """The state before each token of `response`."""

        def step(state, token):
            return self.advance(state, token), state

        return jax.lax.scan(step, self.start(phase), response)[1]

    def masks(self, phase: int | Int[Array, ""], response: Int[Array, " R"]) -> Bool[Array, "R V"]:
        """The mask under which each token of `response` was drawn with a budget of R."""
        remaining = response.shape[0] - jnp.arange(response.shape[0], dtype=jnp.int32)
        return jax.vmap(self.allowed)(self.states(phase, response), remaining)

    def admits(
        self,
        phase: int | Int[Array, ""],
        response: Int[Array, " R"],
        length: int | Int[Array, ""],
    ) -> Bool[Array, ""]:
        """Whether masks with a budget of R would have allowed each of the first `length` tokens.

        For responses that were not drawn under masks: others have no probability under them.
        """
        position = jnp.arange(response.shape[0], dtype=jnp.int32)
        remaining = response.shape[0] - position
        allowed = jax.vmap(self._allowed_classes)(self.states(phase, response), remaining)
        return jnp.all(allowed[position, self.classes[response]] | (position >= length))

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
            event = Event(*self.events[self.parse_event[state, group]])
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

    def record(self, event: Event, position: Int[Array, ""]) -> "_Reading":
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


def _check_tokenizer(tokenizer: Tokenizer) -> None:
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
    protocol: Protocol, tokenizer: Tokenizer, *, max_actions: int, max_text: int
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
    strict, lenient = compile_tables(protocol, tokenizer)
    # One action is all that the answering phases permit: they start with the others spent.
    spent = strict.step.shape[0] * (max_actions - 1)
    single = (Phase.ANSWERING, Phase.FINAL)
    starts = [base + spent * (phase in single) for phase, base in enumerate(strict.starts)]
    _, tokens, sizes = np.unique(strict.classes, return_index=True, return_counts=True)
    targeted = {tag.kind for tag in protocol.tags if tag.target is not None}
    return Grammar(
        classes=jnp.asarray(strict.classes, jnp.int32),
        class_sizes=jnp.asarray(sizes, jnp.int32),
        class_tokens=jnp.asarray(tokens, jnp.int32),
        step=jnp.asarray(strict.step, jnp.int32),
        need=jnp.asarray(strict.need, jnp.int32),
        starts=jnp.asarray(starts, jnp.int32),
        parse_classes=jnp.asarray(lenient.classes, jnp.int32),
        parse_step=jnp.asarray(lenient.step, jnp.int32),
        parse_event=jnp.asarray(lenient.event, jnp.int32),
        events=jnp.asarray(lenient.events, jnp.int32),
        needs_target=jnp.asarray([kind in targeted for kind in ActionKind]),
        max_actions=max_actions,
        max_text=max_text,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        least_tokens=strict.least,
    )
