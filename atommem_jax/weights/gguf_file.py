"""Fields and tensors of GGUF, the file format of llama.cpp.

A file holds typed fields, then a list of tensors, then their data. Rows of a matrix are stored one
after another, so that rows can be read and decoded alone.

Which kinds of numbers there are, and what their bytes mean, is what the package `gguf` of llama.cpp
says: quantised tensors of every kind that it decodes are read, K-quants included. The header is
read here. `gguf.GGUFReader` makes arrays of each word of a vocabulary: for a header as large as
Qwen3's it took 7 seconds and 490 MB (here 0.2 seconds and 22 MB), and given an array whose length
is damaged it does not end. Here every length is compared with the file before anything is
allocated.
"""

import array
import dataclasses
import importlib
import math
import os
import pathlib
import re
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from atommem_jax.weights.hf_config import PublishedError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of the data, where the field general.alignment does not say otherwise
_MOST_DIMENSIONS = 4
_LONGEST_ARRAY = 1 << 24  # far above any vocabulary; what is longer is damage
_LONGEST_SHOWN = 80  # characters of a name in an error
_DECODED_AT_ONCE = 1 << 22  # numbers: decoding takes several times the memory of its result

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Number of a field's type -> its layout as `struct` spells it."""
_STRING, _ARRAY = 8, 9

