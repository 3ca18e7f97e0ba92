"""What a sweep consists of: the runs that its config file adds, and the commands of each.

A sweep's config file is a config like any other, with two things more:

    def sweep(add):
        for seed in range(3):
            add(f"small/seed{seed}", {"seed": seed, "model.width": 32})

    EVALUATIONS = [{"splits": ["test_1x"], "temperatures": [0, 1], "episodes": 256}]

`add` takes a run's name, which is its folder too, and its overrides of `get_config()`. Runs whose
overrides differ in the seed only are one row of the table. A run may start from a checkpoint of one
that was added before it, and waits for that one:

    add(f"large/seed{seed}", {"seed": seed, "sft.steps": 0, "init_from": "@small/seed{seed}:sft"})

where `{seed}` stands for its own seed and the step is `sft`, `last` or a number. Nothing is run
here: everything is checked before the first run starts.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from atommem_jax.agent import phases, validate
from atommem_jax.config import (
    ConfigError,
    Experiment,
    check,
    check_path,
    find_config,
    is_section,
    parse,
)

_SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*(/[A-Za-z0-9][A-Za-z0-9._=+-]*)*")
_START = re.compile(r"@(?P<run>.+):(?P<step>sft|last|\d+)")
_SEED = re.compile(r"(?<=.)[/._-]?seed[=_-]?\d+")

Overrides = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Cells to measure once a run is trained: every split at every temperature."""

    runs: str = ""  # regular expression that the run's name must contain
    step: str | int = "last"  # or "sft", the end of that stage, or a number
    splits: tuple[str, ...] = ()  # none for all test splits
    temperatures: tuple[float, ...] = (0.0, 1.0)
    episodes: int = 0  # 0 for all

    @property
    def key(self) -> str:
        """Names it in a run's status, so that a changed one is evaluated anew."""
        cells = {k: v for k, v in dataclasses.asdict(self).items() if k != "runs"}
        return f"evaluate {json.dumps(cells)}"


