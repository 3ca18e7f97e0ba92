"""Runs the jobs of a sweep on TPU VMs, one after the other on each.

What a command does on a VM outlives the scheduler, which may be ended in any way: the next one
finds it there. A VM may be preempted; its job then goes back to the queue and resumes from its
checkpoint on another VM, or on the same one made anew. What has to be done on a VM is asked of
`Actions`: the shell scripts of `tpu_setup/`, or a test's stand-in.
"""

import dataclasses
import hashlib
import pathlib
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from atommem_jax.config import check
from atommem_jax.sweeps.scheduler import DONE, FAILED, LOST, Outcome, Task

_LONGEST_RUN = 40
_OF_AN_END = ("done", "failed", "stopped", "lost")  # states of a run that is not at work any more


class Actions(Protocol):
    """What is done on a VM. Each may take minutes."""

    def launch(self, vm: str, run: str, command: Sequence[str]) -> bool:
        """Starts a command; whether it was started on all workers."""

    def look(self, vm: str, run: str) -> str:
        """The state of a run, in the words of status.sh."""

    def stop(self, vm: str, run: str) -> bool:
        """Ends a run; whether it has ended on all workers."""

    def create(self, vm: str) -> bool:
        """Makes the VM anew, code included; whether that went well."""


@dataclasses.dataclass
class Errand:
    """A command on a VM, looked after by a thread."""

    task: Task
    vm: str
    run: str  # what it is called there
    state: str = ""  # as it was seen last
    outcome: Outcome | None = None


class TpuVms:
    """A driver of the scheduler: a slot is a VM. The actions run in threads, one a command."""

    lasting = True

    def __init__(
        self,
        sweep: str,
        actions: Actions,
        vms: Sequence[str],
        *,
        poll_seconds: float,
        recreate: bool,
        report: Callable[[str], None] = print,
    ):
        """Prepares to run jobs on VMs.

        Args:
          sweep: its name, which keeps its runs apart from those of others.
          actions: what is done on the VMs.
          vms: to place jobs on.
          poll_seconds: between two looks at a VM.
          recreate: whether a VM that is gone is made anew; otherwise the others do its work.
          report: takes a line for the user.
        """
        self._sweep, self._actions, self._report = sweep, actions, report
        self._poll_seconds, self._recreate = poll_seconds, recreate
        self._ready = dict.fromkeys(vms, True)  # False while it is made anew; gone ones leave
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._errors: list[BaseException] = []

    def slots(self) -> Mapping[str, bool]:
        """See Driver."""
        self._raise_errors()
        with self._lock:
            return dict(self._ready)

    def start(self, task: Task, slot: str) -> Errand:
        """See Driver."""
        errand = Errand(task, slot, name_run(self._sweep, task.job.name, task.key))
        threading.Thread(target=self._work, args=(errand,), daemon=True).start()
        return errand

    def poll(self, handle: Errand) -> Outcome | None:
        """See Driver."""
        self._raise_errors()
        return handle.outcome

    def stop(self, handles: Sequence[Errand]) -> None:
        """Ends looking after them; what is at work on the VMs stays so."""
        self._ended.set()

    def describe(self, handle: Errand) -> str:
        """See Driver."""
        return f"{handle.state or 'placed'} on {handle.vm}"

    def _raise_errors(self) -> None:
        # Once: the scheduler asks again while it unwinds.
        if self._errors and not self._ended.is_set():
            self._ended.set()
            raise self._errors[0]

    # -----------------------------------------------------------------------------------------
    # In the thread of a command

    def _work(self, errand: Errand) -> None:
        try:
            outcome = self._attend(errand)
            is_gone = outcome is not None and errand.state == "gone"
            make_anew = is_gone and self._give_up(errand.vm)
            errand.outcome = outcome  # from here on another VM may take the job
            if make_anew:
                self._make_anew(errand.vm)
        except BaseException as error:
            self._errors.append(error)

    def _attend(self, errand: Errand) -> Outcome | None:
        """Starts a command where that is still to be done; returns when it has ended."""
        task, vm, run = errand.task, errand.vm, errand.run
        started = task.found
        while not self._ended.is_set():
            state = self._actions.look(vm, run)
            if not started and state in _OF_AN_END:
                state = "none"  # of an earlier attempt
            errand.state = state
            if self._ended.is_set():
                return None
            if state == "done":
                return Outcome(DONE)
            if state in ("failed", "stopped"):
                self._actions.stop(vm, run)  # on the workers where it goes on
                return Outcome(FAILED, f"{state} on {vm}, log in logs/{run}")
            if state == "gone":
                return Outcome(LOST)
            if not started and state in ("none", "running"):
                # The mark comes first: who ends here must look before it is started again.
                task.mark()
                started = True
            if state in ("none", "lost"):
                if state == "lost":
                    self._actions.stop(vm, run)
                if not self._actions.launch(vm, run, task.command) and self._clear_up(errand):
                    return Outcome(LOST)
            elif state != "running":  # waiting or unreachable, which may pass
                self._report(f"{vm} is {state}; {task.job.name} waits there")
            self._ended.wait(self._poll_seconds)
        return None

    def _clear_up(self, errand: Errand) -> bool:
        """After a launch that failed: ends what may be at work; whether the job may move on."""
        errand.state = self._actions.look(errand.vm, errand.run)
        if errand.state == "gone":
            return True
        if not self._actions.stop(errand.vm, errand.run):
            # It may be at work on some worker, so it stays here until the VM answers or is gone.
            self._report(f"{errand.vm} does not answer; {errand.task.job.name} waits there")
            return False
        self._report(f"{errand.vm} takes no more runs: nothing can be launched there")
        with self._lock:
            self._ready.pop(errand.vm, None)
        return True

    def _give_up(self, vm: str) -> bool:
        """Takes no jobs for a VM that is gone; whether it is to be made anew."""
        with self._lock:
            if self._recreate and vm in self._ready:
                self._ready[vm] = False
                return True
            self._ready.pop(vm, None)
        self._report(f"{vm} is gone; the other VMs do its work")
        return False

    def _make_anew(self, vm: str) -> None:
        self._report(f"{vm} is gone, and is made anew")
        made = self._actions.create(vm)
        with self._lock:
            if made:
                self._ready[vm] = True
            else:
                del self._ready[vm]
        if not made:
            self._report(f"{vm} could not be made anew; the other VMs do its work")


