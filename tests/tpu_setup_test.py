"""Scripts for Cloud TPU, against a stub of gcloud that records calls and reaches nothing."""

import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml

from atommem_jax.config import ConfigError
from experiments.configs import main_table
from tests.conftest import ROOT
from tpu_setup import check_env, placement

SETUP = ROOT / "tpu_setup"
SCRIPTS = sorted(path.name for path in SETUP.glob("*.sh") if path.name != "env.sh")
TRAIN = ["python", "experiments/train.py", "--config=experiments/configs/synthetic.py"]

# Answers are files in $STUB: the first `<number>_<pattern>` whose pattern is found in the call is
# used up; one without a number stays. A line `exit N` at its end is the status, and what stands
# before it goes to stderr if N is not 0.
STUB = r"""#!/usr/bin/env bash
printf '%s\n' "$(basename "$0") $*" >>"$STUB/calls"
for word in "$@"; do # as ssh would: the home folder, and a shell that reads the line
  if [[ -e $STUB/is_worker && $word == --command=* ]]; then
    cd "$HOME" && exec bash -c "${word#--command=}"
  fi
done
if [[ "$*" == *--filename=-* ]]; then cat >"$STUB/stdin"; fi
for answer in "$STUB"/answers/*; do
  [[ -e $answer ]] || break
  name="$(basename "$answer")"
  pattern="$(head -n 1 "$answer")"
  [[ "$*" == *$pattern* ]] || continue
  code="$(sed -n 's/^exit //p' "$answer")"
  text="$(sed '1d;/^exit /d' "$answer")"
  [[ $name == keep_* ]] || rm "$answer"
  if [[ -n $text ]]; then
    if [[ ${code:-0} == 0 ]]; then printf '%s\n' "$text"; else printf '%s\n' "$text" >&2; fi
  fi
  exit "${code:-0}"
done
"""
QUEUE, NODE = "queued-resources describe", "tpu-vm describe"


