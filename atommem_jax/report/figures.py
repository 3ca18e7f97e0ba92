"""Figures of one run or of several side by side, for paper (PNG, PDF) and for the page (SVG).

A figure is drawn in the colours of a white page. `to_svg` puts the names of style sheet variables
in their place, so that the same drawing follows the light or dark scheme of the page around it.
"""

import functools
import html
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from atommem_jax.config import paths

_P = ParamSpec("_P")
_T = TypeVar("_T")

Record = Mapping[str, Any]  # a line of metrics.jsonl: step, stage and scalars
Cell = Mapping[str, float]  # em, ci_low, ci_high
Cells = Mapping[str, Cell]  # scale -> cell
Scores = Mapping[str, Cells]  # by method

INK, MUTED, GRID = "#1f2328", "#59636e", "#d1d9e0"
SERIES = ("#0072b2", "#d55e00", "#00795a", "#a3478b", "#8a6100", "#4a5561")
"""Okabe and Ito's colours, darkened where they are pale: told apart by colour-blind eyes."""

VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"} | {
    color: f"var(--series-{i})" for i, color in enumerate(SERIES)
}

MARKERS = ("o", "s", "^", "D", "v", "P")
_LINES = ("-", "--", ":", "-.", "-", "--")
_OPERATIONS = ("create", "read", "update", "delete", "scratchpad")
_STYLE: dict[Any, Any] = {
    "text.color": INK,
    "text.parse_math": False,  # names of runs are no formulas
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "font.size": 9.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "atommem_jax",  # the same drawing gives the same file
    "pdf.fonttype": 42,
}


def styled(draw: Callable[_P, _T]) -> Callable[_P, _T]:
    """`draw` under the style of all figures, whatever the process has set."""

    @functools.wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with plt.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


# ---------------------------------------------------------------------------------------------
# Figures


@styled
def draw_em_curve(runs: Mapping[str, Sequence[Record]]) -> Figure | None:
    """Exact match over RL: of training, and of validation with its interval.

    Here and below `runs` are records of `metrics.jsonl` by the name of the run, and the result is
    None where none of them holds what is drawn.
    """
    rows = _find_stage(runs, "rl")
    if not rows:
        return None
    figure, axes = _make_axes("Exact match", "RL step")
    for i, name, rl in rows:
        prefix, first = _prefix(name, runs), rl[0]["step"] - 1
        axes.plot(
            _count_steps(rl), [r["em"] for r in rl], color=SERIES[i], label=f"{prefix}training"
        )
        found = [r for r in runs[name] if r["stage"] == "eval" and r["step"] >= first]
        if found:
            axes.errorbar(
                [r["step"] - first for r in found],
                [r["em"] for r in found],
                yerr=_whiskers(found),
                fmt=MARKERS[i],
                color=SERIES[i],
                capsize=2.5,
                label=f"{prefix}validation, greedy",
            )
    axes.set_ylim(0, 1.02)
    _add_legend(axes)
    return figure


@styled
def draw_operations(runs: Mapping[str, Sequence[Record]]) -> Figure | None:
    """Operations applied a turn over RL, a panel for each kind."""
    rows = _find_stage(runs, "rl")
    if not rows:
        return None
    figure, panels = plt.subplots(2, 3, figsize=(6.2, 4.2), sharex=True, layout="constrained")
    panels.flat[-1].remove()
    panels[0, -1].tick_params(labelbottom=True)
    for axes, operation in zip(panels.flat[:-1], _OPERATIONS, strict=True):
        for i, name, rl in rows:
            axes.plot(
                _count_steps(rl),
                _per_turn(rl, f"applied/{operation}"),
                color=SERIES[i],
                linestyle=_LINES[i],
                label=shorten(name),
            )
        axes.set_title(operation)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        _start_at_zero(axes, least=0.1)
    for axes in (*panels[1, :-1], panels[0, -1]):
        axes.set_xlabel("RL step")
    for axes in panels[:, 0]:
        axes.set_ylabel("a turn")
    if len(runs) > 1:
        handles, names = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2)
    return figure


