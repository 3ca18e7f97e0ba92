"""What `report.py` and `demo.py` share: a workdir becomes the parts of a report.

Without flags of its own, so that any script can make a report when its work is done.
"""

import pathlib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from atommem_jax import text_files
from atommem_jax.agent import build, load
from atommem_jax.agent.score import read_summary
from atommem_jax.config import ConfigError, Experiment, check, parse, paths
from atommem_jax.learning import evaluation
from atommem_jax.metrics import read_metrics
from atommem_jax.parallel import host_batches
from atommem_jax.report import failures, lengths, trace
from atommem_jax.report import page as page_lib
from atommem_jax.tasks import babilong, datasets, workflows
from atommem_jax.tasks import batches as batches_lib
from atommem_jax.types import Episode, Trajectory
from atommem_jax.weights.checkpoint import Checkpointer, CheckpointError

MOST_BATCHES = 4  # of a split are played in search of wrong answers


def make(
    workdir: pathlib.Path,
    data_root: str,
    *,
    compare: list[pathlib.Path] | None = None,
    split: str | None = None,
    episodes: int = 12,
    step: str = "last",
    temperature: float = 0.0,
    out: pathlib.Path | None = None,
    beside: str = "",
) -> pathlib.Path:
    """Writes the report, prints where it is and what it lacks, and returns the path of the page.

    Args:
      workdir: of the run, as `train.py` or `demo.py` leaves it.
      data_root: where its data set is prepared.
      compare: other workdirs.
      split: of the traced episodes; the first test split where None.
      episodes: how many to trace, wrong and right ones mixed.
      step: checkpoint to trace.
      temperature: of the traced episodes.
      out: folder of the report; <workdir>/report where None.
      beside: another step of the run, or another workdir, whose play of the same episodes is shown
        beside it; '' for none.

    Raises ConfigError for a workdir, split or step that is asked for and not there.
    """
    folders = [workdir, *(compare or [])]
    names = name_runs(folders)
    out = out or workdir / "report"
    paths.try_folder(out, f"--out={out}")
    runs = [read_run(*pair) for pair in zip(names, folders, strict=True)]
    missing = find_missing(workdir, runs[0])
    traces = None
    if episodes > 0:
        try:
            traces = trace_episodes(workdir, data_root, split, episodes, step, temperature, beside)
        except ConfigError as error:
            if split or step != "last" or beside:  # what was asked for by name is not left out
                raise
            command = f"python experiments/train.py {_spell_flag('workdir', workdir)}"
            missing.append(page_lib.Missing(f"Memory traces: {error}.", command))
    page = page_lib.write(out, runs, traces, missing)
    for part in missing:
        print(f"not in the report: {part.what} {part.command}")
    print(f"report: {page}")
    return page


def name_runs(folders: list[pathlib.Path]) -> list[str]:
    """The last parts of the paths, as many as tell the runs apart.

    Raises ConfigError for a folder that is not there, or given twice.
    """
    for flag, folder in zip(["workdir", *["compare"] * len(folders)], folders, strict=False):
        found = paths.is_folder(folder, f"--{flag}={folder}")
        check(found, f"--{flag}={folder}: no such folder; pass the --workdir of a run of train.py")
    parts = [
        folder.parts if paths.is_remote(folder) else folder.resolve().parts for folder in folders
    ]
    check(
        len(set(parts)) == len(parts),
        f"--compare={', '.join(map(str, folders[1:]))}: a run is given twice; name other workdirs",
    )
    length = 1
    while len({p[-length:] for p in parts}) < len(parts):
        length += 1
    return ["/".join(p[-length:]) for p in parts]


# ---------------------------------------------------------------------------------------------
# What a run left behind


def read_run(name: str, workdir: pathlib.Path) -> page_lib.Run:
    """Metrics, scores and configuration of a run, as far as they are there."""
    try:
        records = read_metrics(workdir)
    except FileNotFoundError:
        records = []
    config = read_config(workdir)
    return page_lib.Run(
        name=name,
        facts={"workdir": str(workdir)} | (describe_config(config) if config else {}),
        records=records,
        scores=read_scores(workdir, records, config.workflow if config else "learned"),
        slots=int(find_sizes(config)["slots"]) if config else None,
        failures=read_failures(workdir, records, config.workflow if config else "learned"),
        cited=find_cited(config) if config else (),
    )


def read_config(workdir: pathlib.Path) -> Experiment | None:
    """The config in the last checkpoint, if there is one."""
    try:
        with Checkpointer(workdir / "checkpoints", best_metric="em", read_only=True) as reader:
            return parse(reader.restore_config(reader.latest_step()))
    except CheckpointError:
        return None


def find_cited(config: Experiment) -> tuple[lengths.Cited, ...]:
    """What others published of the task of a run."""
    if config.task.name != "babilong":
        return ()
    number = config.task.get("task")
    rows = babilong.PUBLISHED.get(number, ())
    return tuple(lengths.Cited(f"{name}, task {number}", tokens, em) for name, tokens, em in rows)


