"""The slot table: a memory of text entries searched by cosine and changed by atomic actions.

Section 3 of the AtomMem paper (arXiv 2601.08323), with the semantics made exact in
`tests/helpers/memory_reference.py`. Everything here is for one trajectory; `jax.vmap` makes a
batch, so that no trajectory can name a slot of another. The order of a turn:

    state, scores = retrieve(state, embed)            # fills `shown`
    entries, lengths = observe(state)                 # what the prompt displays as Memory 1..K
    state, report = transition(state, actions, ...)   # applies what the policy wrote
"""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from atommem_jax.config import EVICTION_POLICIES
from atommem_jax.types import EMPTY, NUM_KINDS, ActionKind, Actions, Embed, MemoryState, Report

"""What a create does to a full table: evict the least recently touched entry, evict the one
created first, or refuse the create."""

GRID = 2.0**-11
"""Keys are rounded to multiples of it. So every product of two, and every partial sum of products
of two unit vectors, is a multiple of 2**-22 below 2: a float32 number, without rounding."""


def init(
    *,
    slots: int,
    entry_length: int,
    scratchpad_length: int,
    query_length: int,
    shown: int,
    key_dim: int,
    pad_id: int,
) -> MemoryState:
    """An empty memory of N=`slots` entries, of which K=`shown` are seen at a time.

    Raises:
      ValueError: a size below 1, or more entries shown than there are slots.
    """
    sizes = {
        "slots": slots,
        "entry_length": entry_length,
        "scratchpad_length": scratchpad_length,
        "query_length": query_length,
        "shown": shown,
        "key_dim": key_dim,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be at least 1; set it in the memory config")
    if shown > slots:
        raise ValueError(f"shown={shown}: must be at most slots={slots}; lower shown or add slots")
    return MemoryState(
        entries=jnp.full((slots, entry_length), pad_id, jnp.int32),
        lengths=jnp.zeros(slots, jnp.int32),
        keys=jnp.zeros((slots, key_dim), jnp.float32),
        valid=jnp.zeros(slots, bool),
        created=jnp.zeros(slots, jnp.int32),
        touched=jnp.zeros(slots, jnp.int32),
        clock=jnp.zeros((), jnp.int32),
        scratchpad=jnp.full(scratchpad_length, pad_id, jnp.int32),
        scratchpad_length=jnp.zeros((), jnp.int32),
        query=jnp.full(query_length, pad_id, jnp.int32),
        query_length=jnp.zeros((), jnp.int32),
        shown=jnp.full(shown, EMPTY, jnp.int32),
    )


_AT_ONCE = 16  # texts whose keys are computed at a time, where a table is filled


def fill(
    state: MemoryState,
    entries: Int[Array, "N L"],
    lengths: Int[Array, " N"],
    embed: Embed,
    pad_id: int,
) -> MemoryState:
    """An empty memory with these texts in its slots, created in their order; 0 leaves one free."""
    chex.assert_shape([entries, state.entries], state.entries.shape)
    written = lengths > 0
    keys = jax.lax.map(lambda row: _to_grid(embed(*row)), (entries, lengths), batch_size=_AT_ONCE)
    clock = jnp.cumsum(written.astype(jnp.int32))
    return dataclasses.replace(
        state,
        entries=jnp.where(written[:, None], entries, pad_id),
        lengths=jnp.where(written, lengths, 0),
        keys=jnp.where(written[:, None], keys, 0.0),
        valid=written,
        created=jnp.where(written, clock, 0),
        touched=jnp.where(written, clock, 0),
        clock=clock[-1],
    )


def retrieve(
    state: MemoryState, embed: Embed, *, linked: int = 0
) -> tuple[MemoryState, Float[Array, " K"]]:
    """Shows the entries nearest to the standing query: the start of a turn.

    The K valid entries of highest cosine, best first, ties to the lower slot; EMPTY where fewer
    are valid; none while the query is empty. With `linked` the last so many of the K are the
    entries nearest to any of those before them, rather than to the query. If any is shown, the
    showing is one tick of the clock and touches all of them.

    Returns:
      The state with `shown`, `touched` and `clock` set, and the float32 cosines of the shown
      entries, 0 where none is shown. Keys are rounded to multiples of 2**-11, which moves a cosine
      by 2e-4 (standard deviation), and by less than sqrt(D) * 2**-11.
    """
    _check(state)
    num_slots, num_shown = state.valid.shape[0], state.shown.shape[0]
    # Some read a question otherwise than what answers it.
    ask = getattr(embed, "ask", embed)
    key = _to_grid(ask(state.query, state.query_length))
    chex.assert_shape(key, state.keys.shape[1:])
    # Exact, see `GRID`. So equal entries tie, and the ranking is the same in any batch, in any
    # order of summation, fused or not, on any device.
    scores = jnp.dot(state.keys, key, precision=jax.lax.Precision.HIGHEST)
    candidates = state.valid & (state.query_length > 0)
    scores = jnp.where(candidates, scores, -jnp.inf)
    if linked:
        scores, slots = _follow_links(state, scores, num_shown, linked)
    else:
        scores, slots = jax.lax.top_k(scores, num_shown)
    found = jnp.isfinite(scores)
    clock = state.clock + found.any().astype(jnp.int32)
    touched = state.touched.at[jnp.where(found, slots, num_slots)].set(clock, mode="drop")
    shown = jnp.where(found, slots, EMPTY)
    state = dataclasses.replace(state, clock=clock, touched=touched, shown=shown)
    return state, jnp.where(found, scores, 0.0)


def _follow_links(
    state: MemoryState, scores: Float[Array, " N"], shown: int, linked: int
) -> tuple[Float[Array, " K"], Int[Array, " K"]]:
    """Cosines to the query, and slots, of the nearest entries and of those nearest to them."""
    best, direct = jax.lax.top_k(scores, shown - linked)
    keys = state.keys[direct]
    nearness = jnp.dot(state.keys, keys.T, precision=jax.lax.Precision.HIGHEST)
    nearness = jnp.where(jnp.isfinite(best)[None], nearness, -jnp.inf).max(axis=1)
    nearness = jnp.where(jnp.isfinite(scores), nearness, -jnp.inf).at[direct].set(-jnp.inf)
    near, others = jax.lax.top_k(nearness, linked)
    linked_scores = jnp.where(jnp.isfinite(near), scores[others], -jnp.inf)
    return jnp.concatenate([best, linked_scores]), jnp.concatenate([direct, others])


def transition(
    state: MemoryState,
    actions: Actions,
    *,
    permitted: Bool[Array, " kinds"],
    eviction: str,
    embed: Embed,
    pad_id: int,
) -> tuple[MemoryState, Report]:
    """Applies the actions of a turn in the order written; the end of a turn.

    Each action is judged alone: one that is malformed, not permitted, aimed at nothing shown, or
    empty where text is needed changes nothing and is counted as invalid. An answer changes
    nothing in memory and is counted as applied. A shown entry that is deleted or evicted leaves
    `shown`, so no later target can reach what is put in its slot.

    Args:
      state: memory, after `retrieve`.
      actions: what the turn asked for; the text width X is free.
      permitted: the kinds that this phase allows, by `ActionKind`.
      eviction: one of `EVICTION_POLICIES`; static.
      embed: text to key, of the width that the state was made for.
      pad_id: fills what no token fills; static.

    Raises:
      ValueError: an unknown eviction policy.
    """
    if eviction not in EVICTION_POLICIES:
        raise ValueError(
            f"eviction={eviction!r}: must be one of {EVICTION_POLICIES}; "
            "set it in the memory config"
        )
    _check(state)
    chex.assert_rank([actions.kind, actions.text, permitted], [1, 2, 1])
    chex.assert_shape(permitted, (NUM_KINDS,))
    attempted = (actions.kind != ActionKind.NONE) & (
        jnp.arange(actions.kind.shape[0], dtype=jnp.int32) < actions.count
    )
    needs_text = _is_any(
        actions.kind, ActionKind.CREATE, ActionKind.READ, ActionKind.UPDATE, ActionKind.ANSWER
    )
    fit = functools.partial(_fit, actions.text, actions.length, pad_id=pad_id)
    entry, entry_length = fit(width=state.entries.shape[1])
    stored = _is_any(actions.kind, ActionKind.CREATE, ActionKind.UPDATE)
    requests = _Request(
        kind=actions.kind,
        target=actions.target,
        sound=attempted
        & actions.well_formed
        & permitted[actions.kind]
        & ((actions.length > 0) | ~needs_text),
        entry=entry,
        entry_length=entry_length,
        # A long text costs as much as it is long, and those of other kinds have no key.
        key=_to_grid(embed(entry, jnp.where(stored, entry_length, 0))),
        query=fit(width=state.query.shape[0]),
        scratchpad=fit(width=state.scratchpad.shape[0]),
    )
    chex.assert_shape(requests.key, (actions.kind.shape[0], state.keys.shape[1]))
    apply = functools.partial(_apply, eviction=eviction, pad_id=pad_id)
    state, (applied, rejected, evicted) = jax.lax.scan(apply, state, requests)
    caps = state.entries.shape[1], state.query.shape[0], state.scratchpad.shape[0]
    tally = functools.partial(_tally, actions.kind)
    return state, Report(
        attempted=tally(attempted),
        applied=tally(applied),
        invalid=tally(attempted & ~applied & ~rejected),
        rejected=tally(rejected),
        truncated=tally(applied & _exceeds_cap(actions, *caps)),
        evicted=tally(evicted),
    )


def set_query(
    state: MemoryState, tokens: Int[Array, " W"], length: Int[Array, ""], pad_id: int
) -> MemoryState:
    """Starts a new standing query, cut to its cap; no tick. An empty one ends retrieval."""
    query, query_length = _fit(tokens, length, width=state.query.shape[0], pad_id=pad_id)
    return dataclasses.replace(state, query=query, query_length=query_length)


def observe(state: MemoryState, pad_id: int = 0) -> tuple[Int[Array, "K L"], Int[Array, " K"]]:
    """Tokens and lengths of Memory 1..K; length 0 and all `pad_id` where fewer are shown."""
    slots = jnp.where(state.shown == EMPTY, state.valid.shape[0], state.shown)
    lengths = state.lengths.at[slots].get(mode="fill", fill_value=0)
    return state.entries.at[slots].get(mode="fill", fill_value=pad_id), lengths


def occupancy(state: MemoryState) -> Int[Array, ""]:
    """Number of valid entries."""
    return state.valid.sum(dtype=jnp.int32)


class _Request(NamedTuple):
    """One action, with everything about it that does not depend on the table."""

    kind: Int[Array, ""]
    target: Int[Array, ""]
    sound: Bool[Array, ""]  # attempted, well formed, permitted, with text where it needs one
    entry: Int[Array, " L"]
    entry_length: Int[Array, ""]
    key: Float[Array, " D"]
    query: tuple[Int[Array, " Y"], Int[Array, ""]]
    scratchpad: tuple[Int[Array, " S"], Int[Array, ""]]


def _apply(
    state: MemoryState, request: _Request, *, eviction: str, pad_id: int
) -> tuple[MemoryState, tuple[Bool[Array, ""], Bool[Array, ""], Bool[Array, ""]]]:
    """One action as masked updates. Returns the state and (applied, rejected, evicted)."""
    num_slots, num_shown = state.valid.shape[0], state.shown.shape[0]
    create, update, delete, read, scratchpad, answer = (
        request.sound & (request.kind == kind)
        for kind in (
            ActionKind.CREATE,
            ActionKind.UPDATE,
            ActionKind.DELETE,
            ActionKind.READ,
            ActionKind.SCRATCHPAD,
            ActionKind.ANSWER,
        )
    )

    in_range = (request.target >= 1) & (request.target <= num_shown)
    target = jnp.where(in_range, state.shown[jnp.clip(request.target - 1, 0, num_shown - 1)], EMPTY)
    update, delete = update & (target != EMPTY), delete & (target != EMPTY)

    full = state.valid.all()
    rejected = create & full & (eviction == "reject")
    create = create & ~rejected
    evict = create & full
    age = state.created if eviction == "oldest" else state.touched
    room = jnp.where(full, jnp.argmin(age), jnp.argmin(state.valid)).astype(jnp.int32)

    applied = create | update | delete | read | scratchpad | answer
    clock = state.clock + (applied & ~answer).astype(jnp.int32)

    # A single row is written, at index num_slots (out of bounds, dropped) when there is none:
    # the cost of an action does not grow with the table.
    slot = jnp.where(create, room, jnp.where(update | delete, target, num_slots))
    keep = ~delete
    born = jnp.where(update, state.created[jnp.minimum(slot, num_slots - 1)], clock)
    gone = (delete | evict) & (state.shown == slot)

    def put(column: Array, row: Array, free: int) -> Array:
        return column.at[slot].set(jnp.where(keep, row, jnp.array(free, row.dtype)), mode="drop")

    state = dataclasses.replace(
        state,
        entries=put(state.entries, request.entry, pad_id),
        lengths=put(state.lengths, request.entry_length, 0),
        keys=put(state.keys, request.key, 0),
        valid=put(state.valid, jnp.array(True), False),
        created=put(state.created, born, 0),
        touched=put(state.touched, clock, 0),
        clock=clock,
        scratchpad=jnp.where(scratchpad, request.scratchpad[0], state.scratchpad),
        scratchpad_length=jnp.where(scratchpad, request.scratchpad[1], state.scratchpad_length),
        query=jnp.where(read, request.query[0], state.query),
        query_length=jnp.where(read, request.query[1], state.query_length),
        shown=jnp.where(gone, EMPTY, state.shown),
    )
    return state, (applied, rejected, evict)


def _exceeds_cap(
    actions: Actions, entry_cap: int, query_cap: int, scratchpad_cap: int
) -> Bool[Array, " A"]:
    """Whether tokens were written beyond what is kept; the cap of an answer is the width X."""
    width = actions.text.shape[1]
    cap = jnp.full(actions.kind.shape, width, jnp.int32)
    entry = _is_any(actions.kind, ActionKind.CREATE, ActionKind.UPDATE)
    cap = jnp.where(entry, min(entry_cap, width), cap)
    cap = jnp.where(actions.kind == ActionKind.READ, min(query_cap, width), cap)
    cap = jnp.where(actions.kind == ActionKind.SCRATCHPAD, min(scratchpad_cap, width), cap)
    return (actions.length > cap) & (actions.kind != ActionKind.DELETE)


def _fit(
    tokens: Int[Array, "*b X"], length: Int[Array, " *b"], *, width: int, pad_id: int
) -> tuple[Int[Array, "*b W"], Int[Array, " *b"]]:
    """Cuts or pads texts to a width; returns them with the lengths kept."""
    length = jnp.minimum(length, min(tokens.shape[-1], width))
    tokens = tokens[..., :width]
    missing = [(0, 0)] * (tokens.ndim - 1) + [(0, width - tokens.shape[-1])]
    tokens = jnp.pad(tokens, missing, constant_values=pad_id)
    written = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1) < length[..., None]
    return jnp.where(written, tokens, pad_id), length


def _to_grid(vector: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    return jnp.round(vector / GRID) * GRID


def _is_any(kind: Int[Array, " A"], *kinds: ActionKind) -> Bool[Array, " A"]:
    return functools.reduce(jnp.logical_or, [kind == k for k in kinds])


def _tally(kind: Int[Array, " A"], happened: Bool[Array, " A"]) -> Int[Array, " kinds"]:
    """Counts by kind; rows of kind NONE never happen, so that counter stays 0."""
    return jnp.zeros(NUM_KINDS, jnp.int32).at[kind].add(happened.astype(jnp.int32), mode="drop")


def _check(state: MemoryState) -> None:
    """Catches a batch axis that was not mapped away."""
    chex.assert_rank([state.entries, state.keys, state.valid, state.clock], [2, 2, 1, 0])
    chex.assert_type([state.entries, state.keys], [jnp.int32, jnp.float32])
