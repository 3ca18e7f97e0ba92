"""Exact match by length of the document, on a logarithmic scale: one line a method."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from atommem_jax.report import figures
from atommem_jax.tasks import babilong

_SHORTEST = 250  # tokens at which a document without any background (`0k`) is drawn
_APART = 2.5  # times as long as the one before: a name on the axis has room


class Cited(NamedTuple):
    """A figure that somebody else published: a point, or one that holds over a range of lengths."""

    name: str
    tokens: tuple[int, int]  # from, to
    em: float


def find_tokens(split: str) -> int | None:
    """The tokens of documents that a split names, as 64,000 of `test_64k`; None where it does not.

    Of `test_4x`, a multiple of what was trained on, nobody can tell.
    """
    match = re.fullmatch(r"(?:.*_)?(\d+[km])", split)
    return babilong.count_tokens(match[1]) if match else None


@figures.styled
def draw(methods: Mapping[str, figures.Cells], cited: Sequence[Cited] = ()) -> Figure | None:
    """EM against tokens with 95% intervals; None where fewer than two lengths are known.

    Args:
      methods: name -> split -> cell. Splits that name no length are left out.
      cited: published figures of other models, drawn hollow and grey.
    """
    lines = {name: _sort(cells) for name, cells in methods.items()}
    lengths = {tokens for line in lines.values() for tokens, _ in line}
    if len(lengths) < 2:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    for i, (name, line) in enumerate(lines.items()):
        if not line:
            continue
        again, place = divmod(i, len(figures.SERIES))  # who shares a colour has another line
        color = figures.SERIES[place]
        places = [max(tokens, _SHORTEST) for tokens, _ in line]
        axes.plot(
            places,
            [cell["em"] for _, cell in line],
            color=color,
            linestyle="--" if again else "-",
            marker=figures.MARKERS[(i + again) % len(figures.MARKERS)],
            label=figures.shorten(name),
        )
        lows, highs = ([cell[bound] for _, cell in line] for bound in ("ci_low", "ci_high"))
        axes.fill_between(places, lows, highs, color=color, alpha=0.13, linewidth=0)
    for i, (name, (least, most), em) in enumerate(cited):
        axes.plot(
            [least, most],
            [em, em],
            color=figures.MUTED,
            linestyle=":",
            marker=figures.MARKERS[-1 - i % len(figures.MARKERS)],
            markerfacecolor="none",
            label=figures.shorten(name, 44),
        )
    marks = _choose(lengths | {tokens for name in cited for tokens in name.tokens})
    places = [max(tokens, _SHORTEST) for tokens in marks]
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="exact match", ylim=(-0.02, 1.04))
    axes.set_xticks(places, [_spell(tokens) for tokens in marks])
    axes.minorticks_off()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, columnspacing=1.2)
    return figure


def _sort(cells: figures.Cells) -> list[tuple[int, figures.Cell]]:
    found = [(find_tokens(split), cell) for split, cell in cells.items()]
    return sorted(
        ((tokens, cell) for tokens, cell in found if tokens is not None), key=lambda pair: pair[0]
    )


def _choose(lengths: Iterable[int]) -> list[int]:
    """Those that have room for their names, from the shortest on."""
    chosen: list[int] = []
    for tokens in sorted(lengths):
        if not chosen or tokens >= _APART * max(chosen[-1], _SHORTEST):
            chosen.append(tokens)
    return chosen


def _spell(tokens: int) -> str:
    return f"{tokens // 1_000_000}m" if tokens >= 1_000_000 else f"{tokens // 1_000}k"
