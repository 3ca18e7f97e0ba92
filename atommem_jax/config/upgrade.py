"""Configs of older versions, in today's names and with today's fields.

The older names stand in `errors.RENAMED`, which an older flag on the command line is answered from;
nothing else knows of them. A field that an older config lacks gets the value that it had when there
was no such field, which need not be the default of today.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from atommem_jax.config.errors import RENAMED, is_section

_ABSENT: Mapping[str, Any] = {
    "workflow": "learned",
    "init_from": "",
    "profile": False,
    "prompt": "compact",
    "protocol.name": "compact",
    "protocol.free_text": False,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "mesh.slices": 1,
    "mesh.rollout_tensor": 0,
    "tokenizer.character_coverage": 1.0,
    "memory.weighting": "uniform",
    "memory.embedding": "hashed",
    "memory.encoder": "",
    "rollout.param_dtype": "float32",
    "rollout.cache_dtype": "",
    "rollout.cpu_decode": False,
    "rollout.score_chunk": 0,
    "rollout.cache_prefix": False,
    "rollout.draft": 0,
    "rollout.prompt_buckets": (8,),
    "rollout.least_rows": 0,
    "rollout.read_rows": 0,
    "model.remat_policy": "full",
    "model.attention": "auto",
    "lora.rank": 0,
    "teacher.forget": 1.0,
    "teacher.count": 1.0,
    "sft.data": "",
    "sft.length_buckets": (5, 8),
    "sft.student": "none",
    "sft.student_after": 0,
    "sft.student_min_reward": 1.0,
    "rl.ppo.length_buckets": (5, 8),
    "rl.reward": "",
    "rl.resample": 0,
    "rl.least_reader": 0.0,
    "rl.ppo.read_cost": 0.0,
    "rl.ppo.create_cost": 0.0,
    "rl.ppo.invalid_cost": 0.0,
    "rl.ppo.reward_kl_coef": 0.0,
    "rl.ppo.learn_from_cut": True,
    "rl.ppo.importance_cap": 0.0,
    "rl.ppo.value_warmup": 0,
    "debug.overfit": 0,
}
"""Path of a field that older configs lack -> the value they were run with."""


_RENAMED_TASKS: Mapping[str, str] = {"synthetic": "facts"}
"""Old `task.name` -> its name now."""


def upgrade(old: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The same config as nested dicts, in today's names and with today's fields.

    A field of today's name and one of its older name in the same config: the older one counts,
    as it stands in the file of a user that was written on top of a config of ours.
    """
    config = _copy(old)
    for before, now in RENAMED.items():
        section, name = _find(config, before)
        if section is not None and name in section:
            value = section.pop(name)
            target, new_name = _find(config, now, make=True)
            target[new_name] = value
    task, _ = _find(config, "task.name")
    called = task.get("name") if task is not None else None
    if task is not None and isinstance(called, str):  # `parse` refuses what is no text
        task["name"] = _RENAMED_TASKS.get(called, called)
    for path, value in _ABSENT.items():
        section, name = _find(config, path, make=True)
        section.setdefault(name, value)
    return config


def _copy(section: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    plain = section.to_dict() if isinstance(section, ConfigDict) else section
    return {name: _copy(value) if is_section(value) else value for name, value in plain.items()}


def _find(config: dict[str, Any], path: str, *, make: bool = False) -> tuple[Any, str]:
    """(section that a path lies in, last part of it); None where there is no such section."""
    *parents, name = path.split(".")
    section: Any = config
    for part in parents:
        if make and isinstance(section, dict):
            section = section.setdefault(part, {})
        elif isinstance(section, dict) and part in section:
            section = section[part]
        else:
            return None, name
        if not is_section(section):
            return None, name
    return section, name
