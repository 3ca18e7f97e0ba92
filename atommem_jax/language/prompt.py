"""Observation -> prompt tokens: the only place where a prompt is built.

A prompt is a prefix and a run of segments, each a header and a text, in the order of `Segment`:
the questions put this turn, scratchpad, standing query, Memory 1..K and the chunk; then a suffix
that tells the phase and starts the response. A segment without text has no header either. All of
these are data (`Template`): single reserved tokens for models trained here (`compact`), text in
the chat format of a pretrained model (`chat.template`).

Texts are copied as token ids, never re-encoded, so what the model wrote is what it sees.
"""

import enum

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.types import Observation, Phase


class Segment(enum.IntEnum):
    """Parts of a prompt, in order; the integer is also the row of a match flag."""

    QUESTION = 0
    SCRATCHPAD = 1
    QUERY = 2
    MEMORY = 3
    CHUNK = 4


NUM_FEATURES = len(Segment)

_ROLES = ("<question>", "<notes>", "<query>", "<chunk>", "<reading>", "<answering>", "<final>")


@flax.struct.dataclass
class Template:
    """Prefix, headers and suffixes as token ids; rows are right-padded with `pad_id`."""

    prefix: Int[Array, " h"]
    question: Int[Array, " h"]
    scratchpad: Int[Array, " h"]
    query: Int[Array, " h"]
    memory: Int[Array, "K h"]  # one header per shown entry
    chunk: Int[Array, " h"]
    suffix: Int[Array, "phases h"]  # READING, ANSWERING, FINAL
    is_text: Bool[Array, " V"]  # tokens that stand for bytes
    pad_id: int = flax.struct.field(pytree_node=False)

    @property
    def shown(self) -> int:
        return self.memory.shape[0]


def reserved_names(shown: int) -> tuple[str, ...]:
    """Names that `compact` needs as reserved tokens."""
    return (*_ROLES, *(f"<{i + 1}>" for i in range(shown)))


def compact(tokenizer: Tokenizer, shown: int) -> Template:
    """Every header is one reserved token; Memory i is headed by the token of target i.

    Raises KeyError naming the reserved token that the tokenizer lacks.
    """
    missing = [name for name in reserved_names(shown) if name not in tokenizer.reserved]
    if missing:
        raise KeyError(
            f"tokenizer has no reserved tokens {missing}; it has {sorted(tokenizer.reserved)}. "
            "Train it with prompt.reserved_names(shown) among `reserved`"
        )

    def header(*names):
        return jnp.asarray([tokenizer.reserved[name] for name in names], jnp.int32)

    is_text = np.array([bool(piece) for piece in tokenizer.token_bytes])
    return Template(
        prefix=header(),
        question=header("<question>"),
        scratchpad=header("<notes>"),
        query=header("<query>"),
        memory=header(*(f"<{i + 1}>" for i in range(shown)))[:, None],
        chunk=header("<chunk>"),
        suffix=header("<reading>", "<answering>", "<final>")[:, None],
        is_text=jnp.asarray(is_text),
        pad_id=tokenizer.pad_id,
    )


def _segments(template: Template, o: Observation):
    """Static list of (header [n h], text [n w], lengths [n]) in prompt order."""
    num_questions = o.questions.shape[0]
    return [
        (
            jnp.broadcast_to(template.question, (num_questions, template.question.shape[0])),
            o.questions,
            o.question_lengths,
        ),
        (template.scratchpad[None], o.scratchpad[None], o.scratchpad_length[None]),
        (template.query[None], o.query[None], o.query_length[None]),
        (template.memory, o.shown, o.shown_lengths),
        (template.chunk[None], o.chunk[None], o.chunk_length[None]),
    ]


def width(
    template: Template,
    *,
    questions: int,
    question_length: int,
    scratchpad_length: int,
    query_length: int,
    entry_length: int,
    chunk_length: int,
) -> int:
    """P: the width that holds the longest prompt these sizes allow."""
    return (
        template.prefix.shape[0]
        + questions * (template.question.shape[0] + question_length)
        + template.scratchpad.shape[0]
        + scratchpad_length
        + template.query.shape[0]
        + query_length
        + template.shown * (template.memory.shape[1] + entry_length)
        + template.chunk.shape[0]
        + chunk_length
        + template.suffix.shape[1]
    )


