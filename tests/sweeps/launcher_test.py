"""The launcher: the command takes its place, on the cores that it was given."""

import os
import subprocess
import sys

import pytest

from atommem_jax.sweeps import launcher


def run(*arguments: str, cores=()) -> subprocess.CompletedProcess[str]:
    command = launcher.wrap([sys.executable, *arguments], cores)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_arguments_and_status_are_those_of_the_command():
    done = run("-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "two words", "--x='y'")
    assert (done.returncode, done.stdout) == (7, """['two words', "--x='y'"]\n""")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot confine processes here")
def test_the_command_is_kept_on_its_cores():
    show = "import os; print(sorted(os.sched_getaffinity(0)))"
    core = max(os.sched_getaffinity(0))
    assert run("-c", show, cores=[core]).stdout == f"[{core}]\n"
    assert run("-c", show).stdout == f"{sorted(os.sched_getaffinity(0))}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="orphans go on here")
def test_nothing_starts_for_a_parent_that_has_ended():
    command = launcher.wrap([sys.executable, "-c", "print('started')"])
    command[command.index(str(os.getpid()))] = str(os.getppid())  # not the parent of the launcher
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "has ended" in done.stderr