@dataclasses.dataclass
class Cloud:
    """The stub, its answers and its record."""

    folder: pathlib.Path
    env_file: pathlib.Path
    answers: int = 0

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}:{pathlib.Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "STUB": str(self.folder),
            "ATOMMEM_TMUX": f"atommem-test-{os.getpid()}",
            "ATOMMEM_GRACE_SECONDS": "5",
            # Should a real gcloud ever be reached: it has no account and asks no metadata server.
            "CLOUDSDK_CONFIG": str(self.folder / "no_account"),
            "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        }

    def answer(self, pattern: str, text: str = "", status: int = 0, keep: bool = False) -> None:
        """The next call that contains the pattern gets this; in the order given."""
        self.answers += 1
        prefix = "keep_" if keep else "a_"
        path = self.folder / "answers" / f"{prefix}{self.answers:03d}"
        path.write_text(f"{pattern}\n{text}\nexit {status}\n")

    def ready(self, keep: bool = True) -> None:
        self.answer(QUEUE, "ACTIVE", keep=keep)
        self.answer(NODE, "READY", keep=keep)

    def set(self, **settings: str) -> None:
        with self.env_file.open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in settings.items())

    def run(self, script: str, *arguments: str, status: int = 0) -> str:
        first = 1 if script == "gke.sh" else 0  # its action
        done = subprocess.run(
            [SETUP / script, *arguments[:first], f"--env={self.env_file}", *arguments[first:]],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def calls_of(self, part: str) -> list[str]:
        return [call for call in self.calls if part in call]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    """A project in which everything has a name and nothing takes time."""
    for name in ("bin", "answers"):
        (tmp_path / name).mkdir()
    for name in ("gcloud", "gsutil", "kubectl", "docker"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    env_file = tmp_path / "env.sh"
    shutil.copy(SETUP / "env.sh.example", env_file)
    made = Cloud(tmp_path, env_file)
    made.set(PROJECT="stub-project", BUCKET="stub-bucket", RETRIES="2")
    made.set(RETRY_SECONDS="0", POLL_SECONDS="0", WAIT_SECONDS="3")
    return made


# ---------------------------------------------------------------------------------------------
# All scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n", SETUP / script], check=True)
    assert os.access(SETUP / script, os.X_OK)


ARGUMENTS = {
    "create.sh": [],
    "setup_vm.sh": [],
    "launch.sh": ["--run=first", "--", *TRAIN],
    "status.sh": ["--run=first"],
    "stop.sh": [],
    "delete.sh": [],
}


@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_dry_run_calls_nothing_and_prints_what_a_run_calls(cloud, script):
    arguments = ARGUMENTS[script]
    printed = cloud.run(script, "--dry-run", *arguments)
    assert cloud.calls == []
    if script == "create.sh":
        cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.ready()
    cloud.answer("tpu-vm ssh", "atommem w-0 first running", keep=True)
    cloud.run(script, *arguments, *(["--yes"] if script == "delete.sh" else []))
    lines = printed.replace("\\\n", " ").splitlines()
    commands = {" ".join(shlex.split(line)) for line in lines if line.startswith("gcloud")}
    assert cloud.calls
    assert set(cloud.calls) <= commands


@pytest.mark.parametrize("script", [*ARGUMENTS, "gke.sh"])
def test_help_is_the_comment_at_the_top(cloud, script):
    printed = cloud.run(script, "--help")
    assert f"tpu_setup/{script}" in printed
    assert "#" not in printed
    assert "source" not in printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ZONE": "us-west4"}, "ZONE='us-west4' .*zones such as us-west4-a; .*locations list"),
        ({"BUCKET": "gs://b"}, "BUCKET='gs://b' .*without gs://"),
        ({"BUCKET": "your-bucket"}, "BUCKET='your-bucket' .*that of the example: set it"),
        ({"ACCELERATOR_TYPE": "v9-8"}, "ACCELERATOR_TYPE='v9-8' .*v5litepod-16, v6e-8"),
        ({"SPOT": "yes"}, "SPOT='yes' .*true and false"),
        ({"SLICES": "0"}, "SLICES='0' .*numbers from 1"),
        ({"SLICES": "2", "CREATE_WITH": "vm"}, "SLICES=2 .*needs CREATE_WITH=queued"),
        ({"PYTHON_VERSION": "3.10.12"}, "PYTHON_VERSION='3.10.12' .*from 3.11.0"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(cloud, settings, message):
    cloud.set(**settings)
    printed = cloud.run("create.sh", status=2)
    assert re.search(message, printed)
    assert cloud.calls == []


def test_a_setting_or_file_that_is_missing_is_named(cloud):
    cloud.env_file.write_text(cloud.env_file.read_text().replace("REMOTE_DIR=", "# "))
    assert "REMOTE_DIR is missing" in cloud.run("status.sh", status=2)
    cloud.env_file.unlink()
    assert "copy tpu_setup/env.sh.example" in cloud.run("status.sh", status=2)


def test_an_unknown_flag_is_refused(cloud):
    assert "--rum=a: no such flag" in cloud.run("launch.sh", "--rum=a", "--", "true", status=2)


def test_nothing_of_the_example_is_left_when_the_settings_are_others(cloud):
    other = {
        "PROJECT": "pp-pp-11",
        "ZONE": "qq-qq1-q",
        "BUCKET": "rrr-rrr",
        "TPU_NAME": "sss",
        "ACCELERATOR_TYPE": "v6e-32",
        "RUNTIME_VERSION": "ttt",
        "REMOTE_DIR": "uuu",
        "PYTHON_VERSION": "3.12.9",
        "UV_VERSION": "9.9.9",
        "MAX_RESTARTS": "77",
        "LOG_SECONDS": "88",
        "GKE_CLUSTER": "vvv",
        "GKE_LOCATION": "qq-qq1",
        "GKE_NAMESPACE": "www",
        "GKE_SERVICE_ACCOUNT": "xxx",
        "GKE_IMAGE": "yyy/zzz",
        "GKE_ACCELERATOR": "tpu-aaa",
        "GKE_TOPOLOGY": "2x4",
        "GKE_HOSTS": "1",
        "GKE_CHIPS": "8",
    }
    example = (SETUP / "env.sh.example").read_text()
    values = {name: re.search(f"^{name}=(\\S+)", example, re.MULTILINE)[1] for name in other}
    cloud.set(**other)
    printed = "".join(cloud.run(s, "--dry-run", *ARGUMENTS[s]) for s in ARGUMENTS)
    for action in ("image", "launch", "logs"):
        command = ["--run=a", "--", "true"] if action == "launch" else ["--run=a"]
        printed += cloud.run("gke.sh", action, "--dry-run", *command)
    for name, value in other.items():
        assert value in printed, name
        if len(values[name]) > 5 and values[name] not in ("atommem", "atommem_jax", "default"):
            assert values[name] not in printed, name


# ---------------------------------------------------------------------------------------------
# create.sh, delete.sh


def test_create_queues_a_request_and_waits_for_it(cloud):
    cloud.answer(QUEUE, "NOT_FOUND: no such thing", 1)
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        cloud.answer(QUEUE, state)
        cloud.answer(QUEUE, state)
    cloud.ready()
    printed = cloud.run("create.sh", "--name=mine")
    (request,) = cloud.calls_of("create")
    assert request == (
        "gcloud compute tpus queued-resources create mine --node-id=mine "
        "--runtime-version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-16 --spot "
        "--zone=us-west4-a --project=stub-project"
    )
    assert "mine is PROVISIONING" in printed
    assert "mine is ready; next: tpu_setup/setup_vm.sh --name=mine" in printed


def test_create_leaves_alone_what_is_ready(cloud):
    cloud.ready()
    cloud.run("create.sh")
    assert cloud.calls_of("create ") == []


def test_create_of_slices_and_of_a_vm_without_spot(cloud):
    cloud.set(SLICES="2", SPOT="false", NETWORK="net", SERVICE_ACCOUNT="a@b.iam")
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.ready()
    cloud.run("create.sh")
    (request,) = cloud.calls_of("create")
    assert "--node-prefix=atommem --node-count=2" in request
    assert "--network=net --service-account=a@b.iam" in request
    assert "--spot" not in request
    assert [call.split()[5] for call in cloud.calls_of(NODE)] == ["atommem-0", "atommem-1"]
    cloud.set(SLICES="1", CREATE_WITH="vm")
    cloud.answer(NODE, "NOT_FOUND", 1)
    (cloud.folder / "answers" / "a_000").write_text(f"{NODE}\nNOT_FOUND\nexit 1\n")
    cloud.run("create.sh")
    assert cloud.calls_of("tpu-vm create")[0].startswith(
        "gcloud compute tpus tpu-vm create atommem --version=v2-alpha-tpuv5-lite "
    )


def test_a_quota_error_ends_it_at_once_with_the_next_step(cloud):
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.answer(
        "create",
        "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepod' has been exceeded.",
        1,
    )
    printed = cloud.run("create.sh", status=1)
    assert "TPUV5sPreemptibleLitepod" in printed
    assert re.search("quota of project stub-project is not enough for v5litepod-16", printed)
    assert "iam-admin/quotas?project=stub-project" in printed
    assert len(cloud.calls_of("create")) == 1


def test_a_lack_of_capacity_is_tried_again_up_to_the_limit(cloud):
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.answer("create", 'There is no more capacity in the zone "us-west4-a"', 1)
    cloud.ready()
    assert "try 1 of 2" in cloud.run("create.sh")
    assert len(cloud.calls_of("create")) == 2


def test_after_the_last_try_it_fails_and_says_what_else_there_is(cloud):
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.answer("create", "UNAVAILABLE: try again", 1, keep=True)
    printed = cloud.run("create.sh", status=1)
    assert "RETRIES=2" in printed
    assert len(cloud.calls_of("create")) == 3


def test_what_gcloud_refuses_for_another_reason_is_not_tried_again(cloud):
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.answer("create", "INVALID_ARGUMENT: --internal-ips and so on", 1)
    assert "INVALID_ARGUMENT" in cloud.run("create.sh", status=1)
    assert len(cloud.calls_of("create")) == 1


def test_a_refused_look_is_not_taken_for_absence(cloud):
    cloud.answer(QUEUE, "PERMISSION_DENIED: tpu.googleapis.com", 1)
    printed = cloud.run("create.sh", status=1)
    assert "gcloud services enable tpu.googleapis.com" in printed
    assert "could not look at 'atommem'" in printed
    assert len(cloud.calls) == 1
    assert cloud.calls_of("create ") == []


@pytest.mark.parametrize("queue", ["SUSPENDED", "ACTIVE"])
def test_a_preempted_vm_is_deleted_and_asked_for_anew(cloud, queue):
    # The queued resource stays ACTIVE for a while after its VM has gone.
    cloud.answer(QUEUE, queue)
    if queue == "ACTIVE":
        cloud.answer(NODE, "PREEMPTED")
    cloud.ready()
    printed = cloud.run("create.sh")
    assert re.search("atommem is (SUSPENDED|PREEMPTED): it is deleted and asked for anew", printed)
    verbs = [call.split()[4] for call in cloud.calls if "describe" not in call]
    assert verbs == ["delete", "create"]
    assert "--force --quiet" in cloud.calls_of("delete")[0]


def test_waiting_has_an_end_and_can_be_left_at_once(cloud):
    cloud.answer(QUEUE, "WAITING_FOR_RESOURCES", keep=True)
    assert "is in the queue" in cloud.run("create.sh", "--no-wait")
    assert "WAIT_SECONDS=3" in cloud.run("create.sh", status=1)


def test_delete_asks_or_is_told(cloud):
    cloud.ready()
    assert "pass --yes" in cloud.run("delete.sh", status=2)
    assert cloud.calls_of("delete ") == []
    cloud.run("delete.sh", "--yes")
    assert len(cloud.calls_of("queued-resources delete atommem --force")) == 1


def test_delete_of_nothing_is_no_error(cloud):
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    assert "nothing to delete" in cloud.run("delete.sh", "--yes")


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


# ---------------------------------------------------------------------------------------------
# Kubernetes


def render(cloud: Cloud, *command: str) -> dict:
    cloud.run("gke.sh", "launch", "--run=first", "--", *command)
    (manifest,) = yaml.safe_load_all((cloud.folder / "stdin").read_text())
    return manifest


def test_the_jobset_has_the_settings_and_the_command_word_for_word(cloud):
    cloud.set(SLICES="2", GKE_NAMESPACE="research")
    odd = ["--a=two words", '--b="q"', "--c=it's", "--d=${RUN}", "--e=$(HOME)", "--f=a\\b&c"]
    manifest = render(cloud, *TRAIN, *odd)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "first"
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    assert (job["template"]["spec"]["parallelism"], job["template"]["spec"]["completions"]) == (
        4,
        4,
    )
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"][1:] == ["experiments/supervise.py", "--max_restarts=20", "--"]
    expected = [*TRAIN, *odd, "--workdir=gs://stub-bucket/runs/first"]
    assert container["args"] == [word.replace("$(", "$$(") for word in expected]
    assert "--namespace=research apply" in cloud.calls_of("kubectl")[0]


def test_an_argument_that_a_manifest_cannot_hold_is_refused(cloud):
    printed = cloud.run("gke.sh", "launch", "--run=a", "--", "echo", "a\nb", status=2)
    assert "a tab or a line break" in printed
    assert cloud.calls == []


@pytest.mark.parametrize(("spot", "operator"), [("true", "Exists"), ("false", "DoesNotExist")])
def test_spot_chooses_the_nodes(cloud, spot, operator):
    cloud.set(SPOT=spot)
    pod = render(cloud, "true")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert terms["nodeSelectorTerms"][0]["matchExpressions"] == [
        {"key": "cloud.google.com/gke-spot", "operator": operator}
    ]


def test_an_image_holds_a_commit_and_is_named_by_it(cloud):
    cloud.run("gke.sh", "image")
    (call,) = cloud.calls_of("builds submit")
    commit = re.search(r"atommem_jax-(\w+)\.tar\.gz", call)[1]
    assert f"atommem/train:{commit},_PYTHON_VERSION=3.11.13" in call
    build = yaml.safe_load((SETUP / "gke" / "cloudbuild.yaml").read_text())
    assert f"--file={(SETUP / 'gke' / 'Dockerfile').relative_to(ROOT)}" in build["steps"][0]["args"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"GKE_HOSTS": "2"}, "GKE_HOSTS=2 and GKE_CHIPS=4 .* make 8 chips, .*4x4 has 16"),
        ({"GKE_IMAGE": "img:latest"}, "GKE_IMAGE='img:latest' .*without a tag"),
    ],
)
def test_settings_of_kubernetes_are_checked(cloud, settings, message):
    cloud.set(**settings)
    assert re.search(message, cloud.run("gke.sh", "status", "--run=a", status=2))


