"""The turn loop: a whole multi-turn episode is one jitted program, or a segment of a long one.

In every turn a *policy* responds to the prompt that `environment` builds, which then applies the
response. `run` loops over turns in a `lax.while_loop` that ends when every trajectory is over, and
returns a record of each turn. `run_segment` goes on from where the last segment stopped: an episode
without end is a row of them, each with the chunks that it may need, and its memory is what one
segment takes.

A policy is any function `(view, episodes, keys) -> Response` on a batch: `model_policy` samples
from the transformer; scripted teachers (`tasks.teacher`) and static workflows are others. So
teacher trajectories, training rollouts and evaluation see the same prompts, token for token.

Randomness is fold_in(fold_in(fold_in(seed, trajectory id), turn), position): a trajectory can
be replayed from (params, seed, trajectory id) whoever else is in the batch: the same tokens, up to
rounding, and the same bits with the widths that its turns were computed at (`Turns.width`).
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from atommem_jax.learning.environment import Environment, Setting, begin_turn, end_turn, start
from atommem_jax.memory import slot_table
from atommem_jax.model import groups, prefix, sampling
from atommem_jax.model.sampling import Agent
from atommem_jax.types import Episode, Phase, Policy, Response, Trajectory, Turns, View


def model_policy(
    agent: Agent, params, temperature: Float[Array, ""], episodes: Episode | None = None
) -> Policy:
    """Samples from the transformer. `temperature` is traced; 0 is greedy.

    With 0, log-probs are those at temperature 1.

    episodes: that all turns will be of; with `SamplerConfig.cache_prefix` what their prompts begin
      with is read here, and not again. None reads whole prompts.
    """
    decoder = sampling.make_decoder(agent, params, temperature)
    prefixes = None
    if episodes is not None and agent.sampler.cache_prefix:
        prefixes = prefix.read(decoder, agent.template, episodes)

    def respond(view: View, episodes: Episode, keys: PRNGKeyArray) -> Response:
        del episodes
        return groups.respond(
            decoder,
            view.prompt,
            view.prompt_length,
            view.phase,
            keys,
            skip=view.phase == Phase.DONE,
            width=view.width,
            prefix=None if prefixes is None else prefixes.of(view.phase),
        )

    return respond


def by_phase(reading: Policy, answering: Policy) -> Policy:
    """One policy for the reading turns, another for the others; neither sees the other's turns."""
    return _divide(lambda views: views.phase == Phase.READING, reading, answering)


def by_pair(first: Policy, second: Policy) -> Policy:
    """One policy for the second turns of pairs (`EpisodeLimits.pairs`), another for all others."""
    return _divide(
        lambda views: (views.phase == Phase.READING) & (views.reads % 2 == 1), second, first
    )


def _divide(chooses: Callable[[View], Bool[Array, " B"]], chosen: Policy, other: Policy) -> Policy:
    """Two policies, neither of which sees the other's turns."""

    def respond(views: View, episodes: Episode, keys: PRNGKeyArray) -> Response:
        mine = chooses(views)

        def ask(policy: Policy, rows: Array) -> Response:
            phase = jnp.where(rows, views.phase, int(Phase.DONE))
            return policy(views.replace(phase=phase), episodes, keys)

        def choose(ours: Array, theirs: Array) -> Array:
            return jnp.where(mine.reshape((-1,) + (1,) * (ours.ndim - 1)), ours, theirs)

        return jax.tree.map(choose, ask(chosen, mine), ask(other, ~mine))

    return respond


@flax.struct.dataclass
class Seen:
    """What a batch sees at the start of a turn: from `look` to `act`."""

    env: Environment  # after retrieval
    view: View
    scores: Float[Array, "B K"]  # cosines of what is shown


def look(setting: Setting, env: Environment, episodes: Episode) -> Seen:
    """The first half of a turn of a batch, up to where the policy responds."""
    return Seen(*jax.vmap(begin_turn, in_axes=(None, 0, 0))(setting, env, episodes))


def act(
    setting: Setting, env: Environment, seen: Seen, episodes: Episode, response: Response
) -> tuple[Environment, Turns]:
    """The second half: the environments after it, and its record without the axis T.

    env: from before the turn; finished trajectories stay as they were there.
    """
    live = env.phase != Phase.DONE
    view = seen.view
    new, actions, report = jax.vmap(end_turn, in_axes=(None, 0, 0, 0))(
        setting, seen.env, episodes, response
    )

    def where_live(new, old):
        return jnp.where(live.reshape(live.shape + (1,) * (new.ndim - 1)), new, old)

    record = Turns(
        live=live,
        phase=view.phase,
        chunk=view.chunk,
        question=view.question,
        prompt=view.prompt,
        prompt_lengths=view.prompt_length,
        response=response.tokens,
        response_lengths=response.lengths,
        log_probs=response.log_probs,
        values=response.values,
        scripted=response.scripted,
        passes=response.passes,
        lanes=response.lanes,
        width=response.width,
        actions=actions,
        report=report,
        shown=seen.env.memory.shown,
        shown_entries=view.observation.shown,
        shown_scores=seen.scores,
        occupancy=jax.vmap(slot_table.occupancy)(seen.env.memory),
    )
    record = jax.tree.map(lambda x: where_live(x, jnp.zeros_like(x)), record)
    return jax.tree.map(where_live, new, env), record


