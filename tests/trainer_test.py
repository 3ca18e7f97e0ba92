"""Gradients against a plain computation over all rows, credit in literal numbers, and learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atommem_jax import optimizer as optimizer_lib
from atommem_jax import rollout, sampling, sharding, trainer
from atommem_jax.optimizer import OptimizerConfig
from atommem_jax.tasks import teacher
from atommem_jax.trainer import PPOConfig
from atommem_jax.types import EMPTY, ActionKind, Phase
from tests import tiny

ROWS = 8
ONE = jnp.float32(1.0)


def agent():
    return tiny.make_parts().agent


@functools.cache
def make_params():
    return tiny.make_params(scale=0.1)


@functools.cache
def sample():
    """Two groups of four trajectories; the value of a turn is noise."""
    episodes, _ = tiny.make_episodes([0] * 4 + [1] * 4)
    played = tiny.play(make_params(), episodes, np.arange(ROWS), seed=0)
    values = np.random.default_rng(0).normal(size=played.turns.values.shape)
    values = np.where(played.turns.live, values, 0.0).astype(np.float32)
    return played.replace(turns=played.turns.replace(values=jnp.asarray(values)))


@functools.cache
def num_questions():
    return jnp.asarray(tiny.make_episodes([0] * 4 + [1] * 4)[0].num_questions)


def draw_rewards(seed=0):
    """0 or 1 for each question; the second group is alike in everything."""
    rewards = np.random.default_rng(seed).integers(0, 2, (ROWS, 2)).astype(np.float32)
    rewards[:2, 0] = 0, 1  # the first group is not
    rewards[4:] = 1
    return jnp.asarray(np.where(np.arange(2) < np.asarray(num_questions())[:, None], rewards, 0.0))


def _record(grads, total, params):
    del params
    return jax.tree.map(jnp.zeros_like, grads), jax.tree.map(jnp.add, total, grads)


# Leaves the parameters where they are; its state is the sum of the gradients it was given.
RECORDER = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params), update=_record
)


def relax(optimizer):
    """Optax mixes types and ranks; what calls it must not."""

    def update(grads, state, params):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update(grads, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def make_optimizer(total_steps=1, **config):
    return relax(optimizer_lib.make_optimizer(OptimizerConfig(**config), total_steps))


def new_state(optimizer, params=None):
    params = make_params() if params is None else params
    # Steps donate their state, and the parameters of these tests are shared.
    state = optimizer_lib.create_state(jax.tree.map(jnp.copy, params), optimizer)
    return sharding.replicate(state, sharding.single())  # where a step leaves it


def update(state, trajectories, rewards, config, optimizer, reference=None, seed=0):
    return trainer.update_step(
        agent(),
        state,
        trajectories,
        rewards,
        num_questions(),
        jax.random.key(seed),
        ONE,
        reference,
        optimizer=optimizer,
        config=config,
    )


def assert_close(ours, theirs, rtol=2e-4, atol=1e-6):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        size = float(np.abs(b).max())
        np.testing.assert_allclose(
            a, b, atol=rtol * size + atol, rtol=0, err_msg=jax.tree_util.keystr(path)
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
    functools.partial(trainer.accumulate_gradients, quadratic_loss), static_argnames="rows"
)


@functools.cache
def make_table():
    vocab = agent().model.config.vocab_size
    return jnp.asarray(np.random.default_rng(1).normal(size=vocab), jnp.float32)


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


@pytest.mark.parametrize(
    ("full", "multiple", "eighths", "expected"),
    [
        (85, 1, (5, 8), [54, 85]),
        (85, 1, (8,), [85]),
        (15_103, 128, (4, 5, 8), [7_552, 9_472, 15_104]),
        (3, 1, (1, 2, 8), [1, 3]),
    ],
)
def test_widths_are_eighths_rounded_up(full, multiple, eighths, expected):
    assert trainer.list_widths(full, multiple, eighths) == expected


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
            scores = sampling.score(
                agent(),
                params,
                turns.prompt,
                turns.prompt_lengths,
                turns.response,
                turns.response_lengths,
                turns.phase,
                ONE,
            )
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


@functools.cache
def off_policy():
    """The sample with other behaviour log-probs, so that every clip is at work."""
    played = sample()
    noise = np.random.default_rng(2).normal(0.0, 0.5, played.turns.log_probs.shape)
    shifted = jnp.where(
        played.turns.log_probs != 0, played.turns.log_probs + noise.astype(np.float32), 0.0
    )
    return played.replace(turns=played.turns.replace(log_probs=shifted))


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
    advantages, returns = trainer.turn_advantages(GAE, sample(), rewards, num_questions())
    turns = sample().turns

    @jax.jit
    def expected(params, turns, advantages, returns, reference):
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), turns)
        real = jnp.arange(flat.response.shape[1])[None] < flat.response_lengths[:, None]

        def score(params):
            return sampling.score(
                agent(),
                params,
                flat.prompt,
                flat.prompt_lengths,
                flat.response,
                flat.response_lengths,
                flat.phase,
                ONE,
            )

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
    assert metrics["log_prob_gap"] < 1e-5

    same = jax.tree.map(jnp.copy, make_params())
    _, metrics = update(new_state(RECORDER), sample(), rewards, GAE, RECORDER, reference=same)
    assert abs(metrics["reference_kl"]) < 1e-6


def test_a_rollout_that_does_not_divide_is_refused():
    for config in (PPOConfig(group_size=3), PPOConfig(group_size=4, minibatches=5)):
        with pytest.raises(ValueError, match=r"ppo\.minibatches=\d and ppo\.group_size=\d"):
            update(new_state(RECORDER), sample(), draw_rewards(), config, RECORDER)


# ---------------------------------------------------------------------------------------------
# Credit


def credit(config, rewards, questions, question, live, values=None):
    """Runs turn_advantages on literal turns; `question` and `live` are [B T]."""
    question = jnp.asarray(question, jnp.int32)
    turns = sample().turns.replace(
        question=question,
        live=jnp.asarray(live, bool),
        values=jnp.zeros(question.shape) if values is None else jnp.asarray(values, jnp.float32),
    )
    found = trainer.turn_advantages(
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
    advantages, returns = credit(config, REWARDS, ASKED, TURNS, LIVE)
    expected = [first, second, [0] * 4, [0] * 4]
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, [[0.5] * 4, [0] * 4, [1] * 4, [1, 1, 0, 0]], atol=1e-6)


def test_gae_pays_each_question_at_the_turn_that_ends_it():
    config = PPOConfig(estimator="gae", group_size=1, gae_lambda=0.5)
    values = [[0.2, 0.4, 0.1, 0.3], [0, 0, 0, 9.0]]
    advantages, returns = credit(config, [[1, 0], [0, 1]], [2, 2], TURNS[:2], LIVE[:2], values)
    # Errors .2, -.3, .7 (the read question 0 ends at turn 2 and pays .5), -.3, from the back.
    np.testing.assert_allclose(advantages[0], [0.1875, -0.025, 0.55, -0.3], atol=1e-6)
    np.testing.assert_allclose(returns[0], [0.3875, 0.375, 0.65, 0.0], atol=1e-6)
    # Question 1 pays .5 at turn 2; what a dead turn holds is ignored.
    np.testing.assert_allclose(advantages[1], [0.125, 0.25, 0.5, 0], atol=1e-6)


# ---------------------------------------------------------------------------------------------
# Optimisers


def updates_of(optimizer, params, grads, steps):
    state, found = optimizer.init(params), []
    step = jax.jit(optimizer.update)
    for _ in range(steps):
        change, state = step(grads, state, params)
        found.append(change)
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.025, 0.05, 0.075, *[0.1] * 9]),
        (
            "cosine",
            [0, 0.025, 0.05, 0.075] + [0.05 * (1 + np.cos(np.pi * k / 8)) for k in range(9)],
        ),
    ],
)
def test_schedules_warm_up_and_end(schedule, expected):
    optimizer = make_optimizer(12, learning_rate=0.1, schedule=schedule, warmup_steps=4)
    params = {"w": jnp.ones((2, 2), jnp.float32)}
    # With a constant gradient Adam moves by exactly the learning rate.
    found = updates_of(optimizer, params, params, steps=13)
    np.testing.assert_allclose([-u["w"][0, 0] for u in found], expected, atol=1e-5)


def test_muon_turns_each_layer_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    params = {
        "layers": {"query": {"kernel": jnp.zeros((2, 6, 4))}, "norm": {"scale": jnp.ones((2, 6))}},
        "embedder": {"embedding": jnp.zeros((5, 6))},
    }
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    optimizer = make_optimizer(
        name="muon", learning_rate=0.1, adam_learning_rate=0.01, clip_norm=1e9
    )
    [found] = updates_of(optimizer, params, grads, steps=1)
    for path in (("layers", "norm", "scale"), ("embedder", "embedding")):
        ours, theirs = found, grads
        for name in path:
            ours, theirs = ours[name], theirs[name]
        # Its first step, Nesterov momentum included, has one size for all entries.
        np.testing.assert_allclose(np.abs(ours), np.abs(ours).max(), rtol=1e-4)
        np.testing.assert_array_equal(np.sign(ours), -np.sign(theirs))
        assert 0.01 <= np.abs(ours).max() < 0.02
    for layer in range(2):
        change = np.asarray(found["layers"]["query"]["kernel"][layer])
        singular = np.linalg.svd(change, compute_uv=False)
        assert singular.max() / singular.min() < 2.5, "not orthogonalised"
        assert (change * np.asarray(grads["layers"]["query"]["kernel"][layer])).sum() < 0


def test_large_gradients_are_clipped():
    # One step of plain momentum-free Adam hides the scale: compare first moments instead.
    optimizer = make_optimizer(clip_norm=1.0, b1=0.0)
    params = {"w": jnp.zeros((2,))}
    _, state = optimizer.update({"w": jnp.asarray([30.0, 40.0])}, optimizer.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,)]
    np.testing.assert_allclose(moments[0], [0.6, 0.8], rtol=1e-5)


def test_gradients_that_are_not_finite_change_nothing_and_are_counted():
    params = {"w": jnp.asarray([1.0, 2.0])}
    optimizer = make_optimizer()
    state = optimizer_lib.create_state(params, optimizer)
    bad = {"w": jnp.asarray([1.0, jnp.nan])}
    good = {"w": jnp.asarray([1.0, -1.0])}
    for step, in_a_row in [(1, 1), (2, 2)]:
        state, metrics = optimizer_lib.apply_gradients(state, bad, optimizer)
        assert (state.step, state.skipped, state.skipped_in_a_row) == (step, step, in_a_row)
        assert metrics["skipped"] == 1
        np.testing.assert_array_equal(state.params["w"], params["w"])
    fresh = optimizer.init(params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh)
    state, metrics = optimizer_lib.apply_gradients(state, good, optimizer)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (3, 2, 0)
    np.testing.assert_allclose(metrics["gradient_norm"], np.sqrt(2), rtol=1e-6)
    assert (np.sign(state.params["w"] - params["w"]) == [-1, 1]).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(name="sgd"), r"optimizer\.name='sgd': allowed are adamw, muon, adafactor"),
        (OptimizerConfig(schedule="linear"), r"optimizer\.schedule='linear'"),
        (OptimizerConfig(learning_rate=0.0), r"optimizer\.learning_rate=0\.0"),
        (PPOConfig(estimator="grpo"), r"ppo\.estimator='grpo': allowed are"),
        (PPOConfig(kl_kind="k4"), r"ppo\.kl_kind='k4'"),
        (PPOConfig(minibatches=0), r"ppo\.minibatches=0: must be at least 1"),
        (PPOConfig(group_size=1), r"needs ppo\.group_size of at least 2"),
        (PPOConfig(eighths=(2, 5)), r"ppo\.eighths=\(2, 5\): allowed .* 8 among them"),
    ],
)
def test_validate_names_the_field(config, message):
    type(config)().validate()
    with pytest.raises(ValueError, match=message):
        config.validate()


# ---------------------------------------------------------------------------------------------
# Learning


@jax.jit
def teach(setting, episodes, ids):
    policy = teacher.policy(teacher.TeacherConfig(), tiny.make_parts().script)
    return rollout.run(setting, policy, episodes, ids, jax.random.key(0))


MUON = make_optimizer(name="muon", learning_rate=0.02, adam_learning_rate=0.01)


def lesson(indices):
    episodes, _ = tiny.make_episodes(indices)
    ids = np.arange(len(indices), dtype=np.int32)
    return teach(tiny.make_parts().setting(tiny.make_shape()), episodes, ids)


def test_sft_overfits_one_batch_of_a_deterministic_teacher_without_recompiling():
    taught = lesson([0, 1])
    state = new_state(MUON, tiny.make_params())
    keep = np.ones(2, bool)
    losses = []
    for step in range(110):
        state, metrics = trainer.sft_step(agent(), state, taught, keep, optimizer=MUON, rows=32)
        losses.append(float(metrics["loss"]))
        if step == 0:
            tokens = np.where(taught.turns.live, taught.turns.response_lengths, 0).sum()
            assert int(metrics["tokens"]) == tokens
            assert metrics["kept"] == 1
    assert losses[0] > 0.5
    assert losses[-1] < 0.02  # the clean teacher never draws: the floor is 0
    # Other episodes, and one of them not kept: the same program.
    other, keep = lesson([2, 3]), np.array([True, False])
    warm = tiny.count_compilations()
    state, metrics = trainer.sft_step(agent(), state, other, keep, optimizer=MUON, rows=32)
    assert tiny.count_compilations() == warm
    assert float(metrics["kept"]) == 0.5
    assert np.isfinite(metrics["loss"])


def test_sft_learns_nothing_from_what_is_not_kept():
    taught = lesson([0, 1])
    state = new_state(MUON, tiny.make_params())
    state, metrics = trainer.sft_step(
        agent(), state, taught, np.zeros(2, bool), optimizer=MUON, rows=32
    )
    assert metrics["tokens"] == 0
    assert metrics["gradient_norm"] == 0
    assert_close(state.params, tiny.make_params(), rtol=0, atol=0)


ADAM = make_optimizer(learning_rate=0.01)
BANDIT = PPOConfig(
    group_size=4, minibatches=2, microbatch_rows=32, divide_by_std=True, entropy_coef=0.0
)


def pull(played):
    """Share of the reading turns that begin with a note: a bandit with one arm per action."""
    turns = played.turns
    reading = turns.live & (turns.phase == Phase.READING)
    noted = reading & (turns.actions.kind[..., 0] == ActionKind.SCRATCHPAD)
    share = noted.sum(axis=1).astype(jnp.float32) / reading.sum(axis=1).astype(jnp.float32)
    put = jnp.arange(2)[None] < num_questions()[:, None]
    return jnp.where(put, share[:, None], 0.0)


def test_ppo_raises_a_reward_it_can_reach_without_recompiling():
    episodes, _ = tiny.make_episodes([0] * 4 + [1] * 4)
    state = new_state(ADAM, tiny.make_params())
    means, warm = [], None
    for step in range(20):
        played = tiny.play(state.params, episodes, ROWS * step + np.arange(ROWS), seed=1)
        rewards = pull(played)
        means.append(float(rewards[:, 0].mean()))
        state, metrics = update(state, played, rewards, BANDIT, ADAM, seed=step)
        assert metrics["log_prob_gap"] < 1e-5
        assert metrics["skipped"] == 0
        if step == 1:
            warm = tiny.count_compilations()
    assert tiny.count_compilations() == warm
    assert np.mean(means[:3]) < 0.5
    assert np.mean(means[-3:]) > 0.9
    assert state.step == 40


def test_a_reward_that_is_no_number_skips_the_step():
    state = new_state(ADAM)
    rewards = draw_rewards().at[0, 0].set(jnp.nan)
    state, metrics = update(state, sample(), rewards, BANDIT, ADAM)
    assert int(metrics["skipped"]) == int(state.skipped) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    if state.skipped == 2:
        assert_close(state.params, make_params(), rtol=0, atol=0)


def test_the_gap_between_sampler_and_learner_is_seen():
    _, metrics = update(new_state(ADAM), off_policy(), draw_rewards(), BANDIT, ADAM)
    gap = np.abs(off_policy().turns.log_probs - sample().turns.log_probs)
    assert 0.5 < metrics["log_prob_gap"] <= gap.max() + 1e-5
