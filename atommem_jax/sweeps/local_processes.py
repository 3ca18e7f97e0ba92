"""Runs the jobs of a sweep as processes of this machine, each on its share of the cores.

What the commands of a job print is appended to `<folder>/log.txt`: at once, or where that lies in a
bucket, when one has ended. None of them outlives the
scheduler: see `launcher`.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from atommem_jax import text_files
from atommem_jax.config import paths
from atommem_jax.sweeps import launcher
from atommem_jax.sweeps.scheduler import DONE, FAILED, LOG_FILE, Outcome, Task

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0  # between asking a command to end and killing it


@dataclasses.dataclass
class Process:
    """A command at work."""

    popen: subprocess.Popen
    log: pathlib.Path  # on this machine
    kept: Any  # where it goes in the end
    outcome: Outcome | None = None


class LocalProcesses:
    """A driver of the scheduler: a slot is a share of the cores."""

    lasting = False

    def __init__(
        self,
        cores: Sequence[Sequence[int]],
        *,
        environment: Mapping[str, str] | None = None,
        keep_open: Sequence[int] = (),
        logs: pathlib.Path | None = None,
    ):
        """Prepares to run as many jobs at a time as there are shares.

        Args:
          cores: of each share; none means that its jobs are not confined.
          environment: of the commands; None for that of this process.
          keep_open: file descriptors that commands inherit, such as that of `scheduler.lock`.
          logs: local folder for the logs of jobs whose own folder is in a bucket.
        """
        self._cores = {f"slot {number}": share for number, share in enumerate(cores)}
        self._environment, self._keep_open = environment, tuple(keep_open)
        self._logs = logs

    def slots(self) -> Mapping[str, bool]:
        """See Driver: all of them, always."""
        return dict.fromkeys(self._cores, True)

    def start(self, task: Task, slot: str) -> Process:
        """See Driver."""
        kept = task.job.folder / LOG_FILE
        path = self._place_log(task, kept)
        with path.open("a", encoding="utf-8") as log:
            log.write(f"==== attempt {task.attempt}: {' '.join(task.command)}\n")
            log.flush()
            popen = subprocess.Popen(
                launcher.wrap(task.command, self._cores[slot]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=self._keep_open,
                start_new_session=True,  # the terminal's Ctrl-C is for the scheduler alone
            )
        return Process(popen, path, kept)

    def _place_log(self, task: Task, kept: Any) -> pathlib.Path:
        """The local file that a command prints to, with what was printed before it."""
        if not paths.is_remote(kept):
            return kept
        assert self._logs is not None, kept
        path = self._logs / task.job.name / LOG_FILE
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kept.read_bytes() if kept.exists() else b"")
        return path

    def poll(self, handle: Process) -> Outcome | None:
        """See Driver."""
        if handle.outcome is None:
            pid, code, usage = os.wait4(handle.popen.pid, os.WNOHANG)
            if pid:
                status = handle.popen.returncode = os.waitstatus_to_exitcode(code)
                cpu_seconds = usage.ru_utime + usage.ru_stime
                result = FAILED if status else DONE
                handle.outcome = Outcome(result, _explain(status), cpu_seconds)
                if handle.kept != handle.log:
                    _keep_log(handle)
        return handle.outcome

    def stop(self, handles: Sequence[Process]) -> None:
        """Asks all of them to end, and kills after a while."""
        for handle in handles:
            _signal(handle, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        for handle in handles:
            try:
                while self.poll(handle) is None:
                    if time.monotonic() > deadline:
                        _signal(handle, signal.SIGKILL)
                    time.sleep(_POLL_SECONDS)
            except ChildProcessError:
                # An interrupt has come between a wait and its booking: there is no child any more.
                handle.outcome = Outcome(FAILED, "was interrupted")

    def describe(self, handle: Process) -> str:
        """See Driver: how far its progress bar is."""
        return read_progress(handle.log)


def _keep_log(process: Process) -> None:
    try:
        process.kept.write_bytes(process.log.read_bytes())
    except Exception as error:  # a log is not worth a sweep
        text_files.warn(f"{process.kept}: the log is not kept ({paths.describe(error)})")


def _signal(process: Process, number: int) -> None:
    # The whole session: what the command has started ends too.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.popen.pid, number)


def _explain(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"


# ---------------------------------------------------------------------------------------------
# Logs


def read_tail(path: pathlib.Path, lines: int) -> str:
    """The last lines of a log, progress bars reduced to what they showed last."""
    text = path.read_bytes()[-20_000:].decode("utf-8", "replace") if path.exists() else ""
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join([line for line in shown if line.strip()][-lines:])


def read_progress(path: pathlib.Path) -> str:
    """What the last progress bar of a log says, as `sft 45%`; '' where there is none."""
    bars = re.findall(r"^(\w+): +(\d+%)\|", read_tail(path, 3), re.MULTILINE)
    return " ".join(bars[-1]) if bars else ""


# ---------------------------------------------------------------------------------------------
# The machine


def share_cores(wanted: int, runs: int) -> list[list[int]]:
    """The cores of each job that runs at a time; none where jobs are not confined.

    Args:
      wanted: how many jobs at a time; 0 leaves the choice to the machine.
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


def read_commit(checkout: pathlib.Path) -> str:
    """Short name of the commit of a checkout, with a + where its files differ from it; or ''."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = ask("rev-parse", "--short", "HEAD")
        changed = ask("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:  # no git
        return ""
    return f"{commit}+" if commit and changed else commit
