"""Sweeps on TPU VMs that an earlier version has begun: one file in place of a status a run.

`<workdir>/placements.json` had a line for every run. It is read as the statuses that `scheduler`
keeps now, written out as such once, and set aside.
"""

import json
import pathlib
from typing import Any

from atommem_jax.sweeps.scheduler import DONE, FAILED, STARTED, Status, read_status

FILE_NAME = "placements.json"


def read_statuses(workdir: pathlib.Path) -> dict[str, Status]:
    """What the file says of the runs that were begun, by name; nothing where there is no file."""
    path = workdir / FILE_NAME
    if not path.exists():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    begun = {name: line for name, line in saved.items() if line["placed"] or line["failed"]}
    return {name: _to_status(line) for name, line in begun.items()}


def _to_status(line: dict[str, Any]) -> Status:
    return Status(
        state={"done": DONE, "failed": FAILED}.get(line["state"], STARTED),  # queued, placed
        finished=line["finished"],
        failed=line["failed"],
        attempts=line["placed"],
        about={"commands": line["commands"]},
        slot=line["vm"],
        at_work=line["at_work"],
        requeued=line["requeued"],
    )


def convert(workdir: pathlib.Path) -> None:
    """Writes the statuses, unless a run has one already, and sets the file aside."""
    for name, status in read_statuses(workdir).items():
        if read_status(workdir / name) is None:
            status.write(workdir / name)
    path = workdir / FILE_NAME
    if path.exists():
        path.replace(path.with_suffix(".json.old"))