@styled
def draw_occupancy(
    runs: Mapping[str, Sequence[Record]], slots: Mapping[str, int] | None = None
) -> Figure | None:
    """Valid entries at the start of a turn over RL, with the capacity of the tables if known."""
    rows = _find_stage(runs, "rl")
    if not rows:
        return None
    figure, axes = _make_axes("Table: entries at the start of a turn", "RL step")
    for i, name, rl in rows:
        prefix, steps = _prefix(name, runs), _count_steps(rl)
        axes.plot(steps, [r["occupancy"] for r in rl], color=SERIES[i], label=f"{prefix}entries")
        evicted = _per_turn(rl, "evicted/create")
        axes.plot(steps, evicted, color=SERIES[i], linestyle="--", label=f"{prefix}evicted a turn")
    for capacity in sorted(set((slots or {}).values())):
        axes.axhline(capacity, color=MUTED, linestyle=":", label=f"capacity, {capacity}")
    _start_at_zero(axes, least=1.0)
    _add_legend(axes)
    return figure


@styled
def draw_policy(runs: Mapping[str, Sequence[Record]]) -> Figure | None:
    """The policy's entropy and the share of clipped tokens over RL."""
    rows = _find_stage(runs, "rl")
    if not rows:
        return None
    figure, axes = _make_axes("Policy", "RL step")
    for i, name, rl in rows:
        prefix, steps = _prefix(name, runs), _count_steps(rl)
        entropy, clipped = ([r[field] for r in rl] for field in ("sampled_nll", "clip_fraction"))
        axes.plot(steps, entropy, color=SERIES[i], label=f"{prefix}entropy, nats a token")
        axes.plot(steps, clipped, color=SERIES[i], linestyle="--", label=f"{prefix}clipped share")
    _start_at_zero(axes, least=0.1)
    _add_legend(axes)
    return figure


@styled
def draw_sft(runs: Mapping[str, Sequence[Record]]) -> Figure | None:
    """The loss of supervised fine-tuning."""
    rows = _find_stage(runs, "sft")
    if not rows:
        return None
    figure, axes = _make_axes("SFT: cross-entropy, nats a token", "SFT step")
    for i, name, sft in rows:
        steps = [r["step"] for r in sft]
        axes.plot(
            steps,
            [r["loss"] for r in sft],
            color=SERIES[i],
            linestyle=_LINES[i],
            label=shorten(name),
        )
    _start_at_zero(axes, least=0.1)
    if len(runs) > 1:
        _add_legend(axes)
    return figure


