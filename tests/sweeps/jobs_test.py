"""From runs to jobs: what was started with another config, elsewhere, or is there already."""

import dataclasses
import pathlib

import pytest

from atommem_jax.config import ConfigError
from atommem_jax.sweeps import jobs as jobs_lib
from atommem_jax.sweeps import plan as plan_lib
from atommem_jax.sweeps import scheduler
from tests.conftest import ROOT
from tests.helpers import sweeps
from tests.helpers.sweeps import load_committed


@pytest.fixture
def make_sweep(tmp_path):
    """Writes and loads a config that adds these runs to the tiny config."""
    return sweeps.make_maker(tmp_path)


def make_job(plan: plan_lib.Sweep, folder: pathlib.Path, shares=([],)) -> scheduler.Job:
    run = plan.runs[0]
    status = scheduler.read_status(folder / run.name)
    return jobs_lib.make_local_job(
        plan, run, status, workdir=folder, data_root=folder / "data", shares=shares
    )


def make_vm_job(
    plan: plan_lib.Sweep, folder: pathlib.Path, run=0, *, bucket="b", evaluate=False
) -> scheduler.Job:
    return jobs_lib.make_vm_job(
        plan,
        plan.runs[run],
        scheduler.read_status(folder / plan.runs[run].name),
        workdir=folder,
        data_root=pathlib.Path("runs/data"),
        checkout=ROOT,
        bucket=bucket,
        evaluate=evaluate,
    )


def test_runs_are_chosen_by_name(make_sweep):
    plan = make_sweep([("a/seed0", {}), ("a/seed1", {"seed": 1}), ("b", {"seed": 2})])
    assert [run.name for run in jobs_lib.choose(plan, "")] == ["a/seed0", "a/seed1", "b"]
    assert [run.name for run in jobs_lib.choose(plan, "^a|x")] == ["a/seed0", "a/seed1"]
    with pytest.raises(ConfigError, match="--only=c fits no run; there are: a/seed0, a/seed1, b"):
        jobs_lib.choose(plan, "c")


def test_a_run_that_was_started_with_another_config_is_refused(make_sweep, tmp_path):
    job = make_job(make_sweep([("a", {"memory.slots": 6})]), tmp_path)
    scheduler.Status(state=scheduler.DONE, about=dict(job.about)).write(job.folder)
    make_job(make_sweep([("a", {"memory.slots": 6})]), tmp_path)
    with pytest.raises(ConfigError) as caught:
        make_job(make_sweep([("a", {"memory.slots": 7})]), tmp_path)
    message = str(caught.value)
    assert "run 'a' was started with another config: memory.slots=7 (was 6)." in message
    assert "another --workdir" in message
    assert f"delete {tmp_path / 'a'}" in message


def test_a_run_of_an_older_version_goes_on_under_new_names(make_sweep, tmp_path):
    plan = make_sweep([("a", {"memory.slots": 6})])
    job = make_job(plan, tmp_path)
    old = dict(job.about["config"])
    for section in ("sft", "rl.ppo"):
        old[f"{section}.eighths"] = old.pop(f"{section}.length_buckets")
    old["rollout.group"] = old.pop("rollout.microbatch")
    for path in ("protocol.free_text", "mesh.slices", "model.attention"):
        del old[path]  # fields of later versions
    scheduler.Status(about={**job.about, "config": old}).write(job.folder)
    assert make_job(plan, tmp_path) == job
    old["rollout.group"] = 2
    scheduler.Status(about={**job.about, "config": old}).write(job.folder)
    with pytest.raises(ConfigError, match=r"another config: rollout.microbatch=\d+ \(was 2\)\. "):
        make_job(plan, tmp_path)


def test_a_run_goes_on_with_the_devices_that_it_began_with(make_sweep, tmp_path):
    plan = make_sweep([("a", {"mesh.data": 0})])
    job = make_job(plan, tmp_path, shares=([0], [1]))
    assert "--config.mesh.cpu_devices=1" in job.commands["train"]
    scheduler.Status(about=dict(job.about)).write(job.folder)
    again = make_job(plan, tmp_path)
    assert again.commands == job.commands
    assert "--config.mesh.cpu_devices=2" in make_job(plan, tmp_path / "other").commands["train"]


