"""GGUF files: numbers decoded by hand and as llama.cpp decodes them, fields, and what is refused.

The writer here is a few lines of `struct`, so that it can write what nobody should.
"""

import struct

import gguf as library
import numpy as np
import pytest

from atommem_jax.weights import gguf_file
from atommem_jax.weights.hf_config import PublishedError

NUMBERS = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30},
    **{"Q4_K": 12, "Q6_K": 14, "Q8_K": 15, "none": 99},
}


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(x):
    """A field's type and value."""
    if isinstance(x, str):
        return struct.pack("<I", 8) + string(x)
    if isinstance(x, list) and isinstance(x[0], int):
        return struct.pack(f"<IIQ{len(x)}i", 9, 5, len(x), *x)
    if isinstance(x, bytes):  # as it is, type included
        return x
    if isinstance(x, list):
        return struct.pack("<IIQ", 9, 8, len(x)) + b"".join(map(string, x))
    if isinstance(x, float):
        return struct.pack("<If", 6, x)
    kind, layout = (4, "I") if 0 <= x < 2**32 else (11, "q")
    return struct.pack(f"<I{layout}", kind, x)


def write(path, fields, tensors, version=3, magic=b"GGUF"):
    """tensors: name -> (shape, kind, bytes)."""
    head = magic + struct.pack("<IQQ", version, len(tensors), len(fields))
    head += b"".join(string(name) + value(x) for name, x in fields.items())
    data = b""
    for name, (shape, kind, stored) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", NUMBERS[kind], len(data))
        data += stored
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def half(x):
    return struct.pack("<e", x)


NIBBLES = bytes((i + 1) % 16 << 4 | i for i in range(16))  # 0 1 .. 15, then 1 2 .. 15 0
HALVES = [*range(16), *range(1, 16), 0]


@pytest.mark.parametrize(
    ("kind", "stored", "expected"),
    [
        ("Q4_0", half(0.5) + NIBBLES, [(q - 8) * 0.5 for q in HALVES]),
        ("Q4_1", half(0.5) + half(-3.0) + NIBBLES, [q * 0.5 - 3.0 for q in HALVES]),
        ("Q8_0", half(0.25) + bytes(range(240, 256)) + bytes(range(16)),
         [q * 0.25 for q in range(-16, 16)]),
        ("F16", half(1.5) * 32, [1.5] * 32),
        ("BF16", b"\xc0\x3f" * 32, [1.5] * 32),
        ("F32", struct.pack("<f", 1.5) * 32, [1.5] * 32),
    ],
)  # fmt: skip
def test_numbers_by_hand(tmp_path, kind, stored, expected):
    row = np.array(expected, np.float32)
    file = gguf_file.File(write(tmp_path / "a.gguf", {}, {"a": ((3, 32), kind, stored * 3)}))
    assert file.shapes == {"a": (3, 32)}
    np.testing.assert_array_equal(file.read("a").astype(np.float32), np.stack([row] * 3))
    np.testing.assert_array_equal(file.read("a", np.array([2])).astype(np.float32), row[None])


def test_fields_of_every_kind(tmp_path):
    fields = {"name": "small", "count": 7, "rate": 0.5, "words": ["a", "β", ""]}
    assert gguf_file.File(write(tmp_path / "a.gguf", fields, {})).fields == fields


# ---------------------------------------------------------------------------------------------
# K-quants, after the layout in ggml-common.h, one number at a time


