"""Losses against numbers worked by hand, a NumPy oracle, and padding full of poison."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.learning import loss
from atommem_jax.model import distribution

LOG2 = float(np.log(2.0))
ONE = jnp.float32(1.0)
_PPO = jax.jit(loss.ppo_loss, static_argnames=("clip_low", "clip_high", "dual_clip"))
_PPO_GRADIENT = jax.jit(jax.grad(lambda *args: loss.ppo_loss(*args)[0]))


def _logs(ratios):
    return jnp.log(jnp.array(ratios, jnp.float32))


def _ppo(ratios, advantages, **clips):
    """One row of equally weighted tokens whose behaviour log-probs are -1."""
    ratios, advantages = jnp.array([ratios], jnp.float32), jnp.array([advantages], jnp.float32)
    weights = jnp.ones_like(ratios)
    old = jnp.full_like(ratios, -1.0)
    return _PPO(old + jnp.log(ratios), old, advantages, weights, weights.sum(), **clips)


# --- masked sums and weights


def test_masked_sum_by_hand():
    # 2 * 0.5 + 3 * 2; the entry of weight 0 is skipped.
    x, weights = jnp.array([2.0, jnp.nan, 3.0]), jnp.array([0.5, 0.0, 2.0])
    total, gradient = jax.value_and_grad(loss.masked_sum)(x, weights)
    assert float(total) == 7.0
    np.testing.assert_array_equal(gradient, [0.5, 0.0, 2.0])


MASK = jnp.array(
    [[True, True, False], [True, False, False], [True, True, True], [False, False, False]]
)
ROWS = jnp.array([0, 0, 1, -1])  # the last row is padding


def test_token_mean_weighs_every_token_alike():
    weights, denominator = loss.token_weights(MASK, ROWS, 3, "token_mean")
    np.testing.assert_array_equal(weights, [[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    assert float(denominator) == 6.0


def test_trajectory_equal_gives_each_trajectory_the_same_total():
    # Trajectories 0 and 1 have three tokens each; add one token to 0: 4 and 3. 2 has none.
    mask = MASK.at[1, 1].set(True)
    weights, denominator = loss.token_weights(mask, ROWS, 3, "trajectory_equal")
    third = np.float32(1 / 3)
    np.testing.assert_allclose(
        weights, [[0.25, 0.25, 0], [0.25, 0.25, 0], [third] * 3, [0, 0, 0]], rtol=1e-6
    )
    assert float(denominator) == 2.0


@pytest.mark.parametrize("mode", ["token_mean", "trajectory_equal"])
def test_weights_of_a_batch_without_tokens_divide_nothing_by_zero(mode):
    weights, denominator = loss.token_weights(jnp.zeros((2, 3), bool), jnp.array([0, 1]), 2, mode)
    np.testing.assert_array_equal(weights, np.zeros((2, 3)))
    assert float(denominator) == 1.0


def test_variable_turn_counts_do_not_change_the_weight_of_a_trajectory():
    """The same six tokens as one turn or as three: its total stays, and so does its sibling's."""
    together = loss.token_weights(
        jnp.array([[True] * 6, [True] * 2 + [False] * 4]),
        jnp.array([0, 1]),
        2,
        "trajectory_equal",
    )
    apart = loss.token_weights(
        jnp.array([[True, True], [True, True], [True, True], [True, True]]),
        jnp.array([0, 0, 0, 1]),
        2,
        "trajectory_equal",
    )
    np.testing.assert_allclose(together[0].sum(axis=1), [1, 1], rtol=1e-6)
    np.testing.assert_allclose(apart[0].sum(axis=1), [1 / 3, 1 / 3, 1 / 3, 1], rtol=1e-6)
    assert float(together[1]) == float(apart[1]) == 2.0


def test_token_weights_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="mode='mean': must be 'token_mean' or"):
        loss.token_weights(MASK, ROWS, 3, "mean")


# --- supervised


