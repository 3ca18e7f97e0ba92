"""What the processes of a run must agree about before it starts, each checked by name."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from atommem_jax.config import Experiment, check, flatten
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.parallel import processes, rules
from atommem_jax.tasks.encoding import EpisodeShape

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def check_same_run(config: Experiment) -> None:
    """Raises ConfigError, naming the odd process, unless all run the same thing."""
    processes.check_same(
        processes.describe_software([_ROOT / "atommem_jax", _ROOT / "experiments"]),
        "Install the same packages and the same checkout on every host, and start all again",
    )
    processes.check_same(
        flatten(config, "config."), "Start all processes with the same --config and overrides"
    )


def check_same_data(tokenizer: Tokenizer, examples: Sequence[Any], shape: EpisodeShape) -> None:
    """Raises ConfigError, naming the odd process, unless all read the same data."""
    processes.check_same(
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
        f"mesh.data={mesh.shape[rules.DATA]}: the {mesh.size} devices are those of "
        f"{len(used)} of {jax.process_count()} processes, and {idle} would have none; set "
        "mesh.data=0 for all devices, or start fewer processes",
    )
