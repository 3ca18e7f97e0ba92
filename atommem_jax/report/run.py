"""What `report.py` and `demo.py` share: a workdir becomes the parts of a report.

Without flags of its own, so that any script can make a report when its work is done.
"""

import pathlib
import shlex
from typing import Any

import jax
import numpy as np

from atommem_jax import text_files
from atommem_jax.agent import build, load
from atommem_jax.agent.score import read_summary
from atommem_jax.config import ConfigError, Experiment, check, parse, paths
from atommem_jax.learning import evaluation
from atommem_jax.metrics import read_metrics
from atommem_jax.parallel import host_batches
from atommem_jax.report import page as page_lib
from atommem_jax.report import trace
from atommem_jax.tasks import batches as batches_lib
from atommem_jax.tasks import workflows
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
            traces = trace_episodes(workdir, data_root, split, episodes, step, temperature)
        except ConfigError as error:
            if split or step != "last":  # what was asked for by name is not left out
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
        with paths.reaching(folder, f"--{flag}={folder}"):
            found = folder.is_dir()
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
    )


def read_config(workdir: pathlib.Path) -> Experiment | None:
    """The config in the last checkpoint, if there is one."""
    try:
        with Checkpointer(workdir / "checkpoints", best_metric="em", read_only=True) as reader:
            return parse(reader.restore_config(reader.latest_step()))
    except CheckpointError:
        return None


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
    found = [read_summary(path) for path in sorted((workdir / "eval").glob("*.json"))]
    summaries = [summary for summary in found if summary is not None]
    # What was asked with the run's own settings has the last word.
    for summary in sorted(summaries, key=lambda summary: not summary.get("settings")):
        method = page_lib.name_method(summary["step"], summary["temperature"], records, workflow)
        cell = {key: summary[key] for key in _CELL}
        scores.setdefault(method, {})[summary["split"].removeprefix("test_")] = cell
    results = workdir / "results.json"
    if results.is_file():
        for method, row in _read_methods(results).items():
            scores[method] = scores.get(method, {}) | row
    return scores


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
) -> page_lib.Traces:
    """Plays a split as `evaluate.py` does, until there are wrong answers to show, and traces some.

    Raises ConfigError where checkpoint, data or split are not there.
    """
    loaded = load.load(str(workdir), step)
    dataset = build.load_dataset(loaded.parts.config, data_root)
    if split is None:
        tests = [name for name in dataset.splits if name.startswith("test")]
        check(bool(tests), f"the data set has no test split, but {list(dataset.splits)}")
        split = tests[0]
    shape = loaded.shape(dataset, split)
    examples = dataset.split(split)
    played = play(loaded, examples, shape, episodes, temperature)
    rows = trace.choose([em for _, _, em, _ in played], episodes)
    trajectories, samples = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *[played[row][part] for row in rows])
        for part in (0, 1)
    )
    described = trace.describe(
        loaded.parts.setting(shape),
        trajectories,
        samples,
        loaded.parts.tokenizer,
        [played[row][3] for row in rows],
    )
    right = sum(em >= 1.0 for _, _, em, _ in played)
    facts = {
        "split": split,
        "checkpoint": f"step {loaded.step}",
        "decoding": "greedy" if temperature == 0 else f"temperature {temperature:g}",
        "chosen from": f"the first {len(played)} episodes, {right} of them all right",
    }
    return page_lib.Traces(described, facts)


def play(loaded, examples, shape, wanted: int, temperature: float) -> list[tuple]:
    """(trajectory, episode, share of right answers, aliases) of the first samples of a split.

    Trajectory ids and randomness are those of `evaluate.py` with its default seed.
    """
    tokenizer, mesh = loaded.parts.tokenizer, loaded.mesh
    size = loaded.parts.config.eval.batch_size
    run = loaded.player(shape)
    key = host_batches.replicate(jax.random.key(0), mesh)
    heat = host_batches.replicate(np.float32(temperature), mesh)
    played: list[tuple] = []
    batches = batches_lib.iterate_split(examples, tokenizer, shape, batch_size=size)
    for number, (batch, real) in enumerate(batches):
        ids = number * size + np.arange(size, dtype=np.int32)
        shards = host_batches.shard((batch.episodes, ids), mesh)
        trajectories = jax.device_get(run(loaded.params, *shards, key, heat))
        texts = evaluation.decode_answers(
            trajectories.answers, trajectories.answer_lengths, tokenizer.decode
        )
        em = evaluation.score_answers(texts, batch.aliases)
        for b in range(real):
            pair = jax.tree.map(lambda x, b=b: x[b], (trajectories, batch.episodes))
            share = float(em[b].sum()) / len(batch.aliases[b])
            played.append((*pair, share, batch.aliases[b]))
        wrong = sum(share < 1.0 for _, _, share, _ in played)
        if number + 1 == MOST_BATCHES or (len(played) >= wanted and wrong >= (wanted + 1) // 2):
            break
    return played
