"""The turn loop: a whole multi-turn episode is one jitted program, or a segment of a long one.

Every turn shows what the standing query retrieves, builds the prompt, lets a *policy* respond,
parses the response and applies its actions to the slot table. `run` loops over turns in a
`lax.while_loop` that ends when every trajectory is over, and returns a record of each turn.
`run_segment` goes on from where the last segment stopped: an episode without end is a row of them,
each with the chunks that it may need, and its memory is what one segment takes.

A policy is any function `(view, episodes, keys) -> Response` on a batch: `model_policy` samples
from the transformer; scripted teachers (`tasks.teacher`) and static workflows are others. So
teacher trajectories, training rollouts and evaluation see the same prompts, token for token.

Phases (paper, section 3; exact rules in docs/memory.md):

    READING --last chunk--> ANSWERING --read budget spent--> FINAL
                               ^  |---------- answer ----------|
                               +-- next question --+-- none left --> DONE

Randomness is fold_in(fold_in(fold_in(seed, trajectory id), turn), position): a trajectory can
be replayed from (params, seed, trajectory id) whoever else is in the batch: the same tokens, up to
rounding, and the same bits with the widths that its turns were computed at (`Turns.width`).
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from atommem_jax.config import MemoryConfig
from atommem_jax.language import prompt as prompting
from atommem_jax.language.grammar import Grammar
from atommem_jax.learning import document_index
from atommem_jax.memory import slot_table
from atommem_jax.model import groups, prefix, sampling
from atommem_jax.model.sampling import Agent
from atommem_jax.types import (
    EDITS,
    EMPTY,
    ActionKind,
    Actions,
    Embed,
    Episode,
    MemoryState,
    Observation,
    Phase,
    Policy,
    Report,
    Response,
    Trajectory,
    Turns,
    View,
    permitted_kinds,
)


@dataclasses.dataclass(frozen=True)
class EpisodeLimits:
    """Static sizes and budgets of an episode."""

    max_turns: int  # T; `turn_bound` gives the number that is always enough
    prompt_width: int  # P; see `prompt.width`
    memory: MemoryConfig
    read_budget: int = 1  # reading turns in a row that may keep the chunk
    answer_read_budget: int = 1  # turns a question that may read instead of answering
    # Of what does not read: pieces that fill the table, or tokens of the document in the prompt.
    index: str = ""  # one of `document_index.KINDS`
    context: int = 0
    context_is_last: bool = False  # those at its end
    pairs: bool = False  # reading turns come in pairs: a read, then what follows from it
    linked: int = 0  # of the entries shown when answering, see `slot_table.retrieve`

    @property
    def reads_nothing(self) -> bool:
        """Whether the first turn puts the first question."""
        return bool(self.index or self.context)

    def turn_bound(self, chunks: int, questions: int) -> int:
        """Turns after which every episode of this size is over, whatever the policy does."""
        reading = 0 if self.reads_nothing else chunks * (1 + self.read_budget)
        return reading + questions * (1 + self.answer_read_budget)


@flax.struct.dataclass
class Environment:
    """Where one trajectory stands between two turns."""

    memory: MemoryState
    phase: Int[Array, ""]
    chunk: Int[Array, ""]  # next to show while reading
    question: Int[Array, ""]  # next to put while answering
    reads: Int[Array, ""]  # budgeted reads spent on this chunk's streak, or on this question
    answers: Int[Array, "Q X"]
    answer_lengths: Int[Array, " Q"]
    answer_log_prob: Float[Array, " Q"]


@flax.struct.dataclass
class Setting:
    """Everything an episode runs in, except the policy."""

    grammar: Grammar
    template: prompting.Template
    limits: EpisodeLimits = flax.struct.field(pytree_node=False)
    embed: Embed

    @property
    def pad_id(self) -> int:
        return self.template.pad_id


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


def start(setting: Setting, episode: Episode, table: MemoryState | None = None) -> Environment:
    """Before the first chunk (or the first question, without chunks).

    table: what is remembered already; None for an empty memory, as in training, or for the index
      of the episode.
    """
    limits = setting.limits
    sizes = limits.memory
    questions = episode.questions.shape[0]
    if table is None:
        slots = sizes.slots
        if limits.index:
            pieces = document_index.count_pieces(limits.index, episode, sizes.entry_length)
            slots = max(pieces, sizes.shown)
        table = slot_table.init(
            slots=slots,
            entry_length=sizes.entry_length,
            scratchpad_length=sizes.scratchpad_length,
            query_length=sizes.query_length,
            shown=sizes.shown,
            key_dim=sizes.key_dim,
            pad_id=setting.pad_id,
        )
        if limits.index:
            table = document_index.fill(table, limits.index, episode, setting.embed, setting.pad_id)
    zero = jnp.zeros((), jnp.int32)
    env = Environment(
        memory=table,
        phase=jnp.full((), int(Phase.READING), jnp.int32),
        chunk=zero,
        question=zero,
        reads=zero,
        answers=jnp.full((questions, setting.grammar.max_text), setting.pad_id, jnp.int32),
        answer_lengths=jnp.zeros((questions,), jnp.int32),
        answer_log_prob=jnp.zeros((questions,), jnp.float32),
    )
    return _put_question(setting, env, episode, (episode.num_chunks == 0) | limits.reads_nothing)


def _put_question(
    setting: Setting, env: Environment, episode: Episode, when: Bool[Array, ""]
) -> Environment:
    """Starts question `env.question` with a fresh budget, or ends the episode."""
    exists = env.question < episode.num_questions
    index = jnp.minimum(env.question, episode.num_questions - 1)
    asked = slot_table.set_query(
        env.memory, episode.questions[index], episode.question_lengths[index], setting.pad_id
    )
    first = Phase.ANSWERING if setting.limits.answer_read_budget > 0 else Phase.FINAL
    phase = jnp.where(exists, int(first), int(Phase.DONE))
    put = when & exists
    return env.replace(
        memory=jax.tree.map(lambda new, old: jnp.where(put, new, old), asked, env.memory),
        phase=jnp.where(when, phase, env.phase),
        reads=jnp.where(when, 0, env.reads),
    )


def begin_turn(
    setting: Setting, env: Environment, episode: Episode
) -> tuple[Environment, View, Float[Array, " K"]]:
    """Retrieval with the standing query, then the prompt; also the cosines of what is shown."""
    limits = setting.limits
    reading = env.phase == Phase.READING
    with jax.named_scope("retrieve"):
        table, scores = slot_table.retrieve(env.memory, setting.embed)
        if limits.linked:
            others = slot_table.retrieve(env.memory, setting.embed, linked=limits.linked)
            table, scores = jax.tree.map(
                lambda near, linked: jnp.where(reading, near, linked), (table, scores), others
            )
    shown, shown_lengths = slot_table.observe(table, setting.pad_id)
    answering = (env.phase == Phase.ANSWERING) | (env.phase == Phase.FINAL)
    rows = jnp.arange(episode.questions.shape[0])
    put = jnp.where(reading, rows < episode.num_questions, rows == env.question)
    chunk = jnp.clip(env.chunk - episode.first_chunk, 0, episode.chunks.shape[0] - 1)
    text, text_length = episode.chunks[chunk], episode.chunk_lengths[chunk]
    if limits.context:
        text, text_length = document_index.cut(
            episode, limits.context, setting.pad_id, last=limits.context_is_last
        )
    observation = Observation(
        phase=env.phase,
        questions=episode.questions,
        question_lengths=jnp.where(put, episode.question_lengths, 0),
        chunk=text,
        chunk_length=jnp.where(reading | bool(limits.context), text_length, 0),
        scratchpad=table.scratchpad,
        scratchpad_length=table.scratchpad_length,
        query=table.query,
        query_length=table.query_length,
        shown=shown,
        shown_lengths=shown_lengths,
    )
    with jax.named_scope("assemble"):
        prompt, length = prompting.assemble(
            setting.template, observation, prompt_width=setting.limits.prompt_width
        )
    view = View(
        observation=observation,
        prompt=prompt,
        prompt_length=length,
        phase=env.phase,
        chunk=jnp.where(reading, env.chunk, EMPTY),
        question=jnp.where(answering, env.question, EMPTY),
        reads=env.reads,
    )
    return env.replace(memory=table), view, scores


def end_turn(
    setting: Setting, env: Environment, episode: Episode, response: Response
) -> tuple[Environment, Actions, Report]:
    """Parses the response, applies its actions and moves on by the advance rule."""
    c = setting.limits
    with jax.named_scope("parse"):
        actions = setting.grammar.parse(response.tokens, response.lengths)
    with jax.named_scope("transition"):
        table, report = apply_actions(setting, env.memory, actions, env.phase)
    env = env.replace(memory=table)
    has_read = report.applied[ActionKind.READ] > 0

    reading = env.phase == Phase.READING
    edited = sum(report.applied[kind] for kind in EDITS) > 0
    stay = has_read & ~edited & (env.reads < c.read_budget)
    if c.pairs:
        stay = (has_read | (env.reads % 2 == 1)) & (env.reads < c.read_budget)
    chunk = jnp.where(reading & ~stay, env.chunk + 1, env.chunk)

    has_answered = report.applied[ActionKind.ANSWER] > 0
    retry = has_read & ~has_answered
    finished = ~reading & ~retry
    env = _record_answer(env, actions, response, has_answered)
    reads = jnp.where(jnp.where(reading, stay, retry), env.reads + 1, 0)
    spent = ~reading & (reads >= c.answer_read_budget)
    env = env.replace(
        chunk=chunk,
        question=jnp.where(finished, env.question + 1, env.question),
        reads=reads,
        phase=jnp.where(spent, int(Phase.FINAL), env.phase),
    )
    read_all = reading & (chunk >= episode.num_chunks)
    return _put_question(setting, env, episode, read_all | finished), actions, report


def apply_actions(
    setting: Setting, table: MemoryState, actions: Actions, phase: Int[Array, ""]
) -> tuple[MemoryState, Report]:
    """The memory after a turn's actions, and what became of each; `phase` says what may be done."""
    return slot_table.transition(
        table,
        actions,
        permitted=permitted_kinds(phase),
        eviction=setting.limits.memory.eviction,
        embed=setting.embed,
        pad_id=setting.pad_id,
    )


def _record_answer(
    env: Environment, actions: Actions, response: Response, has_answered: Bool[Array, ""]
) -> Environment:
    """The first sound answer of the turn is the answer to the question put."""
    sound = (actions.kind == ActionKind.ANSWER) & actions.well_formed & (actions.length > 0)
    first = jnp.argmax(sound)
    here = (jnp.arange(env.answers.shape[0]) == env.question) & has_answered
    length = jnp.minimum(actions.length[first], env.answers.shape[1])
    return env.replace(
        answers=jnp.where(here[:, None], actions.text[first][None, :], env.answers),
        answer_lengths=jnp.where(here, length, env.answer_lengths),
        answer_log_prob=jnp.where(here, jnp.sum(response.log_probs), env.answer_log_prob),
    )


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
