"""Sizes of published decoders that `model.transformer` can express, and a config with one.

    python experiments/compile_report.py --config=experiments/configs/published.py:qwen3_8b \
        --topology=v5e:8x8

Sizes are those of the `config.json` that each model was published with. What a size does not say:
the tokenizer. A published vocabulary is wider than its tokenizer knows tokens (padded for the
hardware); the embedding has that width, and so have `vocab_size` and the parameter count here.

What follows the colon is a key of `PRESETS`. Parameters come from what was published too:
`weights.huggingface` reads them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from atommem_jax.config import ConfigError
from experiments.configs import synthetic


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
      source: repository on the Hugging Face hub.
      parameters: that were published, tied embeddings counted once.
      others: as in `ModelConfig`.
    """

    source: str
    parameters: int
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    rope_theta: float
    qk_norm: bool
    tie_embeddings: bool
    norm_epsilon: float
    rope_factor: float = 1.0
    qkv_bias: bool = False

    def sizes(self) -> dict[str, Any]:
        """Keyword arguments of `ModelConfig`."""
        fields = dataclasses.asdict(self)
        return {name: fields[name] for name in fields if name not in _ABOUT}


_ABOUT = ("source", "parameters")


def _qwen3(size: str, parameters: int, **sizes: Any) -> Preset:
    common: dict[str, Any] = {
        "vocab_size": 151_936,
        "num_kv_heads": 8,
        "head_width": 128,
        "rope_theta": 1e6,
        "qk_norm": True,
        "norm_epsilon": 1e-6,
    }
    return Preset(source=f"Qwen/Qwen3-{size}", parameters=parameters, **common, **sizes)


def _qwen2_5(size: str, parameters: int, **sizes: Any) -> Preset:
    common: dict[str, Any] = {
        "rope_theta": 1e6,
        "qk_norm": False,
        "qkv_bias": True,
        "norm_epsilon": 1e-6,
    }
    return Preset(source=f"Qwen/Qwen2.5-{size}", parameters=parameters, **common, **sizes)


def _smollm2(size: str, parameters: int, **sizes: Any) -> Preset:
    common: dict[str, Any] = {
        "vocab_size": 49_152,
        "head_width": 64,
        "qk_norm": False,
        "tie_embeddings": True,
        "norm_epsilon": 1e-5,
    }
    return Preset(source=f"HuggingFaceTB/SmolLM2-{size}", parameters=parameters, **common, **sizes)


PRESETS: Mapping[str, Preset] = {
    "qwen3_0_6b": _qwen3(
        "0.6B",
        596_049_920,
        width=1024,
        num_layers=28,
        num_heads=16,
        mlp_width=3072,
        tie_embeddings=True,
    ),
    "qwen3_1_7b": _qwen3(
        "1.7B",
        1_720_574_976,
        width=2048,
        num_layers=28,
        num_heads=16,
        mlp_width=6144,
        tie_embeddings=True,
    ),
    "qwen3_4b": _qwen3(
        "4B",
        4_022_468_096,
        width=2560,
        num_layers=36,
        num_heads=32,
        mlp_width=9728,
        tie_embeddings=True,
    ),
    "qwen3_8b": _qwen3(
        "8B",
        8_190_735_360,
        width=4096,
        num_layers=36,
        num_heads=32,
        mlp_width=12_288,
        tie_embeddings=False,
    ),
    "qwen3_14b": _qwen3(
        "14B",
        14_768_307_200,
        width=5120,
        num_layers=40,
        num_heads=40,
        mlp_width=17_408,
        tie_embeddings=False,
    ),
    "qwen3_32b": _qwen3(
        "32B",
        32_762_123_264,
        width=5120,
        num_layers=64,
        num_heads=64,
        mlp_width=25_600,
        tie_embeddings=False,
    ),
    "qwen2_5_0_5b": _qwen2_5(
        "0.5B",
        494_032_768,
        vocab_size=151_936,
        width=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_width=64,
        mlp_width=4864,
        tie_embeddings=True,
    ),
    "qwen2_5_1_5b": _qwen2_5(
        "1.5B",
        1_543_714_304,
        vocab_size=151_936,
        width=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_width=128,
        mlp_width=8960,
        tie_embeddings=True,
    ),
    "qwen2_5_3b": _qwen2_5(
        "3B",
        3_085_938_688,
        vocab_size=151_936,
        width=2048,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        head_width=128,
        mlp_width=11_008,
        tie_embeddings=True,
    ),
    "qwen2_5_7b": _qwen2_5(
        "7B",
        7_615_616_512,
        vocab_size=152_064,
        width=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_width=128,
        mlp_width=18_944,
        tie_embeddings=False,
    ),
    "llama3_1_8b": Preset(
        source="meta-llama/Llama-3.1-8B",
        parameters=8_030_261_248,
        vocab_size=128_256,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_width=128,
        mlp_width=14_336,
        rope_theta=5e5,
        qk_norm=False,
        tie_embeddings=False,
        norm_epsilon=1e-5,
        rope_factor=8.0,
    ),
    "smollm2_135m": _smollm2(
        "135M",
        134_515_008,
        width=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        mlp_width=1536,
        rope_theta=1e5,
    ),
    "smollm2_360m": _smollm2(
        "360M",
        361_821_120,
        width=960,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        mlp_width=2560,
        rope_theta=1e5,
    ),
    "smollm2_1_7b": _smollm2(
        "1.7B",
        1_711_376_384,
        width=2048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        mlp_width=8192,
        rope_theta=1.3e5,
    ),
}


