"""Jobs on several TPU VMs: which of them takes which run, whatever happens."""

import functools
import pathlib
import re
import threading
from collections.abc import Sequence

import pytest

from atommem_jax.config import ConfigError
from atommem_jax.sweeps import scheduler, tpu_vms
from atommem_jax.sweeps.scheduler import DONE, FAILED, PENDING, STARTED, Job, Status


class Vms:
    """Actions on VMs on which a run needs three looks; things happen when they are told to."""

    def __init__(self):
        self.lock = threading.Lock()
        self.runs: dict[tuple[str, str], int] = {}  # looks that are left
        self.ended: dict[str, str] = {}  # job: how its commands end, 'done' if not named
        self.gone: set[str] = set()
        self.preempt: dict[str, str] = {}  # job: a VM that is lost while it is there
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
            job = next((job for job in self.preempt if f"-{job}-" in run), None)
            if job and self.preempt[job] == vm and (vm, run) in self.runs:
                del self.preempt[job]
                self.gone.add(vm)
            if vm in self.gone:
                return "gone"
            if (vm, run) not in self.runs:
                return "none"
            self.runs[vm, run] -= 1
            if self.runs[vm, run] > 0:
                return "running"
            return next((how for job, how in self.ended.items() if f"-{job}-" in run), "done")

    def stop(self, vm, run):
        self.runs.pop((vm, run), None)
        return vm not in self.gone

    def create(self, vm):
        self.gone.discard(vm)
        self.log.append((vm, "create", ""))
        return True


def make_jobs(folder: pathlib.Path, *names: str, after: tuple[str, ...] = ()) -> list[Job]:
    return [
        Job(
            name,
            folder / name,
            {"train": [name, "train"], "evaluate x": [name, "evaluate"]},
            after=after,
        )
        for name in names
    ]


def place(
    jobs: Sequence[Job], actions: Vms, vms=("va", "vb"), recreate=False, retry=False
) -> list[str]:
    """The lines that a user sees."""
    lines: list[str] = []
    driver = tpu_vms.TpuVms(
        "s", actions, vms, poll_seconds=0.002, recreate=recreate, report=lines.append
    )
    errors: list[BaseException] = []

    def run() -> None:
        try:
            scheduler.Scheduler(driver).run(
                jobs,
                retry_failed=retry,
                on_change=lambda *what: lines.append(scheduler.tell(*what)),
            )
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)  # a job that nobody looks after would be waited for without end
    assert not thread.is_alive(), lines
    if errors:
        raise errors[0]
    return lines


def read(job: Job) -> Status:
    status = scheduler.read_status(job.folder)
    assert status is not None
    return status


def states(jobs: Sequence[Job]) -> list[str]:
    statuses = [scheduler.read_status(job.folder) for job in jobs]
    return [status.state if status else PENDING for status in statuses]


def test_every_vm_takes_the_next_job_when_it_is_free(tmp_path):
    actions, jobs = Vms(), make_jobs(tmp_path, *"abcde")
    lines = place(jobs, actions)
    assert states(jobs) == [DONE] * 5
    assert {vm for vm, _, _ in actions.log} == {"va", "vb"}
    for name in "abcde":
        parts = [(vm, part) for vm, job, part in actions.log if job == name]
        assert [part for _, part in parts] == ["train", "evaluate"]
        ((vm, _), _) = parts
        assert {vm} == {vm for vm, _ in parts}
        assert lines.index(f"placed  {name} on {vm}") < lines.index(f"done    {name} on {vm}")


def test_a_failed_job_is_kept_apart_and_tried_again_when_asked(tmp_path):
    actions, jobs = Vms(), make_jobs(tmp_path, "a", "b", "c")
    actions.ended = {"b": "failed"}
    lines = place(jobs, actions)
    assert states(jobs) == [DONE, FAILED, DONE]
    assert read(jobs[1]).failed.startswith("train: failed on v")
    assert any(line.startswith("FAILED  b") for line in lines)
    before = len(actions.log)
    place(jobs, actions)  # stays apart
    assert (states(jobs), len(actions.log)) == ([DONE, FAILED, DONE], before)
    actions.ended = {}
    place(jobs, actions, retry=True)
    assert states(jobs) == [DONE] * 3


@pytest.mark.parametrize("recreate", [False, True])
def test_the_job_of_a_preempted_vm_goes_back_to_the_queue(tmp_path, recreate):
    actions, jobs = Vms(), make_jobs(tmp_path, "a", "b", "c", "d")
    actions.preempt = {"a": "va"}
    lines = place(jobs, actions, recreate=recreate)
    assert states(jobs) == [DONE] * 4
    assert read(jobs[0]).requeued == 1
    assert "queued  a again: va has lost it" in lines
    assert (("va", "create", "") in actions.log) == recreate
    anew = "is made anew" if recreate else "the other VMs do its work"
    assert any(line.startswith("va is gone") and anew in line for line in lines)


def test_a_vm_that_is_made_anew_is_waited_for(tmp_path):
    actions, jobs = Vms(), make_jobs(tmp_path, "a", "b")
    actions.preempt = {"a": "va"}
    place(jobs, actions, vms=["va"], recreate=True)
    assert states(jobs) == [DONE] * 2


