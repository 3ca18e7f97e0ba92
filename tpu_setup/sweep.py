"""Places the runs of a sweep on several TPU VMs, one after the other on each.

    python tpu_setup/sweep.py --config=experiments/configs/main_table.py \
        --workdir=runs/tpu/main_table --vms=atommem-a,atommem-b

The config is one that experiments/sweep.py takes. The VMs must have the code (create.sh,
setup_vm.sh, each with --name=VM); all else comes from tpu_setup/env.sh. Checkpoints go to
gs://BUCKET/sweeps/<name of the workdir>/<run>, what is known of a run to
<workdir>/<run>/status.json. Interrupted in any way, the same command goes on: what is at work on
the VMs stays at work meanwhile. A failed run stops no other; --retry_failed tries it again. A run
whose VM was preempted goes back to the queue, and resumes from its checkpoint on the next free VM.

--config.x=y sets a field of all runs. The status is 1 where a run failed, or could not be placed.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence

import tqdm
from absl import flags as absl_flags

from atommem_jax.config import check
from atommem_jax.sweeps import jobs as jobs_lib
from atommem_jax.sweeps import placements, scheduler, tpu_vms
from atommem_jax.sweeps import plan as plan_lib
from experiments import flags

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_SCRIPTS = _ROOT / "tpu_setup"

CONFIG = flags.define_config("experiments/configs/main_table.py")
WORKDIR = flags.define_workdir("Local folder of the statuses; its name is that of the sweep.")
VMS = absl_flags.DEFINE_list("vms", [], "Names of the TPU VMs to place runs on.")
ENV = absl_flags.DEFINE_string("env", str(_SCRIPTS / "env.sh"), "Settings to use.")
ONLY = absl_flags.DEFINE_string(
    "only", "", "Place only those in whose name this regular expression is found."
)
EVALUATE = absl_flags.DEFINE_bool(
    "evaluate", False, "Also run the config's EVALUATIONS on the VM after training."
)
RECREATE = absl_flags.DEFINE_bool("recreate", False, "Make a VM anew that was preempted.")
RETRY_FAILED = absl_flags.DEFINE_bool("retry_failed", False, "Place failed runs again.")
POLL_SECONDS = absl_flags.DEFINE_float(
    "poll_seconds", 60.0, "Between two looks at a VM.", lower_bound=0.0
)
DRY_RUN = absl_flags.DEFINE_bool("dry_run", False, "Print what would be placed, and place nothing.")


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: flags start with --; see --help")
    local = WORKDIR.value or ""
    check(bool(local), "--workdir is missing: pass a local folder, such as runs/tpu/main_table")
    check(
        "://" not in local,
        f"--workdir={local} is no local folder: it is for the statuses alone; "
        "checkpoints go to the bucket of env.sh by themselves",
    )
    vms = VMS.value
    check(bool(vms), "--vms is missing: pass names of TPU VMs, such as --vms=atommem-a,atommem-b")
    check(len(set(vms)) == len(vms), f"--vms={','.join(vms)} names a VM twice; name each once")
    workdir = pathlib.Path(local).resolve()
    spec, changes = flags.read_changes()
    sweep = plan_lib.load(spec, CONFIG.value, changes)
    bucket = tpu_vms.read_bucket(ENV.value)
    if DRY_RUN.value:
        statuses = _read_statuses(sweep, workdir) | placements.read_statuses(workdir)
        jobs = _make_jobs(sweep, workdir, bucket, statuses)
        _print_plan(jobs, statuses, workdir.name, vms[0])
        return
    try:
        with scheduler.lock(workdir), scheduler.interruptible():
            placements.convert(workdir)
            jobs = _make_jobs(sweep, workdir, bucket, _read_statuses(sweep, workdir))
            driver = tpu_vms.TpuVms(
                workdir.name,
                tpu_vms.Scripts(_SCRIPTS, ENV.value),
                vms,
                poll_seconds=POLL_SECONDS.value,
                recreate=RECREATE.value,
                report=_show,
            )
            left = scheduler.Scheduler(driver).run(
                jobs,
                retry_failed=RETRY_FAILED.value,
                on_change=lambda *what: _show(scheduler.tell(*what)),
            )
    except KeyboardInterrupt:
        print(
            "sweep.py: interrupted; what is at work on the VMs stays so, and the same command goes "
            "on from here",
            file=sys.stderr,
        )
        sys.exit(130)
    _end(jobs, left)


def _read_statuses(
    sweep: plan_lib.Sweep, workdir: pathlib.Path
) -> dict[str, scheduler.Status | None]:
    return {run.name: scheduler.read_status(workdir / run.name) for run in sweep.runs}


def _make_jobs(
    sweep: plan_lib.Sweep,
    workdir: pathlib.Path,
    bucket: str,
    statuses: Mapping[str, scheduler.Status | None],
) -> list[scheduler.Job]:
    return [
        jobs_lib.make_vm_job(
            sweep,
            run,
            statuses[run.name],
            workdir=workdir,
            data_root=pathlib.Path(flags.DATA_ROOT.value),
            checkout=_ROOT,
            bucket=bucket,
            evaluate=EVALUATE.value,
        )
        for run in jobs_lib.choose(sweep, ONLY.value)
    ]


def _show(line: str) -> None:
    tqdm.tqdm.write(line)
    sys.stdout.flush()


def _print_plan(
    jobs: Sequence[scheduler.Job],
    statuses: Mapping[str, scheduler.Status | None],
    name: str,
    vm: str,
) -> None:
    print(scheduler.describe_plan(jobs, statuses, RETRY_FAILED.value))
    print(f"\nThe first is launched so, on {vm}:", flush=True)
    first = jobs[0]
    key = next(iter(first.commands))
    run = tpu_vms.name_run(name, first.name, key)
    tpu_vms.Scripts(_SCRIPTS, ENV.value, dry_run=True).launch(vm, run, first.commands[key])


def _end(jobs: Sequence[scheduler.Job], left: Sequence[scheduler.Job]) -> None:
    statuses = {job.name: scheduler.read_status(job.folder) for job in jobs}
    states = {name: status.state for name, status in statuses.items() if status}
    failed = [name for name, state in states.items() if state == scheduler.FAILED]
    done = [name for name, state in states.items() if state == scheduler.DONE]
    print(f"{len(done)} of {len(jobs)} runs are done")
    if failed:
        print(
            f"sweep.py: failed: {', '.join(failed)}; look at their logs in the bucket, then start "
            "again with --retry_failed",
            file=sys.stderr,
        )
    if left:
        names = ", ".join(job.name for job in left)
        print(
            f"sweep.py: not placed, for want of a VM: {names}; create one (create.sh, "
            "setup_vm.sh) or pass --recreate, and start the same command again",
            file=sys.stderr,
        )
    if failed or left:
        sys.exit(1)


if __name__ == "__main__":
    flags.run(main)
