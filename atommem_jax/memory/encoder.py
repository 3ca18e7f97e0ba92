"""Texts as unit vectors by a pretrained transformer: Qwen3-Embedding.

A text is followed by one closing token, and the hidden state of that token, normalised, is its
vector. Queries are told what to look for by an instruction in front; documents have none. The
parameters are those of `huggingface.load`; a head, if there is one, is not used.

`EncoderEmbedding` makes keys of memory so, within a compiled rollout. Entries and queries are there
in the tokens of the policy; `translate` says once, on the host, which tokens of the encoder each of
them stands for.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.model.transformer import Transformer
from atommem_jax.parallel import program

TASK = "Given a question, retrieve the notes that help to answer it"
"""What queries of a memory are told to look for."""

_AT_ONCE = 1 << 13  # tokens that go through the encoder at a time
_NONE = -1


def instruct(task: str, query: str) -> str:
    """A query as Qwen3-Embedding was trained to read it; `task` is one sentence."""
    return f"Instruct: {task}\nQuery:{query}"


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int, *, end_id: int | None = None
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
    """Token ids, right-padded to `max_length`, and their number, the closing token included.

    Args:
      tokenizer: of the encoder.
      texts: B of them; what is too long is cut before the closing token.
      max_length: L, at least 1.
      end_id: the closing token; by default the one of padding, as in Qwen3-Embedding.

    Raises ValueError for a `max_length` without room for the closing token.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length}: must be at least 1, for the closing token")
    end_id = tokenizer.pad_id if end_id is None else end_id
    tokens = np.full((len(texts), max_length), tokenizer.pad_id, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
        ids = [*tokenizer.encode(text)[: max_length - 1], end_id]
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths


def embed(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B L"],
    length: Int[Array, " B"],
    *,
    dim: int | None = None,
) -> Float[Array, "B D"]:
    """Unit vectors, float32, of right-padded texts; zero for a text of no tokens.

    Args:
      model: the encoder.
      params: its parameters.
      tokens: of which the first `length` count.
      length: 0..L.
      dim: keeps so many of the width's components, which Qwen3-Embedding orders by weight; all
        by default.

    Raises ValueError for a `dim` out of range.
    """
    width = model.config.width
    dim = width if dim is None else dim
    if not 1 <= dim <= width:
        raise ValueError(f"dim={dim}: allowed is 1 to model.width={width}")
    # Causal attention: what stands behind the closing token does not reach it.
    hidden, _ = model.apply({"params": params}, tokens, jnp.zeros_like(length))
    last = jnp.maximum(length - 1, 0)[:, None, None]
    pooled = jnp.take_along_axis(hidden, last, axis=1)[:, 0, :dim].astype(jnp.float32)
    norm = jnp.sqrt(jnp.square(pooled).sum(axis=-1, keepdims=True))
    return jnp.where(length[:, None] > 0, pooled / jnp.maximum(norm, 1e-12), 0.0)


def translate(policy: Tokenizer, encoder: Tokenizer) -> Int[np.ndarray, "V M"]:
    """The tokens of the encoder for each token of the policy, and -1 behind the last.

    A token that both have stays as it is, so that a text in a vocabulary they share is the text
    that the encoder was trained to read. Of others each is encoded by itself, which may cut a word
    at another place; bytes that are no text alone, and control tokens, stand for nothing.
    """
    own = encoder.token_bytes
    control = {policy.pad_id, policy.eos_id, *policy.reserved.values()}
    found: list[list[int]] = []
    for token, piece in enumerate(policy.token_bytes):
        if token in control or not piece:
            found.append([])
        elif token < len(own) and own[token] == piece:
            found.append([token])
        else:
            try:
                found.append(encoder.encode(piece.decode()))
            except UnicodeDecodeError:
                found.append([])
    table = np.full((len(found), max(1, *map(len, found))), _NONE, np.int32)
    for row, pieces in enumerate(found):
        table[row, : len(pieces)] = pieces
    return table


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "pieces", "instruction"],
    meta_fields=["model", "dim", "end_id"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class EncoderEmbedding:
    """Keys by a text encoder, of entries and of questions; an embedding as in `embedding`.

    Only texts that are there are computed, a few at a time, however large the batch is. In a
    program of another shape a number may be rounded otherwise, as with any transformer: keys agree
    to about 1e-6, and the order of two entries that are as near as that is open.

    Attributes:
      model: the encoder.
      dim: width of a key, at most that of the encoder.
      end_id: the closing token.
      params: of the encoder.
      pieces: see `translate`.
      instruction: what stands in front of a query, in tokens of the encoder.
    """

    model: Transformer
    dim: int
    end_id: int
    params: Any
    pieces: Int[Array, "V M"]
    instruction: Int[Array, " I"]

    def __call__(
        self, tokens: Int[Array, "*b L"], length: Int[Array, " *b"]
    ) -> Float[Array, "*b D"]:
        """Keys of entries. Texts are right-padded, in tokens of the policy; an empty one gives 0.

        A text may become twice as long in tokens of the encoder; what is longer is cut.
        """
        return self._embed(tokens, length, self.instruction[:0])

    def ask(self, tokens: Int[Array, "*b L"], length: Int[Array, " *b"]) -> Float[Array, "*b D"]:
        """Keys of questions, with the instruction in front."""
        return self._embed(tokens, length, self.instruction)

    def _embed(self, tokens, length, before) -> Float[Array, "*b D"]:
        flat, count = tokens.reshape(-1, tokens.shape[-1]), length.reshape(-1)
        vectors = _embed_rows(self.model, self.dim, self.end_id)(
            self.params, self.pieces, before, flat, count
        )
        return vectors.reshape(*length.shape, self.dim)


@functools.cache
def _embed_rows(model: Transformer, dim: int, end_id: int):
    """(params, pieces, before, tokens [n L], length [n]) -> [n D], of a whole batch at once.

    Memory is written for one trajectory and mapped over the batch. Mapped like the rest, every
    action of every trajectory would be computed at the same time, those without a text too.
    """

    def run(params, pieces, before, tokens, length):
        rows, width = tokens.shape
        room = width * (1 if pieces.shape[1] == 1 else 2) + before.shape[0] + 1
        size = max(1, min(rows, _AT_ONCE // room))
        order = jnp.argsort(length == 0, stable=True)  # those with a text first
        order = jnp.pad(order, (0, -rows % size), constant_values=rows)  # past the end: dropped

        def step(i, vectors):
            picked = jax.lax.dynamic_slice_in_dim(order, i * size, size)
            some = tokens.at[picked].get(mode="fill", fill_value=0)
            counts = length.at[picked].get(mode="fill", fill_value=0)
            ids, found = _write(pieces, before, some, counts, room, end_id)
            with program.unpartitioned():
                new = embed(model, params, ids, found, dim=dim)
            return vectors.at[picked].set(new, mode="drop")

        steps = -(-(length > 0).sum(dtype=jnp.int32) // size)
        return jax.lax.fori_loop(0, steps, step, jnp.zeros((rows, dim), jnp.float32))

    mapped = jax.custom_batching.custom_vmap(run)

    @mapped.def_vmap
    def rule(axis_size, in_batched, params, pieces, before, tokens, length):
        shared, texts = in_batched[:3], (tokens, length)
        assert not any(jax.tree.leaves(shared)), "one encoder serves all trajectories"
        tokens, length = (
            x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, batched in zip(texts, in_batched[3:], strict=True)
        )
        flat = tokens.reshape(-1, tokens.shape[-1])
        vectors = mapped(params, pieces, before, flat, length.reshape(-1))
        return vectors.reshape(*length.shape, dim), True

    return mapped


def _write(pieces, before, tokens, length, room: int, end_id: int):
    """Texts in tokens of the encoder, [n room], and their lengths; 0 for an empty text."""
    rows, width = tokens.shape
    written = jnp.arange(width)[None] < length[:, None]
    found = jnp.where(written[..., None], pieces[tokens], _NONE).reshape(rows, -1)
    place = before.shape[0] + jnp.cumsum(found != _NONE, axis=1) - 1
    last = room - 1
    place = jnp.where((found != _NONE) & (place < last), place, room)  # past the end: dropped
    ids = jnp.full((rows, room), end_id, jnp.int32)
    ids = ids.at[:, : before.shape[0]].set(before[None])
    ids = ids.at[jnp.arange(rows)[:, None], place].set(found, mode="drop")
    count = jnp.minimum(before.shape[0] + (found != _NONE).sum(axis=1, dtype=jnp.int32), last)
    return ids, jnp.where(length > 0, count + 1, 0)