def find_sizes(config: Experiment) -> dict[str, Any]:
    """What the memory of a run is, the workflow's own choices included."""
    memory = workflows.find(config.workflow).limit(config.memory)
    return {"slots": memory.slots, "shown": memory.shown, "eviction": memory.eviction}


def describe_config(config: Experiment) -> dict[str, str]:
    """The fields that a reader asks for first."""
    model = config.model
    return {
        "task": config.task.name,
        "workflow": config.workflow,
        "seed": f"{config.seed}",
        **{name: f"{size}" for name, size in find_sizes(config).items()},
        "steps": f"{config.sft.steps} SFT, {config.rl.steps} RL",
        "model": f"{model.num_layers} layers of width {model.width}",
    }


def read_scores(workdir: pathlib.Path, records: list, workflow: str) -> dict[str, dict[str, Any]]:
    """Method -> scale -> score, from `eval/` and `results.json`; the latter has the last word."""
    scores: dict[str, dict[str, Any]] = {}
    for method, scale, summary in _read_summaries(workdir, records, workflow):
        scores.setdefault(method, {})[scale] = {key: summary[key] for key in _CELL}
    results = workdir / "results.json"
    if results.is_file():
        for method, row in _read_methods(results).items():
            scores[method] = scores.get(method, {}) | row
    return scores


def read_failures(workdir: pathlib.Path, records: list, workflow: str) -> dict[str, dict[str, Any]]:
    """Method -> scale -> shares by stage, of those in `eval/` and `results.json` that tell them."""
    found: dict[str, dict[str, Any]] = {}
    cells = list(_read_summaries(workdir, records, workflow))
    results = workdir / "results.json"
    if results.is_file():
        methods = _read_methods(results).items()
        cells += [(method, scale, cell) for method, row in methods for scale, cell in row.items()]
    for method, scale, cell in cells:
        shares = failures.read_shares(cell)
        if shares is not None:
            found.setdefault(method, {})[scale] = shares
    return found


def _read_summaries(
    workdir: pathlib.Path, records: list, workflow: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, scale, summary) of every evaluation in `eval/`.

    What was asked with the run's own settings comes last.
    """
    found = [read_summary(path) for path in sorted((workdir / "eval").glob("*.json"))]
    summaries = [summary for summary in found if summary is not None]
    for summary in sorted(summaries, key=lambda summary: not summary.get("settings")):
        step, heat = summary["step"], summary["temperature"]
        method = page_lib.name_method(step, heat, records, workflow)
        yield method, summary["split"].removeprefix("test_"), summary


def _read_methods(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Method -> scale -> score of a `results.json`; nothing, with a warning, of another file."""
    content = text_files.read_json(path, "results.json of demo.py", _has_methods)
    return content["methods"] if content else {}


def _has_methods(content: Any) -> bool:
    methods = content.get("methods") if isinstance(content, dict) else None
    return isinstance(methods, dict) and all(
        isinstance(row, dict) and all(_is_cell(cell) for cell in row.values())
        for row in methods.values()
    )


_CELL = ("em", "ci_low", "ci_high", "episodes")


def _is_cell(cell: Any) -> bool:
    return isinstance(cell, dict) and all(isinstance(cell.get(k), (int, float)) for k in _CELL)


def find_missing(workdir: pathlib.Path, run: page_lib.Run) -> list[page_lib.Missing]:
    """Parts that the run has nothing for yet, with the commands that make them."""
    missing = []
    train = f"python experiments/train.py {_spell_flag('workdir', workdir)}"
    stages = {record["stage"] for record in run.records}
    if not stages:
        missing.append(page_lib.Missing("Curves: no metrics.jsonl in the workdir.", train))
    elif "rl" not in stages:
        what = "Curves of reinforcement learning: no step of it was recorded."
        missing.append(page_lib.Missing(what, f"{train} --config.rl.steps=36"))
    if not run.scores:
        what = "Exact match on test splits: nothing was evaluated."
        command = f"python experiments/evaluate.py {_spell_flag('checkpoint', workdir)}"
        missing.append(page_lib.Missing(what, command))
    return missing


def _spell_flag(name: str, value: Any) -> str:
    """A flag that can be pasted into a shell."""
    return shlex.quote(f"--{name}={value}")


# ---------------------------------------------------------------------------------------------
# Traces