def test_gke_looks_and_deletes_by_the_run(cloud):
    for action in ("status", "logs", "delete"):
        cloud.run("gke.sh", action, "--run=a")
    calls = [call for call in cloud.calls if call.startswith("kubectl")]
    assert [call.split()[2] for call in calls] == ["get", "logs", "delete"]
    assert "allowed actions are" in cloud.run("gke.sh", "destroy", "--run=a", status=2)


# ---------------------------------------------------------------------------------------------
# The sweep launcher


class Vms:
    """A driver in which a run needs three looks, and things happen when they are told to."""

    def __init__(self):
        self.lock = threading.Lock()
        self.runs: dict[tuple[str, str], int] = {}  # looks that are left
        self.ended: dict[str, str] = {}  # trial: how its commands end, 'done' if not named
        self.gone: set[str] = set()
        self.preempt: dict[str, str] = {}  # trial: a VM that is lost while it is there
        self.broken: set[str] = set()  # VMs on which nothing can be launched
        self.log: list[tuple[str, str, str]] = []

    def launch(self, vm, run, command):
        with self.lock:
            if vm in self.gone or vm in self.broken:
                return False
            busy = [r for (v, r), looks in self.runs.items() if v == vm and looks > 0]
            assert not busy, f"{vm} has {busy} and gets {run}"
            others = [v for (v, r), looks in self.runs.items() if r == run and v not in self.gone]
            assert not [v for v in others if self.runs[v, run] > 0], f"{run} twice"
            self.runs[vm, run] = 3
            self.log.append((vm, command[0], command[1]))
            return True

    def look(self, vm, run):
        with self.lock:
            trial = next((t for t in self.preempt if f"-{t}-" in run), None)
            if trial and self.preempt[trial] == vm and (vm, run) in self.runs:
                del self.preempt[trial]
                self.gone.add(vm)
            if vm in self.gone:
                return "gone"
            if (vm, run) not in self.runs:
                return "none"
            self.runs[vm, run] -= 1
            if self.runs[vm, run] > 0:
                return "running"
            return next((how for t, how in self.ended.items() if f"-{t}-" in run), "done")

    def stop(self, vm, run):
        self.runs.pop((vm, run), None)
        return vm not in self.gone

    def create(self, vm):
        self.gone.discard(vm)
        self.log.append((vm, "create", ""))
        return True


