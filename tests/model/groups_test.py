"""Groups of rows write what all rows at once do, whatever the groups, widths and halves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.model import groups, sampling
from tests.helpers import tiers
from tests.model import sampling_test
from tests.model.sampling_test import PROMPT, ROWS, make_keys, make_params, make_prompts


@functools.partial(jax.jit, static_argnames="with_width")
def respond(agent, params, prompts, keys, temperature, skip, width, with_width):
    decoder = sampling.make_decoder(agent, params, temperature)
    return groups.respond(decoder, *prompts, keys, skip, width if with_width else None)


def answer(agent, temperature=1.0, skip=None, rows=slice(None), width=None, keys=None):
    skip = np.zeros(ROWS, bool) if skip is None else skip
    keys = make_keys() if keys is None else keys
    return respond(
        agent,
        make_params(),
        tuple(x[rows] for x in make_prompts()),
        keys[rows],
        jnp.float32(temperature),
        skip[rows],
        np.zeros(ROWS, np.int32)[rows] if width is None else width,
        with_width=width is not None,
    )


@pytest.mark.parametrize(
    ("group", "least", "draft", "read"),
    tiers.first(
        [(4, 1, 2, 3), (0, 0, 0, 0), (4, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 2)], several=True
    ),
)
@pytest.mark.parametrize("buckets", [(8,), (2, 5, 8)])
def test_responses_are_those_of_all_rows_at_once(group, least, draft, read, buckets):
    skip = np.array([False, True, False, False, False, False])
    agent = sampling_test.make_agent(
        group=group, prompt_buckets=buckets, least_rows=least, draft=draft, read_rows=read
    )
    for temperature in (0.0, 1.0):
        expected = sampling_test.answer(sampling_test.make_agent(), temperature, skip=skip)
        found = answer(agent, temperature, skip=skip)
        for name in ("tokens", "lengths", "scripted"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=2e-5)
        np.testing.assert_allclose(found.values, np.where(skip, 0, expected.values), atol=1e-5)


def test_a_group_is_read_at_the_least_width_that_holds_it():
    lengths = make_prompts()[1]  # 12, 9, 5, 2, 7, 12
    agent = sampling_test.make_agent(group=2, prompt_buckets=(2, 4, 6, 8))
    np.testing.assert_array_equal(lengths, [12, 9, 5, 2, 7, 12])
    # By length: (12, 12), (9, 7), (5, 2); widths are 3, 6, 9 and 12.
    np.testing.assert_array_equal(answer(agent).width, [12, 9, 6, 6, 9, 12])
    skip = np.array([True, False, False, False, True, True])  # (9, 5), (2)
    np.testing.assert_array_equal(answer(agent, skip=skip).width, [0, 9, 9, 3, 0, 0])


def test_rows_that_are_over_cost_nothing():
    calls = []

    def counted(decoder, prompt, *rest):
        jax.debug.callback(lambda: calls.append((len(prompt), rest[4])))
        return sampling.generate(decoder, prompt, *rest)

    agent = sampling_test.make_agent(group=2, prompt_buckets=(4, 8))

    def play(skip):
        calls.clear()
        decoder = sampling.make_decoder(agent, make_params(), jnp.float32(1.0))
        inputs = jax.device_put((*make_prompts(), make_keys(), skip))
        groups.respond(decoder, *inputs, generate=counted)
        jax.effects_barrier()
        return sorted(calls)

    assert play(np.zeros(ROWS, bool)) == [(2, 6), (2, 12), (2, 12)]
    assert play(np.array([True, True, False, False, True, True])) == [(2, 6)]
    assert play(np.array([False, True, False, False, True, True])) == [(2, 6), (2, 12)]
    assert play(np.ones(ROWS, bool)) == []


def test_a_recorded_width_gives_the_same_bits_in_other_company():
    agent = sampling_test.make_agent(group=3, prompt_buckets=(2, 4, 6, 8))
    first = answer(agent)
    np.testing.assert_array_equal(first.width, [12, 12, 9, 9, 9, 12])
    rows = np.array([3, 5, 2])  # of different groups
    again = answer(agent, rows=rows, width=np.asarray(first.width)[rows])
    # One row of a group tells of the lanes of all, whichever those are.
    kept, told = (jax.tree.leaves(x.replace(lanes=None)) for x in (first, again))
    for ours, theirs in zip(kept, told, strict=True):
        np.testing.assert_array_equal(np.asarray(ours)[rows], theirs)
    # A negative control: another width adds up in another order, and its bits are others.
    wider = answer(agent, rows=rows, width=np.full(3, PROMPT, np.int32))
    np.testing.assert_array_equal(wider.tokens, again.tokens)
    assert (np.asarray(wider.log_probs) != np.asarray(again.log_probs)).any()


def test_lanes_are_what_decoding_computed():
    skip = np.array([False, True, False, False, False, False])
    lengths = np.asarray(answer(sampling_test.make_agent(), skip=skip).lengths)
    whole = answer(sampling_test.make_agent(), skip=skip)
    assert np.sum(whole.lanes) == ROWS * lengths.max()
    groups = answer(sampling_test.make_agent(group=4), skip=skip)
    order = np.argsort(np.where(skip, 99, -make_prompts()[1]), kind="stable")
    longest = [lengths[order[:4]].max(), lengths[order[4]]]
    assert np.sum(groups.lanes) == 4 * sum(longest)
    assert np.count_nonzero(groups.lanes) == 2
    halved = answer(sampling_test.make_agent(group=4, least_rows=1), skip=skip)
    np.testing.assert_array_equal(halved.passes, lengths)
    assert np.sum(halved.passes) <= np.sum(halved.lanes) <= np.sum(groups.lanes)


@pytest.mark.parametrize(
    ("full", "multiple", "buckets", "expected"),
    [
        (85, 1, (5, 8), [54, 85]),
        (85, 1, (8,), [85]),
        (15_103, 128, (4, 5, 8), [7_552, 9_472, 15_104]),
        (3, 1, (1, 2, 8), [1, 3]),
    ],
)
def test_widths_are_eighths_rounded_up(full, multiple, buckets, expected):
    assert groups.list_widths(full, multiple, buckets) == expected
