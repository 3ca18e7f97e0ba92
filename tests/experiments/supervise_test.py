"""The supervisor: restarts what dies, while it gets on, and nothing else. Its commands are tiny."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments import supervise
from tests.conftest import ROOT
from tpu_setup import jobset

SCRIPT = ROOT / "experiments" / "supervise.py"

# Counts its own starts, and does at each what the next argument says.
_COMMAND = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
starts = len(list(folder.glob("start*")))
(folder / f"start{starts}").touch()
what = sys.argv[2:][min(starts, len(sys.argv) - 3)]
if what.startswith("save"):
    (folder / "checkpoints" / what.removeprefix("save")).mkdir(parents=True)
    sys.exit(1)
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (folder / "ready").touch()
    time.sleep(60)
sys.exit(int(what))
"""


def make_command(folder: pathlib.Path, *whats: str) -> list[str]:
    return [sys.executable, "-c", _COMMAND, str(folder), *whats, f"--workdir={folder}"]


def run(folder: pathlib.Path, *whats: str, restarts: int = 2) -> tuple[int, int]:
    """(status, number of starts)."""
    command = [sys.executable, "-c", _COMMAND, str(folder), *whats]
    supervisor = supervise.Supervisor(
        command,
        max_restarts=restarts,
        backoff_seconds=0.0,
        progress=lambda: supervise.latest_step(str(folder / "checkpoints")),
    )
    return supervisor.run(), len(list(folder.glob("start*")))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("whats", "expected"),
    [
        (["0"], (0, 1)),
        (["1", "killed", "0"], (0, 3)),
        (["1"], (1, 3)),
        (["killed"], (128 + signal.SIGKILL, 3)),
        (["1", "2", "0"], (2, 2)),  # a mistake of the user
        # Four deaths, but the new checkpoint of the third gave both restarts back.
        (["1", "1", "save5", "1", "0"], (0, 5)),
        (["save5", "1", "1", "0"], (1, 3)),
    ],
)
def test_what_is_restarted_and_how_often(tmp_path, whats, expected):
    assert run(tmp_path, *whats) == expected


def test_an_older_checkpoint_is_no_progress(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    assert run(tmp_path, "save6", "1", "1", "0", restarts=1) == (1, 2)


def test_checkpoints_in_a_bucket_count_as_progress(tmp_path, monkeypatch):
    (tmp_path / "7").mkdir()
    (tmp_path / "12.partial").mkdir()
    monkeypatch.setattr(
        supervise.paths, "locate", {"gs://bucket/run/checkpoints": tmp_path}.__getitem__
    )
    assert supervise.latest_step("gs://bucket/run/checkpoints") == 7
    assert supervise.latest_step("gs://no/such") == -1, "no answer is no progress, and no error"


# Ends as a script does that meets such an error.
_SCRIPT = """
import pathlib, sys
from atommem_jax import config
from experiments import flags
starts = pathlib.Path(sys.argv.pop())
kinds = [config.StoreError, config.ConfigError]
def main(argv):
    starts.write_text(starts.read_text() + "x")
    raise kinds[len(starts.read_text()) - 1]("told")
flags.run(main)
"""


@pytest.mark.processes
def test_a_bucket_without_an_answer_is_tried_again_and_a_mistake_is_not(tmp_path):
    starts = tmp_path / "starts"
    starts.touch()
    supervisor = supervise.Supervisor(
        [sys.executable, "-c", _SCRIPT, str(starts)],
        max_restarts=5,
        backoff_seconds=0.0,
        progress=lambda: -1,
        stopped_status=jobset.STOPPED,
    )
    assert supervisor.run() == jobset.MISTAKE
    assert starts.read_text() == "xx"


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_ends_the_supervisor(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--max_restarts=3", "--", *make_command(tmp_path, "wait")],
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    wait_for((tmp_path / "ready").exists)
    process.send_signal(number)
    errors = process.communicate(timeout=20)[1].decode()
    # SIGTERM the command answers with 0; SIGINT is a KeyboardInterrupt in it.
    assert process.returncode == (0 if number == signal.SIGTERM else 130), errors
    assert f"after {number.name}; not restarted" in errors
    assert len(list(tmp_path.glob("start*"))) == 1


@pytest.mark.processes
@pytest.mark.parametrize(
    ("what", "status"), [("wait", jobset.STOPPED), ("0", 0), ("2", jobset.MISTAKE)]
)
def test_a_pod_that_was_stopped_does_not_count_as_done(tmp_path, what, status):
    command = make_command(tmp_path, what)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, f"--stopped_status={jobset.STOPPED}", "--", *command],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    if what == "wait":
        wait_for((tmp_path / "ready").exists)
        process.send_signal(signal.SIGTERM)  # which the command answers with 0
    assert process.wait(timeout=20) == status


@pytest.mark.processes
def test_a_signal_ends_the_wait_before_a_restart(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            SCRIPT,
            "--max_restarts=3",
            "--backoff_seconds=60",
            "--",
            *make_command(tmp_path, "3"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert "status 3; restart 1 of 3 from step -1 in 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM


@pytest.mark.processes
def test_a_killed_supervisor_leaves_nothing_running(tmp_path):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--", *make_command(tmp_path, "wait")],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    wait_for((tmp_path / "ready").exists)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    (child,) = children.read_text().split()
    process.kill()
    process.wait()
    stat = pathlib.Path(f"/proc/{child}/stat")
    wait_for(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_without_a_command_it_says_how_to_write_one():
    process = subprocess.run(
        [sys.executable, SCRIPT, "--max_restarts=1"], capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 2
    assert "no command: write it after --" in process.stderr


def test_the_checkpoints_are_found_in_the_command():
    find = supervise.find_checkpoints
    assert find(["python", "train.py", "--workdir=a/b"]) == "a/b/checkpoints"
    assert find(["python", "train.py", "--workdir", "a"]) == "a/checkpoints"
    assert find(["python", "train.py"]) is None
