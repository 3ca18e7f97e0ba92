"""Files of a Hugging Face directory: which tensors lie in which safetensors file.

One file, or several beside an index. The names and shapes of tensors are read from the headers,
and what a file lacks is named: a tensor, or the one that a truncated file ends in. Which tensor is
written to which file is decided by `huggingface_hub`, from shapes alone.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from atommem_jax.weights import hf_config
from atommem_jax.weights.hf_config import PublishedError

_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_READABLE = ("F32", "F16", "BF16", "F64")  # as safetensors spells them


class Directory:
    """The safetensors of a Hugging Face directory, as `huggingface.Weights`.

    Files are opened for one tensor at a time, so that what was mapped is given back.

    Raises PublishedError for a file that is missing, truncated or not as the index says.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self._folder = pathlib.Path(directory)
        self.place = str(self._folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, pathlib.Path] = {}
        for path, expected in self._list_files():
            shapes = read_shapes(path)
            absent = sorted(set(expected) - shapes.keys())
            if absent:
                raise PublishedError(
                    f"{path}: does not hold {absent[0]}, which {_INDEX_FILE} says it does; copy "
                    "both files again"
                )
            again = sorted(shapes.keys() & self.shapes.keys())
            if again:
                raise PublishedError(
                    f"{path}: holds {again[0]}, which {self._file_of[again[0]]} holds too; remove "
                    "the file that does not belong to the model"
                )
            self.shapes |= shapes
            self._file_of |= dict.fromkeys(shapes, path)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor; one slice for each dimension."""
        path = self._file_of[name]
        with safetensors.safe_open(path, "numpy") as file:
            part = file.get_slice(name)
            if part.get_dtype() not in _READABLE:
                raise PublishedError(
                    f"{path}: {name} has dtype {part.get_dtype()}; allowed are "
                    f"{', '.join(_READABLE)}. Take the model that was not quantised"
                )
            return part[index]

    def _list_files(self) -> list[tuple[pathlib.Path, Sequence[str]]]:
        """Each file with the tensors that it must hold."""
        index = self._folder / _INDEX_FILE
        if index.is_file():
            places = hf_config.read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(map(_is_file_name, places.values())):
                raise PublishedError(
                    f"{index}: weight_map must be an object of tensors and the names of their "
                    "files; copy the file again"
                )
            held: dict[str, list[str]] = {}
            for name, file in places.items():
                held.setdefault(file, []).append(name)
            return [(self._folder / file, names) for file, names in sorted(held.items())]
        if not (self._folder / _SINGLE_FILE).is_file():
            raise PublishedError(
                f"{self._folder}: holds neither {_SINGLE_FILE} nor {_INDEX_FILE}; allowed are "
                "directories of safetensors and .gguf files, other formats convert first"
            )
        return [(self._folder / _SINGLE_FILE, ())]


def read_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of one file. Raises PublishedError where it cannot be read."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            # An iterator only in newer versions, hence keys().
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise PublishedError(
            f"{path}: no such file, and {_INDEX_FILE} names it; copy it"
        ) from error
    except (safetensors.SafetensorError, OSError) as error:
        raise PublishedError(f"{path}: {_explain(path) or error}; copy the file again") from error


def _is_file_name(value: Any) -> bool:
    """Whether it names a file of the same directory."""
    return (
        isinstance(value, str)
        and value != ""
        and "\0" not in value
        and pathlib.PurePath(value).name == value
    )


def _explain(path: pathlib.Path) -> str:
    """Which tensor a truncated file ends in; '' where that is not what is wrong."""
    if not path.is_file():
        return ""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if length + 8 > size or not length:
            return f"ends within its header, after {size} bytes"
        try:
            text = file.read(length).decode()  # apart, so that the bytes are not kept beside it
            header = json.loads(text)
            ends = {
                n: 8 + length + t["data_offsets"][1] for n, t in header.items() if n[:2] != "__"
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return ""
    beyond = [name for name, end in sorted(ends.items(), key=lambda pair: pair[1]) if end > size]
    if not beyond:
        return ""
    return (
        f"truncated: ends after {size} bytes of {max(ends.values())}, within {beyond[0]}, and "
        f"{len(beyond)} tensors are not whole"
    )


def remove(folder: pathlib.Path) -> None:
    """Removes what an earlier export left: all files of weights, and the index."""
    for stale in [*folder.glob("model-*-of-*.safetensors"), folder / _SINGLE_FILE]:
        stale.unlink(missing_ok=True)
    (folder / _INDEX_FILE).unlink(missing_ok=True)


def plan(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_file_bytes: int
) -> StateDictSplit:
    """Which file holds which tensor, by the rule of `huggingface_hub`; no tensor is needed for it.

    Args:
      shapes: name -> shape, in the order in which tensors are written.
      itemsize: bytes of a number.
      max_file_bytes: size of a file, except where one tensor is larger.
    """
    return split_state_dict_into_shards_factory(
        dict(shapes),
        get_storage_size=lambda shape: math.prod(shape) * itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )


def write_index(folder: pathlib.Path, files: StateDictSplit) -> None:
    """Which file holds which tensor, and how many bytes all of them have."""
    index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
    write_json(folder / _INDEX_FILE, index)


def write_json(path: pathlib.Path, value: Any) -> None:
    """As Hugging Face's own files are laid out."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
