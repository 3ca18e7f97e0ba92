"""Runs what a config sweeps over, several runs at a time, and makes one table of it.

    python experiments/sweep.py --config=experiments/configs/main_table.py \
        --workdir=runs/main_table --jobs=2

Each run is trained and evaluated by the scripts of those names, in <workdir>/<run>, with log.txt
and status.json beside its checkpoints. Interrupted in any way, the same command goes on: what is
done is skipped, what is half done resumes. A failed run stops no other; --retry_failed tries it
again. The table is <workdir>/table.csv and <workdir>/table.md. The status is 1 where a run failed.

--config.x=y sets a field of all runs; the runs' own overrides come after it.
"""

import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tqdm
from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from atommem_jax.config import ConfigError, check
from atommem_jax.sweeps import plan as plan_lib
from atommem_jax.sweeps import scheduler as scheduler_lib
from atommem_jax.sweeps import table
from atommem_jax.sweeps.plan import Run, Sweep
from experiments import flags, train

absl_flags.adopt_module_key_flags(train)  # --help lists them
JOBS = absl_flags.DEFINE_integer(
    "jobs",
    0,
    "Runs at a time; more than one share the cores evenly. 0: one for two cores, one in all on a "
    "host with an accelerator.",
    lower_bound=0,
)
ONLY = absl_flags.DEFINE_string(
    "only", "", "Run only those in whose name this regular expression is found."
)
RETRY_FAILED = absl_flags.DEFINE_bool("retry_failed", False, "Start failed runs again.")
DRY_RUN = absl_flags.DEFINE_bool("dry_run", False, "Print what would be run, and run nothing.")
TABLE_ONLY = absl_flags.DEFINE_bool("table_only", False, "Make the table of what there is.")

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_TAIL_LINES = 15


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: flags start with --; see --help")
    check(
        bool(train.WORKDIR.value),
        "--workdir is missing: pass a directory for the runs and the table",
    )
    workdir = pathlib.Path(train.WORKDIR.value).resolve()
    flag = absl_flags.FLAGS["config"]
    sweep = plan_lib.load(
        config_flags.get_config_filename(flag),
        train.CONFIG.value,
        config_flags.get_override_values(flag),
    )
    if TABLE_ONLY.value:
        check(workdir.is_dir(), f"--workdir={workdir} does not exist: nothing was run there")
        write_table(sweep, workdir)
        return
    chosen = _choose(sweep, ONLY.value)
    slots = plan_slots(JOBS.value, len(chosen))
    plan = [make_job(sweep, run, workdir, slots) for run in chosen]
    due = [
        job
        for job in plan
        if scheduler_lib.is_due(job, scheduler_lib.read_status(job.folder), RETRY_FAILED.value)
    ]
    if DRY_RUN.value:
        _print_plan(plan, due)
        return
    try:
        with scheduler_lib.lock(workdir) as descriptor, scheduler_lib.interruptible():
            _run(sweep, workdir, due, slots, descriptor)
            results = write_table(sweep, workdir)
    except KeyboardInterrupt:
        print("sweep.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    _end(results)


def _run(
    sweep: Sweep,
    workdir: pathlib.Path,
    due: Sequence[scheduler_lib.Job],
    slots: Sequence[Sequence[int]],
    descriptor: int,
) -> None:
    runs = {run.name: run for run in sweep.runs}
    print(f"{len(due)} of {len(runs)} runs to do, {len(slots)} at a time, in {workdir}", flush=True)

    def report(job: scheduler_lib.Job, status: scheduler_lib.Status) -> None:
        cost = f"{status.seconds:.0f} s, {status.cpu_seconds / 3600:.2f} CPU hours"
        if status.state == scheduler_lib.DONE:
            (result,) = table.collect([runs[job.name]], workdir)
            tqdm.tqdm.write(f"done    {job.name}  {table.headline(result)}  {cost}")
        else:
            log = job.folder / scheduler_lib.LOG_FILE
            tail = scheduler_lib.read_tail(log, _TAIL_LINES).replace("\n", "\n    ")
            tqdm.tqdm.write(f"FAILED  {job.name}  {status.failed}; {log} ends:\n    {tail}")
        write_table(sweep, workdir, quiet=True)

    scheduler = scheduler_lib.Scheduler(
        slots,
        environment={**os.environ, "PYTHONUNBUFFERED": "1"},
        keep_open=[descriptor],
        commit=read_commit,
    )
    scheduler.run(due, report)


def write_table(sweep: Sweep, workdir: pathlib.Path, quiet: bool = False) -> list:
    """Writes table.csv and table.md from what there is; returns the results of all runs."""
    results = table.collect(sweep.runs, workdir)
    title = pathlib.Path(sweep.spec.split(":", 1)[0]).stem
    text = table.render_markdown(results, title)
    (workdir / "table.csv").write_text(table.render_csv(results), encoding="utf-8")
    (workdir / "table.md").write_text(text, encoding="utf-8")
    if not quiet:
        print(f"\n{text}\ntable: {workdir / 'table.csv'}, {workdir / 'table.md'}")
    return results


def _end(results: Sequence[table.Result]) -> None:
    failed = [result.run.name for result in results if result.state == scheduler_lib.FAILED]
    if failed:
        print(
            f"sweep.py: failed: {', '.join(failed)}; look at their log.txt, then start again with "
            "--retry_failed",
            file=sys.stderr,
        )
        sys.exit(1)


def _choose(sweep: Sweep, only: str) -> list[Run]:
    try:
        chosen = [run for run in sweep.runs if re.search(only, run.name)]
    except re.error as error:
        raise ConfigError(f"--only={only}: {error}; it is a regular expression") from error
    names = ", ".join(run.name for run in sweep.runs)
    check(bool(chosen), f"--only={only} fits no run; there are: {names}")
    return chosen


def _print_plan(plan: Sequence[scheduler_lib.Job], due: Sequence[scheduler_lib.Job]) -> None:
    for job in plan:
        status = scheduler_lib.read_status(job.folder)
        state = status.state if status else table.PENDING
        print(f"{job.name}: {state}{'' if job in due else ', nothing to do'}")
        for key, command in job.commands.items():
            if job in due and not (status and key in status.finished):
                print(f"    {shlex.join(command)}")


# ---------------------------------------------------------------------------------------------
# From runs to jobs


def make_job(
    sweep: Sweep, run: Run, workdir: pathlib.Path, slots: Sequence[Sequence[int]]
) -> scheduler_lib.Job:
    """The commands of a run, after a look at what it has left in its folder.

    Raises ConfigError where its config has changed since it was started.
    """
    folder = workdir / run.name
    status = scheduler_lib.read_status(folder)
    config = _to_plain(run.config)
    if slots[0]:
        devices = plan_lib.choose_devices(sweep, run, min(map(len, slots)))
    else:
        devices = run.config.mesh.cpu_devices
    if status is not None:
        _check_unchanged(run, folder, config, status.about["config"])
        # A trial goes on with as many devices as it began with, to the same bits.
        devices = status.about["cpu_devices"]
    data_root = pathlib.Path(flags.DATA_ROOT.value).resolve()
    return scheduler_lib.Job(
        name=run.name,
        folder=folder,
        commands=plan_lib.make_commands(sweep, run, workdir, data_root, devices),
        after=(run.start[0],) if run.start else (),
        about={"cpu_devices": devices, "overrides": dict(run.overrides), "config": config},
    )


def _check_unchanged(
    run: Run, folder: pathlib.Path, now: Mapping[str, Any], then: Mapping[str, Any]
) -> None:
    changed = [
        f"{path}={now.get(path)!r} (was {then.get(path)!r})"
        for path in sorted({*now, *then})
        if now.get(path) != then.get(path) and path != "mesh.cpu_devices"
    ]
    check(
        not changed,
        f"run {run.name!r} was started with another config: {'; '.join(changed)}. Choose another "
        f"--workdir, or delete {folder} to run it anew",
    )


def _to_plain(config: ConfigDict) -> dict[str, Any]:
    """{path: value} as JSON would read it back."""

    def flatten(section: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if isinstance(value, ConfigDict):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return json.loads(json.dumps(dict(flatten(config, ""))))


# ---------------------------------------------------------------------------------------------
# The host


def plan_slots(wanted: int, runs: int) -> list[list[int]]:
    """The cores of each job that runs at a time; none where jobs are not confined.

    Args:
      wanted: --jobs; 0 leaves the choice to the host.
      runs: how many there are to share the cores.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = []  # macOS has no way to confine a process
    count = len(cores) or os.cpu_count() or 1
    accelerated = has_accelerator()
    number = min(wanted or (1 if accelerated else max(1, count // 2)), max(1, runs))
    if number == 1 or accelerated or not cores:
        return [[] for _ in range(number)]
    if number > count:  # they take turns
        return [[cores[slot % count]] for slot in range(number)]
    ends = [slot * count // number for slot in range(number + 1)]
    return [cores[a:b] for a, b in itertools.pairwise(ends)]


def has_accelerator() -> bool:
    """Whether JAX finds more than a CPU. Asked in a process of its own, which lets go of it."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()[-1] != "cpu"


def read_commit() -> str:
    """Short name of the commit of this code, with a + where files differ from it."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = ask("rev-parse", "--short", "HEAD")
        changed = ask("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:  # no git
        return ""
    return f"{commit}+" if commit and changed else commit


if __name__ == "__main__":
    flags.run(main)
