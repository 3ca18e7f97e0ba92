"""config.json: what was published, both ways, and what is refused by name."""

import dataclasses
import json

import pytest

from atommem_jax.model.model_config import ModelConfig
from atommem_jax.weights import hf_config, hf_names
from atommem_jax.weights.hf_config import PublishedError
from experiments.configs import published

# As published with Qwen3-8B; AtomMem-8B was trained from it and has the same layout.
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


@pytest.mark.parametrize(
    ("preset", "fields", "tensors"),
    [
        ("qwen3_8b", QWEN3_8B, 36 * 11 + 3),
        ("qwen2.5_7b", QWEN2_5_7B, 28 * 12 + 3),
        ("llama3.1_8b", LLAMA_3_1_8B, 32 * 9 + 3),
        ("smollm2_135m", SMOLLM2_135M, 30 * 9 + 2),
    ],
)
def test_a_published_config_is_enough(preset, fields, tensors):
    config = hf_config.parse_config(fields)
    sizes = published.get_preset(preset).sizes()
    assert config == ModelConfig(**sizes, pad_id=fields.get("pad_token_id", 0))
    shapes = hf_names.published_shapes(config)
    assert len(shapes) == tensors
    last = fields["num_hidden_layers"] - 1
    assert shapes[f"model.layers.{last}.mlp.down_proj.weight"] == (
        fields["hidden_size"],
        fields["intermediate_size"],
    )
    assert ("lm_head.weight" in shapes) != fields["tie_word_embeddings"]


def test_newer_and_older_fields_say_the_same():
    older = hf_config.parse_config(LLAMA_3_1_8B)
    newer = {k: v for k, v in LLAMA_3_1_8B.items() if k not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}
    assert hf_config.parse_config(newer) == older
    assert older.rope_factor == 8.0
    assert older.head_width == 128, "hidden_size / num_attention_heads where head_dim is absent"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
STRETCHES = {
    "yarn": (YARN, {"rope_factor": 4.0, "rope_original_length": 32768}),
    "yarn of older files": (
        {"type": "yarn", "factor": 4.0},
        {"rope_factor": 4.0, "rope_original_length": 40960},
    ),
    "yarn in full": (
        YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.2},
        {
            **{"rope_factor": 4.0, "rope_original_length": 32768, "rope_truncate": False},
            **{"rope_beta_fast": 16.0, "rope_beta_slow": 2.0, "rope_attention_factor": 1.2},
        },
    ),
    "yarn that sharpens alone": (
        YARN | {"factor": 1.0, "attention_factor": 1.2},
        {"rope_attention_factor": 1.2, "rope_original_length": 32768},
    ),
    "linear": ({"type": "linear", "factor": 2}, {"rope_factor": 2.0}),
}


@pytest.mark.parametrize("name", STRETCHES)
def test_stretched_positions_are_read_and_come_back(name):
    scaling, expected = STRETCHES[name]
    config = hf_config.parse_config(QWEN3_8B | {"rope_scaling": scaling})
    kind = scaling.get("rope_type") or scaling["type"]
    assert config == dataclasses.replace(
        hf_config.parse_config(QWEN3_8B), rope_type=kind, **expected
    )
    written = json.loads(json.dumps(hf_config.format_config(config)))
    assert hf_config.parse_config(written) == config


def test_deepseeks_way_to_sharpen_attention_is_read():
    """As `transformers`: the quotient of two factors, where both are given."""
    config = hf_config.parse_config(
        QWEN3_8B | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}
    )
    assert config.rope_attention_factor == pytest.approx(1.138629 / 1.069315, rel=1e-5)
    alone = hf_config.parse_config(QWEN3_8B | {"rope_scaling": YARN | {"mscale": 1.0}})
    assert alone.rope_attention_factor == 0.0


def test_norms_and_biases_together_are_nobodys():
    config = ModelConfig(40, qk_norm=True, qkv_bias=True)
    with pytest.raises(PublishedError, match=r"qk_norm=True and model\.qkv_bias=True: no publ"):
        hf_config.format_config(config)


