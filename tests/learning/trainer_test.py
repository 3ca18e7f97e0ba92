"""Gradients against a plain computation over all rows, and credit in literal numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from atommem_jax.config import OptimizerConfig, PPOConfig
from atommem_jax.learning import credit, microbatches, trainer
from atommem_jax.types import EMPTY, ActionKind
from tests.helpers import tiny
from tests.helpers.updates import (
    RECORDER,
    ROWS,
    agent,
    assert_close,
    draw_rewards,
    make_optimizer,
    make_params,
    new_state,
    num_questions,
    off_policy,
    sample,
    update,
)

# ---------------------------------------------------------------------------------------------
# Packing


def quadratic_loss(params, part, width=1000):
    """A loss as cheap as a table: no model, but every field of a row that packing moves.

    It is NaN where a row that counts does not fit into `width`.
    """
    fed = part.prompt_lengths + jnp.maximum(part.response_lengths - 1, 0)
    overflows = (fed > width) & jnp.any(part.weights > 0, axis=1)
    params = jnp.where(overflows.any(), jnp.nan, params)
    found = params[part.response] * (1.0 + part.phase.astype(jnp.float32))[:, None]
    error = jnp.square(found - part.old_log_probs)
    total = jnp.sum(jnp.where(part.weights > 0, error * part.weights, 0.0))
    real = jnp.arange(part.response.shape[1])[None] < part.response_lengths[:, None]
    return total, (
        {"loss": total, "tokens": real.sum().astype(jnp.float32)},
        {"largest": jnp.max(jnp.where(part.weights > 0, error, 0.0))},
    )


accumulate = jax.jit(
    functools.partial(microbatches.accumulate_gradients, quadratic_loss), static_argnames="rows"
)


@functools.cache
def make_table():
    vocab = agent().model.config.vocab_size
    return jnp.asarray(np.random.default_rng(1).normal(size=vocab), jnp.float32)


@pytest.mark.parametrize("shares", [1, 2, 8])
def test_work_is_spread_over_the_devices(shares):
    rng = np.random.default_rng(shares)
    for busy in (0.1, 0.5, 1.0):
        work = rng.integers(1, 40, 64) * (rng.random(64) < busy)
        order = np.asarray(microbatches.spread(jnp.asarray(work), shares))
        np.testing.assert_array_equal(np.sort(order), np.arange(64))
        each = work[order].reshape(shares, -1).sum(axis=1)
        assert each.max() - each.min() <= work.max()
    lopsided = np.arange(64) < 32  # as they came, half of the devices would wait
    order = np.asarray(microbatches.spread(jnp.asarray(lopsided, np.int32), shares))
    np.testing.assert_array_equal(lopsided[order].reshape(shares, -1).sum(axis=1), 32 // shares)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_packed_gradients_equal_those_of_all_rows(rows):
    batch = trainer.make_batch(sample())
    rng = np.random.default_rng(rows)
    size = batch.phase.shape[0]
    for share in (0.0, 0.1, 0.6, 1.0):
        active = jnp.asarray(rng.random(size) < share)
        idle = batch.replace(weights=jnp.where(active[:, None], batch.weights, 0.0))
        grads, sums, maxima = accumulate(make_table(), idle, active, rows=rows)
        (_, (_, all_maxima)), expected = jax.value_and_grad(quadratic_loss, has_aux=True)(
            make_table(), idle
        )
        assert_close(grads, expected)
        np.testing.assert_allclose(sums["loss"], quadratic_loss(make_table(), idle)[0], rtol=1e-5)
        # Filling up the last micro-batch counts no token twice.
        assert int(sums["tokens"]) == np.asarray(idle.response_lengths)[np.asarray(active)].sum()
        np.testing.assert_allclose(maxima["largest"], all_maxima["largest"], rtol=1e-6)


def test_idle_rows_are_not_looked_at():
    batch = trainer.make_batch(sample())
    live = np.flatnonzero(batch.response_lengths)[:6]
    active = jnp.zeros(batch.phase.shape, bool).at[live].set(True)
    poison = jnp.where(active[:, None], batch.old_log_probs, jnp.nan)
    grads, _, _ = accumulate(make_table(), batch.replace(old_log_probs=poison), active, rows=3)
    assert np.isfinite(grads).all()
    assert np.abs(grads).max() > 0


def test_rows_of_a_batch_are_the_turns():
    played = sample()
    turns = played.turns
    advantages = jnp.arange(turns.live.size, dtype=jnp.float32).reshape(turns.live.shape) + 1.0
    batch = trainer.make_batch(played, advantages, 2 * advantages)
    width = turns.live.shape[1]
    for b, t in [(0, 0), (3, 2), (7, 1), (5, width - 1)]:
        row = b * width + t
        length = int(turns.response_lengths[b, t]) * int(turns.live[b, t])
        assert batch.response_lengths[row] == length
        np.testing.assert_array_equal(batch.prompt[row], turns.prompt[b, t])
        np.testing.assert_array_equal(batch.response[row], turns.response[b, t])
        np.testing.assert_array_equal(batch.old_log_probs[row], turns.log_probs[b, t])
        real = (np.arange(batch.response.shape[1]) < length).astype(np.float32)
        np.testing.assert_array_equal(batch.weights[row], real)
        np.testing.assert_array_equal(batch.advantages[row], real * advantages[b, t])
        assert batch.returns[row] == 2 * advantages[b, t]
        assert batch.old_values[row] == turns.values[b, t]
        assert batch.phase[row] == turns.phase[b, t]


# ---------------------------------------------------------------------------------------------
# One update against the formula


def straightforward_gradients(trajectories, advantages, *, low=0.2, high=0.28, dual=3.0):
    """Per trajectory: the gradient of the summed clipped surrogate of its tokens, and tokens.

    No packing, no shuffling, no shared reductions: each token's term is written out.
    """
    turns = trajectories.turns

    @jax.jit
    def gradient(params, turns, advantages):
        def total(params):
            scores = tiny.score_rows(agent(), params, turns)
            ratio = jnp.exp(scores.log_probs - turns.log_probs)
            a = advantages[:, None] * jnp.ones_like(ratio)
            worse = jnp.minimum(ratio * a, jnp.clip(ratio, 1 - low, 1 + high) * a)
            worse = jnp.where(a < 0, jnp.maximum(worse, dual * a), worse)
            real = jnp.arange(ratio.shape[1])[None] < turns.response_lengths[:, None]
            return -jnp.where(real & turns.live[:, None], worse, 0.0).sum()

        return jax.grad(total)(params)

    found = []
    for b in range(ROWS):
        row = jax.tree.map(lambda x, b=b: x[b], turns)
        tokens = float(jnp.where(row.live, row.response_lengths, 0).sum())
        found.append((gradient(make_params(), row, advantages[b]), tokens))
    return found


def expected_advantages(rewards):
    """Trajectory credit, mean of the group subtracted, in NumPy."""
    total = np.asarray(rewards).sum(axis=1) / np.asarray(num_questions())
    whole = total.reshape(2, 4) - total.reshape(2, 4).mean(axis=1, keepdims=True)
    return np.where(sample().turns.live, whole.reshape(-1, 1), 0.0).astype(np.float32)


def tree_sum(trees, scale):
    return jax.tree.map(lambda *leaves: sum(leaves) * scale, *trees)


def test_update_follows_the_gradient_of_the_formula():
    rewards = draw_rewards()
    config = PPOConfig(group_size=4, microbatch_rows=5)
    state, metrics = update(new_state(RECORDER), off_policy(), rewards, config, RECORDER)

    advantages = expected_advantages(rewards)
    found = straightforward_gradients(off_policy(), advantages)
    tokens = sum(count for _, count in found)
    # token_mean: all generated tokens count, those of the group without a contrast included.
    assert_close(state.opt_state, tree_sum([g for g, _ in found], 1 / tokens))
    assert not advantages[4:].any()
    assert metrics["scored_share"] < 0.9  # yet its rows were not computed
    first = sum(count for _, count in found[:4])
    np.testing.assert_allclose(metrics["scored_share"], first / tokens, rtol=1e-5)
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["skipped"] == 0
    assert (state.step, state.skipped) == (1, 0)
    np.testing.assert_allclose(
        metrics["gradient_norm"], optax.tree.norm(state.opt_state), rtol=1e-5
    )

    # Means per token are over the tokens that were scored: on policy every ratio is 1.
    _, on_policy = update(new_state(RECORDER), sample(), rewards, config, RECORDER)
    np.testing.assert_allclose(on_policy["ratio"], 1.0, rtol=1e-4)
    assert on_policy["clip_fraction"] == 0

    live = np.asarray(sample().turns.live)
    np.testing.assert_allclose(
        metrics["advantage_std"], np.sqrt(np.square(advantages).sum() / live.sum()), rtol=1e-5
    )
    returns = np.asarray(rewards).sum(1) / np.asarray(num_questions())
    returns = np.broadcast_to(returns[:, None], live.shape)[live]
    values = np.asarray(sample().turns.values)[live]
    explained = 1 - np.var(returns - values) / np.var(returns)
    np.testing.assert_allclose(metrics["explained_variance"], explained, rtol=1e-4)


def test_truncated_importance_follows_its_formula():
    """The learner's own log-probs are the old ones, and a token counts by learner / sampler."""
    rewards, cap = draw_rewards(), 1.2
    config = PPOConfig(group_size=4, microbatch_rows=5, importance_cap=cap)
    state, metrics = update(new_state(RECORDER), off_policy(), rewards, config, RECORDER)

    turns = off_policy().turns
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), turns)
    real = np.arange(flat.response.shape[1])[None] < np.asarray(flat.response_lengths)[:, None]
    real &= np.asarray(flat.live)[:, None]
    # What the learner computes is what the sampler wrote before `off_policy` moved it.
    learner = np.asarray(sample().turns.log_probs, np.float64).reshape(real.shape)
    ratio = np.exp(learner - np.asarray(flat.log_probs, np.float64))
    weight = np.where(real, np.minimum(ratio, cap), 0.0)
    advantages = expected_advantages(rewards).reshape(-1)
    factor = jnp.asarray(weight * advantages[:, None] / real.sum(), jnp.float32)

    @jax.jit
    def gradient(params, flat, factor):
        def total(params):
            scores = tiny.score_rows(agent(), params, flat)
            return -jnp.where(factor != 0, factor * scores.log_probs, 0.0).sum()

        return jax.grad(total)(params)

    # With one step the PPO ratio is 1: the gradient is that of weighted log-probs.
    assert_close(state.opt_state, gradient(make_params(), flat, factor), rtol=5e-4)
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=1e-4)
    assert metrics["clip_fraction"] == 0
    expected = {
        "importance": weight.sum() / real.sum(),
        "importance_cut": (real & (ratio > cap)).sum() / real.sum(),
        "sampler_kl": np.where(real, ratio - 1 - np.log(ratio), 0.0).sum() / real.sum(),
        "log_prob_gap": np.abs(np.log(ratio))[real].max(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)
    assert 0.1 < metrics["importance_cut"] < 0.9
    shares = [value for name, value in metrics.items() if name.startswith("importance_share/")]
    np.testing.assert_allclose(sum(shares), 1.0, rtol=1e-5)

    # Where the two agree, nothing but rounding changes; and no metric of it without the cap.
    corrected, _ = update(new_state(RECORDER), sample(), rewards, config, RECORDER)
    off = PPOConfig(group_size=4, microbatch_rows=5)
    plain, metrics = update(new_state(RECORDER), sample(), rewards, off, RECORDER)
    assert_close(corrected.opt_state, plain.opt_state)
    assert not [name for name in metrics if "importance" in name or "sampler" in name]


def test_minibatches_use_every_trajectory_once_and_weigh_it_equally():
    rewards = draw_rewards(seed=1)
    config = PPOConfig(
        group_size=4, minibatches=2, weighting="trajectory_equal", microbatch_rows=512
    )
    state, metrics = update(new_state(RECORDER), off_policy(), rewards, config, RECORDER)
    assert (state.step, metrics["skipped"]) == (2, 0)
    # Each mini-batch of four: the mean over trajectories of the mean over their tokens.
    found = straightforward_gradients(off_policy(), expected_advantages(rewards))
    means = [jax.tree.map(lambda g, n=count: g / n, grads) for grads, count in found]
    assert_close(state.opt_state, tree_sum(means, 1 / 4))


GAE = PPOConfig(
    estimator="gae",
    group_size=1,
    microbatch_rows=7,
    gae_lambda=0.8,
    kl_coef=0.1,
    entropy_coef=0.01,
    value_coef=0.5,
)


def test_value_kl_and_entropy_terms_follow_their_formulas():
    rewards, reference = draw_rewards(), tiny.disturb(make_params(), 0.02, seed=5)
    state, metrics = update(
        new_state(RECORDER), sample(), rewards, GAE, RECORDER, reference=reference
    )
    advantages, returns = credit.turn_advantages(GAE, sample(), rewards, num_questions())
    turns = sample().turns

    @jax.jit
    def expected(params, turns, advantages, returns, reference):
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), turns)
        real = jnp.arange(flat.response.shape[1])[None] < flat.response_lengths[:, None]

        def score(params):
            return tiny.score_rows(agent(), params, flat)

        def mean(x):
            return jnp.where(real, x, 0.0).sum() / real.sum().astype(jnp.float32)

        def total(params):
            scores = score(params)
            ratio = jnp.exp(scores.log_probs - flat.log_probs)  # 1: no clip at work
            gap = scores.log_probs - score(reference).log_probs
            kl = mean(jnp.exp(-gap) - 1 + gap)
            error = jnp.square(scores.values - returns.reshape(-1))
            count = flat.live.sum().astype(jnp.float32)
            value = 0.5 * jnp.where(flat.live, error, 0.0).sum() / count
            surrogate = mean(ratio * advantages.reshape(-1)[:, None])
            entropy = mean(scores.entropy)
            return -surrogate + 0.5 * value + 0.1 * kl - 0.01 * entropy, (kl, value, entropy)

        return jax.grad(total, has_aux=True)(params)

    grads, (kl, value, entropy) = expected(make_params(), turns, advantages, returns, reference)
    assert_close(state.opt_state, grads, rtol=1e-3)
    assert metrics["scored_share"] == 1  # with these terms every row has a gradient
    assert kl > 1e-4
    np.testing.assert_allclose(metrics["reference_kl"], kl, rtol=1e-3)
    np.testing.assert_allclose(metrics["value_loss"], value, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    assert metrics["log_prob_gap"] < metrics["log_prob_bound"] < 1e-4

    same = jax.tree.map(jnp.copy, make_params())
    _, metrics = update(new_state(RECORDER), sample(), rewards, GAE, RECORDER, reference=same)
    assert abs(metrics["reference_kl"]) < 1e-6


def test_while_values_warm_up_the_policy_stays():
    """Weight decay included; and the head learns as it does beside the policy."""
    config = PPOConfig(estimator="gae", group_size=1, microbatch_rows=64, minibatches=2)
    adam = make_optimizer(learning_rate=0.01, weight_decay=0.1)
    state = new_state(adam)
    errors = []
    for _ in range(6):
        state, metrics = update(state, sample(), draw_rewards(), config, adam, warming=True)
        errors.append(float(metrics["value_loss"]))
    before, after = traverse_util.flatten_dict(make_params()), state.params
    for path, leaf in traverse_util.flatten_dict(after).items():
        same = np.array_equal(leaf, before[path])
        assert same == ("value_head" not in path), path
    assert errors[-1] < 0.8 * errors[0]
    state, _ = update(state, sample(), draw_rewards(), config, adam)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), state.params, make_params())
    assert all(jax.tree.leaves(moved))


