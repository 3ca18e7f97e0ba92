"""Runs what a config sweeps over, several runs at a time, and makes one table of it.

    python experiments/sweep.py --config=experiments/configs/main_table.py \
        --workdir=runs/main_table --jobs=2

Each run is trained and evaluated by the scripts of those names, in <workdir>/<run>, with log.txt
and status.json beside its checkpoints. Interrupted in any way, the same command goes on: what is
done is skipped, what is half done resumes. A failed run stops no other; --retry_failed tries it
again. The table is <workdir>/table.csv and <workdir>/table.md. The status is 1 where a run failed.

In a bucket (--workdir=gs://...) the log of a run is written at the end of each of its commands.
--config.x=y sets a field of all runs; the runs' own overrides come after it. On several TPU VMs
tpu_setup/sweep.py does the same.
"""

import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import tqdm
from absl import flags as absl_flags

from atommem_jax.config import check, paths
from atommem_jax.sweeps import jobs as jobs_lib
from atommem_jax.sweeps import local_processes, scheduler, table
from atommem_jax.sweeps import plan as plan_lib
from experiments import flags

CONFIG = flags.define_config("experiments/configs/synthetic.py")
WORKDIR = flags.define_workdir("Where the runs and the table go.")
JOBS = absl_flags.DEFINE_integer(
    "jobs",
    0,
    "Runs at a time, which share the cores evenly; 0 for one on every two cores, and one in all on "
    "a host with an accelerator.",
    lower_bound=0,
)
ONLY = absl_flags.DEFINE_string(
    "only", "", "Run only those in whose name this regular expression is found."
)
RETRY_FAILED = absl_flags.DEFINE_bool("retry_failed", False, "Start failed runs again.")
DRY_RUN = absl_flags.DEFINE_bool("dry_run", False, "Print what would be run, and run nothing.")
TABLE_ONLY = absl_flags.DEFINE_bool(
    "table_only", False, "Run nothing, and make the table of what there is."
)

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_TAIL_LINES = 15


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: flags start with --; see --help")
    check(bool(WORKDIR.value), "--workdir is missing: pass a directory for the runs and the table")
    workdir = paths.locate(paths.absolute(WORKDIR.value))
    spec, changes = flags.read_changes()
    sweep = plan_lib.load(spec, CONFIG.value, changes)
    if TABLE_ONLY.value:
        found = paths.is_folder(workdir, f"--workdir={workdir}")
        check(found, f"--workdir={workdir} does not exist: nothing was run there")
        _write_table(sweep, workdir)
        return
    chosen = jobs_lib.choose(sweep, ONLY.value)
    shares = local_processes.share_cores(JOBS.value, len(chosen))
    with paths.reaching(workdir, f"--workdir={workdir}"):
        statuses = {run.name: scheduler.read_status(workdir / run.name) for run in chosen}
    jobs = [
        jobs_lib.make_local_job(
            sweep,
            run,
            statuses[run.name],
            workdir=workdir,
            data_root=pathlib.Path(flags.DATA_ROOT.value).resolve(),
            shares=shares,
        )
        for run in chosen
    ]
    if DRY_RUN.value:
        print(scheduler.describe_plan(jobs, statuses, RETRY_FAILED.value))
        return
    try:
        with (
            scheduler.lock(workdir) as descriptor,
            scheduler.interruptible(),
            tempfile.TemporaryDirectory() as logs,
        ):
            _run(sweep, workdir, jobs, shares, descriptor, pathlib.Path(logs))
            results = _write_table(sweep, workdir)
    except KeyboardInterrupt:
        print("sweep.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    _end(results)


def _run(
    sweep: plan_lib.Sweep,
    workdir: pathlib.Path,
    jobs: Sequence[scheduler.Job],
    shares: Sequence[Sequence[int]],
    descriptor: int | None,
    logs: pathlib.Path,
) -> None:
    runs = {run.name: run for run in sweep.runs}
    due = scheduler.find_due(jobs, RETRY_FAILED.value)
    at_a_time = f"{len(shares)} at a time"
    print(f"{len(due)} of {len(runs)} runs to do, {at_a_time}, in {workdir}", flush=True)

    def show(change: str, job: scheduler.Job, status: scheduler.Status) -> None:
        line = scheduler.tell(change, job, status)
        if change == scheduler.DONE:
            (result,) = table.collect([runs[job.name]], workdir)
            cost = f"{status.seconds:.0f} s, {status.cpu_seconds / 3600:.2f} CPU hours"
            tqdm.tqdm.write(f"{line}  {table.headline(result)}  {cost}")
        elif change == scheduler.FAILED:
            log = job.folder / scheduler.LOG_FILE
            tail = local_processes.read_tail(log, _TAIL_LINES).replace("\n", "\n    ")
            tqdm.tqdm.write(f"{line}; {log} ends:\n    {tail}")
        else:
            return  # the progress bar shows what is at work
        table.write(sweep, workdir)

    driver = local_processes.LocalProcesses(
        shares,
        environment={**os.environ, "PYTHONUNBUFFERED": "1"},
        keep_open=[] if descriptor is None else [descriptor],
        logs=logs,
    )
    scheduler.Scheduler(driver, commit=lambda: local_processes.read_commit(_ROOT)).run(
        jobs, retry_failed=RETRY_FAILED.value, on_change=show
    )


def _write_table(sweep: plan_lib.Sweep, workdir: pathlib.Path) -> list[table.Result]:
    results, text = table.write(sweep, workdir)
    print(f"\n{text}\ntable: {workdir / 'table.csv'}, {workdir / 'table.md'}")
    return results


def _end(results: Sequence[table.Result]) -> None:
    failed = [result.run.name for result in results if result.state == scheduler.FAILED]
    if failed:
        print(
            f"sweep.py: failed: {', '.join(failed)}; look at their log.txt, then start again with "
            "--retry_failed",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    flags.run(main)