def make_trials(*names: str, after: str = "") -> list[placement.Trial]:
    return [
        placement.Trial(name, {"train": [name, "train"], "evaluate x": [name, "evaluate"]}, after)
        for name in names
    ]


def place(folder, trials, driver, vms=("va", "vb"), recreate=False, retry=False):
    board = placement.Board(folder, trials)
    if retry:
        board.retry_failed()
    lines: list[str] = []
    launcher = placement.Launcher(
        "s", board, driver, vms, poll_seconds=0.002, recreate=recreate, report=lines.append
    )
    errors: list[Exception] = []

    def run() -> None:
        try:
            launcher.run()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)  # a trial that nobody looks after would be waited for without end
    assert not thread.is_alive(), lines
    if errors:
        raise errors[0]
    return board, lines


def test_every_vm_takes_the_next_trial_when_it_is_free(tmp_path):
    driver = Vms()
    board, _ = place(tmp_path, make_trials("a", "b", "c", "d", "e"), driver)
    assert board.names(placement.DONE) == ["a", "b", "c", "d", "e"]
    assert {vm for vm, _, _ in driver.log} == {"va", "vb"}
    for name in "abcde":
        parts = [(vm, part) for vm, trial, part in driver.log if trial == name]
        assert [part for _, part in parts] == ["train", "evaluate"]
        assert len({vm for vm, _ in parts}) == 1


