"""Metrics of a run: JSON lines that programs read, TensorBoard events that people look at."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from atommem_jax import text_files
from atommem_jax.config import ConfigError, paths

FILE_NAME = "metrics.jsonl"


class MetricWriter:
    """Appends scalars to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard/`.

    A line is one object: {"step": 10, "stage": "rl", "em": 0.5}. Every line reaches the operating
    system before `write` returns, so that a kill loses at most the line being written. Lines that
    are no records, as of a disk that was full, are moved to `metrics.jsonl.broken` when it is
    opened, with a warning: what only tells of a run does not keep it from going on. JSON has no
    NaN or infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", which
    `read_metrics` turns back. Use it as a context manager. Only one process may write; the others
    take a `SilentWriter`.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self._workdir = pathlib.Path(paths.expand(workdir))
        paths.make_folder(self._workdir, f"--workdir={self._workdir}")
        self.path = self._workdir / FILE_NAME
        try:
            _set_broken_lines_aside(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{self.path}: {error.strerror}; move it away, or make it a file that you may "
                "write to"
            ) from error
        self._failed = False
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
        try:
            self._file.write(_to_line(step, stage, values) + "\n")
            self._file.flush()
        except OSError as error:  # such as a full disk; what is left is written with the next line
            if not self._failed:
                text_files.warn(f"{self.path}: {error.strerror}; training goes on without metrics")
            self._failed = True
            return
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
        lines = _split_lines(self.path.read_bytes())
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        _replace(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8")
        self._purge_step = step + 1
        return len(lines) - len(kept)

    def flush(self) -> None:
        """All that was written is kept already."""

    def close(self) -> None:
        """Closes the files."""
        with contextlib.suppress(OSError):  # it was warned of when it was written
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

    The lines are held in memory and the whole object is written anew: at most every `interval`
    seconds, at every `flush`, as before a checkpoint, and when the writer is closed. A kill loses
    what is younger. Where it cannot be written, a warning says so once, training goes on, and the
    next attempt writes all lines. No TensorBoard events; make them of the file. Methods as of a
    `MetricWriter`.

    Raises ConfigError where the store cannot be read.
    """

    def __init__(self, workdir: str, interval: float = 30.0):
        self.path = paths.locate(workdir) / FILE_NAME
        with paths.reaching(workdir, f"--workdir={workdir}"):
            data = _read_object(self.path)
            sound, broken = _sort_lines(_split_lines(data), str(self.path))
            if broken:
                aside = self.path.parent / f"{FILE_NAME}{_BROKEN}"
                others = _read_object(aside).decode("utf-8", "replace")
                paths.write_text(aside, others + "".join(f"{line}\n" for line in broken))
        self._lines = sound
        self._interval, self._written = interval, -math.inf
        self._failed = False

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

    def flush(self) -> None:
        """Writes the object now."""
        self._upload()

    def _upload(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            paths.write_text(self.path, "".join(f"{line}\n" for line in self._lines))
            self._failed = False
        except Exception as error:  # of the store's client, which has tried again and again
            if not self._failed:
                text_files.warn(
                    f"{self.path}: {paths.describe(error)}; training goes on, and all lines are "
                    "written with the next ones"
                )
            self._failed = True
        self._written = time.monotonic()

    def __enter__(self) -> "BucketWriter":
        return self

    def __exit__(self, *unused_error: object) -> None:
        self._upload()


def open_writer(workdir: str) -> "MetricWriter | BucketWriter":
    """The writer for a folder, or for the URL of an object store (gs://bucket/run)."""
    return BucketWriter(workdir) if paths.is_remote(workdir) else MetricWriter(workdir)


class SilentWriter:
    """Has the methods of a `MetricWriter`, for processes that write nothing."""

    def write(self, step: int, stage: str, scalars: Mapping[str, Any]) -> None:
        """Forgets the scalars."""

    def resume(self, step: int) -> int:
        """Drops no line."""
        return 0

    def flush(self) -> None:
        """Has nothing to keep."""

    def __enter__(self) -> "SilentWriter":
        return self

    def __exit__(self, *unused_error: object) -> None:
        pass


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of a run in the order written; what is none is left out.

    A torn last line is left out silently, other broken lines with a warning.

    Raises FileNotFoundError where no run has written, and ConfigError where a bucket cannot be
    reached or refuses: what was written is then not known.
    """
    path = paths.locate(workdir) / FILE_NAME
    data = None
    with paths.reaching(path, str(path)), contextlib.suppress(FileNotFoundError):
        data = path.read_bytes()
    if data is None:
        raise FileNotFoundError(f"{path}: no such file; no run has written metrics there")
    lines, _ = _sort_lines(_split_lines(data), str(path))
    return [
        {
            name: _SPECIAL.get(value, value)
            if name != "stage" and isinstance(value, str)
            else value
            for name, value in json.loads(line).items()
        }
        for line in lines
    ]


_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_BROKEN = ".broken"


def _to_number(value: float | str) -> float:
    return _SPECIAL[value] if isinstance(value, str) else value


def _split_lines(data: bytes) -> list[str]:
    """The lines of a file; a last one without a newline is torn: the process died writing it."""
    text = data[: data.rfind(b"\n") + 1].decode("utf-8", "replace").removeprefix("\ufeff")
    return [line.rstrip("\r") for line in text.split("\n")[:-1]]


def _sort_lines(lines: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """(lines that are records, others): warns of the others; blank lines are neither."""
    sound, broken = [], []
    for number, line in enumerate(lines, start=1):
        if _is_record(line):
            sound.append(line)
        elif line.strip("\0 \t"):
            broken.append(line)
            shown = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
            text_files.warn(
                f"{name}, line {number}: is no record of a run and is left out: {shown!r}"
            )
    return sound, broken


_SHOWN = 60  # characters of a broken line


def _is_record(line: str) -> bool:
    """Whether a line is what `_to_line` writes."""
    try:
        record = text_files.parse_json(line)
    except ValueError:
        return False
    if not isinstance(record, dict) or not isinstance(record.get("stage"), str):
        return False
    values = [value for name, value in record.items() if name != "stage"]
    return type(record.get("step")) is int and all(
        isinstance(value, (int, float)) or (isinstance(value, str) and value in _SPECIAL)
        for value in values
    )


def _read_object(path: Any) -> bytes:
    """What an object holds; nothing where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _set_broken_lines_aside(path: pathlib.Path) -> None:
    """Leaves only whole records in a file of metrics, and the other lines in one beside it."""
    if not path.exists():
        return
    data = path.read_bytes()
    sound, broken = _sort_lines(_split_lines(data), str(path))
    if broken:
        aside = path.with_name(f"{path.name}{_BROKEN}")
        with aside.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in broken)
    if data != "".join(f"{line}\n" for line in sound).encode():
        _replace(path, sound)


def _replace(path: pathlib.Path, lines: Sequence[str]) -> None:
    """In one go, so that a kill here cannot lose the history."""
    paths.write_text(path, "".join(f"{line}\n" for line in lines))


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
