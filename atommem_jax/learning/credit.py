"""What each turn gets of its trajectory's reward: its costs, its advantage and its return.

`advantage` has the estimators, for one group or trajectory; here they are given what a batch of
trajectories holds. Sums go over all devices, inside `program.fsdp_parallel`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from atommem_jax.config import PPOConfig
from atommem_jax.learning import advantage, loss
from atommem_jax.parallel import program
from atommem_jax.types import EMPTY, ActionKind, Trajectory


def turn_advantages(
    config: PPOConfig,
    trajectories: Trajectory,
    rewards: Float[Array, "B Q"],
    num_questions: Int[Array, " B"],
    costs: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantage and return of every turn.

    rewards: score of each question, 0 past `num_questions`. A trajectory's reward is their mean
    (paper, section 4). With estimator 'group' the advantage is relative to the trajectories of
    the same episode; with credit 'question' answering turns take that of their own question.
    With 'gae' a question's share of the reward arrives with the turn that ends it.

    costs: of each turn, see `turn_costs`; taken from the trajectory's reward, with 'gae' where they
      are made.
    """
    chex.assert_rank([rewards, num_questions], [2, 1])
    turns = trajectories.turns
    share = rewards / jnp.maximum(num_questions, 1)[:, None].astype(jnp.float32)
    at = jnp.maximum(turns.question, 0)
    is_question = turns.live & (turns.question != EMPTY)
    if config.estimator == "gae":
        following = jnp.concatenate(
            [turns.question[:, 1:], jnp.full_like(turns.question[:, :1], EMPTY)], axis=1
        )
        alive_next = jnp.concatenate([turns.live[:, 1:], jnp.zeros_like(turns.live[:, :1])], axis=1)
        ends = is_question & ((following != turns.question) | ~alive_next)
        paid = jnp.where(ends, jnp.take_along_axis(share, at, axis=1), 0.0)
        paid = paid if costs is None else paid - costs
        gae = functools.partial(
            advantage.turn_level_gae, discount=config.discount, gae_lambda=config.gae_lambda
        )
        return jax.vmap(gae)(paid, turns.values, turns.live)
    relative = functools.partial(
        advantage.group_relative,
        divide_by_std=config.divide_by_std,
        leave_one_out=config.leave_one_out,
    )
    groups = rewards.shape[0] // config.group_size
    total = share.sum(axis=1)
    total = total if costs is None else total - costs.sum(axis=1)
    whole = relative(total.reshape(groups, config.group_size)).reshape(-1)
    result = jnp.broadcast_to(whole[:, None], turns.live.shape)
    if config.credit == "question":
        own = relative(rewards.reshape(groups, config.group_size, -1)).reshape(rewards.shape)
        result = jnp.where(is_question, jnp.take_along_axis(own, at, axis=1), result)
    returns = jnp.broadcast_to(total[:, None], turns.live.shape)
    return jnp.where(turns.live, result, 0.0), jnp.where(turns.live, returns, 0.0)


def turn_costs(config: PPOConfig, trajectories: Trajectory) -> Float[Array, "B T"] | None:
    """What the actions of each turn cost; None where nothing does."""
    if not (config.read_cost or config.create_cost or config.invalid_cost):
        return None
    report = trajectories.turns.report
    read, create = (report.applied[..., kind] for kind in (ActionKind.READ, ActionKind.CREATE))
    costs = config.read_cost * read.astype(jnp.float32)
    costs += config.create_cost * create.astype(jnp.float32)
    costs += config.invalid_cost * report.invalid.sum(axis=-1).astype(jnp.float32)
    return jnp.where(trajectories.turns.live, costs, 0.0)


def mean_cost(costs: Float[Array, "B T"] | None, live: Bool[Array, "B T"]) -> Float[Array, ""]:
    """What a trajectory's turns cost, on average."""
    if costs is None:
        return jnp.zeros((), jnp.float32)
    total, count = program.psum((costs.sum(), jnp.asarray(live.shape[0], jnp.float32)))
    return total / count


def masked_deviation(x: Float[Array, "B T"], live: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Root of the mean square over the live turns of all devices."""
    weights = live.astype(jnp.float32)
    count, square = program.psum((weights.sum(), loss.masked_sum(jnp.square(x), weights)))
    return jnp.sqrt(square / jnp.maximum(count, 1.0))


def explained_variance(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], live: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """1 - Var[returns - values] / Var[returns] over the live turns of all devices.

    0 where returns do not vary.
    """
    weights = live.astype(jnp.float32)
    count = jnp.maximum(program.psum(weights.sum()), 1.0)

    def variance(x):
        mean = program.psum(loss.masked_sum(x, weights)) / count
        return program.psum(loss.masked_sum(jnp.square(x - mean), weights)) / count

    total = variance(returns)
    left = variance(returns - values)
    return jnp.where(total > 0, 1.0 - left / jnp.maximum(total, 1e-12), 0.0)
