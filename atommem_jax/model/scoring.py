"""From responses to log-probs: what the learner knows of the tokens that the sampler drew.

`score` is the same model, the same grammar mask, the same temperature and the same
`masked_log_softmax` as the sampler's.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atommem_jax.model.distribution import find_scale, masked_entropy, masked_log_softmax
from atommem_jax.model.sampling import Agent, match_features
from atommem_jax.parallel import program


@flax.struct.dataclass
class Scores:
    """What the learner knows of the same tokens; 0 on padding."""

    log_probs: Float[Array, "M R"]
    entropy: Float[Array, "M R"]
    values: Float[Array, " M"]
    largest: Float[Array, "M R"]  # |logit| of what was allowed, after the temperature


def row_lengths(
    prompt_lengths: Int[Array, " M"], response_lengths: Int[Array, " M"]
) -> Int[Array, " M"]:
    """Tokens that `score` feeds to the model for each row."""
    return prompt_lengths + jnp.maximum(response_lengths - 1, 0)


def score(
    agent: Agent,
    params,
    prompt: Int[Array, "M P"],
    prompt_lengths: Int[Array, " M"],
    response: Int[Array, "M R"],
    response_lengths: Int[Array, " M"],
    phase: Int[Array, " M"],
    temperature: Float[Array, ""],
    width: int | None = None,
) -> Scores:
    """Log-probs and entropies of given responses under the sampler's own distribution.

    width: static; columns that hold the prompt and response of every row, `row_lengths` of them.
      None is what always suffices, P + R - 1. A shorter one leaves out padding, no token.
    """
    model, grammar, config = agent.model, agent.grammar, agent.sampler
    limit = response.shape[1]
    width = prompt.shape[1] + limit - 1 if width is None else width
    # The last response token predicts nothing, so it is never fed; the rest ends every row.
    fed = row_lengths(prompt_lengths, response_lengths)
    column = jnp.arange(width, dtype=jnp.int32)[None] - (width - fed)[:, None]  # within its row
    place = column + (prompt.shape[1] - prompt_lengths)[:, None]
    both = jnp.concatenate([prompt, response[:, :-1]], axis=1)
    tokens = jnp.take_along_axis(both, jnp.maximum(place, 0), axis=1)
    tokens = jnp.where(column >= 0, tokens, grammar.pad_id)
    tail = min(limit, width)  # the last columns, among which are all that predict a token
    hidden, _ = model.apply(
        {"params": params},
        tokens,
        width - fed,
        features=match_features(agent, prompt, tokens),
        tail=tail,
    )
    # Within the tail: the column that predicts the first response token, and those behind it.
    first = tail - fed + prompt_lengths - 1
    at = jnp.minimum(first[:, None] + jnp.arange(limit, dtype=jnp.int32)[None], tail - 1)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    values = model.apply({"params": params}, hidden[:, 0], method="value")
    if config.constrained:
        # Whole tables: no device should ask another what each token does to a state.
        states = jax.vmap(program.whole(grammar).states)(phase, response)
    else:
        states = jnp.zeros_like(response)
    remaining = jnp.broadcast_to(limit - jnp.arange(limit, dtype=jnp.int32), response.shape)

    readout = model.apply({"params": params}, hidden.dtype, method="readout")

    def read(hidden, response, states, remaining):
        """Log-probs, entropies and largest logits of some columns of the response."""
        logits = model.apply({"params": params}, hidden, readout, method="logits")
        if config.constrained:
            mask = jax.vmap(jax.vmap(grammar.allowed))(states, remaining)
        else:
            any_token = jnp.arange(model.config.vocab_size) != grammar.pad_id
            mask = jnp.broadcast_to(any_token, logits.shape)
        mask = program.constrain(mask, "rows", None, "vocab")
        logp = masked_log_softmax(logits, mask, find_scale(temperature))
        chosen = jnp.take_along_axis(logp, response[..., None], axis=2)[..., 0]
        size = jnp.max(jnp.abs(jax.lax.stop_gradient(logits)), axis=-1, where=mask, initial=0.0)
        return chosen, masked_entropy(logp, mask), size / find_scale(temperature)

    columns = (hidden, response, states, remaining)
    log_probs, entropy, largest = _in_chunks(read, columns, config.score_chunk)
    real = jnp.arange(limit)[None, :] < response_lengths[:, None]
    return Scores(
        log_probs=jnp.where(real, log_probs, 0.0),
        entropy=jnp.where(real, entropy, 0.0),
        values=values,
        largest=jnp.where(real, largest, 0.0),
    )


def _in_chunks(function, columns, chunk: int):
    """`function` of arrays [M, R, ...], `chunk` of the R columns at a time; 0 for all at once.

    What it computes is recomputed in the backward pass: no more than one chunk ever exists.
    """
    limit = columns[0].shape[1]
    if chunk == 0 or chunk >= limit:
        return function(*columns)
    count = -(-limit // chunk)

    def split(x):
        pad = [(0, 0), (0, count * chunk - limit)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad).reshape(x.shape[0], count, chunk, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    with jax.named_scope("score_chunks"):
        chunks = jax.lax.map(
            lambda parts: jax.checkpoint(function, prevent_cse=False)(*parts),
            tuple(split(x) for x in columns),
        )
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * chunk)[:, :limit], chunks
    )
