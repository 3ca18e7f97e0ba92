"""Figures of where wrong answers broke: stacked bars by method and scale, and over training.

The stages are those of `learning.life_cycle`. Neighbours in the life of a fact share a colour:
what was never stored, what was not kept, what was not shown, what was not used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from atommem_jax.learning.life_cycle import STAGES
from atommem_jax.report import figures
from atommem_jax.report.figures import MUTED, SERIES, Record

Shares = Mapping[str, float]  # stage -> share of all questions whose answer broke there
Failures = Mapping[str, Mapping[str, Shares]]  # method -> scale -> shares

_COLORS: Mapping[str, tuple[str, float]] = {
    "unseen": (SERIES[5], 1.0),
    "not_written": (SERIES[0], 1.0),
    "refused": (SERIES[0], 0.62),
    "miswritten": (SERIES[0], 0.3),
    "corrupted": (SERIES[1], 1.0),
    "overwritten": (SERIES[1], 0.72),
    "deleted": (SERIES[1], 0.48),
    "evicted": (SERIES[1], 0.26),
    "not_shown": (SERIES[2], 1.0),
    "not_used": (SERIES[3], 1.0),
    "unknown": (MUTED, 0.4),
}
"""Stage -> colour, and how much of it; a stage without one would fail in `_stack`."""


def read_shares(record: Mapping[str, Any]) -> dict[str, float] | None:
    """Of a summary of `evaluate.py`, or of a validation in `metrics.jsonl`; None where untold."""
    if "stages" in record:
        return {stage: count / record["questions"] for stage, count in record["stages"].items()}
    found = {stage: record[name] for stage in STAGES if (name := f"stage/{stage}") in record}
    return found or None


@figures.styled
def draw_failures(
    runs: Mapping[str, Failures], columns: Sequence[str], labels: Mapping[str, str]
) -> Figure | None:
    """Wrong answers by the stage at which they broke: a panel a scale, a bar a method.

    Args:
      runs: shares by the name of the run; a method may end in a temperature, as `_t1`.
      columns: the scales, in order.
      labels: what a method is called, without its temperature; its name where missing.

    Returns None where no run tells of any.
    """
    rows = [(run, method) for run, failures in runs.items() for method in failures]
    columns = [c for c in columns if any(c in runs[run][method] for run, method in rows)]
    if not rows or not columns:
        return None
    texts = []
    for run, method in rows:
        base, heat = figures.split_temperature(method)
        told = [figures.shorten(labels.get(base, base)), "greedy" if heat == "0" else f"at {heat}"]
        texts.append(" · ".join([*told, *([figures.shorten(run)] if len(runs) > 1 else [])]))
    cells = [[runs[run][method].get(column) for run, method in rows] for column in columns]
    size = (0.6 + 0.08 * max(map(len, texts)) + 1.9 * len(columns), 1.5 + 0.3 * len(rows))
    figure, panels = plt.subplots(
        1, len(columns), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    widest = max(sum(cell.values()) for column in cells for cell in column if cell is not None)
    for axes, column, shares in zip(panels[0], columns, cells, strict=True):
        places = [y for y, cell in enumerate(shares) if cell is not None]
        _stack(axes, places, [cell for cell in shares if cell is not None], across=True)
        axes.set(title=figures.shorten(column), xlabel="of all questions")
        axes.set_xlim(0, max(1.05 * widest, 0.01))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    panels[0, 0].set_yticks(range(len(rows)), texts, color=figures.INK)
    panels[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    _explain(figure, [cell for column in cells for cell in column if cell is not None])
    return figure


@figures.styled
def draw_failures_over_training(runs: Mapping[str, Sequence[Record]]) -> Figure | None:
    """Wrong answers of each validation by stage, a panel a run; None where none was recorded.

    runs: records of `metrics.jsonl` by the name of the run.
    """
    found = {
        name: [(r["step"], shares) for r in records if (shares := read_shares(r)) is not None]
        for name, records in runs.items()
    }
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        return None
    size = (1.5 + 3.4 * len(found), 3.4)
    figure, panels = plt.subplots(
        1, len(found), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (name, rows) in zip(panels[0], found.items(), strict=True):
        places = list(range(len(rows)))
        _stack(axes, places, [shares for _, shares in rows], across=False)
        # A bar a validation: stages of training have steps of different weight.
        every = -(-len(rows) // 8)
        axes.set_xticks(places[::every], [f"{step}" for step, _ in rows[::every]])
        axes.set(xlabel="step of training", title=figures.shorten(name) if len(found) > 1 else "")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0, 0].set_ylabel("of all questions")
    _explain(figure, [shares for rows in found.values() for _, shares in rows])
    return figure


def _stack(axes: Any, places: Sequence[int], rows: Sequence[Shares], across: bool) -> None:
    """Bars at these places, from left to right or from below."""
    ends = [0.0] * len(rows)
    axes.grid(False)  # it would be seen through the paler bars
    for stage in STAGES:
        sizes = [row.get(stage, 0.0) for row in rows]
        color, alpha = _COLORS[stage]
        if any(sizes):
            draw = axes.barh if across else axes.bar
            start = {"left": ends} if across else {"bottom": ends}
            draw(places, sizes, 0.62, **start, color=color, alpha=alpha, label=stage)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]


def _explain(figure: Figure, rows: Sequence[Shares]) -> None:
    """The legend: stages that occur, in their order."""
    stages = [stage for stage in STAGES if any(row.get(stage) for row in rows)]
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=_COLORS[stage][0], alpha=_COLORS[stage][1])
        for stage in stages
    ]
    labels = [stage.replace("_", " ") for stage in stages]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, columnspacing=1.2)
