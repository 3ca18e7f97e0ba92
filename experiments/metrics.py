"""Metrics of a run: JSON lines that programs read, TensorBoard events that people look at."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

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
        # Explicit, because the training loop forbids implicit transfers.
        fetched = jax.device_get(dict(scalars))
        values = {name: _to_float(name, value) for name, value in fetched.items()}
        record = {"step": int(step), "stage": stage}
        record |= {name: _to_json(value) for name, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
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
