"""The tour of `make demo`: train, compare with fixed workflows, and make a report of it.

    python experiments/demo.py --workdir=runs/demo

Trains by SFT, then by RL, on documents of one length only (1x), and evaluates both at documents of
1x, 2x and 4x that length (those of `config.task.scales` up to 4), greedily and at temperature 1.
Then there is a page to look at, and the baselines follow (`tasks/workflows.py`): they have as much
RL, from the same SFT checkpoint where a program manages their memory, else after an SFT of their
own; and the page is made again. Writes <workdir>/results.json and <workdir>/report/index.html.
Interrupted, it goes on where it was. While train.py works in <workdir> it holds the folder, and
afterwards this script does.
"""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from atommem_jax import folder_lock
from atommem_jax.agent import build, load, score
from atommem_jax.config import Experiment, check, parse, paths
from atommem_jax.metrics import read_metrics
from atommem_jax.report import page as page_lib
from atommem_jax.report import run as run_lib
from atommem_jax.runs import resume
from atommem_jax.tasks import datasets, workflows
from experiments import flags

CONFIG = flags.define_config("experiments/configs/village.py")
WORKDIR = flags.define_workdir("Where everything goes.", "runs/demo")

LARGEST_SCALE = 4
LEARNED = ("atommem_sft", "atommem_rl")
TEMPERATURES = {"": 0.0, "_t1": 1.0}
BASELINES = absl_flags.DEFINE_list(
    "baselines",
    ["scratchpad_only", "store_all", "store_all_update", "store_all_one_read", "no_memory"],
    "Workflows to compare with, by their names in atommem_jax/tasks/workflows.py; empty for none.",
)

Cells = dict[str, dict[str, Any]]


def main(argv) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: flags start with --; see --help")
    paths.check_local(WORKDIR.value, f"--workdir={WORKDIR.value}")
    folder = pathlib.Path(WORKDIR.value)
    trained = [name for name, flow in workflows.WORKFLOWS.items() if not flow.is_untrained]
    trained.remove("learned")
    for name in BASELINES.value:
        check(name in trained, f"--baselines={name}: allowed are {', '.join(trained)}")
    run(parse(CONFIG.value), folder, flags.DATA_ROOT.value, BASELINES.value)


def run(
    config: Experiment, workdir: pathlib.Path, data_root: str, baselines: Sequence[str]
) -> None:
    """Trains (or resumes), evaluates, writes the results and the report, and prints them."""
    started = time.perf_counter()
    check(
        config.workflow == "learned" and config.sft.steps > 0 and config.rl.steps > 0,
        f"workflow={config.workflow}, sft.steps={config.sft.steps}, rl.steps={config.rl.steps}: "
        "the demo trains the workflow 'learned' in both stages and adds the others itself; use "
        "experiments/train.py for one run of another kind",
    )
    scales = sorted(scale for scale in config.task.get("scales", ()) if scale <= LARGEST_SCALE)
    check(
        1 in scales,
        f"task.scales={tuple(config.task.get('scales', ()))}: the demo needs 1 among them, at "
        "which it trains; --config.task.scales=(1,2,4) are those of its table",
    )
    _train(workdir, {})
    with folder_lock.hold(workdir, f"--workdir={workdir}"):
        results = _compare(config, workdir, data_root, scales, baselines, started)
    _print(results, workdir)


def _compare(
    config: Experiment,
    workdir: pathlib.Path,
    data_root: str,
    scales: Sequence[int],
    baselines: Sequence[str],
    started: float,
) -> dict[str, Any]:
    """Evaluates what was trained, then trains and evaluates the baselines; publishes after each."""
    dataset = build.load_dataset(config, data_root)
    methods: dict[str, Cells] = {}
    results: dict[str, Any] = {"methods": methods, "categories_1x": {}, "seed": config.seed}

    # ------------------------------------------------------------------ the learned policy
    for name, step in zip(LEARNED, resume.stage_ends(config), strict=True):
        for row, summary in _measure(workdir, step, dataset, scales, name, methods).items():
            results["categories_1x"][row] = summary["categories"]
    page_lib.plot_learning(read_metrics(workdir), workdir / "learning.png")
    _publish(results, workdir, data_root, started)

    # ------------------------------------------------------------------ what it is compared with
    for name in baselines:
        print(f"\nbaseline {name}", flush=True)
        folder = workdir / "baselines" / name
        changes = _baseline(config, workdir, name)
        _train(folder, changes)
        end = resume.stage_ends(config.replace(changes))[1]
        _measure(folder, end, dataset, scales, name, methods)
    if baselines:
        _publish(results, workdir, data_root, started)
    return results


