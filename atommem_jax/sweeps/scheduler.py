"""Decides which jobs of a sweep run when, and keeps on disk what became of each.

A job is a name, a folder and commands to run one after the other. All that is known about it stands
in `<folder>/status.json`; so a scheduler that was killed and started again does what is left to do.
How a command is run is the business of a `Driver`: `local_processes` starts processes on this
machine, `tpu_vms` starts runs on others. What is due, the order, failures, retries, the lock and
the lines that a user sees are the same for all of them. Nothing here knows of training.
"""

import contextlib
import dataclasses
import json
import pathlib
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import tqdm

from atommem_jax import folder_lock, text_files
from atommem_jax.config import paths

STATUS_FILE, LOG_FILE = "status.json", "log.txt"
STARTED, DONE, FAILED = "started", "done", "failed"  # states of a job; PENDING has no file
PENDING = "pending"
PLACED, LOST = "placed", "lost"  # what else can happen to it

_POLL_SECONDS = 0.1
_SHOW_SECONDS = 10.0  # between two looks at what is running


# ---------------------------------------------------------------------------------------------
# Jobs, and what is known of them


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
    # Files of earlier versions lack the following.
    slot: str = ""  # where it is, or was last, if commands there outlive the scheduler
    at_work: str = ""  # key of the command that was started there, until it is known to have ended
    requeued: int = 0  # how often it lost its slot

    def write(self, folder: pathlib.Path) -> None:
        """Replaces the file in one go."""
        folder.mkdir(parents=True, exist_ok=True)
        paths.write_text(
            folder / STATUS_FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        )


def read_status(folder: pathlib.Path) -> Status | None:
    """The status in a job's folder; None where it never started.

    None too, with a warning, where the file is torn or of another kind: the job then starts, and
    goes on from its checkpoint.
    """
    path = folder / STATUS_FILE
    if not path.exists():
        return None
    fields = text_files.read_json(path, "status of a job", _is_status)
    return Status(**fields) if fields is not None else None


def _is_status(value: Any) -> bool:
    """Whether it has fields of a `Status` alone, each of the kind of its default."""
    if not isinstance(value, dict):
        return False
    whole = dataclasses.asdict(Status())
    return value.get("state", STARTED) in (STARTED, DONE, FAILED) and all(
        name in whole
        and isinstance(field, (int, float) if name.endswith("seconds") else type(whole[name]))
        for name, field in value.items()
    )


def is_due(job: Job, status: Status | None, retry_failed: bool) -> bool:
    """Whether the job has commands left to run."""
    if status is None:
        return True
    if status.state == FAILED and not retry_failed:
        return False
    return status.state != DONE or any(key not in status.finished for key in job.commands)


def find_due(jobs: Sequence[Job], retry_failed: bool) -> list[Job]:
    """Those that have commands left to run, as their folders stand now."""
    return [job for job in jobs if is_due(job, read_status(job.folder), retry_failed)]


# ---------------------------------------------------------------------------------------------
# What runs commands


@dataclasses.dataclass(frozen=True)
class Task:
    """One command of a job, as a driver is given it."""

    job: Job
    key: str
    attempt: int  # of the job, from 1
    found: bool  # an earlier scheduler has started it in this slot already
    # Notes on disk that the command is started; a driver whose commands last calls it just before.
    mark: Callable[[], None]

    @property
    def command(self) -> list[str]:
        """Program and arguments."""
        return list(self.job.commands[self.key])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    result: str  # DONE, FAILED, or LOST with its slot: then the job goes back to the queue
    how: str = ""  # for the user, where it failed
    cpu_seconds: float = 0.0


Handle = TypeVar("Handle")


class Driver(Protocol[Handle]):
    """Runs commands in slots, one at a time in each."""

    lasting: bool  # whether commands outlive the scheduler, to be found by the next one

    def slots(self) -> Mapping[str, bool]:
        """The slots that jobs may be given to: at once (True), or after a while (False)."""

    def start(self, task: Task, slot: str) -> Handle:
        """Starts a command; one that an earlier scheduler has left there is looked after instead.

        `slot` may be one of an earlier scheduler, where such a command still is.
        """

    def poll(self, handle: Handle) -> Outcome | None:
        """How it ended; None while it has not, as far as is known. Returns without delay."""

    def stop(self, handles: Sequence[Handle]) -> None:
        """Takes leave of commands, since the scheduler ends: they end too, unless `lasting`."""

    def describe(self, handle: Handle) -> str:
        """How the command gets on, in a few words or none."""


