"""The README's commands name scripts and flags that exist."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def read_commands() -> list[list[str]]:
    """Returns the script and the flags of every indented command that runs a script."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    \.venv/bin/python (experiments/.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_there_are_commands():
    scripts = {command[0] for command in read_commands()}
    assert {"experiments/train.py", "experiments/evaluate.py"} <= scripts


@pytest.mark.parametrize("command", read_commands(), ids=lambda command: " ".join(command)[12:60])
def test_flags_of_a_command_are_accepted(command):
    # absl parses and validates the flags, then leaves before `main`.
    arguments = [sys.executable, *command, "--only_check_args"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_knows_the_first_two_commands(target):
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
