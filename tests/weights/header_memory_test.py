"""Headers that lie about sizes: nothing is allocated that the file could not hold.

Two files of a megabyte, nearly all of it numbers. Their headers are damaged so that they claim
lengths, counts, shapes and offsets of any size, up to 2**63. What is allocated stays within two
copies of the file: of a header as long as the file, its bytes and its text, of which the bytes are
let go before the text is parsed. Bytes that are no text are there once more, in Python's own
UnicodeDecodeError. Allocations of Python are traced, NumPy's among them, and a limit of the
process's memory catches those of libraries in other languages.

What remains where a header is sound: objects in Python are larger than their text. A string of n
letters takes n + 50 bytes, a number up to 32, its place in a list or an object 8 to 100 more. So a
list of many small values takes several times its file, whoever parses it.
"""

import json
import pathlib
import resource
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from atommem_jax import text_files
from atommem_jax.weights import gguf_file, hf_config, hf_shards
from atommem_jax.weights.hf_config import PublishedError
from tests.conftest import ROOT
from tests.helpers import runs
from tests.weights import gguf_file_test

COUNT = 400  # mutations of each format
SIZE = 1 << 20  # of the numbers in a file
MOST = {kind: copies * SIZE + (1 << 18) for kind, copies in (("safetensors", 2), ("gguf", 3))}
SLACK = 64 << 20  # for what the allocator asks for at once
LIES = tuple(
    sign * (1 << power) + shift
    for power in (0, 8, 16, 20, 21, 24, 31, 32, 40, 47, 62, 63)
    for sign, shift in ((1, 0), (1, -1), (1, 7))
)


def make_safetensors():
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [256, 512], "data_offsets": [0, SIZE // 2]},
            "b": {"dtype": "F16", "shape": [1024, 256], "data_offsets": [SIZE // 2, SIZE]},
        }
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(SIZE)


def lie_in_safetensors(stored, rng):
    """Another length of the header, or other numbers in it."""
    (length,) = struct.unpack("<Q", stored[:8])
    if rng.integers(3) == 0:
        return struct.pack("<Q", int(rng.choice(LIES)) % (1 << 64)) + stored[8:]
    header = json.loads(stored[8 : 8 + length])
    for _ in range(int(rng.integers(1, 4))):
        tensor = header["ab"[rng.integers(2)]]
        field = tensor[("shape", "data_offsets")[rng.integers(2)]]
        field[rng.integers(2)] = LIES[rng.integers(len(LIES))]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + stored[8 + length :]


def make_gguf(path):
    fields = {"name": "small", "words": ["a", "b", "c"], "numbers": [1, 2, 3], "rate": 0.5}
    tensors = {
        "a": ((256, 512), "F32", bytes(SIZE // 2)),
        "b": ((512, 512), "F16", bytes(SIZE // 2)),
    }
    return gguf_file_test.write(path, fields, tensors).read_bytes()


def lie_in_gguf(stored, rng):
    """A number of four or eight bytes anywhere in the header is another."""
    data = bytearray(stored)
    for _ in range(int(rng.integers(1, 3))):
        layout = "<Q" if rng.integers(4) else "<I"
        size = struct.calcsize(layout)
        at = int(rng.integers(4, len(stored) - SIZE - size))
        lie = LIES[rng.integers(len(LIES))] % (1 << 8 * size)
        data[at : at + size] = struct.pack(layout, lie)
    return bytes(data)


def open_safetensors(path):
    directory = hf_shards.Directory(path.parent)
    for name, shape in directory.shapes.items():
        assert directory.read(name, (slice(1),) * len(shape)).nbytes <= 8


def open_gguf(path):
    file = gguf_file.File(path)
    for name in file.shapes:
        file.read(name, slice(1))


FORMATS = {
    "safetensors": ("model.safetensors", lie_in_safetensors, open_safetensors),
    "gguf": ("model.gguf", lie_in_gguf, open_gguf),
}


def try_lies(folder, kind, count, watch):
    """Opens `count` files that lie; returns how many are refused. `watch(call)` measures one."""
    name, lie, open_file = FORMATS[kind]
    path = folder / name
    whole = make_safetensors() if kind == "safetensors" else make_gguf(path)
    path.write_bytes(whole)
    open_file(path)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(count):
        path.write_bytes(lie(whole, rng))
        refused += watch(lambda: _is_refused(open_file, path))
    return refused


def _is_refused(open_file, path):
    try:
        open_file(path)
    except PublishedError:
        return True
    return False


@pytest.mark.parametrize("kind", FORMATS)
def test_headers_that_lie_take_no_more_memory_than_their_file_allows(tmp_path, kind):
    peaks = []

    def watch(call):
        tracemalloc.start()
        try:
            return call()
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    refused = try_lies(tmp_path, kind, COUNT, watch)
    print(f"{kind}: {refused} of {COUNT} refused; at most {max(peaks):,} bytes")
    assert refused > COUNT // 2
    assert max(peaks) < MOST[kind]


def test_a_file_of_records_is_held_once_beside_what_is_parsed(tmp_path):
    """Its text, and one record or the list of them; of lines not even all."""
    record = {"text": "x" * 1000}
    lines, whole = tmp_path / "lines.jsonl", tmp_path / "list.json"
    lines.write_bytes(b"\r\n".join([json.dumps(record).encode()] * 1000) + b"\r\n\r\n")
    whole.write_text(json.dumps([record] * 1000))
    for path, most in ((lines, 2.1), (whole, 2.4)):
        kept, peak = measure(lambda path=path: sum(1 for _ in text_files.read_records(path)))
        assert kept == 1000
        assert peak < most * path.stat().st_size


def test_a_config_is_held_once_beside_its_text(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({str(i): "x" * 1000 for i in range(1000)}))
    found, peak = measure(lambda: hf_config.read_json(path))
    assert len(found) == 1000
    assert peak < 2.3 * path.stat().st_size


def test_numbers_of_a_header_take_what_they_take_in_the_file(tmp_path):
    numbers = b"\x00\x01\xff\x07" * (SIZE // 4)
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 7) + b"numbers"
    path = tmp_path / "a.gguf"
    for kind, layout in ((0, "B"), (1, "b"), (7, "B"), (5, "i"), (6, "f"), (12, "d")):
        count = len(numbers) // struct.calcsize(layout)
        path.write_bytes(head + struct.pack("<IIQ", 9, kind, count) + numbers)
        file, peak = measure(lambda: gguf_file.File(path))
        found = file.fields["numbers"]
        expected = struct.unpack(f"<{count}{layout}", numbers)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        assert peak < 2.2 * SIZE


def measure(call):
    """(what it returns, most bytes that it held)."""
    tracemalloc.start()
    try:
        found = call()
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def try_within_a_limit(folder, kind):
    """As above, in a process that may not have much more memory than it has when it begins."""
    path = pathlib.Path(folder)
    try_lies(path, kind, 3, lambda call: call())  # what is imported and opened once
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SLACK
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with pytest.raises(MemoryError):
        bytes(2 * SLACK)  # the limit holds
    print(try_lies(path, kind, COUNT, lambda call: call()), "refused")


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("kind", FORMATS)
def test_headers_that_lie_are_read_within_a_limit_of_memory(tmp_path, kind):
    script = (
        "import sys; from tests.weights import header_memory_test as here; "
        "here.try_within_a_limit(*sys.argv[1:])"
    )
    # A thread of a library that first allocates after the limit is set would be given an arena of
    # its own: 64 MB of addresses, all that the limit leaves.
    limits = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), kind],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=runs.make_environment() | limits,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > COUNT // 2