# ---------------------------------------------------------------------------------------------
# The scheduler


@dataclasses.dataclass
class _Running(Generic[Handle]):
    """A job in a slot, one command after the other; without a handle it is at an end there."""

    job: Job
    slot: str
    status: Status
    handle: Handle | None = None
    key: str = ""
    started: float = 0.0


def _ignore(change: str, job: Job, status: Status) -> None:
    pass


class Scheduler(Generic[Handle]):
    """Keeps every slot of a driver busy until no job is left."""

    def __init__(self, driver: Driver[Handle], *, commit: Callable[[], str] = lambda: ""):
        """Prepares to run jobs.

        Args:
          driver: runs their commands.
          commit: names the code that a job starts with.
        """
        self._driver, self._commit = driver, commit
        self._running: list[_Running[Handle]] = []
        self._waiting: list[Job] = []
        self._found: dict[str, str] = {}  # slots of jobs that an earlier scheduler has left at work
        self._failed: set[str] = set()
        self._writing = threading.Lock()  # a driver may mark a task in a thread of its own

    def run(
        self,
        jobs: Sequence[Job],
        *,
        retry_failed: bool = False,
        on_change: Callable[[str, Job, Status], None] = _ignore,
    ) -> list[Job]:
        """Runs those that are due, in order as far as none waits for another.

        `on_change` is told what happens to a job: PLACED, DONE, FAILED, or LOST, after which it is
        in the queue again. Whatever interrupts it, Ctrl-C or an exception, makes the driver take
        leave of its commands first.

        Returns the jobs that were not run to their end, because there was no slot any more.
        """
        statuses = {job.name: read_status(job.folder) for job in jobs}
        self._waiting = find_due(jobs, retry_failed)
        order = {job.name: place for place, job in enumerate(jobs)}
        due = set(self._names())
        self._failed = {n for n, s in statuses.items() if s and s.state == FAILED} - due
        self._found = {
            name: status.slot
            for name, status in statuses.items()
            if self._driver.lasting and name in due and status and _is_at_work(status)
        }
        with tqdm.tqdm(total=len(due), desc="runs", mininterval=_SHOW_SECONDS) as bar:
            try:
                shown = 0.0
                while self._running or self._found or (self._waiting and self._driver.slots()):
                    for running in self._fill():
                        on_change(PLACED, running.job, running.status)
                    ended = self._poll()
                    for running in ended:
                        change = running.status.state if running.status.state != STARTED else LOST
                        if change == LOST:
                            self._waiting.append(running.job)
                            self._waiting.sort(key=lambda job: order[job.name])
                        else:
                            bar.update()
                        on_change(change, running.job, running.status)
                    if ended or time.monotonic() - shown > _SHOW_SECONDS:
                        shown = time.monotonic()
                        bar.set_postfix_str(self._describe())
                    time.sleep(0 if ended else _POLL_SECONDS)
            finally:
                self._stop()
        return self._waiting

    def _names(self) -> list[str]:
        return [job.name for job in self._waiting]

    def _fill(self) -> list[_Running[Handle]]:
        """Gives jobs to slots that have none; returns those that began an attempt there."""
        begun = []
        for job in [job for job in self._waiting if job.name in self._found]:
            if self._found[job.name] not in self._busy():
                self._start(job, self._found.pop(job.name), found=True)
        for slot, ready in self._driver.slots().items():
            if not ready or slot in self._busy() or slot in self._found.values():
                continue
            next_job = self._find_ready()
            if next_job is None:
                break
            begun.append(self._start(next_job, slot, found=False))
        return begun

    def _busy(self) -> set[str]:
        return {running.slot for running in self._running}

    def _find_ready(self) -> Job | None:
        """The first that waits for none of those not yet at an end."""
        open_ = {*self._names(), *(running.job.name for running in self._running)}
        ready = (job for job in self._waiting if not open_.intersection(job.after))
        return next((job for job in ready if job.name not in self._found), None)

    def _start(self, job: Job, slot: str, *, found: bool) -> _Running[Handle]:
        self._waiting.remove(job)
        status = read_status(job.folder) or Status()
        if not found:
            status.attempts += 1
            status.commit = self._commit()
            status.at_work = ""
        status.state, status.failed, status.about = STARTED, "", dict(job.about)
        status.slot = slot if self._driver.lasting else ""
        running: _Running[Handle] = _Running(job, slot, status)
        self._write(running)
        self._running.append(running)
        self._advance(running)
        return running

    def _advance(self, running: _Running[Handle]) -> None:
        """Starts the job's next command; without one the job is done."""
        job, status = running.job, running.status
        running.handle = None
        left = [key for key in job.commands if key not in status.finished]
        if not left:
            status.state = DONE
            self._write(running)
            return
        running.key, running.started = left[0], time.monotonic()

        def mark() -> None:
            status.at_work = left[0]
            self._write(running)

        found = status.at_work == left[0]
        task = Task(job, left[0], status.attempts, found, mark)
        running.handle = self._driver.start(task, running.slot)

    def _poll(self) -> list[_Running[Handle]]:
        """Looks after the commands that have ended; returns the jobs that are out of their slot."""
        for running in self._running:
            if running.handle is not None:
                outcome = self._driver.poll(running.handle)
                if outcome is not None:
                    self._judge(running, outcome)
        ended = [running for running in self._running if running.handle is None]
        self._running = [running for running in self._running if running.handle is not None]
        return ended

    def _judge(self, running: _Running[Handle], outcome: Outcome) -> None:
        """After a command comes the next, or the job has failed, or lost its slot."""
        status = running.status
        self._book(running, outcome)
        status.at_work = ""
        if outcome.result == DONE:
            status.finished.append(running.key)
            self._write(running)
            self._advance(running)
            return
        running.handle = None
        if outcome.result == LOST:
            status.requeued += 1
        else:
            status.state = FAILED
            status.failed = f"{running.key}: {outcome.how}"
            for other in sorted(self._failed.intersection(running.job.after)):
                status.failed += f"; {other}, which it starts from, has failed"
            self._failed.add(running.job.name)
        self._write(running)

    def _book(self, running: _Running[Handle], outcome: Outcome | None) -> None:
        running.status.seconds += time.monotonic() - running.started
        running.status.cpu_seconds += outcome.cpu_seconds if outcome else 0.0

    def _stop(self) -> None:
        """Takes leave of what is running. The jobs stay `started`."""
        alive = [(one, one.handle) for one in self._running if one.handle is not None]
        self._driver.stop([handle for _, handle in alive])
        for running, handle in alive:
            self._book(running, self._driver.poll(handle))
            self._write(running)
        self._running = []

    def _write(self, running: _Running[Handle]) -> None:
        with self._writing:
            running.status.write(running.job.folder)

    def _describe(self) -> str:
        return "; ".join(
            f"{one.job.name} {self._driver.describe(one.handle)}".rstrip()
            for one in self._running
            if one.handle is not None
        )


