"""From prompts to responses, and from responses to log-probs.

`prefill` reads a batch of prompts and gives a `DecodeState`; `decode_step` adds a token to every
row of it. `generate` is the two in one program: a `lax.while_loop` that ends as soon as every row
has ended. A loop on the host calls the same two, and sees every token in between:

    state = prefill(agent, params, ...)
    decoder = make_decoder(agent, params, temperature)
    for _ in range(agent.sampler.response_length):
        state = decode_step(decoder, state)
    response = make_response(agent, state)

`score` is what the learner calls: the same model, the same grammar mask, the same temperature and
the same `masked_log_softmax`, so that the two agree to float32 rounding. A row's randomness is its
own key folded with the position: it does not depend on the other rows.
"""

import dataclasses
import functools
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from atommem_jax.language import prompt as prompting
from atommem_jax.language.grammar import Grammar
from atommem_jax.model import cpu_decode
from atommem_jax.model.cpu_decode import CpuCache
from atommem_jax.model.transformer import Cache, Transformer
from atommem_jax.parallel import program
from atommem_jax.types import Response

_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Static choices of decoding; the temperature is a traced argument."""

    response_length: int  # R
    constrained: bool = True  # only tokens that the grammar allows
    top_p: float = 1.0
    score_chunk: int = 0  # response tokens whose logits exist at a time while scoring; 0 for all
    cpu_decode: bool = False  # decode as a CPU wants it, see the module of that name

    def validate(self) -> None:
        """Raises ValueError, naming field, value and allowed values."""
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampler.top_p={self.top_p}: allowed is above 0.0 up to 1.0")
        if self.response_length < 2:
            raise ValueError(
                f"sampler.response_length={self.response_length}: must be at least 2 "
                "(one token and the end of sequence)"
            )
        if self.score_chunk < 0:
            raise ValueError(
                f"sampler.score_chunk={self.score_chunk}: allowed are 0 (all at once) and more"
            )


@flax.struct.dataclass
class Agent:
    """What turns a prompt into a response, except the parameters. Static but for the tables."""

    grammar: Grammar
    template: prompting.Template
    model: Transformer = flax.struct.field(pytree_node=False)
    sampler: SamplerConfig = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class DecodeState:
    """Where a batch of rows stands between two tokens.

    What a row may still write follows from `automaton` and `position`; what it has written stands
    in `tokens`. The first four fields stay as they are.
    """

    prompt: Int[Array, "B P"]  # left-padded
    start: Int[Array, " B"]  # column of the prompt's first token
    keys: PRNGKeyArray  # [B], one per row
    values: Float[Array, " B"]  # of the value head at the end of the prompt
    position: Int[Array, ""]  # tokens decided so far, the same number in every row
    hidden: Float[Array, "B width"]  # of the last token: the next one is drawn from it
    cache: Cache | CpuCache  # the latter with `SamplerConfig.cpu_decode`
    automaton: Int[Array, " B"]  # state of the grammar
    done: Bool[Array, " B"]  # the row has ended: it gets padding from now on
    tokens: Int[Array, "B R"]  # pad where none is decided
    log_probs: Float[Array, "B R"]  # 0 where none is decided


@flax.struct.dataclass
class Decoder:
    """What all tokens are decoded with: see `make_decoder`."""

    agent: Agent
    params: Any  # `CpuParams` with `SamplerConfig.cpu_decode`, else as the model has them
    temperature: Float[Array, ""]  # 0 takes the likeliest token
    scale: Float[Array, ""]  # that logits are divided by: the temperature, or 1 where that is 0


@flax.struct.dataclass
class Scores:
    """What the learner knows of the same tokens; 0 on padding."""

    log_probs: Float[Array, "M R"]
    entropy: Float[Array, "M R"]
    values: Float[Array, " M"]


def masked_log_softmax(
    logits: Float[Array, "*batch V"], mask: Bool[Array, "*batch V"], temperature: Array
) -> Float[Array, "*batch V"]:
    """float32 log-probs over the allowed tokens; the others hold a very negative number."""
    logits = jnp.where(mask, logits.astype(jnp.float32) / temperature, _MASKED)
    return jax.nn.log_softmax(logits, axis=-1)


def masked_entropy(logits: Float[Array, "*b V"], mask: Bool[Array, "*b V"]) -> Float[Array, "*b"]:
    """Entropy in nats of softmax over the allowed tokens; 0 where none is allowed.

    Logits that are not allowed may hold anything; an allowed one of -inf has probability zero.
    """
    chex.assert_equal_shape([logits, mask])
    mask = mask & (logits != -jnp.inf)
    logits = logits.astype(jnp.float32)
    largest = jnp.max(logits, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    shifted = jnp.where(mask, logits - largest, 0.0)
    mass = jnp.where(mask, jnp.exp(shifted), 0.0)
    total = jnp.maximum(mass.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
    # H = log Z - E[shifted]; with no token allowed the mass is zero and so is the answer.
    mean = (mass * shifted).sum(axis=-1) / total
    return jnp.where(mask.any(axis=-1), jnp.log(total) - mean, 0.0)


def draw(
    key: PRNGKeyArray, log_probs: Float[Array, " V"], *, temperature: Array, top_p: float
) -> Int[Array, ""]:
    """Samples one token by inverting the cumulative distribution; argmax at temperature 0.

    One uniform number a token, where Gumbel noise would need V. A token of probability 0 is
    never drawn.
    """
    probs = jnp.exp(log_probs)
    if top_p < 1.0:
        ranked = jnp.sort(probs)[::-1]
        before = jnp.cumsum(ranked) - ranked
        least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf))
        probs = jnp.where(probs >= least, probs, 0.0)
    # `cumsum` adds in a tree, so rounding can raise the sum at a token of probability 0.
    cumulative = jnp.where(probs > 0, jnp.cumsum(probs), 0.0)
    threshold = jax.random.uniform(key, dtype=jnp.float32) * jnp.max(cumulative)
    sampled = jnp.argmax(cumulative > threshold)
    return jnp.where(temperature > 0, sampled, jnp.argmax(log_probs)).astype(jnp.int32)


def _effective(temperature: Array) -> Array:
    return jnp.where(temperature > 0, temperature, 1.0).astype(jnp.float32)


def match_features(
    agent: Agent, prompt: Int[Array, "B P"], tokens: Int[Array, "B T"]
) -> Bool[Array, "B T F"] | None:
    """The flags that the model reads beside each token; None where it reads none."""
    if not agent.model.config.num_features:
        return None
    return jax.vmap(prompting.match, in_axes=(None, 0, 0))(agent.template, prompt, tokens)


def prefill(
    agent: Agent,
    params: Any,
    prompt: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    phase: Int[Array, " B"],
    keys: PRNGKeyArray,  # [B], one per row
    skip: Bool[Array, " B"],
) -> DecodeState:
    """Reads each prompt; nothing is decided yet. Rows with `skip` are done from the beginning."""
    model, limit = agent.model, agent.sampler.response_length
    batch, width = prompt.shape
    start = width - prompt_lengths
    with jax.named_scope("prefill"):
        hidden, cache = model.apply(
            {"params": params},
            prompt,
            start,
            features=match_features(agent, prompt, prompt),
            keep_cache=True,
        )
    cache = cache.extend(limit)
    last = hidden[:, -1]
    return DecodeState(
        prompt=prompt,
        start=start,
        keys=keys,
        values=model.apply({"params": params}, last, method="value"),
        position=jnp.zeros((), jnp.int32),
        hidden=last,
        cache=cpu_decode.arrange_cache(cache) if agent.sampler.cpu_decode else cache,
        automaton=jax.vmap(agent.grammar.start)(phase),
        done=skip,
        tokens=jnp.full((batch, limit), agent.grammar.pad_id, jnp.int32),
        log_probs=jnp.zeros((batch, limit), jnp.float32),
    )


def make_decoder(agent: Agent, params: Any, temperature: Float[Array, ""]) -> Decoder:
    """Call it outside of the loop: it may put the parameters in another order."""
    ready = cpu_decode.arrange_params(params) if agent.sampler.cpu_decode else params
    return Decoder(agent, ready, temperature, _effective(temperature))


def decode_step(decoder: Decoder, state: DecodeState) -> DecodeState:
    """Draws the next token of every row that is not done, and feeds it to the model.

    The `position` of the state must be below the response length.
    """
    agent, position = decoder.agent, state.position
    grammar, config = agent.grammar, agent.sampler
    mask = _allow(agent, state.automaton, config.response_length - position)
    logp = masked_log_softmax(_read_out(decoder, state.hidden), mask, decoder.scale)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, position)
    token = jax.vmap(
        lambda k, lp: draw(k, lp, temperature=decoder.temperature, top_p=config.top_p)
    )(row_keys, logp)
    chosen = jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0]
    token = jnp.where(state.done, grammar.pad_id, token)
    chosen = jnp.where(state.done, 0.0, chosen)
    hidden, cache = _feed(decoder, state, token[:, None])
    write = jax.lax.dynamic_update_slice_in_dim
    return state.replace(
        position=position + 1,
        hidden=hidden[:, 0],
        cache=cache,
        automaton=jax.vmap(grammar.advance)(state.automaton, token),
        done=state.done | (token == grammar.eos_id),
        tokens=write(state.tokens, token[:, None], position, 1),
        log_probs=write(state.log_probs, chosen[:, None], position, 1),
    )


def _read_out(decoder: Decoder, hidden: Float[Array, "B width"]) -> Float[Array, "B V"]:
    model = decoder.agent.model
    if decoder.agent.sampler.cpu_decode:
        return cpu_decode.logits(model, decoder.params, hidden)
    return model.apply({"params": decoder.params}, hidden, method="logits")


def _feed(decoder: Decoder, state: DecodeState, token: Int[Array, "B 1"]):
    """Hidden states of the token [B 1 width], and the cache with it."""
    model = decoder.agent.model
    inputs = {
        "features": match_features(decoder.agent, state.prompt, token),
        "cache": state.cache,
        "index": state.prompt.shape[1] + state.position,
    }
    if decoder.agent.sampler.cpu_decode:
        return cpu_decode.forward(model, decoder.params, token, state.start, **inputs)
    return model.apply({"params": decoder.params}, token, state.start, **inputs)


def _allow(agent: Agent, automaton: Int[Array, " B"], remaining: Array) -> Bool[Array, "B V"]:
    """Tokens that each row may write next, with room for `remaining` of them."""
    if agent.sampler.constrained:
        return jax.vmap(agent.grammar.allowed, in_axes=(0, None))(automaton, remaining)
    any_token = jnp.arange(agent.model.config.vocab_size) != agent.grammar.pad_id
    return jnp.broadcast_to(any_token, (automaton.shape[0], any_token.shape[0]))


def make_response(agent: Agent, state: DecodeState) -> Response:
    """What the rows have written."""
    return Response(
        tokens=state.tokens,
        lengths=jnp.sum(state.tokens != agent.grammar.pad_id, axis=1).astype(jnp.int32),
        log_probs=state.log_probs,
        values=state.values,
        scripted=jnp.zeros(state.done.shape, bool),
    )


def generate(
    agent: Agent,
    params: Any,
    prompt: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    phase: Int[Array, " B"],
    keys: PRNGKeyArray,  # [B], one per row
    temperature: Float[Array, ""],
    skip: Bool[Array, " B"],
) -> Response:
    """Answers each prompt. Rows with `skip` come back empty and do not keep the loop alive.

    temperature: traced scalar; 0 takes the likeliest token (log-probs are then those at 1).
    """
    state = prefill(agent, params, prompt, prompt_lengths, phase, keys, skip)
    decoder = make_decoder(agent, params, temperature)

    def keep_going(state: DecodeState) -> Bool[Array, ""]:
        return (state.position < agent.sampler.response_length) & ~jnp.all(state.done)

    with jax.named_scope("decode"):
        state = jax.lax.while_loop(keep_going, functools.partial(decode_step, decoder), state)
    return make_response(agent, state)


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
    hidden, _ = model.apply(
        {"params": params}, tokens, width - fed, features=match_features(agent, prompt, tokens)
    )
    first = width - fed + prompt_lengths - 1  # the column that predicts the first response token
    at = jnp.minimum(first[:, None] + jnp.arange(limit, dtype=jnp.int32)[None], width - 1)
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
        """Log-probs and entropies of some columns of the response."""
        logits = model.apply({"params": params}, hidden, readout, method="logits")
        if config.constrained:
            mask = jax.vmap(jax.vmap(grammar.allowed))(states, remaining)
        else:
            any_token = jnp.arange(model.config.vocab_size) != grammar.pad_id
            mask = jnp.broadcast_to(any_token, logits.shape)
        mask = program.constrain(mask, "rows", None, "vocab")
        logp = masked_log_softmax(logits, mask, _effective(temperature))
        chosen = jnp.take_along_axis(logp, response[..., None], axis=2)[..., 0]
        return chosen, masked_entropy(logp, mask)

    columns = (hidden, response, states, remaining)
    log_probs, entropy = _in_chunks(read, columns, config.score_chunk)
    real = jnp.arange(limit)[None, :] < response_lengths[:, None]
    return Scores(
        log_probs=jnp.where(real, log_probs, 0.0),
        entropy=jnp.where(real, entropy, 0.0),
        values=values,
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
