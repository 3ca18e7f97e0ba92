"""What prompts begin with, read once: instructions once a program, questions once a trajectory.

While a document is read, prompts begin with the same instructions and the same questions, turn for
turn; while it is answered from, with the same instructions. Their keys and values are those of the
parameters that made them: a rollout starts without any, and keeps them for its own turns.
"""

import typing

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from atommem_jax.language import prompt as prompting
from atommem_jax.model import attention
from atommem_jax.model.kv_cache import Cache, Prefix
from atommem_jax.model.sampling import Decoder, take_rows
from atommem_jax.types import Episode, Phase


@flax.struct.dataclass
class Prefixes:
    """What the prompts of a batch begin with."""

    whole: Prefix  # instructions and questions, as while reading
    instructions: Int[Array, ""]  # tokens of the former

    def of(self, phase: Int[Array, " B"]) -> Prefix:
        """What a turn of each trajectory begins with, by its phase."""
        length = jnp.where(phase == Phase.READING, self.whole.length, self.instructions)
        return self.whole.replace(length=length)


def read(decoder: Decoder, template: prompting.Template, episodes: Episode) -> Prefixes:
    """Reads what the prompts of all turns of a batch of episodes begin with.

    The model must look at nothing but tokens: flags (`ModelConfig.num_features`) tell of the whole
    prompt, and differ from turn to turn.
    """
    questions, lengths = jax.vmap(prompting.assemble_questions, in_axes=(None, 0, 0, 0))(
        template, episodes.questions, episodes.question_lengths, episodes.num_questions
    )
    fixed = template.prefix[None]
    batch, count = questions.shape[0], jnp.sum(fixed != template.pad_id, dtype=jnp.int32)
    multiple = attention.row_multiple(decoder.agent.model.config.attention, questions.shape[1])
    wide = -(-(fixed.shape[1] + questions.shape[1]) // multiple) * multiple
    questions = jnp.pad(
        questions,
        ((0, 0), (0, wide - fixed.shape[1] - questions.shape[1])),
        constant_values=template.pad_id,
    )
    shift = decoder.agent.model.config.token_shift
    recent = jnp.pad(fixed, ((0, 0), (shift, 0)), constant_values=template.pad_id)
    recent = jax.lax.dynamic_slice_in_dim(recent, count, shift, axis=1)  # its last tokens
    before = None
    if fixed.shape[1]:
        nothing = jnp.full_like(recent, template.pad_id)
        before = _read(decoder, fixed, count[None], nothing, None)
        every = jnp.zeros((batch,), jnp.int32)
        before, recent = take_rows((before, recent), every)
    whole = _read(decoder, questions, lengths, jnp.broadcast_to(recent, (batch, shift)), before)
    return Prefixes(whole, count)


def _read(
    decoder: Decoder,
    tokens: Int[Array, "B F"],
    lengths: Int[Array, " B"],
    recent: Int[Array, "B token_shift"],
    before: Prefix | None,
) -> Prefix:
    """Right-padded rows behind `before`: no token looks at what stands behind it."""
    model = decoder.agent.model
    with jax.named_scope("prefix"):
        _, read = model.apply(
            {"params": decoder.whole_params},
            tokens,
            jnp.zeros_like(lengths),
            recent=recent,
            prefix=before,
            cache_dtype=decoder.agent.sampler.cache_dtype,
            method="read",
        )
    cache = typing.cast(Cache, read)
    if before is None:
        return Prefix(cache.keys, cache.values, lengths)
    keys, values = jax.tree.map(
        lambda *pieces: jnp.concatenate(pieces, axis=-2),
        (before.keys, before.values),
        (cache.keys, cache.values),
    )
    return Prefix(keys, values, before.length + lengths)
