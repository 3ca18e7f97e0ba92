"""Sampler and learner agree on every token, and tokens come from the distribution they claim."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.model import distribution, sampling, scoring
from atommem_jax.model.sampling import SamplerConfig
from atommem_jax.model.transformer import Transformer, init_params
from atommem_jax.types import Phase
from tests.helpers import tiny

ROWS, PROMPT, RESPONSE = 6, 12, 12


@functools.cache
def make_agent(constrained=True, top_p=1.0, **how):
    sampler = SamplerConfig(RESPONSE, constrained=constrained, top_p=top_p, **how)
    return tiny.make_parts().agent.replace(sampler=sampler)


@functools.cache
def make_params():
    return tiny.make_params(scale=0.3)


@functools.cache
def make_prompts():
    """(prompts, lengths, phases): headers and text in random order, left-padded."""
    rng = np.random.default_rng(0)
    template = make_agent().template
    text = np.flatnonzero(np.asarray(template.is_text))
    headers = np.concatenate(
        [template.question, template.query, template.memory[:, 0], template.chunk]
    )
    lengths = np.array([PROMPT, 9, 5, 2, 7, PROMPT], np.int32)
    tokens = rng.choice(np.concatenate([text[:40], np.repeat(headers, 5)]), (ROWS, PROMPT))
    padding = np.arange(PROMPT)[None] < PROMPT - lengths[:, None]
    prompts = np.where(padding, template.pad_id, tokens).astype(np.int32)
    phases = np.array([0, 1, 2, 0, 1, 2], np.int32)
    return prompts, lengths, phases


@jax.jit
def generate(agent, params, prompt, lengths, phase, keys, temperature, skip):
    decoder = sampling.make_decoder(agent, params, temperature)
    return sampling.generate(decoder, prompt, lengths, phase, keys, skip)


@jax.jit
def score(agent, params, prompt, lengths, response, temperature, phase):
    return scoring.score(
        agent, params, prompt, lengths, response.tokens, response.lengths, phase, temperature
    )


def make_keys(seed=0):
    return jax.random.split(jax.random.key(seed), ROWS)


def answer(agent, temperature=1.0, keys=None, skip=None):
    """Responses to the prompts of `make_prompts`."""
    keys = make_keys() if keys is None else keys
    skip = np.zeros(ROWS, bool) if skip is None else skip
    return generate(agent, make_params(), *make_prompts(), keys, jnp.float32(temperature), skip)


def distributions(agent, response, temperature=1.0):
    """log-probs [B R V] of every token, from one full forward pass without a cache."""
    prompts, lengths, phases = make_prompts()
    tokens = jnp.concatenate([prompts, response.tokens], axis=1)
    params = {"params": make_params()}
    hidden, _ = agent.model.apply(
        params,
        tokens,
        PROMPT - lengths,
        features=sampling.match_features(agent, prompts, tokens),
    )
    logits = agent.model.apply(params, hidden[:, PROMPT - 1 : -1], method="logits") / temperature
    mask = np.ones(logits.shape, bool)
    if agent.sampler.constrained:
        mask = np.asarray(jax.vmap(agent.grammar.masks)(phases, response.tokens))
    else:
        mask[..., agent.grammar.pad_id] = False
    logits = np.where(mask, np.asarray(logits, np.float64), -np.inf)
    total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    return logits - logits.max(-1, keepdims=True) - total


def written(response):
    return np.arange(RESPONSE)[None] < np.asarray(response.lengths)[:, None]


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_learner_log_probs_equal_the_samplers(constrained, temperature):
    agent = make_agent(constrained)
    prompts, lengths, phases = make_prompts()
    response = answer(agent, temperature)
    scores = score(
        agent, make_params(), prompts, lengths, response, jnp.float32(temperature), phases
    )

    assert response.log_probs.dtype == scores.log_probs.dtype == jnp.float32
    np.testing.assert_allclose(scores.log_probs, response.log_probs, atol=1e-5)
    np.testing.assert_allclose(scores.values, response.values, atol=1e-5)
    assert not np.asarray(scores.log_probs)[~written(response)].any()
    assert not np.asarray(scores.entropy)[~written(response)].any()

    # Both against the softmax written out, so that they cannot be wrong together.
    expected = distributions(agent, response, temperature)
    chosen = np.take_along_axis(expected, np.asarray(response.tokens)[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(
        np.asarray(response.log_probs)[written(response)], chosen[written(response)], atol=1e-4
    )
    probs = np.exp(expected)
    entropy = -(probs * np.where(probs > 0, expected, 0.0)).sum(-1)
    np.testing.assert_allclose(
        np.asarray(scores.entropy)[written(response)], entropy[written(response)], atol=1e-4
    )


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_decoding_as_a_cpu_wants_it_changes_nothing(qkv_bias):
    agents = make_agent(), make_agent(cpu_decode=True)
    params = make_params()
    if qkv_bias:
        config = dataclasses.replace(agents[0].model.config, qkv_bias=True)
        agents = [agent.replace(model=Transformer(config)) for agent in agents]
        params = tiny.disturb(init_params(agents[0].model, jax.random.key(1)), 0.3)
        assert np.abs(params["layers"]["query"]["bias"]).max() > 0.3
    how = make_keys(), jnp.float32(1.0), np.zeros(ROWS, bool)
    expected, found = (generate(agent, params, *make_prompts(), *how) for agent in agents)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    # Two programs, each with its own order of sums: a few units in the last place of what they add.
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constrained", [True, False])
def test_greedy_takes_the_likeliest_token_whatever_the_key(constrained):
    agent = make_agent(constrained)
    response = answer(agent, temperature=0.0)
    other = answer(agent, temperature=0.0, keys=make_keys(seed=1))
    np.testing.assert_array_equal(response.tokens, other.tokens)

    expected = distributions(agent, response)
    real = written(response)
    np.testing.assert_array_equal(np.asarray(response.tokens)[real], expected.argmax(-1)[real])
    # At temperature 0 the log-probs are those at 1.
    np.testing.assert_allclose(
        np.asarray(response.log_probs)[real], expected.max(-1)[real], atol=1e-4
    )


def test_constrained_turns_are_well_formed_and_end():
    agent = make_agent()
    for seed in range(3):
        response = answer(agent, keys=make_keys(seed))
        for tokens, length, phase in zip(
            np.asarray(response.tokens), response.lengths, make_prompts()[2], strict=True
        ):
            length = int(length)
            assert tokens[length - 1] == agent.grammar.eos_id
            assert not (tokens[: length - 1] == agent.grammar.eos_id).any()
            assert (tokens[length:] == agent.grammar.pad_id).all()
            actions = agent.grammar.parse(tokens, length)
            count = int(actions.count)
            assert np.asarray(actions.well_formed)[:count].all()
            assert count >= (phase != Phase.READING)


def test_free_text_never_holds_padding_before_its_end():
    response = answer(make_agent(constrained=False), temperature=0.7)
    tokens = np.asarray(response.tokens)
    np.testing.assert_array_equal(tokens != make_agent().grammar.pad_id, written(response))


def test_rows_do_not_depend_on_their_neighbours():
    agent = make_agent()
    prompts, lengths, phases = make_prompts()
    first = answer(agent)
    order = np.array([3, 0, 5, 1, 4, 2])
    permuted = generate(
        agent,
        make_params(),
        prompts[order],
        lengths[order],
        phases[order],
        make_keys()[order],
        jnp.float32(1.0),
        np.zeros(ROWS, bool),
    )
    for ours, theirs in zip(jax.tree.leaves(first), jax.tree.leaves(permuted), strict=True):
        np.testing.assert_array_equal(np.asarray(ours)[order], theirs)

    # Others in the batch: row 0 stays, the rest is replaced by copies of row 3 with other keys.
    rows = np.array([0, 3, 3, 3, 3, 3])
    keys = jnp.concatenate([make_keys()[:1], make_keys(seed=9)[1:]])
    replaced = generate(
        agent,
        make_params(),
        prompts[rows],
        lengths[rows],
        phases[rows],
        keys,
        jnp.float32(1.0),
        np.zeros(ROWS, bool),
    )
    np.testing.assert_array_equal(first.tokens[0], replaced.tokens[0])
    np.testing.assert_array_equal(first.log_probs[0], replaced.log_probs[0])
    assert len(np.unique(np.asarray(replaced.tokens[1:]), axis=0)) > 1


def test_skipped_rows_come_back_empty_and_change_nothing():
    agent = make_agent()
    skip = np.array([False, True, False, True, False, False])
    response, full = answer(agent, skip=skip), answer(agent)
    np.testing.assert_array_equal(response.lengths[skip], 0)
    np.testing.assert_array_equal(response.tokens[skip], agent.grammar.pad_id)
    np.testing.assert_array_equal(response.log_probs[skip], 0.0)
    np.testing.assert_array_equal(response.tokens[~skip], full.tokens[~skip])
    np.testing.assert_array_equal(response.log_probs[~skip], full.log_probs[~skip])


# ---------------------------------------------------------------------------------------------
# Token by token


prefill = jax.jit(sampling.prefill)
make_decoder = jax.jit(sampling.make_decoder)
decode_step = jax.jit(sampling.decode_step)


def step_through(agent, temperature=1.0, skip=None):
    """The states of a loop on the host: after the prompt, and after each pass that followed."""
    skip = np.zeros(ROWS, bool) if skip is None else skip
    decoder = make_decoder(agent, make_params(), jnp.float32(temperature))
    states = [prefill(decoder, *make_prompts(), make_keys(), skip)]
    while not np.asarray(states[-1].done).all():
        states.append(decode_step(decoder, states[-1]))
    return states


@pytest.mark.parametrize("cpu_decode", [False, True])
@pytest.mark.parametrize("constrained", [True, False])
def test_a_loop_on_the_host_writes_what_generate_writes(constrained, cpu_decode):
    agent = make_agent(constrained, cpu_decode=cpu_decode)
    skip = np.array([False, True, False, False, False, False])
    found = sampling.make_response(step_through(agent, temperature=0.7, skip=skip)[-1])
    expected = answer(agent, temperature=0.7, skip=skip)
    for name in ("tokens", "lengths", "scripted", "passes", "lanes", "width"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    # Two programs, each with its own order of sums.
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6, atol=1e-6)


def test_a_state_says_where_every_row_stands():
    agent = make_agent()
    _, lengths, phases = make_prompts()
    response = answer(agent)
    states = step_through(agent)
    for position, state in enumerate(states, start=1):
        np.testing.assert_array_equal(state.written, np.minimum(response.lengths, position))
        np.testing.assert_array_equal(state.passes, state.written)
        so_far = np.where(np.arange(RESPONSE) < position, response.tokens, agent.grammar.pad_id)
        np.testing.assert_array_equal(state.tokens, so_far)
        np.testing.assert_array_equal(state.done, np.asarray(response.lengths) <= position)
        assert not np.asarray(state.log_probs)[:, position:].any()
        np.testing.assert_array_equal(state.start, PROMPT - lengths)
    automaton = jax.vmap(agent.grammar.states)(phases, response.tokens)
    for position, state in enumerate(states[:-1], start=1):
        live = ~np.asarray(state.done)
        np.testing.assert_array_equal(
            np.asarray(state.automaton)[live], np.asarray(automaton)[live, position]
        )


def test_decoding_goes_on_from_a_state_that_was_put_aside():
    """A host may stop and go on: a state is all that decoding needs."""
    agent = make_agent()
    states = step_through(agent)
    kept = jax.device_get(dataclasses.replace(states[4], keys=jax.random.key_data(states[4].keys)))
    state = jax.device_put(dataclasses.replace(kept, keys=jax.random.wrap_key_data(kept.keys)))
    decoder = make_decoder(agent, make_params(), jnp.float32(1.0))
    for expected in states[5:]:
        state = decode_step(decoder, state)
        np.testing.assert_array_equal(state.tokens, expected.tokens)
        np.testing.assert_array_equal(state.log_probs, expected.log_probs)


@pytest.mark.parametrize("draft", [0, 3])
def test_a_pass_changes_nothing_of_rows_that_have_ended(draft):
    agent = make_agent(draft=draft)
    states = step_through(agent)
    decoder = make_decoder(agent, make_params(), jnp.float32(1.0))
    before, after = states[-1], decode_step(decoder, states[-1])
    assert np.asarray(before.done).all()
    for name in ("tokens", "log_probs", "written", "passes", "done"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name), err_msg=name)


CALLS: list[int] = []


class CountingTransformer(Transformer):
    """Notes the width of every forward pass when it is executed."""

    def __call__(self, tokens, *args, **kwargs):
        jax.debug.callback(CALLS.append, tokens.shape[1])
        return super().__call__(tokens, *args, **kwargs)

    def read(self, tokens, *args, **kwargs):
        jax.debug.callback(CALLS.append, tokens.shape[1])
        return super().read(tokens, *args, **kwargs)


def test_decoding_stops_when_every_row_has_ended():
    agent = make_agent()
    config = dataclasses.replace(agent.model.config, tie_embeddings=False)
    agent = agent.replace(model=CountingTransformer(config))
    prompts, lengths, _ = make_prompts()
    params = jax.tree.map(jnp.zeros_like, make_params())
    # A constant hidden state of ones, from which the head prefers closing a tag over ending.
    ones = jnp.ones((config.vocab_size, config.width), jnp.float32)
    params["embedder"]["embedding"] = ones
    params["final_norm"]["scale"] = jnp.ones_like(params["final_norm"]["scale"])
    close = tiny.make_tokenizer().reserved["<end>"]
    head = jnp.zeros((config.width, config.vocab_size), jnp.float32)
    params["head"] = head.at[:, agent.grammar.eos_id].set(10.0).at[:, close].set(20.0)

    def passes(skip):
        CALLS.clear()
        response = generate(
            agent,
            params,
            prompts,
            lengths,
            np.full(ROWS, Phase.FINAL, np.int32),
            make_keys(),
            jnp.float32(1.0),
            np.asarray(skip),
        )
        jax.block_until_ready(response)
        jax.effects_barrier()
        return response, sorted(CALLS, reverse=True)

    response, calls = passes([False] * ROWS)
    # <answer>, one word, <end>, end of sequence: four tokens of the twelve allowed, of which the
    # prompt gives the first and the last is fed to nothing.
    np.testing.assert_array_equal(response.lengths, 4)
    np.testing.assert_array_equal(response.passes, 4)
    assert calls == [PROMPT, 1, 1, 1]

    response, calls = passes([True] * ROWS)
    np.testing.assert_array_equal(response.lengths, 0)
    assert calls == [PROMPT]


# ---------------------------------------------------------------------------------------------
# Drawing one token


@functools.partial(jax.jit, static_argnames="top_p")
def draw_many(keys, log_probs, temperature, top_p=1.0):
    return jax.vmap(
        lambda key: distribution.draw(key, log_probs, temperature=temperature, top_p=top_p)
    )(keys)


def frequencies(probs, draws=20_000, top_p=1.0):
    with np.errstate(divide="ignore"):
        log_probs = jnp.asarray(np.log(probs), jnp.float32)
    keys = jax.random.split(jax.random.key(5), draws)
    drawn = draw_many(keys, log_probs, jnp.float32(1.0), top_p=top_p)
    return np.bincount(np.asarray(drawn), minlength=len(probs))


def check_chi_square(counts, probs):
    """Pearson's statistic within five standard deviations of its mean; never an impossible one."""
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected = probs[possible] / probs.sum() * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 1


