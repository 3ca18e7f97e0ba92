"""From prompts to responses.

`prefill` reads a batch of prompts and draws the first token of each response; `decode_step` is one
forward pass more, and adds a token to every row, or several where they were guessed. `generate` is
the two in one program: a `lax.while_loop` that ends as soon as every row has ended. A loop on the
host calls the same two, and sees every token in between:

    decoder = make_decoder(agent, params, temperature)
    state = prefill(decoder, ...)
    while not state.done.all():
        state = decode_step(decoder, state)
    response = make_response(state)

A row's randomness is its own key folded with the position: it does not depend on the other rows.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from atommem_jax.language import prompt as prompting
from atommem_jax.language.grammar import Grammar
from atommem_jax.model import cpu_decode, drafts
from atommem_jax.model.cpu_decode import CpuCache
from atommem_jax.model.distribution import draw, find_scale, masked_log_softmax
from atommem_jax.model.kv_cache import Cache, Prefix
from atommem_jax.model.quantized import INT8
from atommem_jax.model.transformer import Transformer
from atommem_jax.parallel import program
from atommem_jax.types import Response


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Static choices of decoding; the temperature is a traced argument."""

    response_length: int  # R
    constrained: bool = True  # only tokens that the grammar allows
    top_p: float = 1.0
    score_chunk: int = 0  # response tokens whose logits exist at a time while scoring; 0 for all
    cpu_decode: bool = False  # decode as a CPU wants it, see the module of that name
    cache_prefix: bool = False  # read what prompts begin with once, see `prefix`
    draft: int = 0  # tokens guessed and checked in a forward pass, see `drafts`
    group: int = 0  # rows answered at a time, see `groups`; 0 for all
    prompt_buckets: tuple[int, ...] = (8,)  # eighths of the prompt's width that rows are read at
    least_rows: int = 0  # a group is halved as its rows end, down to so many; 0: never
    cache_dtype: str = ""  # of keys and values: "int8", or "" for what the model computes in
    read_rows: int = 0  # rows of a group whose prompts are read at a time; 0 for all

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
        if self.draft < 0:
            raise ValueError(f"sampler.draft={self.draft}: allowed are 0 (no guesses) and more")
        if self.cache_dtype not in ("", INT8):
            raise ValueError(
                f"sampler.cache_dtype={self.cache_dtype!r}: allowed are '' (that of the model) and "
                f"{INT8!r}"
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
    """Where a batch of rows stands between two forward passes.

    What a row may still write follows from `automaton` and `written`; what it has written stands in
    `tokens`. The last of them has been decided, and not yet been fed to the model. The first five
    fields stay as they are.
    """

    prompt: Int[Array, "B P"]  # left-padded
    lengths: Int[Array, " B"]  # of the prompts
    start: Int[Array, " B"]  # first slot of the cache that holds a token of the row
    keys: PRNGKeyArray  # [B], one per row
    values: Float[Array, " B"]  # of the value head at the end of the prompt
    cache: Cache | CpuCache  # the latter with `SamplerConfig.cpu_decode`
    automaton: Int[Array, " B"]  # state of the grammar after what is written
    done: Bool[Array, " B"]  # the row has ended
    written: Int[Array, " B"]  # tokens decided so far; the same in all rows without drafts
    passes: Int[Array, " B"]  # forward passes that decided them
    lanes: Int[Array, " B"]  # forward passes that the row was in, ended or not
    tokens: Int[Array, "B R"]  # pad where none is decided
    log_probs: Float[Array, "B R"]  # 0 where none is decided


@flax.struct.dataclass
class Decoder:
    """What all tokens are decoded with: see `make_decoder`."""

    agent: Agent
    params: Any  # `CpuParams` with `SamplerConfig.cpu_decode`, else as the model has them
    temperature: Float[Array, ""]  # 0 takes the likeliest token
    scale: Float[Array, ""]  # that logits are divided by: the temperature, or 1 where that is 0

    @property
    def whole_params(self) -> Any:
        """As the model has them."""
        return self.params.whole if self.agent.sampler.cpu_decode else self.params


def match_features(
    agent: Agent, prompt: Int[Array, "B P"], tokens: Int[Array, "B T"]
) -> Bool[Array, "B T F"] | None:
    """The flags that the model reads beside each token; None where it reads none."""
    if not agent.model.config.num_features:
        return None
    return jax.vmap(prompting.match, in_axes=(None, 0, 0))(agent.template, prompt, tokens)


def prefill(
    decoder: Decoder,
    prompt: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    phase: Int[Array, " B"],
    keys: PRNGKeyArray,  # [B], one per row
    skip: Bool[Array, " B"],
    width: int | None = None,
    prefix: Prefix | None = None,
) -> DecodeState:
    """Reads each prompt and draws the first token. Rows with `skip` are done from the beginning.

    width: last columns of the prompts, which hold all that is to be read; None for P.
    prefix: what the prompts begin with and has been read; the rest is to be read.
    """
    agent, config = decoder.agent, decoder.agent.sampler
    batch, full = prompt.shape
    width = full if width is None else width
    if prefix is None:  # nothing before these columns is looked at
        prompt, full = prompt[:, full - width :], width
    start = width - prompt_lengths + (0 if prefix is None else prefix.length)
    with jax.named_scope("prefill"):
        last, cache = _read_in_parts(decoder, prompt, width, start, prefix)
    cache = cache.extend(config.response_length + config.draft)
    none = jnp.zeros((batch,), jnp.int32)
    state = DecodeState(
        prompt=prompt,
        lengths=prompt_lengths,
        start=start,
        keys=keys,
        values=agent.model.apply({"params": decoder.whole_params}, last[:, 0], method="value"),
        cache=cpu_decode.arrange_cache(cache) if config.cpu_decode else cache,
        automaton=jax.vmap(agent.grammar.start)(phase),
        done=skip,
        written=none,
        passes=none,
        lanes=none,
        tokens=jnp.full((batch, config.response_length), agent.grammar.pad_id, jnp.int32),
        log_probs=jnp.zeros((batch, config.response_length), jnp.float32),
    )
    return _decide(decoder, state, last, jnp.zeros((batch, 0), jnp.int32))


def _read_in_parts(
    decoder: Decoder, prompt: Array, width: int, start: Array, prefix: Prefix | None
):
    """`_read`, `SamplerConfig.read_rows` of the rows at a time: activations of no more exist."""
    rows, batch = decoder.agent.sampler.read_rows, prompt.shape[0]
    if not 0 < rows < batch:
        return _read(decoder, prompt, width, start, prefix)

    def read(first: Array):
        """The last `rows` rows from `first` on: the last part may overlap the one before."""
        chosen = first + jnp.arange(rows, dtype=jnp.int32)
        part = take_rows((prompt, start, prefix), chosen)
        last, cache = _read(decoder, part[0], width, part[1], part[2])
        return last, cache.replace(prefix=None)

    shapes = jax.eval_shape(read, jnp.zeros((), jnp.int32))
    room = jax.tree.map(
        lambda x: jnp.zeros(
            [batch if i == _row_axis(x) else n for i, n in enumerate(x.shape)], x.dtype
        ),
        shapes,
    )

    def body(i, room):
        first = jnp.minimum(i * rows, batch - rows)
        return jax.tree.map(
            lambda all_, new: jax.lax.dynamic_update_slice_in_dim(all_, new, first, _row_axis(new)),
            room,
            read(first),
        )

    last, cache = jax.lax.fori_loop(0, -(-batch // rows), body, room)
    return last, cache.replace(prefix=prefix)


def _read(decoder: Decoder, prompt: Array, width: int, start: Array, prefix: Prefix | None):
    """The model's reading of the last `width` columns of the prompts."""
    agent, first = decoder.agent, prompt.shape[1] - width
    shift = agent.model.config.token_shift
    recent = jnp.pad(prompt, ((0, 0), (shift, 0)), constant_values=agent.grammar.pad_id)
    return agent.model.apply(
        {"params": decoder.whole_params},
        prompt[:, first:],
        start,
        features=match_features(agent, prompt, prompt[:, first:]),
        recent=recent[:, first : first + shift],
        prefix=prefix,
        cache_dtype=agent.sampler.cache_dtype,
        method="read",
    )


def make_decoder(agent: Agent, params: Any, temperature: Float[Array, ""]) -> Decoder:
    """Call it outside of the loop: it may put the parameters in another order."""
    ready = cpu_decode.arrange_params(params) if agent.sampler.cpu_decode else params
    return Decoder(agent, ready, temperature, find_scale(temperature))


def decode_step(decoder: Decoder, state: DecodeState) -> DecodeState:
    """One forward pass: feeds every row what it wrote last, and draws what follows.

    With `SamplerConfig.draft` it feeds guesses behind it (see `drafts`), and a row gets one token
    more for each guess that is what would have been drawn there.
    """
    guesses = _guess(decoder.agent, state)
    at_last = jnp.maximum(state.written - 1, 0)[:, None]
    last = jnp.take_along_axis(state.tokens, at_last, axis=1)
    fed = jnp.concatenate([last, guesses], axis=1)
    recent = jnp.concatenate([state.cache.recent, fed], axis=1)
    hidden, cache = _feed(decoder, state, fed)
    before = state.written
    state = _decide(decoder, state.replace(cache=cache), hidden, guesses)
    if not guesses.shape[1]:
        return state
    # Of what was fed, what stays is as much as was decided.
    columns = (state.written - before)[:, None] + jnp.arange(cache.recent.shape[1])[None]
    recent = jnp.take_along_axis(recent, columns, axis=1)
    return state.replace(cache=cache.replace(recent=recent))


def _guess(agent: Agent, state: DecodeState) -> Int[Array, "B D"]:
    """Guesses at the tokens after those written."""
    count = agent.sampler.draft
    if not count:
        return jnp.zeros((state.done.shape[0], 0), jnp.int32)
    grammar = agent.grammar if agent.sampler.constrained else None
    propose = jax.vmap(functools.partial(drafts.propose, grammar, count=count))
    with jax.named_scope("draft"):
        start = state.prompt.shape[1] - state.lengths
        return propose(state.prompt, start, state.tokens, state.written, state.automaton)


def _decide(
    decoder: Decoder,
    state: DecodeState,
    hidden: Float[Array, "B D+1 width"],
    guesses: Int[Array, "B D"],
) -> DecodeState:
    """Draws the tokens that follow the last one written and each guess, as far as those hold."""
    agent, limit = decoder.agent, decoder.agent.sampler.response_length
    grammar, count = agent.grammar, hidden.shape[1]
    automata = [state.automaton]
    for i in range(count - 1):
        automata.append(jax.vmap(grammar.advance)(automata[-1], guesses[:, i]))
    before = jnp.stack(automata, axis=1)
    position = state.written[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    # Each device draws for some rows, with all of their logits: sums over a vocabulary that lies on
    # several would send it to all of them. Before and after, rows are everywhere.
    keys, before, position = program.whole((state.keys, before, position))
    mask = _allow(agent, before, jnp.maximum(limit - position, 1))
    logits = program.constrain(_read_out(decoder, hidden), "draws", None, None)
    mask = program.constrain(mask, "draws", None, None)
    logp = masked_log_softmax(logits, mask, decoder.scale)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
    pick = functools.partial(draw, temperature=decoder.temperature, top_p=agent.sampler.top_p)
    token = jax.vmap(jax.vmap(pick))(fold(keys, position), logp)
    chosen = jnp.take_along_axis(logp, token[..., None], axis=2)[..., 0]
    token, chosen = program.whole((token, chosen))

    # A token counts if all before it were guessed, and none of them ended the row.
    goes_on = (token[:, :-1] == guesses) & (token[:, :-1] != grammar.eos_id)
    decided = 1 + jnp.sum(jnp.cumprod(goes_on, axis=1), axis=1, dtype=jnp.int32)
    decided = jnp.where(state.done, 0, jnp.minimum(decided, limit - state.written))
    written = state.written + decided
    place = jnp.arange(limit, dtype=jnp.int32)[None] - state.written[:, None]
    new = (place >= 0) & (place < decided[:, None])
    place = jnp.clip(place, 0, count - 1)

    def last(x: Array) -> Array:
        return jnp.take_along_axis(x, jnp.maximum(decided - 1, 0)[:, None], axis=1)[:, 0]

    after = jax.vmap(grammar.advance)(last(before), last(token))
    ended = (last(token) == grammar.eos_id) | (written >= limit)
    return state.replace(
        automaton=jnp.where(state.done, state.automaton, after),
        done=state.done | ended,
        written=written,
        passes=state.passes + (~state.done).astype(jnp.int32),
        lanes=state.lanes + 1,
        tokens=jnp.where(new, jnp.take_along_axis(token, place, axis=1), state.tokens),
        log_probs=jnp.where(new, jnp.take_along_axis(chosen, place, axis=1), state.log_probs),
    )


def _read_out(decoder: Decoder, hidden: Float[Array, "B T width"]) -> Float[Array, "B T V"]:
    model = decoder.agent.model
    if decoder.agent.sampler.cpu_decode:
        return cpu_decode.logits(model, decoder.params, hidden)
    return model.apply({"params": decoder.params}, hidden, method="logits")


def _feed(decoder: Decoder, state: DecodeState, tokens: Int[Array, "B T"]):
    """Hidden states of the tokens [B T width], and the cache with them."""
    agent = decoder.agent
    # Rows keep step where nothing is guessed: they write the same slot.
    written = state.written if agent.sampler.draft else jnp.max(state.written)
    features = match_features(agent, state.prompt, tokens)
    tokens, start, written, features, recent = program.whole(
        (tokens, state.start, written, features, state.cache.recent)
    )
    inputs = {
        "features": features,
        "cache": state.cache.replace(recent=recent),
        "index": state.cache.prompt_slots + jnp.maximum(written - 1, 0),
    }
    if agent.sampler.cpu_decode:
        return cpu_decode.forward(agent.model, decoder.params, tokens, start, **inputs)
    return agent.model.apply({"params": decoder.params}, tokens, start, **inputs)


def _allow(
    agent: Agent, automata: Int[Array, "B T"], remaining: Int[Array, "B T"]
) -> Bool[Array, "B T V"]:
    """Tokens that may be written next in each state, with room for `remaining` of them."""
    if agent.sampler.constrained:
        return jax.vmap(jax.vmap(agent.grammar.allowed))(automata, remaining)
    any_token = jnp.arange(agent.model.config.vocab_size) != agent.grammar.pad_id
    return jnp.broadcast_to(any_token, (*automata.shape, any_token.shape[0]))


def make_response(state: DecodeState) -> Response:
    """What the rows have written."""
    none = jnp.zeros(state.done.shape, bool)
    return Response(
        tokens=state.tokens,
        lengths=state.written,
        log_probs=state.log_probs,
        values=state.values,
        scripted=none,
        passes=state.passes,
        lanes=state.lanes,
        width=jnp.full(none.shape, state.cache.prompt_slots, jnp.int32),
    )


def generate(
    decoder: Decoder,
    prompt: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    phase: Int[Array, " B"],
    keys: PRNGKeyArray,  # [B], one per row
    skip: Bool[Array, " B"],
    width: int | None = None,
    prefix: Prefix | None = None,
) -> Response:
    """Answers each prompt. Rows with `skip` come back empty and do not keep the loop alive.

    width, prefix: as for `prefill`.
    """
    state = prefill(decoder, prompt, prompt_lengths, phase, keys, skip, width, prefix)
    with jax.named_scope("decode"):
        return make_response(_decode(decoder, state, decoder.agent.sampler.least_rows))


def _decode(decoder: Decoder, state: DecodeState, least: int) -> DecodeState:
    """Decodes until every row has ended, with half of the rows once half of them have."""
    rows = state.done.shape[0]
    half = -(-rows // 2) if 0 < least <= -(-rows // 2) < rows else 0
    state = jax.lax.while_loop(
        lambda state: jnp.sum(~state.done) > half, functools.partial(decode_step, decoder), state
    )
    if not half:
        return state
    going_on = jnp.argsort(state.done, stable=True)[:half]
    # Nothing reads the cache of a row that has ended: what went on keeps its own.
    rest = _decode(decoder, take_rows(state, going_on), least)

    def put_back(name: str) -> Array:
        return getattr(state, name).at[going_on].set(getattr(rest, name))

    changed = ("automaton", "done", "written", "passes", "lanes", "tokens", "log_probs")
    return state.replace(**{name: put_back(name) for name in changed})


def take_rows(tree: Any, rows: Int[Array, " M"]) -> Any:
    """Some rows of a state or the like: of keys and values, the fourth axis from the end.

    So it is of their scales, which keep the axis that shares one.
    """

    return jax.tree.map(lambda x: jnp.take(x, rows, axis=_row_axis(x)), tree)


def _row_axis(x: Any) -> int:
    """Of a state's array: of keys and values it is the fourth from the end."""
    return max(x.ndim - 4, 0)