def test_a_batch_without_contrast_moves_nothing():
    config = PPOConfig(group_size=4, minibatches=2, microbatch_rows=64)
    adam = make_optimizer(learning_rate=0.01)
    state, _ = update(new_state(adam), sample(), draw_rewards(), config, adam)
    before = jax.device_get(state)
    alike = jnp.ones_like(draw_rewards())
    alike = jnp.where(jnp.arange(alike.shape[1])[None] < num_questions()[:, None], alike, 0.0)
    state, metrics = update(state, sample(), alike, config, adam)
    assert (metrics["idle"], metrics["skipped"], metrics["scored_share"]) == (2, 0, 0)
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    # All but the schedule's count, which is no moment.
    for new, old in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(before.opt_state), strict=True
    ):
        if new.ndim:
            np.testing.assert_array_equal(new, old)


COSTS = PPOConfig(group_size=4, microbatch_rows=64, read_cost=0.1, create_cost=0.03)


def test_actions_cost_what_the_config_says():
    config = dataclasses.replace(COSTS, invalid_cost=0.5)
    turns = jax.device_get(sample().turns)
    found = np.asarray(credit.turn_costs(config, sample()))
    for b, t in np.ndindex(found.shape):
        expected = 0.0
        if turns.live[b, t]:
            report = jax.tree.map(lambda x, b=b, t=t: x[b, t], turns.report)
            expected += 0.1 * report.applied[ActionKind.READ]
            expected += 0.03 * report.applied[ActionKind.CREATE]
            expected += 0.5 * report.invalid.sum()
        np.testing.assert_allclose(found[b, t], expected, atol=1e-6)
    assert len(np.unique(found)) > 3
    assert credit.turn_costs(PPOConfig(), sample()) is None

    # A trajectory's reward is less by the sum; each return and each contrast follows.
    rewards = draw_rewards()
    plain, plain_returns = credit.turn_advantages(COSTS, sample(), rewards, num_questions())
    priced, returns = credit.turn_advantages(
        COSTS, sample(), rewards, num_questions(), jnp.asarray(found)
    )
    total = found.sum(axis=1)
    live = turns.live
    np.testing.assert_allclose(
        np.asarray(returns)[live], (np.asarray(plain_returns) - total[:, None])[live], atol=1e-6
    )
    contrast = total.reshape(2, 4) - total.reshape(2, 4).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
        np.asarray(priced)[live],
        (np.asarray(plain) - contrast.reshape(-1, 1))[live],
        atol=1e-6,
    )