@dataclasses.dataclass(frozen=True)
class Run:
    """One member of a sweep."""

    name: str
    overrides: Overrides  # of this run alone, as plain values
    config: Experiment  # with everything applied
    evaluations: tuple[Evaluation, ...]
    start: tuple[str, int] | None = None  # run and step of the checkpoint that RL starts from

    @property
    def group(self) -> str:
        """The name without its seed: a row of the table."""
        return _SEED.sub("", self.name)

    @property
    def settings(self) -> str:
        """The overrides but for the seed; runs that share them are repetitions."""
        rest = {path: value for path, value in self.overrides.items() if path != "seed"}
        return json.dumps(rest, sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A config file's runs, with what applies to all of them."""

    spec: str  # file.py or file.py:argument, absolute
    common: Overrides  # from the command line; a run's own come after them
    runs: tuple[Run, ...]


def load(spec: str, base: ConfigDict, common: Overrides) -> Sweep:
    """Reads and checks what a config file sweeps over.

    Args:
      spec: file.py or file.py:argument, as given to --config.
      base: its config, with the overrides of the command line applied.
      common: those overrides.

    Raises ConfigError, naming run and field, for what could not run.
    """
    path = find_config(spec.split(":", 1)[0]).resolve()
    module = _load_module(path)
    check(
        callable(getattr(module, "sweep", None)),
        f"--config={spec}: {path} does not define sweep(add); pass a config that does, such as "
        "experiments/configs/main_table.py, or train this one with experiments/train.py",
    )
    added: dict[str, Overrides] = {}

    def add(name: str, overrides: Overrides) -> None:
        _check_name(name, added)
        added[name] = overrides

    module.sweep(add)
    check(bool(added), f"--config={spec}: sweep(add) added no run; call add(name, overrides)")
    evaluations = _read_evaluations(path, getattr(module, "EVALUATIONS", [{}]), list(added))
    runs: dict[str, Run] = {}
    for name, overrides in added.items():
        runs[name] = _make_run(base, name, overrides, evaluations, runs)
    _check_groups(tuple(runs.values()))
    return Sweep(spec=spec, common=common, runs=tuple(runs.values()))


def resolve_step(step: str | int, config: Experiment) -> int:
    """The number of the checkpoint that is meant: the end of a stage, or a number already."""
    ends = {"sft": config.sft.steps, "last": config.sft.steps + config.rl.steps}
    return ends[step] if step in ends else int(step)


def _load_module(path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None  # --config was loaded from it before
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_name(name: str, others: Mapping[str, Any]) -> None:
    check(
        isinstance(name, str) and bool(_NAME.fullmatch(name)),
        f"sweep: run {name!r} cannot be a folder: a name has letters, digits and . _ = + -, starts "
        "with a letter or digit, and may have parts divided by /",
    )
    check(name not in others, f"sweep: run {name!r} is added twice; give each run its own name")
    for other in others:
        inner, outer = max(name, other, key=len), min(name, other, key=len)
        check(
            not inner.startswith(f"{outer}/"),
            f"sweep: run {inner!r} would lie inside the folder of run {outer!r}; rename one",
        )


def _make_run(
    base: ConfigDict,
    name: str,
    overrides: Overrides,
    evaluations: Sequence[Evaluation],
    before: Mapping[str, Run],
) -> Run:
    changed = base.copy_and_resolve_references()
    plain = {}
    try:
        for path, value in overrides.items():
            plain[path] = _set(changed, path, value)
        config = parse(changed)
        validate.validate(config)
        phases.check(config)
        start = _find_start(config, before)
    except ConfigError as error:
        raise ConfigError(f"sweep: run {name!r}: {error}") from error
    chosen = tuple(e for e in evaluations if re.search(e.runs, name))
    last = config.sft.steps + config.rl.steps
    for evaluation in chosen:
        step = resolve_step(evaluation.step, config)
        check(
            0 < step <= last,
            f"sweep: run {name!r}: EVALUATIONS asks for step {evaluation.step!r}, which is step "
            f"{step}; the run has 1 to {last} (sft.steps + rl.steps)",
        )
    return Run(name, plain, config, chosen, start)


def _find_start(config: Experiment, before: Mapping[str, Run]) -> tuple[str, int] | None:
    """Run and step that `init_from` names, where it names a run of the sweep."""
    if not config.init_from.startswith("@"):
        return None
    matched = _START.fullmatch(config.init_from.replace("{seed}", str(config.seed)))
    check(
        matched is not None and matched["run"] in before,
        f"init_from={config.init_from!r}: allowed is @RUN:STEP, with a run added before this one "
        f"({', '.join(before) or 'none'}) and the step sft, last or a number",
    )
    assert matched is not None
    return matched["run"], resolve_step(matched["step"], before[matched["run"]].config)


def _set(config: ConfigDict, path: str, value: Any) -> Any:
    """Overrides one field; returns its value in the type of the field."""
    check_path(config, path)
    section, _, leaf = path.rpartition(".")
    owner = config
    for part in section.split(".") if section else ():
        owner = owner[part]
    check(
        not is_section(owner[leaf]),
        f"{path} is a section; override its fields one by one, as '{path}.FIELD'",
    )
    try:
        with config.unlocked():
            owner[leaf] = value
    except TypeError as error:
        raise ConfigError(
            f"{path}={value!r}: a {type(value).__name__}, where a "
            f"{type(owner[leaf]).__name__} such as {owner[leaf]!r} is needed"
        ) from error
    return owner[leaf]


def _read_evaluations(
    path: pathlib.Path, entries: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[Evaluation]:
    fields = [field.name for field in dataclasses.fields(Evaluation)]
    evaluations = []
    for number, entry in enumerate(entries):
        where = f"{path}: EVALUATIONS[{number}]"
        for name in entry:
            check(name in fields, f"{where} has the field {name!r}; allowed: {', '.join(fields)}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in entry.items()
        }
        evaluation = Evaluation(**values)
        check(
            evaluation.step in ("last", "sft") or isinstance(evaluation.step, int),
            f"{where} has step {evaluation.step!r}; allowed: 'last', 'sft' or a number",
        )
        check(
            any(re.search(evaluation.runs, name) for name in names),
            f"{where} has runs {evaluation.runs!r}, which fits no run; there are: "
            f"{', '.join(names)}",
        )
        evaluations.append(evaluation)
    return evaluations


def _check_groups(runs: Sequence[Run]) -> None:
    """One name a row: runs of the same name but for the seed must be the same but for the seed."""
    first: dict[str, Run] = {}
    for run in runs:
        other = first.setdefault(run.group, run)
        check(
            run.settings == other.settings,
            f"sweep: runs {other.name!r} and {run.name!r} differ in more than the seed "
            f"({other.settings} and {run.settings}), which their names do not tell; rename one",
        )


# ---------------------------------------------------------------------------------------------
# Commands


def make_commands(
    sweep: Sweep, run: Run, workdir: pathlib.Path, data_root: pathlib.Path, cpu_devices: int
) -> dict[str, list[str]]:
    """The commands of a run, by the key under which its status remembers each."""
    folder = workdir / run.name
    overrides = {**sweep.common, **run.overrides, "mesh.cpu_devices": cpu_devices}
    if run.start is not None:
        other, step = run.start
        overrides["init_from"] = str(workdir / other / "checkpoints" / str(step))
    commands = {
        "train": [
            *_script("train.py"),
            f"--config={sweep.spec}",
            *(f"--config.{path}={value}" for path, value in overrides.items()),
            f"--workdir={folder}",
            f"--data_root={data_root}",
        ]
    }
    for evaluation in run.evaluations:
        commands[evaluation.key] = [
            *_script("evaluate.py"),
            f"--checkpoint={folder}",
            f"--step={resolve_step(evaluation.step, run.config)}",
            *(f"--split={split}" for split in evaluation.splits),
            *(f"--temperature={temperature:g}" for temperature in evaluation.temperatures),
            f"--episodes={evaluation.episodes}",
            f"--cpu_devices={cpu_devices}",
            f"--data_root={data_root}",
            "--skip_existing",
        ]
    return commands


def _script(name: str) -> list[str]:
    return [sys.executable, str(_SCRIPTS / name)]


def choose_devices(sweep: Sweep, run: Run, cores: int) -> int:
    """Into how many devices a run splits its share of the cores.

    As many as there are cores, unless its batches do not divide over so many. The config's number
    stays where somebody has set it, or where the run needs a certain number (mesh.data).
    """
    config = run.config
    if "mesh.cpu_devices" in {**sweep.common, **run.overrides} or config.mesh.data:
        return config.mesh.cpu_devices
    for devices in range(cores, 1, -1):
        try:
            validate.validate_devices(config, devices)
            return devices
        except ConfigError:
            continue
    return 1
