"""Jobs as processes of this machine, with commands that cost nothing: kills, cores, logs."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from atommem_jax.config import ConfigError
from atommem_jax.sweeps import local_processes
from atommem_jax.sweeps import scheduler as scheduler_lib
from atommem_jax.sweeps.local_processes import LocalProcesses
from tests.conftest import ROOT

UNCONFINED: list[int] = []


def make_job(folder: pathlib.Path, name: str, **scripts: str) -> scheduler_lib.Job:
    """A job of shell scripts; `$PWD` is the folder of all jobs."""
    commands = {key: ["sh", "-c", f"cd {folder}; {script}"] for key, script in scripts.items()}
    return scheduler_lib.Job(name, folder / name, commands, about={"made": "by hand"})


def run(*jobs: scheduler_lib.Job, slots=(UNCONFINED,)) -> dict[str, scheduler_lib.Status]:
    """What the jobs that ended are reported as, in that order; failed ones are tried again."""
    ended = {}

    def note(change: str, job: scheduler_lib.Job, status: scheduler_lib.Status) -> None:
        if change in (scheduler_lib.DONE, scheduler_lib.FAILED):
            ended[job.name] = status

    scheduler = scheduler_lib.Scheduler(LocalProcesses(slots), commit=lambda: "abc")
    assert scheduler.run(jobs, retry_failed=True, on_change=note) == []
    return ended


def read_trace(folder: pathlib.Path) -> list[str]:
    return (folder / "trace").read_text().split()


# ---------------------------------------------------------------------------------------------
# Running


def test_commands_run_in_order_and_the_status_tells(tmp_path):
    first = make_job(tmp_path, "first", one="echo 1 >> trace; echo said", two="echo 2 >> trace")
    second = make_job(tmp_path, "in/second", one="echo 3 >> trace")
    assert not scheduler_lib.read_status(first.folder)
    assert list(run(first, second)) == ["first", "in/second"]
    assert read_trace(tmp_path) == ["1", "2", "3"]
    status = scheduler_lib.read_status(first.folder)
    assert (status.state, status.finished, status.attempts) == (
        scheduler_lib.DONE,
        ["one", "two"],
        1,
    )
    assert (status.commit, status.about) == ("abc", {"made": "by hand"})
    assert status.seconds > 0
    assert status.cpu_seconds > 0
    log = (first.folder / status.log).read_text()
    assert (
        log.index("==== attempt 1: sh") < log.index("\nsaid\n") < log.rindex("==== attempt 1: sh")
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_time_of_the_processors_is_that_of_the_command(tmp_path):
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    job = scheduler_lib.Job("burn", tmp_path / "burn", {"one": [sys.executable, "-c", burn]})
    status = run(job)["burn"]
    assert 0.5 <= status.cpu_seconds < 5
    assert scheduler_lib.read_status(job.folder) == status


def test_as_many_run_at_a_time_as_there_are_slots(tmp_path):
    # Each of the first two goes on only when the other runs; the third finds one of them at most.
    wait = "touch {0}; while [ ! -e {1} ]; do sleep 0.02; done; echo {0} >> trace"
    due = [
        make_job(tmp_path, "a", one=wait.format("a.is", "b.is")),
        make_job(tmp_path, "b", one=wait.format("b.is", "a.is")),
        make_job(tmp_path, "c", one="grep -c is trace > before"),
    ]
    assert set(run(*due, slots=(UNCONFINED, UNCONFINED))) == {"a", "b", "c"}
    assert int((tmp_path / "before").read_text()) >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot confine processes here")
def test_a_slot_keeps_its_jobs_on_its_cores(tmp_path):
    core = max(os.sched_getaffinity(0))
    show = [sys.executable, "-c", "import os; print('on', sorted(os.sched_getaffinity(0)))"]
    before = os.sched_getaffinity(0)
    run(scheduler_lib.Job("a", tmp_path / "a", {"one": show}), slots=([core],))
    assert f"\non [{core}]\n" in (tmp_path / "a" / "log.txt").read_text()
    run(scheduler_lib.Job("b", tmp_path / "b", {"one": show}))
    assert f"\non {sorted(before)}\n" in (tmp_path / "b" / "log.txt").read_text()


# ---------------------------------------------------------------------------------------------
# Failures


def test_a_failure_is_kept_apart_and_retried_on_request(tmp_path):
    bad = make_job(
        tmp_path, "bad", one="echo one >> trace", two="[ -e cure ] || exit 3", three="echo >> trace"
    )
    good = make_job(tmp_path, "good", one="echo good >> trace")
    ended = run(bad, good)
    assert (ended["bad"].state, ended["bad"].failed) == (
        scheduler_lib.FAILED,
        "two: ended with status 3",
    )
    assert ended["bad"].finished == ["one"]
    assert ended["good"].state == scheduler_lib.DONE

    status = scheduler_lib.read_status(bad.folder)
    assert not scheduler_lib.is_due(bad, status, retry_failed=False)
    assert scheduler_lib.is_due(bad, status, retry_failed=True)
    assert not scheduler_lib.is_due(good, scheduler_lib.read_status(good.folder), retry_failed=True)

    (tmp_path / "cure").touch()
    again = run(bad)["bad"]
    assert (again.state, again.failed, again.attempts) == (scheduler_lib.DONE, "", 2)
    assert read_trace(tmp_path) == ["one", "good"]  # and an empty line: nothing was repeated
    assert again.seconds > status.seconds


def test_a_command_that_was_killed_has_failed(tmp_path):
    assert (
        run(make_job(tmp_path, "a", one="kill -9 $$"))["a"].failed == "one: was killed by SIGKILL"
    )


def test_a_command_that_does_not_exist_has_failed(tmp_path):
    job = scheduler_lib.Job("a", tmp_path / "a", {"one": [str(tmp_path / "nothing")]})
    assert run(job)["a"].state == scheduler_lib.FAILED
    assert "No such file" in local_processes.read_tail(job.folder / "log.txt", 3)


# ---------------------------------------------------------------------------------------------
# The end of the scheduler

_DRIVER = """
import json, pathlib, sys
from atommem_jax.sweeps import local_processes
from atommem_jax.sweeps import scheduler as scheduler_lib
from atommem_jax.sweeps.local_processes import LocalProcesses
folder, commands = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
with scheduler_lib.lock(folder) as descriptor, scheduler_lib.interruptible():
    driver = LocalProcesses([[]], keep_open=[descriptor])
    scheduler_lib.Scheduler(driver).run([scheduler_lib.Job("a", folder / "a", commands)])
