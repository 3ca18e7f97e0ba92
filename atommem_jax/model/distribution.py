"""The distribution that a token is drawn from: what is allowed of the logits, at a temperature.

The sampler draws by it and the learner scores by it, so that the two agree to float32 rounding.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

_MASKED = -1e30


def masked_log_softmax(
    logits: Float[Array, "*batch V"], mask: Bool[Array, "*batch V"], temperature: Array
) -> Float[Array, "*batch V"]:
    """float32 log-probs over the allowed tokens; the others hold a very negative number."""
    logits = jnp.where(mask, logits.astype(jnp.float32) / temperature, _MASKED)
    return jax.nn.log_softmax(logits, axis=-1)


def masked_entropy(logits: Float[Array, "*b V"], mask: Bool[Array, "*b V"]) -> Float[Array, "*b"]:
    """Entropy in nats of softmax over the allowed tokens; 0 where none is allowed.

    Logits that are not allowed may hold anything; an allowed one of -inf has probability zero.
    """
    chex.assert_equal_shape([logits, mask])
    mask = mask & (logits != -jnp.inf)
    logits = logits.astype(jnp.float32)
    largest = jnp.max(logits, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    shifted = jnp.where(mask, logits - largest, 0.0)
    mass = jnp.where(mask, jnp.exp(shifted), 0.0)
    total = jnp.maximum(mass.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
    # H = log Z - E[shifted]; with no token allowed the mass is zero and so is the answer.
    mean = (mass * shifted).sum(axis=-1) / total
    return jnp.where(mask.any(axis=-1), jnp.log(total) - mean, 0.0)


def draw(
    key: PRNGKeyArray, log_probs: Float[Array, " V"], *, temperature: Array, top_p: float
) -> Int[Array, ""]:
    """Samples one token by inverting the cumulative distribution; argmax at temperature 0.

    One uniform number a token, where Gumbel noise would need V. A token of probability 0 is
    never drawn.
    """
    probs = jnp.exp(log_probs)
    if top_p < 1.0:
        ranked = jnp.sort(probs)[::-1]
        before = jnp.cumsum(ranked) - ranked
        least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf))
        probs = jnp.where(probs >= least, probs, 0.0)
    # `cumsum` adds in a tree, so rounding can raise the sum at a token of probability 0.
    cumulative = jnp.where(probs > 0, jnp.cumsum(probs), 0.0)
    threshold = jax.random.uniform(key, dtype=jnp.float32) * jnp.max(cumulative)
    sampled = jnp.argmax(cumulative > threshold)
    return jnp.where(temperature > 0, sampled, jnp.argmax(log_probs)).astype(jnp.int32)


def find_scale(temperature: Array) -> Float[Array, ""]:
    """What logits are divided by: the temperature, or 1 where that is 0."""
    return jnp.where(temperature > 0, temperature, 1.0).astype(jnp.float32)