def test_draws_follow_the_distribution():
    probs = np.array([0.0, 0.3, 0.05, 0.0, 0.2, 0.01, 0.44, 0.0])
    check_chi_square(frequencies(probs), probs)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, [3]),
        (0.5, [3, 1]),  # 0.4 does not suffice, 0.4 + 0.3 does
        (0.75, [3, 1, 4]),
        (0.95, [3, 1, 4, 0]),
    ],
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p, kept):
    probs = np.array([0.08, 0.3, 0.02, 0.4, 0.2])
    expected = np.where(np.isin(np.arange(5), kept), probs, 0.0)
    counts = frequencies(probs, top_p=top_p)
    assert set(np.flatnonzero(counts)) == set(kept)
    check_chi_square(counts, expected)


def test_top_p_bounds_what_generate_writes():
    agent = make_agent(top_p=0.5)
    response = answer(agent)
    probs = np.exp(distributions(agent, response))
    chosen = np.take_along_axis(probs, np.asarray(response.tokens)[..., None], axis=2)
    better = np.where(probs > chosen, probs, 0.0).sum(-1)
    assert (better[written(response)] < 0.5).all()


def test_no_uniform_number_draws_an_impossible_token(monkeypatch):
    # Sums of floats depend on their order, and `cumsum` does not promise one: a token of
    # probability 0 may lie on a step that rounding made. So try numbers around every step.
    monkeypatch.setattr(jax.random, "uniform", lambda key, dtype: key.astype(dtype))

    @jax.jit
    def draw(numbers, log_probs):
        return jax.vmap(
            lambda u: distribution.draw(u, log_probs, temperature=jnp.float32(1.0), top_p=1.0)
        )(numbers)

    rng = np.random.default_rng(0)
    size = 640
    for _ in range(20):
        probs = rng.exponential(size=size) * (rng.random(size) < 0.5)
        probs = (probs / probs.sum()).astype(np.float32)
        with np.errstate(divide="ignore"):
            log_probs = np.log(probs)
        steps = np.asarray(jnp.cumsum(jnp.exp(log_probs)), np.float64)
        grid = np.floor(steps / steps[-1] * 2**23)  # `uniform` gives multiples of 2**-23
        numbers = np.concatenate([grid + k for k in (-1, 0, 1)]) / 2**23
        numbers = np.clip(numbers, 0.0, 1 - 2.0**-23).astype(np.float32)
        assert (probs[np.asarray(draw(numbers, log_probs))] > 0).all()