def test_a_failed_trial_is_kept_apart_and_tried_again_when_asked(tmp_path):
    driver = Vms()
    driver.ended = {"b": "failed"}
    trials = make_trials("a", "b", "c")
    board, lines = place(tmp_path, trials, driver)
    assert (board.names(placement.DONE), board.names(placement.FAILED)) == (["a", "c"], ["b"])
    assert board.placements["b"].failed.startswith("train: failed on v")
    assert any(line.startswith("FAILED  b") for line in lines)
    before = len(driver.log)
    board, _ = place(tmp_path, trials, driver)  # stays apart
    assert (board.names(placement.FAILED), len(driver.log)) == (["b"], before)
    driver.ended = {}
    board, _ = place(tmp_path, trials, driver, retry=True)
    assert board.names(placement.DONE) == ["a", "b", "c"]


@pytest.mark.parametrize("recreate", [False, True])
def test_the_trial_of_a_preempted_vm_goes_back_to_the_queue(tmp_path, recreate):
    driver = Vms()
    driver.preempt = {"a": "va"}
    trials = make_trials("a", "b", "c", "d")
    board, lines = place(tmp_path, trials, driver, recreate=recreate)
    assert board.names(placement.DONE) == ["a", "b", "c", "d"]
    assert board.placements["a"].requeued == 1
    assert any("queued  a again: va has lost it" in line for line in lines)
    assert (("va", "create", "") in driver.log) == recreate