def assemble(
    template: Template, observation: Observation, *, prompt_width: int
) -> tuple[Int[Array, " P"], Int[Array, ""]]:
    """The prompt, left-padded to `prompt_width`, and its length.

    Raises AssertionError when ranks are wrong. A prompt longer than `prompt_width` cannot be:
    `width` of the same sizes is its upper bound, and the caller passes that.
    """
    chex.assert_rank([observation.questions, observation.shown, observation.chunk], [2, 2, 1])
    pieces, valid = [template.prefix], [template.prefix != template.pad_id]
    for segment in _segments(template, observation):
        row, real = _lay_out(template, *segment)
        pieces.append(row)
        valid.append(real)
    suffix = template.suffix[jnp.minimum(observation.phase, int(Phase.FINAL))]
    tokens = jnp.concatenate([*pieces, suffix])
    real = jnp.concatenate([*valid, suffix != template.pad_id])
    return join(tokens, real, width=prompt_width, pad_id=template.pad_id, left_pad=True)


def assemble_questions(
    template: Template,
    questions: Int[Array, "Q w"],
    lengths: Int[Array, " Q"],
    count: Int[Array, ""],
) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """What follows the prefix of all prompts while a document is read: the first `count` questions.

    Right-padded, and its length.
    """
    header = jnp.broadcast_to(template.question, (questions.shape[0], template.question.shape[0]))
    lengths = jnp.where(jnp.arange(questions.shape[0]) < count, lengths, 0)
    tokens, real = _lay_out(template, header, questions, lengths)
    return join(tokens, real, width=tokens.shape[0], pad_id=template.pad_id, left_pad=False)


def _lay_out(template: Template, header: Array, text: Array, lengths: Array) -> tuple[Array, Array]:
    """Segments of one kind in a row, with gaps, and which of it is real: no header without text."""
    put = (lengths > 0)[:, None]
    in_text = jnp.arange(text.shape[1])[None, :] < lengths[:, None]
    real = jnp.concatenate([(header != template.pad_id) & put, in_text], axis=1)
    return jnp.concatenate([header, text], axis=1).reshape(-1), real.reshape(-1)


def join(
    tokens: Int[Array, " n"],
    real: Bool[Array, " n"],
    *,
    width: int,
    pad_id: int,
    left_pad: bool,
) -> tuple[Int[Array, " width"], Int[Array, ""]]:
    """The tokens marked `real`, in order and without gaps, in a padded row; and their number.

    With right padding, tokens past `width` are dropped.
    """
    rank = jnp.cumsum(real.astype(jnp.int32)) - 1
    length = rank[-1] + 1
    slot = jnp.where(real, rank + (width - length if left_pad else 0), width)
    row = jnp.full((width,), pad_id, jnp.int32).at[slot].set(tokens, mode="drop")
    return row, jnp.minimum(length, width)


def match(
    template: Template, prompt: Int[Array, " P"], tokens: Int[Array, " T"]
) -> Bool[Array, "T F"]:
    """Flags: does this token also occur in segment f of the prompt?

    An exact-match feature in the manner of DrQA (Chen et al., 2017, section 3.2) for models
    that are trained from scratch. Only text tokens count. It is a function of the prompt's
    tokens alone, so sampler and learner cannot differ. Headers must be single tokens.
    """
    headers = [
        template.question[:1],
        template.scratchpad[:1],
        template.query[:1],
        template.memory[:, 0],
        template.chunk[:1],
    ]
    opens = jnp.stack([jnp.isin(prompt, ids) for ids in headers], axis=1)  # [P F]
    position = jnp.arange(prompt.shape[0], dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(opens.any(axis=1), position, -1))
    inside = (
        opens[jnp.maximum(latest, 0)] & (latest >= 0)[:, None] & template.is_text[prompt][:, None]
    )
    same = tokens[:, None] == prompt[None, :]
    found = same.astype(jnp.float32) @ inside.astype(jnp.float32)
    return found > 0