@styled
def draw_scores(
    runs: Mapping[str, Scores], columns: Sequence[str], labels: Mapping[str, str]
) -> Figure | None:
    """Exact match by scale: a panel a scale, a row a method, a dot with its 95% interval.

    Args:
      runs: scores by the name of the run. A method whose name ends in `_t1` is the one without
        that ending, sampled at temperature 1: a hollow dot in the same row.
      columns: the scales, in order.
      labels: what a method is called in the figure; its name where missing.
    """
    rows = order_methods(runs)
    if not rows or not columns:
        return None
    texts = [
        shorten(labels.get(method, method)) + (f" · {shorten(run)}" if len(runs) > 1 else "")
        for run, method in rows
    ]
    size = (0.6 + 0.08 * max(map(len, texts)) + 1.75 * len(columns), 1.2 + 0.3 * len(rows))
    figure, panels = plt.subplots(
        1, len(columns), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    names = list(runs)
    for axes, column in zip(panels[0], columns, strict=True):
        for y, (run, method) in enumerate(rows):
            color = SERIES[names.index(run) % len(SERIES)]
            _draw_row(axes, runs[run], method, column, y, color)
        axes.set(
            title=shorten(column), xlim=(-0.04, 1.04), xticks=(0, 0.5, 1), xlabel="exact match"
        )
    panels[0, 0].set_yticks(range(len(rows)), texts, color=INK)
    panels[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(
        handles=[_make_key(full=True), _make_key(full=False)],
        labels=["greedy", "temperature 1"],
        loc="outside upper right",
        ncols=2,
    )
    return figure


def order_methods(runs: Mapping[str, Scores]) -> list[tuple[str, str]]:
    """(run, method without the ending of a temperature), the highest mean EM first."""
    means: dict[tuple[str, str], float] = {}
    for run, scores in runs.items():
        for method in dict.fromkeys(split_temperature(name)[0] for name in scores):
            cells = scores.get(method) or next(
                row for name, row in scores.items() if split_temperature(name)[0] == method
            )
            means[run, method] = float(np.mean([cell["em"] for cell in cells.values()]))
    return sorted(means, key=lambda key: -means[key])


def split_temperature(name: str) -> tuple[str, str]:
    """('atommem_rl', '1') of 'atommem_rl_t1'; the temperature is '0' where none is named."""
    match = re.fullmatch(r"(.*)_t(\d+(?:\.\d+)?)", name)
    return (match[1], match[2]) if match else (name, "0")


# ---------------------------------------------------------------------------------------------
# Parts of figures


def _rl(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["stage"] == "rl"]


def _find_stage(
    runs: Mapping[str, Sequence[Record]], stage: str
) -> list[tuple[int, str, list[Record]]]:
    """(number of its colour, name, records of the stage) of the runs that have any."""
    rows = []
    for i, (name, records) in enumerate(runs.items()):
        found = [record for record in records if record["stage"] == stage]
        if found:
            rows.append((i % len(SERIES), name, found))
    return rows


def _count_steps(rl: Sequence[Record]) -> list[int]:
    """Steps of the stage, counted from 1."""
    return [record["step"] - rl[0]["step"] + 1 for record in rl]


def _per_turn(rl: Sequence[Record], field: str) -> list[float]:
    return [record[field] / max(record["turns"], 1e-9) for record in rl]


def _add_legend(axes: Any) -> None:
    """Under the panel, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower left", ncols=2, columnspacing=1.2)


def _prefix(name: str, runs: Mapping[str, Any]) -> str:
    return f"{shorten(name)}: " if len(runs) > 1 else ""


def shorten(name: str, most: int = 32) -> str:
    """A label that leaves room for what it labels."""
    return name if len(name) <= most else name[: most - 1] + "\u2026"


def _make_axes(title: str, xlabel: str) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=(4.9, 3.2), layout="constrained")
    axes.set(title=title, xlabel=xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _start_at_zero(axes: Any, least: float) -> None:
    """From zero to what is drawn, or to `least`: noise about zero must not fill a panel."""
    axes.set_ylim(0, max(least, 1.06 * axes.dataLim.y1))


def _whiskers(cells: Sequence[Cell]) -> list[list[float]]:
    """Lengths of the error bars, below and above."""
    return [
        [max(cell["em"] - cell["ci_low"], 0.0) for cell in cells],
        [max(cell["ci_high"] - cell["em"], 0.0) for cell in cells],
    ]


def _draw_row(axes: Any, scores: Scores, method: str, column: str, y: int, color: str) -> None:
    for name, shift, full in ((method, -0.13, True), (f"{method}_t1", 0.13, False)):
        cell = scores.get(name, {}).get(column)
        if cell is None:
            continue
        axes.errorbar(
            [cell["em"]],
            [y + shift],
            xerr=_whiskers([cell]),
            fmt="o",
            color=color,
            markersize=4,
            markerfacecolor=color if full else "none",
            elinewidth=2.2,
        )


def _make_key(full: bool) -> Any:
    face = MUTED if full else "none"
    return plt.Line2D([], [], marker="o", linestyle="", color=MUTED, markerfacecolor=face)


# ---------------------------------------------------------------------------------------------
# Files


@styled
def save(figure: Figure, stem: str | os.PathLike[str]) -> None:
    """Writes <stem>.png and <stem>.pdf."""
    path = paths.locate(stem)
    # Without a date: the same figure gives the same bytes.
    for ending, options in ((".png", {"dpi": 160}), (".pdf", {"metadata": {"CreationDate": None}})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending[1:], **options)
        path.with_suffix(ending).write_bytes(buffer.getvalue())


@styled
def to_svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element for a page, in its colours, read aloud as `label`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Within a page the namespaces are understood, and nothing should look like an address.
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})",
        lambda match: f"{match[1]}: {VARIABLES.get(match[2], match[2])}",
        text,
    )
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()


def plot_learning(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Draws EM, operations an episode and the policy's entropy over RL as one PNG or PDF.

    Args:
      records: of `metrics.jsonl`: mappings with `step`, `stage` ('rl', 'eval') and scalars.
      path: file to write; its ending chooses the format.

    Raises ValueError where no RL step was recorded.
    """
    rl = _rl(records)
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
        yerr=_whiskers(validation),
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