def test_with_gae_a_turn_pays_for_what_it_does():
    config = PPOConfig(estimator="gae", group_size=1, gae_lambda=0.5)
    costs = jnp.asarray([[0, 0.2, 0, 0], [0, 0, 0, 0]], jnp.float32)
    question = jnp.asarray(TURNS[:2], jnp.int32)
    turns = sample().turns.replace(
        question=question,
        live=jnp.asarray(LIVE[:2], bool),
        values=jnp.zeros(question.shape, jnp.float32),
    )
    played = sample().replace(turns=turns)
    asked = jnp.asarray([2, 2], jnp.int32)
    rewards = jnp.zeros((2, 2), jnp.float32)
    advantages, _ = credit.turn_advantages(config, played, rewards, asked, costs)
    np.testing.assert_allclose(advantages, [[-0.1, -0.2, 0, 0], [0, 0, 0, 0]], atol=1e-6)


def test_a_reward_less_the_divergence_from_the_reference():
    reference = tiny.disturb(make_params(), 0.05, seed=5)
    config = PPOConfig(group_size=4, microbatch_rows=64, reward_kl_coef=0.2)
    rewards = draw_rewards()
    state, metrics = update(
        new_state(RECORDER), sample(), rewards, config, RECORDER, reference=reference
    )
    turns = sample().turns
    drift = np.zeros(turns.live.shape, np.float32)
    for b in range(ROWS):
        row = jax.tree.map(lambda x, b=b: x[b], turns)
        scores = tiny.score_rows(agent(), reference, row)
        real = np.arange(row.response.shape[1])[None] < np.asarray(row.response_lengths)[:, None]
        gap = np.where(real, np.asarray(row.log_probs) - np.asarray(scores.log_probs), 0.0)
        drift[b] = np.where(row.live, gap.sum(axis=1), 0.0)
    total = np.asarray(rewards).sum(axis=1) / np.asarray(num_questions())
    total -= 0.2 * drift.sum(axis=1)
    whole = (total.reshape(2, 4) - total.reshape(2, 4).mean(axis=1, keepdims=True)).reshape(-1, 1)
    advantages = np.where(turns.live, whole, 0.0).astype(np.float32)
    found = straightforward_gradients(sample(), advantages)
    tokens = sum(count for _, count in found)
    assert_close(state.opt_state, tree_sum([g for g, _ in found], 1 / tokens), rtol=1e-3)
    np.testing.assert_allclose(metrics["cost"], 0.2 * drift.sum(axis=1).mean(), rtol=1e-3)


