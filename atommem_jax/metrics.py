"""Metrics of a run: JSON lines that programs read, TensorBoard events that people look at."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

FILE_NAME = "metrics.jsonl"


class MetricWriter:
    """Appends scalars to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard/`.

    A line is one object: {"step": 10, "stage": "rl", "em": 0.5}. Every line reaches the operating
    system before `write` returns, so that a kill loses at most the line being written. JSON has no
    NaN or infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", which
    `read_metrics` turns back. Use it as a context manager. Only one process may write; the others
    take a `SilentWriter`.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self._workdir = pathlib.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self.path = self._workdir / FILE_NAME
        _drop_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._events: Any = None  # a SummaryWriter, made at the first write
        self._purge_step: int | None = None

    def write(self, step: int, stage: str, scalars: Mapping[str, Any]) -> None:
        """Records the scalars of one global step.

        Args:
          step: global step, which counts on through the stages.
          stage: such as "sft", "rl" or "eval"; the prefix of the names in TensorBoard.
          scalars: {name: Python, NumPy or JAX scalar}; one transfer to the host is waited for.

        Raises ValueError for a reserved name, or a value that is no scalar.
        """
        values = _fetch(scalars)
        self._file.write(_to_line(step, stage, values) + "\n")
        self._file.flush()
        events = self._open_events()
        for name, value in values.items():
            events.add_scalar(f"{stage}/{name}", value, global_step=int(step))
        events.flush()

    def resume(self, step: int) -> int:
        """Forgets what a killed run wrote after the global step that was restored.

        Call it before the first `write`. Returns the number of lines dropped. TensorBoard hides
        the points after `step` of the earlier event files.

        Raises RuntimeError after a `write`.
        """
        if self._events is not None:
            raise RuntimeError(
                f"resume({step}) after a write: TensorBoard's purge step is set when its file is "
                "opened; call resume right after MetricWriter(workdir)."
            )
        self._file.close()
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        # Written aside and renamed, so that a kill here cannot lose the history.
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        aside.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._purge_step = step + 1
        return len(lines) - len(kept)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *unused_error: object) -> None:
        self.close()

    def _open_events(self) -> Any:
        if self._events is None:
            # Imported here: it imports PyTorch where that is installed, which takes seconds.
            import tensorboardX

            self._events = tensorboardX.SummaryWriter(
                str(self._workdir / "tensorboard"), purge_step=self._purge_step
            )
        return self._events


class BucketWriter:
    """Keeps `metrics.jsonl` in an object store, where nothing can be appended to.

    The lines are held in memory and the whole object is written anew, at most every
    `interval` seconds and when the writer is closed: a kill loses what is younger. No TensorBoard
    events; make them of the file. Methods as of a `MetricWriter`.
    """

    def __init__(self, workdir: str, interval: float = 30.0):
        self.path = epath.Path(workdir) / FILE_NAME
        self._lines = self.path.read_text().splitlines() if self.path.exists() else []
        self._interval, self._written = interval, -math.inf

    def write(self, step: int, stage: str, scalars: Mapping[str, Any]) -> None:
        """Records the scalars of one global step; see `MetricWriter.write`."""
        self._lines.append(_to_line(step, stage, _fetch(scalars)))
        if time.monotonic() - self._written >= self._interval:
            self._upload()

    def resume(self, step: int) -> int:
        """Forgets what a killed run wrote after `step`; returns the number of lines dropped."""
        kept = [line for line in self._lines if json.loads(line)["step"] <= step]
        dropped, self._lines = len(self._lines) - len(kept), kept
        return dropped

    def _upload(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(f"{line}\n" for line in self._lines))
        self._written = time.monotonic()

    def __enter__(self) -> "BucketWriter":
        return self

    def __exit__(self, *unused_error: object) -> None:
        self._upload()


def open_writer(workdir: str) -> "MetricWriter | BucketWriter":
    """The writer for a folder, or for the URL of an object store (gs://bucket/run)."""
    return BucketWriter(workdir) if "://" in workdir else MetricWriter(workdir)


class SilentWriter:
    """Has the methods of a `MetricWriter`, for processes that write nothing."""

    def write(self, step: int, stage: str, scalars: Mapping[str, Any]) -> None:
        """Forgets the scalars."""

    def resume(self, step: int) -> int:
        """Drops no line."""
        return 0

    def __enter__(self) -> "SilentWriter":
        return self

    def __exit__(self, *unused_error: object) -> None:
        pass


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of a run in the order written; a torn last line is left out.

    Raises FileNotFoundError where no run has written.
    """
    path = pathlib.Path(workdir) / FILE_NAME
    text = path.read_text(encoding="utf-8")
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    special = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return [
        {
            name: special.get(value, value) if name != "stage" and isinstance(value, str) else value
            for name, value in record.items()
        }
        for record in records
    ]


def _drop_torn_line(path: pathlib.Path) -> None:
    """Cuts off a last line without a newline: the process died while writing it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _fetch(scalars: Mapping[str, Any]) -> dict[str, float]:
    # Explicit, because the training loop forbids implicit transfers.
    fetched = jax.device_get(dict(scalars))
    return {name: _to_float(name, value) for name, value in fetched.items()}


def _to_line(step: int, stage: str, values: Mapping[str, float]) -> str:
    record: dict[str, Any] = {"step": int(step), "stage": stage}
    record |= {name: _to_json(value) for name, value in values.items()}
    return json.dumps(record, allow_nan=False)


def _to_float(name: str, value: Any) -> float:
    if name in ("step", "stage"):
        raise ValueError(f"scalar '{name}' would overwrite the field of that name; rename it.")
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "fiubV":
        raise ValueError(
            f"scalar '{name}' has shape {array.shape} and dtype {array.dtype}; reduce it to one "
            "number first."
        )
    return float(array.reshape(()))


def _to_json(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value