def _publish(
    results: dict[str, Any], workdir: pathlib.Path, data_root: str, started: float
) -> None:
    """Writes the results with the seconds so far and the page about them; prints where it is."""
    records = read_metrics(workdir)
    results["seconds"] = {
        stage: sum(r["seconds"] for r in records if r["stage"] == stage) for stage in ("sft", "rl")
    } | {"total": time.perf_counter() - started}
    (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    page = run_lib.make(workdir, data_root)
    print(f"\nopen this in a browser: {page.resolve()}", flush=True)


def _baseline(config: Experiment, workdir: pathlib.Path, name: str) -> dict[str, Any]:
    """What a baseline changes; under a program it is RL alone, from the learned policy's SFT."""
    changes: dict[str, Any] = {"workflow": name}
    if workflows.find(name).program is not None:
        start = workdir / "checkpoints" / str(config.sft.steps)
        changes |= {"init_from": str(start), "sft.steps": 0}
    else:
        # Its teacher may answer a third of the questions at best, which is what it can learn.
        changes |= {"sft.min_reward": min(config.sft.min_reward, 0.3)}
    return changes


def _train(workdir: pathlib.Path, changes: Mapping[str, Any]) -> None:
    """Trains, or goes on, with the flags of this command and some fields changed.

    Ends this process with the status of the other where that fails.
    """
    spec, given = flags.read_changes()
    command = [
        sys.executable,
        str(pathlib.Path(__file__).with_name("train.py")),
        f"--config={spec}",
        *flags.spell_changes(given | dict(changes)),
        f"--data_root={flags.DATA_ROOT.value}",
        f"--workdir={workdir}",
    ]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)


_CELL = ("em", "ci_low", "ci_high", "episodes", "questions", "stages")
"""Of a summary; those of older versions tell no stages of wrong answers."""


def _measure(
    folder: pathlib.Path,
    step: int,
    dataset: datasets.Dataset,
    scales: Sequence[int],
    name: str,
    methods: dict[str, Cells],
) -> dict[str, dict[str, Any]]:
    """Adds the rows of a checkpoint, one a temperature; returns their summaries at the first scale.

    What an interrupted call has measured already is not played again.
    """
    loaded = load.load(str(folder), str(step))
    first: dict[str, dict[str, Any]] = {}
    for suffix, temperature in TEMPERATURES.items():
        for scale in (f"{times}x" for times in scales):
            summary = score.evaluate_split(
                loaded,
                dataset,
                f"test_{scale}",
                temperature=temperature,
                out=folder / "eval",
                label=f"{name}{suffix} ",
                skip_existing=True,
            )
            methods.setdefault(name + suffix, {})[scale] = {
                key: summary[key] for key in _CELL if key in summary
            }
            first.setdefault(name + suffix, summary)
    return first


def _print(results: dict[str, Any], workdir: pathlib.Path) -> None:
    print("\nWhat happens to facts, test 1x, greedy (share created / updated):")
    before, after = (results["categories_1x"][name] for name in LEARNED)
    for category in sorted(before):
        b, a = before[category], after.get(category, before[category])
        print(
            f"  {category:18} before RL {b['create']:.2f} / {b['update']:.2f}"
            f"   after RL {a['create']:.2f} / {a['update']:.2f}"
        )
    print("\nExact match on questions never seen, with 95% bootstrap intervals (_t1: sampled):")
    scales = next(iter(results["methods"].values()))
    print(f"  {'method':22}" + "".join(f"{scale:>22}" for scale in scales))
    for name, row in results["methods"].items():
        cells = (f"{c['em']:.3f} [{c['ci_low']:.3f}, {c['ci_high']:.3f}]" for c in row.values())
        print(f"  {name:22}" + "".join(f"{cell:>22}" for cell in cells))
    seconds = results["seconds"]
    print(
        f"\nSFT {seconds['sft']:.0f} s, RL {seconds['rl']:.0f} s, "
        f"everything {seconds['total']:.0f} s in this call"
    )
    print(f"results      {workdir / 'results.json'}")
    print(f"curves       {workdir / 'learning.png'}; tensorboard --logdir={workdir}/tensorboard")
    print(f"records      {workdir / 'eval'}")
    print(f"checkpoints  {workdir / 'checkpoints'}")


if __name__ == "__main__":
    flags.run(main)