def test_without_a_vm_trials_stay_in_the_queue_and_the_next_launcher_takes_them(tmp_path):
    driver = Vms()
    driver.preempt = {"a": "va"}
    trials = make_trials("a", "b")
    board, _ = place(tmp_path, trials, driver, vms=["va"])
    assert board.names(placement.QUEUED) == ["a", "b"]
    board, _ = place(tmp_path, trials, driver, vms=["vb"])
    assert board.names(placement.DONE) == ["a", "b"]


def test_a_vm_on_which_nothing_starts_spoils_no_trial(tmp_path):
    driver = Vms()
    driver.broken = {"va"}
    board, lines = place(tmp_path, make_trials("a", "b", "c"), driver)
    assert board.names(placement.DONE) == ["a", "b", "c"]
    assert {vm for vm, _, _ in driver.log} == {"vb"}
    assert any("va takes no more trials" in line for line in lines)


def test_a_new_launcher_finds_what_is_at_work_and_does_not_start_it_twice(tmp_path):
    driver, trials = Vms(), make_trials("a", "b")

    class EndedError(Exception):
        pass

    looks = iter(range(100))

    def die(vm, run):
        if next(looks) == 3:
            raise EndedError
        return Vms.look(driver, vm, run)

    driver.look = die  # type: ignore[method-assign]
    with pytest.raises(EndedError):
        place(tmp_path, trials, driver, vms=["va"])
    saved = json.loads((tmp_path / placement.FILE_NAME).read_text())
    assert (saved["a"]["state"], saved["a"]["vm"]) == (placement.PLACED, "va")
    driver.look = functools.partial(Vms.look, driver)  # type: ignore[method-assign]
    # The VM of `a` is not listed any more: it is looked after all the same, and gets nothing new.
    board, _ = place(tmp_path, trials, driver, vms=["vb"])
    assert board.names(placement.DONE) == ["a", "b"]
    assert driver.log.count(("va", "a", "train")) == 1
    assert ("vb", "b", "train") in driver.log
    assert not [entry for entry in driver.log if entry[:2] == ("va", "b")]


def test_a_trial_waits_for_the_one_that_it_starts_from(tmp_path):
    driver = Vms()
    trials = [*make_trials("a"), *make_trials("b", "c", after="a")]
    place(tmp_path, trials, driver)
    order = [(trial, part) for _, trial, part in driver.log]
    assert order[:2] == [("a", "train"), ("a", "evaluate")]
    driver = Vms()
    driver.ended = {"a": "failed"}
    board, _ = place(tmp_path / "other", trials, driver)
    assert board.names(placement.FAILED) == ["a", "b", "c"]
    assert "a, whose checkpoint it starts from" in board.placements["b"].failed


