"""Kill and resume: stopped or killed at any moment, a run goes on as if nothing had been.

One matrix. Its rows are how a run is laid out, `ROWS`; what happens to each is SIGTERM, kill -9 in
a step, kill -9 in a save and, below, a start on other processes and devices. Real processes on
loopback: each waits for conditions, not for a time, and is killed when its test ends.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from atommem_jax.metrics import MetricWriter
from tests.helpers import processes, runs

pytestmark = pytest.mark.processes

SFT_END = runs.SFT_STEPS
END = runs.SFT_STEPS + runs.RL_STEPS
# Largest difference of a metric between topologies, relative to the larger of it and one: sums over
# devices are added in another order. Measured were 1e-6.
TOLERANCE = 1e-5
BOUND = processes.HEARTBEAT + 15  # seconds within which all end once one is lost

# Split parameters: what is tested are saves and restores, and no run comes to the end of its stage,
# so that the programs of one stage are enough to compile.
SPLIT_STEPS = 400  # more than any run here takes, until SIGTERM has come round to all of them
LONGEST = 100  # steps that the others are compared with
SPLIT_SETTINGS = {
    "sft__steps": SPLIT_STEPS,
    "sft__save_every": 3,
    "sft__eval_every": SPLIT_STEPS,
    "rl__steps": 0,
    "tokenizer__vocab_size": 456,  # divides over mesh.tensor; of itself it would be 459
    # Less to compile; none of it concerns what is tested here.
    "sft__optimizer__name": "adamw",
    "model__remat": False,
}
SPLIT = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}
WHOLE = {"mesh__data": 2, "mesh__fsdp": 1, "mesh__tensor": 1}


@pytest.fixture(scope="module")
def share(tmp_path_factory) -> Callable[[str], processes.Shared]:
    """The runs that nothing disturbs, by name."""

    def share(name: str) -> processes.Shared:
        if name == "two":
            share("one")  # it fills the compilation cache
            return processes.share_run(tmp_path_factory, "two", 2)
        if name == "adapters":
            settings = {"init_from": share("one").workdir} | runs.ADAPTERS
            return processes.share_run(tmp_path_factory, "adapters", **settings)
        if name == "split":  # one process with the four devices
            settings = SPLIT_SETTINGS | SPLIT | {"sft__save_every": SPLIT_STEPS}
            reached = lambda workdir: runs.has_logged(workdir, LONGEST, "sft")  # noqa: E731
            return processes.share_run(tmp_path_factory, "split", until=reached, **settings)
        return processes.share_run(tmp_path_factory, "one")

    return share


# ---------------------------------------------------------------------------------------------
# The matrix

# A moment of a workdir; the number is the last step that was logged when the processes started.
Moment = Callable[[pathlib.Path, int], bool]


def after(step: int, stage: str) -> Moment:
    return lambda workdir, before: runs.has_logged(workdir, step, stage)()


def at_once(workdir: pathlib.Path, before: int) -> bool:
    return True


def after_another_step(workdir: pathlib.Path, before: int) -> bool:
    return runs.has_logged(workdir, before + 1, "sft")()


def after_a_save(workdir: pathlib.Path, before: int) -> bool:
    saved = list_saved(workdir)
    return bool(saved) and runs.has_logged(workdir, saved[-1] + 1, "sft")()


@dataclasses.dataclass(frozen=True)
class Kill:
    """kill -9 of the process `index` at a moment, or in the first save that is seen after it."""

    index: int
    moment: Moment
    in_save: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """How a run is laid out, and when it is disturbed.

    Attributes:
      reference: name of the undisturbed run.
      kills: in this order; after each the run is started again.
      stop: the process that gets SIGTERM before them, after the first step; None for none.
      supervised: each process is started again by a supervisor of its own.
      ends: the steps of which the states are compared; the last is that of the run.
    """

    reference: str
    kills: Sequence[Kill]
    count: int = 1
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stop: int | None = 0
    supervised: bool = False
    ends: Sequence[int] = (SFT_END, END)


ROWS = {
    "one process": Row(
        reference="one",
        # SFT is over, its last save is not, or barely; then in a save of RL.
        kills=(Kill(0, after(SFT_END, "eval")), Kill(0, after(SFT_END + 2, "rl"), in_save=True)),
    ),
    "two processes": Row(
        reference="two",
        count=2,
        settings={"rl__steps": 0},  # SFT does not depend on what follows it
        stop=1,
        # Process 1 is lost; then process 0, and the coordinator with it.
        kills=(Kill(1, after_another_step), Kill(0, at_once, in_save=True)),
        supervised=True,
        ends=(SFT_END,),
    ),
    "four processes, split parameters": Row(
        reference="split",
        count=4,
        settings=SPLIT_SETTINGS | SPLIT,
        stop=None,  # the two processes and the one that go on from here, below, get it
        kills=(Kill(1, after_a_save), Kill(0, after_another_step, in_save=True)),
        ends=(),
    ),
    "adapters": Row(
        reference="adapters",
        settings=runs.ADAPTERS,  # and a base that was moved
        stop=None,
        kills=(Kill(0, after(SFT_END + 1, "rl"), in_save=True),),
    ),
}


@dataclasses.dataclass
class Disturbed:
    """A run that has been through what happens to its row.

    Attributes:
      logged: all that was logged before each kill.
      saved: the last step saved before each kill.
    """

    row: Row
    workdir: pathlib.Path
    reference: processes.Shared
    logged: list[list[dict]] = dataclasses.field(default_factory=list)
    saved: list[int] = dataclasses.field(default_factory=list)


@pytest.fixture(scope="module")
def disturb(tmp_path_factory, share) -> Callable[[str], Disturbed]:
    """Takes a run through a row; several tests look at what is left of it."""
    done: dict[str, Disturbed] = {}

    def disturb(name: str) -> Disturbed:
        if name not in done:
            row, folder = ROWS[name], tmp_path_factory.mktemp("disturbed")
            run = Disturbed(row, folder / "run", share(row.reference))
            settings = dict(row.settings)
            if row.reference == "adapters":
                settings["init_from"] = folder / "elsewhere"
                shutil.copytree(share("one").workdir, settings["init_from"])
            stop_and_kill(run, settings)
            done[name] = run
        return done[name]

    return disturb


def stop_and_kill(run: Disturbed, settings: Mapping[str, Any]) -> None:
    """What happens to a run, and what must be seen of it at once."""
    row, workdir = run.row, run.workdir
    options = ("--max_restarts=2", "--backoff_seconds=0.1") if row.supervised else ()

    def start() -> processes.Group:
        return processes.start_training(
            workdir, run.reference.data_root, row.count, supervisor=options, **settings
        )

    if row.stop is not None:
        with start() as group:
            stop(group, row, workdir)
    with contextlib.ExitStack() as stack:
        group, resumes = None, 0
        for kill in row.kills:
            if group is None or not row.supervised:
                group, resumes = stack.enter_context(start()), 0
            before = last_logged(workdir)
            resumes += bool(list_saved(workdir))
            # What an earlier save has left behind is gone by then.
            wait_for_resumes(group, resumes)
            group.wait_until(lambda k=kill, b=before: k.moment(workdir, b), "the moment to kill")
            kill_one(group, kill, run)
        if row.supervised:
            printed = group.finish()
            assert printed.count("the command was killed by SIGKILL") == len(row.kills)
            assert printed.count(f"resuming {workdir} at step") >= len(row.kills)
    if row.ends and not row.supervised:
        with start() as group:
            assert f"resuming {workdir} at step {list_saved(workdir)[-1]}" in group.finish()


def wait_for_resumes(group: processes.Group, count: int) -> None:
    group.wait_until(lambda: group.printed().count("resuming") >= count, "the restore")


def stop(group: processes.Group, row: Row, workdir: pathlib.Path) -> None:
    """SIGTERM to one process or its supervisor: all save the same step, and end well."""
    group.wait_until(runs.has_logged(workdir, 1, "sft"), "step 1")
    group.signal(row.stop, signal.SIGTERM)
    printed = group.finish()
    stopped = list_saved(workdir)[-1]
    assert f"SIGTERM: saved step {stopped} of {row.ends[-1]}; the same command goes on" in printed
    assert "restart 1" not in printed
    assert 1 <= stopped < SFT_END, "the signal came too late to test anything"


def kill_one(group: processes.Group, kill: Kill, run: Disturbed) -> None:
    """Kills one process; all others must end by themselves in bounded time."""

    def find(index: int) -> int | None:
        pid = group.pid(index)
        return processes.find_child(pid) if run.row.supervised else pid

    pids = [find(index) for index in range(run.row.count)]
    while kill.in_save:
        complete = list_saved(run.workdir)[-1]
        group.wait_until(runs.is_saving(run.workdir, complete), "a save")
        processes.send(pids[kill.index], signal.SIGSTOP)
        if runs.is_saving(run.workdir, complete)():  # and it stays so: process 0 ends a save
            break
        processes.send(pids[kill.index], signal.SIGCONT)
    with processes.timed() as seconds:
        processes.send(pids[kill.index], signal.SIGKILL)
        if run.row.supervised:
            group.wait_until(
                lambda: all(find(i) != pid for i, pid in enumerate(pids)), "the others ended"
            )
            assert seconds() < BOUND
        else:
            assert 0 not in group.wait(BOUND), group.output()
    run.logged.append(runs.read_repeatable(run.workdir))
    run.saved.append(list_saved(run.workdir)[-1])
    if kill.in_save and not run.row.supervised:
        assert list_unfinished(run.workdir), "the kill was not in a save"


def list_saved(workdir: pathlib.Path) -> list[int]:
    return runs.list_steps(workdir) if (workdir / "checkpoints").exists() else []


def list_unfinished(workdir: pathlib.Path) -> list[pathlib.Path]:
    return list((workdir / "checkpoints").glob("*tmp*"))


def last_logged(workdir: pathlib.Path) -> int:
    if not (workdir / "metrics.jsonl").exists():
        return 0
    return max((record["step"] for record in runs.read_repeatable(workdir)), default=0)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.ends])
def test_a_run_stopped_and_killed_again_and_again_ends_with_the_same_bits(disturb, name):
    run = disturb(name)
    ours, theirs = run.workdir, run.reference.workdir
    # Optimiser, counters and the frozen reference are compared too.
    for step in run.row.ends:
        runs.assert_same(runs.read_state(ours, step), runs.read_state(theirs, step))
    assert not list_unfinished(ours)
    end = run.row.ends[-1]
    records = runs.read_repeatable(ours)
    assert records == [r for r in runs.read_repeatable(theirs) if r["step"] <= end]
    lines = [(record["step"], record["stage"]) for record in records]
    assert len(lines) == len(set(lines))
    assert {step for step, stage in lines if stage != "eval"} == set(range(1, end + 1))


def test_four_processes_repeat_the_same_bits_after_a_kill(disturb):
    run = disturb("four processes, split parameters")
    before, saved = run.logged[0], run.saved[0]
    again = runs.read_repeatable(run.workdir)
    assert before[-1]["step"] > saved, "the kill came too late to test anything"
    assert again[: len(before)] == before
    assert [record["step"] for record in again] == list(range(1, len(again) + 1))


# ---------------------------------------------------------------------------------------------
# Other topologies


def go_on(
    workdir: pathlib.Path,
    data_root: pathlib.Path,
    count: int,
    stage: str,
    last: int,
    early: bool = False,
    **settings,
) -> None:
    """A run that `count` processes go on with, until SIGTERM to the last of them after a step.

    With `early` the signal comes while they compile the first step.
    """
    saved = list_saved(workdir)[-1]
    with processes.start_training(workdir, data_root, count, **settings) as group:
        # What the run before has logged of later steps is dropped at the restore.
        wait_for_resumes(group, 1)
        if not early:
            group.wait_until(runs.has_logged(workdir, saved + 1, stage), "a step")
        group.signal(count - 1, signal.SIGTERM)
        printed = group.finish()
    stopped = list_saved(workdir)[-1]
    assert f"resuming {workdir} at step {saved} of {last}" in printed
    assert f"SIGTERM: saved step {stopped} of {last}" in printed
    assert saved < stopped == last_logged(workdir) < last, "the signal came too late"
    assert not list_unfinished(workdir)


def assert_same_curve(ours: Sequence[dict], theirs: Sequence[dict]) -> None:
    gap, where = runs.find_largest_difference(list(ours), list(theirs))
    print(f"largest difference {gap:.1e}: {where}")
    assert gap < TOLERANCE, where


def test_two_then_four_then_one_process_continue_the_same_curve(share, tmp_path):
    reference, data_root, _ = share("two")
    workdir = tmp_path / "run"
    # As two processes left it after SFT.
    shutil.copytree(reference, workdir)
    for step in runs.list_steps(workdir):
        if step > SFT_END:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    with MetricWriter(workdir) as writer:
        writer.resume(SFT_END)

    go_on(workdir, data_root, 4, "rl", END)
    stopped = list_saved(workdir)[-1]
    half = {"mesh__data": 2, "mesh__cpu_devices": 2}
    with processes.start_training(workdir, data_root, **half) as group:
        assert f"resuming {workdir} at step {stopped}" in group.finish()
    assert_same_curve(runs.read_repeatable(workdir), runs.read_repeatable(reference))


def test_split_parameters_go_on_in_two_processes_then_in_one_on_another_mesh(disturb, tmp_path):
    run = disturb("four processes, split parameters")
    workdir, data_root = tmp_path / "run", run.reference.data_root
    shutil.copytree(run.workdir, workdir)  # with what the kill in a save has left
    for count, mesh in ((2, SPLIT), (1, WHOLE)):
        settings = SPLIT_SETTINGS | mesh | {"mesh__cpu_devices": 2}
        saved = list_saved(workdir)[-1]
        go_on(workdir, data_root, count, "sft", SPLIT_STEPS, early=count > 1, **settings)
    ours, theirs = map(runs.read_repeatable, (workdir, run.reference.workdir))
    assert [record["step"] for record in ours] == list(range(1, len(ours) + 1))
    both = min(len(ours), len(theirs))
    assert saved < both, "nothing that the last has done is compared"
    assert_same_curve(ours[:both], theirs[:both])
    assert ours[-1]["loss"] < ours[0]["loss"]


# ---------------------------------------------------------------------------------------------
# What four processes have saved in parts


def test_every_process_saves_its_part_of_the_parameters(disturb):
    run = disturb("four processes, split parameters")
    state = run.workdir / "checkpoints" / str(run.saved[-1]) / "state"
    assert len(list(state.glob("ocdbt.process_*"))) == 4
    shardings = json.loads((state / "_sharding").read_text()).values()
    specs = {tuple(json.loads(where)["partition_spec"]) for where in shardings}
    assert ("tensor", "fsdp") in specs  # the embedding, and its moments
    assert {(None, "fsdp", "tensor"), (None, "tensor", "fsdp")} <= specs  # and the layers'


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


def test_rl_starts_from_parameters_that_were_split(disturb, tmp_path):
    run = disturb("four processes, split parameters")
    workdir, step = run.workdir, run.saved[-1]
    settings = SPLIT_SETTINGS | SPLIT | {"sft__steps": 0, "rl__steps": 1, "mesh__cpu_devices": 2}
    settings["init_from"] = str(workdir / "checkpoints" / str(step))
    # Not as a ConfigDict: tests.runs would give the processes eight devices each.
    paths = runs.OVERRIDES | {name.replace("__", "."): value for name, value in settings.items()}
    address = f"localhost:{processes.find_port()}"
    arguments = [address, repr(paths), str(run.reference.data_root), str(tmp_path)]
    commands = [["-c", _START, str(index), *arguments] for index in range(2)]
    with processes.Group(commands, tmp_path, "start") as group:
        group.finish()
    saved = jax.tree.leaves(runs.read_state(workdir, step)["train"]["params"])
    for index in range(2):
        found = list(np.load(tmp_path / f"{index}.npz").values())
        runs.assert_same(found, saved)
