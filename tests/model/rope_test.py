"""Rotary frequencies against numbers worked by hand."""

import dataclasses

import numpy as np
import pytest

from atommem_jax.model import rope
from atommem_jax.model.model_config import ModelConfig

PLAIN = ModelConfig(
    vocab_size=23, width=16, num_layers=2, num_heads=2, num_kv_heads=2, head_width=8, mlp_width=24
)


def test_linear_scaling_slows_all_rotations_alike():
    config = dataclasses.replace(PLAIN, rope_theta=10_000.0, rope_type="linear", rope_factor=4.0)
    found = rope.rotary_frequencies(config)
    np.testing.assert_allclose(found, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)
    assert rope.rotary_scale(config) == 1.0


def test_yarn_keeps_fast_rotations_and_sharpens_attention():
    """Four pairs of theta 10,000 over 1,000 positions: 159.2, 15.9, 1.59 and 0.159 turns."""
    config = dataclasses.replace(
        PLAIN,
        rope_theta=10_000.0,
        rope_type="yarn",
        rope_factor=16.0,
        rope_original_length=1000,
        rope_truncate=False,
    )
    # 32 turns are those of pair log10(1000 / (32 x 2 pi)) = 0.6967, and 1 turn of pair 2.2018.
    kept = [1.0, 1 - (1 - 0.6967) / 1.5051, 1 - (2 - 0.6967) / 1.5051, 0.0]
    expected = [f * (k + (1 - k) / 16) for f, k in zip([1, 0.1, 0.01, 0.001], kept, strict=True)]
    np.testing.assert_allclose(rope.rotary_frequencies(config), expected, rtol=1e-4)
    cut = dataclasses.replace(config, rope_truncate=True)  # from pair 0 to pair 3
    kept = [1, 2 / 3, 1 / 3, 0]
    expected = [f * (k + (1 - k) / 16) for f, k in zip([1, 0.1, 0.01, 0.001], kept, strict=True)]
    np.testing.assert_allclose(rope.rotary_frequencies(cut), expected, rtol=1e-5)
    assert rope.rotary_scale(config) == pytest.approx(1.277259)  # 0.1 ln 16 + 1
    told = dataclasses.replace(config, rope_attention_factor=0.9)
    assert rope.rotary_scale(told) == 0.9
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 8)).astype(np.float32)
    turns = np.arange(3)[None], rope.rotary_frequencies(config)
    once, twice = rope.rotate(x, *turns), rope.rotate(x, *turns, 2.0)
    np.testing.assert_allclose(twice, 2 * once, 1e-6)


def test_llama3_slows_the_slow_rotations():
    config = dataclasses.replace(
        PLAIN,
        rope_theta=1.0,
        rope_factor=8.0,
        rope_low_frequency_factor=1.0,
        rope_high_frequency_factor=5.0,
        rope_original_length=10,
    )
    # theta = 1: every pair turns 10 / (2 pi) = 1.5915 times, of which (1.5915 - 1) / 4 is kept.
    expected = 0.147887 + (1 - 0.147887) / 8
    found = rope.rotary_frequencies(config)
    np.testing.assert_allclose(found, [expected] * 4, rtol=1e-5)
    plain = dataclasses.replace(config, rope_theta=10_000.0, rope_factor=1.0)
    np.testing.assert_allclose(rope.rotary_frequencies(plain), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    slowed = dataclasses.replace(plain, rope_factor=8.0, rope_high_frequency_factor=1.5)
    np.testing.assert_allclose(
        rope.rotary_frequencies(slowed), [1.0, 0.0125, 0.00125, 0.000125], rtol=1e-6
    )