def test_turns_that_the_budget_ended_are_not_learned_from():
    eos, limit = agent().grammar.eos_id, sample().turns.response.shape[2]
    turns = sample().turns
    text = int(np.flatnonzero(np.asarray(agent().template.is_text))[0])
    cut = np.zeros(turns.live.shape, bool)
    cut[1, 0] = cut[6, 2] = True
    whole = np.zeros_like(cut)
    whole[3, 1] = True  # as long as the budget, and ended by itself
    response = np.array(turns.response)
    response[cut | whole] = text
    response[whole, -1] = eos
    lengths = np.where(cut | whole, limit, turns.response_lengths).astype(np.int32)
    changed = turns.replace(
        response=jnp.asarray(response),
        response_lengths=jnp.asarray(lengths),
        live=turns.live | jnp.asarray(cut | whole),
    )
    found = trainer._leave_out_cut(sample().replace(turns=changed), eos)
    np.testing.assert_array_equal(found.turns.scripted, np.asarray(turns.scripted) | cut)
    batch = trainer.make_batch(found)
    size = turns.live.shape[1]
    assert not batch.weights.reshape(ROWS, size, -1)[cut].any()
    assert batch.weights.reshape(ROWS, size, -1)[whole].all()


def test_a_rollout_that_does_not_divide_is_refused():
    for config in (PPOConfig(group_size=3), PPOConfig(group_size=4, minibatches=5)):
        with pytest.raises(ValueError, match=r"ppo\.minibatches=\d and ppo\.group_size=\d"):
            update(new_state(RECORDER), sample(), draw_rewards(), config, RECORDER)


