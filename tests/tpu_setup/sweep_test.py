"""The script that places a sweep on TPU VMs, against a stub of gcloud."""

import json
import subprocess
import sys

import pytest

from experiments.configs import main_table
from tests.conftest import ROOT
from tests.helpers import gcloud
from tests.helpers.gcloud import SETUP, Cloud


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return gcloud.make_cloud(tmp_path)


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
    statuses = {
        name: json.loads((cloud.folder / "table" / name / "seed0" / "status.json").read_text())
        for name in ("learned", "no_memory")
    }
    assert [status["state"] for status in statuses.values()] == ["done", "failed"]
    assert statuses["no_memory"]["failed"].startswith(
        "train: failed on va, log in logs/t-no-memory"
    )


# As the version that kept one file for all runs wrote it, but for the words of the command.
OLD_PLACEMENTS = """{
 "learned/seed0": {
  "state": "placed",
  "vm": "vz",
  "at_work": "train",
  "finished": [],
  "failed": "",
  "placed": 2,
  "requeued": 1,
  "commands": {
   "train": COMMAND
  }
 },
 "learned/seed1": {
  "state": "queued",
  "vm": "",
  "at_work": "",
  "finished": [],
  "failed": "",
  "placed": 0,
  "requeued": 0,
  "commands": {}
 }
}
"""


def test_a_sweep_of_the_version_before_goes_on(cloud):
    only = "--only=^learned/seed0"
    printed = run_sweep(cloud, "--vms=va", only, "--dry_run")
    command = printed.splitlines()[1].split()
    workdir = cloud.folder / "table"
    assert not workdir.exists()
    workdir.mkdir()
    old = OLD_PLACEMENTS.replace("COMMAND", json.dumps(command))
    (workdir / "placements.json").write_text(old)
    assert "learned/seed0: started on vz" in run_sweep(cloud, "--vms=va", only, "--dry_run")
    assert (workdir / "placements.json").read_text() == old

    cloud.ready()
    cloud.answer("worker.sh status", "atommem w-0 x running")
    cloud.answer("worker.sh status", "atommem w-0 x done 0")
    printed = run_sweep(cloud, "--vms=va", "--poll_seconds=0", only)
    assert "done    learned/seed0 on vz" in printed
    assert not [call for call in cloud.calls if "worker.sh start" in call]
    status = json.loads((workdir / "learned/seed0/status.json").read_text())
    assert (status["state"], status["attempts"], status["requeued"]) == ("done", 2, 1)
    assert not (workdir / "placements.json").exists()
    printed = run_sweep(cloud, "--vms=va", "--dry_run", only)
    assert "learned/seed0: done, nothing to do" in printed

    changed = "--config.sft.steps=901"
    printed = run_sweep(cloud, "--vms=va", only, changed, status=2)
    assert "run 'learned/seed0' was started with another config: sft.steps=901 (was" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--vms is missing: pass names of TPU VMs"),
        (["--vms=va,va"], "--vms=va,va names a VM twice"),
        (["--vms=va", "--workdir=gs://b/w"], "--workdir=gs://b/w is no local folder"),
        (["--vms=va", "--env=nowhere"], "--env=nowhere: there is no such file"),
        (["--vms=va", "--only=none"], "--only=none fits no run; there are: learned/seed0"),
    ],
)
def test_a_mistake_ends_with_status_2(cloud, arguments, message):
    printed = run_sweep(cloud, *arguments, status=2)
    assert message in printed
    assert "Traceback" not in printed
