"""The budget frontier: what exact match costs in tokens and slots, by method and length.

A point is one evaluation: a method, on documents of one length, with so many slots and so many
reads that a question or a chunk may cost. Its price is the number of tokens that the model reads
and writes in an episode. A point lies on the frontier of its length where no cheaper one is as
good.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from atommem_jax.report import figures


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation and its price."""

    method: str
    split: str
    slots: int
    reads: int  # that a chunk or a question may cost
    em: float
    ci_low: float
    ci_high: float
    turns: float  # an episode
    tokens: float  # that the model reads and writes in an episode

    @classmethod
    def of(cls, method: str, slots: int, reads: int, summary: Mapping[str, Any]) -> "Point":
        """Of a summary of `evaluate.py`."""
        told = summary["statistics"]
        written = told["tokens"] / summary["episodes"]
        return cls(
            method,
            summary["split"],
            slots,
            reads,
            summary["em"],
            summary["ci_low"],
            summary["ci_high"],
            told["turns"],
            told["turns"] * told["prompt_tokens"] + written,
        )


def find_frontier(points: Sequence[Point]) -> list[Point]:
    """Those than which no other is both as cheap and better, or cheaper and as good.

    In the order of their tokens. Raises ValueError for points of several splits: what one costs
    says nothing of another.
    """
    if len({point.split for point in points}) > 1:
        raise ValueError(f"points of {sorted({p.split for p in points})} cannot be compared")
    frontier: list[Point] = []
    for point in sorted(points, key=lambda p: (p.tokens, -p.em, p.slots)):
        if not frontier or point.em > frontier[-1].em:
            frontier.append(point)
    return frontier


def render(points: Sequence[Point]) -> str:
    """A table in Markdown, by split and tokens; what lies on the frontier is in bold."""
    lines = [
        "| split | method | slots | reads | EM | 95% interval | turns | tokens an episode |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for split in dict.fromkeys(point.split for point in points):
        rows = [point for point in points if point.split == split]
        best = find_frontier(rows)
        for p in sorted(rows, key=lambda p: (p.tokens, p.slots)):
            em = f"**{p.em:.3f}**" if p in best else f"{p.em:.3f}"
            lines.append(
                f"| {split} | {p.method} | {p.slots} | {p.reads} | {em} | {p.ci_low:.3f} .. "
                f"{p.ci_high:.3f} | {p.turns:.1f} | {p.tokens:,.0f} |"
            )
    return "\n".join(lines) + "\n"


@figures.styled
def draw(points: Sequence[Point]) -> Figure | None:
    """EM against tokens, a panel a length; colour and shape tell the method, size the slots.

    A line joins what lies on the frontier of its length. None where there are no points.
    """
    splits = list(dict.fromkeys(point.split for point in points))
    if not splits:
        return None
    methods = list(dict.fromkeys(point.method for point in points))
    sizes = {slots: 18 + 22 * i for i, slots in enumerate(sorted({p.slots for p in points}))}
    figure, panels = plt.subplots(
        1,
        len(splits),
        figsize=(1.2 + 2.6 * len(splits), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, split in zip(panels[0], splits, strict=True):
        rows = [point for point in points if point.split == split]
        best = find_frontier(rows)
        axes.plot(
            [p.tokens for p in best],
            [p.em for p in best],
            color=figures.MUTED,
            linestyle=":",
            drawstyle="steps-post",
            zorder=1,
        )
        for i, method in enumerate(methods):
            mine = [p for p in rows if p.method == method]
            axes.scatter(
                [p.tokens for p in mine],
                [p.em for p in mine],
                s=[sizes[p.slots] for p in mine],
                color=figures.SERIES[i % len(figures.SERIES)],
                marker=figures.MARKERS[i % len(figures.MARKERS)],
                alpha=0.8,
                label=figures.shorten(method),
                zorder=2,
            )
        axes.set(title=figures.shorten(split), xscale="log", xlabel="tokens an episode")
        axes.set_ylim(-0.02, 1.04)
        # The formatter of a logarithmic scale writes formulas, which our style does not read.
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0, 0].set_ylabel("exact match")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    for slots, size in sizes.items():
        handles.append(plt.scatter([], [], s=size, color=figures.MUTED))
        labels.append(f"{slots} slots")
    figure.legend(handles, labels, loc="outside lower left", ncols=4, columnspacing=1.2)
    return figure
