"""What is due, the order, failures and lost slots, with a driver whose commands are looks at it."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from atommem_jax.config import ConfigError
from atommem_jax.sweeps import scheduler as scheduler_lib
from atommem_jax.sweeps.scheduler import DONE, FAILED, LOST, PLACED, STARTED, Job, Outcome, Status
from tests.conftest import ROOT
from tests.helpers.sweeps import OLD_STATUS


@dataclasses.dataclass
class Command:
    """A command at work; it ends at the look at which none is left."""

    name: str
    slot: str
    looks: int


class Looks:
    """A driver that ends every command after some looks, and as it was told to."""

    def __init__(self, *slots: str, lasting: bool = False):
        self.lasting = lasting
        self.ready = dict.fromkeys(slots or ("s",), True)
        self.ends: dict[str, list[Outcome]] = {}  # of a command, one an attempt; then DONE
        self.looks: dict[str, int] = {}  # of a command; 1 if not named
        self.log: list[tuple[str, str]] = []  # slot and command, as started
        self.found: list[str] = []
        self.stopped: list[str] = []

    def slots(self):
        return dict(self.ready)

    def start(self, task, slot):
        name = " ".join(task.command)
        (self.found if task.found else []).append(name)
        self.log.append((slot, name))
        task.mark()
        return Command(name, slot, self.looks.get(name, 1))

    def poll(self, handle):
        handle.looks -= 1
        if handle.looks > 0 or handle.name in self.stopped:
            return None
        ends = self.ends.get(handle.name)
        outcome = ends.pop(0) if ends else Outcome(DONE, cpu_seconds=2.0)
        if outcome.result == LOST:
            del self.ready[handle.slot]
        return outcome

    def stop(self, handles):
        self.stopped += [handle.name for handle in handles]

    def describe(self, handle):
        return f"{handle.looks} looks"


def make_jobs(folder: pathlib.Path, *names: str, after: tuple[str, ...] = ()) -> list[Job]:
    return [
        Job(name, folder / name, {"one": [name, "1"], "two": [name, "2"]}, {"made": "so"}, after)
        for name in names
    ]


def run(driver: Looks, jobs, retry_failed: bool = False):
    """What has happened, as (change, job), and the jobs that are left."""
    changes = []
    left = scheduler_lib.Scheduler(driver, commit=lambda: "abc").run(
        jobs,
        retry_failed=retry_failed,
        on_change=lambda change, job, status: changes.append((change, job.name)),
    )
    return changes, [job.name for job in left]


def read(job: Job) -> Status:
    status = scheduler_lib.read_status(job.folder)
    assert status is not None
    return status


# ---------------------------------------------------------------------------------------------
# The order


def test_commands_run_in_order_and_the_status_tells(tmp_path):
    driver, jobs = Looks(), make_jobs(tmp_path, "a", "in/b")
    assert scheduler_lib.read_status(jobs[0].folder) is None
    changes, left = run(driver, jobs)
    assert changes == [(PLACED, "a"), (DONE, "a"), (PLACED, "in/b"), (DONE, "in/b")]
    assert [name for _, name in driver.log] == ["a 1", "a 2", "in/b 1", "in/b 2"]
    assert left == []
    status = read(jobs[0])
    assert (status.state, status.finished, status.attempts) == (DONE, ["one", "two"], 1)
    assert (status.commit, status.about, status.cpu_seconds) == ("abc", {"made": "so"}, 4.0)
    assert (status.slot, status.at_work) == ("", "")  # nobody can find anything there later
    assert not list(tmp_path.rglob("*.tmp"))


def test_every_slot_takes_the_next_job_when_it_is_free(tmp_path):
    driver = Looks("s", "t")
    driver.looks = {"a 1": 9}
    run(driver, make_jobs(tmp_path, "a", "b", "c"))
    assert driver.log[:2] == [("s", "a 1"), ("t", "b 1")]
    assert driver.log.index(("t", "c 2")) < driver.log.index(("s", "a 2"))


def test_a_job_waits_for_another_and_lets_others_pass(tmp_path):
    driver = Looks("s", "t")
    driver.looks = {"first 1": 5}
    (wants,) = make_jobs(tmp_path, "wants", after=("first", "done long ago"))
    first, other = make_jobs(tmp_path, "first", "other")
    changes, _ = run(driver, [first, wants, other])
    ends = [name for change, name in changes if change == DONE]
    assert ends == ["other", "first", "wants"]
    assert changes.index((DONE, "first")) < changes.index((PLACED, "wants"))


def test_a_job_does_not_wait_for_one_that_has_failed(tmp_path):
    """What it starts from may be there all the same; if not, its own command says so at once."""
    driver = Looks("s", "t")
    driver.ends = {"bad 2": [Outcome(FAILED, "no")], "worse 1": [Outcome(FAILED, "no start")]}
    jobs = make_jobs(tmp_path, "bad") + make_jobs(tmp_path, "wants", "worse", after=("bad",))
    changes, _ = run(driver, jobs)
    assert {change for change in changes if change[0] != PLACED} == {
        (FAILED, "bad"),
        (DONE, "wants"),
        (FAILED, "worse"),
    }
    assert read(jobs[0]).failed == "two: no"
    assert read(jobs[2]).failed == "one: no start; bad, which it starts from, has failed"


# ---------------------------------------------------------------------------------------------
# Failures


def test_a_failure_is_kept_apart_and_retried_on_request(tmp_path):
    driver = Looks()
    driver.ends = {"bad 2": [Outcome(FAILED, "ended with status 3", 1.0)]}
    bad, good = jobs = make_jobs(tmp_path, "bad", "good")
    run(driver, jobs)
    before = read(bad)
    assert (before.state, before.failed) == (FAILED, "two: ended with status 3")
    assert (before.finished, before.cpu_seconds) == (["one"], 3.0)
    assert read(good).state == DONE
    assert scheduler_lib.find_due(jobs, retry_failed=False) == []
    assert scheduler_lib.find_due(jobs, retry_failed=True) == [bad]

    assert run(driver, jobs) == ([], [])
    driver.log.clear()
    assert run(driver, jobs, retry_failed=True)[0] == [(PLACED, "bad"), (DONE, "bad")]
    assert driver.log == [("s", "bad 2")]  # what was finished is not repeated
    after = read(bad)
    assert (after.state, after.failed, after.attempts) == (DONE, "", 2)
    assert (after.seconds > before.seconds, after.cpu_seconds) == (True, 5.0)


def test_a_new_command_makes_a_job_due_again(tmp_path):
    driver, (job,) = Looks(), make_jobs(tmp_path, "a")
    run(driver, [job])
    more = dataclasses.replace(job, commands={**job.commands, "three": ["a", "3"]})
    assert run(driver, [more])[0] == [(PLACED, "a"), (DONE, "a")]
    assert [name for _, name in driver.log] == ["a 1", "a 2", "a 3"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_makes_the_driver_take_leave(tmp_path, error):
    driver = Looks("s", "t")
    driver.looks = {"b 1": 1000}
    jobs = make_jobs(tmp_path, "a", "b")

    def refuse(change, job, status):
        if change == DONE:
            raise error("no")

    with pytest.raises(error):
        scheduler_lib.Scheduler(driver).run(jobs, on_change=refuse)
    assert driver.stopped == ["b 1"]
    assert (read(jobs[0]).state, read(jobs[1]).state) == (DONE, STARTED)
    assert read(jobs[1]).seconds > 0
    assert scheduler_lib.find_due(jobs, retry_failed=False) == [jobs[1]]


# ---------------------------------------------------------------------------------------------
# Slots that come and go, and commands that last


def test_a_job_that_loses_its_slot_goes_back_to_its_place_in_the_queue(tmp_path):
    driver = Looks("s", "t", lasting=True)
    driver.ends = {"a 2": [Outcome(LOST)]}
    driver.looks = {"b 1": 9}
    jobs = make_jobs(tmp_path, "a", "b", "c")
    changes, left = run(driver, jobs)
    assert changes[2:4] == [(LOST, "a"), (DONE, "b")]
    assert [entry for entry in driver.log if "1" not in entry[1]][:2] == [
        ("s", "a 2"),
        ("t", "b 2"),
    ]
    assert driver.log[4:] == [("t", "a 2"), ("t", "c 1"), ("t", "c 2")]
    assert left == []
    status = read(jobs[0])
    assert (status.state, status.attempts, status.requeued, status.slot) == (DONE, 2, 1, "t")


def test_without_a_slot_jobs_are_left_and_the_next_scheduler_takes_them(tmp_path):
    driver = Looks("s", lasting=True)
    driver.ends = {"a 1": [Outcome(LOST)]}
    jobs = make_jobs(tmp_path, "a", "b")
    assert run(driver, jobs)[1] == ["a", "b"]
    assert read(jobs[0]).state == STARTED
    assert scheduler_lib.read_status(jobs[1].folder) is None
    assert run(Looks("t", lasting=True), jobs)[1] == []


def test_a_slot_that_is_not_ready_is_waited_for(tmp_path):
    driver, looks = Looks("s"), iter([False] * 3)
    driver.slots = lambda: {"s": next(looks, True)}
    assert run(driver, make_jobs(tmp_path, "a"))[1] == []
    assert next(looks, None) is None


@pytest.mark.parametrize("lasting", [True, False])
def test_commands_that_last_are_found_in_their_slot(tmp_path, lasting):
    first, jobs = Looks("s", lasting=lasting), make_jobs(tmp_path, "a", "b")
    first.looks = {"a 1": 1000}

    def interrupt(change, job, status):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scheduler_lib.Scheduler(first).run(jobs, on_change=interrupt)
    assert read(jobs[0]).at_work == "one"
    # The slot is not offered any more: what is at work there is looked after, and nothing more.
    second = Looks("t", lasting=lasting)
    run(second, jobs)
    assert second.found == (["a 1"] if lasting else [])
    where = {name: slot for slot, name in second.log}
    assert where == {
        "a 1": "s" if lasting else "t",
        "a 2": "s" if lasting else "t",
        "b 1": "t",
        "b 2": "t",
    }
    assert read(jobs[0]).attempts == (1 if lasting else 2)


# ---------------------------------------------------------------------------------------------
# What is on disk, and what a user sees


def test_an_older_status_is_read_and_its_job_goes_on(tmp_path):
    job = Job("a", tmp_path / "a", {"train": ["a", "train"], "evaluate x": ["a", "evaluate"]})
    job.folder.mkdir()
    (job.folder / scheduler_lib.STATUS_FILE).write_text(OLD_STATUS)
    status = read(job)
    assert (status.state, status.attempts, status.seconds) == (FAILED, 2, 61.25)
    assert status.about["config"]["task.scales"] == [1, 2]
    for driver in (Looks(), Looks(lasting=True)):
        (job.folder / scheduler_lib.STATUS_FILE).write_text(OLD_STATUS)
        assert run(driver, [job]) == ([], [])
        assert run(driver, [job], retry_failed=True)[0] == [(PLACED, "a"), (DONE, "a")]
        assert driver.log == [("s", "a evaluate")]
        assert (read(job).attempts, read(job).cpu_seconds) == (3, 120.5)


def test_a_plan_names_states_and_what_is_left(tmp_path):
    jobs = make_jobs(tmp_path, "new", "half", "placed", "bad", "done")
    statuses = {
        "new": None,
        "half": Status(finished=["one"]),
        "placed": Status(slot="va", at_work="one"),
        "bad": Status(state=FAILED),
        "done": Status(state=DONE, finished=["one", "two"]),
    }
    plan = scheduler_lib.describe_plan(jobs, statuses, retry_failed=False)
    assert plan.splitlines() == [
        *("new: pending", "    new 1", "    new 2"),
        *("half: started", "    half 2"),
        *("placed: started on va", "    placed 1", "    placed 2"),
        "bad: failed, nothing to do",
        "done: done, nothing to do",
    ]


def test_what_happens_is_told_in_a_line(tmp_path):
    (job,) = make_jobs(tmp_path, "a")
    here, there = Status(failed="one: no"), Status(slot="va", failed="one: no")
    told = [
        [scheduler_lib.tell(change, job, status) for change in (PLACED, DONE, FAILED)]
        for status in (here, there)
    ]
    assert told == [
        ["placed  a", "done    a", "FAILED  a  one: no"],
        ["placed  a on va", "done    a on va", "FAILED  a  one: no"],
    ]
    assert scheduler_lib.tell(LOST, job, there) == "queued  a again: va has lost it"


# ---------------------------------------------------------------------------------------------
# The lock

_HOLDER = """
import pathlib, sys
from atommem_jax.sweeps import scheduler
with scheduler.lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_on_a_folder_is_told_who_the_first_is(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)],
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    for _ in range(2):  # who is refused leaves the name as it is
        with (
            pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on .* \(-c "),
            scheduler_lib.lock(tmp_path, patience=0.0),
        ):
            pass
    holder.communicate("")
    with scheduler_lib.lock(tmp_path, patience=0.0):
        assert f"process {holder.pid} " not in (tmp_path / ".lock").read_text()


def test_a_status_has_the_fields_that_older_versions_read(tmp_path):
    Status(about={"x": 1}).write(tmp_path)
    saved = json.loads((tmp_path / scheduler_lib.STATUS_FILE).read_text())
    assert list(json.loads(OLD_STATUS)) == list(saved)[: len(json.loads(OLD_STATUS))]
