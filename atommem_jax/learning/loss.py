"""Losses over turns: rows [M, R] of tokens, or [M] of turns, with a weight for each.

Every loss and every metric is `masked_sum(x, weights) / denominator`, where the denominator is
computed once for the whole batch and handed in. So the sum over micro-batches of rows is the
value for the whole batch, gradients included, and rows that are padding change nothing. An entry
of weight zero may hold anything, NaN and infinities included: it is replaced before any
arithmetic, because 0 * NaN is NaN in the backward pass too.
"""

import itertools
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Metrics = dict[str, Float[Array, ""]]

RATIO_EDGES = (0.5, 0.8, 0.95, 0.99, 1.01, 1.05, 1.25, 2.0)
"""Where the histogram of `importance_weights` is cut."""

# exp(20) is 5e8: beyond that a ratio is an accident, and its square overflows float32 soon.
_LARGEST_LOG_RATIO = 20.0


def masked_sum(x: Float[Array, "*shape"], weights: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The weighted sum; entries of weight zero reach neither the sum nor its gradient."""
    chex.assert_equal_shape([x, weights])
    return jnp.sum(_where_weighted(x, weights) * weights)


def token_weights(
    response_mask: Bool[Array, "M R"],
    trajectory: Int[Array, " M"],
    num_trajectories: int,
    mode: Literal["token_mean", "trajectory_equal"],
) -> tuple[Float[Array, "M R"], Float[Array, ""]]:
    """Weights of the tokens of a whole batch, and the denominator that belongs to them.

    Args:
      response_mask: the tokens that were generated.
      trajectory: to which trajectory a row belongs, 0..num_trajectories-1; anything in a row
        without tokens.
      num_trajectories: static.
      mode: 'token_mean' weighs every token alike (AtomMem section 4, after DAPO);
        'trajectory_equal' gives every trajectory the same total, shared equally by its tokens,
        so that long trajectories do not dominate.

    Raises:
      ValueError: an unknown mode.
    """
    chex.assert_rank([response_mask, trajectory], [2, 1])
    mask = response_mask.astype(jnp.float32)
    if mode == "token_mean":
        return mask, jnp.maximum(mask.sum(), 1.0)
    if mode == "trajectory_equal":
        row = jnp.where(response_mask.any(axis=1), trajectory, 0)
        tokens = jax.ops.segment_sum(mask.sum(axis=1), row, num_trajectories)
        share = 1.0 / jnp.maximum(tokens, 1.0)
        return mask * share[row][:, None], jnp.maximum((tokens > 0).sum().astype(jnp.float32), 1.0)
    raise ValueError(
        f"mode={mode!r}: must be 'token_mean' or 'trajectory_equal'; set it in the loss config"
    )


def sft_loss(
    log_probs: Float[Array, "M R"], weights: Float[Array, "M R"], denominator: Float[Array, ""]
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the teacher's tokens.

    Metrics: nll (the loss) and weight (1 over the whole batch, when the denominator is the sum
    of the weights).
    """
    loss = -masked_sum(log_probs, weights) / denominator
    return loss, {"nll": loss, "weight": weights.sum() / denominator}


def ppo_loss(
    log_probs: Float[Array, "M R"],
    old_log_probs: Float[Array, "M R"],
    advantages: Float[Array, "M R"],
    weights: Float[Array, "M R"],
    denominator: Float[Array, ""],
    importance: Float[Array, "M R"] | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Token-level clipped surrogate (Schulman et al. 2017; AtomMem section 4).

    The ratio is clipped to [1 - clip_low, 1 + clip_high], higher above than below (DAPO, Yu et
    al. 2025). With `dual_clip` = c, a token of negative advantage A never costs more than c |A|
    (Ye et al. 2020): a ratio that ran away cannot dominate the step.

    old_log_probs are those of the policy that the ratio starts from: the one that sampled, or the
    learner's own where `importance` corrects for the difference between the two.

    importance: what each token's term is multiplied by, see `importance_weights`; None for 1.

    Metrics, all weighted means: ratio, ratio_square (their weighted variance follows),
    clip_fraction and dual_clip_fraction (tokens where that clip decided the value), approx_kl
    (k3 estimate of KL from the policy of `old_log_probs` to this one).

    Raises:
      ValueError: clip_low outside [0, 1], clip_high below 0, or dual_clip not above 1.
    """
    _check_clips(clip_low, clip_high, dual_clip)
    chex.assert_equal_shape([log_probs, old_log_probs, advantages, weights])
    log_ratio = _where_weighted(log_probs, weights) - _where_weighted(old_log_probs, weights)
    log_ratio = jnp.clip(log_ratio, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    ratio = jnp.exp(log_ratio)

    plain = ratio * advantages
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = jnp.minimum(plain, clipped)
    is_floored = jnp.zeros_like(weights, dtype=bool)
    if dual_clip is not None:
        floor = dual_clip * advantages
        is_floored = (advantages < 0.0) & (objective < floor)
        objective = jnp.where(is_floored, floor, objective)
    if importance is not None:
        objective *= jax.lax.stop_gradient(_where_weighted(importance, weights))

    def mean(x: Float[Array, "M R"]) -> Float[Array, ""]:
        return masked_sum(x, weights) / denominator

    metrics = {
        "ratio": mean(ratio),
        "ratio_square": mean(jnp.square(ratio)),
        "clip_fraction": mean((clipped < plain).astype(jnp.float32)),
        "dual_clip_fraction": mean(is_floored.astype(jnp.float32)),
        "approx_kl": mean(jnp.expm1(log_ratio) - log_ratio),
    }
    return -mean(objective), jax.lax.stop_gradient(metrics)


def importance_weights(
    log_probs: Float[Array, "M R"],
    sampler_log_probs: Float[Array, "M R"],
    weights: Float[Array, "M R"],
    denominator: Float[Array, ""],
    cap: float,
) -> tuple[Float[Array, "M R"], Metrics]:
    """Truncated importance weights min(learner / sampler, cap) of sampled tokens, 0 on padding.

    Both log-probs are of the same parameters, those that sampled: the learner computes a little
    different with them, where the sampler keeps weights or cache in int8, or another backend
    samples. The weight of a token makes its term one of the learner's own policy again, and the cap
    bounds the variance (Yao et al. 2025, "On the Rollout-Training Mismatch in Modern RL Systems").
    The ratio of `ppo_loss` is then between the learner after and before its steps: what its clip
    measures is how far the policy has moved, and not how coarse the sampler was.

    Metrics, all weighted means: sampler_kl (k3 estimate of KL from the sampler to the learner),
    importance (of the weights), importance_cut (share above the cap), and shares of ratios between
    `RATIO_EDGES`, such as `importance_share/0.99_to_1.01`; the lower edge belongs to its share.

    Raises:
      ValueError: the cap is not positive.
    """
    if cap <= 0:
        raise ValueError(f"cap={cap}: must be above 0; set ppo.importance_cap, whose 0 calls none")
    chex.assert_equal_shape([log_probs, sampler_log_probs, weights])
    log_probs, sampler_log_probs = (
        jax.lax.stop_gradient(_where_weighted(x, weights)) for x in (log_probs, sampler_log_probs)
    )
    log_ratio = jnp.clip(log_probs - sampler_log_probs, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    truncated = _where_weighted(jnp.minimum(ratio, cap), weights)

    def mean(x: Float[Array, "M R"]) -> Float[Array, ""]:
        return masked_sum(x, weights) / denominator

    edges = (0.0, *RATIO_EDGES, float("inf"))
    names = [
        f"below_{RATIO_EDGES[0]:g}",
        *(f"{low:g}_to_{high:g}" for low, high in itertools.pairwise(RATIO_EDGES)),
        f"from_{RATIO_EDGES[-1]:g}",
    ]
    shares = {
        f"importance_share/{name}": mean(((ratio >= low) & (ratio < high)).astype(jnp.float32))
        for name, (low, high) in zip(names, itertools.pairwise(edges), strict=True)
    }
    return truncated, {
        "sampler_kl": mean(kl_estimate(sampler_log_probs, log_probs, "k3")),
        "importance": mean(truncated),
        "importance_cut": mean((ratio > cap).astype(jnp.float32)),
        **shares,
    }


def kl_estimate(
    log_probs: Float[Array, "M R"],
    ref_log_probs: Float[Array, "M R"],
    kind: Literal["k1", "k2", "k3"],
) -> Float[Array, "M R"]:
    """Per-token estimates of KL(policy || reference) on samples of the policy (Schulman 2020).

    With d = log_probs - ref_log_probs: k1 is d (unbiased, may be negative), k2 is d²/2 (biased,
    but its gradient is unbiased on policy, so it suits a loss term), k3 is exp(-d) - 1 + d
    (unbiased and never negative: the paper's low-variance estimator). In k3, d is bounded by 20
    so that the exponential stays finite. Where d is not finite the estimate is not either, so
    that a live token shows the fault, but no gradient flows.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kind={kind!r}: must be 'k1', 'k2' or 'k3'; set it in the loss config")
    chex.assert_equal_shape([log_probs, ref_log_probs])
    raw = log_probs - ref_log_probs
    finite = jnp.isfinite(raw)
    # Chosen before the subtraction, so that no derivative meets an infinity.
    gap = jnp.where(finite, log_probs, 0.0) - jnp.where(finite, ref_log_probs, 0.0)
    if kind == "k1":
        estimate = gap
    elif kind == "k2":
        estimate = 0.5 * jnp.square(gap)
    else:
        gap = jnp.clip(gap, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
        estimate = jnp.expm1(-gap) + gap
    return jnp.where(finite, estimate, jax.lax.stop_gradient(raw))


def value_loss(
    values: Float[Array, " M"],
    returns: Float[Array, " M"],
    old_values: Float[Array, " M"],
    weights: Float[Array, " M"],
    denominator: Float[Array, ""],
    clip: float | None,
) -> tuple[Float[Array, ""], Metrics]:
    """Half the squared error; with `clip`, the worse of that and the error after a bounded move.

    Metrics, all weighted means: value, value_error (values - returns), value_clip_fraction
    (turns where the clip decided the value).

    Raises:
      ValueError: clip is not positive.
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"clip={clip}: must be above 0, or None; set it in the value-loss config")
    chex.assert_rank([values, returns, old_values, weights], 1)
    values, returns, old_values = (
        _where_weighted(x, weights) for x in (values, returns, old_values)
    )
    error = jnp.square(values - returns)
    is_clipped = jnp.zeros_like(weights, dtype=bool)
    if clip is not None:
        moved = old_values + jnp.clip(values - old_values, -clip, clip)
        clipped_error = jnp.square(moved - returns)
        # Inside the range `moved` is `values` up to rounding, which must not count as clipped.
        is_clipped = (jnp.abs(values - old_values) > clip) & (clipped_error > error)
        error = jnp.where(is_clipped, clipped_error, error)
    metrics = {
        "value": masked_sum(values, weights) / denominator,
        "value_error": masked_sum(values - returns, weights) / denominator,
        "value_clip_fraction": masked_sum(is_clipped.astype(jnp.float32), weights) / denominator,
    }
    return 0.5 * masked_sum(error, weights) / denominator, jax.lax.stop_gradient(metrics)


def largest_gap(
    log_probs: Float[Array, "M R"],
    other_log_probs: Float[Array, "M R"],
    weights: Float[Array, "M R"],
) -> Float[Array, ""]:
    """Largest |difference| over the tokens that count: sampler against learner.

    A maximum, not a mean: combine micro-batches with max.
    """
    gap = _where_weighted(log_probs, weights) - _where_weighted(other_log_probs, weights)
    return jnp.max(jnp.abs(gap), initial=0.0)


def _where_weighted(x: Float[Array, "*s"], weights: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return jnp.where(weights != 0, x, jnp.zeros((), x.dtype))


def _check_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low={clip_low}: must lie in [0, 1]; set it in the loss config")
    if clip_high < 0.0:
        raise ValueError(f"clip_high={clip_high}: must be at least 0; set it in the loss config")
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(
            f"dual_clip={dual_clip}: must be above 1, or None; set it in the loss config"
        )
