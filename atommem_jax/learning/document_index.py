"""A document that nobody reads turn by turn: an index of it, or as much of it as a prompt holds.

What retrieval without a memory agent has in place of reading: before the first question the table
is filled with the pieces of the document, each under the key of its text (`fill`), whatever is
worth knowing; or the document itself stands in the prompt, cut (`cut`). For one episode;
`jax.vmap` makes a batch.

Pieces (`KINDS`) are `chunks`, the parts that an agent would read, cut into pieces as long as an
entry; `documents`, as they stand in a part, cut at the length of an entry; `facts`, what a teacher
would store of every sentence; and `current_facts`, the same without those that a later one
corrects, of which the index is told as no rule could know.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from atommem_jax.memory import slot_table
from atommem_jax.types import EMPTY, Embed, Episode, MemoryState

KINDS = ("chunks", "documents", "facts", "current_facts")


def count_pieces(kind: str, episode: Episode, entry_length: int) -> int:
    """Slots that hold the pieces of any episode of this shape. Raises ValueError as `fill`."""
    chunks, width = episode.chunks.shape[-2:]
    if _check_kind(kind) == "chunks":
        return chunks * -(-width // entry_length)
    return chunks * episode.annotations.start.shape[-1]


def fill(table: MemoryState, kind: str, episode: Episode, embed: Embed, pad_id: int) -> MemoryState:
    """An empty table with the pieces of an episode, in reading order.

    Args:
      table: of at least `count_pieces` slots.
      kind: one of `KINDS`.
      episode: all of whose chunks are held.
      embed: text to key.
      pad_id: fills what no token fills.

    Raises ValueError for another kind, and a table that is too small.
    """
    slots, width = table.entries.shape
    needed = count_pieces(kind, episode, width)
    if slots < needed:
        raise ValueError(
            f"table has {slots} slots and the pieces are {needed}; make it with `count_pieces`"
        )
    make = {"chunks": _list_chunks, "documents": _list_documents}.get(kind, _list_facts)
    tokens, lengths = make(episode, width, pad_id)
    if kind == "current_facts":
        lengths = jnp.where(_find_corrected(episode), 0, lengths)
    room = slots - tokens.shape[0]
    tokens = jnp.pad(tokens, ((0, room), (0, 0)), constant_values=pad_id)
    return slot_table.fill(table, tokens, jnp.pad(lengths, (0, room)), embed, pad_id)


def cut(
    episode: Episode, width: int, pad_id: int, *, last: bool = False
) -> tuple[Int[Array, " w"], Int[Array, ""]]:
    """The first `width` tokens of the document, or the last, and how many there are.

    Chunks follow one another as they are; the sentences that two of them share stand there twice.
    """
    columns = jnp.arange(episode.chunks.shape[1], dtype=jnp.int32)[None]
    real = (columns < episode.chunk_lengths[:, None]).reshape(-1)
    rank = jnp.cumsum(real.astype(jnp.int32)) - 1
    total = rank[-1] + 1
    place = rank - jnp.where(last, jnp.maximum(total - width, 0), 0)
    place = jnp.where(real & (place >= 0), place, width)  # past the end: dropped
    row = jnp.full((width,), pad_id, jnp.int32)
    row = row.at[place].set(episode.chunks.reshape(-1), mode="drop")
    return row, jnp.minimum(total, width)


def _check_kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"index={kind!r}: allowed are {', '.join(map(repr, KINDS))}")
    return kind


def _list_chunks(episode: Episode, width: int, pad_id: int):
    chunks, longest = episode.chunks.shape
    pieces = -(-longest // width)
    room = pieces * width - longest
    tokens = jnp.pad(episode.chunks, ((0, 0), (0, room)), constant_values=pad_id)
    starts = jnp.arange(pieces, dtype=jnp.int32)[None] * width
    lengths = jnp.clip(episode.chunk_lengths[:, None] - starts, 0, width)
    return tokens.reshape(chunks * pieces, width), lengths.reshape(-1)


def _list_facts(episode: Episode, width: int, pad_id: int):
    """What is stored of each fact: its note, where it has one, else the fact itself."""
    a = episode.annotations
    tokens, lengths = _slice(episode, a.start, a.length, width, pad_id)
    room = max(0, width - a.note.shape[2])
    note = jnp.pad(a.note, ((0, 0), (0, 0), (0, room)), constant_values=pad_id)[..., :width]
    noted = a.note_length > 0
    tokens = jnp.where(noted[..., None], note, tokens)
    lengths = jnp.where(noted, jnp.minimum(a.note_length, width), lengths)
    return tokens.reshape(-1, width), lengths.reshape(-1)


def _list_documents(episode: Episode, width: int, pad_id: int):
    a = episode.annotations
    opens = _find_openings(episode)
    last = episode.chunks.shape[1]
    # A document ends where the next one opens, or with the chunk.
    starts = jnp.where(opens, a.start, last)
    following = jnp.flip(jnp.minimum.accumulate(jnp.flip(starts, 1), axis=1), 1)
    ends = jnp.concatenate([following[:, 1:], jnp.full_like(starts[:, :1], last)], axis=1)
    ends = jnp.minimum(ends, episode.chunk_lengths[:, None])
    lengths = jnp.where(opens, ends - a.start, 0)
    tokens, lengths = _slice(episode, a.start, lengths, width, pad_id)
    return tokens.reshape(-1, width), lengths.reshape(-1)


def _find_openings(episode: Episode) -> Bool[Array, "C U"]:
    """The facts with which a document opens, or is continued in another chunk.

    That is where the subject changes. Of two documents with one title the second is told by its
    heading: with it a fact is longer than what is stored of it, which names the subject as well.
    """
    a = episode.annotations
    width = max(a.note.shape[2], 1)
    stored, _ = _list_facts(episode, width, 0)
    subjects = stored.reshape(*a.start.shape, width)
    named = jnp.arange(width, dtype=jnp.int32)[None, None] < a.subject_length[..., None]
    subjects = jnp.where(named, subjects, EMPTY)
    same = jnp.all(subjects[:, 1:] == subjects[:, :-1], axis=2) & (a.subject_length[:, 1:] > 0)
    same &= ~((a.note_length > 0) & (a.length > a.note_length))[:, 1:]
    return jnp.pad(~same, ((0, 0), (1, 0)), constant_values=True) & (a.length > 0)


def _slice(episode: Episode, starts, lengths, width: int, pad_id: int):
    """(tokens [C U w], lengths [C U]) of spans of the chunks, cut to a width."""
    lengths = jnp.minimum(lengths, width)
    columns = jnp.arange(width, dtype=jnp.int32)[None, None]
    at = jnp.minimum(starts[..., None] + columns, episode.chunks.shape[1] - 1)
    rows = jnp.arange(episode.chunks.shape[0])[:, None, None]
    tokens = jnp.where(columns < lengths[..., None], episode.chunks[rows, at], pad_id)
    return tokens, lengths


def _find_corrected(episode: Episode) -> Bool[Array, " n"]:
    """The facts, by flat index, that a later one supersedes."""
    supersedes = episode.annotations.supersedes.reshape(-1)
    size = supersedes.shape[0]
    places = jnp.where(supersedes == EMPTY, size, supersedes)
    return jnp.zeros((size,), bool).at[places].set(True, mode="drop")
