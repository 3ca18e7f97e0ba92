"""Processes that share a folder of data sets take turns, or are told why they cannot."""

import errno
import fcntl
import os

import pytest

from atommem_jax.config import ConfigError
from atommem_jax.tasks import datasets

TASK = {"name": "synthetic", "train_examples": 2, "test_examples": 2}


def test_a_folder_without_locks_is_explained(tmp_path, monkeypatch):
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        reason = os.strerror(number)

        def refuse(*unused, number=number, reason=reason):
            raise OSError(number, reason)

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(ConfigError, match=f"--data_root={tmp_path}: no lock .*{reason}.*pass"):
            datasets.prepare(TASK, tmp_path)
        # Nothing was prepared without the lock, and nothing was left that could look like one.
        assert {path.name for path in tmp_path.iterdir()} <= {".synthetic.lock"}


def test_a_lock_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / ".synthetic.lock").mkdir()
    with pytest.raises(ConfigError, match=r"no lock can be taken .*Is a directory"):
        datasets.prepare(TASK, tmp_path)


def test_the_lock_is_let_go_after_an_error(tmp_path):
    held = datasets._lock(tmp_path, "synthetic")
    with pytest.raises(OSError, match="of the builder"), held:
        raise OSError("of the builder")  # and is not taken for one of the lock
    with (tmp_path / ".synthetic.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
