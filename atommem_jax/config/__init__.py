"""The one door for configs: a `ConfigDict` is parsed once into a frozen `Experiment`.

`load_config` reads a config file, `upgrade` knows what older configs and checkpoints called things,
`parse` checks every field and returns the `Experiment`. After it nothing reads a `ConfigDict`.
"""

from atommem_jax.config.errors import (
    ConfigError,
    StoreError,
    check,
    check_path,
    is_section,
    list_paths,
    suggest,
)
from atommem_jax.config.experiment import (
    Experiment,
    differences,
    flatten,
    parse,
    parse_field,
    to_config_dict,
)
from atommem_jax.config.files import find_config, load_config
from atommem_jax.config.sections import (
    EVICTION_POLICIES,
    LAYERS,
    LENGTH_BUCKETS,
    CheckpointConfig,
    DebugConfig,
    DecoderConfig,
    EvalConfig,
    LoraConfig,
    MemoryConfig,
    MeshConfig,
    OptimizerConfig,
    PPOConfig,
    ProtocolConfig,
    RlConfig,
    RolloutConfig,
    SftConfig,
    TaskConfig,
    TeacherConfig,
    TokenizerConfig,
)
from atommem_jax.config.upgrade import upgrade

__all__ = [
    "EVICTION_POLICIES",
    "LAYERS",
    "LENGTH_BUCKETS",
    "CheckpointConfig",
    "ConfigError",
    "DebugConfig",
    "DecoderConfig",
    "EvalConfig",
    "Experiment",
    "LoraConfig",
    "MemoryConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PPOConfig",
    "ProtocolConfig",
    "RlConfig",
    "RolloutConfig",
    "SftConfig",
    "StoreError",
    "TaskConfig",
    "TeacherConfig",
    "TokenizerConfig",
    "check",
    "check_path",
    "differences",
    "find_config",
    "flatten",
    "is_section",
    "list_paths",
    "load_config",
    "parse",
    "parse_field",
    "suggest",
    "to_config_dict",
    "upgrade",
]
