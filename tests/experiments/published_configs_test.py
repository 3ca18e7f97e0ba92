"""Published models have exactly the parameters that they were published with."""

import dataclasses

import jax
import pytest

from atommem_jax.agent import validate
from atommem_jax.config import ConfigError, load_config, parse
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import Transformer, count_params, init_params
from atommem_jax.tpu_model import flops
from experiments.configs import published


@pytest.mark.parametrize("name", published.PRESETS)
def test_parameter_count_is_the_published_one(name):
    preset = published.get_preset(name)
    config = ModelConfig(**preset.sizes())
    config.validate()
    params = jax.eval_shape(lambda key: init_params(Transformer(config), key), jax.random.key(0))
    value_head = count_params(params.pop("value_head"))
    assert count_params(params) == preset.parameters
    assert flops.count_params(config, value_head=False) == preset.parameters
    assert flops.count_params(config) == preset.parameters + value_head


@pytest.mark.parametrize("name", published.PRESETS)
def test_parameter_count_by_hand(name):
    """The same sum written out, so that a mistake in the model's code cannot hide."""
    p = published.PRESETS[name]
    attention = p.width * p.head_width * (2 * p.num_heads + 2 * p.num_kv_heads)
    norms = 2 * p.width + (2 * p.head_width if p.qk_norm else 0)
    biases = (p.num_heads + 2 * p.num_kv_heads) * p.head_width if p.qkv_bias else 0
    layer = attention + biases + 3 * p.width * p.mlp_width + norms
    heads = (1 if p.tie_embeddings else 2) * p.vocab_size * p.width
    assert heads + p.num_layers * layer + p.width == p.parameters


def test_config_of_a_preset():
    config = published.get_config("smollm2_135m")
    assert (config.model.width, config.model.num_kv_heads, config.model.rope_theta) == (576, 3, 1e5)
    assert "vocab_size" not in config.model
    sizes = {f.name for f in dataclasses.fields(ModelConfig)}
    assert set(config.model) - {"match_features"} <= sizes


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"no preset 'gpt5': there are qwen3_0_6b, .*smollm2"):
        published.get_config("gpt5")


@pytest.mark.parametrize("name", published.PRESETS)
def test_every_preset_is_a_valid_config(name):
    config = parse(load_config(f"experiments/configs/published.py:{name}"))
    assert config.model.width == published.PRESETS[name].width
    assert config.tokenizer.vocab_size == published.PRESETS[name].vocab_size
    validate.validate(config)
