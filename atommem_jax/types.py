"""The vocabulary of atommem_jax: frozen pytrees that flow between the modules.

Axis letters: B batch of trajectories, T turns, C chunks, U facts a chunk, Q questions,
P prompt width, R response width, A actions a turn, N slots, L entry length, S scratchpad
length, Y query length, K shown entries, D key width, X widest action text, V vocabulary.

Single-trajectory code carries no batch axis; batches are made with `jax.vmap`. All token ids
and counters are int32, masks are bool, scores float32. Token rows are right-padded with the
pad id and come with a length, except `Turns.prompt`, which is left-padded.
"""

import enum
import types
from collections.abc import Callable, Mapping

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

EMPTY = -1
"""Sentinel for "no slot", "no chunk" and "no question"."""


class ActionKind(enum.IntEnum):
    """Kinds of action; the integer is the row of every per-kind counter."""

    NONE = 0
    CREATE = 1
    READ = 2
    UPDATE = 3
    DELETE = 4
    SCRATCHPAD = 5
    ANSWER = 6


NUM_KINDS = len(ActionKind)

EDITS = (ActionKind.CREATE, ActionKind.UPDATE, ActionKind.DELETE)
"""The kinds that change what the entries of the memory hold."""


class Phase(enum.IntEnum):
    """What a turn may do."""

    READING = 0  # a chunk is shown: every action except an answer
    ANSWERING = 1  # a question is put: a read or an answer
    FINAL = 2  # the last permitted turn of a question: an answer only
    DONE = 3  # all questions are over; nothing happens


PERMITTED: Mapping[Phase, frozenset[ActionKind]] = types.MappingProxyType(
    {
        Phase.READING: frozenset({*EDITS, ActionKind.READ, ActionKind.SCRATCHPAD}),
        Phase.ANSWERING: frozenset({ActionKind.READ, ActionKind.ANSWER}),
        Phase.FINAL: frozenset({ActionKind.ANSWER}),
        Phase.DONE: frozenset(),
    }
)
"""The kinds of action that a phase permits; whoever asks what a turn may do reads it here."""

_PERMITTED_TABLE = np.array([[kind in PERMITTED[phase] for kind in ActionKind] for phase in Phase])


def permitted_kinds(phase: Int[Array, "*batch"] | Phase) -> Bool[Array, "*batch kinds"]:
    """`PERMITTED` as an array, for a phase that may be traced: one flag for each `ActionKind`."""
    return jnp.asarray(_PERMITTED_TABLE)[phase]


@flax.struct.dataclass
class Annotations:
    """What a scripted teacher may know of an episode, and a learned policy never sees.

    A chunk is made of at most U facts (sentences). A fact is named by its flat index
    `chunk * U + position`. What is worth storing of a fact is its note, where it has one, else
    the fact itself. W is the length of the longest note: 0 where no fact has any.
    """

    start: Int[Array, "C U"]  # first token of the fact within its chunk
    length: Int[Array, "C U"]  # tokens of the fact; 0 where there is none
    note: Int[Array, "C U W"]  # tokens that are stored instead of the fact
    note_length: Int[Array, "C U"]  # 0 where the fact itself is stored
    subject_length: Int[Array, "C U"]  # leading tokens of what is stored that name its subject
    support: Bool[Array, "C U"]  # worth storing, as far as was known when it was read
    supersedes: Int[Array, "C U"]  # flat index of the fact that it corrects, or EMPTY
    category: Int[Array, "C U"]  # task's own label of the kind of fact, for statistics
    needs: Int[Array, "Q M"]  # facts that answer question q, in reading order, or EMPTY
    gold: Int[Array, "Q G"]  # tokens of the canonical answer
    gold_length: Int[Array, " Q"]
    focus: Int[Array, " Y"]  # tokens of a good standing query over all questions
    focus_length: Int[Array, ""]


