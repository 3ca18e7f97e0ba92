"""Places the runs of a sweep on several TPU VMs, one after the other on each.

    python tpu_setup/sweep.py --config=experiments/configs/main_table.py \
        --workdir=runs/tpu/main_table --vms=atommem-a,atommem-b

The config is one that experiments/sweep.py takes. The VMs must have the code (create.sh,
setup_vm.sh, each with --name=VM); all else comes from tpu_setup/env.sh. Checkpoints go to
gs://BUCKET/sweeps/<name of the workdir>/<run>, what is known of the runs to
<workdir>/placements.json. Interrupted in any way, the same command goes on: what is at work on the
VMs stays at work meanwhile. A failed run stops no other; --retry_failed tries it again. A run whose
VM was preempted goes back to the queue, and resumes from its checkpoint on the next free VM.

--config.x=y sets a field of all runs. The status is 1 where a run failed, or could not be placed.
"""

import dataclasses
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

from absl import flags as absl_flags
from ml_collections import config_flags

from atommem_jax.config import ConfigError, check
from atommem_jax.sweeps import plan as plan_lib
from atommem_jax.sweeps import scheduler
from experiments import flags

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # tpu_setup is no part of an installed package

from tpu_setup import placement  # noqa: E402

CONFIG = flags.define_config("experiments/configs/main_table.py")
WORKDIR = absl_flags.DEFINE_string(
    "workdir", None, "Local folder of placements.json; its name is that of the sweep."
)
VMS = absl_flags.DEFINE_list("vms", [], "Names of the TPU VMs to place runs on.")
ENV = absl_flags.DEFINE_string("env", str(_ROOT / "tpu_setup" / "env.sh"), "Settings to use.")
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

# Stands for the folder in the bucket, while the plan of a sweep deals in local paths.
_IN_BUCKET = pathlib.Path("/@bucket@")


class Scripts:
    """Acts on VMs through the scripts of this folder."""

    def __init__(self, env: str, dry_run: bool = False):
        self._env, self._dry_run = env, dry_run

    def launch(self, vm: str, run: str, command: Sequence[str]) -> bool:
        """See Driver."""
        return self._call("launch.sh", vm, f"--run={run}", "--", *command).returncode == 0

    def look(self, vm: str, run: str) -> str:
        """See Driver."""
        done = self._call("status.sh", vm, f"--run={run}")
        states = re.findall(r"^state: (\w+)$", done.stdout, re.MULTILINE)
        return states[-1] if states and done.returncode == 0 else "unreachable"

    def stop(self, vm: str, run: str) -> bool:
        """See Driver."""
        return self._call("stop.sh", vm, f"--run={run}").returncode == 0

    def create(self, vm: str) -> bool:
        """See Driver."""
        return all(self._call(name, vm).returncode == 0 for name in ("create.sh", "setup_vm.sh"))

    def _call(self, script: str, vm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(_ROOT / "tpu_setup" / script), f"--name={vm}", f"--env={self._env}"]
        command += ["--dry-run"] if self._dry_run else []
        done = subprocess.run(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,  # the terminal's Ctrl-C must not cut a launch in two
        )
        if self._dry_run:
            print(done.stdout, end="")
        if done.returncode:
            print(f"{shlex.join(command)}: {done.stderr.strip()[-2000:]}", file=sys.stderr)
        check(done.returncode != 2, f"tpu_setup/{script} does not go on like this; see above")
        return done


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: flags start with --; see --help")
    local = WORKDIR.value or ""
    check(
        bool(local),
        "--workdir is missing: pass a local folder, such as runs/tpu/main_table",
    )
    check(
        "://" not in local,
        f"--workdir={local} is no local folder: it is for placements.json alone; "
        "checkpoints go to the bucket of env.sh by themselves",
    )
    vms = VMS.value
    check(bool(vms), "--vms is missing: pass names of TPU VMs, such as --vms=atommem-a,atommem-b")
    check(len(set(vms)) == len(vms), f"--vms={','.join(vms)} names a VM twice; name each once")
    workdir = pathlib.Path(local).resolve()
    trials = _choose(plan(workdir.name, read_bucket(ENV.value)), ONLY.value)
    if DRY_RUN.value:
        _print_plan(workdir, trials, vms)
        return
    try:
        with scheduler.lock(workdir), scheduler.interruptible():
            board = placement.Board(workdir, trials)
            if RETRY_FAILED.value:
                board.retry_failed()
            placement.Launcher(
                workdir.name,
                board,
                Scripts(ENV.value),
                vms,
                poll_seconds=POLL_SECONDS.value,
                recreate=RECREATE.value,
                report=lambda line: print(line, flush=True),
            ).run()
    except KeyboardInterrupt:
        print(
            "sweep.py: interrupted; what is at work on the VMs stays so, and the same command goes "
            "on from here",
            file=sys.stderr,
        )
        sys.exit(130)
    _end(board)


