"""A batch of prompts answered in groups of rows of about the same length.

Rows are read at the least of a few widths that holds the longest of their group (*prefill*), so
that little of the work is padding, and rows that are over take no part at all. While a group
decodes, its rows end one after the other: when half of them have, the others go on by themselves.

What a row computes follows from its own prompt, key and width. The width depends on the rest of the
batch, and is a part of the response: given again, it gives the same bits in other company, in
groups of as many rows. At another width the same is added up in another order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from atommem_jax.config import LENGTH_BUCKETS
from atommem_jax.model import attention, sampling
from atommem_jax.model.kv_cache import Prefix
from atommem_jax.model.sampling import Decoder
from atommem_jax.parallel import program
from atommem_jax.types import Response


def list_widths(
    full: int, multiple: int = 1, length_buckets: tuple[int, ...] = LENGTH_BUCKETS
) -> list[int]:
    """The widths that rows are computed at: some eighths of `full`, each compiled once.

    They divide by `multiple`; the greatest is at least `full`.
    """
    return sorted({-(-full * part // (8 * multiple)) * multiple for part in length_buckets})


def respond(
    decoder: Decoder,
    prompt: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    phase: Int[Array, " B"],
    keys: PRNGKeyArray,  # [B], one per row
    skip: Bool[Array, " B"],
    width: Int[Array, " B"] | None = None,
    prefix: Prefix | None = None,
    generate: Callable[..., Response] = sampling.generate,
) -> Response:
    """`sampling.generate` of a batch in groups; rows with `skip` come back empty.

    `SamplerConfig.group` and `prompt_buckets` say how many rows a group has, and which widths
    there are.

    Args beyond those of `sampling.generate`:
      width: of a response to each prompt that was recorded; rows are computed at the same again.
      prefix: what the prompts begin with and has been read.
      generate: what answers a group, with the arguments of `sampling.generate`.
    """
    config = decoder.agent.sampler
    # Outside of the model each device may have some rows; in it, all rows and some heads.
    prompt, prompt_lengths, phase, keys, skip, width = program.whole(
        (prompt, prompt_lengths, phase, keys, skip, width)
    )
    batch, full = prompt.shape
    rows = min(config.group or batch, batch)
    multiple = attention.row_multiple(decoder.agent.model.config.attention, full)
    widths = list_widths(full, multiple, config.prompt_buckets)
    unread = prompt_lengths if prefix is None else prompt_lengths - prefix.length
    needed = unread if width is None else jnp.maximum(unread, width)
    bucket = jnp.sum(needed[:, None] > jnp.asarray(widths[:-1], jnp.int32)[None], axis=1)
    order = jnp.argsort(jnp.where(skip, full, -needed), stable=True)
    # The last group may reach past the end.
    order = jnp.concatenate([order, jnp.full((rows,), order[0])])
    live = jnp.sum(~skip)
    inputs = (prompt, prompt_lengths, phase, keys)

    def answer(width: int):
        def run(part, idle: Bool[Array, " rows"], prefix: Prefix | None):
            return generate(decoder, *part, idle, min(width, full), prefix)

        return run

    def body(carry):
        first, responses = carry
        chosen = jax.lax.dynamic_slice_in_dim(order, first, rows)
        inside = first + jnp.arange(rows) < live
        if width is not None:
            inside &= bucket[chosen] == bucket[chosen[0]]
        found = jax.lax.switch(
            bucket[chosen[0]],
            [answer(width) for width in widths],
            sampling.take_rows(inputs, chosen),
            ~inside,
            sampling.take_rows(prefix, chosen),
        )
        # The rows beyond the group's took part in its passes: the first row tells of all.
        lanes = jnp.zeros_like(found.lanes).at[0].set(jnp.sum(found.lanes))
        found, to = found.replace(lanes=lanes), jnp.where(inside, chosen, batch)
        responses = jax.tree.map(
            lambda all_, new: all_.at[to].set(new, mode="drop"), responses, found
        )
        return first + jnp.sum(inside), program.whole(responses)

    carry = (jnp.zeros((), jnp.int32), program.whole(_no_responses(decoder, batch)))
    with jax.named_scope("groups"):
        return jax.lax.while_loop(lambda carry: carry[0] < live, body, carry)[1]


def _no_responses(decoder: Decoder, batch: int) -> Response:
    limit = decoder.agent.sampler.response_length
    none = jnp.zeros((batch,), jnp.int32)
    return Response(
        tokens=jnp.full((batch, limit), decoder.agent.grammar.pad_id, jnp.int32),
        lengths=none,
        log_probs=jnp.zeros((batch, limit), jnp.float32),
        values=jnp.zeros((batch,), jnp.float32),
        scripted=jnp.zeros((batch,), bool),
        passes=none,
        lanes=none,
        width=none,
    )
