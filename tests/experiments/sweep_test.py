"""Sweeps: shares of the machine, runs that are there already, and one sweep for real."""

import csv
import json
import os
import pathlib
import sys

import jax
import pytest
from absl import flags as absl_flags

from atommem_jax.config import ConfigError
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.sweeps import plan as plan_lib
from atommem_jax.sweeps import scheduler
from experiments import sweep
from tests.helpers import runs, sweeps
from tests.helpers.sweeps import write_config

MAIN = "--config=experiments/configs/main_table.py"


@pytest.fixture
def make_sweep(tmp_path):
    """Writes and loads a config that adds these runs to the tiny config."""
    return sweeps.make_maker(tmp_path)


def test_jobs_share_the_cores_evenly(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 4, 6, 7}, raising=False)
    monkeypatch.setattr(sweep, "has_accelerator", lambda: False)
    assert sweep.plan_slots(1, runs=9) == [[]]
    assert sweep.plan_slots(0, runs=9) == sweep.plan_slots(2, runs=9) == [[0, 2], [4, 6, 7]]
    assert sweep.plan_slots(8, runs=3) == [[0], [2, 4], [6, 7]]
    assert sweep.plan_slots(7, runs=9) == [[0], [2], [4], [6], [7], [0], [2]]
    monkeypatch.setattr(sweep, "has_accelerator", lambda: True)
    assert sweep.plan_slots(0, runs=9) == [[]]
    assert sweep.plan_slots(2, runs=9) == [[], []]


def test_there_is_no_accelerator_here():
    assert not sweep.has_accelerator()


def test_scripts_share_a_cache_that_jax_locks(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    monkeypatch.setenv("ATOMMEM_CACHE", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        mesh_lib.prepare_devices(1)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        assert jax.config.jax_compilation_cache_max_size > 0
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# ---------------------------------------------------------------------------------------------
# Runs that are there already


def make_job(plan: plan_lib.Sweep, folder: pathlib.Path, slots=([],)) -> scheduler.Job:
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS([sys.argv[0]])
    return sweep.make_job(plan, plan.runs[0], folder, slots)


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


def test_a_run_goes_on_with_the_devices_that_it_began_with(make_sweep, tmp_path):
    plan = make_sweep([("a", {"mesh.data": 0})])
    job = make_job(plan, tmp_path, slots=([0], [1]))
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
# For real


def test_a_sweep_of_a_good_and_a_bad_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    config = write_config(
        folder / "pair.py",
        [("good/seed1", {"seed": 1}), ("bad", {"rollout.response_length": 14})],
        "[{'splits': ['test_1x'], 'episodes': 8}]",
    )
    workdir = folder / "runs"
    arguments = [f"--config={config}", f"--workdir={workdir}", f"--data_root={folder / 'data'}"]

    printed = runs.run("sweep.py", *arguments, "--jobs=2", "--dry_run")
    assert "good/seed1: pending" in printed
    assert "train.py" in printed
    assert not workdir.exists()

    printed = runs.run("sweep.py", *arguments, "--jobs=2", status=1)
    assert "FAILED  bad  train: ended with status 2" in printed
    assert (
        "rollout.response_length=14: a reading turn of the teacher" in printed
    )  # the end of its log
    assert "sweep.py: failed: bad; look at" in printed
    summary = json.loads((workdir / "good/seed1/eval/test_1x_t1_step12.json").read_text())
    lines = list(csv.DictReader((workdir / "table.csv").open()))
    assert [(line["run"], line["state"], line["temperature"]) for line in lines] == [
        ("good/seed1", "done", "0"),
        ("good/seed1", "done", "1"),
        ("bad", "failed", ""),
    ]
    assert float(lines[1]["f1"]) == summary["f1"]
    assert lines[1]["episodes"] == "8"
    assert float(lines[1]["cpu_seconds"]) > 1
    assert "1 of 2 runs done" in (workdir / "table.md").read_text()

    # Nothing is left to do, and what there is stays.
    before = (workdir / "good/seed1/status.json").read_bytes()
    printed = runs.run("sweep.py", *arguments, "--jobs=1", status=1)
    assert "0 of 2 runs to do" in printed
    assert (workdir / "good/seed1/status.json").read_bytes() == before
    assert scheduler.read_status(workdir / "bad").attempts == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=w"], "synthetic.py does not define sweep(add); pass a config that does"),
        ([MAIN, "--workdir=w", "--only=none"], "--only=none fits no run; there are: learned/seed0"),
        ([MAIN, "--workdir=w", "--only=("], "--only=(: missing )"),
        ([MAIN, "--workdir=w/none", "--table_only"], "does not exist: nothing was run there"),
        (
            [MAIN, "--workdir=w", "--config.memory.shown=6"],
            "run 'learned/seed0': memory.shown=6 is more",
        ),
        ([MAIN, "--workdir=w", "--config.memory.show=6"], "did you mean 'memory.shown'"),
    ],
)
def test_a_mistake_ends_with_status_2(arguments, message):
    printed = runs.run("sweep.py", *arguments, status=2)
    assert message in printed
    assert "Traceback" not in printed
