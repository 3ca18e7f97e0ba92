"""Prepared data sets: a family's builder runs once, and its splits are read back by name.

A family is a TFDS builder that writes the examples of `schema`, one JSON text a record.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import filelock

from atommem_jax import text_files
from atommem_jax.config import ConfigError, parse_field, paths
from atommem_jax.tasks import user_functions
from atommem_jax.tasks.schema import Example

FAMILIES: Mapping[str, str] = {
    "village": "village",
    "facts": "synthetic",
    "babi": "babi",
    "babilong": "babilong",
    "multihop_qa": "multihop_qa",
    "custom": "custom",
}
"""`task.name` -> the module in `tasks` that makes it."""


class Split(Sequence[Example]):
    """The examples of one split, decoded when they are asked for."""

    def __init__(self, records: Any, data_root: str):
        """Wraps a TFDS data source whose records have the one field `example`."""
        self._records, self._root = records, data_root

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a split of {len(self)}")
        return self._read(self._records[index % len(self)])

    def __iter__(self) -> Iterator[Example]:
        block = 1024  # the record reader is several times faster for many at once
        for first in range(0, len(self), block):
            rows = range(first, min(first + block, len(self)))
            yield from map(self._read, self._records.__getitems__(rows))

    def _read(self, record: Any) -> Example:
        example = json.loads(record["example"])
        if "background" in example:
            recipe = example["background"]
            recipe["file"] = os.path.join(self._root, recipe["file"])
        return example


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared data set: its directory and its splits by name."""

    directory: str
    splits: Mapping[str, Split]

    def split(self, name: str) -> Split:
        """The examples of split `name`. Raises KeyError, naming the splits that there are."""
        if name not in self.splits:
            raise KeyError(f"split is {name!r}; {self.directory} has: {', '.join(self.splits)}.")
        return self.splits[name]


def prepare(task: Mapping[str, Any], data_root: str | os.PathLike[str]) -> Dataset:
    """Writes the data set that `task` describes under `data_root`, unless it is there already.

    Args:
      task: `name` is the family, one of `FAMILIES`; the rest are fields of its config class,
        such as `VillageConfig`. Any family may have a `reward`, see `learning.reward.find`.
      data_root: directory of all prepared data sets; made where it does not exist. Processes that
        share it on one machine wait for each other.

    Raises:
      ValueError: an unknown family or field, or a value that the family does not allow.
      FileNotFoundError: files that the family reads are not there.
      ConfigError: a folder where no lock can be taken.
    """
    import tensorflow_datasets as tfds  # half a second that readers of plain examples can save

    data_root = paths.expand(data_root)
    name = task.get("name")
    config, make_builder = parse_task(task)
    paths.make_folder(data_root, f"--data_root={data_root}")
    with _lock(data_root, name):
        # Made under the lock too: a builder looks for prepared data only when it is made.
        builder = make_builder(config, os.fspath(data_root))
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return Dataset(
        directory=str(builder.data_dir),
        splits={
            split: Split(builder.as_data_source(split=split), os.fspath(data_root))
            for split in builder.info.splits
        },
    )


def parse_task(task: Mapping[str, Any]) -> tuple[Any, Callable[[Any, str], Any]]:
    """The config of a task's family, and what makes its builder; see `prepare`."""
    fields = dict(task)
    name = fields.pop("name", None)
    reward = fields.pop("reward", "")
    if parse_field(str, reward, "task.reward"):
        user_functions.find(reward, "config.task.reward")  # now, not in the middle of training
    make_config, make_builder = _family(name)
    hints = typing.get_type_hints(make_config)
    for field in fields:
        if field not in hints:
            allowed = ", ".join(hints)
            raise ValueError(f"config.task.{field} is no field of task {name!r}; it has {allowed}.")
        fields[field] = parse_field(hints[field], fields[field], f"task.{field}")
    return make_config(**fields), make_builder


def find_family(name: str | None) -> str:
    """Name of the module in `tasks` that makes a task. Raises ValueError for an unknown task."""
    name = "facts" if name == "synthetic" else name  # its name in older versions
    if name is None or name not in FAMILIES:
        raise ValueError(
            f"config.task.name is {name!r}; allowed: {', '.join(map(repr, FAMILIES))}."
        )
    return FAMILIES[name]


def find_config(name: str | None) -> Any:
    """The config class of a family, whose fields are those of its task. As `find_family`."""
    return _family(name)[0]


def _family(name: str | None) -> tuple[Any, Callable[[Any, str], Any]]:
    module = find_family(name)
    if module == "village":
        from atommem_jax.tasks import village

        return village.VillageConfig, village.make_builder
    if module == "synthetic":
        from atommem_jax.tasks import synthetic

        return synthetic.SyntheticConfig, synthetic.make_builder
    if module == "babi":
        from atommem_jax.tasks import babi

        return babi.BabiConfig, babi.make_builder
    if module == "babilong":
        from atommem_jax.tasks import babilong

        return babilong.BabilongConfig, babilong.make_builder
    if module == "multihop_qa":
        from atommem_jax.tasks import multihop_files, multihop_qa

        return multihop_files.MultihopQaConfig, multihop_qa.make_builder
    from atommem_jax.tasks import custom

    return custom.CustomConfig, custom.make_builder


@contextlib.contextmanager
def _lock(data_root: str | os.PathLike[str], name: str) -> Iterator[None]:
    """Holds the lock of a family; the system lets go of it even where the process is killed."""
    # A file system without locks is refused: the library's lock of another kind, a file that is
    # there or not, would outlive a process that was killed on another machine.
    lock = filelock.FileLock(os.path.join(data_root, f".{name}.lock"), fallback_to_soft=False)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise ConfigError(
            f"--data_root={os.fspath(data_root)}: no lock can be taken in this folder "
            f"({getattr(error, 'strerror', None) or error}); allowed is one that you may write "
            "to, on a file system that has locks: pass another"
        ) from error
    try:
        yield
    finally:
        lock.release()


def tokenizer_texts(dataset: Dataset) -> Iterator[str]:
    """Yields each different text of the train split once: what a tokenizer may be trained on."""
    seen: set[str] = set()
    for example in dataset.split("train"):
        for text in _texts(example):
            if text not in seen:
                seen.add(text)
                yield text
        file = example.get("background", {}).get("file")
        if file is not None and file not in seen:
            seen.add(file)  # of the same books for every example
            for line in text_files.read_text(file).split("\n"):
                if line and line not in seen:
                    seen.add(line)
                    yield line


def _texts(example: Example) -> Iterator[str]:
    for fact in itertools.chain.from_iterable(example["chunks"]):
        yield fact["text"]
        if fact.get("note"):
            yield fact["note"]
    for question in example["questions"]:
        yield question["text"]
        yield from question["aliases"]
    yield example["focus"]
