"""Makes the report of a run: a page to open in a browser, and its figures as PNG and PDF.

    python experiments/report.py --workdir=runs/demo
    python experiments/report.py --workdir=runs/demo --compare=runs/demo1 --split=test_8x
    python experiments/report.py --workdir=runs/demo --beside=900 --temperature=1

Writes <workdir>/report/index.html, which needs no network: results with intervals, curves, and
the memory trace of some episodes, played again from the checkpoint, with the way of the facts
behind each answer. What a run lacks is left out, and the page says which command makes it.
"""

from absl import flags as absl_flags

from atommem_jax import folder_lock
from atommem_jax.config import check, paths
from atommem_jax.report import run
from experiments import flags

WORKDIR = flags.define_path("workdir", None, "The run to report on.")
COMPARE = flags.define_paths(
    "compare", "Another workdir to show beside it; repeat the flag for several."
)
SPLIT = absl_flags.DEFINE_string(
    "split", None, "Split whose episodes are traced. Default: the first test split."
)
EPISODES = absl_flags.DEFINE_integer(
    "episodes", 12, "Episodes to trace; 0 for none.", lower_bound=0
)
STEP = absl_flags.DEFINE_string("step", "last", "Checkpoint to trace: 'last', 'best' or a number.")
TEMPERATURE = absl_flags.DEFINE_float(
    "temperature", 0.0, "Temperature of the traced episodes; 0 is greedy.", lower_bound=0.0
)
BESIDE = absl_flags.DEFINE_string(
    "beside",
    "",
    "A step of this run, such as the end of SFT, or another workdir of the same task: the traced "
    "episodes are shown as it played them too, side by side.",
)
OUT = flags.define_path("out", None, "Folder of the report. Default: <workdir>/report.")


def main(argv) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    workdir = paths.locate(flags.require(WORKDIR, "pass the workdir of a training run"))
    compare = [paths.locate(other) for other in COMPARE.value]
    run.name_runs([workdir, *compare])  # before a folder is made
    out = paths.locate(OUT.value) if OUT.value else workdir / "report"
    with folder_lock.hold(out, f"--out={out}"):
        run.make(
            workdir,
            flags.DATA_ROOT.value,
            compare=compare,
            split=SPLIT.value,
            episodes=EPISODES.value,
            step=STEP.value,
            temperature=TEMPERATURE.value,
            out=out,
            beside=BESIDE.value,
        )


if __name__ == "__main__":
    flags.run(main)
