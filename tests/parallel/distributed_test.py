"""Training in several processes: like in one, one writes, and what is refused.

Real processes on loopback, of which every run has four devices, so that all share compiled
programs. Each waits for conditions, not for a time, and is killed when its test ends. Stopped,
killed and resumed they are in tests/runs/resume_test.py.
"""

import jax
import numpy as np
import pytest

from tests.helpers import processes, runs

pytestmark = pytest.mark.processes

SFT_END = runs.SFT_STEPS
END = runs.SFT_STEPS + runs.RL_STEPS
# Largest difference of a metric between topologies, relative to the larger of it and one: sums over
# devices are added in another order. Measured were 1e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process."""
    return processes.share_run(tmp_path_factory, "one")


@pytest.fixture(scope="module")
def pair(alone, tmp_path_factory):
    """A run of two processes."""
    del alone  # it has filled the compilation cache
    return processes.share_run(tmp_path_factory, "two", 2)


# ---------------------------------------------------------------------------------------------
# Undisturbed


def test_two_processes_train_like_one(alone, pair):
    workdir, other = pair.workdir, alone.workdir
    lines = [(record["step"], record["stage"]) for record in runs.read_repeatable(workdir)]
    assert {step for step, stage in lines if stage != "eval"} == set(range(1, END + 1))
    assert len(lines) == len(set(lines)), "a line was written by both"
    gap, where = runs.find_largest_difference(
        runs.read_repeatable(workdir), runs.read_repeatable(other)
    )
    print(f"largest difference {gap:.1e}: {where}")
    assert gap < TOLERANCE, where
    # What the rollouts wrote is the same to the token.
    for mine, theirs in zip(
        runs.read_repeatable(workdir), runs.read_repeatable(other), strict=True
    ):
        for name in ("tokens", "turns", "em", "teacher_em", "kept", "f1", "episodes", "questions"):
            assert mine.get(name) == theirs.get(name)
    for step in (SFT_END, END):
        mine, theirs = runs.read_state(workdir, step), runs.read_state(other, step)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), mine, theirs
        )


def test_only_the_first_process_writes(pair):
    workdir, _, printed = pair
    assert printed.count(f"{processes.DEVICES} cpu devices") == 1
    assert printed.count(f"sft step {SFT_END}: EM") == 1
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert runs.list_steps(workdir)[-1] == END
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def test_adapters_beside_a_frozen_base_train_as_in_one_process(alone, tmp_path_factory, tmp_path):
    settings = {"init_from": alone.workdir} | runs.ADAPTERS
    one = processes.share_run(tmp_path_factory, "adapters", **settings).workdir
    two = tmp_path / "two"
    with processes.start_training(two, alone.data_root, 2, **settings) as group:
        group.finish()
    gap, where = runs.find_largest_difference(runs.read_repeatable(two), runs.read_repeatable(one))
    print(f"largest difference {gap:.1e}: {where}")
    assert gap < TOLERANCE, where
    states = [runs.read_state(workdir, END) for workdir in (one, two)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *states)


# ---------------------------------------------------------------------------------------------
# Rows, notes and errors


# Two processes with two devices each. On the mesh `across` the batch axes run within a process, so
# both hold all rows; on `along` they run over all devices, in an order that mixes the processes.
_ROWS = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from atommem_jax.parallel import host_batches, processes, rules

index, address = int(sys.argv[1]), sys.argv[2]
processes.initialise(address, 2, index, heartbeat_timeout_seconds=3)
jax.config.update("jax_num_cpu_devices", 2)
a, b, c, d = jax.devices()
def make_mesh(devices, shape):
    return Mesh(np.array(devices).reshape(shape), rules.AXES, axis_types=(AxisType.Auto,) * 3)

across = make_mesh([a, c, b, d], (2, 1, 2))
along = make_mesh([a, c, d, b], (2, 2, 1))
whole = np.arange(24.0, dtype=np.float32).reshape(8, 3)
mixed = [[0, 1, 6, 7], [2, 3, 4, 5]][index]
for mesh, rows in ((across, list(range(8))), (along, mixed)):
    key = host_batches.replicate(jax.random.key(3), mesh)
    np.testing.assert_array_equal(host_batches.process_rows(mesh, 8), rows)
    assert host_batches.whole_size(mesh, len(rows)) == 8
    with jax.transfer_guard("disallow"):
        placed = host_batches.shard({"x": whole[rows]}, mesh)
        heat = host_batches.replicate(np.float32(2.0), mesh)
        doubled = jax.jit(lambda tree, heat: tree["x"] * heat)(placed, heat)
    assert placed["x"].shape == (8, 3)
    np.testing.assert_array_equal(host_batches.fetch(doubled), 2 * whole[rows])
    np.testing.assert_array_equal(host_batches.gather_rows(whole[rows], mesh), whole)
    assert host_batches.first_rows(placed, 8) is placed
    five = host_batches.fetch(host_batches.first_rows(placed, 5))["x"]
    np.testing.assert_array_equal(five, whole[:5])
    drawn = jax.device_get(jax.random.normal(key, ()))
    assert drawn == jax.random.normal(jax.random.key(3), ())
try:
    host_batches.process_rows(make_mesh([a, b], (2, 1, 1)), 8)
    assert index == 0
except ValueError as error:
    assert index == 1 and "process 1 has none of the 2 devices" in str(error)

assert processes.gather({"index": index, "text": "\u00e9"}) == [
    {"index": 0, "text": "\u00e9"}, {"index": 1, "text": "\u00e9"}]
assert processes.main_first(lambda: index) == index
print("all checked", flush=True)
try:
    if index == 1:
        raise RuntimeError("process 1 has a problem of its own")
    processes.gather("the other will not come")
except BaseException as error:
    processes.leave(error)
"""


def test_rows_follow_the_mesh_and_an_error_of_one_ends_both(tmp_path):
    address = f"localhost:{processes.find_port()}"
    commands = [["-c", _ROWS, str(index), address] for index in range(2)]
    with processes.Group(commands, tmp_path, "rows") as group, processes.timed() as seconds:
        first, second = group.wait()
        assert group.printed().count("all checked") == 2, group.output()
        assert second == 1
        assert first != 0, "its peer fell silent"
        assert "process 1 has a problem of its own" in group.logs[1].read_text()
        assert seconds() < 60


# ---------------------------------------------------------------------------------------------
# What is refused


def test_the_process_with_another_config_is_named(tmp_path):
    def each(index):
        return ["--config.rl.temperature=0.5"] if index == 1 else []

    workdir = tmp_path / "run"
    with processes.start_training(workdir, tmp_path / "data", 2, each=each) as group:
        assert group.wait() == [2, 2], group.output()
        printed = group.printed()
    assert printed.count("config.rl.temperature is 0.5 on process 1 (host ") == 2
    assert printed.count("but 1.0 on process 0 (host ") == 2
    assert "Traceback" not in printed
    assert not workdir.exists(), "something was made before the check"
    assert not (tmp_path / "data").exists(), "something was made before the check"
