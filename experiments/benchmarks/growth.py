"""Suite `growth`: what a turn costs as slots, trajectories, entries and documents grow."""

import dataclasses
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import matplotlib
import tqdm
from jax.sharding import Mesh

from experiments.benchmarks import memory_suite, rollout_suite, timing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PEERS = ("faiss", "numpy")
AXES = {
    "slots": (64, 256, 1024, 4096, 16384),
    "trajectories": (16, 64, 256, 1024),
    "entry_length": (8, 16, 32, 64, 128),
}
_LABELS = {"ours": "ours", "faiss": "FAISS, one index a trajectory", "numpy": "NumPy, vectorised"}


def measure_memory(
    base: memory_suite.Load, mesh: Mesh, *, runs: int, axes=AXES
) -> dict[str, list[dict[str, Any]]]:
    """Milliseconds of a turn of all trajectories, along each axis, everything else as in `base`.

    Args:
      base: the load to start from; along the axis of slots it should have few trajectories, for
        16,384 slots of 256 trajectories would hold 2 GiB of keys on each side.
      mesh: of our side.
      runs: of each contestant at each point.
      axes: values by the name of a field of `Load`.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    points = [(axis, value) for axis, values in axes.items() for value in values]
    for axis, value in tqdm.tqdm(points, desc="growth", leave=False):
        load = dataclasses.replace(base, **{axis: value})
        if axis == "slots":
            load = dataclasses.replace(load, trajectories=min(base.trajectories, 32))
        found = memory_suite.run(load, mesh, runs=runs, peers=PEERS, one_core=False)
        point: dict[str, Any] = {axis: value}
        for name, result in found.items():
            for side, key in (("ours", "ours_seconds"), (name, "peer_seconds")):
                point[side] = _milliseconds(result.get(key), load.turns)
        curves.setdefault(axis, []).append(point)
    return curves


def _milliseconds(seconds: list[float] | None, turns: int) -> float | None:
    return None if seconds is None else 1e3 * statistics.median(seconds) / turns


def measure_turns(
    make_scene: Callable[[str], rollout_suite.Scene], splits: list[str], *, runs: int
) -> list[dict[str, Any]]:
    """Seconds a trajectory of the jitted episode on documents of growing length."""
    points = []
    for split in tqdm.tqdm(splits, desc="growth over turns", leave=False):
        scene = make_scene(split)
        ours = rollout_suite.Ours(scene)
        seconds = timing.measure({"ours": timing.Contestant(ours.run)}, runs=runs)["ours"]
        live = jax.device_get(ours.trajectories.turns.live)
        points.append(
            {
                "split": split,
                "turns": float(live.sum(axis=1).mean()),
                "ours": 1e3 * statistics.median(seconds) / len(live),
            }
        )
    return points


def plot(curves: dict[str, list[dict[str, Any]]], path: str | os.PathLike[str]) -> None:
    """Draws the curves as a PNG or PDF; the ending of `path` chooses.

    Args:
      curves: points by axis, as `measure_memory` gives them, and those of `measure_turns` under
        "turns".
      path: file to write.
    """
    figure, panels = plt.subplots(
        1, len(curves), figsize=(4 * len(curves), 3.6), layout="constrained", squeeze=False
    )
    for panel, (axis, points) in zip(panels[0], curves.items(), strict=True):
        for name, label in _LABELS.items():
            drawn = [(p[axis], p[name]) for p in points if p.get(name) is not None]
            if drawn:
                panel.plot(*zip(*drawn, strict=True), marker="o", label=label)
        episodes = axis == "turns"
        panel.set(
            title="Jitted episode" if episodes else "A turn of all trajectories",
            xlabel="turns an episode" if episodes else axis.replace("_", " "),
            ylabel="ms a trajectory" if episodes else "ms",
        )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