_PLAIN: dict[str, Any] = {"F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
"""Kinds that are a dtype of NumPy: they stay as they are stored."""


def _import_library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise PublishedError(
            "weights in .gguf files need the package gguf, which is not installed; run "
            "pip install 'atommem_jax[gguf]'"
        ) from error


# ---------------------------------------------------------------------------------------------
# Kinds of numbers


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How numbers are stored: `block` of them in `size` bytes.

    decode: uint8 [rows bytes] -> [rows numbers].
    """

    name: str
    block: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray]


def _find_kind(number: int) -> _Kind | str:
    """The kind of a number in a list of tensors; its name alone where it cannot be decoded."""
    library = _import_library()
    try:
        kind = library.GGMLQuantizationType(number)
        block, size = library.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        return f"kind {number}, which GGUF does not have"
    if kind.name in _PLAIN:
        return _Kind(kind.name, block, size, lambda raw: raw.view(_PLAIN[kind.name]))

    def decode(raw: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # damaged scales are infinite or NaN, and stay so
            return library.quants.dequantize(raw, kind)

    try:
        decode(np.zeros((1, size), np.uint8))
    except NotImplementedError:
        return f"kind {kind.name}"
    return _Kind(kind.name, block, size, decode)


# ---------------------------------------------------------------------------------------------
# Files


@dataclasses.dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]  # outermost dimension first, as in NumPy
    kind: _Kind
    path: pathlib.Path  # of the file that holds its data
    start: int  # of its data, in bytes from the beginning of that file

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.kind.block * self.kind.size

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape[:-1]) * self.row_bytes


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file is to be read as GGUF: by its ending, or by how it begins."""
    path = pathlib.Path(path)
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


class File:
    """Fields and tensors of a GGUF file, or of the parts of one that was split.

    Attributes:
      path: of the file.
      fields: name -> value; arrays of strings are lists, and those of numbers `array.array`.
      shapes: name of each tensor -> shape, outermost dimension first.

    Raises PublishedError for a file that is not GGUF, is damaged or truncated, holds a kind of
    numbers that is not read here, or is a part whose other parts are missing.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self.fields, self._entries = _read_file(self.path)
        count = self.fields.get("split.count")
        if isinstance(count, int) and count > 1:
            self.fields, self._entries = _read_parts(self.path, self.fields)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Rows (along the outermost dimension) of a tensor, decoded; quantised ones to float32."""
        entry = self._entries[name]
        kind, size = entry.kind, entry.end - entry.start
        # Mapped anew each time, so that what was mapped is given back.
        stored = np.memmap(entry.path, np.uint8, "r", entry.start, (size,))
        if len(entry.shape) == 1:
            return np.asarray(kind.decode(stored[None])[0][rows])
        raw = np.asarray(stored.reshape(*entry.shape[:-1], entry.row_bytes)[rows])
        if kind.name in _PLAIN:
            return kind.decode(raw)
        shape = (*raw.shape[:-1], entry.shape[-1])
        flat = raw.reshape(-1, entry.row_bytes)
        found = np.empty((len(flat), shape[-1]), np.float32)
        step = max(_DECODED_AT_ONCE // shape[-1], 1)
        for i in range(0, len(flat), step):
            found[i : i + step] = kind.decode(flat[i : i + step])
        return found.reshape(shape)


_Contents = tuple[dict[str, Any], dict[str, _Entry]]  # fields and tensors


def _read_file(path: pathlib.Path) -> _Contents:
    """What one file says. Raises PublishedError as `File` does."""
    if not path.is_file():
        raise PublishedError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _Header(path, file, size)
        try:
            fields, entries = header.read()
        except (struct.error, UnicodeDecodeError) as error:
            raise PublishedError(
                f"{path}: ends or breaks within its header, at byte {file.tell()} of {size}; copy "
                "the file again"
            ) from error
    for name, entry in entries.items():
        if entry.end > size:
            raise PublishedError(
                f"{path}: truncated: ends after {size} bytes, within {_show(name)}, which needs "
                f"{entry.end}; copy the file again"
            )
    return fields, entries


def _read_parts(path: pathlib.Path, fields: dict[str, Any]) -> _Contents:
    """Fields of the first part of a file that was split, and the tensors of all.

    fields: of the part at `path`.
    """
    count, number = fields["split.count"], fields.get("split.no")
    part = f"{path}: is part {number + 1 if isinstance(number, int) else '?'} of {count}"
    merge = "copy all of them again, or merge them with llama-gguf-split --merge"
    named = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", path.name, re.IGNORECASE)
    if not named or int(named[3]) != count:
        raise PublishedError(
            f"{part}, and its name does not end in -00001-of-{count:05}.gguf or the like, by which "
            f"the others would be found; {merge}"
        )
    paths = [
        path.with_name(f"{named[1]}-{i:05}-of-{named[3]}{named[4]}") for i in range(1, count + 1)
    ]
    absent = [other for other in paths if not other.is_file()]
    if absent:
        raise PublishedError(f"{part}, and {absent[0].name} is not beside it; {merge}")
    parts = [_read_file(other) for other in paths]
    entries: dict[str, _Entry] = {}
    for i, (found, tensors) in enumerate(parts):
        if (found.get("split.no"), found.get("split.count")) != (i, count):
            raise PublishedError(
                f"{paths[i]}: split.no={found.get('split.no')!r} and split.count="
                f"{found.get('split.count')!r}: must be {i} and {count}, as its name and the other "
                f"parts say; {merge}"
            )
        again = sorted(tensors.keys() & entries.keys())
        if again:
            raise PublishedError(
                f"{paths[i]}: holds {_show(again[0])}, as a part before does; {merge}"
            )
        entries |= tensors
    total = parts[0][0].get("split.tensors.count", len(entries))
    if total != len(entries):
        raise PublishedError(
            f"{part}, which together hold {len(entries)} tensors, and split.tensors.count={total}; "
            f"{merge}"
        )
    return parts[0][0], entries


class _Header:
    """What stands before the data of a file: a cursor that never reads beyond the file's end."""

    def __init__(self, path: pathlib.Path, file: BinaryIO, size: int):
        self._path, self._file, self._left = path, file, size
        self._kinds: dict[int, _Kind | str] = {}

    def read(self) -> _Contents:
        """Fields and tensors. Raises struct.error where the file ends."""
        magic = self._take(min(4, self._left))
        if magic != _MAGIC:
            raise PublishedError(
                f"{self._path}: begins with {magic!r}; a GGUF file begins with {_MAGIC!r}"
            )
        self._check_version(self._unpack("I")[0])
        num_tensors, num_fields = self._unpack("QQ")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self._read_name(fields)
            fields[name] = self._read_value(self._unpack("I")[0], name)
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1:
            raise PublishedError(
                f"{self._path}: general.alignment={alignment!r}: must be a whole number above 0; "
                "the file is damaged, copy it again"
            )
        entries: dict[str, _Entry] = {}
        for _ in range(num_tensors):
            name = self._read_name(entries)
            entries[name] = self._read_entry(name)
        data = -(-self._file.tell() // alignment) * alignment
        return fields, {
            name: dataclasses.replace(entry, start=data + entry.start)
            for name, entry in entries.items()
        }

    def _check_version(self, version: int) -> None:
        if version in _VERSIONS:
            return
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in _VERSIONS:
            raise PublishedError(
                f"{self._path}: is big-endian; allowed are little-endian files, which "
                "`gguf-convert-endian FILE little` makes of it"
            )
        raise PublishedError(
            f"{self._path}: version={version}: allowed are {', '.join(map(str, _VERSIONS))}; "
            "convert the file with a newer llama.cpp"
        )

    def _read_name(self, known: dict[str, Any]) -> str:
        name = self._read_string()
        if name in known:
            raise PublishedError(
                f"{self._path}: lists {_show(name)!r} twice; the file is damaged, copy it again"
            )
        return name

    def _read_value(self, kind: int, name: str) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._read_string()
        if kind != _ARRAY:
            raise PublishedError(
                f"{self._path}: field {_show(name)} is of type {kind}, which GGUF does not have"
            )
        inner, count = self._unpack("IQ")
        if count > _LONGEST_ARRAY:
            raise PublishedError(
                f"{self._path}: field {_show(name)} is an array of {count}; allowed are up to "
                f"{_LONGEST_ARRAY}: the file is damaged, copy it again"
            )
        if inner in _SCALARS:
            # A list of small numbers would take eight times the bytes that the file has for them.
            numbers = array.array(_SCALARS[inner].replace("?", "B"))
            numbers.frombytes(self._take(count * numbers.itemsize))
            return numbers
        if inner != _STRING:
            raise PublishedError(
                f"{self._path}: field {_show(name)} is an array of type {inner}; allowed are "
                "arrays of numbers and of strings"
            )
        return [self._read_string() for _ in range(count)]

    def _read_entry(self, name: str) -> _Entry:
        (rank,) = self._unpack("I")
        if not 1 <= rank <= _MOST_DIMENSIONS:
            raise PublishedError(
                f"{self._path}: {_show(name)} has {rank} dimensions; allowed are 1 to "
                f"{_MOST_DIMENSIONS}: the file is damaged, copy it again"
            )
        shape = tuple(reversed(self._unpack(f"{rank}Q")))
        number, start = self._unpack("IQ")
        kind = self._kinds.get(number)
        if kind is None:
            kind = self._kinds[number] = _find_kind(number)
        if isinstance(kind, str):
            raise PublishedError(
                f"{self._path}: {_show(name)} holds numbers of {kind}, and the package gguf "
                "decodes none of it; take the model in Q8_0, F16 or BF16"
            )
        if 0 in shape or shape[-1] % kind.block:
            raise PublishedError(
                f"{self._path}: {_show(name)} {list(shape)} is {kind.name}, which has blocks of "
                f"{kind.block} in each row; the file is damaged, copy it again"
            )
        return _Entry(shape, kind, self._path, start)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", self._take(struct.calcsize(f"<{layout}")))

    def _read_string(self) -> str:
        return self._take(self._unpack("Q")[0]).decode()

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise struct.error(f"{count} bytes are not there")
        self._left -= count
        return self._file.read(count)


def _show(name: str) -> str:
    """A name as errors quote it: one in a damaged file may be as long as the file."""
    return name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}..."
