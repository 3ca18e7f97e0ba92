"""Published files that are damaged: read, or refused in a sentence, and never with much memory.

Mutations of a Hugging Face directory, from seeds: bytes at random places, and JSON whose values are
of another kind or size. For .gguf files see `gguf_test.py`.
"""

import copy
import json
import struct
import tracemalloc

import numpy as np
import pytest

from atommem_jax.weights import hf_config, hf_tokenizer, huggingface
from atommem_jax.weights.hf_config import PublishedError
from tests.weights import hf_tokenizer_test, huggingface_test

FIELDS = {
    **huggingface_test.LLAMA,
    "vocab_size": 262,
    "num_hidden_layers": 1,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "eos_token_id": [256, 1],
    "max_position_embeddings": 4096,
    "layer_types": ["full_attention"],
}
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    "model-1.safetensors",
)
_MOST_BYTES = 1 << 22  # of Python's objects, for 60 kB of files; sizes that lie would take more
STRANGE = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -1e308, 1e308, float("nan")),
    *(float("inf"), "", "null", "a", "<|end|>", "..", "a\0b", "\ud800", [], {}, [None], [[]]),
    *({"content": 1}, {"a": {}}, ["full_attention"], [2**40]),
)


def make_model(folder):
    """A directory that has every file which is read."""
    huggingface_test.write(folder, FIELDS, huggingface_test.make_tensors(FIELDS), files=2)
    templates = [{"name": "default", "template": "{{ messages }}"}, {"name": "b", "template": ""}]
    hf_tokenizer_test.write_tokenizer(folder, chat_template=templates, model_max_length=4096)
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 1], "top_p": 0.9}')
    open_all(folder)
    return {name: (folder / name).read_bytes() for name in FILES}


def open_all(folder):
    """Every file, and every tensor as it is stored."""
    config, weights = huggingface.open_weights(folder)
    huggingface.check(weights, config)
    for name, shape in weights.shapes.items():
        assert weights.read(name, (slice(None),) * len(shape)).shape == shape
    tokenizer = hf_tokenizer.read_tokenizer(folder, config.vocab_size, reserved=["<create>"])
    assert tokenizer.decode(tokenizer.encode("Say so.")) == "Say so."
    assert tokenizer.encode_control("<|end|>") == [tokenizer.eos_id]
    hf_tokenizer.write_tokenizer(folder, tokenizer)


def damage_bytes(stored, rng):
    """A file that is cut, or has a few other bytes, or a few doubled."""
    data = bytearray(stored)
    end = min(len(data), 6000)  # headers, not tensors
    kind = rng.integers(3)
    if kind == 0:
        del data[rng.integers(end) :]
    elif kind == 1:
        for at in rng.integers(0, end, int(rng.integers(1, 4))):
            data[at] = rng.integers(256)
    else:
        at, length = int(rng.integers(end)), int(rng.integers(1, 40))
        data[at:at] = data[at : at + length] * int(rng.integers(1, 4))
    return bytes(data)


def damage_values(text, rng):
    """A JSON text in which one or two values are others, missing, or moved."""
    tree = json.loads(text)
    for _ in range(int(rng.integers(1, 3))):
        places = []

        def list_places(node, places=places):
            inner = node.items() if isinstance(node, dict) else enumerate(node)
            # Of a long list, such as a vocabulary, the first entries are enough.
            for key, value in list(inner)[:60]:
                places.append((node, key))
                if isinstance(value, dict | list):
                    list_places(value)

        list_places(tree)
        if not places:
            break
        node, key = places[rng.integers(len(places))]
        if rng.integers(6) == 0:
            del node[key]
        elif rng.integers(8) == 0:
            deep = node[key]
            for _ in range(int(rng.choice([1, 3, 200]))):
                deep = [deep]
            node[key] = deep
        else:
            node[key] = copy.deepcopy(STRANGE[rng.integers(len(STRANGE))])
    return json.dumps(tree)


def mutate(stored, name, rng):
    """A mutation of a file, as bytes."""
    if rng.integers(3) == 0:
        return damage_bytes(stored, rng)
    if not name.endswith(".safetensors"):
        return damage_values(stored.decode(), rng).encode()
    (length,) = struct.unpack("<Q", stored[:8])
    if rng.integers(4) == 0:
        return (1 << int(rng.integers(64))).to_bytes(8, "little") + stored[8:]
    header = damage_values(stored[8 : 8 + length].decode(), rng).encode()
    return struct.pack("<Q", len(header)) + header + stored[8 + length :]


def count_refused(folder, seed, count):
    """Tries `count` mutations; returns how many are refused, and the most memory that one took."""
    whole = make_model(folder)
    rng, refused, largest = np.random.default_rng(seed), 0, 0
    for i in range(count):
        for name, stored in whole.items():
            (folder / name).write_bytes(stored)
        name = FILES[i % len(FILES)]
        (folder / name).write_bytes(mutate(whole[name], name, rng))
        traced = i % 8 < 2  # tracing is slow
        if traced:
            tracemalloc.start()
        try:
            open_all(folder)
        except PublishedError:
            refused += 1
        finally:
            if traced:
                largest = max(largest, tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
    return refused, largest


def test_damaged_files_are_read_or_refused_in_a_sentence(tmp_path):
    refused, largest = count_refused(tmp_path / "model", seed=0, count=300)
    print(f"{refused} refused; at most {largest:,} bytes")
    assert 100 < refused < 290
    assert largest < _MOST_BYTES


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("config.json", b"[" * 100_000, r"config\.json: is not JSON"),
        ("config.json", b'{"a": "\\ud800"}', r"config\.json: is not JSON"),
        ("config.json", b"\xff\xfe{\0}\0", r"config\.json: cannot be read .* copy the file again"),
        ("generation_config.json", b"[]", r"generation_config\.json: holds list"),
        ("tokenizer.json", b"[" * 100_000, r"tokenizer\.json: is no tokenizer"),
        ("model-1.safetensors", b"\2" + bytes(7) + b"[]" + bytes(9), r"model-1\.safetensors: "),
        ("model-1.safetensors", b"\xff" * 7 + b"\0{}", r"ends within its header, after 10 bytes"),
    ],
)
def test_damage_is_named_with_its_file(tmp_path, name, data, words):
    make_model(tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(data)
    with pytest.raises(PublishedError, match=words):
        open_all(tmp_path / "model")


def test_a_byte_order_mark_is_no_damage(tmp_path):
    make_model(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert hf_config.read_config(tmp_path / "model").vocab_size == 262


@pytest.mark.parametrize("file", ["../model.safetensors", "a\0b", "", ".", "/etc/hostname"])
def test_an_index_names_files_beside_it(tmp_path, file):
    make_model(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(PublishedError, match=r"index\.json: weight_map must be an object"):
        open_all(tmp_path / "model")
