"""Runs of several processes on loopback: started together, watched, and never left behind."""

import contextlib
import itertools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import filelock
import pytest

from tests.conftest import LEAST_EFFORT, ROOT
from tests.helpers import runs

DEVICES = 4  # of a run, in all its processes
HEARTBEAT = 10  # seconds of silence after which a process counts as lost
PATIENCE = 600  # for anything; a loaded machine with an empty compilation cache is slow

_CHILD = str(ROOT / "tests" / "helpers" / "child.py")
_TRAIN = str(ROOT / "experiments" / "train.py")
_SUPERVISE = str(ROOT / "experiments" / "supervise.py")
_starts = itertools.count()  # names the logs: a run that is started again keeps those of before


class Group:
    """Processes that were started together; `logs[i]` is where the i-th prints."""

    def __init__(self, commands: Sequence[Sequence[str]], folder: pathlib.Path, name: str):
        environment = runs.make_environment() | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            # By default half a minute, and the others may still be compiling.
            "XLA_FLAGS": f"{LEAST_EFFORT} --xla_cpu_collective_timeout_seconds={PATIENCE}",
        }
        self.logs = [folder / f"{name}_{i}.log" for i in range(len(commands))]
        self._popen = []
        for command, log in zip(commands, self.logs, strict=True):
            with log.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, *command],
                    env=environment,
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._popen.append(process)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *unused_error: object) -> None:
        for process in self._popen:
            if process.poll() is not None:
                continue  # it was waited for: its number may be another's by now
            for pid in (find_child(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.killpg(pid, signal.SIGKILL)
            process.wait()

    def pid(self, index: int) -> int:
        return self._popen[index].pid

    def signal(self, index: int, number: int) -> None:
        self._popen[index].send_signal(number)

    def printed(self) -> str:
        """What all of them have printed."""
        return "".join(log.read_text() for log in self.logs)

    def output(self) -> str:
        """The same for a reader, the ends only."""
        return "\n".join(f"---- {log.name}\n{log.read_text()[-6000:]}" for log in self.logs)

    def alive(self) -> list[bool]:
        return [process.poll() is None for process in self._popen]

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        """Returns as soon as `reached()`; fails where all ended before, or it takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert any(self.alive()), f"all ended before {what}\n{self.output()}"
            assert time.monotonic() < deadline, f"{PATIENCE} s before {what}\n{self.output()}"
            time.sleep(0.002)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The statuses of all; fails, and shows what they printed, where one does not end."""
        deadline = time.monotonic() + seconds
        while any(self.alive()):
            assert time.monotonic() < deadline, f"still there after {seconds} s\n{self.output()}"
            time.sleep(0.02)
        return [process.returncode for process in self._popen]

    def finish(self) -> str:
        """Waits for all to end with status 0; returns what they printed."""
        statuses = self.wait()
        assert statuses == [0] * len(statuses), f"{statuses}\n{self.output()}"
        return self.printed()


def find_child(pid: int) -> int | None:
    """The process that a process has started; Linux only."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None
    return None


def train_commands(
    count: int, arguments: Sequence[str], each: Callable[[int], Sequence[str]] = lambda index: ()
) -> list[list[str]]:
    """The commands of a run of `count` processes; `each(i)` is added to that of process i."""
    if count == 1:
        return [[_CHILD, _TRAIN, *arguments, *each(0)]]
    together = [
        f"--coordinator_address=localhost:{find_port()}",
        f"--num_processes={count}",
        f"--heartbeat_timeout_seconds={HEARTBEAT}",
    ]
    return [
        [_CHILD, _TRAIN, *arguments, *together, f"--process_id={i}", *each(i)] for i in range(count)
    ]


def start_training(
    workdir: pathlib.Path,
    data_root: pathlib.Path,
    count: int = 1,
    *,
    supervisor: Sequence[str] = (),
    each: Callable[[int], Sequence[str]] = lambda index: (),
    **settings: Any,
) -> Group:
    """Starts `count` processes that train the tiny config in a workdir.

    They have `DEVICES` together, however many they are, unless `settings` say otherwise: so they
    share compiled programs. With options of a `supervisor` each is started by one.
    """
    settings = {"mesh__data": DEVICES, "mesh__cpu_devices": DEVICES // count} | settings
    arguments = [f"--workdir={workdir}", f"--data_root={data_root}", *runs.make_flags(**settings)]
    commands = train_commands(count, arguments, each)
    if supervisor:
        commands = supervised(commands, *supervisor)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    return Group(commands, workdir.parent, f"{workdir.name}_log{next(_starts)}")


class Shared(NamedTuple):
    """A run of which all test files of a session have the same copy. Nobody may change it."""

    workdir: pathlib.Path
    data_root: pathlib.Path
    printed: str


def share_run(
    factory: pytest.TempPathFactory,
    name: str,
    count: int = 1,
    until: Callable[[pathlib.Path], Callable[[], bool]] | None = None,
    **settings: Any,
) -> Shared:
    """A run that nothing disturbs: the first test to ask for it by this name makes it.

    With `until` it is ended without more ado once that moment of its workdir is reached. A name
    stands for one run: who asks for it with other settings is told so.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers have it in common
    workdir, data_root = root / "shared" / name, root / "shared" / "data"
    workdir.parent.mkdir(exist_ok=True)
    printed, asked = (workdir.with_name(f"{name}.{what}") for what in ("txt", "settings"))
    with filelock.FileLock(workdir.with_name(f"{name}.lock")):
        if not printed.exists():
            shutil.rmtree(workdir, ignore_errors=True)  # of one that failed
            with start_training(workdir, data_root, count, **settings) as group:
                if until is None:
                    group.finish()
                else:
                    group.wait_until(until(workdir), "the last step that is compared")
                text = group.printed()
            asked.write_text(repr(settings))
            printed.write_text(text)
    assert asked.read_text() == repr(settings), f"the shared run {name} has other settings"
    return Shared(workdir, data_root, printed.read_text())


def supervised(commands: Sequence[Sequence[str]], *options: str) -> list[list[str]]:
    """The same commands, each under a supervisor of its own."""
    return [[_SUPERVISE, *options, "--", sys.executable, *command] for command in commands]


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yields a clock of the seconds since the block was entered."""
    started = time.monotonic()
    yield lambda: time.monotonic() - started


def send(pid: int | None, number: int) -> None:
    """Sends a signal to a process that `find_child` has found."""
    assert pid is not None
    os.kill(pid, number)
