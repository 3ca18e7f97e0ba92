"""The blocked kernel against plain attention; its program runs interpreted, without a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.model import attention

START = np.array([0, 37, 200], np.int32)
LENGTH = 256


def make_inputs(heads, kv_heads, depth, length=LENGTH):
    rng = np.random.default_rng(0)
    shapes = [(3, heads, length, depth), *[(3, kv_heads, length, depth)] * 2]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def attend_with_numpy(q, k, v, start):
    """float64, one row, head and query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for row, first in enumerate(start):
        for head in range(q.shape[1]):
            keys, values = k[row, head // group], v[row, head // group]
            for column in range(first, q.shape[2]):
                scores = keys[first : column + 1] @ q[row, head, column] / np.sqrt(q.shape[3])
                weights = np.exp(scores - scores.max())
                out[row, head, column] = weights @ values[first : column + 1] / weights.sum()
    return out


def only_tokens(x):
    """Zero where a column holds padding."""
    real = np.arange(x.shape[2])[None] >= START[:, None]
    return np.where(real[:, None, :, None], np.asarray(x), 0.0)


@pytest.mark.parametrize(("heads", "kv_heads", "depth"), [(4, 2, 64), (2, 2, 128)])
def test_the_kernel_equals_plain_attention_and_numpy(heads, kv_heads, depth):
    q, k, v = make_inputs(heads, kv_heads, depth)
    plain = attention.causal(q, k, v, START, implementation="plain")
    splash = attention.causal(q, k, v, START, implementation="splash", interpret=True)
    expected = attend_with_numpy(q, k, v, START)
    np.testing.assert_allclose(only_tokens(plain), expected, atol=2e-6, rtol=0)
    np.testing.assert_allclose(only_tokens(splash), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("implementation", ["splash", "fused"])
def test_all_attend_to_what_stands_before(implementation):
    """As if the rows were longer; how much stands before differs from row to row."""
    q, k, v = make_inputs(4, 2, 64)
    count = 128
    lengths = np.array([128, 5, 0], np.int32)
    more = [jnp.asarray(x) for x in np.random.default_rng(3).normal(size=(2, 3, 2, count, 64))]
    there = jnp.arange(count)[None, None] < lengths[:, None, None]
    before = (more[0].astype(jnp.float32), more[1].astype(jnp.float32), there)
    how = {"interpret": True} if implementation == "splash" else {}
    plain = attention.causal(q, k, v, START, before, implementation="plain")
    found = attention.causal(q, k, v, START, before, implementation=implementation, **how)
    np.testing.assert_allclose(only_tokens(found), only_tokens(plain), atol=3e-6, rtol=0)
    for row, length in enumerate(lengths):
        first = START[row]
        longer = [
            jnp.concatenate([b[row : row + 1, :, :length], x[row : row + 1, :, first:]], axis=2)
            for b, x in ((before[0], k), (before[1], v))
        ]
        ask = jnp.pad(q[row : row + 1, :, first:], ((0, 0), (0, 0), (length, 0), (0, 0)))
        expected = attend_with_numpy(ask, *longer, [0])[:, :, length:]
        np.testing.assert_allclose(plain[row : row + 1, :, first:], expected, atol=3e-6, rtol=0)


def test_fused_attention_equals_plain_attention_and_so_do_its_gradients():
    inputs = make_inputs(4, 2, 64)
    weights = only_tokens(np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32))

    def loss(q, k, v, implementation):
        out = attention.causal(q, k, v, START, implementation=implementation)
        return jnp.sum(jnp.asarray(weights) * out), out

    pairs = [
        jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs, implementation=name)
        for name in ("fused", "plain")
    ]
    np.testing.assert_allclose(*(only_tokens(out) for _, out in pairs), atol=2e-6, rtol=0)
    for ours, theirs in zip(*(grads for grads, _ in pairs), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 300, 1100])
def test_plain_attention_in_blocks_of_any_length_equals_numpy(length):
    q, k, v = make_inputs(2, 1, 8, length=length)
    start = np.minimum(START, length - 1)
    plain = np.asarray(attention.causal(q, k, v, start, implementation="plain"))
    expected = attend_with_numpy(q, k, v, start)
    assert np.isfinite(plain).all()
    for row, first in enumerate(start):
        np.testing.assert_allclose(plain[row, :, first:], expected[row, :, first:], atol=2e-6)


def test_gradients_of_the_kernel_equal_those_of_plain_attention():
    inputs = make_inputs(4, 2, 64)
    weights = only_tokens(np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32))

    def gradients(**how):
        def loss(q, k, v):
            return jnp.sum(jnp.asarray(weights) * attention.causal(q, k, v, START, **how))

        return jax.grad(loss, argnums=(0, 1, 2))(*inputs)

    plain = gradients(implementation="plain")
    splash = gradients(implementation="splash", interpret=True)
    for ours, theirs in zip(splash, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
        assert float(jnp.abs(theirs).max()) > 0.1


def test_a_length_that_the_kernel_cannot_have_is_named():
    with pytest.raises(ValueError, match=r"model\.attention='splash' .* 128 columns, found 200"):
        attention.causal(*make_inputs(2, 2, 64, length=200), START, implementation="splash")


def test_rows_are_rounded_for_the_kernel_alone():
    assert attention.row_multiple("splash", 2000) == 128
    assert attention.row_multiple("plain", 2000) == 1
    assert attention.row_multiple("auto", 2000) == 1  # no TPU here
