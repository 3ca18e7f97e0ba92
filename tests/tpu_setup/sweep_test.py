"""A sweep placed on several TPU VMs: which of them takes which trial, whatever happens."""

import functools
import json
import re
import subprocess
import sys
import threading

import pytest

from atommem_jax.config import ConfigError
from experiments.configs import main_table
from tests.conftest import ROOT
from tests.helpers import gcloud
from tests.helpers.gcloud import SETUP, Cloud
from tpu_setup import placement


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return gcloud.make_cloud(tmp_path)


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
