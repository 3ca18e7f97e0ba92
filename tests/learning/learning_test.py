"""SFT and PPO learn what they can, and compile once."""

import jax
import jax.numpy as jnp
import numpy as np

from atommem_jax.config import PPOConfig
from atommem_jax.learning import rollout, trainer
from atommem_jax.tasks import teacher
from atommem_jax.types import ActionKind, Phase
from tests.helpers import tiny
from tests.helpers.updates import (
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
        assert metrics["log_prob_gap"] < metrics["log_prob_bound"] < 1e-4
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
    assert metrics["log_prob_gap"] > metrics["log_prob_bound"]
