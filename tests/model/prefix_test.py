"""What prompts begin with is read once, and everything is as if it were read again each turn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.agent import build
from atommem_jax.config import ConfigError, parse, to_config_dict
from atommem_jax.language import prompt as prompting
from atommem_jax.learning import rollout
from atommem_jax.model import prefix, sampling
from atommem_jax.model.transformer import Transformer, init_params
from atommem_jax.types import Phase
from tests.helpers import tiers, tiny

ROWS = 5


@functools.cache
def make_parts():
    """The tiny agent without flags, under instructions of a few words."""
    config = to_config_dict(tiny.make_config())
    config.model.match_features = False
    config.model.num_layers = 2
    parts = build.build(parse(config), tiny.make_tokenizer())
    words = tiny.make_tokenizer().encode("you read a long document and answer")
    template = parts.agent.template.replace(prefix=jnp.asarray(words, jnp.int32))
    return dataclasses.replace(parts, agent=parts.agent.replace(template=template))


@functools.cache
def make_params(seed=0):
    return tiny.disturb(init_params(make_parts().agent.model, jax.random.key(seed)), 0.3, seed)


@jax.jit
def play(agent, setting, params, episodes, ids, temperature):
    policy = rollout.model_policy(agent, params, temperature, episodes)
    return rollout.run(setting, policy, episodes, ids, jax.random.key(3))


def run(seed=0, temperature=1.0, **how):
    parts = make_parts()
    agent = parts.agent.replace(sampler=dataclasses.replace(parts.agent.sampler, **how))
    episodes, _ = tiny.make_episodes(range(ROWS))
    setting = parts.setting(tiny.make_shape())
    ids = jnp.arange(ROWS, dtype=jnp.int32)
    return play(agent, setting, make_params(seed), episodes, ids, jnp.float32(temperature))


@pytest.mark.parametrize(
    "how",
    tiers.first(
        [
            {},
            {"cpu_decode": True},
            {"draft": 2, "group": 2, "prompt_buckets": (3, 5, 8), "least_rows": 1, "read_rows": 1},
        ]
    ),
)
def test_trajectories_are_those_of_whole_prompts(how):
    for temperature in (0.0, 1.0):
        expected = run(temperature=temperature)
        found = run(temperature=temperature, cache_prefix=True, **how)
        turns = found.turns
        np.testing.assert_array_equal(turns.response, expected.turns.response)
        np.testing.assert_array_equal(turns.prompt, expected.turns.prompt)
        np.testing.assert_array_equal(found.answers, expected.answers)
        np.testing.assert_allclose(turns.log_probs, expected.turns.log_probs, atol=2e-5)
        np.testing.assert_allclose(turns.values, expected.turns.values, atol=2e-5)
        assert {Phase.READING, Phase.FINAL} <= set(np.asarray(turns.phase[turns.live]).tolist())
    if "prompt_buckets" in how:  # what is not read needs no columns
        live = np.asarray(turns.live)
        assert turns.width[live].mean() < 0.6 * np.asarray(expected.turns.width)[live].mean()
        assert (turns.width < turns.prompt_lengths)[live].any()


def test_prompts_begin_with_what_was_read():
    parts, (episodes, _) = make_parts(), tiny.make_episodes(range(ROWS))
    template = parts.agent.template
    tokens, lengths = jax.vmap(prompting.assemble_questions, in_axes=(None, 0, 0, 0))(
        template, episodes.questions, episodes.question_lengths, episodes.num_questions
    )
    turns = run(cache_prefix=True).turns
    for row in range(ROWS):
        start = [*np.asarray(template.prefix), *np.asarray(tokens[row, : lengths[row]])]
        for t in np.flatnonzero(turns.live[row]):
            prompt = np.asarray(turns.prompt[row, t, -int(turns.prompt_lengths[row, t]) :])
            reading = turns.phase[row, t] == Phase.READING
            count = len(start) if reading else len(template.prefix)
            np.testing.assert_array_equal(prompt[:count], start[:count])


def test_nothing_of_older_parameters_is_left():
    """The same program, called with others: as if there had never been any before."""
    first, second = run(seed=0, cache_prefix=True), run(seed=1, cache_prefix=True)
    again, plain = run(seed=0, cache_prefix=True), run(seed=1)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(second.turns.response, plain.turns.response)
    assert (np.asarray(first.turns.response) != np.asarray(second.turns.response)).any()


@pytest.mark.long
def test_a_prefix_of_other_parameters_would_be_seen():
    """A negative control of what the tests above compare."""
    agent, (episodes, _) = make_parts().agent, tiny.make_episodes(range(ROWS))
    decoder = sampling.make_decoder(agent, make_params(0), jnp.float32(1.0))
    stale = prefix.read(
        sampling.make_decoder(agent, make_params(1), jnp.float32(1.0)), agent.template, episodes
    )
    fresh = prefix.read(decoder, agent.template, episodes)
    expected = run()
    prompt, lengths = expected.turns.prompt[:, 0], expected.turns.prompt_lengths[:, 0]
    phase = expected.turns.phase[:, 0]
    keys = jax.random.split(jax.random.key(0), ROWS)

    def answer(prefixes):
        skip = np.zeros(ROWS, bool)
        given = prefixes.of(phase)
        return sampling.generate(decoder, prompt, lengths, phase, keys, skip, prefix=given)

    plain = sampling.generate(decoder, prompt, lengths, phase, keys, np.zeros(ROWS, bool))
    np.testing.assert_allclose(answer(fresh).log_probs, plain.log_probs, atol=2e-5)
    assert np.abs(answer(stale).log_probs - plain.log_probs).max() > 1e-2


def test_the_instructions_are_read_once_a_program(monkeypatch):
    shapes = []

    class Counting(Transformer):
        def read(self, tokens, *args, **kwargs):
            shapes.append(tokens.shape)
            return super().read(tokens, *args, **kwargs)

    agent, (episodes, _) = make_parts().agent, tiny.make_episodes(range(ROWS))
    agent = agent.replace(model=Counting(agent.model.config))
    decoder = sampling.make_decoder(agent, make_params(), jnp.float32(1.0))
    prefix.read(decoder, agent.template, episodes)
    assert [rows for rows, _ in shapes] == [1, ROWS]


def test_flags_of_the_whole_prompt_are_refused():
    config = to_config_dict(tiny.make_config())
    config.rollout.cache_prefix = True
    with pytest.raises(ConfigError, match=r"rollout\.cache_prefix=True: allowed is False with"):
        build.build(parse(config), tiny.make_tokenizer())
