"""One writer a folder: a second one ends at once and is told of the first; dead ones are known."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from atommem_jax import folder_lock
from atommem_jax.config import ConfigError, paths
from tests.conftest import ROOT

HOLDER = """
import sys, time
from atommem_jax import folder_lock
folder_lock.BEAT_SECONDS = 0.2
with folder_lock.hold(sys.argv[1], "--workdir=x"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def other_holder(folder):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert child.stdout.readline() == "held\n"
        yield child
    finally:
        child.kill()
        child.wait()


def take(folder, patience=0.2):
    with folder_lock.hold(folder, "--workdir=x", patience):
        return True


def write_holder(folder: pathlib.Path, **facts) -> str:
    """A lock as somebody else has left it."""
    whole = json.loads(folder_lock._describe_this_process().splitlines()[1]) | facts
    content = f"process {whole['pid']} on {whole['host']} since then (train.py)\n"
    content += json.dumps(whole) + "\n"
    folder.mkdir(exist_ok=True)
    (folder / ".lock").write_text(content)
    return content


@pytest.fixture
def no_kernel_locks(monkeypatch):
    """A file system without locks, as some that hosts share."""
    monkeypatch.setattr(folder_lock, "_lock", lambda descriptor: None)


@pytest.fixture
def short_silence(monkeypatch):
    monkeypatch.setattr(folder_lock, "SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.1)


def test_a_second_process_is_told_of_the_first_which_is_not_touched(tmp_path):
    with other_holder(tmp_path / "run") as child:
        started = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            take(tmp_path / "run")
        assert time.monotonic() - started < 5
        message = str(caught.value)
        assert message.startswith(f"--workdir=x is in use by process {child.pid} on ")
        assert message.endswith("wait for it or end it, or choose another --workdir")
        assert child.poll() is None
        child.communicate("")
        assert child.returncode == 0
    (tmp_path / "run").mkdir(exist_ok=True)
    assert take(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir()), "nothing is left of a lock that was let go of"


def test_a_killed_holder_is_known_at_once(tmp_path):
    with other_holder(tmp_path) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert (tmp_path / ".lock").read_text().startswith(f"process {child.pid} on ")
        assert take(tmp_path)


def test_within_one_process_a_folder_is_held_once(tmp_path):
    with folder_lock.hold(tmp_path, "--out=x"):
        with pytest.raises(ConfigError, match=f"--workdir=x is in use by process {os.getpid()} on"):
            take(tmp_path)
        assert take(tmp_path / "other")


def test_without_locks_of_the_kernel_the_process_tells(tmp_path, no_kernel_locks):
    with other_holder(tmp_path / "run") as child:
        with pytest.raises(ConfigError, match=f"in use by process {child.pid} on"):
            take(tmp_path / "run")
        child.kill()
        child.wait()
        assert take(tmp_path / "run")


@pytest.mark.parametrize(
    "facts",
    [{"boot": "another"}, {"start": "1"}, {"pid": 2**22 + 1}],
    ids=["another boot", "another process of that number", "no such process"],
)
def test_a_holder_that_cannot_be_is_stale(tmp_path, no_kernel_locks, facts):
    write_holder(tmp_path, **facts)
    assert take(tmp_path)


def test_this_very_process_counts_as_alive(tmp_path, no_kernel_locks):
    write_holder(tmp_path)
    with pytest.raises(ConfigError, match="in use by"):
        take(tmp_path)


def test_a_holder_on_another_host_is_gone_when_it_gives_no_sign(tmp_path, short_silence, capfd):
    write_holder(tmp_path, host="elsewhere")
    started = time.monotonic()
    assert take(tmp_path)
    assert time.monotonic() - started >= 2.0
    assert (
        "on elsewhere since then (train.py) left its lock; waiting up to" in capfd.readouterr().err
    )


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_holder_on_another_host_that_gives_signs_is_alive(
    tmp_path, monkeypatch, short_silence, kind
):
    """The holder is a process of this host that calls it by another name."""
    as_bucket(monkeypatch, kind)
    child = ["folder_lock.socket.gethostname = lambda: 'elsewhere'"]
    if kind == "bucket":
        child.append("folder_lock.paths.is_remote = lambda path: True")
        child.append("folder_lock.paths.locate = __import__('pathlib').Path")
    else:
        child.append("folder_lock._lock = lambda descriptor: None")
        monkeypatch.setattr(folder_lock, "_lock", lambda descriptor: None)
    script = HOLDER.replace("with folder", "\n".join([*child, "with folder"]))
    monkeypatch.setattr(sys.modules[__name__], "HOLDER", script)
    with other_holder(tmp_path) as child:
        with pytest.raises(ConfigError, match=f"in use by process {child.pid} on elsewhere"):
            take(tmp_path)
        child.kill()
        child.wait()
        assert take(tmp_path)


class Object(type(pathlib.Path())):
    """Is whole at every moment, as the objects of a bucket are."""

    def write_bytes(self, data):
        with tempfile.NamedTemporaryFile(dir=self.parent.parent, delete=False) as aside:
            aside.write(data)
        os.replace(aside.name, self)


def as_bucket(monkeypatch, kind):
    if kind == "bucket":
        monkeypatch.setattr(paths, "is_remote", lambda path: True)
        monkeypatch.setattr(paths, "locate", Object)


def test_a_bucket_is_held_by_signs_of_life(tmp_path, monkeypatch, short_silence):
    as_bucket(monkeypatch, "bucket")
    with folder_lock.hold(tmp_path / "run", "--workdir=gs"):
        before = (tmp_path / "run" / ".lock").read_text()
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
            take(tmp_path / "run")
        time.sleep(0.5)
        assert (tmp_path / "run" / ".lock").read_text() != before
    assert list((tmp_path / "run").iterdir()) == []


def test_a_torn_lock_is_taken(tmp_path):
    for content in (b"", b"\0\0\xff", b"process 3 on x", b'{"host": 1}\n', b"[1]\n"):
        (tmp_path / ".lock").write_bytes(content)
        assert take(tmp_path)


def test_a_command_that_inherits_the_lock_holds_it_on(tmp_path):
    with folder_lock.hold(tmp_path, "--workdir=x", inherited=True) as descriptor:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    try:
        with pytest.raises(ConfigError, match="in use by another process; it, or a run that it"):
            take(tmp_path)
    finally:
        child.kill()
        child.wait()
    assert take(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--workdir=x: is a file; pass a folder"):
        take(tmp_path / "file")


def test_a_folder_in_which_nothing_came_is_not_left_behind(tmp_path):
    with folder_lock.hold(tmp_path / "a" / "b", "--workdir=x"):
        pass
    assert list(tmp_path.iterdir()) == []
    with folder_lock.hold(tmp_path / "a" / "b", "--workdir=x"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