# ---------------------------------------------------------------------------------------------
# Credit


def credit_turns(config, rewards, questions, question, live, values=None):
    """Runs turn_advantages on literal turns; `question` and `live` are [B T]."""
    question = jnp.asarray(question, jnp.int32)
    turns = sample().turns.replace(
        question=question,
        live=jnp.asarray(live, bool),
        values=jnp.zeros(question.shape) if values is None else jnp.asarray(values, jnp.float32),
    )
    found = credit.turn_advantages(
        config,
        sample().replace(turns=turns),
        jnp.asarray(rewards, jnp.float32),
        jnp.asarray(questions, jnp.int32),
    )
    return [np.asarray(x) for x in found]


# Two groups of two. Two questions, then one; the second trajectory has a turn less.
REWARDS, ASKED = [[1, 0], [0, 0], [1, 0], [1, 0]], [2, 2, 1, 1]
TURNS = [[EMPTY, 0, 0, 1], [EMPTY, 0, 1, EMPTY], [EMPTY, EMPTY, 0, 0], [EMPTY, 0, 0, 0]]
LIVE = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("changes", "first", "second"),
    [
        ({}, [0.25] * 4, [-0.25, -0.25, -0.25, 0]),
        ({"leave_one_out": True}, [0.5] * 4, [-0.5, -0.5, -0.5, 0]),
        ({"divide_by_std": True}, [0.70691] * 4, [-0.70691] * 3 + [0]),
        ({"credit": "question"}, [0.25, 0.5, 0.5, 0], [-0.25, -0.5, 0, 0]),
    ],
)
def test_group_advantages_reach_their_turns(changes, first, second):
    config = PPOConfig(group_size=2, **changes)
    advantages, returns = credit_turns(config, REWARDS, ASKED, TURNS, LIVE)
    expected = [first, second, [0] * 4, [0] * 4]
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, [[0.5] * 4, [0] * 4, [1] * 4, [1, 1, 0, 0]], atol=1e-6)


