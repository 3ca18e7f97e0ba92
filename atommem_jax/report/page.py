"""A run in one folder: a self-contained page, and its figures as PNG and PDF beside it.

Everything comes in as plain data, so that a report can be made of any run, whatever it lacks. The
page loads nothing: style, script, figures and traces lie within it. Its templates lie in `assets`
and escape what they are given: text of documents and of models is never taken for markup.
"""

import dataclasses
import importlib.resources
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from atommem_jax.config import paths
from atommem_jax.report import failures, figures, lengths
from atommem_jax.report.failures import Failures
from atommem_jax.report.figures import Cell, Record, Scores, plot_learning

__all__ = ["Missing", "Run", "Traces", "name_method", "plot_learning", "sort_columns", "write"]

PAGE = "index.html"
_SCRIPTS = ("elements.js", "paths.js", "page.js")  # each may use those before it

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("atommem_jax.report", "assets"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
_LABELS = {"atommem_sft": "learned, after SFT", "atommem_rl": "learned, after RL"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of one run.

    Attributes:
      name: tells it from the other runs of the report.
      facts: what to say of it at the top of the page: {label: value}.
      records: of its `metrics.jsonl`; may be empty.
      scores: method -> scale -> em, ci_low, ci_high, episodes; may be empty.
      slots: capacity of its table, if known.
      failures: method -> scale -> stage -> share of the questions that broke there; may be empty.
      cited: figures of its task that others published, for the figure by length; may be empty.
    """

    name: str
    facts: Mapping[str, str]
    records: Sequence[Record] = ()
    scores: Scores = dataclasses.field(default_factory=dict)
    slots: int | None = None
    failures: Failures = dataclasses.field(default_factory=dict)
    cited: Sequence[lengths.Cited] = ()


@dataclasses.dataclass(frozen=True)
class Traces:
    """Episodes as `trace.describe` gives them, and what they are of: {label: value}.

    `beside` are the same episodes, in the same order, as someone else played them.
    """

    episodes: Sequence[Mapping[str, Any]]
    facts: Mapping[str, str]
    name: str = ""  # who played them, where there is someone beside
    beside: "Traces | None" = None

    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        if self.beside is None:
            return {"episodes": self.episodes}
        names = [self.name, self.beside.name]
        return {"episodes": self.episodes, "beside": self.beside.episodes, "names": names}


@dataclasses.dataclass(frozen=True)
class Missing:
    """A part that the report lacks: why, and the command that makes it."""

    what: str
    command: str


def name_method(step: int, temperature: float, records: Sequence[Record], workflow: str) -> str:
    """What an evaluation is called in `results.json`: by stage, and `_t1` at temperature 1.

    Args:
      step: global step of the checkpoint.
      temperature: of sampling; 0 is greedy.
      records: of the run's `metrics.jsonl`, which say where its stages end.
      workflow: of the run; 'learned' where the policy decides everything.
    """
    sft_end, rl_end = (
        max((r["step"] for r in records if r["stage"] == stage), default=None)
        for stage in ("sft", "rl")
    )
    base = "atommem" if workflow == "learned" else workflow
    if step == rl_end:
        name = "atommem_rl" if workflow == "learned" else workflow
    elif step == sft_end:
        name = f"{base}_sft"
    else:
        name = f"{base}_step{step}"
    return f"{name}_t{temperature:g}" if temperature else name


def sort_columns(runs: Sequence[Run]) -> list[str]:
    """The scales of all runs, the shorter length and the smaller number first."""
    found = {column for run in runs for row in run.scores.values() for column in row}

    def key(column: str) -> tuple[str, float]:
        tokens = lengths.find_tokens(column)
        if tokens is not None:
            return "", float(tokens)
        number = re.search(r"\d+(?:\.\d+)?", column)
        return re.sub(r"\d.*", "", column), float(number[0]) if number else 0.0

    return sorted(found, key=key)


def write(
    folder: str | os.PathLike[str],
    runs: Sequence[Run],
    traces: Traces | None = None,
    missing: Sequence[Missing] = (),
) -> pathlib.Path:
    """Writes the page and the figures; returns the path of the page.

    Args:
      folder: is made where it does not exist; files of an earlier report are replaced.
      runs: the run reported on, then those that it is compared with.
      traces: of the first run.
      missing: what the page says it lacks.

    Raises ValueError for two runs of one name, or none.
    """
    names = [run.name for run in runs]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"runs: found the names {names}; allowed are one or more, all different")
    path = paths.locate(folder)
    path.mkdir(parents=True, exist_ok=True)
    page = _TEMPLATES.get_template("page.html").render(
        own=runs[0],
        others=runs[1:],
        missing=missing,
        results=_tabulate(runs),
        figures=_save_figures(path, runs),
        traces=traces if traces and traces.episodes else None,
        style=_read_asset("page.css"),
        script="\n".join(map(_read_asset, _SCRIPTS)),
    )
    paths.write_text(path / PAGE, page)
    return path / PAGE


def _read_asset(name: str) -> str:
    """A file that is a part of the page as it stands."""
    folder = importlib.resources.files("atommem_jax.report") / "assets"
    return (folder / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# What the templates show


@dataclasses.dataclass(frozen=True)
class _Table:
    """Of scores: a row is a method, what tells its evaluations apart, and a cell a column."""

    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str], Sequence[Cell | None]]]


def _tabulate(runs: Sequence[Run]) -> _Table | None:
    columns = sort_columns(runs)
    scores = {run.name: run.scores for run in runs}
    if not columns:
        return None
    several = len(runs) > 1
    head = ["method", *(["run"] if several else []), "temperature", *columns]
    rows = []
    for run, method in figures.order_methods(scores):
        for name, row in scores[run].items():
            base, temperature = figures.split_temperature(name)
            if base != method:
                continue
            told = [run] if several else []
            told.append("greedy" if temperature == "0" else temperature)
            rows.append((label(method), told, [row.get(column) for column in columns]))
    return _Table(head, rows)


def label(method: str) -> str:
    """What a method is called where people read it."""
    return _LABELS.get(method, method.replace("_", " "))


def _draw(runs: Sequence[Run]) -> dict[str, tuple[Figure | None, str]]:
    """Name of the files -> (figure, caption); None where there is nothing to draw."""
    records = {run.name: run.records for run in runs}
    scores = {run.name: run.scores for run in runs}
    slots = {run.name: run.slots for run in runs if run.slots}
    broken = {run.name: run.failures for run in runs if run.failures}
    labels = {method: label(method) for _, method in figures.order_methods(scores)}
    return {
        "em_by_scale": _draw_scores(runs, labels),
        "failures": (
            failures.draw_failures(broken, sort_columns(runs), labels),
            "Wrong answers by the stage at which the chain of their facts first broke.",
        ),
        "failures_over_training": (
            failures.draw_failures_over_training(records),
            "Wrong answers of each validation by stage.",
        ),
        "em_curve": (
            figures.draw_em_curve(records),
            "Exact match over reinforcement learning; validation with 95% intervals.",
        ),
        "operations": (
            figures.draw_operations(records),
            "Operations applied a turn, in the training rollouts.",
        ),
        "occupancy": (
            figures.draw_occupancy(records, slots),
            "How full the table is, and entries evicted by a create.",
        ),
        "policy": (
            figures.draw_policy(records),
            "Entropy of what was sampled, and the share of clipped tokens.",
        ),
        "sft": (figures.draw_sft(records), "Loss of supervised fine-tuning."),
    }


def _draw_scores(runs: Sequence[Run], labels: Mapping[str, str]) -> tuple[Figure | None, str]:
    """By length of the document where the scales are lengths, else a panel a scale."""
    lines = {
        label(method) + (f", {run.name}" if len(runs) > 1 else ""): cells
        for run in runs
        for method, cells in run.scores.items()
    }
    cited = dict.fromkeys(point for run in runs for point in run.cited)
    figure = None
    if all(lengths.find_tokens(column) is not None for column in sort_columns(runs)):
        figure = lengths.draw(lines, tuple(cited))
    if figure is not None:
        told = "; grey: published by others, of other models and budgets" if cited else ""
        return figure, f"Exact match by length of the document; bands are 95% intervals{told}."
    return (
        figures.draw_scores({run.name: run.scores for run in runs}, sort_columns(runs), labels),
        "Exact match by scale, methods ordered by their mean; bars are 95% intervals.",
    )


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """A figure as the page shows it."""

    name: str
    caption: str
    svg: str
    pixels: float  # its width

    @property
    def wide(self) -> bool:
        """Whether a narrow window does not hold it."""
        return self.name in ("em_by_scale", "failures")


def _save_figures(folder: pathlib.Path, runs: Sequence[Run]) -> list[_Drawing]:
    """Saves the figures; takes away those of an earlier report that this one lacks."""
    drawings = []
    for name, (figure, caption) in _draw(runs).items():
        if figure is None:
            for ending in (".png", ".pdf"):
                (folder / f"{name}{ending}").unlink(missing_ok=True)
            continue
        figures.save(figure, folder / name)
        # Drawings share the names of their parts; in one page each needs its own.
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", figures.to_svg(figure, caption))
        drawings.append(_Drawing(name, caption, svg, 105 * figure.get_size_inches()[0]))
        plt.close(figure)
    return drawings
