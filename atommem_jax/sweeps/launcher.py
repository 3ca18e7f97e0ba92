"""Starts a command on some of the cores, such that it cannot outlive the process that asked.

    python launcher.py PARENT_PID 0,1 COMMAND [ARGUMENT ...]

An empty list of cores ("") leaves the command on all of them. The command replaces the launcher,
so that process id and exit status are its own. Only the standard library is needed, and a start
costs no more than that of an interpreter.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def wrap(command: Sequence[str], cores: Sequence[int] = ()) -> list[str]:
    """The same command as one that ends with this process; for `subprocess.Popen`."""
    launcher = [sys.executable, "-I", "-S", os.path.abspath(__file__)]
    return [*launcher, str(os.getpid()), ",".join(map(str, cores)), *command]


def main(parent: int, cores: str, command: list[str]) -> None:
    """See the module docstring; does not return."""
    _end_with(parent)
    if cores:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    os.execvp(command[0], command)


def _end_with(parent: int) -> None:
    """Has the kernel kill this process when `parent` ends, however that ends. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this could be asked for
        sys.exit(f"launcher.py: the parent {parent} has ended")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