def test_sft_loss_by_hand():
    # (1 * 2 + 0.5 * 4) / 4; weights 1.5 of 4.
    value, metrics = loss.sft_loss(
        jnp.array([[-2.0, -4.0, -9.0]]), jnp.array([[1.0, 0.5, 0.0]]), jnp.float32(4.0)
    )
    assert float(value) == 1.0
    assert float(metrics["nll"]) == 1.0
    assert float(metrics["weight"]) == 0.375


# --- PPO


def test_ppo_on_policy_is_the_policy_gradient():
    value, metrics = _ppo([1.0, 1.0], [2.0, -1.0])
    assert float(value) == -0.5
    want = {
        "ratio": 1.0,
        "ratio_square": 1.0,
        "clip_fraction": 0.0,
        "dual_clip_fraction": 0.0,
        "approx_kl": 0.0,
    }
    assert {name: float(x) for name, x in metrics.items()} == want

    log_probs, advantages = jnp.full((1, 2), -1.0), jnp.array([[2.0, -1.0]])
    gradient = _PPO_GRADIENT(log_probs, log_probs, advantages, jnp.ones((1, 2)), jnp.float32(2.0))
    np.testing.assert_array_equal(gradient, [[-1.0, 0.5]])  # -A / 2


@pytest.mark.parametrize(
    ("ratio", "advantage", "cost", "clipped", "dual_clipped"),
    [
        (1.25, 2.0, -2.5, 0, 0),  # within the higher upper bound
        (2.0, 2.0, -2.56, 1, 0),  # 1.28 * 2
        (0.5, 2.0, -1.0, 0, 0),  # moved against the gain: not clipped
        (0.5, -1.0, 0.8, 1, 0),  # 0.8 * 1
        (2.0, -1.0, 2.0, 0, 0),  # moved against the loss: pays in full
        (8.0, -1.0, 3.0, 0, 1),  # ... but at most three times
        (8.0, 1.0, -1.28, 1, 0),  # the dual clip is for negative advantages
    ],
)
def test_ppo_clips_by_hand(ratio, advantage, cost, clipped, dual_clipped):
    value, metrics = _ppo([ratio], [advantage])
    assert float(value) == pytest.approx(cost, rel=1e-5)
    assert float(metrics["ratio"]) == pytest.approx(ratio, rel=1e-5)
    assert float(metrics["ratio_square"]) == pytest.approx(ratio**2, rel=1e-5)
    assert float(metrics["clip_fraction"]) == clipped
    assert float(metrics["dual_clip_fraction"]) == dual_clipped
    assert float(metrics["approx_kl"]) == pytest.approx(ratio - 1 - np.log(ratio), rel=1e-4)


def test_ppo_without_the_dual_clip_pays_in_full():
    assert float(_ppo([8.0], [-1.0], dual_clip=None)[0]) == pytest.approx(8.0, rel=1e-5)


def test_ppo_clipped_tokens_have_no_gradient():
    # Clipped above, clipped below, dual-clipped, free (-ratio * A / 4 = -1 * 1 / 4).
    old = jnp.full((1, 4), -1.0)
    advantages = jnp.array([[1.0, -1.0, -1.0, 1.0]])
    new = old + _logs([[2.0, 0.5, 8.0, 1.0]])
    gradient = _PPO_GRADIENT(new, old, advantages, jnp.ones((1, 4)), jnp.float32(4.0))
    np.testing.assert_allclose(gradient, [[0.0, 0.0, 0.0, -0.25]], atol=1e-7)


def test_ppo_survives_a_ratio_beyond_float32():
    old, new = jnp.full((1, 1), -200.0), jnp.zeros((1, 1))
    for advantage in (1.0, -1.0):
        value, metrics = _PPO(new, old, jnp.full((1, 1), advantage), jnp.ones((1, 1)), ONE)
        assert np.isfinite(value)
        assert all(np.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ({"clip_low": 1.5}, "clip_low=1.5: must lie in"),
        ({"clip_high": -0.1}, "clip_high=-0.1: must be at least 0"),
        ({"dual_clip": 1.0}, "dual_clip=1.0: must be above 1"),
    ],
)
def test_ppo_refuses_clips_out_of_range(clips, message):
    with pytest.raises(ValueError, match=message):
        _ppo([1.0], [1.0], **clips)


