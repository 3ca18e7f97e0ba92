"""The script of sweeps: one sweep for real, one of the version before, and mistakes."""

import csv
import json

import jax
import pytest

from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.sweeps import scheduler
from tests.helpers import forks, runs
from tests.helpers.sweeps import write_config

MAIN = "--config=experiments/configs/main_table.py"


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
# For real


@pytest.mark.long
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
    assert message in forks.refuse("sweep.py", *arguments)
