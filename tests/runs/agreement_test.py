"""What processes tell each other before they start, without starting any."""

import ast
import json
import pathlib

import jax
import numpy as np
import pytest

from atommem_jax.config import ConfigError, StoreError, flatten
from atommem_jax.parallel import processes
from atommem_jax.runs import agreement
from tests.helpers import runs

NAMES = [f"process {i} (host h{i})" for i in range(4)]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1, 1, 1, 1], None),
        ([1, 1, 2, 1], "x is 2 on process 2 (host h2), but 1 on 3 others"),
        (["a", "b", "b", "b"], 'x is "a" on process 0 (host h0), but "b" on 3 others'),
        ([1, 2], "x is 2 on process 1 (host h1), but 1 on process 0 (host h0)"),
        (
            [1, 2, 1, 3],
            "x is 2 on process 1 (host h1), 3 on process 3 (host h3), but 1 on 2 others",
        ),
        ([1, None], "x is null on process 1 (host h1), but 1 on process 0 (host h0)"),
    ],
)
def test_the_odd_process_is_named(values, sentence):
    facts = [{"same": 0} | ({} if value is None else {"x": value}) for value in values]
    found = processes.find_differences(NAMES[: len(values)], facts)
    assert found == ([] if sentence is None else [sentence])


def test_a_difference_is_an_error_on_every_process(monkeypatch):
    monkeypatch.setattr(
        processes, "gather", lambda mine: [mine, ["far", {"jax": "0.1", "tuple": [1, 2]}]]
    )
    message = r"differ: jax is \"0.1\" on process 1 \(host far\), but \"0.2\" on .*\. Do this"
    with pytest.raises(ConfigError, match=message):
        processes.check_same({"jax": "0.2", "tuple": (1, 2)}, "Do this")
    processes.check_same({"jax": "0.1", "tuple": (1, 2)}, "Do this")


def test_the_software_is_described_by_versions_and_bytes(tmp_path):
    folder = tmp_path / "code"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.py").write_text("x = 1\n")
    (folder / "notes.txt").write_text("not code")
    first = processes.describe_software([folder])
    assert first["jax"] == jax.__version__
    assert first["numpy"] == np.__version__
    (folder / "notes.txt").write_text("still not code")
    assert processes.describe_software([folder]) == first
    (folder / "inner" / "a.py").write_text("x = 2\n")
    second = processes.describe_software([folder])
    assert {name for name in first if first[name] != second[name]} == {"code of code/"}


def test_every_field_of_a_config_is_compared():
    config = runs.make_config()
    values = flatten(config, "config.")
    assert values["config.rl.ppo.group_size"] == config.rl.ppo.group_size
    assert values["config.task.scales"] == config.task.get("scales")
    assert not any(isinstance(value, dict) for value in values.values())
    agreement.check_same_run(config)  # a process agrees with itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1",), "--num_processes and --process_id missing"),
        ((None, 2, 0), "--coordinator_address missing"),
        (("host", 2, 0), r"--coordinator_address=host: give host:port"),
        (("host:1", 0, 0), "--num_processes=0: must be at least 1"),
        (("host:1", 2, 2), r"--process_id=2: --num_processes=2 allows 0 to 1"),
    ],
)
def test_flags_that_cannot_be_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        processes.initialise(*arguments)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(("hosts", "joins"), [(1, False), (4, True)])
def test_the_hosts_of_a_tpu_slice_find_each_other(monkeypatch, hosts, joins):
    joined = []
    monkeypatch.setattr(processes, "_count_tpu_hosts", lambda: hosts)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: joined.append(given))
    processes.initialise(heartbeat_timeout_seconds=7)
    expected = {"heartbeat_timeout_seconds": 7, "initialization_timeout": 300}
    assert joined == ([expected] if joins else [])


def test_the_hosts_of_a_tpu_slice_are_counted(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    assert processes._count_tpu_hosts() == 1  # the tests run on a CPU
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    assert processes._count_tpu_hosts() == 1, "JAX_PLATFORMS=cpu says not to use the TPU"
    platforms = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", "tpu,cpu")
        assert processes._count_tpu_hosts() == 8
    finally:
        jax.config.update("jax_platforms", platforms)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("task.name is wrong"), ConfigError),  # status 2: no supervisor goes on
        (StoreError("task.name is wrong"), StoreError),  # status 1: all of them do
        (ValueError("task.name is wrong"), processes.DistributedError),
    ],
)
def test_what_process_0_cannot_make_is_an_error_of_all(monkeypatch, error, kind):
    def make():
        made.append(True)
        raise error

    def gather(mine):
        notes.append(json.dumps(mine))
        return [json.loads(note) for note in notes]

    made, notes = [], []
    monkeypatch.setattr(processes, "gather", gather)
    with pytest.raises(type(error), match=r"^task.name is wrong"):
        processes.main_first(make)
    monkeypatch.setattr(processes, "is_main", lambda: False)
    with pytest.raises(kind, match=r"^process 0: task.name is wrong") as found:
        processes.main_first(make)
    assert type(found.value) is kind
    assert made == [True], "the others do not try what has failed"


def test_collectives_are_not_called_by_one_process_only():
    """No call that waits for the others stands where only some processes come."""
    waiting = {
        *(
            "gather",
            "check_same",
            "main_first",
            "preempted",
            "gather_rows",
            "first_rows",
            "restore",
        ),
        *(
            "save",
            "set_aside",
            "latest_step",
            "all_steps",
            "validate",
            "rollout",
            "update",
            "evaluate",
            "wait",
        ),
    }
    root = pathlib.Path(processes.__file__).parents[2]
    guarded = []
    for path in [*root.glob("atommem_jax/**/*.py"), *root.glob("experiments/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.If) and "is_main" in ast.unparse(node.test):
                inside = [*node.body, *node.orelse]
            elif isinstance(node, ast.IfExp) and "is_main" in ast.unparse(node.test):
                inside = [node.body, node.orelse]
            else:
                continue
            calls = [c for part in inside for c in ast.walk(part) if isinstance(c, ast.Call)]
            names = {ast.unparse(call.func).rpartition(".")[2] for call in calls}
            guarded.append(path.name)
            assert not names & waiting, (path, node.lineno, names & waiting)
    assert {"train.py", "processes.py", "checkpoint.py"} <= set(guarded)
