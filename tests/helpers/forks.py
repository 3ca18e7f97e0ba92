"""Scripts from the outside, where they only print: each is a fork of one process.

Most of the seconds of `script.py --help` go into imports. Here one process makes them once, and
forks for every call; flags, arguments, output and status are a fork's own, and no fork knows what
another has done. What computes is started as a user starts it, by `runs.run`: JAX's threads do not
come along into a fork.
"""

import functools
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]


_PATIENCE = 240  # seconds


class Done(NamedTuple):
    """What a script left behind."""

    status: int
    stdout: str
    stderr: str


def run(
    script: str | os.PathLike[str],
    *arguments: str | os.PathLike[str],
    cwd: str | os.PathLike[str] = ROOT,
) -> Done:
    """Runs a script, of experiments/ where its path is relative, to its end."""
    path = ROOT / "experiments" / script
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder, name) for name in ("stdout", "stderr")]
        request = [str(path), [str(argument) for argument in arguments], str(cwd)]
        server = _start_server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([*request, *map(str, files)]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return Done(status, *(file.read_text(encoding="utf-8") for file in files))


def refuse(script: str, *arguments: str | os.PathLike[str]) -> str:
    """Runs a script that must end with status 2, a mistake of the user; returns what it printed."""
    done = run(script, *arguments)
    printed = done.stdout + done.stderr
    assert done.status == 2, printed[-3000:]
    assert "Traceback" not in printed
    return printed


@functools.cache
def _start_server() -> subprocess.Popen[str]:
    """The process that forks; it ends when the standard input ends, and so with the tests."""
    from tests.helpers import runs

    return subprocess.Popen(
        [sys.executable, __file__],
        env=runs.make_environment() | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _serve(requests: Iterator[str]) -> tuple[str, list[str], str, str, str]:
    """Returns once for each request, in a fork of its own."""
    for line in requests:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads, of which JAX has none before it computes
            pid = os.fork()
        if pid == 0:
            return json.loads(line)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def _main() -> None:
    import atommem_jax.agent.load
    import atommem_jax.runs.resume  # noqa: F401

    script, arguments, cwd, *files = _serve(iter(sys.stdin.readline, ""))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    signal.alarm(_PATIENCE)  # which ends it, so that no test waits for ever
    sys.argv = [script, *arguments]
    sys.path[0] = str(pathlib.Path(script).parent)
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):  # as the interpreter does
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking all that was imported apart is half a second


if __name__ == "__main__":
    _main()