def test_temperature_zero_draws_the_mode():
    log_probs = jnp.log(jnp.asarray([0.2, 0.5, 0.3], jnp.float32))
    keys = jax.random.split(jax.random.key(0), 50)
    assert (np.asarray(draw_many(keys, log_probs, jnp.float32(0.0))) == 1).all()


def test_masked_log_softmax_is_over_what_is_allowed():
    logits = jnp.asarray([1.0, 50.0, 3.0], jnp.float32)
    mask = jnp.asarray([True, False, True])
    found = distribution.masked_log_softmax(logits, mask, jnp.float32(2.0))
    expected = np.array([1.0, 3.0]) / 2 - np.log(np.exp(0.5) + np.exp(1.5))
    np.testing.assert_allclose(np.asarray(found)[[0, 2]], expected, rtol=1e-6)
    assert np.exp(found[1]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": 0.0}, r"sampler\.top_p=0\.0: allowed is above 0\.0 up to 1\.0"),
        ({"top_p": 1.5}, r"sampler\.top_p=1\.5"),
        ({"response_length": 1}, r"sampler\.response_length=1: must be at least 2"),
    ],
)
def test_validate_names_the_field(change, message):
    SamplerConfig(response_length=2).validate()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SamplerConfig(response_length=2), **change).validate()
