"""From token ids to unit key vectors, the coordinates in which memory is searched.

An embedding is any hashable callable of type `types.Embed`. The one here learns nothing: each
token id owns a fixed row of random signs, and a text is the normalised sum of its rows, so that
the cosine of two texts approximates the cosine of their token counts. Tokens may count by how rare
they are: a question of many function words is else nearest to whatever has the same ones.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_SQUARES = 1 << 40  # sums of squares stay below it


def most_times(dim: int, length: int) -> int:
    """How often a token may count at most, where texts have up to `length` tokens."""
    return math.isqrt((_SQUARES - 1) // dim) // length


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
