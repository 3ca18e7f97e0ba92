"""The table of a sweep, from what its runs have left on disk: CSV and Markdown.

`table.csv` has a line for every run, step, split and temperature that was measured, and one for
every run without a measurement. `table.md` has a row for every setting, which is the mean over its
seeds, and below it one for each seed. Both can be made while the sweep is running.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from atommem_jax.agent import score
from atommem_jax.config import flatten, paths
from atommem_jax.sweeps import scheduler
from atommem_jax.sweeps.plan import Evaluation, Run, Sweep, resolve_step

Column = tuple[str, float]  # split and temperature


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement of a run."""

    step: str  # as the evaluation calls it: "last", "sft" or a number
    split: str
    temperature: float
    summary: dict[str, Any]  # as evaluate.py wrote it

    @property
    def column(self) -> Column:
        """Where in the table it stands."""
        return self.split, self.temperature


@dataclasses.dataclass(frozen=True)
class Result:
    """A run with what it has left behind."""

    run: Run
    status: scheduler.Status | None
    cells: tuple[Cell, ...]

    @property
    def state(self) -> str:
        """done, failed, started or pending."""
        return self.status.state if self.status else scheduler.PENDING


def collect(runs: Iterable[Run], workdir: pathlib.Path) -> list[Result]:
    """Reads status and summaries of every run under `workdir`."""
    return [
        Result(run, scheduler.read_status(workdir / run.name), _read_cells(run, workdir / run.name))
        for run in runs
    ]


def write(sweep: Sweep, workdir: pathlib.Path) -> tuple[list[Result], str]:
    """Writes table.csv and table.md from what there is; returns all results, and the Markdown."""
    results = collect(sweep.runs, workdir)
    text = render_markdown(results, pathlib.Path(sweep.spec.split(":", 1)[0]).stem)
    paths.write_text(workdir / "table.csv", render_csv(results))
    paths.write_text(workdir / "table.md", text)
    return results, text


def _read_cells(run: Run, folder: pathlib.Path) -> tuple[Cell, ...]:
    summaries = []
    for path in sorted((folder / "eval").glob("*.json")):
        summary = score.read_summary(path)
        if summary is not None:
            summaries.append(summary)
    cells: dict[tuple[str, str, float], Cell] = {}
    for evaluation in run.evaluations:
        for summary in summaries:
            if _asks_for(evaluation, run, summary):
                split, temperature = summary["split"], summary["temperature"]
                step = str(evaluation.step)
                cells[step, split, temperature] = Cell(step, split, temperature, summary)
    return tuple(cells.values())


def _asks_for(evaluation: Evaluation, run: Run, summary: dict[str, Any]) -> bool:
    split = summary["split"]
    return (
        summary["step"] == resolve_step(evaluation.step, run.config)
        and not summary.get("settings")  # of somebody who asked something else
        and summary["temperature"] in evaluation.temperatures
        and (split in evaluation.splits if evaluation.splits else split.startswith("test"))
    )


def headline(result: Result) -> str:
    """What a finished run is told by: EM at the first split and temperature."""
    order = _order_columns([result])
    found = [cell for cell in result.cells if cell.step == "last"] or list(result.cells)
    if not found:
        return "not evaluated"
    cell = min(found, key=lambda cell: order.index(cell.column))
    return f"EM {cell.summary['em']:.3f} ({_title(cell.column)})"


# ---------------------------------------------------------------------------------------------
# CSV


def render_csv(results: Sequence[Result]) -> str:
    """One line a measurement, with the settings that any run overrides, as each run has them."""
    paths = [path for path in _overridden(results) if path != "seed"]
    head = ("run", "state", *paths, "seed", "step", "split", "temperature")
    measures = ("em", "ci_low", "ci_high", "f1", "episodes", "questions")
    costs = ("seconds", "cpu_seconds", "commit")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, *measures, *costs])
    for result in results:
        fields = flatten(result.run.config)
        settings = [fields[path] for path in paths]
        left = [result.run.name, result.state, *settings, result.run.config.seed]
        status = result.status or scheduler.Status()
        right = [f"{status.seconds:.1f}", f"{status.cpu_seconds:.1f}", status.commit]
        for cell in result.cells:
            place = [cell.step, cell.split, f"{cell.temperature:g}"]
            measured = [_round(cell.summary.get(name)) for name in measures]
            writer.writerow([*left, *place, *measured, *right])
        if not result.cells:
            writer.writerow([*left, *[""] * (3 + len(measures)), *right])
    return text.getvalue()


