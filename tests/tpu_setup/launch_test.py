"""Scripts for Cloud TPU, against a stub of gcloud: runs on TPU VMs, and on a worker."""

import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import time

import pytest

from tests.conftest import ROOT
from tests.helpers import gcloud
from tests.helpers.gcloud import NODE, QUEUE, SETUP, TRAIN, Cloud


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return gcloud.make_cloud(tmp_path)


# ---------------------------------------------------------------------------------------------
# setup_vm.sh, launch.sh, status.sh, stop.sh


def test_setup_sends_the_commit_installs_and_checks_on_all_workers(cloud):
    cloud.ready()
    cloud.run("setup_vm.sh")
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert cloud.calls_of("storage cp")[0] == (
        f"gcloud storage cp {cloud.folder}/atommem_jax-{commit}.tar.gz "
        f"gs://stub-bucket/code/atommem_jax-{commit}.tar.gz --project=stub-project"
    )
    install, check = cloud.calls_of("tpu-vm ssh")
    assert "--worker=all" in install
    assert "worker.sh install 3.11.13 " in install
    assert "check_env.py --require_tpu --expect_devices=16 --bucket=gs://stub-bucket" in check


@pytest.mark.parametrize(
    ("accelerator", "slices", "devices"),
    [("v5litepod-16", 1, 16), ("v6e-8", 2, 16), ("v5p-8", 1, 4), ("v4-32", 1, 16), ("v3-8", 1, 8)],
)
def test_the_devices_of_a_type_are_counted_as_jax_does(cloud, accelerator, slices, devices):
    cloud.set(ACCELERATOR_TYPE=accelerator, SLICES=str(slices))
    assert f"--expect_devices={devices} " in cloud.run("setup_vm.sh", "--dry-run")


def test_launch_sends_one_command_through_the_supervisor_to_all_workers(cloud):
    cloud.ready()
    cloud.run("launch.sh", "--run=first", "--", *TRAIN, "--config.task.name=it's two")
    (call,) = cloud.calls_of("ssh")
    assert "tpu-vm ssh atommem --quiet --worker=all --command=" in call
    remote = re.search("--command=(.*) --zone", call)[1]
    words = shlex.split(remote.partition("worker.sh ")[2])
    assert words == [
        "start",
        "first",
        "gs://stub-bucket/logs/first",
        "60",
        "python",
        "experiments/supervise.py",
        "--max_restarts=20",
        "--",
        *TRAIN,
        "--config.task.name=it's two",
        "--workdir=gs://stub-bucket/runs/first",
    ]


def test_launch_on_slices_reaches_the_workers_of_all(cloud):
    cloud.set(SLICES="2")
    cloud.ready()
    cloud.run("launch.sh", "--run=a", "--", "true")
    assert "queued-resources ssh atommem --node=all --quiet --worker=all" in cloud.calls[-1]


def test_a_workdir_of_ones_own_must_lie_in_a_bucket(cloud):
    cloud.ready()
    own = "--workdir=gs://other/place"
    cloud.run("launch.sh", "--run=a", "--", *TRAIN, own)
    assert cloud.calls[-1].count("--workdir") == 1
    printed = cloud.run("launch.sh", "--run=a", "--", *TRAIN, "--workdir=runs/a", status=2)
    assert "--workdir=runs/a: allowed are folders in a bucket" in printed


@pytest.mark.parametrize("run", ["", "First", "a/b", "a.b", "x" * 61])
def test_a_run_has_a_name_that_fits_everywhere(cloud, run):
    assert f"--run='{run}'" in cloud.run("launch.sh", f"--run={run}", "--", "true", status=2)


def test_launch_on_a_preempted_vm_names_create(cloud):
    cloud.answer(QUEUE, "SUSPENDED")
    printed = cloud.run("launch.sh", "--run=a", "--", "true", status=1)
    assert "is SUSPENDED, and READY is needed: run 'tpu_setup/create.sh --name=atommem'" in printed
    assert cloud.calls_of("ssh") == []


def test_a_worker_that_fails_is_no_mistake_of_the_user(cloud):
    cloud.ready()
    cloud.answer("ssh", "first is at work already", 2)
    assert "a worker of 'atommem'" in cloud.run("launch.sh", "--run=a", "--", "true", status=1)


@pytest.mark.parametrize(
    ("workers", "state"),
    [
        (["running", "running"], "running"),
        (["done 0", "running"], "running"),
        (["done 0", "done 0"], "done"),
        (["running", "failed 1"], "failed"),
        (["done 0", "lost"], "lost"),
        (["running", "none"], "none"),
        (["stopped 143", "running"], "stopped"),
        ([], "unreachable"),
    ],
)
def test_the_worst_worker_speaks_for_the_run(cloud, workers, state):
    cloud.ready()
    lines = [f"atommem w-{number} a {word}" for number, word in enumerate(workers)]
    cloud.answer("ssh", "\n".join([*lines, "    sft: 12%| done"]))
    assert cloud.run("status.sh", "--run=a").splitlines()[-1] == f"state: {state}"