@flax.struct.dataclass
class Episode:
    """One sample: a document in chunks and the questions asked about it.

    Of a long document only a window is held: chunks from `first_chunk` on. Annotations are of the
    chunks held, and name facts by their place in the window.
    """

    id: Int[Array, ""]  # number of the sample within its split
    chunks: Int[Array, "C Lc"]
    chunk_lengths: Int[Array, " C"]
    first_chunk: Int[Array, ""]  # number of the first chunk held; 0 where all are
    num_chunks: Int[Array, ""]  # of the document; above all that are held where more follow
    questions: Int[Array, "Q Lq"]
    question_lengths: Int[Array, " Q"]
    num_questions: Int[Array, ""]
    annotations: Annotations


@flax.struct.dataclass
class Actions:
    """What one turn asked for, in the order written. Rows past `count` have kind NONE."""

    kind: Int[Array, " A"]  # ActionKind
    target: Int[Array, " A"]  # number of the shown entry, 1..K; 0 where absent or unreadable
    text: Int[Array, "A X"]
    length: Int[Array, " A"]  # tokens written, before any cut to X or to a cap
    well_formed: Bool[Array, " A"]  # False: unclosed, or otherwise not what the protocol says
    count: Int[Array, ""]


@flax.struct.dataclass
class MemoryState:
    """The slot table of one trajectory. Only `memory.slot_table` touches these fields."""

    entries: Int[Array, "N L"]  # pad where there is no token; all pad in a free slot
    lengths: Int[Array, " N"]
    keys: Float[Array, "N D"]  # unit vectors on a grid, see `slot_table`; zero in a free slot
    valid: Bool[Array, " N"]
    created: Int[Array, " N"]  # clock at which the entry was created; 0 in a free slot
    touched: Int[Array, " N"]  # clock of the last create, update or showing
    clock: Int[Array, ""]  # ticks so far
    scratchpad: Int[Array, " S"]
    scratchpad_length: Int[Array, ""]
    query: Int[Array, " Y"]  # the standing query
    query_length: Int[Array, ""]
    shown: Int[Array, " K"]  # slot shown as Memory k+1 this turn, or EMPTY


@flax.struct.dataclass
class Report:
    """What became of a turn's actions, per kind (row = ActionKind; row NONE stays 0)."""

    attempted: Int[Array, " kinds"]
    applied: Int[Array, " kinds"]
    invalid: Int[Array, " kinds"]
    rejected: Int[Array, " kinds"]  # creates refused by eviction='reject'
    truncated: Int[Array, " kinds"]  # applied with the text cut to its cap
    evicted: Int[Array, " kinds"]  # entries evicted to make room (row CREATE)


@flax.struct.dataclass
class Observation:
    """All that a turn's prompt is built from."""

    phase: Int[Array, ""]
    questions: Int[Array, "Q Lq"]  # those put this turn (all while reading, else one)
    question_lengths: Int[Array, " Q"]  # 0 where not put
    chunk: Int[Array, " Lc"]
    chunk_length: Int[Array, ""]  # 0 while answering
    scratchpad: Int[Array, " S"]
    scratchpad_length: Int[Array, ""]
    query: Int[Array, " Y"]
    query_length: Int[Array, ""]
    shown: Int[Array, "K L"]  # text of Memory 1..K, best first
    shown_lengths: Int[Array, " K"]  # 0 where fewer are shown


@flax.struct.dataclass
class Response:
    """What a policy says in the turns of a batch."""

    tokens: Int[Array, "B R"]  # right-padded
    lengths: Int[Array, " B"]  # end-of-sequence included
    log_probs: Float[Array, "B R"]  # 0 on padding
    values: Float[Array, " B"]
    scripted: Bool[Array, " B"]  # written by a fixed program in the policy's place: not learned
    passes: Int[Array, " B"]  # forward passes of a model that it took, the prompt's included
    lanes: Int[Array, " B"]  # passes of all lanes of its group, which one row of the group tells
    width: Int[Array, " B"]  # columns that the prompt was read at; 0 where no model read it

    @classmethod
    def of_program(
        cls, tokens: Int[Array, "B R"], lengths: Int[Array, " B"], **others: Array
    ) -> "Response":
        """What no model has written: all that a model would tell of it is 0."""
        none = jnp.zeros(lengths.shape, jnp.int32)
        fields = {
            "log_probs": jnp.zeros(tokens.shape, jnp.float32),
            "values": jnp.zeros(lengths.shape, jnp.float32),
            "scripted": jnp.zeros(lengths.shape, bool),
            "passes": none,
            "lanes": none,
            "width": none,
        }
        return cls(tokens=tokens, lengths=lengths, **(fields | others))