def name_run(sweep: str, job: str, key: str) -> str:
    """What the run of a command is called on a VM: readable, valid there, and told from others."""
    digest = hashlib.sha256(f"{sweep}\n{job}\n{key}".encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", f"{job}-{key.split()[0]}".lower()).strip("-")
    return f"t-{readable[:_LONGEST_RUN].strip('-')}-{digest}"


# ---------------------------------------------------------------------------------------------
# The scripts of tpu_setup/


class Scripts:
    """Acts on VMs through the shell scripts."""

    def __init__(self, folder: pathlib.Path, env: str, dry_run: bool = False):
        """Prepares to call them.

        Args:
          folder: where they are.
          env: file of settings that they read.
          dry_run: has them print what they would do.
        """
        self._folder, self._env, self._dry_run = folder, env, dry_run

    def launch(self, vm: str, run: str, command: Sequence[str]) -> bool:
        """See Actions."""
        return self._call("launch.sh", vm, f"--run={run}", "--", *command).returncode == 0

    def look(self, vm: str, run: str) -> str:
        """See Actions."""
        done = self._call("status.sh", vm, f"--run={run}")
        states = re.findall(r"^state: (\w+)$", done.stdout, re.MULTILINE)
        return states[-1] if states and done.returncode == 0 else "unreachable"

    def stop(self, vm: str, run: str) -> bool:
        """See Actions."""
        return self._call("stop.sh", vm, f"--run={run}").returncode == 0

    def create(self, vm: str) -> bool:
        """See Actions."""
        return all(self._call(name, vm).returncode == 0 for name in ("create.sh", "setup_vm.sh"))

    def _call(self, script: str, vm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self._folder / script), f"--name={vm}", f"--env={self._env}"]
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
