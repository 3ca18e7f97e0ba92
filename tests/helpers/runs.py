"""The smallest run of the scripts: sizes, processes, and what a run leaves behind."""

import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from atommem_jax.config import Experiment, parse
from atommem_jax.metrics import read_metrics
from experiments.configs import synthetic
from tests.conftest import COMPILATION_CACHE, LEAST_EFFORT, ROOT

SFT_STEPS, RL_STEPS = 6, 6

# An untrained model answers nothing right, so groups have no advantage: the entropy bonus gives
# every RL step a gradient all the same, and the KL makes its checkpoints hold a reference.
OVERRIDES = {
    "mesh.data": 2,
    "task.base_facts": 8,
    "task.train_examples": 512,  # enough that names of the test splits are words of the tokenizer
    "task.test_examples": 12,  # does not fill two batches
    "task.scales": (1, 2),
    "model.width": 16,
    "model.num_layers": 1,
    "sft.steps": SFT_STEPS,
    "sft.min_reward": 0.0,
    "sft.length_buckets": (8,),  # one program instead of two
    "sft.log_every": 1,
    "sft.eval_every": 3,
    "sft.save_every": 2,
    "rl.steps": RL_STEPS,
    "rl.episodes": 4,
    "rl.save_every": 1,
    "rl.eval_every": 2,
    "rl.ppo.group_size": 4,
    "rl.ppo.minibatches": 2,
    "rl.ppo.length_buckets": (8,),
    "rl.ppo.entropy_coef": 0.01,
    "rl.ppo.kl_coef": 0.01,
    "eval.episodes": 8,
    "eval.batch_size": 8,
}

# Not the targets that are taken by default: some matrices of a layer only, and one outside of all.
ADAPTERS = {"lora__rank": 2, "lora__targets": ("query", "down", "embedder")}

# What a clock measured; everything else of a repeated step must be the same.
_TIMINGS = {
    "seconds",
    "rollout_seconds",
    "update_seconds",
    "tokens_per_second",
    "trajectories_per_second",
}

# Apart from the cache of the test process itself: scripts have other devices, and one that is
# killed may leave half an entry.
_CACHE = COMPILATION_CACHE.parent / "jax_scripts"


def make_config(**overrides) -> Experiment:
    """The tiny config; a section's field is written with two underscores (`rl__steps=2`)."""
    config = synthetic.get_config()
    paths = OVERRIDES | {name.replace("__", "."): value for name, value in overrides.items()}
    config.update_from_flattened_dict(paths)
    return parse(config)


def make_flags(**overrides) -> list[str]:
    """The tiny config as flags."""
    paths = OVERRIDES | {name.replace("__", "."): value for name, value in overrides.items()}
    return [f"--config.{path}={value}" for path, value in paths.items()]


def make_environment(*, as_users: bool = False) -> dict[str, str]:
    """The environment of this process without its settings of JAX, and a compilation cache.

    Scripts are compiled with the least effort, as tests are, unless `as_users`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return environment | {
        "ATOMMEM_CACHE": str(_CACHE),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(1 << 30),
        "XLA_FLAGS": "" if as_users else LEAST_EFFORT,
    }


def start(
    script: str, *arguments: str | os.PathLike[str], as_users: bool = False
) -> subprocess.Popen:
    """Starts a script as a user does: devices and precision of the test process do not reach it."""
    command = [sys.executable, str(ROOT / "experiments" / script), *map(str, arguments)]
    environment = make_environment(as_users=as_users)
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(
    script: str, *arguments: str | os.PathLike[str], status: int = 0, as_users: bool = False
) -> str:
    """Runs a script to its end; returns what it printed."""
    process = start(script, *arguments, as_users=as_users)
    # One after the other: progress bars would be mixed into the lines of a table.
    output = b"".join(process.communicate()).decode()
    assert process.returncode == status, output[-3000:]
    return output


def read_state(workdir: pathlib.Path, step: int) -> dict:
    """The whole saved state of a step as NumPy arrays."""
    folder = workdir / "checkpoints" / str(step) / "state"
    checkpointer = ocp.PyTreeCheckpointer()
    leaves = checkpointer.metadata(folder).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
    return checkpointer.restore(folder, restore_args=as_numpy)


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit, types included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        assert x.tobytes() == y.tobytes(), path


def list_steps(workdir: pathlib.Path) -> list[int]:
    """The complete checkpoints, ascending."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def read_repeatable(workdir: pathlib.Path) -> list[dict]:
    """The metrics without what a clock measured."""
    return [
        {name: value for name, value in record.items() if name not in _TIMINGS}
        for record in read_metrics(workdir)
    ]


def find_largest_difference(ours: list[dict], theirs: list[dict]) -> tuple[float, str]:
    """Of all metrics of all steps, relative to the larger of the value and one; and where."""
    found = (0.0, "")
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert (mine["step"], mine["stage"]) == (other["step"], other["stage"])
        # How full lanes are depends on which rows are on a device.
        for name in mine.keys() - {"step", "stage", "lane_utilisation"}:
            gap = abs(mine[name] - other[name]) / max(1.0, abs(other[name]))
            assert math.isfinite(gap), (mine["step"], name)
            found = max(found, (gap, f"{name} of {mine['stage']} step {mine['step']}"))
    return found


def has_logged(workdir: pathlib.Path, step: int, stage: str) -> Callable[[], bool]:
    """A moment: the metrics of this step have been written."""

    def reached() -> bool:
        records = read_metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
        return any(r["step"] >= step and r["stage"] == stage for r in records)

    return reached


def is_saving(workdir: pathlib.Path, after: int) -> Callable[[], bool]:
    """A moment: a save of a step past `after` is under way."""

    def reached() -> bool:
        folders = (workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")
        return any(int(folder.name.split(".")[0]) > after for folder in folders)

    return reached
