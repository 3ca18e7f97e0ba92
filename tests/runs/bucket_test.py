"""Runs in a bucket: trained, killed, resumed, evaluated, reported on and swept over gs:// paths.

The bucket is an emulator on loopback, whose answers fail, come late and are cut as tests say. It
knows nothing of rights, regions and kinds of buckets: `tpu_setup/check_env.py --checks=bucket` does
in a real one what `test_check_env_...` does here.
"""

import asyncio
import json
import os
import pathlib
import time
import types

import numpy as np
import pytest

from atommem_jax import folder_lock, metrics
from atommem_jax.config import ConfigError, StoreError, paths
from atommem_jax.report import run
from atommem_jax.runs import recorder
from atommem_jax.sweeps import scheduler
from atommem_jax.weights.checkpoint import Checkpointer, CorruptCheckpointError
from experiments import supervise
from tests.conftest import ROOT
from tests.helpers import bucket as buckets
from tests.helpers import processes, runs
from tpu_setup import check_env

pytestmark = pytest.mark.processes

ASK_FOR_BUCKET = r"^GET /storage/v1/b/bucket(\?|$)"


@pytest.fixture(scope="module")
def bucket():
    with buckets.serve() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment().items():
            patch.setenv(name, value)
        yield bucket


@pytest.fixture
def impatient(bucket, monkeypatch):
    """gcsfs tries as often as ever, without the pauses, which come to half a minute."""
    import gcsfs.retry

    quick = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0.01))
    monkeypatch.setattr(gcsfs.retry, "asyncio", quick)
    monkeypatch.setattr(gcsfs.retry.logger, "disabled", True)


# ---------------------------------------------------------------------------------------------
# Paths


def test_what_others_write_is_seen_at_once(bucket):
    folder = paths.locate(f"{buckets.URL}/seen")
    bucket.write("seen/a", b"1")
    assert [path.name for path in folder.iterdir()] == ["a"]
    bucket.write("seen/a", b"longer")
    bucket.write("seen/b", b"")
    assert (folder / "a").read_text() == "longer"
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert (folder / "b").exists()
    # As gcsfs comes, it does not see it.
    import gcsfs

    as_it_comes = gcsfs.GCSFileSystem(use_listings_cache=True, skip_instance_cache=True)
    as_it_comes.ls("bucket/seen")
    bucket.write("seen/c", b"")
    assert "bucket/seen/c" not in as_it_comes.ls("bucket/seen")


def test_a_text_is_written_whole_and_nothing_is_left_beside_it(bucket):
    paths.write_text(f"{buckets.URL}/text/a", "one")
    with bucket.fault("^POST .*text", "cut"):
        paths.write_text(f"{buckets.URL}/text/a", "zwei ü")
    assert bucket.read("text/a").decode() == "zwei ü"
    assert bucket.list("text") == ["text/a"]


def test_what_knows_local_files_alone_is_copied_there(bucket):
    with paths.made_here(f"{buckets.URL}/made/profile") as folder:
        (pathlib.Path(folder) / "plugins").mkdir()
        (pathlib.Path(folder) / "plugins" / "trace").write_bytes(b"\0")
    assert bucket.list("made") == ["made/profile/plugins/trace"]


def test_outputs_are_tried_before_long_work(bucket, impatient):
    paths.try_folder(f"{buckets.URL}/tried", "--out=x")
    paths.try_file(f"{buckets.URL}/tried/file", "--json=x")
    assert bucket.list("tried") == []
    with pytest.raises(
        ConfigError, match=r"^--out=x: cannot be .*Is there such a bucket.*=gs://n$"
    ):
        paths.try_folder("gs://n/run", "--out=x")
    with bucket.fault("^POST", 403), pytest.raises(ConfigError, match="Forbidden") as found:
        paths.make_folder(f"{buckets.URL}/tried", "--out=x")
    assert not isinstance(found.value, StoreError)  # a mistake, which a restart would repeat
    with (
        bucket.fault("^POST", 503, times=100),
        pytest.raises(StoreError, match=r"--out=x: .*503.*Start the same command again once"),
    ):
        paths.try_folder(f"{buckets.URL}/tried", "--out=x")


# ---------------------------------------------------------------------------------------------
# Lock, metrics, progress