@pytest.mark.parametrize(
    ("queue", "node", "state"),
    [
        ("WAITING_FOR_RESOURCES", "", "waiting"),
        ("SUSPENDED", "", "gone"),
        ("ACTIVE", "PREEMPTED", "gone"),
        ("ACTIVE", "CREATING", "waiting"),
    ],
)
def test_the_state_of_the_tpu_comes_before_that_of_the_run(cloud, queue, node, state):
    cloud.answer(QUEUE, queue)
    cloud.answer(NODE, node)
    assert cloud.run("status.sh", "--run=a").splitlines()[-1] == f"state: {state}"
    assert cloud.calls_of("ssh") == []


def test_a_worker_that_does_not_answer_is_told_from_one_that_is_gone(cloud):
    cloud.ready()
    cloud.answer("ssh", "ssh: connect to host: timed out", 255)
    assert "state: unreachable" in cloud.run("status.sh", "--run=a")


def test_stop_ends_one_run_or_all(cloud):
    cloud.ready()
    cloud.run("stop.sh", "--run=a")
    cloud.run("stop.sh")
    first, second = cloud.calls_of("ssh")
    assert "worker.sh stop a " in first
    assert re.search("worker.sh stop --zone", second)


# ---------------------------------------------------------------------------------------------
# worker.sh, with tmux


@pytest.fixture
def worker(cloud):
    """Calls worker.sh; its tmux server is one of its own, and ends with the test."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")

    def call(*arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [SETUP / "worker.sh", *arguments],
            env=cloud.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    yield call
    server = ["tmux", "-L", cloud.environment["ATOMMEM_TMUX"]]
    subprocess.run([*server, "kill-server"], capture_output=True, check=False)
    pathlib.Path(f"/tmp/tmux-{os.getuid()}", server[2]).unlink(missing_ok=True)


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


HOST = socket.gethostname()


def test_a_run_on_a_worker_ends_with_its_code_and_its_log_in_the_bucket(cloud, worker):
    assert f"atommem {HOST} a none" in worker("status", "a")
    worker("start", "a", "gs://b/logs/a", "60", "bash", "-c", "echo 'two  words'; exit 3")
    wait_for(lambda: f"atommem {HOST} a failed 3" in worker("status", "a"))
    worker("start", "b", "gs://b/logs/b", "60", "true")
    wait_for(lambda: f"atommem {HOST} b done 0" in worker("status"))
    log = (cloud.folder / ".atommem_runs" / "a" / "log.txt").read_text()
    assert "two  words" in log
    assert (
        f"storage cp --quiet {cloud.folder}/.atommem_runs/a/log.txt gs://b/logs/a/{HOST}.log"
        in ("\n".join(cloud.calls))
    )


def test_stop_asks_the_command_and_ends_what_it_has_started(cloud, worker):
    done = cloud.folder / "saved"
    script = f"trap 'echo saved >{done}; exit 0' TERM; setsid sleep 300 & echo $! >pid; wait"
    worker("start", "a", "gs://b", "60", "bash", "-c", f"cd {cloud.folder}; {script}")
    wait_for(lambda: (cloud.folder / "pid").exists() and (cloud.folder / "pid").read_text())
    assert "already" in worker("start", "a", "gs://b", "60", "true", status=1)
    worker("stop")
    assert done.read_text() == "saved\n"
    left = pathlib.Path("/proc") / (cloud.folder / "pid").read_text().strip() / "cmdline"
    wait_for(lambda: not left.exists() or not left.read_bytes())
    assert "a running" not in worker("status", "a")
    worker("start", "a", "gs://b", "60", "true")  # the name is free again
    wait_for(lambda: "a done 0" in worker("status", "a"))


def test_a_run_whose_session_is_gone_is_lost(cloud, worker):
    (cloud.folder / ".atommem_runs" / "a").mkdir(parents=True)
    assert f"atommem {HOST} a lost" in worker("status", "a")


def test_a_command_reaches_the_worker_word_for_word(cloud, worker):
    code = cloud.folder / "atommem_jax"
    shutil.copytree(SETUP, code / "tpu_setup", ignore=shutil.ignore_patterns("env.sh"))
    (code / "experiments").mkdir()
    (code / "experiments" / "supervise.py").write_text("import sys; print(sys.argv[1:])\n")
    (cloud.folder / "is_worker").touch()
    cloud.ready()
    assert "state: none" in cloud.run("status.sh", "--run=first")
    words = ["python", "-c", "print('a  b; c')", '--x="$HOME" & `ls`', "*", "a\\ b", ""]
    assert f"atommem {HOST} first running" in cloud.run("launch.sh", "--run=first", "--", *words)
    wait_for(lambda: "state: done" in cloud.run("status.sh", "--run=first"))
    log = (cloud.folder / ".atommem_runs" / "first" / "log.txt").read_text()
    assert repr(["--max_restarts=20", "--", *words]) in log
    assert f"atommem {HOST} first done 0" in cloud.run("status.sh")
