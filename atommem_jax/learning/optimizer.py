"""The optimiser: an Optax chain from a config, and the state that a training step changes.

A gradient that is not finite leaves parameters and moments as they were and is counted; the
schedule goes on, as the count of steps does.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from atommem_jax.config import OptimizerConfig

Metrics = dict[str, Float[Array, ""]]
PyTree = Any


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: Int[Array, ""]  # optimiser steps asked for, skipped ones included
    params: PyTree
    opt_state: PyTree
    skipped: Int[Array, ""]  # steps not taken because the gradient was not finite
    skipped_in_a_row: Int[Array, ""]


def _matrices(params: PyTree) -> PyTree:
    """Muon's view: stacked layer kernels are matrices per layer; the rest is AdamW's."""

    def spec(path, leaf):
        stacked = leaf.ndim == 3 and any(getattr(k, "key", None) == "layers" for k in path)
        numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return numbers if stacked else None

    return jax.tree_util.tree_map_with_path(spec, params)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The chain that `config` describes; `total_steps` is where a cosine schedule ends."""
    config.validate()

    def schedule(peak: float):
        warm = config.warmup_steps
        if config.schedule == "cosine":
            after = optax.cosine_decay_schedule(peak, max(total_steps - warm, 1))
        else:
            after = optax.constant_schedule(peak)
        if not warm:
            return after
        # The first step has a rate too: with one step a rollout, a rate of 0 would waste a rollout.
        rise = optax.linear_schedule(peak / (warm + 1), peak, warm)
        return optax.join_schedules([rise, after], [warm])

    rate = schedule(config.learning_rate)
    if config.name == "muon":
        inner = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=schedule(config.adam_learning_rate or config.learning_rate),
            muon_weight_dimension_numbers=_matrices,
        )
    elif config.name == "adafactor":
        inner = optax.adafactor(
            rate,
            multiply_by_parameter_scale=False,
            clipping_threshold=None,
            weight_decay_rate=config.weight_decay or None,
        )
    else:
        inner = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mu_dtype=None if config.moment_dtype == "float32" else config.moment_dtype,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), inner)


def create_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0."""
    # One buffer for each counter: a buffer cannot be donated twice.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


@jax.named_scope("optimizer")
def apply_gradients(
    state: TrainState,
    grads: PyTree,
    optimizer: optax.GradientTransformation,
    wanted: Bool[Array, ""] | bool = True,
) -> tuple[TrainState, Metrics]:
    """One optimiser step, or none where a gradient is not finite or none is `wanted`.

    A step that is not wanted has nothing to learn from: moments of steps before would move the
    parameters all the same.

    `optax.apply_if_finite` gives in after a set number of such gradients and applies one, takes a
    gradient whose norm overflows for a finite one, and keeps its counts within `opt_state`, where
    checkpoints from before would not have them: hence not that.
    """
    norm = optax.tree.norm(grads)
    sound = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    taken = sound & wanted

    def keep(new, old):
        def choose(n, o):
            is_schedule = isinstance(n, optax.ScaleByScheduleState)
            return n if is_schedule else jnp.where(taken, n, o)

        return jax.tree.map(
            choose, new, old, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
        )

    missed = (~sound).astype(jnp.int32)
    state = state.replace(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + missed,
        skipped_in_a_row=jnp.where(sound, 0, state.skipped_in_a_row + 1),
    )
    return state, {
        "gradient_norm": norm,
        "skipped": missed.astype(jnp.float32),
        "idle": (sound & ~jnp.asarray(wanted)).astype(jnp.float32),
    }