def test_a_vm_that_cannot_be_made_anew_takes_no_more(tmp_path):
    actions, jobs = Vms(), make_jobs(tmp_path, "a", "b")
    actions.preempt = {"a": "va"}
    actions.create = lambda vm: False  # type: ignore[method-assign]
    lines = place(jobs, actions, vms=["va"], recreate=True)
    assert states(jobs) == [STARTED, PENDING]
    assert any("could not be made anew" in line for line in lines)


def test_without_a_vm_jobs_stay_in_the_queue_and_the_next_scheduler_takes_them(tmp_path):
    actions, jobs = Vms(), make_jobs(tmp_path, "a", "b")
    actions.preempt = {"a": "va"}
    place(jobs, actions, vms=["va"])
    assert states(jobs) == [STARTED, PENDING]
    place(jobs, actions, vms=["vb"])
    assert states(jobs) == [DONE] * 2


def test_a_vm_on_which_nothing_starts_spoils_no_job(tmp_path):
    actions, jobs = Vms(), make_jobs(tmp_path, "a", "b", "c")
    actions.broken = {"va"}
    lines = place(jobs, actions)
    assert states(jobs) == [DONE] * 3
    assert {vm for vm, _, _ in actions.log} == {"vb"}
    assert any("va takes no more runs" in line for line in lines)


class EndedError(Exception):
    pass


def test_a_new_scheduler_finds_what_is_at_work_and_does_not_start_it_twice(tmp_path):
    actions, jobs = Vms(), make_jobs(tmp_path, "a", "b")
    looks = iter(range(100))

    def die(vm, run):
        if next(looks) == 3:
            raise EndedError
        return Vms.look(actions, vm, run)

    actions.look = die  # type: ignore[method-assign]
    with pytest.raises(EndedError):
        place(jobs, actions, vms=["va"])
    status = read(jobs[0])
    assert (status.state, status.slot, status.at_work) == (STARTED, "va", "train")
    actions.look = functools.partial(Vms.look, actions)  # type: ignore[method-assign]
    # The VM of `a` is not listed any more: it is looked after all the same, and gets nothing new.
    place(jobs, actions, vms=["vb"])
    assert states(jobs) == [DONE] * 2
    assert actions.log.count(("va", "a", "train")) == 1
    assert ("vb", "b", "train") in actions.log
    assert not [entry for entry in actions.log if entry[:2] == ("va", "b")]


def test_the_end_of_an_earlier_attempt_is_not_that_of_this_one(tmp_path):
    """A VM remembers runs. Who ends before the launch must not take theirs for this one."""
    actions, jobs = Vms(), make_jobs(tmp_path, "a")
    actions.runs["va", tpu_vms.name_run("s", "a", "train")] = 0  # done there, says the VM

    def die(vm, run):
        raise EndedError

    actions.look = die  # type: ignore[method-assign]
    with pytest.raises(EndedError):
        place(jobs, actions, vms=["va"])
    assert (read(jobs[0]).slot, read(jobs[0]).at_work) == ("va", "")
    actions.look = functools.partial(Vms.look, actions)  # type: ignore[method-assign]
    place(jobs, actions, vms=["va"])
    assert actions.log[0] == ("va", "a", "train")


def test_a_vm_that_does_not_answer_keeps_its_job(tmp_path):
    actions, jobs = Vms(), make_jobs(tmp_path, "a")
    states_ = iter(["none", "running", "unreachable", "unreachable"])
    look = functools.partial(Vms.look, actions)
    actions.look = lambda vm, run: next(states_, None) or look(vm, run)  # type: ignore[method-assign]
    lines = place(jobs, actions, vms=["va", "vb"])
    assert lines.count("va is unreachable; a waits there") == 2
    assert [vm for vm, _, _ in actions.log] == ["va", "va"]


def test_a_mistake_in_the_settings_ends_the_scheduler(tmp_path):
    actions, jobs = Vms(), make_jobs(tmp_path, "a")

    def refuse(vm, run, command):
        raise ConfigError("ZONE=nowhere")

    actions.launch = refuse  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="ZONE=nowhere"):
        place(jobs, actions)


def test_a_job_waits_for_the_one_that_it_starts_from(tmp_path):
    actions = Vms()
    jobs = [*make_jobs(tmp_path, "a"), *make_jobs(tmp_path, "b", "c", after=("a",))]
    place(jobs, actions)
    order = [(job, part) for _, job, part in actions.log]
    assert order[:2] == [("a", "train"), ("a", "evaluate")]
    actions = Vms()
    actions.ended = dict.fromkeys("abc", "failed")  # b and c find no checkpoint
    other = tmp_path / "other"
    jobs = [*make_jobs(other, "a"), *make_jobs(other, "b", "c", after=("a",))]
    place(jobs, actions)
    assert states(jobs) == [FAILED] * 3
    assert read(jobs[1]).failed.endswith("; a, which it starts from, has failed")


def test_runs_on_a_vm_have_names_that_the_scripts_take():
    names = {
        tpu_vms.name_run("s", job, key)
        for job in ("learned/seed0", "learned_seed0", "x" * 99 + "/A=1")
        for key in ("train", 'evaluate {"step": 3}')
    }
    assert len(names) == 6
    for name in names:
        assert re.fullmatch("[a-z]([a-z0-9-]{0,58}[a-z0-9])?", name)