def get_preset(name: str) -> Preset:
    """Returns a preset. Raises ConfigError that lists the names there are."""
    name = name.replace(".", "_")
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}: there are {', '.join(PRESETS)}")
    return PRESETS[name]


def set_model(config: ConfigDict, name: str) -> None:
    """Gives `config.model` the sizes of a preset, and what pretrained models have not switched off.

    The vocabulary is the tokenizer's business. Raises ConfigError for a name there is not.
    """
    for field, value in get_preset(name).sizes().items():
        if field != "vocab_size":
            with config.model.unlocked():
                config.model[field] = value
    config.model.rope_fraction = 1.0
    config.model.token_shift = 0
    config.model.match_features = False
    config.model.remat = True
    config.model.dtype = "bfloat16"


def get_config(name: str = "qwen3_8b") -> ConfigDict:
    """A published model at the setting of the paper (sections 4 and 5): sizes, no data.

    16 tasks of 16 trajectories; documents of about 28,000 tokens in chunks of 4,096; up to ten
    questions; six entries shown. Prompts have up to 13,056 tokens and responses 2,048, so that a
    row has at most 16k columns. `shape` stands in for a data set: with it a config can be compiled
    for any topology, and not yet be trained.
    """
    config = synthetic.get_config()
    set_model(config, name)
    config.tokenizer.vocab_size = get_preset(name).vocab_size

    config.shape = ConfigDict()
    config.shape.chunks = 8
    config.shape.chunk_length = 4096
    config.shape.facts = 1
    config.shape.questions = 10
    config.shape.question_length = 64
    config.shape.needs = 1
    config.shape.answer_length = 64
    config.shape.query_length = 64
    config.shape.note_length = 0

    config.memory.slots = 256
    config.memory.shown = 6
    config.memory.entry_length = 1024
    config.memory.scratchpad_length = 2048
    config.memory.query_length = 64
    config.memory.key_dim = 1024
    config.memory.weighting = "rarity"

    config.rollout.max_actions = 8
    config.rollout.response_length = 2048
    config.rollout.answer_length = 64
    config.rollout.read_budget = 3
    config.rollout.answer_read_budget = 1
    config.rollout.microbatch = 4
    config.rollout.param_dtype = "bfloat16"
    config.rollout.score_chunk = 1024

    config.sft.episodes = 64
    config.sft.microbatch_rows = 1
    config.sft.optimizer.name = "adamw"
    config.sft.optimizer.learning_rate = 1e-5
    config.rl.episodes = 16
    config.rl.ppo.group_size = 16
    config.rl.ppo.divide_by_std = False
    config.rl.ppo.credit = "trajectory"
    config.rl.ppo.minibatches = 1
    config.rl.ppo.microbatch_rows = 1
    # Padding costs more here than compilation.
    config.rl.ppo.length_buckets = config.sft.length_buckets = (4, 5, 6, 7, 8)
    config.rl.optimizer.learning_rate = 1e-6
    config.rl.optimizer.schedule = "constant"
    config.rl.optimizer.warmup_steps = 20
    config.eval.batch_size = 256
    return config
