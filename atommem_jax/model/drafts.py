"""Guesses at the next tokens of a row, to be checked in one forward pass.

What a row will write can often be told: the grammar leaves one token (*forced*), or the row copies
from its prompt or from what it has written (*prompt lookup*: the token that followed the latest
occurrence of the last two tokens, or else of the last one). Both are functions of the row alone. A
guess costs nothing but time where it is wrong: `sampling.decode_step` draws every token with its
own random number, guessed or not, so that the trajectory is the same without any.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from atommem_jax.language.grammar import Grammar

_LONGER = 1 << 20  # what a match of two tokens counts above one of one, wherever they stand


def look_up(text: Int[Array, " L"], first: Int[Array, ""], end: Int[Array, ""]) -> Int[Array, ""]:
    """The token after the latest earlier occurrence of how text[first:end] ends; -1 for none.

    An occurrence of its last two tokens is preferred to one of the last token alone.
    """
    place = jnp.arange(text.shape[0], dtype=jnp.int32)
    before = jnp.concatenate([text[:1], text[:-1]])
    one = (text == text[end - 1]) & (place >= first) & (place < end - 1)
    two = one & (before == text[end - 2]) & (place > first) & (end - 2 >= first)
    score = jnp.where(one, place, -1) + jnp.where(two, _LONGER, 0)
    best = jnp.argmax(score)
    found = text[jnp.minimum(best + 1, text.shape[0] - 1)]
    return jnp.where(score[best] >= 0, found, -1)


def propose(
    grammar: Grammar | None,
    prompt: Int[Array, " P"],
    start: Int[Array, ""],
    tokens: Int[Array, " R"],
    written: Int[Array, ""],
    state: Int[Array, ""],
    count: int,
) -> Int[Array, " count"]:
    """The next `count` tokens of a row, as far as they can be guessed; pad where not.

    Args:
      grammar: what masks the row's tokens; None where nothing does.
      prompt: left-padded.
      start: where its first token stands.
      tokens: of the response so far.
      written: how many; at least one.
      state: of the grammar, after them.
      count: static.
    """
    width, limit = prompt.shape[0], tokens.shape[0]
    text = jnp.concatenate([prompt, tokens, jnp.zeros((count,), tokens.dtype)])
    pad = jnp.zeros((), tokens.dtype) if grammar is None else grammar.pad_id
    guesses = []
    for _ in range(count):
        guess = look_up(text, start, width + written)
        guess = jnp.where(guess >= 0, guess, pad)
        if grammar is not None:
            forced = grammar.forced(state, jnp.maximum(limit - written, 1))
            guess = jnp.where(forced >= 0, forced, guess)
            state = grammar.advance(state, guess)
        text = jax.lax.dynamic_update_index_in_dim(text, guess, width + written, 0)
        written = written + 1
        guesses.append(guess)
    return jnp.stack(guesses)