@flax.struct.dataclass
class View:
    """What a policy may see of a turn."""

    observation: Observation
    prompt: Int[Array, " P"]  # left-padded
    prompt_length: Int[Array, ""]
    phase: Int[Array, ""]
    chunk: Int[Array, ""]  # index of the chunk shown, or EMPTY
    question: Int[Array, ""]  # index of the question put, or EMPTY
    reads: Int[Array, ""]  # turns before this one that the chunk, or the question, was put in
    width: Int[Array, ""] | None = None  # that the prompt must be computed at, to replay a turn


Policy = Callable[[View, Episode, PRNGKeyArray], Response]
"""(views [B], episodes [B], keys [B]) -> responses [B]. Rows in Phase.DONE are ignored."""


@flax.struct.dataclass
class Turns:
    """Records of the turns of one trajectory; with a leading B for a batch."""

    live: Bool[Array, " T"]  # the turn took place
    phase: Int[Array, " T"]
    chunk: Int[Array, " T"]  # index of the chunk shown, or EMPTY
    question: Int[Array, " T"]  # index of the question put, or EMPTY while reading
    prompt: Int[Array, "T P"]  # left-padded
    prompt_lengths: Int[Array, " T"]
    response: Int[Array, "T R"]  # right-padded; ends with the end-of-sequence token
    response_lengths: Int[Array, " T"]  # tokens generated, end-of-sequence included
    log_probs: Float[Array, "T R"]  # behaviour log-probs of the response; 0 on padding
    values: Float[Array, " T"]  # of the value head at the end of the prompt
    scripted: Bool[Array, " T"]  # the response was written by a fixed program: not learned
    passes: Int[Array, " T"]  # forward passes of a model that it took, the prompt's included
    lanes: Int[Array, " T"]  # passes of all lanes of its group, which one row of the group tells
    width: Int[Array, " T"]  # columns that the prompt was read at; 0 where no model read it
    actions: Actions  # fields lead with T
    report: Report  # fields lead with T
    shown: Int[Array, "T K"]  # slots shown
    shown_entries: Int[Array, "T K L"]
    shown_scores: Float[Array, "T K"]  # cosine to the standing query; 0 where not shown
    occupancy: Int[Array, " T"]  # valid entries at the start of the turn


@flax.struct.dataclass
class Trajectory:
    """A finished episode. `id` seeds its randomness: see `rollout.run`."""

    id: Int[Array, ""]
    turns: Turns
    answers: Int[Array, "Q X"]  # answer given to each question, pad where none
    answer_lengths: Int[Array, " Q"]  # 0: no answer
    answer_log_prob: Float[Array, " Q"]  # summed over the answering turn
    memory: MemoryState  # at the end


@flax.struct.dataclass
class Batch:
    """What the trainer learns from: one row per turn (M rows), any order, padding allowed."""

    prompt: Int[Array, "M P"]  # left-padded
    prompt_lengths: Int[Array, " M"]
    response: Int[Array, "M R"]
    response_lengths: Int[Array, " M"]  # 0 in a row that is padding
    phase: Int[Array, " M"]  # selects the grammar's start state
    trajectory: Int[Array, " M"]  # row's trajectory, counted on its device
    old_log_probs: Float[Array, "M R"]  # that the ratio of PPO starts from
    ref_log_probs: Float[Array, "M R"]  # of the frozen reference; zeros when unused
    advantages: Float[Array, "M R"]
    returns: Float[Array, " M"]  # target of the value head at the end of the prompt
    old_values: Float[Array, " M"]
    weights: Float[Array, "M R"]  # loss weight of each token; 0 on padding
    importance: Float[Array, "M R"] | None = None  # of each token, see `loss.importance_weights`


Embed = Callable[[Int[Array, "*batch L"], Int[Array, " *batch"]], Float[Array, "*batch D"]]
"""(tokens, length) -> unit key; an all-empty text embeds to the zero vector."""
