"""Parameters split over processes: killed, gone on with on fewer processes, and started from.

Every run has the same four devices but the last, and none of them comes to the end of its stage:
what is tested are saves and restores, and the programs of one stage are enough to compile.
"""

import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from tests.helpers import processes, runs

pytestmark = pytest.mark.processes

STEPS = 60  # more than any run here takes
LONGEST = 36  # steps that the others are compared with
SETTINGS = {
    "sft__steps": STEPS,
    "sft__save_every": 3,
    "sft__eval_every": STEPS,
    "rl__steps": 0,
    "tokenizer__vocab_size": 456,  # divides over mesh.tensor; of itself it would be 459
    # Less to compile; none of it concerns what is tested here.
    "sft__optimizer__name": "adamw",
    "model__remat": False,
}
SPLIT = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}
WHOLE = {"mesh__data": 2, "mesh__fsdp": 1, "mesh__tensor": 1}
# As in distributed_test: sums over devices are added in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the data, and of what the processes print."""
    return tmp_path_factory.mktemp("split")


@pytest.fixture(scope="module")
def start(folder):
    """Starts `count` processes that train in a workdir on a mesh."""

    def start(count: int, workdir: pathlib.Path, mesh: dict[str, int]) -> processes.Group:
        devices = mesh["mesh__data"] * mesh["mesh__fsdp"] * mesh["mesh__tensor"]
        arguments = [
            f"--workdir={workdir}",
            f"--data_root={folder / 'data'}",
            *runs.make_flags(**SETTINGS, **mesh, mesh__cpu_devices=devices // count),
        ]
        commands = processes.train_commands(count, arguments)
        return processes.Group(commands, folder, f"{workdir.name}_{count}")

    return start


def last_logged(workdir: pathlib.Path) -> int:
    return max(record["step"] for record in runs.read_repeatable(workdir))


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """Workdir of a run of one process with the four devices, once it has logged `LONGEST` steps."""
    workdir = tmp_path_factory.mktemp("reference")
    with start(1, workdir, SPLIT) as group:
        group.wait_until(runs.has_logged(workdir, LONGEST, "sft"), "the last step compared")
    return workdir


@pytest.fixture(scope="module")
def killed(start, reference, tmp_path_factory):
    """Four processes, killed in a step and then in a save.

    (workdir, lines logged before the first kill, the step saved before it).
    """
    del reference  # it has filled the compilation cache, and made the data
    workdir = tmp_path_factory.mktemp("killed")
    with start(4, workdir, SPLIT) as group:

        def is_past_a_save() -> bool:
            saved = runs.list_steps(workdir) if (workdir / "checkpoints").exists() else []
            return bool(saved) and runs.has_logged(workdir, saved[-1] + 1, "sft")()

        group.wait_until(is_past_a_save, "a step after a save")
        group.signal(1, signal.SIGKILL)
        assert 0 not in group.wait(), group.output()
    before, saved = runs.read_repeatable(workdir), runs.list_steps(workdir)[-1]

    with start(4, workdir, SPLIT) as group:
        group.wait_until(runs.has_logged(workdir, before[-1]["step"] + 1, "sft"), "a new step")
        while True:
            complete = runs.list_steps(workdir)[-1]
            group.wait_until(runs.is_saving(workdir, complete), "a save")
            group.signal(0, signal.SIGSTOP)
            if runs.is_saving(workdir, complete)():  # and it stays so: process 0 ends a save
                break
            group.signal(0, signal.SIGCONT)
        group.signal(0, signal.SIGKILL)
        assert 0 not in group.wait(), group.output()
        assert f"resuming {workdir} at step {saved}" in group.printed()
    return workdir, before, saved


def test_every_process_saves_its_part_of_the_parameters(killed):
    workdir, _, _ = killed
    state = workdir / "checkpoints" / str(runs.list_steps(workdir)[-1]) / "state"
    assert len(list(state.glob("ocdbt.process_*"))) == 4
    specs = {tuple(json.loads(where)["partition_spec"]) for where in read_shardings(state)}
    assert ("tensor", "fsdp") in specs  # the embedding, and its moments
    assert {(None, "fsdp", "tensor"), (None, "tensor", "fsdp")} <= specs  # and the layers'


def read_shardings(state: pathlib.Path) -> list[str]:
    return list(json.loads((state / "_sharding").read_text()).values())


def test_four_processes_repeat_the_same_bits_after_a_kill(killed):
    workdir, before, saved = killed
    again = runs.read_repeatable(workdir)
    assert before[-1]["step"] > saved, "the kill came too late to test anything"
    assert again[: len(before)] == before
    assert [record["step"] for record in again] == list(range(1, len(again) + 1))


def test_two_processes_then_one_on_another_mesh_continue_the_curve(
    start, killed, reference, tmp_path
):
    workdir, _, _ = killed
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    assert list((tmp_path / "checkpoints").glob("*tmp*")), "the kill was not in a save"
    for count, mesh in ((2, SPLIT), (1, WHOLE)):
        saved = runs.list_steps(tmp_path)[-1]
        with start(count, tmp_path, mesh) as group:
            # What the run before has logged of later steps is dropped at the restore.
            group.wait_until(lambda g=group: "resuming" in g.printed(), "the restore")
            group.wait_until(runs.has_logged(tmp_path, saved + 1, "sft"), "a step")
            group.signal(count - 1, signal.SIGTERM)
            printed = group.finish()
        assert f"resuming {tmp_path} at step {saved} of {STEPS}" in printed
        assert f"SIGTERM: saved step {last_logged(tmp_path)} of {STEPS}" in printed
        assert not list((tmp_path / "checkpoints").glob("*tmp*"))
    ours = runs.read_repeatable(tmp_path)
    assert [record["step"] for record in ours] == list(range(1, len(ours) + 1))
    theirs = runs.read_repeatable(reference)[: len(ours)]
    gap, where = runs.find_largest_difference(ours, theirs)
    print(f"largest difference {gap:.1e}: {where}")
    assert gap < TOLERANCE, where
    assert ours[-1]["loss"] < ours[0]["loss"]


# ---------------------------------------------------------------------------------------------
# config.init_from


# Two processes with two devices each, on the mesh of the run that they start from.
_START = """
import ast
import sys
import jax
import numpy as np
from atommem_jax.agent import build
from atommem_jax.parallel import processes
from atommem_jax.runs import stages
from atommem_jax.tasks import encoding
from atommem_jax.config import parse
from atommem_jax.runs import resume
from experiments.configs import synthetic

index, address, settings, data_root, out = int(sys.argv[1]), *sys.argv[2:]
processes.initialise(address, 2, index, heartbeat_timeout_seconds=10)
config = synthetic.get_config()
config.update_from_flattened_dict(ast.literal_eval(settings))
config = parse(config)
mesh = build.make_mesh(config)
dataset = build.load_dataset(config, data_root)
tokenizer = build.fit_tokenizer(config, dataset)
parts = build.build(config, tokenizer)
examples = dataset.split("train")
stage = stages.Rl(parts, mesh, examples, encoding.fit_shape(examples, tokenizer))
params = stage.start(resume.load_initial(config, tokenizer))["train"].params

kernels = jax.tree.leaves(params["layers"])
assert sum(leaf.addressable_shards[0].data.size * 4 == leaf.size for leaf in kernels) >= 7
assert not params["embedder"]["embedding"].is_fully_addressable
whole = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, jax.P()))(params)
leaves = jax.tree.leaves(jax.device_get(whole))
np.savez(f"{out}/{index}.npz", *leaves)
"""


def test_rl_starts_from_parameters_that_were_split(folder, killed, tmp_path):
    workdir, _, _ = killed
    step = runs.list_steps(workdir)[-1]
    settings = SETTINGS | SPLIT | {"sft__steps": 0, "rl__steps": 1, "mesh__cpu_devices": 2}
    settings["init_from"] = str(workdir / "checkpoints" / str(step))
    # Not as a ConfigDict: tests.runs would give the processes eight devices each.
    paths = runs.OVERRIDES | {name.replace("__", "."): value for name, value in settings.items()}
    address = f"localhost:{processes.find_port()}"
    arguments = [address, repr(paths), str(folder / "data"), str(tmp_path)]
    commands = [["-c", _START, str(index), *arguments] for index in range(2)]
    with processes.Group(commands, folder, "start") as group:
        group.finish()
    saved = jax.tree.leaves(runs.read_state(workdir, step)["train"]["params"])
    for index in range(2):
        found = list(np.load(tmp_path / f"{index}.npz").values())
        runs.assert_same(found, saved)
