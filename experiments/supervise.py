"""Restarts a command that dies: a run of train.py then goes on from its last checkpoint.

    python experiments/supervise.py --max_restarts=5 -- \\
        python experiments/train.py --config=experiments/configs/synthetic.py --workdir=runs/mine

On several hosts start it on each: when one process is lost the others end too, every supervisor
starts its own again, and they meet at the same address. A new checkpoint shows that the run gets
on, and gives all restarts back. Status 0, and status 2 (a mistake in flags, config or files, which
would only repeat itself) end the supervisor with the same status; SIGTERM and SIGINT are passed on,
and what they end is not started again. In a pod of Kubernetes pass --stopped_status=143: there a
status of 0 would say that the work is done, and nothing would start it again on another node.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from absl import flags as absl_flags

from atommem_jax.config import check, paths
from atommem_jax.sweeps import launcher
from experiments import flags

MAX_RESTARTS = absl_flags.DEFINE_integer(
    "max_restarts",
    5,
    "Restarts in a row that bring no new checkpoint, after which to give up.",
    lower_bound=0,
)
BACKOFF_SECONDS = absl_flags.DEFINE_float(
    "backoff_seconds",
    5.0,
    "Seconds before the first restart, doubled before each further one up to five minutes.",
    lower_bound=0.0,
)
STOPPED_STATUS = absl_flags.DEFINE_integer(
    "stopped_status",
    None,
    "Status to end with after SIGTERM or SIGINT, whatever that of the command. Default: the "
    "command's own, which is 0 where it has saved and stopped.",
    lower_bound=1,
    upper_bound=255,
)
CHECKPOINTS = flags.define_path(
    "checkpoints",
    None,
    "Folder whose numbered checkpoints show progress. Default: that of the command's --workdir.",
)

_LONGEST_WAIT = 300.0
_MISTAKE = 2


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    command = list(argv[1:])
    check(
        bool(command),
        "no command: write it after --, as in supervise.py --max_restarts=5 -- python "
        "experiments/train.py --workdir=runs/mine",
    )
    folder = CHECKPOINTS.value or find_checkpoints(command)
    if folder is None:
        _say(
            "the command has no --workdir, and --checkpoints is not given: no restart is given back"
        )
    supervisor = Supervisor(
        command,
        max_restarts=MAX_RESTARTS.value,
        backoff_seconds=BACKOFF_SECONDS.value,
        progress=lambda: latest_step(folder),
        stopped_status=STOPPED_STATUS.value,
    )
    sys.exit(supervisor.run())


class Supervisor:
    """Runs a command until it ends well, is told to end, or dies too often.

    Args:
      command: program and arguments.
      max_restarts: how often to restart while `progress` does not grow.
      backoff_seconds: wait before the first of these; doubled for each further one.
      progress: a number that grows as the command gets on.
      stopped_status: to return after a signal; None for the command's own.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        max_restarts: int,
        backoff_seconds: float,
        progress: Callable[[], int],
        stopped_status: int | None = None,
    ):
        self._command, self._progress = list(command), progress
        self._stopped_status = stopped_status
        self._max_restarts, self._backoff_seconds = max_restarts, backoff_seconds
        self._process: subprocess.Popen | None = None
        self._signal: int | None = None
        self._interrupted = threading.Event()

    def run(self) -> int:
        """Returns the status to end with: the command's last, or 128 + the signal that ended it."""
        before = {n: signal.signal(n, self._pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = self._run()
            if self._signal is not None and self._stopped_status is not None:
                return self._stopped_status
            return status
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        restarts, reached = 0, self._progress()
        while True:
            status = self._run_once()
            what = _explain(status)
            if status == 0 or self._signal is not None:
                if self._signal is not None:
                    _say(f"{what} after {signal.Signals(self._signal).name}; not restarted")
                return status if status >= 0 else 128 - status
            if status == _MISTAKE:
                _say(f"{what}: a mistake that a restart would repeat; see its message")
                return status
            step = self._progress()
            if step > reached:
                restarts, reached = 0, step
            if restarts == self._max_restarts:
                _say(
                    f"{what}; no more restarts, as {restarts} of them brought no checkpoint after "
                    f"step {reached}. Look for the first error above; --max_restarts allows more"
                )
                return status if status > 0 else 128 - status
            wait = min(self._backoff_seconds * 2**restarts, _LONGEST_WAIT)
            restarts += 1
            _say(
                f"{what}; restart {restarts} of {self._max_restarts} from step {reached} in "
                f"{wait:g} s"
            )
            if self._interrupted.wait(wait):
                assert self._signal is not None
                _say(f"{signal.Signals(self._signal).name}; not restarted")
                return 128 + self._signal

    def _run_once(self) -> int:
        """Status of one run; negative where a signal ended it."""
        # The launcher has the kernel end the command should this process be killed.
        command = launcher.wrap(self._command)
        self._process = subprocess.Popen(command, start_new_session=True)
        if self._signal is not None:  # it came while the process was being made
            self._process.send_signal(self._signal)
        return self._process.wait()

    def _pass_on(self, number: int, unused_frame: object) -> None:
        self._signal = number
        self._interrupted.set()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)


def find_checkpoints(command: Sequence[str]) -> str | None:
    """The checkpoints folder of the command's --workdir; None where it has none."""
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--workdir", "-workdir"):
            return os.path.join(paths.expand(value if equals else following), "checkpoints")
    return None


def latest_step(folder: str | None) -> int:
    """The highest number of a checkpoint in a folder; -1 where there is none."""
    if folder is None:
        return -1
    try:
        names = [path.name for path in paths.locate(folder).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return -1
    except Exception as error:  # a bucket out of reach is no reason to leave the command alone
        _say(f"{folder} cannot be listed, so no progress is seen: {paths.describe(error)}")
        return -1
    return max((int(name) for name in names if name.isdigit()), default=-1)


def _explain(status: int) -> str:
    if status >= 0:
        return f"the command ended with status {status}"
    return f"the command was killed by {signal.Signals(-status).name}"


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    flags.run(main)
