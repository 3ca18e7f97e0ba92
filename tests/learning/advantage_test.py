"""Advantages against numbers worked by hand and a plain NumPy double loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.learning import advantage


def test_group_relative_subtracts_the_group_mean():
    # Means 0.5 and 0.25.
    rewards = jnp.array([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    got = advantage.group_relative(rewards, divide_by_std=False)
    np.testing.assert_array_equal(got, [[0.5, -0.5, 0.5, -0.5], [0.75, -0.25, -0.25, -0.25]])


def test_group_relative_divides_by_the_sample_deviation():
    # Mean 2, squares 4 + 0 + 4 = 8 over n - 1 = 2: deviation 2, plus epsilon 0.5 = 2.5.
    got = advantage.group_relative(jnp.array([[0.0, 2.0, 4.0]]), divide_by_std=True, epsilon=0.5)
    np.testing.assert_allclose(got, [[-0.8, 0.0, 0.8]], rtol=1e-6)


def test_leave_one_out_compares_with_the_mean_of_the_others():
    # 1 - (0 + 0.5)/2, 0 - (1 + 0.5)/2, 0.5 - (1 + 0)/2.
    rewards = jnp.array([[1.0, 0.0, 0.5]])
    got = advantage.group_relative(rewards, divide_by_std=False, leave_one_out=True)
    np.testing.assert_allclose(got, [[0.75, -0.75, 0.0]], rtol=1e-6)


def test_group_relative_treats_each_trailing_column_alone():
    # Two questions: column means (0.5, 0.25).
    rewards = jnp.array([[[1.0, 0.5], [0.0, 0.0]]])
    got = advantage.group_relative(rewards, divide_by_std=False)
    np.testing.assert_array_equal(got, [[[0.5, 0.25], [-0.5, -0.25]]])


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equal_rewards_give_exactly_zero(leave_one_out):
    # The mean of seven float32 0.1 is not 0.1; divided by epsilon the error would be 0.7.
    rewards = jnp.full((1, 7), 0.1)
    got = advantage.group_relative(
        rewards, divide_by_std=True, leave_one_out=leave_one_out, epsilon=1e-8
    )
    np.testing.assert_array_equal(got, np.zeros((1, 7)))


def test_a_group_of_one_learns_nothing():
    got = advantage.group_relative(jnp.array([[0.7]]), divide_by_std=True)
    np.testing.assert_array_equal(got, [[0.0]])
    with pytest.raises(ValueError, match="leave_one_out=True with group size 1"):
        advantage.group_relative(jnp.array([[0.7]]), divide_by_std=False, leave_one_out=True)


def test_group_relative_refuses_rewards_without_groups():
    with pytest.raises(ValueError, match=r"rewards.shape=\(3,\)"):
        advantage.group_relative(jnp.zeros(3), divide_by_std=False)


def test_gae_by_hand():
    # discount 0.5, lambda 0.5, so 0.25 carries over.
    # errors:     t2: 1 - 2 = -1;  t1: 0 + 0.5*2 - 4 = -3;  t0: 1 + 0.5*4 - 1 = 2
    # advantages: t2: -1;          t1: -3 - 0.25 = -3.25;   t0: 2 - 0.8125 = 1.1875
    advantages, returns = advantage.turn_level_gae(
        jnp.array([1.0, 0.0, 1.0]),
        jnp.array([1.0, 4.0, 2.0]),
        jnp.array([True, True, True]),
        discount=0.5,
        gae_lambda=0.5,
    )
    np.testing.assert_array_equal(advantages, [1.1875, -3.25, -1.0])
    np.testing.assert_array_equal(returns, [2.1875, 0.75, 1.0])


def test_gae_ignores_dead_turns_whatever_they_hold():
    live = jnp.array([True, True, False, False])
    kwargs = {"discount": 0.9, "gae_lambda": 0.8}
    short = advantage.turn_level_gae(
        jnp.array([0.0, 1.0]), jnp.array([0.3, 0.6]), jnp.array([True, True]), **kwargs
    )
    padded = advantage.turn_level_gae(
        jnp.array([0.0, 1.0, jnp.nan, 5.0]), jnp.array([0.3, 0.6, 7.0, jnp.nan]), live, **kwargs
    )
    for got, want in zip(padded, short, strict=True):
        np.testing.assert_array_equal(got[:2], want)
        np.testing.assert_array_equal(got[2:], [0.0, 0.0])


def test_gae_of_lambda_one_and_no_discount_is_reward_to_go():
    rewards = jnp.array([0.0, 0.5, 0.0, 1.0])
    values = jnp.array([0.2, 0.9, 0.4, 0.1])
    _, returns = advantage.turn_level_gae(
        rewards, values, jnp.ones(4, bool), discount=1.0, gae_lambda=1.0
    )
    np.testing.assert_allclose(returns, [1.5, 1.5, 1.0, 1.0], rtol=1e-6)


def test_gae_agrees_with_its_definition_on_a_vmapped_batch():
    """The definition is the sum over l of (discount * lambda)**l * error[t + l]."""
    rng = np.random.default_rng(0)
    batch, turns, discount, lam = 5, 7, 0.95, 0.9
    rewards, values = rng.normal(size=(2, batch, turns)).astype(np.float32)
    lengths = rng.integers(0, turns + 1, batch)
    live = np.arange(turns) < lengths[:, None]
    got, _ = jax.vmap(
        lambda r, v, m: advantage.turn_level_gae(r, v, m, discount=discount, gae_lambda=lam)
    )(jnp.array(rewards), jnp.array(values), jnp.array(live))
    want = np.zeros((batch, turns))
    for b, length in enumerate(lengths):
        for t in range(length):
            for later in range(t, length):
                following = values[b, later + 1] if later + 1 < length else 0.0
                error = rewards[b, later] + discount * following - values[b, later]
                want[b, t] += (discount * lam) ** (later - t) * error
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
