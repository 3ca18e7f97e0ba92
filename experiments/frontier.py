"""Measures what exact match costs: length x capacity x reads x method, as a table and a figure.

    python experiments/frontier.py --method=learned=runs/demo --method=scratchpad=runs/scratchpad \
        --split=test_1x --split=test_4x --slots=1,2,3,6 --reads=0,1,2 --out=runs/frontier

Every method is the workdir of a run with a name; it plays each split with each number of slots
(`memory.slots`) and of reads (`rollout.read_budget` and `rollout.answer_read_budget`), whatever it
was trained with. Writes frontier.md, frontier.png and frontier.pdf to --out, after every point, and
keeps what was played: the same command goes on where it was killed.
"""

import itertools
import os
import pathlib
from collections.abc import Sequence

import tqdm
from absl import flags as absl_flags

from atommem_jax import folder_lock
from atommem_jax.agent import build, score
from atommem_jax.agent.load import Loaded, find_split, load
from atommem_jax.config import check, paths
from atommem_jax.report import figures, frontier
from atommem_jax.tasks.datasets import Dataset
from experiments import flags

METHODS = absl_flags.DEFINE_multi_string(
    "method", [], "NAME=WORKDIR of a run; repeat the flag for several."
)
SPLITS = absl_flags.DEFINE_multi_string(
    "split", [], "A split, which is a length; repeat the flag. Default: all that begin with 'test'."
)
SLOTS = absl_flags.DEFINE_list("slots", [], "Capacities of the memory. Default: the run's own.")
READS = absl_flags.DEFINE_list(
    "reads", [], "Reads that a chunk or a question may cost. Default: the run's own."
)
EPISODES = absl_flags.DEFINE_integer(
    "episodes", 256, "Episodes of each split; 0 for all.", lower_bound=0
)
TEMPERATURE = absl_flags.DEFINE_float(
    "temperature", 0.0, "Temperature of sampling; 0 is greedy.", lower_bound=0.0
)
CPU_DEVICES = absl_flags.DEFINE_integer(
    "cpu_devices", 2, "Devices into which a host without an accelerator is split.", lower_bound=1
)
OUT = flags.define_path("out", "runs/frontier", "Folder of the table, the figure and the points.")


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    methods = parse_methods(METHODS.value)
    budgets = list(
        itertools.product(parse_numbers("slots", SLOTS.value), parse_numbers("reads", READS.value))
    )
    out = paths.locate(OUT.value)
    points: list[frontier.Point] = []
    with folder_lock.hold(out, f"--out={out}"):
        for workdir in methods.values():  # all of them, before any is played
            choose_splits(load(workdir, cpu_devices=CPU_DEVICES.value))
        cells = list(itertools.product(methods.items(), budgets))
        for (name, workdir), (slots, reads) in tqdm.tqdm(cells, desc="budgets", leave=False):
            points += measure(name, workdir, slots, reads, out)
            write(points, out)
    print(frontier.render(points), end="")
    print(f"table and figure: {out / 'frontier.md'}, {out / 'frontier.png'}")


def parse_methods(values: Sequence[str]) -> dict[str, str]:
    """{name: workdir}. Raises ConfigError for one without a name, or a name given twice."""
    check(
        bool(values), "--method is missing: pass NAME=WORKDIR of a run, such as learned=runs/demo"
    )
    methods: dict[str, str] = {}
    for value in values:
        name, found, workdir = value.partition("=")
        check(
            bool(name and found and workdir) and os.sep not in name,
            f"--method={value}: allowed is NAME=WORKDIR, such as learned=runs/demo",
        )
        check(
            name not in methods, f"--method={value}: {name!r} is given twice; choose another name"
        )
        methods[name] = workdir
    return methods


def parse_numbers(flag: str, values: Sequence[str]) -> list[int | None]:
    """The numbers of a flag; [None], which is the run's own, without any."""
    for value in values:
        check(
            value.isascii() and value.isdigit(),
            f"--{flag}={','.join(values)}: {value!r} is no number; allowed are whole numbers, such "
            f"as --{flag}=1,2,4",
        )
    return [int(value) for value in dict.fromkeys(values)] or [None]


def choose_splits(loaded: Loaded) -> tuple[Dataset, list[str]]:
    """The data set of an agent, and what is played of it. Raises ConfigError for unknown splits."""
    dataset = build.load_dataset(loaded.parts.config, flags.DATA_ROOT.value)
    splits = SPLITS.value or [split for split in dataset.splits if split.startswith("test")]
    for split in splits:
        find_split(dataset, split)
    return dataset, splits


def measure(
    name: str, workdir: str, slots: int | None, reads: int | None, out: pathlib.Path
) -> list[frontier.Point]:
    """A point for every split; those that `out` has are not played again."""
    settings = [] if slots is None else [f"memory.slots={slots}"]
    if reads is not None:
        settings += [f"rollout.read_budget={reads}", f"rollout.answer_read_budget={reads}"]
    loaded = load(workdir, cpu_devices=CPU_DEVICES.value)
    if slots is not None and slots < loaded.parts.config.memory.shown:
        settings.append(f"memory.shown={slots}")  # all that there is
    loaded = load(workdir, cpu_devices=CPU_DEVICES.value, settings=settings)
    config = loaded.parts.config
    dataset, splits = choose_splits(loaded)
    return [
        frontier.Point.of(
            name,
            config.memory.slots,
            config.rollout.answer_read_budget,
            score.evaluate_split(
                loaded,
                dataset,
                split,
                temperature=TEMPERATURE.value,
                episodes=EPISODES.value,
                out=out / "points" / name,
                skip_existing=True,
                label=f"{name}, {config.memory.slots} slots: ",
            ),
        )
        for split in splits
    ]


def write(points: Sequence[frontier.Point], out: pathlib.Path) -> None:
    """The table and the figure of the points so far."""
    paths.write_text(out / "frontier.md", frontier.render(points))
    figure = frontier.draw(points)
    if figure is not None:
        figures.save(figure, out / "frontier")


if __name__ == "__main__":
    flags.run(main)
