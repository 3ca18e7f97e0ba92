"""The commands of the README and of docs/ name scripts, configs and flags that exist."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from atommem_jax.tasks.workflows import WORKFLOWS
from tests.architecture_test import ORDER
from tests.conftest import ROOT
from tests.helpers import forks

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_commands(document: pathlib.Path) -> list[list[str]]:
    """Returns the script and the flags of every command in a document that runs a script.

    An indented line is a command to be typed as it stands; what `$` introduces is a transcript,
    which may leave flags out.
    """
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(
        r"^    \.venv/bin/python ((?:experiments|tpu_setup)/.*)$", text, re.MULTILINE
    )
    return [shlex.split(line) for line in lines]


def list_commands() -> list:
    """The commands of all documents as parameters: each once, those beyond the README long."""
    entrance = {tuple(command) for command in read_commands(ROOT / "README.md")}
    commands = {tuple(command) for document in DOCUMENTS for command in read_commands(document)}
    return [
        pytest.param(
            list(command),
            id=" ".join(command)[:60].replace("/", " "),
            marks=[] if command in entrance else pytest.mark.long,
        )
        for command in sorted(commands)
    ]


def test_there_are_commands():
    scripts = {command[0] for command in read_commands(ROOT / "README.md")}
    named = {path.name for path in (ROOT / "experiments").glob("*.py")} - {"flags.py", "demo.py"}
    assert scripts == {f"experiments/{name}" for name in named}, "the README shows every script"


@pytest.mark.parametrize("command", list_commands())
def test_flags_of_a_command_are_accepted(command):
    # absl parses and validates the flags, then leaves before `main`.
    # A command that supervise.py is to start leaves in the same way.
    words = [sys.executable if word == ".venv/bin/python" else word for word in command]
    done = forks.run(ROOT / words[0], *words[1:], "--only_check_args")
    assert done.status == 0, done.stderr


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda d: d.name)
def test_links_and_paths_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)]
    missing = [link for link in links if link and not (document.parent / link).exists()]
    named = re.findall(r"`((?:atommem_jax|experiments|tests|docs|tpu_setup)/[\w/.-]+)`", text)
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_contributing_lists_the_floors_as_they_are():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:`(\w+)/`|\(the package itself\)) \| ([^|]*) \|", text, re.MULTILINE)
    listed = [(folder, " ".join(re.findall(r"\w+", files))) for folder, files in rows]
    # A file of the package itself stands in ORDER as a folder of no files.
    assert listed == [
        (folder, files) if folder and files else ("", folder or files)
        for folder, files in ORDER.items()
    ]


def test_reproduce_tells_of_each_workflow_that_it_plays():
    text = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    played = set(re.findall(r"--workflow=(\w+)", text)) - {"NAME"}
    [table] = re.findall(r"^\| row \| who decides .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(rows) == sorted(played)
    assert played <= set(WORKFLOWS)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_knows_the_first_two_commands(target):
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
