"""The check of a TPU VM's environment: what is wrong is named with the next step."""

import fcntl
import importlib.metadata
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading

import pytest

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


REQUIRED = "jax>=0.10.2,<0.13\nnumpy>=2.1,<3\n"
PINNED = "jax==0.10.2\njaxlib==0.10.2\nnumpy==2.4.6\n"
# A stand-in for what the metadata of JAX say.
ASKED = [
    "jaxlib<=0.10.2,>=0.10.1",
    "opt_einsum",
    'jaxlib==0.10.1; extra == "ci"',
    'libtpu==0.0.42.*; extra == "tpu"',
]
INSTALLED = {"jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6", "opt_einsum": "3.4.0"}


@pytest.mark.parametrize(
    ("changes", "require_tpu", "state", "found"),
    [
        ({}, False, "ok", "jax 0.10.2, libtpu none, and all that is pinned"),
        ({"libtpu": "0.0.42.1"}, True, "ok", "libtpu 0.0.42.1, and all that is pinned"),
        ({"numpy": "2.5.5"}, False, "ok", "the tests run with other versions: numpy 2.5.5 (pinned"),
        ({"jaxlib": "0.10.1"}, False, "ok", "other versions: jaxlib 0.10.1 (pinned: 0.10.2)"),
        ({"numpy": "3.0"}, False, "WRONG", "numpy 3.0 (allowed: <3,>=2.1)"),
        ({"jax": "0.13.0rc1"}, False, "WRONG", "jax 0.13.0rc1 (allowed: <0.13,>=0.10.2)"),
        ({"numpy": ""}, False, "WRONG", "numpy is missing (allowed: <3,>=2.1)"),
        ({"jaxlib": "0.10.3"}, False, "WRONG", "jaxlib 0.10.3 (needed by jax: <=0.10.2,>=0.10.1)"),
        ({"opt_einsum": ""}, False, "WRONG", "opt_einsum is missing (needed by jax: any)"),
        ({"libtpu": "1.0"}, False, "WRONG", "libtpu 1.0 (needed by jax: ==0.0.42.*)"),
        ({}, True, "WRONG", "libtpu is missing (needed by jax: ==0.0.42.*)"),
    ],
)
def test_versions_that_are_not_allowed_are_wrong_and_others_remarked(
    monkeypatch, tmp_path, changes, require_tpu, state, found
):
    (tmp_path / "requirements.txt").write_text(f"# ranges\n{REQUIRED}")
    (tmp_path / "constraints.txt").write_text(f"# exact\n{PINNED}\n# Extras\npytest==9.2.0\n")
    monkeypatch.setattr(check_env, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", {"jax": ASKED}.get)
    monkeypatch.setattr(check_env, "find_version", lambda name: (INSTALLED | changes).get(name, ""))
    result = check_env.check_versions(require_tpu)
    assert (result.state, found in result.found) == (state, True), result
    assert bool(result.next_step) == (state == "WRONG")
    # Nothing else is complained of.
    assert result.found.count("allowed:") + result.found.count("needed by") == (state == "WRONG")


def test_what_is_installed_is_checked():
    """The requirements and pins of the repository are read, and the metadata of JAX itself."""
    names = {each.name for each in check_env.read_requirements()}
    assert {"jax", "flax", "packaging"} <= names
    assert {"jaxlib", "libtpu"} <= {each.name for each in check_env.requirements_of_jax(True)}
    assert "libtpu" not in {each.name for each in check_env.requirements_of_jax(False)}
    assert set(check_env.read_pins()) == names | {"jaxlib"}


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
