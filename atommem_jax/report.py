"""Plots of a run, for people who would rather look than read."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_OPERATIONS = ("create", "read", "update", "delete", "scratchpad")


def plot_learning(records: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws EM, operations an episode and the policy's entropy over RL as a PNG or PDF.

    Args:
      records: of `metrics.jsonl`: mappings with `step`, `stage` ('rl', 'eval') and scalars.
      path: file to write; its ending chooses the format.

    Raises ValueError where no RL step was recorded.
    """
    rl = [record for record in records if record["stage"] == "rl"]
    if not rl:
        raise ValueError("records hold no step of stage 'rl'; train with rl.steps > 0 first")
    first = rl[0]["step"]
    steps = [record["step"] - first + 1 for record in rl]
    validation = [r for r in records if r["stage"] == "eval" and r["step"] >= first - 1]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")

    left.plot(steps, [r["em"] for r in rl], label="training, temperature 1")
    left.errorbar(
        [r["step"] - first + 1 for r in validation],
        [r["em"] for r in validation],
        yerr=[
            [r["em"] - r["ci_low"] for r in validation],
            [r["ci_high"] - r["em"] for r in validation],
        ],
        fmt="o",
        capsize=3,
        label="validation, greedy, 95% interval",
    )
    left.set(title="Exact match", xlabel="RL step", ylim=(0, 1.02))
    left.legend(loc="lower right", fontsize=8)

    for name in _OPERATIONS:
        middle.plot(steps, [r[f"applied/{name}"] for r in rl], label=name)
    middle.set(title="Operations applied, an episode", xlabel="RL step")
    middle.set_ylim(bottom=0)
    middle.legend(fontsize=8)

    right.plot(steps, [r["sampled_nll"] for r in rl], label="entropy, nats a token")
    right.plot(steps, [r["clip_fraction"] for r in rl], label="clip fraction")
    right.plot(steps, [r["occupancy"] / 10 for r in rl], label="entries in the table / 10")
    right.set(title="Policy and table", xlabel="RL step")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
