"""What sampler and learner promise each other about the same tokens, and how one tells.

However a token is decided, two programs compute its log-prob under the same parameters: the one
that samples it, and the one that learns from it. Both add float32 numbers, in another order.

- *Tokens are equal.* Guesses (`rollout.draft`), kept prefixes (`rollout.cache_prefix`), widths
  (`rollout.prompt_buckets`), groups and their halves (`rollout.microbatch`, `rollout.least_rows`)
  and `rollout.cpu_decode` change no token in float32, unless its random number lies within rounding
  of the border to another one.
- *Log-probs are equal up to rounding*: see `bound`. So they are between sampler and learner.
- *Bits are equal where the same columns are computed the same way*: by the same program, at the
  same width (`Turns.width`, which a replay takes), in groups of as many rows. Which rows those are,
  and in which order, changes nothing.

Nothing is promised of another policy than the one that learns: with weights or cache in int8 the
gap is only reported, and corrected for (`loss.importance_weights`). Nor is it of bfloat16, nor of
float32 on devices that multiply it coarser, unless `jax_default_matmul_precision` is 'highest'.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ROUNDINGS = 64
"""How many roundings of the largest logit two log-probs of one token may be apart."""

_EPSILON = float(np.finfo(np.float32).eps)


def bound(largest_logit: Float[Array, ""] | float) -> Float[Array, ""]:
    """How far two float32 log-probs of one token may be apart, in nats, float32.

    A log-prob is the difference of a logit and the logarithm of a sum: it is as coarse as the
    largest of the logits, and these as coarse as what they are summed of. So the bound is
    `ROUNDINGS` units in the last place of the largest |logit|, after the temperature and among the
    tokens allowed, and of 1 where all are smaller.

    Measured against float64 on random models of one to eight layers, each with 207 to 463 rows
    whose largest logit was 4 to 109 (docs/performance.md): sampler and learner were each up to 28
    such units off, and up to 21 apart.
    """
    return ROUNDINGS * _EPSILON * jnp.maximum(jnp.asarray(largest_logit, jnp.float32), 1.0)


def find_faults(
    tokens: Int[Array, "*rows R"],
    log_probs: Float[Array, "*rows R"],
    other_tokens: Int[Array, "*rows R"],
    other_log_probs: Float[Array, "*rows R"],
    largest_logit: Float[Array, ""] | float,
    *,
    same_bits: bool = False,
) -> list[str]:
    """In which sentences two computations of the same rows break the promise; on the host.

    Args:
      tokens: of the responses, padded alike.
      log_probs: of the tokens; 0 on padding.
      other_tokens: those of the other computation.
      other_log_probs: the same.
      largest_logit: that a token was chosen by, see `bound`.
      same_bits: both computed the same columns the same way.

    Returns none where it is kept. Nothing to compare, and what is no number, is a fault.

    Raises ValueError for arrays of different shapes.
    """
    arrays = [np.asarray(x) for x in (tokens, log_probs, other_tokens, other_log_probs)]
    if len({x.shape for x in arrays}) > 1:
        raise ValueError(
            f"shapes are {', '.join(str(x.shape) for x in arrays)}: pass the same rows of both"
        )
    ours, mine, theirs, their = arrays
    faults = []
    if not mine.any():
        faults.append("There is no token to compare: every log-prob is 0.")
    different = int((ours != theirs).sum())
    if different:
        faults.append(f"{different} of {ours.size} tokens are different.")
    if same_bits:
        changed = int((mine.view(np.int32) != their.view(np.int32)).sum())
        if changed:
            faults.append(f"{changed} of {mine.size} log-probs have other bits.")
    gap, allowed = np.abs(mine - their), float(bound(largest_logit))
    if not (gap <= allowed).all():  # NaN is neither
        faults.append(
            f"Log-probs are up to {np.max(gap, initial=0.0):.1e} apart; rounding explains "
            f"{allowed:.1e}, {ROUNDINGS} units in the last place of a logit of "
            f"{float(largest_logit):.3g}."
        )
    return faults
