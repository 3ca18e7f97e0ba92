"""What the processes of a run must agree about before it starts, each checked by name."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from atommem_jax import distributed, sharding
from atommem_jax.config import check, is_section
from atommem_jax.tasks.episodes import EpisodeShape
from atommem_jax.tokenizer import Tokenizer

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def check_same_run(config: ConfigDict) -> None:
    """Raises ConfigError, naming the odd process, unless all run the same thing."""
    distributed.check_same(
        distributed.describe_software([_ROOT / "atommem_jax", _ROOT / "experiments"]),
        "Install the same packages and the same checkout on every host, and start all again",
    )
    distributed.check_same(
        flatten(config, "config."), "Start all processes with the same --config and overrides"
    )


def check_same_data(tokenizer: Tokenizer, examples: Sequence[Any], shape: EpisodeShape) -> None:
    """Raises ConfigError, naming the odd process, unless all read the same data."""
    distributed.check_same(
        {
            "tokenizer": hashlib.sha256(tokenizer.to_bytes()).hexdigest()[:16],
            "training samples": len(examples),
            "shape": str(shape),
        },
        "Give all processes one --data_root, or copy it from the first host to the others",
    )


def check_every_process(mesh: Mesh) -> None:
    """Raises ConfigError where a process has no device in the mesh."""
    used = {device.process_index for device in mesh.devices.flat}
    idle = sorted(set(range(jax.process_count())) - used)
    check(
        not idle,
        f"mesh.data={mesh.shape[sharding.DATA]}: the {mesh.size} devices are those of "
        f"{len(used)} of {jax.process_count()} processes, and {idle} would have none; set "
        "mesh.data=0 for all devices, or start fewer processes",
    )


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{path: value} of every field that is no section."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        inner = (
            flatten(value, f"{prefix}{name}.") if is_section(value) else {f"{prefix}{name}": value}
        )
        values |= inner
    return values