def _round(measure: Any) -> float | str:
    """A number of a summary; '' where the version that wrote it had none."""
    return round(measure, 6) if isinstance(measure, (int, float)) else ""


def _overridden(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(path for result in results for path in result.run.overrides))


# ---------------------------------------------------------------------------------------------
# Markdown


def render_markdown(results: Sequence[Result], title: str) -> str:
    """A row a setting, best first, with its seeds below; then costs and what is not done."""
    columns = _order_columns(results)
    lines = [f"# {title}", ""]
    if columns:
        lines += [
            "Exact match: mean over seeds with the least and the greatest, or one seed with its "
            "95% interval (bootstrap over episodes). t0 is greedy, t1 temperature 1.",
            "",
            _row(["run", *map(_title, columns)]),
            _row(["---", *["---:"] * len(columns)]),
        ]
        for rows in sorted(_group(results, columns), key=lambda rows: rows[0], reverse=True):
            lines += rows[1]
        lines.append("")
    return "\n".join([*lines, *_footer(results)]) + "\n"


def _group(
    results: Sequence[Result], columns: Sequence[Column]
) -> list[tuple[tuple[float, ...], list[str]]]:
    """(what to sort by, lines) of every setting and step that has a measurement."""
    groups: dict[tuple[str, str], list[tuple[Result, dict[Column, dict]]]] = {}
    for result in results:
        for step in dict.fromkeys(cell.step for cell in result.cells):
            cells = {cell.column: cell.summary for cell in result.cells if cell.step == step}
            groups.setdefault((result.run.group, step), []).append((result, cells))
    found = []
    for (group, step), members in groups.items():
        name = group if step == "last" else f"{group}, step {step}"
        scores = {
            column: [cells[column]["em"] for _, cells in members if column in cells]
            for column in columns
        }
        means = {column: sum(ems) / len(ems) for column, ems in scores.items() if ems}
        rank = tuple(means.get(column, -1.0) for column in columns)
        if len(members) == 1:
            found.append((rank, [_single(f"**{name}**", members[0][1], columns)]))
            continue
        lines = [_row([f"**{name}**", *(_spread(scores[column]) for column in columns)])]
        lines += [
            _single(f"seed {result.run.config.seed}", cells, columns) for result, cells in members
        ]
        found.append((rank, lines))
    return found


def _single(name: str, cells: dict[Column, dict], columns: Sequence[Column]) -> str:
    def render(summary: dict[str, Any]) -> str:
        return f"{summary['em']:.3f} [{summary['ci_low']:.3f}, {summary['ci_high']:.3f}]"

    return _row([name, *(render(cells[c]) if c in cells else "" for c in columns)])


def _spread(ems: Sequence[float]) -> str:
    if not ems:
        return ""
    return f"**{sum(ems) / len(ems):.3f}** {min(ems):.3f}..{max(ems):.3f}"


def _footer(results: Sequence[Result]) -> list[str]:
    def names(state: str, render: Callable[[Result], str] = lambda r: r.run.name) -> str:
        return ", ".join(render(result) for result in results if result.state == state)

    def failure(result: Result) -> str:
        assert result.status is not None
        return f"{result.run.name} ({result.status.failed.split(':')[0].split(' ')[0]})"

    done = sum(result.state == scheduler.DONE for result in results)
    statuses = [result.status for result in results if result.status]
    cpu_hours = sum(status.cpu_seconds for status in statuses) / 3600
    hours = sum(status.seconds for status in statuses) / 3600
    commits = sorted({status.commit for status in statuses} - {""})
    lines = [
        f"{done} of {len(results)} runs done; {cpu_hours:.2f} CPU hours, {hours:.2f} hours "
        f"summed over runs; commit {', '.join(commits) or 'unknown'}."
    ]
    for word, text in (
        ("Failed", names(scheduler.FAILED, failure)),
        ("Under way or interrupted", names(scheduler.STARTED)),
        ("Not started", names(scheduler.PENDING)),
    ):
        if text:
            lines += ["", f"{word}: {text}."]
    return lines


def _order_columns(results: Sequence[Result]) -> list[Column]:
    """Splits in the order in which the evaluations name them, greedy before sampled."""
    asked = [split for r in results for e in r.run.evaluations for split in e.splits]
    found = {cell.column for result in results for cell in result.cells}
    rank = {split: number for number, split in enumerate(dict.fromkeys(asked))}
    return sorted(found, key=lambda c: (c[1], rank.get(c[0], len(rank)), c[0]))


def _title(column: Column) -> str:
    split, temperature = column
    return f"{split} t{temperature:g}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
