"""Sweeps on TPU VMs that were begun when one file held where all runs stand."""

import json

from atommem_jax.sweeps import placements, scheduler
from atommem_jax.sweeps.scheduler import DONE, FAILED, STARTED, Status

# As that version wrote it, but for the lengths of commands.
OLD = """{
 "a": {
  "state": "done",
  "vm": "va",
  "at_work": "",
  "finished": [
   "train"
  ],
  "failed": "",
  "placed": 1,
  "requeued": 0,
  "commands": {
   "train": [
    "python",
    "experiments/train.py"
   ]
  }
 },
 "b/seed1": {
  "state": "placed",
  "vm": "vb",
  "at_work": "train",
  "finished": [],
  "failed": "",
  "placed": 3,
  "requeued": 2,
  "commands": {
   "train": [
    "python",
    "experiments/train.py"
   ]
  }
 },
 "preempted": {
  "state": "queued",
  "vm": "va",
  "at_work": "",
  "finished": [],
  "failed": "",
  "placed": 1,
  "requeued": 1,
  "commands": {}
 },
 "bad": {
  "state": "failed",
  "vm": "",
  "at_work": "",
  "finished": [],
  "failed": "a, whose checkpoint it starts from, has failed",
  "placed": 0,
  "requeued": 0,
  "commands": {}
 },
 "new": {
  "state": "queued",
  "vm": "",
  "at_work": "",
  "finished": [],
  "failed": "",
  "placed": 0,
  "requeued": 0,
  "commands": {}
 }
}
"""


def test_what_was_begun_has_a_status(tmp_path):
    assert placements.read_statuses(tmp_path) == {}
    (tmp_path / placements.FILE_NAME).write_text(OLD)
    commands = {"train": ["python", "experiments/train.py"]}
    expected = {
        "a": Status(DONE, ["train"], attempts=1, about={"commands": commands}, slot="va"),
        "b/seed1": Status(
            STARTED,
            attempts=3,
            about={"commands": commands},
            slot="vb",
            at_work="train",
            requeued=2,
        ),
        "preempted": Status(STARTED, attempts=1, about={"commands": {}}, slot="va", requeued=1),
        "bad": Status(
            FAILED,
            failed="a, whose checkpoint it starts from, has failed",
            about={"commands": {}},
        ),
    }
    assert placements.read_statuses(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == [placements.FILE_NAME]


def test_the_file_is_converted_once(tmp_path):
    placements.convert(tmp_path)
    (tmp_path / placements.FILE_NAME).write_text(OLD)
    newer = Status(state=DONE, attempts=2)
    newer.write(tmp_path / "b/seed1")
    placements.convert(tmp_path)
    assert scheduler.read_status(tmp_path / "a").finished == ["train"]
    assert scheduler.read_status(tmp_path / "b/seed1") == newer
    assert scheduler.read_status(tmp_path / "new") is None
    assert placements.read_statuses(tmp_path) == {}
    assert json.loads((tmp_path / "placements.json.old").read_text()) == json.loads(OLD)
