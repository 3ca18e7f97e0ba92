"""Where one trajectory stands, and what a turn does to it: the rules of an episode, for one row.

A turn has two halves: `begin_turn` retrieves what the standing query is nearest to and builds the
prompt, and `end_turn` parses the response, applies its actions to the slot table and moves on.
`rollout` maps both over a batch and puts a policy between them. Phases (paper, section 3; exact
rules in docs/memory.md):

    READING --last chunk--> ANSWERING --read budget spent--> FINAL
                               ^  |---------- answer ----------|
                               +-- next question --+-- none left --> DONE
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from atommem_jax.config import MemoryConfig
from atommem_jax.language import prompt as prompting
from atommem_jax.language.grammar import Grammar
from atommem_jax.learning import document_index
from atommem_jax.memory import slot_table
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
    Report,
    Response,
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