# --- KL


# --- importance weights


_IMPORTANCE = jax.jit(loss.importance_weights, static_argnames="cap")


def test_importance_weights_by_hand():
    # learner / sampler: 1, 3 (cut to 2), 1/4, and padding that holds poison.
    sampler = jnp.full((1, 4), -1.0).at[0, 3].set(jnp.nan)
    learner = (sampler + _logs([[1.0, 3.0, 0.25, 1.0]])).at[0, 3].set(jnp.inf)
    weights = jnp.array([[1.0, 1.0, 2.0, 0.0]])
    found, metrics = _IMPORTANCE(learner, sampler, weights, jnp.float32(4.0), cap=2.0)
    np.testing.assert_allclose(found, [[1.0, 2.0, 0.25, 0.0]], rtol=1e-6)
    assert float(metrics["importance"]) == pytest.approx((1 + 2 + 2 * 0.25) / 4)
    assert float(metrics["importance_cut"]) == 0.25
    kl = (0 + (2 - np.log(3)) + 2 * (-0.75 + np.log(4))) / 4
    assert float(metrics["sampler_kl"]) == pytest.approx(kl, rel=1e-5)
    shares = {k.split("/")[1]: float(v) for k, v in metrics.items() if "/" in k}
    assert shares.pop("below_0.5") == 0.5
    assert shares.pop("0.99_to_1.01") == 0.25
    assert shares.pop("from_2") == 0.25
    assert len(shares) == len(loss.RATIO_EDGES) - 2
    assert not any(shares.values())


def test_importance_weights_agree_with_numpy():
    rng = np.random.default_rng(7)
    sampler = rng.normal(-2.0, 1.0, (9, 11)).astype(np.float32)
    learner = (sampler + rng.normal(0.0, 0.5, sampler.shape)).astype(np.float32)
    weights = np.where(rng.random(sampler.shape) < 0.7, rng.random(sampler.shape), 0.0)
    total = weights.sum()
    found, metrics = _IMPORTANCE(
        learner, sampler, jnp.asarray(weights, jnp.float32), jnp.float32(total), cap=1.3
    )
    ratio = np.exp(learner.astype(np.float64) - sampler.astype(np.float64))
    np.testing.assert_allclose(found, np.where(weights > 0, np.minimum(ratio, 1.3), 0.0), rtol=1e-5)
    histogram = np.histogram(ratio, [0, *loss.RATIO_EDGES, np.inf], weights=weights / total)[0]
    shares = {k.split("/")[1]: float(v) for k, v in metrics.items() if "/" in k}
    ends = shares.pop("below_0.5"), shares.pop("from_2")
    between = [shares[name] for name in sorted(shares, key=lambda name: float(name.split("_")[0]))]
    shares = [ends[0], *between, ends[1]]
    np.testing.assert_allclose(shares, histogram, atol=1e-6)
    expected = {
        "importance_cut": (weights * (ratio > 1.3)).sum() / total,
        "sampler_kl": (weights * (ratio - 1 - np.log(ratio))).sum() / total,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_importance_scales_the_term_of_its_token_and_carries_no_gradient():
    ratios, advantages = jnp.array([[1.1, 2.0, 0.5]]), jnp.array([[1.0, 1.0, -1.0]])
    old, weights = jnp.full_like(ratios, -1.0), jnp.array([[1.0, 1.0, 0.0]])
    importance = jnp.array([[0.5, 2.0, jnp.nan]])

    def cost(new, importance):
        return loss.ppo_loss(new, old, advantages, weights, jnp.float32(2.0), importance)[0]

    new = old + jnp.log(ratios)
    value, (gradient, of_weights) = jax.value_and_grad(cost, argnums=(0, 1))(new, importance)
    # 0.5 * 1.1, and 2 * 1.28: the second is clipped.
    np.testing.assert_allclose(value, -(0.5 * 1.1 + 2.0 * 1.28) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5 * 1.1 / 2, 0.0, 0.0]], rtol=1e-5)
    np.testing.assert_array_equal(of_weights, 0.0)