def test_further_evaluations_of_a_finished_run_are_made(make_sweep, tmp_path):
    job = make_job(make_sweep([("a", {})], "[{'episodes': 8}]"), tmp_path)
    status = scheduler.Status(
        state=scheduler.DONE, finished=list(job.commands), about=dict(job.about)
    )
    more = make_job(make_sweep([("a", {})], "[{'episodes': 8}, {'step': 'sft'}]"), tmp_path)
    assert not scheduler.is_due(job, status, retry_failed=False)
    assert scheduler.is_due(more, status, retry_failed=False)
    assert [key for key in more.commands if key not in status.finished] == [
        key for key in more.commands if '"sft"' in key
    ]


# ---------------------------------------------------------------------------------------------
# On VMs


def test_a_job_for_a_vm_has_the_paths_of_the_vm(tmp_path):
    plan = load_committed("main_table")
    places = {run.name: place for place, run in enumerate(plan.runs)}
    folder = tmp_path / "table"
    job = make_vm_job(plan, folder, places["no_memory/seed0"])
    assert list(job.commands) == ["train"]
    command = job.commands["train"]
    assert command[:3] == [
        "python",
        "experiments/train.py",
        "--config=experiments/configs/main_table.py",
    ]
    assert {"--workdir=gs://b/sweeps/table/no_memory/seed0", "--data_root=runs/data"} <= {*command}
    start = f"learned/seed0/checkpoints/{plan.runs[0].config.sft.steps}"
    assert f"--config.init_from=gs://b/sweeps/table/{start}" in command
    assert (job.folder, job.after) == (folder / "no_memory/seed0", ("learned/seed0",))
    assert not [word for word in command if str(ROOT) in word or "@" in word]
    (evaluation,) = [
        command
        for key, command in make_vm_job(
            plan, folder, places["learned/seed1"], evaluate=True
        ).commands.items()
        if key != "train" and '"last"' in key
    ]
    assert "--checkpoint=gs://b/sweeps/table/learned/seed1" in evaluation


def test_a_config_that_the_vms_do_not_have_is_refused(make_sweep, tmp_path):
    with pytest.raises(ConfigError, match=f"few.py lies outside {ROOT}: the VMs have what is"):
        make_vm_job(make_sweep([("a", {})]), tmp_path)


def test_a_run_on_a_vm_cannot_change_once_it_was_started(tmp_path):
    plan = load_committed("main_table")
    job = make_vm_job(plan, tmp_path)
    status = scheduler.Status(about=dict(job.about))
    status.write(job.folder)
    make_vm_job(plan, tmp_path, bucket="other")  # no command of it was started
    dataclasses.replace(status, at_work="train").write(job.folder)
    assert make_vm_job(plan, tmp_path).commands == job.commands
    with pytest.raises(ConfigError, match="run 'learned/seed0' was started with another command"):
        make_vm_job(plan, tmp_path, bucket="other")
    with pytest.raises(ConfigError, match=r"was started with another config: sft\.steps=901 "):
        make_vm_job(load_committed("main_table", **{"sft.steps": 901}), tmp_path)


def test_a_run_does_not_move_away_from_its_checkpoints(tmp_path):
    plan = load_committed("main_table")
    here, there = make_job(plan, tmp_path / "a"), make_vm_job(plan, tmp_path / "b")
    for job in (here, there):
        scheduler.Status(about=dict(job.about)).write(job.folder)
    with pytest.raises(ConfigError, match="started by processes of a machine, and would go on on"):
        make_vm_job(plan, tmp_path / "a")
    with pytest.raises(ConfigError, match="started on TPU VMs, and would go on by processes of"):
        make_job(plan, tmp_path / "b")
