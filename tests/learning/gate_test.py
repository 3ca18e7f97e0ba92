"""The promise between sampler and learner is kept however tokens are decided, and can be broken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.learning import gate, trainer
from atommem_jax.model import prefix, sampling, transformer
from atommem_jax.types import Response
from tests.helpers import tiers, tiny
from tests.model import groups_test, prefix_test, sampling_test
from tests.model.prefix_test import make_params, make_parts, run
from tests.model.sampling_test import PROMPT


@jax.jit
def score(params, rows):
    return tiny.score_rows(make_parts().agent, params, rows)


@functools.cache
def make_rows():
    """Turns of five episodes, decided one token after the other from whole prompts."""
    return trainer.make_batch(run())


@functools.cache
def largest_logit():
    return float(score(make_params(), make_rows()).largest.max())


def judge(rows, other_tokens, other_log_probs, **how):
    return gate.find_faults(
        rows.response, rows.old_log_probs, other_tokens, other_log_probs, largest_logit(), **how
    )


def judge_learner(params):
    """Faults between what the sampler wrote and what a learner of `params` says of it."""
    return judge(make_rows(), make_rows().response, score(params, make_rows()).log_probs)


# ---------------------------------------------------------------------------------------------
# By hand


def test_the_bound_is_sixty_four_units_in_the_last_place_of_the_largest_logit():
    assert float(gate.bound(16.0)) == 64 * 16 * 2.0**-23
    assert float(gate.bound(0.1)) == float(gate.bound(1.0)) == 2.0**-17


def test_faults_by_hand():
    tokens, log_probs = np.array([[3, 4, 0]]), np.array([[-1.0, -2.0, 0.0]], np.float32)

    def find(tokens_, change=0.0, **how):
        moved = log_probs + np.array([[0.0, change, 0.0]], np.float32)
        return gate.find_faults(tokens, log_probs, tokens_, moved, 16.0, **how)

    assert find(tokens) == find(tokens, 1.2e-4) == find(tokens, same_bits=True) == []
    assert find(np.array([[3, 5, 0]])) == ["1 of 3 tokens are different."]
    assert find(tokens, 3e-7, same_bits=True) == ["1 of 3 log-probs have other bits."]
    assert find(tokens, 1.3e-4) == [
        "Log-probs are up to 1.3e-04 apart; rounding explains 1.2e-04, 64 units in the last place "
        "of a logit of 16."
    ]
    assert "up to nan apart" in find(tokens, np.nan)[0]


def test_nothing_to_compare_is_no_pass():
    nothing = np.zeros((2, 3), np.float32)
    faults = gate.find_faults(nothing, nothing, nothing, nothing, 1.0)
    assert faults == ["There is no token to compare: every log-prob is 0."]
    with pytest.raises(ValueError, match=r"shapes are \(2, 3\), \(2, 3\), \(2, 2\), \(2, 3\)"):
        gate.find_faults(nothing, nothing, nothing[:, :2], nothing, 1.0)


# ---------------------------------------------------------------------------------------------
# What keeps the promise


def test_the_learner_agrees_with_the_sampler():
    assert judge_learner(make_params()) == []
    assert 2 < largest_logit() < 100
    # A last bit is a rounding.
    assert judge_learner(blur(1)) == []


@pytest.mark.parametrize(
    "how",
    tiers.first(
        [
            {"cache_prefix": True}
            | {"draft": 2, "group": 2, "prompt_buckets": (3, 5, 8), "least_rows": 1},
            {"cpu_decode": True},
            {"draft": 2},
            {"cache_prefix": True},
            {"group": 2, "prompt_buckets": (3, 5, 8)},
            {"group": 4, "least_rows": 1},
        ]
    ),
    ids=str,
)
def test_however_tokens_are_decided_they_are_the_same(how):
    rows = trainer.make_batch(run(**how))
    assert judge(make_rows(), rows.response, rows.old_log_probs) == []


def test_bits_are_the_same_at_the_same_width_in_groups_of_as_many_rows():
    agent = sampling_test.make_agent(group=3, prompt_buckets=(2, 4, 6, 8))
    first = groups_test.answer(agent)
    rows = np.array([3, 5, 2])  # of different groups

    def judge_again(width):
        again = groups_test.answer(agent, rows=rows, width=width)
        ours = np.asarray(first.tokens)[rows], np.asarray(first.log_probs)[rows]
        given = (*ours, again.tokens, again.log_probs, 8.0)
        return gate.find_faults(*given), gate.find_faults(*given, same_bits=True)

    assert judge_again(np.asarray(first.width)[rows]) == ([], [])
    # A negative control: at another width the sums are the same up to rounding only.
    up_to_rounding, bits = judge_again(np.full(3, PROMPT, np.int32))
    assert up_to_rounding == []
    assert "have other bits" in bits[0]


# ---------------------------------------------------------------------------------------------
# Negative controls: what must break it


def blur(bits, matrix=None):
    """Parameters whose last bits are 0, those of all leaves or of one matrix of the layers."""

    def clear(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if matrix not in (None, name):
            return x
        kept = jnp.int32(-(1 << bits))
        return jax.lax.bitcast_convert_type(
            jax.lax.bitcast_convert_type(x, jnp.int32) & kept, jnp.float32
        )

    return jax.tree_util.tree_map_with_path(clear, make_params())


@pytest.mark.parametrize("matrix", ["layers/value/kernel", "layers/down/kernel", "shift"])
def test_a_weight_changed_by_more_than_rounding_breaks_it(matrix):
    before, after = make_params(), blur(12, matrix)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(a).max()), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 2.0**-11
    (fault,) = judge_learner(after)
    assert fault.startswith("Log-probs are up to")


def test_a_cache_of_older_parameters_breaks_it():
    """A prefix that was read one small step of the optimiser ago."""
    agent, (episodes, _) = make_parts().agent, tiny.make_episodes(range(prefix_test.ROWS))
    older = tiny.disturb(make_params(), 1e-3, seed=8)
    played = run().turns
    keys = jax.random.split(jax.random.key(0), prefix_test.ROWS)

    @jax.jit
    def answer(params, of_prefix):
        decoder = sampling.make_decoder(agent, params, jnp.float32(1.0))
        read = prefix.read(
            sampling.make_decoder(agent, of_prefix, jnp.float32(1.0)), agent.template, episodes
        )
        phase, skip = played.phase[:, 0], jnp.zeros(prefix_test.ROWS, bool)
        prompt, lengths = played.prompt[:, 0], played.prompt_lengths[:, 0]
        return sampling.generate(decoder, prompt, lengths, phase, keys, skip, prefix=read.of(phase))

    def faults(response: Response):
        first = jax.tree.map(lambda x: x[:, 0], played)
        rows = make_rows().replace(
            prompt=first.prompt,
            prompt_lengths=first.prompt_lengths,
            phase=first.phase,
            response=response.tokens,
            response_lengths=response.lengths,
        )
        learner = score(make_params(), rows)
        return gate.find_faults(
            response.tokens,
            response.log_probs,
            response.tokens,
            learner.log_probs,
            learner.largest.max(),
        )

    assert faults(answer(make_params(), make_params())) == []
    (fault,) = faults(answer(make_params(), older))
    assert fault.startswith("Log-probs are up to")


def test_a_shifted_position_breaks_it(monkeypatch):
    """What is decoded stands one position further than where it was read from."""
    agent = sampling_test.make_agent()
    prompts, lengths, phases = sampling_test.make_prompts()
    count = transformer.count_positions

    def decode(shift):
        def shifted(start, slots, prefix=None):
            return count(start, slots, prefix) + (shift if slots.shape[1] == 1 else 0)

        monkeypatch.setattr(transformer, "count_positions", shifted)

        @jax.jit
        def generate(params):
            decoder = sampling.make_decoder(agent, params, jnp.float32(1.0))
            skip = jnp.zeros(lengths.shape, bool)
            keys = sampling_test.make_keys()
            return sampling.generate(decoder, prompts, lengths, phases, keys, skip)

        response = generate(sampling_test.make_params())
        monkeypatch.setattr(transformer, "count_positions", count)
        learner = sampling_test.score(
            agent, sampling_test.make_params(), prompts, lengths, response, jnp.float32(1.0), phases
        )
        tokens = response.tokens
        return gate.find_faults(
            tokens, response.log_probs, tokens, learner.log_probs, learner.largest.max()
        )

    assert decode(0) == []
    (fault,) = decode(1)
    assert fault.startswith("Log-probs are up to")