def test_the_lock_is_held_through_an_outage(bucket, impatient, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(folder_lock, "_SETTLE_SECONDS", 0.2)
    url = f"{buckets.URL}/held"
    with folder_lock.hold(url, "--workdir=x"):
        with pytest.raises(ConfigError, match=f"--workdir=x is in use by process {os.getpid()} on"):
            take(url)
        with bucket.fault("^POST .*held", 503, times=12):
            wait_until(lambda: not bucket.faults or bucket.faults[0].done == 12)
        before = bucket.read("held/.lock")
        wait_until(lambda: bucket.read("held/.lock") != before)  # it still gives signs of life
    assert bucket.list("held") == []
    take(url)


def test_of_two_that_take_a_lock_at_once_the_last_one_has_it(bucket, monkeypatch):
    monkeypatch.setattr(folder_lock, "_SETTLE_SECONDS", 0.2)

    def come_second(seconds):
        bucket.write("both/.lock", b"process 7 on elsewhere (train.py)\n")

    monkeypatch.setattr(folder_lock.time, "sleep", come_second)
    with pytest.raises(ConfigError, match="in use by process 7 on elsewhere"):
        take(f"{buckets.URL}/both")
    assert bucket.list("both") == ["both/.lock"]  # that of the other


def take(url):
    with folder_lock.hold(url, "--workdir=x", patience=0.1):
        pass


def wait_until(reached):
    deadline = time.monotonic() + processes.PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_metrics_outlast_an_outage(bucket, impatient, caplog):
    url = f"{buckets.URL}/metered"
    bucket.write("metered/metrics.jsonl", b'{"step": 1, "stage": "sft"}\ntorn\n')
    bucket.write("metered/metrics.jsonl.broken", b"of before\n")
    with metrics.open_writer(url) as writer:
        with bucket.fault("^POST .*metrics.jsonl", 503, times=100):
            writer.write(2, "sft", {"loss": 1.0})
            writer.flush()
        assert caplog.text.count("training goes on, and all lines are written with the next") == 1
        writer.write(3, "sft", {"loss": 2.0})
        writer.flush()  # as before a checkpoint: a kill loses none of these
        assert [record["step"] for record in metrics.read_metrics(url)] == [1, 2, 3]
    assert bucket.read("metered/metrics.jsonl.broken") == b"of before\ntorn\n"


def test_a_run_that_cannot_read_its_metrics_says_so(bucket, impatient):
    url = f"{buckets.URL}/watched_rl"
    with pytest.raises(FileNotFoundError):
        metrics.read_metrics(url)
    recorder.watch_rl(url, 0, 2)  # what only tells of a run may be missing
    bucket.write("watched_rl/metrics.jsonl", b'{"step": 1, "stage": "rl", "entropy": 2.0}\n')
    recorder.watch_rl(url, 0, 2)
    read = "^GET .*watched_rl.*alt=media"
    with (
        bucket.fault(read, 503, times=100),
        pytest.raises(StoreError, match=r"watched_rl/metrics.jsonl: cannot be read .*503"),
    ):
        recorder.watch_rl(url, 0, 2)
    with bucket.fault(read, 403, times=100), pytest.raises(ConfigError, match="what is allowed"):
        recorder.watch_rl(url, 0, 2)


def test_a_refusal_is_not_taken_for_absence(bucket, impatient):
    """Of a bucket that refuses, gcsfs and Orbax say that there is nothing."""
    with Checkpointer(f"{buckets.URL}/closed") as checkpointer:
        save(checkpointer, 1)
        with (
            bucket.fault("^GET .*(prefix=closed/1/state|closed.*asked_for)", 403, times=100),
            pytest.raises(ConfigError, match=r"whether it is sound is not known\. Is there"),
        ):
            checkpointer.restore(abstract_state=STATE)
        checkpointer.restore(abstract_state=STATE)
    url = f"{buckets.URL}/closed"
    with (
        bucket.fault("^GET .*closed", 403, times=100),
        pytest.raises(ConfigError, match=r"^--workdir=gs://bucket/closed: cannot be .*Forbidden"),
    ):
        run.name_runs([paths.locate(url)])
    run.name_runs([paths.locate(url)])
    with pytest.raises(ConfigError, match="no such folder"):
        run.name_runs([paths.locate(f"{url}_never")])


def test_a_supervisor_sees_progress(bucket, impatient, capsys):
    assert supervise.latest_step(f"{buckets.URL}/watched/checkpoints") == -1
    bucket.write("watched/checkpoints/3/commit_success.txt", b"")
    assert supervise.latest_step(f"{buckets.URL}/watched/checkpoints") == 3
    bucket.write("watched/checkpoints/12/commit_success.txt", b"")
    assert supervise.latest_step(f"{buckets.URL}/watched/checkpoints") == 12
    with bucket.fault("^GET .*watched", 503, times=100):
        assert supervise.latest_step(f"{buckets.URL}/watched/checkpoints") == -1
    assert "cannot be listed, so no progress is seen: HttpError" in capsys.readouterr().err


def test_a_status_out_of_reach_is_not_taken_for_a_torn_one(bucket, impatient, caplog):
    folder = paths.locate(f"{buckets.URL}/stated")
    scheduler.Status(state=scheduler.DONE).write(folder)
    with (
        bucket.fault("^GET .*status.json.*alt=media", 503, times=100),
        pytest.raises(StoreError, match=r"status.json: cannot be read .*503"),
    ):
        scheduler.read_status(folder)  # or the job would start anew
    assert scheduler.read_status(folder).state == scheduler.DONE
    bucket.write("stated/status.json", b'{"state":')
    assert scheduler.read_status(folder) is None
    assert "status.json, line 1: is no status of a job" in caplog.text


# ---------------------------------------------------------------------------------------------
# Checkpoints

STATE = {"a": np.arange(300, dtype=np.float32)}


def save(checkpointer, *steps):
    for step in steps:
        rest = {"config": {}, "tokenizer": b"t", "data_state": 0, "progress": {}}
        checkpointer.save(step, STATE, **rest)
        checkpointer.wait()


def test_checkpoints_come_through_failed_slow_and_cut_requests(bucket):
    with (
        bucket.fault("", 503, times=2, every=60),
        bucket.fault("^POST", "cut", times=2, every=12),
        bucket.fault("^GET .*alt=media", "torn", times=2, every=12),
        bucket.fault("^POST", "slow", times=1),
        Checkpointer(f"{buckets.URL}/rough", keep_last=1, keep_best=0) as checkpointer,
    ):
        save(checkpointer, 1, 2)
        assert checkpointer.all_steps() == [2]
        found = checkpointer.restore(abstract_state=STATE)
    np.testing.assert_array_equal(found.state["a"], STATE["a"])
    assert not bucket.list("rough/1")


def test_an_outage_is_not_taken_for_damage(bucket, impatient):
    with Checkpointer(f"{buckets.URL}/sound") as checkpointer:
        save(checkpointer, 1, 2)
        read = "^GET .*sound.*config.*alt=media"
        with (
            bucket.fault(read, 503, times=100),
            pytest.raises(StoreError, match=r"whether it is sound is not known\. Start the same"),
        ):
            checkpointer.restore_config()
        with bucket.fault(read, 403), pytest.raises(ConfigError, match="what is allowed there"):
            checkpointer.restore_config()
        bucket.write("sound/2/tree/metadata", bucket.read("sound/2/tree/metadata")[:-5])
        with pytest.raises(CorruptCheckpointError, match=r"step 2 .* is corrupt"):
            checkpointer.restore(abstract_state=STATE)
        assert checkpointer.set_aside(2) == "2.corrupt"
        assert checkpointer.all_steps() == [1]
        checkpointer.restore(abstract_state=STATE)


def test_check_env_does_what_a_run_does(bucket, impatient):
    url = f"{buckets.URL}/checked"
    result = check_env.check_bucket(url)
    assert (result.state, result.found) == ("ok", f"{url} holds files and checkpoints")
    # With the role Storage Object User alone Orbax can save, and not remove what is old.
    with bucket.fault(ASK_FOR_BUCKET, 403, times=9):
        result = check_env.check_bucket(url)
    assert result.found.startswith(f"{url} cannot be used for checkpoints: ConfigError: ")
    assert "roles/storage.legacyBucketReader" in result.found
    with bucket.fault("^DELETE", 403):
        assert "cannot be removed" in check_env.check_bucket(url).found
    with bucket.fault("^POST", 503, times=100):
        assert "cannot be written: HttpError" in check_env.check_bucket(url).found


def test_a_run_that_could_not_remove_old_checkpoints_does_not_start(bucket):
    with (
        bucket.fault(ASK_FOR_BUCKET, 403),
        pytest.raises(ConfigError, match=r"old checkpoints could not be removed.*legacyBucketRead"),
    ):
        Checkpointer(f"{buckets.URL}/refused")
    assert bucket.list("refused") == []


# ---------------------------------------------------------------------------------------------
# Scripts

SETTINGS = {"mesh__data": 1, "mesh__cpu_devices": 1, "rl__steps": 0, "sft__eval_every": 6}
RUN = "sweep/only"

SWEEP = """
from experiments.configs import synthetic

def get_config():
    config = synthetic.get_config()
    config.update_from_flattened_dict({overrides})
    return config

def sweep(add):
    add("only", {{}})

EVALUATIONS = [{{"splits": ["test_1x"], "temperatures": [0.0], "episodes": 8}}]
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data_root):
    """The same run in a folder, which nothing disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    flags = runs.make_flags(**SETTINGS)
    runs.run("train.py", f"--workdir={folder}", f"--data_root={data_root}", *flags)
    return folder


@pytest.fixture(scope="module")
def command(tmp_path_factory, data_root):
    names = {name.replace("__", "."): value for name, value in SETTINGS.items()}
    config = tmp_path_factory.mktemp("config") / "few.py"
    config.write_text(SWEEP.format(overrides=runs.OVERRIDES | names))
    where = [f"--workdir={buckets.URL}/sweep", f"--data_root={data_root}", "--jobs=1"]
    return [f"--config={config}", *where]


@pytest.fixture(scope="module")
def swept(bucket, command, reference):
    """A sweep in the bucket, killed in a save of its run, that went on among failing requests."""
    commit = r"^POST .*name=sweep/only/checkpoints/4/commit_success.txt"
    with (
        bucket.fault(commit, "cut", times=1000) as saving,
        runs.start("sweep.py", *command) as process,
    ):
        wait_until(lambda: saving.done or process.poll() is not None)
        process.kill()  # and the run with it
    left = bucket.list(f"{RUN}/checkpoints/4/")
    assert left
    assert f"{RUN}/checkpoints/4/commit_success.txt" not in left
    assert {"sweep/.lock", f"{RUN}/.lock"} <= {*bucket.list()}
    with (
        bucket.fault("", 503, times=2, every=150),
        bucket.fault("^POST", "cut", times=1, every=40),
        bucket.fault("^GET .*alt=media", "torn", times=1, every=40),
        bucket.fault("^POST .*eval", 503),
    ):
        return runs.run("sweep.py", *command)


def test_a_run_killed_in_a_save_ends_with_the_same_bits(bucket, swept, reference, tmp_path):
    log = bucket.read(f"{RUN}/log.txt").decode()
    assert f"resuming {buckets.URL}/{RUN} at step 2 of 6" in log
    copy = bucket.download(RUN, tmp_path / "copy")
    assert runs.list_steps(copy) == runs.list_steps(reference)
    assert not (copy / ".lock").exists()
    ours, theirs = (runs.read_state(folder, runs.SFT_STEPS) for folder in (copy, reference))
    runs.assert_same(ours, theirs)
    assert runs.read_repeatable(copy) == runs.read_repeatable(reference)


def test_it_is_evaluated_there_and_stands_in_the_table(bucket, swept, command):
    summary = json.loads(bucket.read(f"{RUN}/eval/test_1x_t0_step6.json"))
    assert (summary["episodes"], summary["step"]) == (8, 6)
    records = bucket.read(f"{RUN}/eval/test_1x_t0_step6.jsonl").splitlines()
    assert len(records) == summary["questions"]
    assert "1 of 1 runs done" in swept
    assert "| **only** |" in bucket.read("sweep/table.md").decode()
    assert json.loads(bucket.read(f"{RUN}/status.json"))["state"] == "done"
    assert "0 of 1 runs to do" in runs.run("sweep.py", *command)


def test_it_is_reported_on_there(bucket, swept, data_root):
    url = f"{buckets.URL}/{RUN}"
    printed = runs.run("report.py", f"--workdir={url}", f"--data_root={data_root}", "--episodes=0")
    assert f"report: {url}/report/index.html" in printed
    page = bucket.read(f"{RUN}/report/index.html").decode()
    assert "learned, after SFT" in page
    assert bucket.read(f"{RUN}/report/sft.png").startswith(b"\x89PNG")
    assert bucket.read(f"{RUN}/report/sft.pdf").startswith(b"%PDF")
    assert not [name for name in bucket.list("sweep") if ".lock" in name or ".try" in name]
    assert not (ROOT / "gs:").exists()


def test_a_refusal_in_the_middle_of_the_work_ends_in_a_sentence(bucket, reference, data_root):
    flags = runs.make_flags(**SETTINGS)
    url = f"{buckets.URL}/revoked"
    with bucket.fault("^(POST|GET) .*revoked/checkpoints/2", 403, times=1000):
        printed = runs.run(
            "train.py", f"--workdir={url}", f"--data_root={data_root}", *flags, status=2
        )
    assert f"train.py: {url}: cannot be read or written (OSError: Forbidden" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        ("train.py", "--workdir=gs://n/run", "--workdir=gs://n/run: cannot be read or written"),
        ("demo.py", "--workdir=gs://n/run", "--workdir=gs://n/run: is in an object store, and"),
    ],
)
def test_mistakes_end_in_a_sentence(bucket, script, flag, message):
    printed = runs.run(script, flag, status=2)
    assert message in printed
    assert "Traceback" not in printed
