"""Places trials on TPU VMs, one after the other on each, and keeps on disk where each stands.

A trial is a name and commands that run in order. Every VM takes the next trial when it is free.
What is known stands in one file, so that a launcher that was ended in any way and is started again
finds the trials at work on their VMs, and goes on. Nothing here knows of training or of gcloud: a
`Driver` does what has to be done on a VM.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from atommem_jax.config import check

QUEUED, PLACED, DONE, FAILED = "queued", "placed", "done", "failed"
FILE_NAME = "placements.json"
_LONGEST_RUN = 40


@dataclasses.dataclass(frozen=True)
class Trial:
    """Commands that run in order on one VM; one that fails ends the trial."""

    name: str
    commands: Mapping[str, Sequence[str]]  # by a key under which each is remembered as finished
    after: str = ""  # the trial whose checkpoint it starts from


@dataclasses.dataclass
class Placement:
    """Where a trial stands."""

    state: str = QUEUED  # or PLACED, DONE, FAILED
    vm: str = ""  # where it is, or was last
    at_work: str = ""  # key of the command that was started there
    finished: list[str] = dataclasses.field(default_factory=list)  # keys of commands
    failed: str = ""  # what failed, and how
    placed: int = 0  # how often it was given to a VM
    requeued: int = 0  # how often it lost one
    commands: dict[str, list[str]] = dataclasses.field(default_factory=dict)


class Driver(Protocol):
    """What is done on a VM."""

    def launch(self, vm: str, run: str, command: Sequence[str]) -> bool:
        """Starts a command; whether it was started on all workers."""

    def look(self, vm: str, run: str) -> str:
        """The state of a run, in the words of status.sh."""

    def stop(self, vm: str, run: str) -> bool:
        """Ends a run; whether it has ended on all workers."""

    def create(self, vm: str) -> bool:
        """Makes the VM anew, code included; whether that went well."""


class Board:
    """The placements of a sweep's trials, each change of which is on disk before it is acted on."""

    def __init__(self, folder: pathlib.Path, trials: Sequence[Trial]):
        """Reads what an earlier launcher has left.

        Raises ConfigError where a trial that was started has other commands now.
        """
        self._path = folder / FILE_NAME
        self.trials = {trial.name: trial for trial in trials}
        self.placements = {name: Placement() for name in self.trials}
        if self._path.exists():
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            # Trials that --only leaves out keep their line.
            self.placements |= {name: Placement(**value) for name, value in saved.items()}
        for name, trial in self.trials.items():
            commands = {key: list(command) for key, command in trial.commands.items()}
            placement = self.placements[name]
            started = {
                key: placement.commands.get(key)
                for key in {*placement.finished, placement.at_work} - {""}
            }
            for key, command in started.items():
                check(
                    command == commands.get(key, command),
                    f"trial {name!r} was started with another command: {command}, and now "
                    f"{commands.get(key)}. Choose another --workdir, or undo the change",
                )
            placement.commands = commands

    def save(self) -> None:
        """Replaces the file in one go."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(".tmp")
        content = {name: dataclasses.asdict(value) for name, value in self.placements.items()}
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        aside.replace(self._path)

    def retry_failed(self) -> None:
        """Puts what has failed back into the queue; commands that were finished stay so."""
        for name in self.trials:
            if self.placements[name].state == FAILED:
                self.placements[name].state, self.placements[name].failed = QUEUED, ""
        self.save()

    def names(self, state: str) -> list[str]:
        """The trials of this sweep that are in a state."""
        return [name for name in self.trials if self.placements[name].state == state]


def name_run(sweep: str, trial: str, key: str) -> str:
    """What the run of a command is called on a VM: readable, valid there, and told from others."""
    digest = hashlib.sha256(f"{sweep}\n{trial}\n{key}".encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", f"{trial}-{key.split()[0]}".lower()).strip("-")
    return f"t-{readable[:_LONGEST_RUN].strip('-')}-{digest}"


class Launcher:
    """One thread a VM: each takes a trial, starts its commands and looks after them."""

    def __init__(
        self,
        sweep: str,
        board: Board,
        driver: Driver,
        vms: Sequence[str],
        *,
        poll_seconds: float,
        recreate: bool,
        report: Callable[[str], None] = print,
    ):
        """Prepares to place the trials of the board.

        Args:
          sweep: its name, which keeps its runs apart from those of others.
          board: the trials.
          driver: acts on the VMs.
          vms: to place trials on.
          poll_seconds: between two looks at a VM.
          recreate: whether a VM that is gone is made anew; otherwise the others do its work.
          report: takes a line for the user.
        """
        self._sweep, self._board, self._driver, self._vms = sweep, board, driver, list(vms)
        self._poll_seconds, self._recreate, self._report = poll_seconds, recreate, report
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._errors: list[BaseException] = []

    def run(self) -> None:
        """Returns when no trial is left that could be placed; an interrupt leaves runs at work."""
        # A trial may be at work on a VM that is not listed any more: it is looked after there,
        # since placing it elsewhere would have two runs write the same checkpoints.
        placed = {self._board.placements[name].vm for name in self._board.names(PLACED)}
        threads = [
            threading.Thread(target=self._work, args=(vm,), daemon=True)
            for vm in dict.fromkeys([*self._vms, *sorted(placed)])
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # `join` alone would keep Ctrl-C out
                    thread.join(0.2)
        finally:
            self._ended.set()
        if self._errors:
            raise self._errors[0]

    # -----------------------------------------------------------------------------------------
    # One VM

    def _work(self, vm: str) -> None:
        try:
            while not self._ended.is_set():
                trial = self._take(vm)
                if trial is not None:
                    if not self._attend(vm, trial):
                        return
                elif self._nothing_comes(vm):
                    return
                else:
                    self._ended.wait(self._poll_seconds)
        except BaseException as error:
            self._errors.append(error)
            self._ended.set()

    def _take(self, vm: str) -> Trial | None:
        """The trial that is on this VM already, or the next that may start."""
        with self._lock:
            for name in self._board.names(PLACED):
                if self._board.placements[name].vm == vm:
                    return self._board.trials[name]
            if vm not in self._vms:
                return None
            for name in self._board.names(QUEUED):
                trial, placement = self._board.trials[name], self._board.placements[name]
                # One that --only leaves out is not waited for.
                listed = trial.after in self._board.trials
                start = self._board.placements[trial.after] if listed else None
                if start is not None and start.state == FAILED:
                    self._fail(trial, f"{trial.after}, whose checkpoint it starts from, has failed")
                elif start is None or start.state == DONE:
                    placement.state, placement.vm, placement.at_work = PLACED, vm, ""
                    placement.placed += 1
                    self._board.save()
                    self._report(f"placed  {name} on {vm}")
                    return trial
        return None

    def _nothing_comes(self, vm: str) -> bool:
        """Whether no trial can come to this VM: a preempted one comes back to the queue."""
        with self._lock:
            if vm not in self._vms:
                return True
            return not self._board.names(QUEUED) and not self._board.names(PLACED)

    def _attend(self, vm: str, trial: Trial) -> bool:
        """Runs what is left of a trial; whether the VM can take another."""
        placement = self._board.placements[trial.name]
        while left := [key for key in trial.commands if key not in placement.finished]:
            key = left[0]
            run = name_run(self._sweep, trial.name, key)
            state = self._driver.look(vm, run)
            if placement.at_work != key and state in ("done", "failed", "stopped", "lost"):
                state = "none"  # of an earlier attempt
            if self._ended.is_set():
                return False
            if state == "done":
                self._change(placement, at_work="", finished=[*placement.finished, key])
            elif state in ("failed", "stopped"):
                self._driver.stop(vm, run)  # on the workers where it goes on
                self._fail(trial, f"{key.split()[0]}: {state} on {vm}, log in logs/{run}")
                return True
            elif state == "gone":
                self._requeue(trial, vm)
                return self._replace(vm)
            elif state in ("none", "lost"):
                # The mark comes first: a launcher that ends here must look before it starts again.
                self._change(placement, at_work=key)
                if state == "lost":
                    self._driver.stop(vm, run)
                if not self._driver.launch(vm, run, trial.commands[key]):
                    return self._on_failed_launch(trial, vm, run)
                self._ended.wait(self._poll_seconds)
            else:  # running; or waiting or unreachable, which may pass
                if state == "running":
                    self._change(placement, at_work=key)
                else:
                    self._report(f"{vm} is {state}; {trial.name} waits there")
                self._ended.wait(self._poll_seconds)
        self._change(placement, state=DONE)
        self._report(f"done    {trial.name} on {vm}")
        return True

    def _on_failed_launch(self, trial: Trial, vm: str, run: str) -> bool:
        """After a launch that failed: what may be at work is ended before the trial moves on."""
        if self._driver.look(vm, run) == "gone":
            self._requeue(trial, vm)
            return self._replace(vm)
        if not self._driver.stop(vm, run):
            # It may be at work on some worker, so it stays here until the VM answers or is gone.
            self._report(f"{vm} does not answer; {trial.name} waits there")
            self._ended.wait(self._poll_seconds)
            return True
        self._requeue(trial, vm)
        self._report(f"{vm} takes no more trials: nothing can be launched there")
        return False

    def _replace(self, vm: str) -> bool:
        if not self._recreate or vm not in self._vms:
            self._report(f"{vm} is gone; the other VMs do its work")
            return False
        self._report(f"{vm} is gone, and is made anew")
        if self._driver.create(vm):
            return True
        self._report(f"{vm} could not be made anew; the other VMs do its work")
        return False

    def _requeue(self, trial: Trial, vm: str) -> None:
        placement = self._board.placements[trial.name]
        self._change(placement, state=QUEUED, at_work="", requeued=placement.requeued + 1)
        self._report(f"queued  {trial.name} again: {vm} has lost it")

    def _fail(self, trial: Trial, reason: str) -> None:
        self._change(self._board.placements[trial.name], state=FAILED, at_work="", failed=reason)
        self._report(f"FAILED  {trial.name}: {reason}")

    def _change(self, placement: Placement, **fields: Any) -> None:
        with self._lock:
            for name, value in fields.items():
                setattr(placement, name, value)
            self._board.save()
