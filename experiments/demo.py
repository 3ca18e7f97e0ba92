"""The tour of `make demo`: prepare, SFT, RL, then evaluate before and after RL.

    python experiments/demo.py --workdir=runs/demo

Trains at 1x only and evaluates at 1x, 2x and 4x as many facts, greedily and at temperature 1.
Writes <workdir>/results.json and <workdir>/learning.png. Interrupted, it goes on where it was.
"""

import json
import pathlib
import time
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict

from atommem_jax import report
from atommem_jax.config import check
from experiments import evaluate, flags, train, wiring
from experiments.metrics import read_metrics

absl_flags.adopt_module_key_flags(train)  # --help lists them

SCALES = ("1x", "2x", "4x")
TEMPERATURES = {"": 0.0, "_t1": 1.0}


def main(argv) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    folder = pathlib.Path(train.WORKDIR.value or "runs/demo")
    run(train.CONFIG.value, folder, flags.DATA_ROOT.value)


def run(config: ConfigDict, workdir: pathlib.Path, data_root: str) -> None:
    """Trains (or resumes), evaluates, writes the results and prints them."""
    started = time.perf_counter()
    train.train(config, str(workdir), data_root)
    records = read_metrics(workdir)
    report.plot_learning(records, workdir / "learning.png")

    dataset = wiring.load_dataset(config, data_root)
    methods: dict[str, dict[str, Any]] = {}
    rates: dict[str, Any] = {}
    for name, step in zip(("atommem_sft", "atommem_rl"), train.stage_ends(config), strict=True):
        loaded = evaluate.load(str(workdir), str(step))
        for suffix, temperature in TEMPERATURES.items():
            for scale in SCALES:
                summary = evaluate.evaluate_split(
                    loaded,
                    dataset,
                    f"test_{scale}",
                    temperature=temperature,
                    out=workdir / "eval",
                    label=f"{name}{suffix} ",
                )
                methods.setdefault(name + suffix, {})[scale] = {
                    key: summary[key] for key in ("em", "ci_low", "ci_high", "episodes")
                }
                if scale == "1x":
                    rates[name + suffix] = summary["categories"]
    seconds = {
        stage: sum(r["seconds"] for r in records if r["stage"] == stage) for stage in ("sft", "rl")
    }
    seconds["total"] = time.perf_counter() - started
    results = {
        "methods": methods,
        "seconds": seconds,
        "categories_1x": rates,
        "seed": config.seed,
    }
    (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _print(results, workdir)


def _print(results: dict[str, Any], workdir: pathlib.Path) -> None:
    print("\nWhat happens to facts, test 1x, greedy (share created / updated):")
    before, after = (results["categories_1x"][name] for name in ("atommem_sft", "atommem_rl"))
    for category in sorted(before):
        b, a = before[category], after.get(category, before[category])
        print(
            f"  {category:18} before RL {b['create']:.2f} / {b['update']:.2f}"
            f"   after RL {a['create']:.2f} / {a['update']:.2f}"
        )
    print("\nExact match on questions never seen, with 95% bootstrap intervals:")
    print(f"  {'method':16}" + "".join(f"{scale:>22}" for scale in SCALES))
    for name, row in results["methods"].items():
        cells = (f"{c['em']:.3f} [{c['ci_low']:.3f}, {c['ci_high']:.3f}]" for c in row.values())
        print(f"  {name:16}" + "".join(f"{cell:>22}" for cell in cells))
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
