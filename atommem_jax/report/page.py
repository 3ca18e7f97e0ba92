"""A run in one folder: a self-contained page, and its figures as PNG and PDF beside it.

Everything comes in as plain data, so that a report can be made of any run, whatever it lacks. The
page loads nothing: style, script, figures and traces lie within it. Text of documents and of
models is never taken for markup.
"""

import dataclasses
import html
import importlib.resources
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from atommem_jax.report import figures
from atommem_jax.report.figures import Cell, Record, Scores, plot_learning

__all__ = ["Missing", "Run", "Traces", "name_method", "plot_learning", "sort_columns", "write"]

PAGE = "index.html"

_SECTIONS = {"results": "Exact match", "figures": "Figures", "traces": "Memory trace"}
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
    """

    name: str
    facts: Mapping[str, str]
    records: Sequence[Record] = ()
    scores: Scores = dataclasses.field(default_factory=dict)
    slots: int | None = None


@dataclasses.dataclass(frozen=True)
class Traces:
    """Episodes as `trace.describe` gives them, and what they are of: {label: value}."""

    episodes: Sequence[Mapping[str, Any]]
    facts: Mapping[str, str]


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
    """The scales of all runs, the smaller number first."""
    found = {column for run in runs for row in run.scores.values() for column in row}

    def key(column: str) -> tuple[str, float]:
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
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    parts = {
        "title": html.escape(f"{names[0]}: memory of an agent"),
        "style": _read_asset("page.css"),
        "script": _read_asset("page.js"),
        "header": _render_header(runs),
        "missing": _render_missing(missing),
        "results": _render_results(runs),
        "figures": _render_figures(path, runs),
        "traces": _render_traces(traces),
        "data": embed_json({"episodes": list(traces.episodes) if traces else []}),
    }
    parts["navigation"] = "".join(
        f'<a href="#{name}">{title}</a>' for name, title in _SECTIONS.items() if parts[name]
    )
    # In one pass: what is put in is never searched for further names.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read_asset("page.html"))
    (path / PAGE).write_text(page, encoding="utf-8")
    return path / PAGE


def embed_json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _read_asset(name: str) -> str:
    folder = importlib.resources.files("atommem_jax") / "report" / "assets"
    return (folder / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# Sections


def _render_facts(facts: Mapping[str, str]) -> str:
    rows = (
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(str(value))}</dd></div>"
        for label, value in facts.items()
    )
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _render_header(runs: Sequence[Run]) -> str:
    own, *others = runs
    parts = [f"<h1>{html.escape(own.name)}</h1>", _render_facts(own.facts)]
    for run in others:
        parts.append(f"<h2>compared with {html.escape(run.name)}</h2>{_render_facts(run.facts)}")
    return "\n".join(parts)


def _render_missing(missing: Sequence[Missing]) -> str:
    if not missing:
        return ""
    items = (
        f"<li>{html.escape(part.what)}<pre><code>{html.escape(part.command)}</code></pre></li>"
        for part in missing
    )
    return (
        '<section aria-labelledby="missing-title"><h2 id="missing-title">Not in this report</h2>'
        f'<ul class="missing">{"".join(items)}</ul></section>'
    )


def _render_results(runs: Sequence[Run]) -> str:
    columns = sort_columns(runs)
    scores = {run.name: run.scores for run in runs}
    if not columns:
        return ""
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
            cells = "".join(f"<td>{html.escape(text)}</td>" for text in told)
            cells += "".join(_render_cell(row.get(column)) for column in columns)
            rows.append(f'<tr><th scope="row">{html.escape(label(method))}</th>{cells}</tr>')
    titles = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    return (
        '<section id="results" aria-labelledby="results-title">'
        '<h2 id="results-title">Exact match</h2>'
        '<p class="note">Share of questions answered exactly, with 95% bootstrap intervals over '
        'episodes, and the number of episodes.</p><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Exact match of each method"><table class="results"><thead><tr>{titles}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _render_cell(cell: Cell | None) -> str:
    if cell is None:
        return '<td class="none">not evaluated</td>'
    number = f"{cell['em']:.3f}"
    rest = f"[{cell['ci_low']:.3f}, {cell['ci_high']:.3f}]"
    count = f" of {int(cell['episodes'])}" if "episodes" in cell else ""
    return f'<td><b>{number}</b> <span class="interval">{rest}{count}</span></td>'


def label(method: str) -> str:
    """What a method is called where people read it."""
    return _LABELS.get(method, method.replace("_", " "))


def _draw(runs: Sequence[Run]) -> dict[str, tuple[Figure | None, str]]:
    """Name of the files -> (figure, caption); None where there is nothing to draw."""
    records = {run.name: run.records for run in runs}
    scores = {run.name: run.scores for run in runs}
    slots = {run.name: run.slots for run in runs if run.slots}
    labels = {method: label(method) for _, method in figures.order_methods(scores)}
    return {
        "em_by_scale": (
            figures.draw_scores(scores, sort_columns(runs), labels),
            "Exact match by scale, methods ordered by their mean; bars are 95% intervals.",
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


def _render_figures(folder: pathlib.Path, runs: Sequence[Run]) -> str:
    """Saves the figures and renders them for the page; takes away those of an earlier report."""
    parts = []
    for name, (figure, caption) in _draw(runs).items():
        if figure is None:
            for ending in (".png", ".pdf"):
                (folder / f"{name}{ending}").unlink(missing_ok=True)
            continue
        figures.save(figure, folder / name)
        parts.append(_render_figure(figure, name, caption))
        plt.close(figure)
    if not parts:
        return ""
    return (
        '<section id="figures" aria-labelledby="figures-title"><h2 id="figures-title">Figures</h2>'
        f'<div class="figures">{"".join(parts)}</div></section>'
    )


def _render_figure(figure: Figure, name: str, caption: str) -> str:
    # Drawings share the names of their parts; in one page each needs its own.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", figures.to_svg(figure, caption))
    told, pixels = html.escape(caption), 105 * figure.get_size_inches()[0]
    if name == "em_by_scale":  # the only one that a narrow window does not hold
        open_figure = '<figure class="wide">'
        kind = f'class="drawing scroll" tabindex="0" role="region" aria-label="{told}"'
    else:
        open_figure, kind = "<figure>", 'class="drawing"'
    return (
        f'{open_figure}<div {kind} style="max-width: {pixels:.0f}px">{svg}</div>'
        f"<figcaption>{told} Beside this page as <code>{name}.png</code> and <code>.pdf</code>."
        "</figcaption></figure>"
    )


def _render_traces(traces: Traces | None) -> str:
    if traces is None or not traces.episodes:
        return ""
    viewer = _read_asset("viewer.html")
    return viewer.replace("{{facts}}", _render_facts(traces.facts))