@pytest.mark.parametrize("fields", [QWEN3_8B, QWEN2_5_7B, LLAMA_3_1_8B, SMOLLM2_135M])
def test_configs_come_back(fields):
    config = hf_config.parse_config(fields)
    written = json.loads(json.dumps(hf_config.format_config(config)))
    assert hf_config.parse_config(written) == config
    kept = set(fields) & set(written) - {"torch_dtype", "pad_token_id", "max_position_embeddings"}
    assert {name: written[name] for name in kept} == {name: fields[name] for name in kept}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, ["architectures=['GemmaForCausalLM']", "Qwen3F"]),
        ({"architectures": None}, ["architectures=[]"]),
        ({"model_type": "llama"}, ["model_type='llama'", "'qwen3'"]),
        ({"attention_bias": True}, ["attention_bias=True: allowed is False"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu': allowed is 'silu'"]),
        ({"use_sliding_window": True}, ["use_sliding_window=True"]),
        ({"layer_types": ["sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config={'bits': 4}"]),
        ({"rope_scaling": {"rope_type": "dynamic"}}, ["rope_scaling.rope_type='dynamic'", "yarn"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling: factor is None"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["model.rope_factor=0.5"]),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            ["rope_parameters.partial_rotary_factor=0.5: allowed is 1.0"],
        ),
        ({"rope_scaling": {"type": "llama3"}}, ["rope_scaling: factor is None"]),
        ({"hidden_size": None}, ["hidden_size is None; it must be a whole number"]),
        ({"num_hidden_layers": "36"}, ["num_hidden_layers is '36'"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps is None; it must be a number"]),
        ({"layer_types": [["full_attention"]]}, ["layer_types holds ['full_attention']"]),
        ({"architectures": 3}, ["architectures=[3]"]),
        ({"architectures": [["Qwen3Model"]]}, ["architectures=[['Qwen3Model']]"]),
        ({"rope_scaling": "null"}, ["rope_scaling is 'null'; it must be an object or null"]),
        ({"head_dim": 2**70}, ["head_dim is 1180591620717411303424", "31 bits"]),
        ({"rope_theta": float("nan")}, ["rope_theta is nan; it must be a number"]),
        ({"rope_theta": -1}, ["rope_theta is -1.0; it must be above 0"]),
        ({"rms_norm_eps": 10**400}, ["it must be a number, of at most 1e+38"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings is 'no'; it must be true or false"]),
        ({"num_key_value_heads": 5}, ["model.num_heads=32 is not a multiple of", "=5"]),
    ],
)
def test_a_field_that_does_not_fit_is_named(change, words):
    with pytest.raises(PublishedError) as caught:
        hf_config.parse_config({**QWEN3_8B, **change}, where="there/config.json")
    for word in ("there/config.json", *words):
        assert word in str(caught.value), str(caught.value)


def test_a_broken_config_is_named(tmp_path):
    path = tmp_path / "config.json"
    for text, word in [("{", "is not JSON"), ("[]", "holds list; it must hold an object")]:
        path.write_text(text)
        with pytest.raises(PublishedError, match=rf"config\.json: {word}"):
            hf_config.read_config(tmp_path)


@pytest.mark.parametrize("published_config", [QWEN3_8B, QWEN2_5_7B, LLAMA_3_1_8B])
def test_what_is_not_said_is_the_default_of_the_architecture(published_config):
    """As in `transformers`: null where a switch is off, and 10,000 for rope_theta."""
    switches = dict.fromkeys(["mlp_bias", "attention_bias", "use_sliding_window"])
    expected = hf_config.parse_config(published_config)
    assert hf_config.parse_config(published_config | switches) == expected
    silent = {n: v for n, v in published_config.items() if n not in ("rope_theta", "rms_norm_eps")}
    found = hf_config.parse_config(silent)
    assert found == dataclasses.replace(expected, rope_theta=10_000.0, norm_epsilon=1e-6)


def test_qwen3_has_heads_of_its_own():
    silent = {n: v for n, v in QWEN3_8B.items() if n not in ("head_dim", "num_key_value_heads")}
    found = hf_config.parse_config({**silent, "hidden_size": 1024})
    assert (found.head_width, found.num_kv_heads) == (128, 32)


def test_the_rest_is_what_an_export_would_not_write(tmp_path):
    fields = {**QWEN3_8B, "auto_map": {"AutoModel": "code.Model"}, "use_cache": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    rest = hf_config.list_rest(tmp_path)
    kept = (
        *("bos_token_id", "eos_token_id", "initializer_range", "max_position_embeddings"),
        *("max_window_layers", "sliding_window", "transformers_version", "use_sliding_window"),
    )
    assert rest == {"config.json": {name: QWEN3_8B[name] for name in kept}}
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.9}')
    assert hf_config.list_rest(tmp_path)["generation_config.json"] == {"top_p": 0.9}
