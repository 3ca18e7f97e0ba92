"""Training in several processes: like one, through kills and SIGTERM, and onto other topologies.

Real processes on loopback, of which every run has four devices, so that all share compiled
programs. Each waits for conditions, not for a time, and is killed when its test ends.
"""

import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from atommem_jax.metrics import MetricWriter
from tests.helpers import processes, runs

pytestmark = pytest.mark.processes

DEVICES = 4
SFT_STEPS, RL_STEPS = 6, 4
END = SFT_STEPS + RL_STEPS
SETTINGS = {
    "mesh__data": 0,
    "sft__steps": SFT_STEPS,
    "rl__steps": RL_STEPS,
    # Fewer programs to compile; neither concerns what is tested here.
    "rl__ppo__kl_coef": 0.0,
    "rl__ppo__minibatches": 1,
}
# Largest difference of a metric between topologies, relative to the larger of it and one: sums over
# devices are added in another order. Measured were 5e-7, between 1 x 4 and 2 x 2 devices and after
# 2 x 2, 4 x 1 and 1 x 2 in turn.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the data, and of what the processes print."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def start(folder):
    """Starts `count` processes that train in a workdir."""

    def start(count: int, workdir: pathlib.Path, *supervisor: str, each=lambda i: (), **settings):
        settings = SETTINGS | {"mesh__cpu_devices": DEVICES // count} | settings
        arguments = [
            f"--workdir={workdir}",
            f"--data_root={folder / 'data'}",
            *runs.make_flags(**settings),
        ]
        commands = processes.train_commands(count, arguments, each)
        if supervisor:
            commands = processes.supervised(commands, *supervisor)
        return processes.Group(commands, folder, f"{workdir.name}_{count}")

    return start


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """Workdir of a run of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    with start(1, workdir) as group:
        group.finish()
    return workdir


@pytest.fixture(scope="module")
def pair(start, alone, tmp_path_factory):
    """(workdir, printed) of a run of two processes that nothing disturbed."""
    del alone  # it has filled the compilation cache
    workdir = tmp_path_factory.mktemp("pair")
    with start(2, workdir) as group:
        printed = group.finish()
    return workdir, printed


# ---------------------------------------------------------------------------------------------
# Undisturbed


def test_two_processes_train_like_one(alone, pair):
    workdir, _ = pair
    lines = [(record["step"], record["stage"]) for record in runs.read_repeatable(workdir)]
    assert {step for step, stage in lines if stage != "eval"} == set(range(1, END + 1))
    assert len(lines) == len(set(lines)), "a line was written by both"
    gap, where = runs.find_largest_difference(
        runs.read_repeatable(workdir), runs.read_repeatable(alone)
    )
    print(f"largest difference {gap:.1e}: {where}")
    assert gap < TOLERANCE, where
    # What the rollouts wrote is the same to the token.
    for mine, theirs in zip(
        runs.read_repeatable(workdir), runs.read_repeatable(alone), strict=True
    ):
        for name in ("tokens", "turns", "em", "teacher_em", "kept", "f1", "episodes", "questions"):
            assert mine.get(name) == theirs.get(name)
    for step in (SFT_STEPS, END):
        mine, theirs = runs.read_state(workdir, step), runs.read_state(alone, step)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), mine, theirs
        )


def test_only_the_first_process_writes(pair):
    workdir, printed = pair
    assert printed.count(f"{DEVICES} cpu devices") == 1
    assert printed.count(f"sft step {SFT_STEPS}: EM") == 1
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert runs.list_steps(workdir)[-1] == END
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def test_adapters_beside_a_frozen_base_train_as_in_one_process(start, alone, tmp_path):
    settings = {
        "init_from": alone,
        "lora__rank": 2,
        "sft__steps": 2,
        "rl__steps": 2,
    }
    workdirs = [tmp_path / "one", tmp_path / "two"]
    for count, workdir in enumerate(workdirs, start=1):
        with start(count, workdir, **settings) as group:
            group.finish()
    one, two = map(runs.read_repeatable, workdirs)
    gap, where = runs.find_largest_difference(two, one)
    print(f"largest difference {gap:.1e}: {where}")
    assert gap < TOLERANCE, where
    states = [runs.read_state(workdir, 4) for workdir in workdirs]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *states)


def kill_and_wait_for_the_other(group: processes.Group, index: int) -> None:
    """Kills one of two supervised processes; the other must end in bounded time."""
    lost, other = (processes.find_child(group.pid(i)) for i in (index, 1 - index))
    with processes.timed() as seconds:
        processes.send(lost, signal.SIGKILL)
        group.wait_until(
            lambda: processes.find_child(group.pid(1 - index)) != other, "the other process ended"
        )
        assert seconds() < processes.HEARTBEAT + 15


# ---------------------------------------------------------------------------------------------
# Disturbed, and restarted on the same topology


def test_sigterm_and_kills_change_nothing_under_supervisors(start, pair, tmp_path):
    reference, _ = pair
    shorter = {"rl__steps": 0}  # SFT does not depend on what follows it
    options = ("--max_restarts=2", "--backoff_seconds=0.1")

    # SIGTERM to one supervisor: its process tells the other, all save the same step and end well.
    with start(2, tmp_path, *options, **shorter) as group:
        group.wait_until(runs.has_logged(tmp_path, 1, "sft"), "step 1")
        group.signal(1, signal.SIGTERM)
        printed = group.finish()
    (stopped,) = runs.list_steps(tmp_path)[-1:]
    assert f"SIGTERM: saved step {stopped} of {SFT_STEPS}" in printed
    assert "restart 1" not in printed
    assert 1 <= stopped < SFT_STEPS, "the signal came too late to test anything"

    with start(2, tmp_path, *options, **shorter) as group:
        # In the middle of a step: process 1 is lost.
        group.wait_until(runs.has_logged(tmp_path, stopped + 1, "sft"), "the step after")
        kill_and_wait_for_the_other(group, 1)
        # In the middle of a save: process 0 is lost, and the coordinator with it.
        while True:
            group.wait_until(runs.is_saving(tmp_path, runs.list_steps(tmp_path)[-1]), "a save")
            main = processes.find_child(group.pid(0))
            processes.send(main, signal.SIGSTOP)
            if runs.is_saving(tmp_path, stopped)():  # and it stays so: process 0 ends a save
                break
            processes.send(main, signal.SIGCONT)
        kill_and_wait_for_the_other(group, 0)
        printed = group.finish()
    assert printed.count("the command was killed by SIGKILL") == 2
    assert printed.count(f"resuming {tmp_path} at step") >= 2

    runs.assert_same(runs.read_state(tmp_path, SFT_STEPS), runs.read_state(reference, SFT_STEPS))
    expected = [r for r in runs.read_repeatable(reference) if r["step"] <= SFT_STEPS]
    assert runs.read_repeatable(tmp_path) == expected
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


# ---------------------------------------------------------------------------------------------
# Other topologies


def test_two_then_four_then_one_process_continue_the_same_curve(start, pair, tmp_path):
    reference, _ = pair
    # As two processes left it after SFT.
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    for step in runs.list_steps(tmp_path):
        if step > SFT_STEPS:
            shutil.rmtree(tmp_path / "checkpoints" / str(step))
    with MetricWriter(tmp_path) as writer:
        writer.resume(SFT_STEPS)

    with start(4, tmp_path) as group:
        group.wait_until(runs.has_logged(tmp_path, SFT_STEPS + 1, "rl"), "a step of RL")
        group.signal(3, signal.SIGTERM)
        printed = group.finish()
    stopped = runs.list_steps(tmp_path)[-1]
    assert f"resuming {tmp_path} at step {SFT_STEPS}" in printed
    assert f"SIGTERM: saved step {stopped} of {END}" in printed
    assert SFT_STEPS < stopped < END, "the signal came too late to test anything"

    with start(1, tmp_path, mesh__cpu_devices=2) as group:
        assert f"resuming {tmp_path} at step {stopped}" in group.finish()
    gap, where = runs.find_largest_difference(
        runs.read_repeatable(tmp_path), runs.read_repeatable(reference)
    )
    print(f"largest difference {gap:.1e}: {where}")
    assert gap < TOLERANCE, where


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


def test_rows_follow_the_mesh_and_an_error_of_one_ends_both(folder):
    address = f"localhost:{processes.find_port()}"
    commands = [["-c", _ROWS, str(index), address] for index in range(2)]
    with processes.Group(commands, folder, "rows") as group, processes.timed() as seconds:
        first, second = group.wait()
        assert group.printed().count("all checked") == 2, group.output()
        assert second == 1
        assert first != 0, "its peer fell silent"
        assert "process 1 has a problem of its own" in group.logs[1].read_text()
        assert seconds() < 60


# ---------------------------------------------------------------------------------------------
# What is refused


def test_the_process_with_another_config_is_named(start, tmp_path):
    def each(index):
        return ["--config.rl.temperature=0.5"] if index == 1 else []

    with start(2, tmp_path, each=each) as group:
        assert group.wait() == [2, 2], group.output()
        printed = group.printed()
    assert printed.count("config.rl.temperature is 0.5 on process 1 (host ") == 2
    assert printed.count("but 1.0 on process 0 (host ") == 2
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir()), "something was made before the check"
