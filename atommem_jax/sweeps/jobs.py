"""From the runs of a sweep to jobs of the scheduler, here or on TPU VMs.

A job remembers what its run was started with: a run whose config has changed since is refused, as
its checkpoints and its table would speak of two configs.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util

from atommem_jax.config import ConfigError, Experiment, check, flatten, parse
from atommem_jax.sweeps.plan import Run, Sweep, choose_devices, make_commands
from atommem_jax.sweeps.scheduler import Job, Status

# Stands for the folder in the bucket, while the plan of a sweep deals in local paths.
_IN_BUCKET = pathlib.Path("/@bucket@")


def choose(sweep: Sweep, only: str) -> list[Run]:
    """The runs in whose name a regular expression is found."""
    try:
        chosen = [run for run in sweep.runs if re.search(only, run.name)]
    except re.error as error:
        raise ConfigError(f"--only={only}: {error}; it is a regular expression") from error
    names = ", ".join(run.name for run in sweep.runs)
    check(bool(chosen), f"--only={only} fits no run; there are: {names}")
    return chosen


def make_local_job(
    sweep: Sweep,
    run: Run,
    status: Status | None,
    *,
    workdir: pathlib.Path,
    data_root: pathlib.Path,
    shares: Sequence[Sequence[int]],
) -> Job:
    """The commands of a run on this machine.

    Args:
      sweep: the sweep.
      run: one of its runs.
      status: what is known of it.
      workdir: the folder of the sweep.
      data_root: where prepared data sets are kept.
      shares: the cores of each job that runs at a time, see `local_processes.share_cores`.

    Raises ConfigError where its config has changed since it was started.
    """
    devices = run.config.mesh.cpu_devices
    if shares[0]:
        devices = choose_devices(sweep, run, min(map(len, shares)))
    if status is not None:
        # A run goes on with as many devices as it began with, to the same bits.
        devices = status.about.get("cpu_devices", devices)
    about = {"cpu_devices": devices, **_describe(run)}
    _check_unchanged(run, workdir / run.name, about, status)
    return Job(
        name=run.name,
        folder=workdir / run.name,
        commands=make_commands(sweep, run, workdir, data_root, devices),
        after=(run.start[0],) if run.start else (),
        about=about,
    )


def make_vm_job(
    sweep: Sweep,
    run: Run,
    status: Status | None,
    *,
    workdir: pathlib.Path,
    data_root: pathlib.Path,
    checkout: pathlib.Path,
    bucket: str,
    evaluate: bool,
) -> Job:
    """The commands of a run on a TPU VM, with paths as they are there.

    Args:
      sweep: the sweep.
      run: one of its runs.
      status: what is known of it.
      workdir: local folder for statuses; its name is that of the sweep.
      data_root: on the VM.
      checkout: the code here, which the VM has too.
      bucket: where checkpoints go, below sweeps/<name of the workdir>.
      evaluate: also runs the evaluations there.

    Raises ConfigError where the VM would not find the config, or it, or a command that was started,
    has changed since.
    """
    file, *argument = sweep.spec.split(":", 1)
    path = pathlib.Path(file).resolve()
    check(
        path.is_relative_to(checkout),
        f"--config={file} lies outside {checkout}: the VMs have what is committed there; move it",
    )
    there = dataclasses.replace(sweep, spec=":".join([str(path.relative_to(checkout)), *argument]))
    devices = run.config.mesh.cpu_devices
    folder = f"gs://{bucket}/sweeps/{workdir.name}"
    commands = {
        key: [_translate(word, checkout, folder) for word in command]
        for key, command in make_commands(there, run, _IN_BUCKET, data_root, devices).items()
        if evaluate or key == "train"
    }
    about = {"cpu_devices": devices, "commands": commands, **_describe(run)}
    _check_unchanged(run, workdir / run.name, about, status)
    return Job(
        name=run.name,
        folder=workdir / run.name,
        commands=commands,
        after=(run.start[0],) if run.start else (),
        about=about,
    )


def _translate(word: str, checkout: pathlib.Path, folder: str) -> str:
    """A word of a local command as it reads on a VM, in the folder of the code."""
    if word == sys.executable:
        return "python"
    return word.replace(f"{checkout}{os.sep}", "").replace(str(_IN_BUCKET), folder)


def _describe(run: Run) -> dict[str, Any]:
    """What a status keeps of a run."""
    return {"overrides": dict(run.overrides), "config": _to_plain(run.config)}


def _to_plain(config: Experiment) -> dict[str, Any]:
    """{path: value} as JSON would read it back."""
    return json.loads(json.dumps(flatten(config)))


def _upgrade(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a status that may have the names of an older version."""
    return _to_plain(parse(flax.traverse_util.unflatten_dict(dict(plain), sep=".")))


def _check_unchanged(
    run: Run, folder: pathlib.Path, now: Mapping[str, Any], status: Status | None
) -> None:
    if status is None:
        return
    then = status.about
    advice = f"Choose another --workdir, or delete {folder} to run it anew"
    places = ["by processes of a machine", "on TPU VMs"]  # the latter keep their commands
    there, on_vms = "commands" in then, "commands" in now
    check(
        there == on_vms,
        f"run {run.name!r} was started {places[there]}, and would go on {places[on_vms]}, away "
        f"from its checkpoints. {advice}",
    )
    before = _upgrade(then["config"]) if "config" in then else now["config"]
    after = now["config"]
    changed = [
        f"{path}={after.get(path)!r} (was {before.get(path)!r})"
        for path in sorted({*after, *before})
        if after.get(path) != before.get(path) and path != "mesh.cpu_devices"
    ]
    check(
        not changed,
        f"run {run.name!r} was started with another config: {'; '.join(changed)}. {advice}",
    )
    for key in (key for key in (*status.finished, status.at_work) if on_vms and key):
        old, new = then["commands"].get(key), now["commands"].get(key)
        check(
            old is None or new is None or old == new,
            f"run {run.name!r} was started with another command: {old}, and now {new}. {advice}",
        )
