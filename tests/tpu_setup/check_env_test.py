"""The check of a TPU VM's environment: what is wrong is named with the next step."""

import fcntl
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading

from tests.helpers.gcloud import SETUP
from tpu_setup import check_env


def run_check(*arguments: str, status: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, SETUP / "check_env.py", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_laptop_passes_and_hears_what_does_not_apply(tmp_path):
    two = "--xla_force_host_platform_device_count=2"
    printed = run_check(
        f"--bucket={tmp_path}", f"--lock_file={tmp_path / 'lock'}", "--expect_devices=2",
        XLA_FLAGS=two,
    )  # fmt: skip
    states = dict(re.findall(r"^\S+  (\w+) +(ok|does not apply|WRONG) ", printed, re.MULTILINE))
    assert states == {
        "versions": "ok",
        "lock": "ok",
        "devices": "ok",
        "hbm": "does not apply",
        "collective": "ok",
        "bucket": "ok",
    }
    assert "a sum over 2 devices" in printed
    assert list((tmp_path / "check_env").iterdir()) == []


def test_what_is_wrong_is_listed_with_the_next_step(tmp_path):
    (tmp_path / "file").touch()
    printed = run_check(
        "--checks=devices,bucket",
        "--require_tpu",
        f"--bucket={tmp_path / 'file'}",
        status=1,
        XLA_FLAGS="",
    )
    assert re.search(r"1\. devices: 1 x cpu .*TPUs are needed\n   next: pip install", printed)
    assert re.search(r"2\. bucket: .*cannot be written: .*\n   next: is there such a", printed)
    assert "allowed checks are" in run_check("--checks=hmb", status=2)


def test_several_processes_sum_over_all_their_devices():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = ["--checks=devices,collective", f"--coordinator_address={address}"]
    common += ["--num_processes=2", "--expect_devices=2", "--timeout=60"]
    printed: list[str] = ["", ""]

    def start(number: int) -> None:
        printed[number] = run_check(*common, f"--process_id={number}", XLA_FLAGS="")

    threads = [threading.Thread(target=start, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, text in enumerate(printed):
        assert f"process {number} of 2" in text
        assert "a sum over 2 devices" in text


def test_versions_that_are_not_pinned_are_named(monkeypatch):
    real = check_env.find_version
    monkeypatch.setattr(check_env, "find_version", lambda n: "0.1" if n == "jax" else real(n))
    result = check_env.check_versions(require_tpu=False)
    assert result.state == check_env.WRONG
    assert f"jax 0.1 (pinned: {check_env.read_pins()['jax']})" in result.found
    monkeypatch.setattr(check_env, "find_version", lambda n: "1.0" if n == "libtpu" else real(n))
    assert "libtpu 1.0 (needed by jax: 0." in check_env.check_versions(require_tpu=False).found


def test_the_holder_of_the_lock_is_told_from_a_stale_file(tmp_path):
    path = tmp_path / "lock"
    assert check_env.check_lock(path, remove=True).state == check_env.OK
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        held = check_env.check_lock(path, remove=True)
        if pathlib.Path("/proc/locks").exists():
            assert held.state == check_env.WRONG
            assert f"held by process {os.getpid()}" in held.found
            assert "stop.sh" in held.next_step
            assert path.exists()
    assert check_env.check_lock(path, remove=False).state == check_env.OK
    assert path.exists()
    result = check_env.check_lock(path, remove=True)
    assert "was stale, and is removed" in result.found
    assert not path.exists()


class Device:
    """Reports memory as a TPU does."""

    def __init__(self, limit: int, used: int):
        self._stats = {"bytes_limit": limit, "bytes_in_use": used}

    def memory_stats(self):
        return self._stats


def test_memory_that_is_in_use_is_wrong(monkeypatch):
    import jax

    gib = 1 << 30
    for used, state in ((0, check_env.OK), (2 * gib, check_env.WRONG)):
        devices = [Device(16 * gib, 0), Device(16 * gib, used)]
        monkeypatch.setattr(jax, "local_devices", lambda devices=devices: devices)
        result = check_env.check_hbm()
        assert result.state == state
        assert result.found.startswith("16.00 GiB a device")
