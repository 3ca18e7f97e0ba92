"""Metrics survive NaN, kills and resumes; both files hold the same numbers."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from atommem_jax import metrics
from atommem_jax.config import ConfigError
from atommem_jax.metrics import MetricWriter, read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent


def read_events(workdir):
    """Returns the events of all files: records of length, its checksum, bytes, their checksum."""
    events = []
    for path in sorted((workdir / "tensorboard").glob("events*")):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            payload = content[12 : 12 + size]
            assert int.from_bytes(content[12 + size : 16 + size], "little") == masked_crc32c(
                payload
            )
            events.append(event_pb2.Event.FromString(payload))
            content = content[16 + size :]
    return events


def test_json_and_tensorboard_hold_what_was_written(tmp_path):
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(1, "sft", {"loss": jnp.float32(0.5), "tokens": 2**40, "ok": True})
        writer.write(2, "rl", {"loss": jnp.asarray(1.5, jnp.bfloat16), "kl": np.float64(-0.25)})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "stage": "sft", "loss": 0.5, "tokens": 2**40, "ok": 1.0},
        {"step": 2, "stage": "rl", "loss": 1.5, "kl": -0.25},
    ]
    points = {
        (event.step, value.tag): value.simple_value
        for event in read_events(tmp_path / "run")
        for value in event.summary.value
    }
    assert points == {
        (1, "sft/loss"): 0.5,
        (1, "sft/tokens"): 2**40,
        (1, "sft/ok"): 1.0,
        (2, "rl/loss"): 1.5,
        (2, "rl/kl"): -0.25,
    }


def test_numbers_that_json_lacks_come_back(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, "rl", {"a": math.nan, "b": jnp.inf, "c": -math.inf, "d": 1.0})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert strict["a"] == "NaN"
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record.pop("a"))
    assert record == {"step": 1, "stage": "rl", "b": math.inf, "c": -math.inf, "d": 1.0}


def test_a_resumed_run_has_each_step_once(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, "rl", {"em": step / 10})
    with MetricWriter(tmp_path) as writer:
        assert writer.resume(2) == 2
        for step in (3, 4, 5):
            writer.write(step, "rl", {"em": step / 100})
    assert [(r["step"], r["em"]) for r in read_metrics(tmp_path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.03),
        (4, 0.04),
        (5, 0.05),
    ]
    starts = [e.step for e in read_events(tmp_path) if e.HasField("session_log")]
    assert starts == [3]  # TensorBoard drops the older points from step 3 on
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_resume_of_a_new_run_drops_nothing_and_comes_first(tmp_path):
    with MetricWriter(tmp_path) as writer:
        assert writer.resume(0) == 0
        writer.write(1, "rl", {})
        with pytest.raises(RuntimeError, match=r"resume\(0\) after a write"):
            writer.resume(0)
    assert read_metrics(tmp_path) == [{"step": 1, "stage": "rl"}]


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"loss": np.zeros(3)}, r"'loss' has shape \(3,\)"),
        ({"loss": "low"}, r"'loss' has shape \(\) and dtype"),
        ({"step": 3}, "'step' would overwrite"),
    ],
)
def test_what_is_no_scalar_is_refused_and_nothing_written(tmp_path, scalars, message):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match=message):
        writer.write(1, "rl", {"fine": 1.0} | scalars)
    assert read_metrics(tmp_path) == []


def test_a_kill_loses_at_most_the_torn_line(tmp_path):
    script = """
import sys
from atommem_jax.metrics import MetricWriter
writer = MetricWriter(sys.argv[1])
for step in (1, 2, 3):
    writer.write(step, "rl", {"em": 0.5})
print("written", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.stdout.readline().strip() == "written"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]

    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sta')  # as a kill in the middle of a write would leave it
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    with MetricWriter(tmp_path) as writer:
        writer.write(4, "rl", {"em": 0.75})
    assert [(r["step"], r["em"]) for r in read_metrics(tmp_path)][2:] == [(3, 0.5), (4, 0.75)]


SOUND = [json.dumps({"step": step, "stage": "rl", "em": step / 10}) for step in (1, 2, 3)]


@pytest.mark.parametrize(
    "broken",
    [
        '{"step": 2, "sta',
        '{"note": 1}',
        '{"step": "2", "stage": "rl"}',
        '{"step": 2, "stage": "rl", "em": [1]}',
        '{"step": 2, "stage": "rl", "em": null}',
        '{"step": true, "stage": "rl"}',
        "[1]",
        "null",
        "\udcff\udcfe",
        "[" * 100_000,
    ],
    ids=str.__len__,
)
def test_a_broken_line_is_named_and_set_aside(tmp_path, caplog, broken):
    path = tmp_path / "metrics.jsonl"
    lines = [SOUND[0], broken, "", SOUND[1], "\0" * 9, f"{SOUND[2]}\r", ""]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    assert f"{path}, line 2: is no record of a run and is left out" in caplog.text
    assert caplog.text.count("is no record") == 1, "blank lines are passed over in silence"
    with MetricWriter(tmp_path) as writer:
        assert writer.resume(2) == 1
        writer.write(3, "rl", {"em": 0.5})
    assert path.read_text().splitlines()[:2] == SOUND[:2]
    assert len((tmp_path / "metrics.jsonl.broken").read_text().splitlines()) == 1
    caplog.clear()
    assert [r["em"] for r in read_metrics(tmp_path)] == [0.1, 0.2, 0.5]
    assert caplog.text == ""


def test_a_full_disk_costs_metrics_and_not_the_run(tmp_path, caplog):
    """Every write to /dev/full fails as on a full disk."""
    with MetricWriter(tmp_path) as writer:
        writer.write(1, "rl", {"em": 0.5})
        writer._file.close()
        writer._file = open("/dev/full", "a")  # noqa: SIM115
        for step in (2, 3):
            writer.write(step, "rl", {"em": 0.5})
    assert caplog.text.count("No space left on device; training goes on without metrics") == 1
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_metrics_that_cannot_be_written_are_refused_at_once(tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: Is a directory; move it away"):
        MetricWriter(tmp_path / "run")


def test_an_object_store_gets_whole_files_and_forgets_what_came_after(tmp_path):
    path = tmp_path / "run" / metrics.FILE_NAME
    with metrics.BucketWriter(str(tmp_path / "run"), interval=3600.0) as writer:
        writer.write(1, "sft", {"loss": np.float32(2.0)})
        assert len(path.read_text().splitlines()) == 1
        writer.write(2, "sft", {"loss": math.nan})
        assert len(path.read_text().splitlines()) == 1  # too soon after the last
    with metrics.BucketWriter(str(tmp_path / "run")) as writer:
        assert writer.resume(1) == 1
        writer.write(2, "sft", {"loss": 1.0})
    assert [line["loss"] for line in metrics.read_metrics(tmp_path / "run")] == [2.0, 1.0]
    path.write_text(f"{SOUND[0]}\nbroken\n\n{SOUND[1]}\n")
    with metrics.BucketWriter(str(tmp_path / "run")) as writer:
        assert writer.resume(1) == 1
    assert path.read_text() == f"{SOUND[0]}\n"
    assert path.with_name("metrics.jsonl.broken").read_text() == "broken\n"


def test_the_kind_of_workdir_decides_the_writer(tmp_path):
    assert isinstance(metrics.open_writer(str(tmp_path)), metrics.MetricWriter)
