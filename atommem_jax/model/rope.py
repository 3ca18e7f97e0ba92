"""Rotary positions: channels of queries and keys turn in pairs, a little further with each token.

The frequencies may be slowed for texts longer than those of training, in the ways that published
models name: linear, llama3, yarn.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atommem_jax.model.model_config import ModelConfig


def rotary_frequencies(config: ModelConfig) -> Float[Array, " pairs"]:
    """Radians a position for each pair of rotated channels, float32.

    With `rope_factor` above 1 pairs are slowed, by `rope_type`. linear: all of them by the factor
    (Chen et al., 2023). llama3: a pair that turns fewer than `low` times over the original length
    is slowed by the factor, one that turns more than `high` times is kept, and between the two the
    share that is kept grows linearly with the turns. yarn (Peng et al., 2023, section 3.2): the
    same between `rope_beta_slow` and `rope_beta_fast` turns, but the share falls linearly with the
    number of the pair, from one whole number to another where `rope_truncate`.
    """
    c = config
    exponents = jnp.arange(0, c.rope_width, 2, dtype=jnp.float32) / max(c.rope_width, 1)
    frequencies = c.rope_theta ** (-exponents)
    if c.rope_factor == 1.0:
        return frequencies
    if c.rope_type == "linear":
        return frequencies / c.rope_factor
    if c.rope_type == "yarn":
        first, last = _yarn_range(c)
        pairs = jnp.arange(frequencies.shape[0], dtype=jnp.float32)
        kept = 1.0 - jnp.clip((pairs - first) / (last - first), 0.0, 1.0)
    else:
        low, high = c.rope_low_frequency_factor, c.rope_high_frequency_factor
        turns = c.rope_original_length * frequencies / (2 * math.pi)
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / c.rope_factor)


def _yarn_range(c: ModelConfig) -> tuple[float, float]:
    """The pairs between which YaRN goes from frequencies that are kept to slowed ones."""

    def find_pair(turns: float) -> float:
        """Where over the original length a pair turns so often; between two pairs, mostly."""
        longest = c.rope_original_length / (turns * 2 * math.pi)
        return c.rope_width * math.log(longest) / (2 * math.log(c.rope_theta))

    first, last = find_pair(c.rope_beta_fast), find_pair(c.rope_beta_slow)
    if c.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, c.rope_width - 1)
    return first, last + 0.001 if first == last else last


def rotary_scale(config: ModelConfig) -> float:
    """What rotated channels are multiplied by: YaRN's sharper attention over longer texts.

    Queries and keys both are, so that scores grow by its square (Peng et al., 2023, section 3.4).
    """
    if config.rope_type != "yarn":
        return 1.0
    return config.rope_attention_factor or 0.1 * math.log(config.rope_factor) + 1.0


def rotate(
    x: Float[Array, "B heads T depth"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " pairs"],
    scale: float = 1.0,
) -> Float[Array, "B heads T depth"]:
    """Rotary embedding of the first 2 x pairs channels, paired (i, i + pairs), in float32.

    scale: what they are multiplied by as well.
    """
    width = 2 * frequencies.shape[0]
    if width == 0:
        return x
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    rotated, passed = x[..., :width].astype(jnp.float32), x[..., width:]
    first, second = jnp.split(rotated, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), passed], axis=-1)
