"""The learning plot: a picture with curves in it, and an error where there is nothing to draw."""

import matplotlib.image
import numpy as np
import pytest

from atommem_jax import report


def make_records(rl_steps: int):
    """Records of a run with two SFT steps before RL."""
    evaluated = {"em": 0.4, "ci_low": 0.3, "ci_high": 0.5}
    records = [
        {"step": 1, "stage": "sft", "loss": 2.0},
        {"step": 2, "stage": "sft", "loss": 1.0},
        {"step": 2, "stage": "eval", **evaluated},
    ]
    for i in range(rl_steps):
        counts = {
            f"applied/{name}": 1.0 + i
            for name in ("create", "read", "update", "delete", "scratchpad")
        }
        rest = {"em": i / 10, "sampled_nll": 1.0, "clip_fraction": 0.1, "occupancy": 3.0}
        records.append({"step": 3 + i, "stage": "rl", **rest, **counts})
    return [*records, {"step": 2 + rl_steps, "stage": "eval", **evaluated}]


def test_a_plot_shows_the_run(tmp_path):
    report.plot_learning(make_records(9), tmp_path / "long.png")
    report.plot_learning(make_records(2), tmp_path / "short.png")
    pixels = {name: matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("long", "short")}
    height, width = pixels["long"].shape[:2]
    assert width > 2 * height > 400  # three panels side by side
    # Curves are coloured, axes and text are grey; every panel holds some.
    for panel in np.array_split(pixels["long"][..., :3], 3, axis=1):
        assert (np.ptp(panel, axis=-1) > 0.2).sum() > 500
    assert (pixels["long"] != pixels["short"]).any()


def test_the_ending_chooses_the_format(tmp_path):
    report.plot_learning(make_records(2), tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("records", [[], [{"step": 1, "stage": "sft", "loss": 1.0}]])
def test_a_run_without_rl_is_refused(tmp_path, records):
    with pytest.raises(ValueError, match=r"rl\.steps > 0"):
        report.plot_learning(records, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