def test_weights_of_one_change_no_bit():
    log_probs, old, advantages, _, weights, denominator = _random_batch()[:6]
    ones = jnp.ones_like(old)
    plain = _PPO(log_probs, old, advantages, weights, denominator)
    for a, b in zip(
        jax.tree.leaves(plain),
        jax.tree.leaves(_PPO(log_probs, old, advantages, weights, denominator, ones)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_cap_must_be_positive():
    one = jnp.ones((1, 1))
    with pytest.raises(ValueError, match=r"cap=0: must be above 0; set ppo\.importance_cap"):
        loss.importance_weights(one, one, one, ONE, 0)


def test_kl_estimates_by_hand():
    # d = log 2 and -log 2: k3 = 1/2 - 1 + log 2, and 2 - 1 - log 2.
    log_probs, ref = jnp.array([[-1.0, -1.0 - LOG2]]), jnp.array([[-1.0 - LOG2, -1.0]])
    want = {
        "k1": [LOG2, -LOG2],
        "k2": [LOG2**2 / 2, LOG2**2 / 2],
        "k3": [LOG2 - 0.5, 1 - LOG2],
    }
    for kind, numbers in want.items():
        np.testing.assert_allclose(
            loss.kl_estimate(log_probs, ref, kind), [numbers], rtol=1e-5, err_msg=kind
        )


def test_kl_estimates_average_to_the_divergence():
    """Exact expectation over three tokens: k1 and k3 give the KL itself."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    kl = (p * np.log(p / q)).sum()
    for kind in ("k1", "k3"):
        estimate = loss.kl_estimate(_logs([p]), _logs([q]), kind)
        assert float((estimate[0] * p).sum()) == pytest.approx(kl, rel=1e-5)


def test_k2_in_a_loss_has_the_gradient_of_the_divergence():
    """E_p[grad of k2] = grad KL(p || q), for logits over three tokens."""
    logits = jnp.array([0.3, -0.2, 0.5])
    q = jax.nn.log_softmax(jnp.array([0.0, 1.0, -1.0]))
    p = jax.nn.softmax(logits)

    def divergence(z):
        log_p = jax.nn.log_softmax(z)
        return (jnp.exp(log_p) * (log_p - q)).sum()

    def sampled(z):
        return (p * loss.kl_estimate(jax.nn.log_softmax(z)[None], q[None], "k2")[0]).sum()

    np.testing.assert_allclose(jax.grad(sampled)(logits), jax.grad(divergence)(logits), rtol=1e-4)


def test_a_live_token_of_infinite_divergence_is_seen():
    estimate = loss.kl_estimate(jnp.array([[-1.0]]), jnp.array([[-jnp.inf]]), "k3")
    assert not np.isfinite(estimate).any()


def test_kl_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="kind='k4': must be 'k1', 'k2' or 'k3'"):
        loss.kl_estimate(jnp.zeros((1, 1)), jnp.zeros((1, 1)), "k4")


# --- value


def test_value_loss_by_hand():
    # Squared errors 1 and 4, halved and averaged: (1 + 4) / 2 / 2.
    value, metrics = loss.value_loss(
        jnp.array([1.0, 3.0]),
        jnp.array([2.0, 1.0]),
        jnp.array([0.0, 0.0]),
        jnp.ones(2),
        jnp.float32(2.0),
        None,
    )
    assert float(value) == 1.25
    assert float(metrics["value"]) == 2.0
    assert float(metrics["value_error"]) == 0.5
    assert float(metrics["value_clip_fraction"]) == 0.0


def test_value_clip_takes_the_worse_error():
    # Turn 0 jumped from 0 onto the target 1: after a move of 0.5 the error would be 0.25.
    # Turn 1 jumped away from the target: its own error 4 is worse than (0.5 + 1)² = 2.25.
    # Turn 2 moved by 0.1, within the clip: 0.81.
    value, metrics = loss.value_loss(
        jnp.array([1.0, 1.0, 0.1]),
        jnp.array([1.0, -1.0, 1.0]),
        jnp.zeros(3),
        jnp.ones(3),
        jnp.float32(3.0),
        0.5,
    )
    assert float(value) == pytest.approx((0.25 + 4.0 + 0.81) / 6, rel=1e-6)
    assert float(metrics["value_clip_fraction"]) == pytest.approx(1 / 3)


def test_value_clip_must_be_positive():
    with pytest.raises(ValueError, match=r"clip=0\.0: must be above 0, or None"):
        loss.value_loss(*[jnp.zeros(1)] * 4, ONE, 0.0)


# --- entropy

_entropy_gradient = jax.jit(
    jax.grad(lambda logits, mask: distribution.masked_entropy(logits, mask).sum())
)


def test_entropy_by_hand():
    logits = jnp.array(
        [
            [0.0, 0.0, 0.0, 0.0],  # uniform over four
            [5.0, 5.0, jnp.nan, jnp.inf],  # uniform over two; what is not allowed may be anything
            [3.0, 100.0, 0.0, 0.0],  # a single token
            [0.0, LOG2, -jnp.inf, 0.0],  # 1/3 and 2/3; an allowed token of probability zero
            [1.0, 2.0, 3.0, 4.0],  # none allowed
            [1e4, -1e4, 0.0, 0.0],  # no overflow
        ]
    )
    mask = jnp.array(
        [
            [True] * 4,
            [True, True, False, False],
            [True, False, False, False],
            [True, True, True, False],
            [False] * 4,
            [True] * 4,
        ]
    )
    want = [2 * LOG2, LOG2, 0.0, np.log(3) - 2 / 3 * LOG2, 0.0, 0.0]
    np.testing.assert_allclose(distribution.masked_entropy(logits, mask), want, atol=1e-6)
    gradient = _entropy_gradient(logits, mask)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[~np.asarray(mask)], 0.0)


def test_entropy_agrees_with_numpy_and_its_gradient_with_theory():
    """dH/dz_i = -p_i (log p_i + H)."""
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=3, size=(4, 5, 9)).astype(np.float32)
    mask = rng.random((4, 5, 9)) < 0.6
    mask[..., 0] = True
    odds = np.where(mask, np.exp(logits.astype(np.float64)), 0)
    p = odds / odds.sum(axis=-1, keepdims=True)
    log_p = np.log(np.where(p > 0, p, 1))
    want = -(p * log_p).sum(axis=-1)
    np.testing.assert_allclose(
        distribution.masked_entropy(jnp.array(logits), jnp.array(mask)), want, atol=1e-5
    )
    gradient = _entropy_gradient(jnp.array(logits), jnp.array(mask))
    np.testing.assert_allclose(gradient, -p * (log_p + want[..., None]), atol=1e-5)


# --- what all of them owe


def test_largest_gap_looks_at_counted_tokens_only():
    a, b = jnp.array([[-1.0, -2.0, jnp.nan]]), jnp.array([[-1.5, -1.25, 0.0]])
    assert float(loss.largest_gap(a, b, jnp.array([[1.0, 1.0, 0.0]]))) == 0.75
    assert float(loss.largest_gap(a, b, jnp.array([[1.0, 0.0, 0.0]]))) == 0.5


def _kl_term(log_probs, ref, weights, denominator, kind):
    kl = loss.masked_sum(loss.kl_estimate(log_probs, ref, kind), weights) / denominator
    return kl, {"kl": kl}


def _total(log_probs, old, advantages, values, weights, denominator):
    """Every loss that a training step may add up, with all their metrics."""
    turns = (weights > 0).any(axis=1).astype(jnp.float32)
    parts = [
        loss.sft_loss(log_probs, weights, denominator),
        loss.ppo_loss(log_probs, old, advantages, weights, denominator),
        loss.value_loss(values, advantages[:, 0], old[:, 0], turns, denominator, 0.2),
        *(_kl_term(log_probs, old, weights, denominator, kind) for kind in ("k1", "k2", "k3")),
    ]
    metrics = {f"{i}/{name}": x for i, (_, m) in enumerate(parts) for name, x in m.items()}
    return sum(value for value, _ in parts), metrics


_STEP = jax.jit(jax.value_and_grad(_total, argnums=(0, 3), has_aux=True))


def _random_batch(seed=0, rows=8, width=6):
    rng = np.random.default_rng(seed)
    log_probs, old = -rng.exponential(size=(2, rows, width)).astype(np.float32)
    advantages = rng.normal(size=(rows, width)).astype(np.float32)
    values = rng.normal(size=rows).astype(np.float32)
    mask = np.arange(width) < rng.integers(0, width + 1, rows)[:, None]
    weights, denominator = loss.token_weights(
        jnp.array(mask), jnp.arange(rows) // 2, rows // 2, "trajectory_equal"
    )
    return *(jnp.array(x) for x in (log_probs, old, advantages, values)), weights, denominator


def _assert_trees_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_micro_batches_add_up_to_the_batch():
    """Values, metrics and gradients: the sum over pieces of uneven length is the whole."""
    *arrays, denominator = _random_batch()
    whole = _STEP(*arrays, denominator)
    pieces = [_STEP(*(x[part] for x in arrays), denominator) for part in (slice(2), slice(2, 8))]
    summed = jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *(p[0] for p in pieces))
    _assert_trees_close(summed, whole[0])
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *(p[1] for p in pieces))
    _assert_trees_close(joined, whole[1])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_padding_reaches_neither_values_nor_gradients(poison):
    log_probs, old, advantages, values, weights, denominator = _random_batch(3)
    clean = _STEP(log_probs, old, advantages, values, weights, denominator)
    pad = np.asarray(weights) == 0
    assert pad.any()
    dead = pad.all(axis=1)
    assert dead.any()

    def spoil(x, where):
        return jnp.where(where, jnp.float32(poison), x)

    for new, behaviour in ((True, False), (False, True), (True, True)):
        got = _STEP(
            spoil(log_probs, pad & new),
            spoil(old, pad & behaviour),
            spoil(advantages, pad),
            spoil(values, dead),
            weights,
            denominator,
        )
        jax.tree.map(np.testing.assert_array_equal, got, clean)
    np.testing.assert_array_equal(np.asarray(clean[1][0])[pad], 0.0)


def test_losses_agree_with_numpy_token_by_token():
    arrays = _random_batch(5)
    log_probs, old, advantages, values, weights, denominator = (
        np.asarray(x, np.float64) for x in arrays
    )
    total = {"sft": 0.0, "ppo": 0.0, "k3": 0.0, "value": 0.0}
    rows, width = weights.shape
    for m in range(rows):
        for r in range(width):
            w, a = weights[m, r], advantages[m, r]
            if w == 0:
                continue
            ratio = np.exp(log_probs[m, r] - old[m, r])
            total["sft"] -= w * log_probs[m, r]
            bounded = min(max(ratio, 0.8), 1.28)
            gain = min(ratio * a, bounded * a)
            total["ppo"] -= w * (max(gain, 3 * a) if a < 0 else gain)
            total["k3"] += w * (1 / ratio - 1 + np.log(ratio))
        if weights[m].any():
            target, start = advantages[m, 0], old[m, 0]
            moved = min(max(values[m], start - 0.2), start + 0.2)
            total["value"] += max((values[m] - target) ** 2, (moved - target) ** 2) / 2
    log_probs, old, advantages, values, weights, denominator = arrays
    turns = (weights > 0).any(axis=1).astype(jnp.float32)
    got = {
        "sft": loss.sft_loss(log_probs, weights, denominator)[0],
        "ppo": loss.ppo_loss(log_probs, old, advantages, weights, denominator)[0],
        "k3": _kl_term(log_probs, old, weights, denominator, "k3")[0],
        "value": loss.value_loss(values, advantages[:, 0], old[:, 0], turns, denominator, 0.2)[0],
    }
    for name, want in total.items():
        assert float(got[name]) == pytest.approx(want / float(denominator), rel=1e-4), name