def plan(name: str, bucket: str) -> list[placement.Trial]:
    """The runs of --config as trials, with paths as they are on a VM."""
    flag = absl_flags.FLAGS["config"]
    file, *argument = config_flags.get_config_filename(flag).split(":", 1)
    path = pathlib.Path(file).resolve()
    check(
        path.is_relative_to(_ROOT),
        f"--config={file} lies outside {_ROOT}: the VMs have what is committed there; move it",
    )
    sweep = plan_lib.load(
        config_flags.get_config_filename(flag),
        CONFIG.value,
        config_flags.get_override_values(flag),
    )
    sweep = dataclasses.replace(sweep, spec=":".join([str(path.relative_to(_ROOT)), *argument]))
    data_root = pathlib.Path(flags.DATA_ROOT.value)
    trials = []
    for run in sweep.runs:
        local = plan_lib.make_commands(
            sweep, run, _IN_BUCKET, data_root, run.config.mesh.cpu_devices
        )
        commands = {
            key: [_on_vm(word, f"gs://{bucket}/sweeps/{name}") for word in command]
            for key, command in local.items()
            if EVALUATE.value or key == "train"
        }
        trials.append(placement.Trial(run.name, commands, run.start[0] if run.start else ""))
    return trials


def _on_vm(word: str, folder: str) -> str:
    """A word of a local command as it reads on a VM, in the folder of the code."""
    if word == sys.executable:
        return "python"
    return word.replace(f"{_ROOT}{os.sep}", "").replace(str(_IN_BUCKET), folder)


def read_bucket(env: str) -> str:
    """BUCKET of the settings, as the scripts read it."""
    check(
        pathlib.Path(env).is_file(),
        f"--env={env}: there is no such file; copy tpu_setup/env.sh.example to tpu_setup/env.sh "
        "and fill it in",
    )
    done = subprocess.run(
        ["bash", "-c", 'source "$1" && printf %s "$BUCKET"', "bash", env],
        capture_output=True,
        text=True,
        check=False,
    )
    check(
        done.returncode == 0 and bool(done.stdout),
        f"--env={env}: BUCKET cannot be read from it ({done.stderr.strip() or 'it is empty'}); "
        "compare it with tpu_setup/env.sh.example",
    )
    return done.stdout


def _choose(trials: Sequence[placement.Trial], only: str) -> list[placement.Trial]:
    try:
        chosen = [trial for trial in trials if re.search(only, trial.name)]
    except re.error as error:
        raise ConfigError(f"--only={only}: {error}; it is a regular expression") from error
    names = ", ".join(trial.name for trial in trials)
    check(bool(chosen), f"--only={only} fits no run; there are: {names}")
    return chosen


def _print_plan(
    workdir: pathlib.Path, trials: Sequence[placement.Trial], vms: Sequence[str]
) -> None:
    board = placement.Board(workdir, trials)
    for trial in trials:
        now = board.placements[trial.name]
        where = f" on {now.vm}" if now.state == placement.PLACED else ""
        print(f"{trial.name}: {now.state}{where}")
        for key, command in trial.commands.items():
            if key not in now.finished:
                print(f"    {shlex.join(command)}")
    first = trials[0]
    key = next(iter(first.commands))
    print(f"\nThe first is launched so, on {vms[0]}:")
    run = placement.name_run(workdir.name, first.name, key)
    Scripts(ENV.value, dry_run=True).launch(vms[0], run, first.commands[key])


def _end(board: placement.Board) -> None:
    failed, left = board.names(placement.FAILED), board.names(placement.QUEUED)
    print(f"{len(board.names(placement.DONE))} of {len(board.trials)} runs are done")
    if failed:
        print(
            f"sweep.py: failed: {', '.join(failed)}; look at their logs in the bucket, then start "
            "again with --retry_failed",
            file=sys.stderr,
        )
    if left:
        print(
            f"sweep.py: not placed, for want of a VM: {', '.join(left)}; create one (create.sh, "
            "setup_vm.sh) or pass --recreate, and start the same command again",
            file=sys.stderr,
        )
    if failed or left:
        sys.exit(1)


if __name__ == "__main__":
    flags.run(main)