def decode_q4_k(block):
    """256 numbers: two float16, eight pairs of six bits packed in 12 bytes, 128 bytes of halves."""
    scale, least = struct.unpack("<ee", block[:4])
    packed, halves = block[4:16], block[16:]
    scales, mins = [], []
    for j in range(8):
        if j < 4:
            scales.append(packed[j] & 63)
            mins.append(packed[j + 4] & 63)
        else:
            scales.append(packed[j + 4] & 15 | packed[j - 4] >> 6 << 4)
            mins.append(packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    found = []
    for j in range(8):  # runs of 32; two share their bytes, the even one has the low halves
        run = halves[j // 2 * 32 : j // 2 * 32 + 32]
        found += [scale * scales[j] * (b >> 4 * (j % 2) & 15) - least * mins[j] for b in run]
    return found


def decode_q6_k(block):
    """256 numbers: 128 bytes of low halves, 64 of high pairs of bits, 16 int8 scales, a float16."""
    low, high = block[:128], block[128:192]
    scales, (scale,) = struct.unpack("<16b", block[192:208]), struct.unpack("<e", block[208:])
    found = []
    for i in range(256):
        half, within = divmod(i, 128)
        run, at = divmod(within, 32)
        nibble = low[half * 64 + run % 2 * 32 + at] >> 4 * (run // 2) & 15
        pair = high[half * 32 + at] >> 2 * run & 3
        found.append(scale * scales[i // 16] * ((nibble | pair << 4) - 32))
    return found


@pytest.mark.parametrize(
    ("kind", "size", "places", "decode"),
    [("Q4_K", 144, (0, 2), decode_q4_k), ("Q6_K", 210, (208,), decode_q6_k)],
)
def test_k_quants_are_decoded_as_they_are_laid_out(tmp_path, kind, size, places, decode):
    rng = np.random.default_rng(0)
    blocks = [bytearray(rng.bytes(size)) for _ in range(40)]
    for block in blocks:
        for at in places:  # random bytes would be infinite or NaN now and then
            block[at : at + 2] = half(rng.normal())
    stored = ((20, 512), kind, b"".join(blocks))
    file = gguf_file.File(write(tmp_path / "a.gguf", {}, {"a": stored}))
    expected = np.array([decode(block) for block in blocks]).astype(np.float32).reshape(20, 512)
    np.testing.assert_array_equal(file.read("a"), expected)
    np.testing.assert_array_equal(file.read("a", slice(3, 17, 2)), expected[3:17:2])
    np.testing.assert_array_equal(file.read("a", np.array([7, 0, 7])), expected[[7, 0, 7]])


@pytest.mark.parametrize("step", [1, 512 * 3, 1 << 22])
def test_rows_decoded_in_turn_are_the_same(tmp_path, monkeypatch, step):
    monkeypatch.setattr(gguf_file, "_DECODED_AT_ONCE", step)
    values = np.random.default_rng(0).normal(size=(7, 512)).astype(np.float32)
    packed = library.quants.quantize(values, library.GGMLQuantizationType.Q8_0)
    path = write(tmp_path / "a.gguf", {}, {"a": (values.shape, "Q8_0", packed.tobytes())})
    expected = library.quants.dequantize(packed, library.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(gguf_file.File(path).read("a"), expected)


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0", "F16", "BF16", "F32"]
)
def test_what_llama_cpp_writes_is_read(tmp_path, kind):
    number = library.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
    stored = library.quants.quantize(values, number)
    writer = library.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a", stored, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf_file.File(tmp_path / "a.gguf").read("a")
    expected = library.quants.dequantize(stored, number)
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


# ---------------------------------------------------------------------------------------------
# What is refused


def expect(path, *words):
    with pytest.raises(PublishedError) as caught:
        gguf_file.File(path)
    for word in (path.name, *words):
        assert word in str(caught.value), str(caught.value)


TENSORS = {"first": ((2, 32), "F32", bytes(256)), "last": ((4, 32), "Q8_0", bytes(136))}
FIELDS = {"general.architecture": "llama", "words": ["one", "two"]}


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (slice(0, -8), ["truncated", "within last"]),
        (slice(0, 150), ["within its header"]),
        (slice(0, 2), ["begins with b'GG'"]),
        (slice(0, 6), ["within its header"]),
    ],
)
def test_a_truncated_file_is_named(tmp_path, cut, words):
    path = write(tmp_path / "model.gguf", FIELDS, TENSORS)
    path.write_bytes(path.read_bytes()[cut])
    expect(path, *words)


def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    expect(path, "no such file")
    expect(write(path, FIELDS, TENSORS, magic=b"GGJT"), "begins with b'GGJT'")
    expect(write(path, FIELDS, TENSORS, version=1), "version=1: allowed are 2, 3")
    expect(write(path, FIELDS, TENSORS, version=3 << 24), "is big-endian", "gguf-convert-endian")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"words": struct.pack("<IIQ", 9, 0, 2**60)}, ["words is an array of 1152921504606846976"]),
        ({"words": struct.pack("<IIQ", 9, 8, 2**23)}, ["within its header"]),
        ({"words": struct.pack("<IIQ", 9, 0, 2**23)}, ["within its header"]),
        ({"words": struct.pack("<IQ", 8, 2**62)}, ["within its header"]),
        ({"words": struct.pack("<IQ", 8, 2) + b"\xff\xfe"}, ["within its header"]),
        ({"words": struct.pack("<II", 77, 0)}, ["field words is of type 77"]),
        ({"words": struct.pack("<IIQ", 9, 9, 1)}, ["field words is an array of type 9"]),
        ({"general.alignment": 0}, ["general.alignment=0: must be a whole number above 0"]),
        ({"general.alignment": ["a"]}, ["general.alignment=['a']"]),
    ],
)
def test_damaged_fields_are_refused_before_anything_is_allocated(tmp_path, changes, words):
    expect(write(tmp_path / "model.gguf", FIELDS | changes, TENSORS), *words)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (((), "F32", b""), ["bad has 0 dimensions; allowed are 1 to 4"]),
        (((1,) * 5, "F32", bytes(4)), ["bad has 5 dimensions"]),
        (((2**40, 2**40), "F32", b""), ["truncated", "within bad"]),
        (((0, 32), "F32", b""), ["bad [0, 32] is F32"]),
        (((2, 16), "Q4_K", b""), ["bad [2, 16] is Q4_K, which has blocks of 256 in each row"]),
        (((2, 256), "Q8_K", b""), ["bad holds numbers of kind Q8_K", "Q8_0, F16 or BF16"]),
        (((2, 32), "none", b""), ["bad holds numbers of kind 99, which GGUF does not have"]),
    ],
)
def test_damaged_tensors_are_named(tmp_path, tensor, words):
    expect(write(tmp_path / "model.gguf", FIELDS, TENSORS | {"bad": tensor}), *words)


def test_a_name_that_stands_twice_is_refused(tmp_path):
    path = write(tmp_path / "model.gguf", FIELDS, TENSORS)
    path.write_bytes(path.read_bytes().replace(string("first"), string("again")))
    assert set(gguf_file.File(path).shapes) == {"again", "last"}
    path = write(tmp_path / "model.gguf", FIELDS, {**TENSORS, "befor": TENSORS["first"]})
    path.write_bytes(path.read_bytes().replace(string("befor"), string("first")))
    expect(path, "lists 'first' twice")
