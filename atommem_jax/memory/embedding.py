"""From token ids to unit key vectors, the coordinates in which memory is searched.

An embedding is any hashable callable of type `types.Embed`. The one here has no weights: each
token id owns a fixed row of random signs, and a text is the normalised sum of its rows, so that
the cosine of two texts approximates the cosine of their token counts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class HashedBagOfTokens:
    """A deterministic random projection of token counts; two instances with equal fields agree.

    The row of a token depends on `seed` and its id alone: a larger vocabulary adds rows and
    changes none, and a larger `dim` adds columns. The noise in a cosine is about 1/sqrt(dim).

    Raises:
      ValueError: a field out of its range.
    """

    vocab_size: int
    dim: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for field, least in (("vocab_size", 1), ("dim", 1), ("seed", 0)):
            value = getattr(self, field)
            if value < least:
                raise ValueError(
                    f"HashedBagOfTokens.{field}={value}: must be at least {least}; "
                    f"pass a larger {field}"
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
          ValueError: L so large that the norm could overflow, or shapes that do not agree.
        """
        width = tokens.shape[-1]
        if length.shape != tokens.shape[:-1]:
            raise ValueError(
                f"length.shape={length.shape}: must be tokens.shape[:-1]={tokens.shape[:-1]}; "
                "pass one length per text"
            )
        if width * width * self.dim > np.iinfo(np.int32).max:
            raise ValueError(
                f"texts of {width} tokens in dim={self.dim}: tokens² x dim must stay below 2**31; "
                "cut the texts or lower dim"
            )
        position = jax.lax.broadcasted_iota(length.dtype, tokens.shape, tokens.ndim - 1)
        written = position < length[..., None]
        signs = jnp.asarray(self._signs)[tokens]
        # Sums and squares are integers, hence exact: the key of a text does not depend on its
        # padding, on the order of its tokens, or on how the compiler groups a batch.
        sums = jnp.where(written[..., None], signs, jnp.int8(0)).sum(axis=-2, dtype=jnp.int32)
        square = jnp.maximum((sums * sums).sum(axis=-1, keepdims=True, dtype=jnp.int32), 1)
        return sums.astype(jnp.float32) / jnp.sqrt(square.astype(jnp.float32))

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


def _scramble(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser (Steele et al. 2014): uint64 → uint64, a bijection."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