def _is_at_work(status: Status) -> bool:
    return status.state == STARTED and bool(status.slot and status.at_work)


# ---------------------------------------------------------------------------------------------
# What a user sees


def tell(change: str, job: Job, status: Status) -> str:
    """A line on what has happened to a job."""
    where = f" on {status.slot}" if status.slot else ""
    return {
        PLACED: f"placed  {job.name}{where}",
        DONE: f"done    {job.name}{where}",
        FAILED: f"FAILED  {job.name}  {status.failed}",
        LOST: f"queued  {job.name} again: {status.slot} has lost it",
    }[change]


def describe_plan(
    jobs: Sequence[Job], statuses: Mapping[str, Status | None], retry_failed: bool
) -> str:
    """The state of every job, and the commands that it has left."""
    lines = []
    for job in jobs:
        status = statuses[job.name]
        due = is_due(job, status, retry_failed)
        where = f" on {status.slot}" if status and _is_at_work(status) else ""
        state = status.state if status else PENDING
        lines.append(f"{job.name}: {state}{where}{'' if due else ', nothing to do'}")
        for key, command in job.commands.items():
            if due and not (status and key in status.finished):
                lines.append(f"    {shlex.join(command)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Signals, the lock


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that a scheduler inside ends in order either way."""

    def interrupt(*unused: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def lock(folder: pathlib.Path, patience: float = 10.0) -> Iterator[int | None]:
    """Holds a folder for this process; yields the file descriptor that holds it, if local.

    Commands that inherit the descriptor hold the folder too, so that what a killed scheduler has
    left behind keeps the next one out, until it ends.

    Raises ConfigError, which names the holder, where another still holds it after `patience`
    seconds.
    """
    with folder_lock.hold(folder, f"--workdir={folder}", patience, inherited=True) as descriptor:
        yield descriptor
