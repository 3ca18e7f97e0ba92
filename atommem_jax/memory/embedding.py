"""From token ids to unit key vectors, the coordinates in which memory is searched.

An embedding is a callable of type `types.Embed` and a pytree, so that what it has learned is an
argument of a program, and not a constant in it. `HashedBagOfTokens` learns nothing: each token id
owns a fixed row of random signs, and a text is the normalised sum of its rows, so that the cosine
of two texts approximates the cosine of their token counts. `PooledTokens` has the rows of the
policy's own embedding instead, and `encoder` has a transformer. Tokens may count by how rare they
are: a question of many function words is else nearest to whatever has the same ones.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from atommem_jax.types import Embed

_SQUARES = 1 << 40  # sums of squares stay below it
_LEVELS = 1 << 11  # of the largest number of a table


def most_times(dim: int, length: int) -> int:
    """How often a token may count at most, where texts have up to `length` tokens."""
    return math.isqrt((_SQUARES - 1) // dim) // length


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HashedBagOfTokens:
    """A deterministic random projection of token counts; two instances with equal fields agree.

    The row of a token depends on `seed` and its id alone: a larger vocabulary adds rows and
    changes none, and a larger `dim` adds columns. The noise in a cosine is about 1/sqrt(dim).

    Attributes:
      weights: how often a token counts, an octet of 1 to 255 for each id; empty: all count once.
        `tokenizer.weigh_by_rarity` makes them.

    Raises:
      ValueError: a field out of its range.
    """

    vocab_size: int
    dim: int = 128
    seed: int = 0
    weights: bytes = b""

    def __post_init__(self) -> None:
        for field, least in (("vocab_size", 1), ("dim", 1), ("seed", 0)):
            value = getattr(self, field)
            if value < least:
                raise ValueError(
                    f"HashedBagOfTokens.{field}={value}: must be at least {least}; "
                    f"pass a larger {field}"
                )
        if self.weights and (len(self.weights) != self.vocab_size or 0 in self.weights):
            raise ValueError(
                f"HashedBagOfTokens.weights: found {len(self.weights)} octets, the least "
                f"{min(self.weights)}: allowed are vocab_size={self.vocab_size} octets of at least "
                "1, or none"
            )

    def __call__(
        self, tokens: Int[Array, "*b L"], length: Int[Array, " *b"]
    ) -> Float[Array, "*b D"]:
        """Embeds right-padded texts; ids must lie below `vocab_size`.

        Args:
          tokens: token ids, of which the first `length` count.
          length: int32, 0..L.

        Returns:
          float32 unit vectors; zero for an empty text.

        Raises:
          ValueError: L so large that the norm could be rounded, or shapes that do not agree.
        """
        width = tokens.shape[-1]
        heaviest = width * max(self.weights, default=1)
        if length.shape != tokens.shape[:-1]:
            raise ValueError(
                f"length.shape={length.shape}: must be tokens.shape[:-1]={tokens.shape[:-1]}; "
                "pass one length per text"
            )
        if heaviest * heaviest * self.dim >= _SQUARES:
            raise ValueError(
                f"texts of {width} tokens in dim={self.dim}, a token counting up to "
                f"{max(self.weights, default=1)} times: (tokens x times)² x dim must stay below "
                "2**40; cut the texts or lower dim"
            )
        position = jax.lax.broadcasted_iota(length.dtype, tokens.shape, tokens.ndim - 1)
        written = position < length[..., None]
        # Sums and squares are integers, hence exact: the key of a text does not depend on its
        # padding, on the order of its tokens, or on how the compiler groups a batch.
        signs = jnp.asarray(self._signs)[tokens]
        if self.weights:
            times = jnp.asarray(np.frombuffer(self.weights, np.uint8))[tokens].astype(jnp.int16)
            signs = signs.astype(jnp.int16) * times[..., None]
        sums = jnp.where(written[..., None], signs, 0).sum(axis=-2, dtype=jnp.int32)
        return sums.astype(jnp.float32) / jnp.sqrt(jnp.maximum(_sum_squares(sums), 1.0))

    @functools.cached_property
    def _signs(self) -> np.ndarray:
        """The ±1 rows, int8 [vocab_size, dim]."""
        words = -(-self.dim // 64)
        ids = np.arange(self.vocab_size, dtype=np.uint64)[:, None]
        stream = _scramble(_scramble(np.array([[self.seed]], np.uint64)) ^ ids)
        stream = _scramble(stream + np.arange(words, dtype=np.uint64)[None, :])
        octets = stream.astype("<u8").view(np.uint8)  # little-endian on every host
        bits = np.unpackbits(octets, axis=1, bitorder="little")[:, : self.dim]
        return (1 - 2 * bits.astype(np.int8)).astype(np.int8)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table"],
    meta_fields=["scripted", "weights"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class PooledTokens:
    """The policy's own token embeddings, summed over a text.

    `bind` takes them from parameters, and keys are written with those that the rollout is played
    with: an entry keeps its key while the episode lasts, and so do the parameters. No gradient
    passes, for retrieval is no part of a loss. From rollout to rollout keys change as the policy
    learns, which no memory sees: it starts empty.

    Rows are rounded to integers of one scale, so that a key depends neither on the padding of its
    text nor on how a batch is computed, as in `HashedBagOfTokens`.

    Attributes:
      scripted: keys where no policy plays, as with a scripted teacher, and `table` is None.
      weights: how often a token counts, an octet of 1 to 255 for each id; empty: all count once.
      table: int16 rows.
    """

    scripted: HashedBagOfTokens
    weights: bytes = b""
    table: Int[Array, "V D"] | None = None

    def bind(self, params: Any) -> "PooledTokens":
        """The same with the rows that parameters of the policy have for its tokens.

        They are those of the embedding as it is kept, adapters and casts of rollouts aside.
        """
        rows = jax.lax.stop_gradient(params["embedder"]["embedding"]).astype(jnp.float32)
        most = jnp.maximum(jnp.abs(rows).max(), jnp.finfo(jnp.float32).tiny)
        return dataclasses.replace(self, table=jnp.round(rows * (_LEVELS / most)).astype(jnp.int16))

    def __call__(
        self, tokens: Int[Array, "*b L"], length: Int[Array, " *b"]
    ) -> Float[Array, "*b D"]:
        """See `HashedBagOfTokens.__call__`."""
        if self.table is None:
            return self.scripted(tokens, length)
        if tokens.shape[-1] * _LEVELS * max(self.weights, default=1) >= 1 << 31:
            raise ValueError(
                f"texts of {tokens.shape[-1]} tokens, a token counting up to "
                f"{max(self.weights, default=1)} times: their sums must stay below 2**31; cut the "
                "texts, or set memory.weighting='uniform'"
            )
        position = jax.lax.broadcasted_iota(length.dtype, tokens.shape, tokens.ndim - 1)
        times = (position < length[..., None]).astype(jnp.int32)
        if self.weights:
            times *= jnp.asarray(np.frombuffer(self.weights, np.uint8))[tokens].astype(jnp.int32)
        rows = self.table[tokens].astype(jnp.int32) * times[..., None]
        sums = rows.sum(axis=-2, dtype=jnp.int32)
        # Shifted until the squares fit, each text by itself.
        largest = jnp.abs(sums).max(axis=-1, keepdims=True)
        bits = math.isqrt((_SQUARES - 1) // sums.shape[-1]).bit_length() - 1
        needed = 32 - jax.lax.clz(largest)
        sums = jnp.right_shift(sums, jnp.maximum(needed - bits, 0))
        return sums.astype(jnp.float32) / jnp.sqrt(jnp.maximum(_sum_squares(sums), 1.0))


def bind(embed: Embed, params: Any) -> Embed:
    """An embedding with what it takes from the parameters of the policy that plays."""
    return embed.bind(params) if isinstance(embed, PooledTokens) else embed


def _sum_squares(x: Int[Array, "*b D"]) -> Float[Array, "*b 1"]:
    """The sum over the last axis of x², below 2**40, rounded to float32 once.

    In pieces that fit an int32: x is 256 high + low, and so is its square, of powers of 256.
    """
    high, low = x >> 8, x & 255

    def total(products):
        return products.sum(axis=-1, keepdims=True, dtype=jnp.int32)

    both = total(high * low)  # counts 2**9 times
    rest = total(low * low) + ((both & 127) << 9)
    above = total(high * high) + (both >> 7) + (rest >> 16)  # counts 2**16 times
    # Both terms are exact in float32, so that their sum is the only rounding.
    return above.astype(jnp.float32) * 65536.0 + (rest & 65535).astype(jnp.float32)


def _scramble(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser (Steele et al. 2014): uint64 → uint64, a bijection."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
