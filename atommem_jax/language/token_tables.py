"""What the tokens of a tokenizer do to the automata of a protocol, as NumPy tables, on the host.

The symbols of all tokens are run through the automata, so that a tag may take one token or
several. Tokens with the same effect share a class, which keeps the tables small for any
vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from atommem_jax.language.automaton import (
    DONE,
    EDGE,
    EOS,
    JUNK,
    PAD,
    Lenient,
    Output,
    Spec,
    State,
    Strict,
)
from atommem_jax.language.protocol import Protocol
from atommem_jax.language.tokenizer import Tokenizer

_FAR = 1 << 29  # more tokens than any budget: acceptance is out of reach


class StrictTables(NamedTuple):
    """The strict automaton over tokens: S base states, C classes of tokens, V tokens."""

    classes: np.ndarray  # [V]
    step: np.ndarray  # [S, C] next base state + S * actions opened
    need: np.ndarray  # [3, S, C] see `Grammar.need`
    starts: tuple[int, ...]  # per Phase, base state before the first token
    least: tuple[int, ...]  # per Phase, tokens of the shortest turn, eos included


class LenientTables(NamedTuple):
    """The lenient automaton over tokens, its start state 0; sizes as in StrictTables."""

    classes: np.ndarray  # [V]
    step: np.ndarray  # [S, C]
    event: np.ndarray  # [S, C] row of `events`
    events: np.ndarray  # [E, 7] see Event


class Event(NamedTuple):
    """What the lenient automaton reports of one token. "Old" is the action it found open."""

    target: Any  # target read for the old action: 0 out of range, -1 none read
    late: Any  # that target ended within this token, not before it
    closed: Any  # the old action was closed as it should be
    opened: Any  # kind of the action that began, or 0
    new_target: Any  # as `target`, for the action that began
    header: Any  # the token ended where a target is still being read
    clean: Any  # the token ended in an action, with no part of a tag pending


class _Tokens(NamedTuple):
    """The vocabulary in symbol columns: token v is `flat[offsets[v] : offsets[v] + lengths[v]]`."""

    flat: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    columns: list[int]  # symbol of each column; the last is EDGE


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


def _list_tokens(spec: Spec, tokenizer: Tokenizer) -> _Tokens:
    other = next((byte for byte in range(256) if byte not in spec.bytes), None)
    kept = [*spec.bytes, *([] if other is None else [other])]
    columns = [*kept, *spec.reserved.values(), EOS, PAD, JUNK, EDGE]
    column_of = {symbol: i for i, symbol in enumerate(columns)}
    of_byte = np.array([column_of.get(byte, column_of.get(other or 0, 0)) for byte in range(256)])
    special = {tokenizer.reserved[name]: symbol for name, symbol in spec.reserved.items()}
    special |= {tokenizer.eos_id: EOS, tokenizer.pad_id: PAD}
    pieces = [b"\0" if i in special else p or b"\0" for i, p in enumerate(tokenizer.token_bytes)]
    lengths = np.array([len(piece) for piece in pieces])
    offsets = np.cumsum(lengths) - lengths
    flat = of_byte[np.frombuffer(b"".join(pieces), np.uint8)]
    for i, piece in enumerate(tokenizer.token_bytes):
        if i in special or not piece:
            flat[offsets[i]] = column_of[special.get(i, JUNK)]
    return _Tokens(flat, offsets, lengths, columns)


def _tabulate(
    step: Callable[[State, int], tuple[State, Output]], starts: list[State], columns: list[int]
) -> tuple[list[State], np.ndarray]:
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
    closed_in[DONE] = 0
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


def compile_tables(protocol: Protocol, tokenizer: Tokenizer) -> tuple[StrictTables, LenientTables]:
    """Both automata of `protocol` over the tokens of `tokenizer`, which must have eos and pad.

    Raises ValueError for a tokenizer with only some of the targets reserved or unable to spell a
    phase's tags, and for one with a token in which two actions begin, or one begins and ends.
    """
    spec = Spec(protocol, tokenizer)
    tokens = _list_tokens(spec, tokenizer)
    strict = _compile_strict(Strict(spec), tokens, tokenizer)
    if max(strict.least) >= _FAR:
        raise ValueError(
            f"protocol: found {protocol.name!r}, with a phase of which no turn can be written "
            "with this tokenizer; allowed are tags that its tokens can spell. Reserve them."
        )
    return strict, _compile_lenient(Lenient(spec), tokens, tokenizer)


def _compile_strict(automaton: Strict, tokens: _Tokens, tokenizer: Tokenizer) -> StrictTables:
    states, table = _tabulate(automaton.step, automaton.starts, tokens.columns)
    effects = _run_tokens(table, tokens)
    least, need = _measure(effects)
    step = effects.state + len(states) * (effects.opened > 0)
    step[:, effects.classes[tokenizer.eos_id]] = DONE
    step[DONE] = DONE
    need[:, DONE, effects.classes[tokenizer.pad_id]] = -_FAR  # padding is beyond the budget
    shortest = tuple(int(least[start]) for start in automaton.first)
    return StrictTables(effects.classes, step, need, automaton.first, shortest)


def _compile_lenient(automaton: Lenient, tokens: _Tokens, tokenizer: Tokenizer) -> LenientTables:
    states, table = _tabulate(automaton.step, automaton.starts, tokens.columns)
    effects = _run_tokens(table, tokens)
    if effects.overflow.any():
        group = int(np.flatnonzero(effects.overflow.any(0))[0])
        token = int(np.flatnonzero(effects.classes == group)[0])
        raise ValueError(
            f"tags: found the token {tokenizer.token_bytes[token]!r}, which begins an action and "
            "ends it or begins another; allowed is one begun a token. Choose longer tags."
        )
    in_header = np.array([automaton.in_header(state) for state in states])
    in_text = np.array([automaton.in_text(state) for state in states])
    fields = Event(
        target=effects.target,
        late=effects.late,
        closed=effects.closed,
        opened=effects.opened,
        new_target=effects.new_target,
        header=in_header[effects.state],
        clean=in_text[effects.state],
    )
    events, event = _pack(fields)
    return LenientTables(effects.classes, effects.state, event, events)


def _pack(fields: Event) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows [E, 7] of `fields`, whose arrays are [S, C], and the row of each cell."""
    code = np.zeros(fields.target.shape, np.int64)
    for values in fields:
        code = code * (int(values.max()) + 2) + values + 1
    _, first, which = np.unique(code, return_index=True, return_inverse=True)
    rows = np.stack([np.asarray(values, np.int64).ravel()[first] for values in fields], -1)
    return rows, which.reshape(code.shape)
