"""From trajectories to better parameters: one SFT step, one PPO update, each jitted once.

The trainer knows `Trajectory` and `Batch`, not how they were made. `make_batch` turns finished
trajectories and their rewards into rows, one a turn. `update_step` shuffles *trajectories* into
mini-batches and takes an optimiser step on each; `sft_step` takes one step on all its rows.

Rows are packed into micro-batches (`microbatches`). Turns that never took place, and with a pure
policy-gradient loss those of groups whose advantages are all zero, cost nothing; no row is ever
dropped, and the denominators count every generated token, packed or not. So the result equals that
of the unpacked batch.

With adapters (`lora`) the train state holds the trainable part alone, and the frozen one is passed
beside it: only the first is differentiated.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from atommem_jax.config import LENGTH_BUCKETS, PPOConfig
from atommem_jax.learning import gate, loss, microbatches
from atommem_jax.learning.credit import (
    explained_variance,
    masked_deviation,
    mean_cost,
    turn_advantages,
    turn_costs,
)
from atommem_jax.learning.microbatches import Metrics, PyTree
from atommem_jax.learning.optimizer import TrainState, apply_gradients
from atommem_jax.model import attention, lora, scoring
from atommem_jax.model.sampling import Agent
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import program, rules
from atommem_jax.types import Batch, Trajectory

# Metrics of `loss.ppo_loss` that are means over the tokens scored.
_PER_TOKEN = (
    "ratio",
    "ratio_square",
    "clip_fraction",
    "dual_clip_fraction",
    "approx_kl",
    "entropy",
)


def _response_mask(batch: Batch) -> Bool[Array, "M R"]:
    return jnp.arange(batch.response.shape[1])[None, :] < batch.response_lengths[:, None]


def _flatten(x: Array) -> Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def make_batch(trajectories: Trajectory, advantages=None, returns=None) -> Batch:
    """Rows [B * T, ...] of all turns; dead and scripted turns have length 0 and weight 0.

    advantages: Float[B T], copied to every token of the turn; returns: Float[B T].
    """
    turns = trajectories.turns
    mask = jnp.arange(turns.response.shape[2])[None, None] < turns.response_lengths[..., None]
    learned = turns.live & ~turns.scripted
    mask = (mask & learned[..., None]).astype(jnp.float32)
    per_turn = jnp.zeros(turns.live.shape, jnp.float32)
    advantages = per_turn if advantages is None else advantages
    returns = per_turn if returns is None else returns
    return Batch(
        prompt=_flatten(turns.prompt),
        prompt_lengths=_flatten(turns.prompt_lengths),
        response=_flatten(turns.response),
        response_lengths=_flatten(jnp.where(learned, turns.response_lengths, 0)),
        phase=_flatten(turns.phase),
        trajectory=jnp.repeat(jnp.arange(turns.live.shape[0]), turns.live.shape[1]),
        old_log_probs=_flatten(turns.log_probs),
        ref_log_probs=_flatten(jnp.zeros_like(turns.log_probs)),
        advantages=_flatten(mask * advantages[..., None]),
        returns=_flatten(returns),
        old_values=_flatten(turns.values),
        weights=_flatten(mask),
    )


def _keep_in_place(agent: Agent, state: TrainState, mesh: Mesh) -> TrainState:
    """A donated state comes back where it lay."""
    return jax.lax.with_sharding_constraint(state, agent.model.config.layout.shardings(state, mesh))


def _width_multiple(agent: Agent, batch: Batch) -> int:
    full = batch.prompt.shape[1] + batch.response.shape[1] - 1
    return attention.row_multiple(agent.model.config.attention, full)


def _score(
    agent: Agent, params, batch: Batch, temperature, width: int | None = None
) -> scoring.Scores:
    return scoring.score(
        agent,
        params,
        batch.prompt,
        batch.prompt_lengths,
        batch.response,
        batch.response_lengths,
        batch.phase,
        temperature,
        width,
    )


@functools.partial(
    jax.jit,
    static_argnames=("optimizer", "rows", "length_buckets", "mesh"),
    donate_argnames=("state",),
)
def sft_step(
    agent: Agent,
    state: TrainState,
    trajectories: Trajectory,
    keep: Bool[Array, " B"],
    frozen: PyTree | None = None,
    *,
    optimizer: optax.GradientTransformation,
    rows: int,
    length_buckets: tuple[int, ...] = LENGTH_BUCKETS,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Metrics]:
    """Cross-entropy on every turn of the kept trajectories (paper, section 4: reward >= 0.5).

    Trajectories and `keep` are sharded over `mesh` (None: the first device alone), the rest is
    replicated. `rows` is the size of a micro-batch on each device. `frozen` are the parameters
    beside those of the state, see `lora.partition`.
    """

    mesh = mesh or mesh_lib.single()

    def step(agent, params, frozen, trajectories, keep):
        batch = make_batch(trajectories)
        kept = jnp.repeat(keep, trajectories.turns.live.shape[1])
        batch = batch.replace(weights=jnp.where(kept[:, None], batch.weights, 0.0))
        tokens = program.psum(batch.weights.sum())
        denominator = jnp.maximum(tokens, 1.0)

        def loss_fn(params, part: Batch, width: int):
            params = lora.join(params, frozen)
            scores = _score(agent, params, part, jnp.ones((), jnp.float32), width)
            value, metrics = loss.sft_loss(scores.log_probs, part.weights, denominator)
            metrics["entropy"] = loss.masked_sum(scores.entropy, part.weights) / denominator
            return value, (metrics, {})

        active = batch.weights.sum(axis=1) > 0
        grads, metrics, _ = microbatches.accumulate_gradients(
            loss_fn,
            params,
            batch,
            active,
            rows,
            layout=agent.model.config.layout,
            multiple=_width_multiple(agent, batch),
            length_buckets=length_buckets,
        )
        kept_count = program.psum(keep.astype(jnp.float32).sum())
        grads, metrics = program.psum((grads, metrics))
        return grads, {**metrics, "tokens": tokens, "kept": kept_count}

    gradients = program.fsdp_parallel(
        step,
        mesh,
        rows=("trajectories", "keep"),
        out=program.WHOLE,
    )
    grads, metrics = gradients(agent, state.params, frozen, trajectories, keep)
    state, extra = apply_gradients(state, grads, optimizer)
    state = _keep_in_place(agent, state, mesh)
    return state, {
        "loss": metrics["nll"],
        "entropy": metrics["entropy"],
        "tokens": metrics["tokens"],
        "kept": metrics["kept"] / keep.shape[0],
        **extra,
    }


def _leave_out_cut(trajectories: Trajectory, eos_id: int) -> Trajectory:
    """Turns that the budget ended are no longer learned from, as if a program had written them."""
    turns = trajectories.turns
    last = jnp.maximum(turns.response_lengths - 1, 0)[..., None]
    ended = jnp.take_along_axis(turns.response, last, axis=2)[..., 0] == eos_id
    cut = turns.live & (turns.response_lengths == turns.response.shape[2]) & ~ended
    return trajectories.replace(turns=turns.replace(scripted=turns.scripted | cut))


def ppo_objective(
    config: PPOConfig,
    agent: Agent,
    temperature,
    frozen,
    denominators,
    params,
    part: Batch,
    width: int,
):
    """Loss of some rows: (loss, (metrics to add up, metrics to take the maximum of)).

    denominators: tokens and turns of the whole mini-batch. width: as in `scoring.score`.
    """
    tokens, turns = denominators
    scores = _score(agent, lora.join(params, frozen), part, temperature, width)
    value, metrics = loss.ppo_loss(
        scores.log_probs,
        part.old_log_probs,
        part.advantages,
        part.weights,
        tokens,
        part.importance,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip or None,
    )
    metrics["entropy"] = loss.masked_sum(scores.entropy, part.weights) / tokens
    value -= config.entropy_coef * metrics["entropy"]
    if config.kl_coef:
        kl = loss.kl_estimate(scores.log_probs, part.ref_log_probs, config.kl_kind)
        metrics["reference_kl"] = loss.masked_sum(kl, part.weights) / tokens
        value += config.kl_coef * metrics["reference_kl"]
    if config.estimator == "gae":
        on = (part.weights.sum(axis=1) > 0).astype(jnp.float32)
        v_loss, v_metrics = loss.value_loss(
            scores.values,
            part.returns,
            part.old_values,
            on,
            turns,
            config.value_clip or None,
        )
        value += config.value_coef * v_loss
        metrics |= {"value_loss": v_loss, **v_metrics}
    gap = loss.largest_gap(scores.log_probs, part.old_log_probs, part.weights)
    largest = jnp.max(jnp.where(part.weights > 0, scores.largest, 0.0))
    maxima = {"log_prob_gap": gap, "largest_logit": largest}
    return value, (metrics, jax.lax.stop_gradient(maxima))


def fixed_log_probs(
    agent: Agent, params, batch: Batch, temperature, rows: int
) -> Float[Array, "M R"]:
    """Scores every row under parameters that stay as they are, `rows` at a time on each device."""
    rows = program.count_rows(rows)
    size = batch.response_lengths.shape[0]
    padded = -(-size // rows) * rows
    index = jnp.minimum(jnp.arange(padded), size - 1).reshape(-1, rows)

    def score_rows(picked):
        part = microbatches.over_devices(jax.tree.map(lambda x: x[picked], batch))
        return _score(agent, params, part, temperature).log_probs

    scored = jax.lax.map(score_rows, index)
    return scored.reshape(padded, -1)[:size]


@functools.partial(
    jax.jit, static_argnames=("optimizer", "config", "mesh", "warming"), donate_argnames=("state",)
)
def update_step(
    agent: Agent,
    state: TrainState,
    trajectories: Trajectory,
    rewards: Float[Array, "B Q"],
    num_questions: Int[Array, " B"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    reference: PyTree | None = None,
    frozen: PyTree | None = None,
    *,
    optimizer: optax.GradientTransformation,
    config: PPOConfig,
    mesh: Mesh | None = None,
    warming: bool = False,
) -> tuple[TrainState, Metrics]:
    """PPO on one rollout: `epochs` times over `minibatches` sets of whole trajectories.

    Each block of `minibatches` neighbours deals one trajectory to every mini-batch, in random
    order: siblings are spread, and the mini-batches do not depend on the number of devices.

    Trajectories (siblings adjacent), rewards and num_questions are sharded over `mesh` (None: the
    first device alone), the rest is replicated. `reference` holds the parameters that the KL is to,
    needed with `kl_coef`; `key` deals the mini-batches. `frozen` are the parameters beside those of
    the state, and of the reference, see `lora.partition`. With `warming` only the value head
    learns, so that it knows something before advantages are made of what it says.

    Returns:
      The new state and metrics: means over all optimiser steps, except log_prob_gap, the largest
      |sampler - learner| log-prob in the first mini-batch, before any parameter has moved, and
      log_prob_bound, what rounding explains of it in float32 (`gate.bound`). Clip
      fractions, KL and entropy are over the rows that were scored (`scored_share` of the tokens).
      With `importance_cap` all rows are scored once more before the first step: log_prob_gap and
      the metrics of `loss.importance_weights` are over all of them.

    Raises:
      ValueError: a device's share of the trajectories does not divide into mini-batches and
        groups.
    """
    mesh = mesh or mesh_lib.single()
    shares = 1 if mesh_lib.splits_parameters(mesh) else mesh.shape[rules.DATA]
    share = trajectories.id.shape[0] // shares
    if share % config.minibatches or share % config.group_size:
        raise ValueError(
            f"{share} trajectories a device do not divide by ppo.minibatches={config.minibatches} "
            f"and ppo.group_size={config.group_size}; no trajectory may be lost: change one of the "
            "three, or mesh.data"
        )

    blocks, graded = _spread(config, shares, trajectories, rewards, num_questions)

    def update(agent, state, reference, frozen, blocks, graded, key, temperature):
        trajectories, rewards, num_questions = graded
        size, max_turns = trajectories.turns.live.shape
        if not config.learn_from_cut:
            trajectories = _leave_out_cut(trajectories, agent.grammar.eos_id)
        costs, judged = turn_costs(config, trajectories), None
        if config.needs_reference:
            rows = make_batch(trajectories)
            whole = lora.join(reference, frozen)
            judged = fixed_log_probs(agent, whole, rows, temperature, config.microbatch_rows)
            drift = (rows.weights * (rows.old_log_probs - judged)).sum(axis=1)
            drift = config.reward_kl_coef * drift.reshape(size, max_turns)
            costs = drift if costs is None else costs + drift
        advantages, returns = turn_advantages(config, trajectories, rewards, num_questions, costs)
        batch = make_batch(trajectories, advantages, returns)
        if judged is not None:
            batch = batch.replace(ref_log_probs=judged)

        found: Metrics = {}
        if config.importance_cap:
            batch, found = _correct(
                config, agent, lora.join(state.params, frozen), batch, temperature
            )

        def one_minibatch(state, chosen):
            return _minibatch_step(
                config, optimizer, agent, temperature, frozen, state, batch, chosen, warming
            )

        def one_epoch(state, epoch):
            rows = _deal(
                blocks, max_turns, jax.random.fold_in(key, epoch), minibatches=config.minibatches
            )
            return jax.lax.scan(one_minibatch, state, rows)

        state, metrics = jax.lax.scan(one_epoch, state, jnp.arange(config.epochs))
        live = trajectories.turns.live
        of_rollout = {
            "advantage_std": masked_deviation(advantages, live),
            "explained_variance": explained_variance(trajectories.turns.values, returns, live),
            "cost": mean_cost(costs, live),
            **found,
        }
        return state, metrics, of_rollout

    run = program.fsdp_parallel(
        update,
        mesh,
        rows=("blocks", "graded"),
        out=program.WHOLE,
    )
    state, metrics, of_rollout = run(
        agent, state, reference, frozen, blocks, graded, key, temperature
    )
    state = _keep_in_place(agent, state, mesh)
    gap, largest = (metrics.pop(name)[0, 0] for name in ("log_prob_gap", "largest_logit"))
    scored = metrics.pop("scored")
    result = {
        name: values.sum() / jnp.maximum(scored.sum(), 1e-9)
        if name in _PER_TOKEN
        else values.mean()
        for name, values in metrics.items()
    }
    result |= {"log_prob_gap": gap, "scored_share": scored.mean()}
    if agent.model.config.dtype == "float32":
        result["log_prob_bound"] = gate.bound(largest)
    counts = {name: metrics[name].sum() for name in ("skipped", "idle")}
    return state, {**result, **of_rollout, **counts}


def _correct(
    config: PPOConfig, agent: Agent, params, batch: Batch, temperature
) -> tuple[Batch, Metrics]:
    """The batch with the learner's log-probs as the old ones, and weights for the sampler's.

    Metrics: those of `loss.importance_weights`, and log_prob_gap; of all devices.
    """
    old = fixed_log_probs(agent, params, batch, temperature, config.microbatch_rows)
    tokens = jnp.maximum(program.psum(batch.weights.sum()), 1.0)
    importance, metrics = loss.importance_weights(
        old, batch.old_log_probs, batch.weights, tokens, config.importance_cap
    )
    gap = loss.largest_gap(old, batch.old_log_probs, batch.weights)
    metrics = {**program.psum(metrics), "log_prob_gap": program.pmax(gap)}
    return batch.replace(old_log_probs=old, importance=importance), metrics


def _spread(
    config: PPOConfig,
    shares: int,
    trajectories: Trajectory,
    rewards: Float[Array, "B Q"],
    num_questions: Int[Array, " B"],
) -> tuple[Int[Array, " blocks"], tuple[Trajectory, Float[Array, "B Q"], Int[Array, " B"]]]:
    """The batch in an order in which each device has about as many rows that are scored.

    Groups without contrast cost nothing, and the device that has none of them is waited for.
    Returns the number that each block of `minibatches` neighbours had before, and the batch.
    """
    size = rewards.shape[0]
    blocks = jnp.arange(size // config.minibatches)
    graded = (trajectories, rewards, num_questions)
    if shares == 1:
        return blocks, graded
    scored = trajectories.turns.live & ~trajectories.turns.scripted
    if not config.needs_every_row:
        costs = turn_costs(config, trajectories)
        scored &= turn_advantages(config, *graded, costs)[0] != 0
    unit = math.lcm(config.group_size, config.minibatches)  # neither is torn apart
    order = microbatches.spread(scored.reshape(size // unit, -1).sum(axis=1), shares)

    def arrange(x):
        units = x.reshape(order.shape[0], x.shape[0] // order.shape[0], *x.shape[1:])
        return units[order].reshape(x.shape)

    return jax.tree.map(arrange, (blocks, graded))


def _deal(
    blocks: Int[Array, " blocks"], max_turns: int, key: PRNGKeyArray, *, minibatches: int
) -> Int[Array, "minibatches rows"]:
    """Rows (turns of whole trajectories) of each mini-batch, on this device.

    blocks: the number of each of its blocks of `minibatches` neighbours, in the whole batch.
    """
    count = blocks.shape[0]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, blocks)
    order = jax.vmap(lambda k: jax.random.permutation(k, minibatches))(keys)
    chosen = (order + jnp.arange(count)[:, None] * minibatches).T
    rows = chosen[..., None] * max_turns + jnp.arange(max_turns)[None, None]
    return rows.reshape(minibatches, count * max_turns)


def _keep_value_head(tree: PyTree, others: PyTree) -> PyTree:
    """The value head of `tree`, and all other parameters of `others`."""

    def pick(path, ours, theirs):
        return ours if "value_head" in jax.tree_util.keystr(path) else theirs

    return jax.tree_util.tree_map_with_path(pick, tree, others)


def _minibatch_step(config, optimizer, agent, temperature, frozen, state, batch, chosen, warming):
    """One optimiser step on the rows `chosen` of every device."""
    # A single mini-batch is the batch: rows are ordered later.
    part = batch if config.minibatches == 1 else jax.tree.map(lambda x: x[chosen], batch)
    mask = _response_mask(part)
    weights, tokens = loss.token_weights(
        mask, part.trajectory, batch.response.shape[0], config.weighting
    )
    active = mask.any(axis=1)
    tokens, turns = program.psum((tokens, active.sum().astype(jnp.float32)))
    part = part.replace(weights=weights)
    if not config.needs_every_row:
        active &= jnp.any(part.advantages != 0, axis=1)
    wanted = program.psum(active.sum()) > 0  # else no group has a better and a worse member
    denominators = (tokens, jnp.maximum(turns, 1.0))
    loss_fn = functools.partial(ppo_objective, config, agent, temperature, frozen, denominators)
    grads, sums, maxima = microbatches.accumulate_gradients(
        loss_fn,
        state.params,
        part,
        active,
        config.microbatch_rows,
        layout=agent.model.config.layout,
        multiple=_width_multiple(agent, batch),
        length_buckets=config.length_buckets,
    )
    sums["scored"] = jnp.sum(jnp.where(active[:, None], weights, 0.0)) / tokens
    grads, sums = program.psum((grads, sums))
    before = state.params
    if warming:
        grads = _keep_value_head(grads, jax.tree.map(jnp.zeros_like, grads))
    state, extra = apply_gradients(state, grads, optimizer, wanted)
    if warming:  # weight decay moves what has no gradient
        state = state.replace(params=_keep_value_head(state.params, before))
    state = program.constrain_params(agent.model.config.layout, state)
    return state, {**sums, **program.pmax(maxima), **extra}
