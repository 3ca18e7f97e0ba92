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
    tie_embeddings: bool
    norm_epsilon: float
    rope_factor: float = 1.0
    qk_norm: bool = False
    qkv_bias: bool = False

    def sizes(self) -> dict[str, Any]:
        """Keyword arguments of `ModelConfig`."""
        fields = dataclasses.asdict(self)
        return {name: fields[name] for name in fields if name not in _ABOUT}


_ABOUT = ("source", "parameters")


_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {"source": "Qwen/Qwen3", "qk_norm": True, "norm_epsilon": 1e-6},
    "qwen2_5": {"source": "Qwen/Qwen2.5", "qkv_bias": True, "norm_epsilon": 1e-6},
    "llama3_1": {"source": "meta-llama/Llama-3.1", "rope_factor": 8.0, "norm_epsilon": 1e-5},
    "smollm2": {"source": "HuggingFaceTB/SmolLM2", "norm_epsilon": 1e-5},
}
"""What all sizes of a family have in common; `source` is followed by the size."""

_COLUMNS = (
    *("parameters", "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads"),
    *("head_width", "mlp_width", "rope_theta", "tie_embeddings"),
)
# fmt: off
_SIZES = (
    ("qwen3", "0.6B", 596_049_920, 151_936, 1024, 28, 16, 8, 128, 3072, 1e6, True),
    ("qwen3", "1.7B", 1_720_574_976, 151_936, 2048, 28, 16, 8, 128, 6144, 1e6, True),
    ("qwen3", "4B", 4_022_468_096, 151_936, 2560, 36, 32, 8, 128, 9728, 1e6, True),
    ("qwen3", "8B", 8_190_735_360, 151_936, 4096, 36, 32, 8, 128, 12_288, 1e6, False),
    ("qwen3", "14B", 14_768_307_200, 151_936, 5120, 40, 40, 8, 128, 17_408, 1e6, False),
    ("qwen3", "32B", 32_762_123_264, 151_936, 5120, 64, 64, 8, 128, 25_600, 1e6, False),
    ("qwen2_5", "0.5B", 494_032_768, 151_936, 896, 24, 14, 2, 64, 4864, 1e6, True),
    ("qwen2_5", "1.5B", 1_543_714_304, 151_936, 1536, 28, 12, 2, 128, 8960, 1e6, True),
    ("qwen2_5", "3B", 3_085_938_688, 151_936, 2048, 36, 16, 2, 128, 11_008, 1e6, True),
    ("qwen2_5", "7B", 7_615_616_512, 152_064, 3584, 28, 28, 4, 128, 18_944, 1e6, False),
    ("llama3_1", "8B", 8_030_261_248, 128_256, 4096, 32, 32, 8, 128, 14_336, 5e5, False),
    ("smollm2", "135M", 134_515_008, 49_152, 576, 30, 9, 3, 64, 1536, 1e5, True),
    ("smollm2", "360M", 361_821_120, 49_152, 960, 32, 15, 5, 64, 2560, 1e5, True),
    ("smollm2", "1.7B", 1_711_376_384, 49_152, 2048, 24, 32, 32, 64, 8192, 1.3e5, True),
)
# fmt: on


def _make_preset(family: str, size: str, *sizes: Any) -> Preset:
    common = dict(_FAMILIES[family])
    common["source"] += f"-{size}"
    return Preset(**common, **dict(zip(_COLUMNS, sizes, strict=True)))


PRESETS: Mapping[str, Preset] = {
    f"{family}_{size.lower().replace('.', '_')}": _make_preset(family, size, *sizes)
    for family, size, *sizes in _SIZES
}
"""Family and size, as `qwen3_0_6b` -> the preset."""


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
