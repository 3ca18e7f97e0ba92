"""How much better than expected: advantages from the rewards of finished trajectories."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def group_relative(
    rewards: Float[Array, "G n *rest"],
    *,
    divide_by_std: bool,
    leave_one_out: bool = False,
    epsilon: float = 1e-4,
) -> Float[Array, "G n *rest"]:
    """Rewards against the mean of the n trajectories of the same task (axis 1).

    | method | divide_by_std | leave_one_out |
    |---|---|---|
    | GRPO (Shao et al. 2024) | True | False |
    | Dr. GRPO (Liu et al. 2025), the choice of AtomMem section 4 | False | False |
    | RLOO (Ahmadian et al. 2024): the mean of the others | False | True |

    The deviation is that of a sample (n - 1), as in common GRPO code, plus `epsilon`. A group of
    equal rewards has advantages of exactly zero, whatever the rounding of its mean.

    Raises:
      ValueError: leave_one_out with groups of one.
    """
    chex.assert_type(rewards, jnp.floating)
    if rewards.ndim < 2:
        raise ValueError(
            f"rewards.shape={rewards.shape}: must be [groups, trajectories, ...]; reshape first"
        )
    size = rewards.shape[1]
    if leave_one_out and size < 2:
        raise ValueError(
            f"leave_one_out=True with group size {size}: must be at least 2; "
            "raise the group size or set leave_one_out=False"
        )
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    alike = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    advantages = jnp.where(alike, 0.0, advantages)
    deviation = jnp.sqrt(jnp.square(advantages).sum(axis=1, keepdims=True) / max(size - 1, 1))
    if leave_one_out:
        advantages = advantages * (size / (size - 1))
    if divide_by_std:
        advantages = advantages / (deviation + epsilon)
    return advantages


def turn_level_gae(
    rewards: Float[Array, " T"],
    values: Float[Array, " T"],
    live: Bool[Array, " T"],
    *,
    discount: float,
    gae_lambda: float,
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Generalised advantage estimation (Schulman et al. 2016) with a turn as the time step.

    Args:
      rewards: received at the end of each turn.
      values: of the state in which each turn starts.
      live: the turn took place; dead turns are a suffix, and what the other arguments hold there
        (NaN included) is not looked at. A trajectory ends after its last live turn.
      discount: per turn, 0..1.
      gae_lambda: 0 trusts the values, 1 the rewards.

    Returns:
      Advantages, and returns (advantages + values) as targets for the values; 0 in dead turns.
    """
    chex.assert_rank([rewards, values, live], 1)
    chex.assert_equal_shape([rewards, values, live])
    rewards = jnp.where(live, rewards, 0.0)
    values = jnp.where(live, values, 0.0)  # so the value after the last live turn is zero
    values_next = jnp.append(values[1:], jnp.zeros((1,), values.dtype))
    errors = rewards + discount * values_next - values

    def accumulate(
        advantage_next: Float[Array, ""], error: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        advantage = error + discount * gae_lambda * advantage_next
        return advantage, advantage

    _, advantages = jax.lax.scan(accumulate, jnp.zeros((), errors.dtype), errors, reverse=True)
    return advantages, advantages + values