def test_gae_pays_each_question_at_the_turn_that_ends_it():
    config = PPOConfig(estimator="gae", group_size=1, gae_lambda=0.5)
    values = [[0.2, 0.4, 0.1, 0.3], [0, 0, 0, 9.0]]
    advantages, returns = credit_turns(
        config, [[1, 0], [0, 1]], [2, 2], TURNS[:2], LIVE[:2], values
    )
    # Errors .2, -.3, .7 (the read question 0 ends at turn 2 and pays .5), -.3, from the back.
    np.testing.assert_allclose(advantages[0], [0.1875, -0.025, 0.55, -0.3], atol=1e-6)
    np.testing.assert_allclose(returns[0], [0.3875, 0.375, 0.65, 0.0], atol=1e-6)
    # Question 1 pays .5 at turn 2; what a dead turn holds is ignored.
    np.testing.assert_allclose(advantages[1], [0.125, 0.25, 0.5, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            OptimizerConfig(name="sgd"),
            r"optimizer\.name='sgd': allowed are 'adamw', 'muon', 'adafactor'",
        ),
        (OptimizerConfig(schedule="linear"), r"optimizer\.schedule='linear'"),
        (OptimizerConfig(learning_rate=0.0), r"optimizer\.learning_rate=0\.0"),
        (PPOConfig(estimator="grpo"), r"ppo\.estimator='grpo': allowed are"),
        (PPOConfig(kl_kind="k4"), r"ppo\.kl_kind='k4'"),
        (
            PPOConfig(kl_kind="k1", kl_coef=0.1),
            r"ppo\.kl_kind='k1': allowed with ppo\.kl_coef=0\.1 are .* or take .*reward_kl_coef",
        ),
        (PPOConfig(minibatches=0), r"ppo\.minibatches=0: allowed is at least 1"),
        (PPOConfig(group_size=1), r"needs ppo\.group_size of at least 2"),
        (
            PPOConfig(length_buckets=(2, 5)),
            r"ppo\.length_buckets=\(2, 5\): allowed .* 8 among them",
        ),
    ],
)
def test_validate_names_the_field(config, message):
    type(config)().validate()
    with pytest.raises(ValueError, match=message):
        config.validate()