def test_a_trial_that_was_started_cannot_change(tmp_path):
    place(tmp_path, make_trials("a"), Vms())
    changed = [placement.Trial("a", {"train": ["a", "other"], "evaluate x": ["a", "evaluate"]})]
    with pytest.raises(ConfigError, match="trial 'a' was started with another command"):
        placement.Board(tmp_path, changed)


def test_runs_on_a_vm_have_names_that_the_scripts_take():
    names = {
        placement.name_run("s", trial, key)
        for trial in ("learned/seed0", "learned_seed0", "x" * 99 + "/A=1")
        for key in ("train", 'evaluate {"step": 3}')
    }
    assert len(names) == 6
    for name in names:
        assert re.fullmatch("[a-z]([a-z0-9-]{0,58}[a-z0-9])?", name)


def run_sweep(cloud: Cloud, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [
            sys.executable,
            SETUP / "sweep.py",
            "--config=experiments/configs/main_table.py",
            f"--workdir={cloud.folder / 'table'}",
            f"--env={cloud.env_file}",
            *arguments,
        ],
        cwd=ROOT,
        env=cloud.environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_sweep_goes_through_the_scripts_to_its_vms(cloud):
    cloud.ready()
    # The launcher looks before it launches, and after it.
    cloud.answer("worker.sh status", "atommem w-0 x none")
    cloud.answer("worker.sh status", "atommem w-0 x running")
    cloud.answer("worker.sh status", "atommem w-0 x done 0")
    cloud.answer("worker.sh status", "atommem w-0 x none")
    cloud.answer("worker.sh status", "atommem w-0 x failed 1")
    only = "--only=^(learned|no_memory)/seed0"
    printed = run_sweep(cloud, "--vms=va", "--poll_seconds=0", only, status=1)
    assert "done    learned/seed0 on va" in printed
    assert "failed: no_memory/seed0; look at their logs in the bucket" in printed
    first, second = (call for call in cloud.calls if "worker.sh start" in call)
    folder = "gs://stub-bucket/sweeps/table"
    assert f"--workdir={folder}/learned/seed0 " in first
    assert "python experiments/train.py --config=experiments/configs/main_table.py " in first
    end = main_table.get_config().sft.steps
    assert f"--config.init_from={folder}/learned/seed0/checkpoints/{end} " in second
    saved = json.loads((cloud.folder / "table" / placement.FILE_NAME).read_text())
    assert {name: value["state"] for name, value in saved.items()} == {
        "learned/seed0": "done",
        "no_memory/seed0": "failed",
    }


# ---------------------------------------------------------------------------------------------
# check_env.py


def run_check(*arguments: str, status: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, SETUP / "check_env.py", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_laptop_passes_and_hears_what_does_not_apply(tmp_path):
    two = "--xla_force_host_platform_device_count=2"
    printed = run_check(
        f"--bucket={tmp_path}", f"--lock_file={tmp_path / 'lock'}", "--expect_devices=2",
        XLA_FLAGS=two,
    )  # fmt: skip
    states = dict(re.findall(r"^\S+  (\w+) +(ok|does not apply|WRONG) ", printed, re.MULTILINE))
    assert states == {
        "versions": "ok",
        "lock": "ok",
        "devices": "ok",
        "hbm": "does not apply",
        "collective": "ok",
        "bucket": "ok",
    }
    assert "a sum over 2 devices" in printed
    assert list((tmp_path / "check_env").iterdir()) == []


def test_what_is_wrong_is_listed_with_the_next_step(tmp_path):
    (tmp_path / "file").touch()
    printed = run_check(
        "--checks=devices,bucket",
        "--require_tpu",
        f"--bucket={tmp_path / 'file'}",
        status=1,
        XLA_FLAGS="",
    )
    assert re.search(r"1\. devices: 1 x cpu .*TPUs are needed\n   next: pip install", printed)
    assert re.search(r"2\. bucket: .*cannot be written: .*\n   next: is there such a", printed)
    assert "allowed checks are" in run_check("--checks=hmb", status=2)


def test_several_processes_sum_over_all_their_devices():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = ["--checks=devices,collective", f"--coordinator_address={address}"]
    common += ["--num_processes=2", "--expect_devices=2", "--timeout=60"]
    printed: list[str] = ["", ""]

    def start(number: int) -> None:
        printed[number] = run_check(*common, f"--process_id={number}", XLA_FLAGS="")

    threads = [threading.Thread(target=start, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, text in enumerate(printed):
        assert f"process {number} of 2" in text
        assert "a sum over 2 devices" in text


def test_versions_that_are_not_pinned_are_named(monkeypatch):
    real = check_env.find_version
    monkeypatch.setattr(check_env, "find_version", lambda n: "0.1" if n == "jax" else real(n))
    result = check_env.check_versions(require_tpu=False)
    assert result.state == check_env.WRONG
    assert f"jax 0.1 (pinned: {check_env.read_pins()['jax']})" in result.found
    monkeypatch.setattr(check_env, "find_version", lambda n: "1.0" if n == "libtpu" else real(n))
    assert "libtpu 1.0 (needed by jax: 0." in check_env.check_versions(require_tpu=False).found


def test_the_holder_of_the_lock_is_told_from_a_stale_file(tmp_path):
    path = tmp_path / "lock"
    assert check_env.check_lock(path, remove=True).state == check_env.OK
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        held = check_env.check_lock(path, remove=True)
        if pathlib.Path("/proc/locks").exists():
            assert held.state == check_env.WRONG
            assert f"held by process {os.getpid()}" in held.found
            assert "stop.sh" in held.next_step
            assert path.exists()
    assert check_env.check_lock(path, remove=False).state == check_env.OK
    assert path.exists()
    result = check_env.check_lock(path, remove=True)
    assert "was stale, and is removed" in result.found
    assert not path.exists()


class Device:
    """Reports memory as a TPU does."""

    def __init__(self, limit: int, used: int):
        self._stats = {"bytes_limit": limit, "bytes_in_use": used}

    def memory_stats(self):
        return self._stats


def test_memory_that_is_in_use_is_wrong(monkeypatch):
    import jax

    gib = 1 << 30
    for used, state in ((0, check_env.OK), (2 * gib, check_env.WRONG)):
        devices = [Device(16 * gib, 0), Device(16 * gib, used)]
        monkeypatch.setattr(jax, "local_devices", lambda devices=devices: devices)
        result = check_env.check_hbm()
        assert result.state == state
        assert result.found.startswith("16.00 GiB a device")


# ---------------------------------------------------------------------------------------------
# The guide


def read_transcripts() -> list[tuple[str, str]]:
    """(command, what it prints) of every dry run in docs/tpu.md."""
    text = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    found = []
    for block in blocks:
        command, _, output = re.sub(r"\\\n> +", "", block).partition("\n")
        assert command.startswith("$ tpu_setup/")
        found.append((command.removeprefix("$ "), output))
    return found


def test_the_guide_shows_every_script():
    shown = {command.split()[0].removeprefix("tpu_setup/") for command, _ in read_transcripts()}
    assert shown == {*ARGUMENTS, "gke.sh"}


@pytest.mark.parametrize(("command", "output"), read_transcripts())
def test_a_transcript_of_the_guide_is_what_the_script_prints(cloud, command, output):
    words = shlex.split(command)
    assert "--dry-run" in words
    first = words.index("--dry-run")
    done = subprocess.run(
        [*words[:first], f"--env={SETUP / 'env.sh.example'}", *words[first:]],
        cwd=ROOT,
        env={name: value for name, value in cloud.environment.items() if name != "TMPDIR"},
        capture_output=True,
        text=True,
        check=True,
    )

    def normalise(text: str) -> str:
        text = text.replace(str(ROOT), "/home/me/atommem_jax")
        commit = r"(?<=atommem_jax-)\w+(?=\.tar)|(?<=train:)\w+|(?<=echo )\w+(?= > COMMIT)"
        joined = re.sub(commit, "COMMIT", text)
        # Where lines are broken depends on the length of paths and names.
        return re.sub(r"\s+", " ", joined.replace("\\\n", " ")).strip()

    assert normalise(done.stdout) == normalise(output)