def trace_episodes(
    workdir: pathlib.Path,
    data_root: str,
    split: str | None,
    episodes: int,
    step: str,
    temperature: float,
    beside: str = "",
) -> page_lib.Traces:
    """Plays a split as `evaluate.py` does, until there are wrong answers to show, and traces some.

    beside: see `make`.

    Raises ConfigError where checkpoint, data or split are not there, or `beside` is of another
    data set.
    """
    loaded = load.load(str(workdir), step)
    dataset = build.load_dataset(loaded.parts.config, data_root)
    if split is None:
        tests = [name for name in dataset.splits if name.startswith("test")]
        check(bool(tests), f"the data set has no test split, but {list(dataset.splits)}")
        split = tests[0]
    other = _load_beside(loaded, beside) if beside else None
    played = play(loaded, dataset, split, episodes, temperature)
    rows = trace.choose([one.share for one in played], episodes)
    right = sum(one.share >= 1.0 for one in played)
    facts = {
        "split": split,
        "checkpoint": f"step {loaded.step}",
        "decoding": "greedy" if temperature == 0 else f"temperature {temperature:g}",
        "chosen from": f"the first {len(played)} episodes, {right} of them all right",
    }
    described = describe(loaded, dataset, split, [played[row] for row in rows])
    if other is None:
        return page_lib.Traces(described, facts)
    again = play(other, dataset, split, len(played), temperature, every=True)
    names = _name_players(loaded, other)
    second = describe(other, dataset, split, [again[row] for row in rows])
    return page_lib.Traces(
        described,
        facts | {"beside it": names[1]},
        name=names[0],
        beside=page_lib.Traces(second, {}, name=names[1]),
    )


def _load_beside(loaded: load.Loaded, beside: str) -> load.Loaded:
    """The agent of another step of the same run, or of another run of the same task."""
    is_step = beside.isdecimal() or beside in ("best", "last")
    other = load.load(loaded.workdir, beside) if is_step else load.load(beside)
    mine, theirs = (one.parts.config.task for one in (loaded, other))
    check(
        mine.to_dict() == theirs.to_dict(),
        f"--beside={beside}: its task is {theirs.to_dict()}, and that of --workdir "
        f"{mine.to_dict()}; pass a run of the same task, or a step of the same run",
    )
    return other


def _name_players(loaded: load.Loaded, other: load.Loaded) -> tuple[str, str]:
    """What tells two agents apart: their steps, and their runs where these differ."""
    if loaded.workdir == other.workdir:
        return f"step {loaded.step}", f"step {other.step}"
    names = name_runs([pathlib.Path(loaded.workdir), pathlib.Path(other.workdir)])
    return f"{names[0]}, step {loaded.step}", f"{names[1]}, step {other.step}"


class Played(NamedTuple):
    """One episode as it was played."""

    trajectory: Trajectory
    episode: Episode
    share: float  # of right answers
    aliases: Sequence[Sequence[str]]


def describe(
    loaded: load.Loaded, dataset: datasets.Dataset, split: str, played: Sequence[Played]
) -> list[trace.Data]:
    """What the page shows of these episodes."""
    trajectories, samples = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *column)
        for column in (
            [one.trajectory for one in played],
            [one.episode for one in played],
        )
    )
    return trace.describe(
        loaded.parts.setting(loaded.shape(dataset, split), loaded.params),
        trajectories,
        samples,
        loaded.parts.tokenizer,
        [one.aliases for one in played],
    )


def play(
    loaded: load.Loaded,
    dataset: datasets.Dataset,
    split: str,
    wanted: int,
    temperature: float,
    every: bool = False,
) -> list[Played]:
    """Plays the first samples of a split, in batches, until there are enough.

    Trajectory ids and randomness are those of `evaluate.py` with its default seed. Enough is as
    many as are wanted, half of them with a wrong answer, as far as the first batches have some.

    every: exactly the first `wanted` ones, whatever is right.
    """
    tokenizer, mesh = loaded.parts.tokenizer, loaded.mesh
    shape = loaded.shape(dataset, split)
    size = loaded.parts.config.eval.batch_size
    run = loaded.player(shape)
    key = host_batches.replicate(jax.random.key(0), mesh)
    heat = host_batches.replicate(np.float32(temperature), mesh)
    played: list[Played] = []
    batches = batches_lib.iterate_split(dataset.split(split), tokenizer, shape, batch_size=size)
    for number, (batch, real) in enumerate(batches, start=1):
        ids = (number - 1) * size + np.arange(size, dtype=np.int32)
        shards = host_batches.shard((batch.episodes, ids), mesh)
        trajectories = jax.device_get(run(loaded.params, *shards, key, heat))
        texts = evaluation.decode_answers(
            trajectories.answers, trajectories.answer_lengths, tokenizer.decode
        )
        em = evaluation.score_answers(texts, batch.aliases)
        for b in range(real):
            one, episode = jax.tree.map(lambda x, b=b: x[b], (trajectories, batch.episodes))
            share = float(em[b].sum()) / len(batch.aliases[b])
            played.append(Played(one, episode, share, batch.aliases[b]))
        wrong = sum(one.share < 1.0 for one in played)
        searched = every or number >= MOST_BATCHES or wrong >= (wanted + 1) // 2
        if searched and len(played) >= wanted:
            break
    return played[:wanted] if every else played
