"""Guessed tokens are what Python guesses, and never change what a row writes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.agent import build
from atommem_jax.config import parse, to_config_dict
from atommem_jax.model import drafts, sampling
from atommem_jax.model.sampling import SamplerConfig
from tests.helpers import tiers, tiny
from tests.model import sampling_test
from tests.model.sampling_test import ROWS, make_keys, make_params, make_prompts


def look_up_in_python(text):
    """What followed the latest earlier occurrence of how `text` ends: two tokens, or one."""
    for size in (2, 1):
        ending = text[len(text) - size :]
        for place in range(len(text) - size - 1, -1, -1):
            if len(text) > size and text[place : place + size] == ending:
                return text[place + size]
    return -1


def test_prompt_lookup_finds_what_python_finds():
    rng = np.random.default_rng(0)
    find = jax.jit(drafts.look_up)
    found = []
    for _ in range(400):
        length = int(rng.integers(1, 12))
        first = int(rng.integers(0, 12 - length + 1))
        row = rng.integers(0, 4, 12).astype(np.int32)
        expected = look_up_in_python(row[first : first + length].tolist())
        assert int(find(row, np.int32(first), np.int32(first + length))) == expected
        found.append(expected)
    assert set(found) == {-1, 0, 1, 2, 3}, "every outcome was tried"


@functools.cache
def make_agent(protocol, constrained, **how):
    """The tiny agent under another protocol, whose tags are spelled in several tokens."""
    if protocol == "compact":
        return sampling_test.make_agent(constrained, **how)
    config = to_config_dict(tiny.make_config())
    config.protocol.name = protocol
    parts = build.build(parse(config), tiny.make_tokenizer())
    sampler = SamplerConfig(40, constrained=constrained, **how)
    return parts.agent.replace(sampler=sampler)


def answer(agent, temperature):
    return sampling_test.generate(
        agent,
        make_params(),
        *make_prompts(),
        make_keys(),
        jnp.float32(temperature),
        np.arange(ROWS) == 1,
    )


@pytest.mark.parametrize("cpu_decode", [False, True])
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("protocol", tiers.first(["compact", "atommem"]))
def test_guesses_change_nothing_but_the_number_of_passes(protocol, constrained, cpu_decode):
    plain = make_agent(protocol, constrained)
    guessing = make_agent(protocol, constrained, cpu_decode=cpu_decode, draft=3)
    for temperature in (0.0, 1.0, 0.3):
        expected, found = answer(plain, temperature), answer(guessing, temperature)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        # Programs that add up in another order, at logits up to 30.
        np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=3e-5)
        np.testing.assert_allclose(found.values, expected.values, atol=1e-5)
        np.testing.assert_array_equal(expected.passes, expected.lengths)
        assert (np.asarray(found.passes) <= np.asarray(found.lengths)).all()
        if constrained or not temperature:  # parts of tags are forced; a greedy row repeats itself
            assert np.sum(found.passes) < np.sum(found.lengths)


def test_forced_tokens_cost_no_pass_of_their_own():
    """Under masks a tag of several tokens is one pass, as far as guesses reach."""
    agent = make_agent("atommem", constrained=True, draft=8)
    grammar, response = agent.grammar, answer(agent, 1.0)
    phases = make_prompts()[2]
    masks = jax.vmap(grammar.masks)(phases, response.tokens)
    for row in range(ROWS):
        length = int(response.lengths[row])
        choices = np.asarray(masks[row]).sum(axis=1)[:length]
        # The prompt gives one token; a pass goes on at least to the next one that had a choice.
        most = 1 + sum(-(-len(run) // 9) for run in split_runs(choices))
        if row != 1:
            assert 1 < most < length
            assert int(response.passes[row]) <= most


def split_runs(choices):
    """Runs of tokens, each of which begins with one that had a choice (or with the first)."""
    runs = []
    for count in choices:
        if not runs or count > 1:
            runs.append([])
        runs[-1].append(count)
    return runs


def test_a_wrong_guess_is_caught():
    """A negative control: guesses taken on trust would change what is written."""
    agent = make_agent("compact", constrained=False, draft=2)
    decoder = sampling.make_decoder(agent, make_params(), jnp.float32(1.0))
    state = sampling.prefill(decoder, *make_prompts(), make_keys(), np.zeros(ROWS, bool))
    plain = make_agent("compact", constrained=False)
    expected = np.asarray(sampling_test.answer(plain).tokens)

    def step(guesses):
        hidden, _ = sampling._feed(
            decoder, state, jnp.concatenate([state.tokens[:, :1], guesses], axis=1)
        )
        return sampling._decide(decoder, state, hidden, guesses)

    right = step(jnp.asarray(expected[:, 1:3]))
    np.testing.assert_array_equal(right.written, 4)
    np.testing.assert_array_equal(right.tokens[:, :4], expected[:, :4])
    wrong = step(jnp.asarray(expected[:, 1:3]).at[:, 0].add(1) % agent.grammar.vocab_size)
    np.testing.assert_array_equal(wrong.written, 2)
    np.testing.assert_array_equal(wrong.tokens[:, :2], expected[:, :2])
    half = step(jnp.asarray(expected[:, 1:3]).at[:, 1].add(1) % agent.grammar.vocab_size)
    np.testing.assert_array_equal(half.written, 3)
    np.testing.assert_array_equal(half.tokens[:, :3], expected[:, :3])