def _one_turn(setting, policy, env, episodes, keys, width, label):
    """A turn of a batch: (environments, record)."""
    seen = look(setting, env, episodes)
    view = seen.view.replace(width=width)
    after, record = act(setting, env, seen, episodes, policy(view, episodes, keys))
    return after, record if label is None else _relabel(record, label(view, episodes, keys))


def _relabel(record: Turns, said: Response) -> Turns:
    """The record of a turn with what someone else would have said in it, where it took place."""
    live = record.live
    return record.replace(
        response=jnp.where(live[:, None], said.tokens, record.response),
        response_lengths=jnp.where(live, said.lengths, 0),
        log_probs=jnp.where(live[:, None], said.log_probs, 0.0),
        values=jnp.where(live, said.values, 0.0),
        scripted=live & said.scripted,
    )


def trajectory_keys(seed: PRNGKeyArray, ids: Int[Array, " B"]) -> PRNGKeyArray:
    """One key a trajectory, [B], from which all of its randomness comes."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(seed, ids)


def turn_keys(keys: PRNGKeyArray, turn: Int[Array, ""]) -> PRNGKeyArray:
    """The keys [B] of a turn, of those of its trajectories."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, turn)


def run(
    setting: Setting,
    policy: Policy,
    episodes: Episode,
    ids: Int[Array, " B"],
    seed: PRNGKeyArray,
    widths: Int[Array, "B T"] | None = None,
    label: Policy | None = None,
) -> Trajectory:
    """Plays a batch of episodes to their end.

    Args:
      setting: grammar, template, sizes and embedding.
      policy: see `Policy`.
      episodes: leaves lead with B.
      ids: trajectory ids; with `seed` they determine all randomness.
      seed: a scalar PRNG key.
      widths: `Turns.width` of a recorded rollout of the same trajectories, to play them again with
        the same bits; None lets the policy choose.
      label: whose responses are recorded in the place of the policy's, on the policy's own states
        (DAgger, Ross et al. 2011); `actions` and `report` stay those of what was done.

    Returns:
      Trajectory with leaves [B, ...]; turns past an episode's end are zero, `live` False.
      An episode still running after `max_turns` keeps empty answers for its open questions.
    """
    env = jax.vmap(start, in_axes=(None, 0))(setting, episodes)
    first = jnp.zeros((), jnp.int32)
    turns = setting.limits.max_turns
    env, records = run_segment(
        setting, policy, env, episodes, ids, seed, first, turns, widths=widths, label=label
    )
    return finish(ids, env, records)


def run_segment(
    setting: Setting,
    policy: Policy,
    env: Environment,
    episodes: Episode,
    ids: Int[Array, " B"],
    seed: PRNGKeyArray,
    first_turn: Int[Array, ""],
    turns: int,
    *,
    widths: Int[Array, "B T"] | None = None,
    label: Policy | None = None,
) -> tuple[Environment, Turns]:
    """Plays the next turns of a batch of episodes; segment after segment they are those of `run`.

    Args:
      setting: as for `run`.
      policy: as for `run`.
      env: environments [B] before the segment: of `start`, or after the last segment.
      episodes: of a long document a window of chunks; it must hold `turns` chunks from `env.chunk`
        on, or the rest of the document.
      ids: as for `run`.
      seed: as for `run`.
      first_turn: number of the segment's first turn: turns before it.
      turns: of the segment, static; fewer where every trajectory ends before.
      widths: as for `run`, of the turns of this segment.
      label: as for `run`.

    Returns environments [B] after it, and records [T B].
    """
    keys = trajectory_keys(seed, ids)

    def step(env, turn):
        width = None if widths is None else widths[:, turn]
        mine = turn_keys(keys, first_turn + turn)
        return _one_turn(setting, policy, env, episodes, mine, width, label)

    record = jax.eval_shape(step, env, jnp.zeros((), jnp.int32))[1]
    records = jax.tree.map(lambda x: jnp.zeros((turns, *x.shape), x.dtype), record)

    def keep_going(carry):
        turn, env, _ = carry
        return (turn < turns) & jnp.any(env.phase != Phase.DONE)

    def body(carry):
        turn, env, records = carry
        env, record = step(env, turn)
        records = jax.tree.map(
            lambda all_, new: jax.lax.dynamic_update_index_in_dim(all_, new, turn, 0),
            records,
            record,
        )
        return turn + 1, env, records

    first = (jnp.zeros((), jnp.int32), env, records)
    with jax.named_scope("turns"):
        _, env, records = jax.lax.while_loop(keep_going, body, first)
    return env, records


def finish(ids: Int[Array, " B"], env: Environment, records: Turns) -> Trajectory:
    """Trajectories of environments [B] and the records [T B] that led to them."""
    return Trajectory(
        id=ids,
        turns=jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), records),
        answers=env.answers,
        answer_lengths=env.answer_lengths,
        answer_log_prob=env.answer_log_prob,
        memory=env.memory,
    )
