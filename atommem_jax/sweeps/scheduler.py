"""Runs jobs, N at a time, and keeps on disk what became of each.

A job is a name, a folder and commands to run one after the other. All that is known about it stands
in `<folder>/status.json`, what its commands print in `<folder>/log.txt`; so a scheduler that was
killed and started again does what is left to do. It knows nothing of training.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tqdm

from atommem_jax.config import check

STATUS_FILE, LOG_FILE = "status.json", "log.txt"
STARTED, DONE, FAILED = "started", "done", "failed"

_LAUNCHER = pathlib.Path(__file__).with_name("launcher.py")
_POLL_SECONDS = 0.1
_SHOW_SECONDS = 10.0  # between two looks at the logs of what is running
_GRACE_SECONDS = 10.0  # between asking a command to end and killing it


@dataclasses.dataclass(frozen=True)
class Job:
    """Commands that run in order; one that fails ends the job."""

    name: str
    folder: pathlib.Path
    commands: Mapping[str, Sequence[str]]  # by a key under which each is remembered as finished
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # kept in the status
    after: tuple[str, ...] = ()  # names of jobs that it waits for, whatever becomes of them


@dataclasses.dataclass
class Status:
    """What became of a job; the content of its status.json."""

    state: str = STARTED  # or DONE, FAILED
    finished: list[str] = dataclasses.field(default_factory=list)  # keys of commands
    failed: str = ""  # what failed, and how
    attempts: int = 0
    seconds: float = 0.0  # of its commands, all attempts together
    cpu_seconds: float = 0.0  # user and system time; a command killed with its scheduler has none
    commit: str = ""  # of the code, when the last attempt began
    log: str = LOG_FILE
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, folder: pathlib.Path) -> None:
        """Replaces the file in one go."""
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{STATUS_FILE}.tmp"
        aside.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        aside.replace(folder / STATUS_FILE)


def read_status(folder: pathlib.Path) -> Status | None:
    """The status in a job's folder; None where it never started."""
    path = folder / STATUS_FILE
    return Status(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def is_due(job: Job, status: Status | None, retry_failed: bool) -> bool:
    """Whether the job has commands left to run."""
    if status is None:
        return True
    if status.state == FAILED and not retry_failed:
        return False
    return status.state != DONE or any(key not in status.finished for key in job.commands)


# ---------------------------------------------------------------------------------------------
# Running


@dataclasses.dataclass
class _Running:
    """A job at work in a slot, one command after the other."""

    job: Job
    slot: int
    status: Status
    process: subprocess.Popen | None = None
    key: str = ""
    started: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether a command is running that has not been waited for."""
        return self.process is not None and self.process.returncode is None


class Scheduler:
    """Keeps every slot busy until no job is left."""

    def __init__(
        self,
        slots: Sequence[Sequence[int]],
        *,
        environment: Mapping[str, str] | None = None,
        keep_open: Sequence[int] = (),
        commit: Callable[[], str] = lambda: "",
    ):
        """Prepares to run as many jobs at a time as there are slots.

        Args:
          slots: the cores of each; no cores means that its jobs are not confined.
          environment: of the commands; None for that of this process.
          keep_open: file descriptors that commands inherit, such as that of `lock`.
          commit: names the code that a job starts with.
        """
        self._slots, self._environment = slots, environment
        self._keep_open, self._commit = keep_open, commit
        self._running: list[_Running] = []

    def run(
        self, jobs: Sequence[Job], on_end: Callable[[Job, Status], None] = lambda job, status: None
    ) -> None:
        """Runs what is given, in order as far as none waits for another.

        `on_end` is called with each job that is done or failed. Whatever interrupts it, Ctrl-C or
        an exception, ends the commands first.
        """
        waiting = list(jobs)
        with tqdm.tqdm(total=len(jobs), desc="runs", mininterval=_SHOW_SECONDS) as bar:
            try:
                shown = 0.0
                while waiting or self._running:
                    busy = {running.slot for running in self._running}
                    for slot in range(len(self._slots)):
                        ready = self._find_ready(waiting)
                        if ready is not None and slot not in busy:
                            waiting.remove(ready)
                            self._start(ready, slot)
                    ended = self._poll()
                    for running in ended:
                        on_end(running.job, running.status)
                    if ended:
                        bar.update(len(ended))
                    if ended or time.monotonic() - shown > _SHOW_SECONDS:
                        shown = time.monotonic()
                        bar.set_postfix_str(self._describe())
                    time.sleep(0 if ended else _POLL_SECONDS)
            finally:
                self._stop()

    def _find_ready(self, waiting: Sequence[Job]) -> Job | None:
        """The first that waits for none of those not yet at an end."""
        open_ = {job.name for job in waiting} | {running.job.name for running in self._running}
        return next((job for job in waiting if not open_.intersection(job.after)), None)

    def _start(self, job: Job, slot: int) -> None:
        status = read_status(job.folder) or Status()
        status.state, status.failed, status.about = STARTED, "", dict(job.about)
        status.attempts += 1
        status.commit = self._commit()
        status.write(job.folder)
        running = _Running(job, slot, status)
        self._running.append(running)
        self._advance(running)

    def _advance(self, running: _Running) -> None:
        """Starts the job's next command; without one the job is done."""
        job, status = running.job, running.status
        left = [key for key in job.commands if key not in status.finished]
        if not left:
            status.state = DONE
            status.write(job.folder)
            return
        running.key, running.started = left[0], time.monotonic()
        command = list(job.commands[running.key])
        cores = ",".join(map(str, self._slots[running.slot]))
        with (job.folder / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(f"==== attempt {status.attempts}: {' '.join(command)}\n")
            log.flush()
            running.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), cores, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=tuple(self._keep_open),
                start_new_session=True,  # the terminal's Ctrl-C is for the scheduler alone
            )

    def _poll(self) -> list[_Running]:
        """Looks after the commands that have ended; returns the jobs that have."""
        for running in self._running:
            if running.alive and self._book(running):
                self._judge(running)
        ended = [running for running in self._running if not running.alive]
        self._running = [running for running in self._running if running.alive]
        return ended

    def _book(self, running: _Running) -> bool:
        """Whether the command has ended; if so, its time is added to the job's."""
        assert running.process is not None
        pid, code, usage = os.wait4(running.process.pid, os.WNOHANG)
        if pid:
            running.process.returncode = os.waitstatus_to_exitcode(code)
            running.status.seconds += time.monotonic() - running.started
            running.status.cpu_seconds += usage.ru_utime + usage.ru_stime
        return bool(pid)

    def _judge(self, running: _Running) -> None:
        """After a command comes the next, or the job has failed."""
        assert running.process is not None
        if running.process.returncode == 0:
            running.status.finished.append(running.key)
            running.status.write(running.job.folder)
            self._advance(running)
            return
        running.status.state = FAILED
        running.status.failed = f"{running.key}: {_explain(running.process.returncode)}"
        running.status.write(running.job.folder)

    def _stop(self) -> None:
        """Ends what is running: asks first, kills after a while. Their jobs stay `started`."""
        alive = [running for running in self._running if running.alive]
        for running in alive:
            _signal(running, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        for running in alive:
            # An interrupt may have come between a wait and its booking: then there is no child.
            with contextlib.suppress(ChildProcessError):
                while not self._book(running):
                    if time.monotonic() > deadline:
                        _signal(running, signal.SIGKILL)
                    time.sleep(_POLL_SECONDS)
            running.status.write(running.job.folder)
        self._running = []

    def _describe(self) -> str:
        return "; ".join(
            f"{one.job.name} {read_progress(one.job.folder / LOG_FILE)}".rstrip()
            for one in self._running
        )


def _signal(running: _Running, number: int) -> None:
    # The whole session: what the command has started ends too.
    assert running.process is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, number)


