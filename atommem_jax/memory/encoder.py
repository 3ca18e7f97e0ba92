"""Texts as unit vectors by a pretrained transformer: Qwen3-Embedding.

A text is followed by one closing token, and the hidden state of that token, normalised, is its
vector. Queries are told what to look for by an instruction in front; documents have none. The
parameters are those of `huggingface.load`; a head, if there is one, is not used.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.model.transformer import Transformer


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
