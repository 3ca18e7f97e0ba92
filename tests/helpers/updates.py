"""One small batch of trajectories, and what the tests of updates do with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atommem_jax.config import OptimizerConfig
from atommem_jax.learning import optimizer as optimizer_lib
from atommem_jax.learning import trainer
from atommem_jax.parallel import host_batches, mesh
from tests.helpers import tiny

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
    return host_batches.replicate(state, mesh.single())  # where a step leaves it


def update(state, trajectories, rewards, config, optimizer, reference=None, seed=0, warming=False):
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
        warming=warming,
    )


def assert_close(ours, theirs, rtol=2e-4, atol=1e-6):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        size = float(np.abs(b).max())
        np.testing.assert_allclose(
            a, b, atol=rtol * size + atol, rtol=0, err_msg=jax.tree_util.keystr(path)
        )


@functools.cache
def off_policy():
    """The sample with other behaviour log-probs, so that every clip is at work."""
    played = sample()
    noise = np.random.default_rng(2).normal(0.0, 0.5, played.turns.log_probs.shape)
    shifted = jnp.where(
        played.turns.log_probs != 0, played.turns.log_probs + noise.astype(np.float32), 0.0
    )
    return played.replace(turns=played.turns.replace(log_probs=shifted))