def _explain(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with status {returncode}"
    return f"was killed by {signal.Signals(-returncode).name}"


# ---------------------------------------------------------------------------------------------
# Logs, signals, the lock


def read_tail(path: pathlib.Path, lines: int) -> str:
    """The last lines of a log, progress bars reduced to what they showed last."""
    text = path.read_bytes()[-20_000:].decode("utf-8", "replace") if path.exists() else ""
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join([line for line in shown if line.strip()][-lines:])


def read_progress(path: pathlib.Path) -> str:
    """What the last progress bar of a log says, as `sft 45%`; '' where there is none."""
    bars = re.findall(r"^(\w+): +(\d+%)\|", read_tail(path, 3), re.MULTILINE)
    return " ".join(bars[-1]) if bars else ""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that a scheduler inside ends its commands either way."""

    def interrupt(*unused: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def lock(folder: pathlib.Path, patience: float = 10.0) -> Iterator[int]:
    """Holds a folder for this process; yields the file descriptor that holds it.

    Commands that inherit the descriptor hold the folder too, so that what a killed scheduler has
    left behind keeps the next one out, until it ends.

    Raises ConfigError where another process still holds it after `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        deadline = time.monotonic() + patience
        while not _try_lock(file.fileno()):
            check(
                time.monotonic() < deadline,
                f"--workdir={folder} is in use: another sweep, or a run that one has left behind, "
                "is still at work there; wait for it or end it, or choose another --workdir",
            )
            time.sleep(_POLL_SECONDS)
        yield file.fileno()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