"""


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(
            signal.SIGKILL,
            marks=pytest.mark.skipif(sys.platform != "linux", reason="orphans go on here"),
        ),
    ],
)
def test_commands_end_with_the_scheduler_and_the_next_one_goes_on(tmp_path, number):
    job = make_job(
        tmp_path,
        "a",
        one="echo one >> trace",
        two="[ -e go ] || { touch waiting; exec sleep 1000; }; echo two >> trace",
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(tmp_path), json.dumps(job.commands)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    while driver.poll() is None and not (tmp_path / "waiting").exists():
        time.sleep(0.01)
    # In use, by the scheduler and by its command.
    holder = f"is in use by process {driver.pid} on .* since .*; it, or a run that it has left"
    with pytest.raises(ConfigError, match=holder), scheduler_lib.lock(tmp_path, patience=0.0):
        pass
    driver.send_signal(number)
    _, printed = driver.communicate()
    assert driver.returncode != 0, printed
    status = scheduler_lib.read_status(job.folder)
    assert (status.state, status.finished) == (scheduler_lib.STARTED, ["one"])

    (tmp_path / "go").touch()
    with scheduler_lib.lock(tmp_path, patience=60.0):  # free: the command has ended too
        assert run(job)["a"].state == scheduler_lib.DONE
    assert read_trace(tmp_path) == ["one", "two"]
    assert scheduler_lib.read_status(job.folder).attempts == 2


def test_an_error_in_a_report_ends_the_commands(tmp_path):
    def refuse(change, job, status):
        if change == scheduler_lib.DONE:
            raise RuntimeError("no")

    sleeper = make_job(tmp_path, "b", one="exec sleep 1000")
    with scheduler_lib.lock(tmp_path) as descriptor:
        driver = LocalProcesses([UNCONFINED, UNCONFINED], keep_open=[descriptor])
        with pytest.raises(RuntimeError, match="no"):
            scheduler_lib.Scheduler(driver).run(
                [make_job(tmp_path, "a", one=":"), sleeper], on_change=refuse
            )
    with scheduler_lib.lock(tmp_path, patience=60.0):
        assert scheduler_lib.read_status(sleeper.folder).state == scheduler_lib.STARTED


# ---------------------------------------------------------------------------------------------
# Logs


def test_a_tail_shows_progress_bars_as_they_were_left(tmp_path):
    log = tmp_path / "log.txt"
    assert local_processes.read_tail(log, 3) == local_processes.read_progress(log) == ""
    log.write_text("begin\nsft:   1%|   | 1/90\rsft:  10%|#  | 9/90\n\nsft step 9: EM 0.1\n")
    assert local_processes.read_tail(log, 2) == "sft:  10%|#  | 9/90\nsft step 9: EM 0.1"
    assert local_processes.read_progress(log) == "sft 10%"
    with log.open("a") as file:
        file.write("\rrl:   0%|  | 0/36\rrl:  50%|# | 18/36")
    assert local_processes.read_progress(log) == "rl 50%"
    assert local_processes.read_tail(log, 1) == "rl:  50%|# | 18/36"


# ---------------------------------------------------------------------------------------------
# The machine


def test_jobs_share_the_cores_evenly(monkeypatch):
    share = local_processes.share_cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 4, 6, 7}, raising=False)
    monkeypatch.setattr(local_processes, "has_accelerator", lambda: False)
    assert share(1, runs=9) == [[]]
    assert share(0, runs=9) == share(2, runs=9) == [[0, 2], [4, 6, 7]]
    assert share(8, runs=3) == [[0], [2, 4], [6, 7]]
    assert share(7, runs=9) == [[0], [2], [4], [6], [7], [0], [2]]
    monkeypatch.setattr(local_processes, "has_accelerator", lambda: True)
    assert share(0, runs=9) == [[]]
    assert share(2, runs=9) == [[], []]


def test_there_is_no_accelerator_here():
    assert not local_processes.has_accelerator()


def test_the_commit_is_marked_where_files_differ_from_it(tmp_path):
    assert local_processes.read_commit(tmp_path) == ""

    def git(*arguments: str) -> None:
        named = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *named, *arguments], check=True)

    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message=first")
    commit = local_processes.read_commit(tmp_path)
    assert len(commit) >= 7
    (tmp_path / "file").write_text("2")
    assert local_processes.read_commit(tmp_path) == f"{commit}+"
