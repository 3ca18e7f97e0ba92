"""GGUF: numbers decoded by hand, a model against the same one in safetensors, and what is refused.

The writer here is a few lines of `struct`; `parity_test.py` compares with the package `gguf`.
"""

import struct

import jax
import numpy as np
import pytest
import tokenizers

from atommem_jax.parallel import mesh
from atommem_jax.weights import gguf, huggingface
from atommem_jax.weights.hf_config import PublishedError
from tests.weights import huggingface_test

NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30, "Q6_K": 14}


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(x):
    """A field's type and value."""
    if isinstance(x, str):
        return struct.pack("<I", 8) + string(x)
    if isinstance(x, list) and isinstance(x[0], int):
        return struct.pack(f"<IIQ{len(x)}i", 9, 5, len(x), *x)
    if isinstance(x, list):
        return struct.pack("<IIQ", 9, 8, len(x)) + b"".join(map(string, x))
    kind, layout = (6, "f") if isinstance(x, float) else (4, "I")
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
    file = gguf.File(write(tmp_path / "a.gguf", {}, {"a": ((3, 32), kind, stored * 3)}))
    assert file.shapes == {"a": (3, 32)}
    np.testing.assert_array_equal(file.read("a").astype(np.float32), np.stack([row] * 3))
    np.testing.assert_array_equal(file.read("a", np.array([2])).astype(np.float32), row[None])


def test_fields_of_every_kind(tmp_path):
    fields = {"name": "small", "count": 7, "rate": 0.5, "words": ["a", "β", ""]}
    assert gguf.File(write(tmp_path / "a.gguf", fields, {})).fields == fields


# ---------------------------------------------------------------------------------------------
# A model

OLD_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def rename(name):
    stem = name.removesuffix(".weight")
    if stem in OLD_NAMES:
        return f"{OLD_NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{OLD_NAMES[rest]}.weight"


def make_model(fields, tensors):
    """(fields, tensors) of the GGUF file that llama.cpp would make of a Hugging Face directory."""
    kind = fields["model_type"]
    described = {
        "general.architecture": kind,
        f"{kind}.embedding_length": fields["hidden_size"],
        f"{kind}.block_count": fields["num_hidden_layers"],
        f"{kind}.feed_forward_length": fields["intermediate_size"],
        f"{kind}.attention.head_count": fields["num_attention_heads"],
        f"{kind}.attention.head_count_kv": fields["num_key_value_heads"],
        f"{kind}.attention.key_length": fields["head_dim"],
        f"{kind}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{kind}.rope.freq_base": fields["rope_theta"],
    }
    stored = {}
    for name, tensor in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        heads = heads.get(name.split(".")[-2])
        if kind == "llama" and heads:  # each head's two halves are interleaved
            parts = [
                np.stack(np.split(head, 2), axis=1).reshape(head.shape)
                for head in np.split(tensor, fields[heads])
            ]
            tensor = np.concatenate(parts)
        stored[rename(name)] = (tensor.shape, "F32", tensor.tobytes())
    return described, stored


@pytest.fixture
def model():
    return make_model(huggingface_test.QWEN, huggingface_test.make_tensors(huggingface_test.QWEN))


@pytest.mark.parametrize(
    "fields", [huggingface_test.QWEN, huggingface_test.LLAMA], ids=["qwen3", "llama"]
)
def test_a_model_is_the_same_as_in_safetensors(tmp_path, fields):
    tensors = huggingface_test.make_tensors(fields)
    theirs = huggingface.load(huggingface_test.write(tmp_path / "hf", fields, tensors))
    path = write(tmp_path / "model.gguf", *make_model(fields, tensors))
    config, params = huggingface.load(path)
    assert config == theirs[0]
    huggingface_test.assert_same_bits(params, theirs[1])
    _, spread = huggingface.load(path, mesh.make_mesh(2, 2, 2))
    huggingface_test.assert_same_bits(jax.device_get(spread), theirs[1])


def make_rope_factors(factor=8.0):
    """By hand for heads of 8 channels and theta 1e6: turns over 8,192 positions are 1303.8, 41.2,
    1.304 and 0.041. The first two are kept, the last is slowed, the third between."""
    third = (1.3038 - 1) / 3
    stored = [1.0, 1.0, 1 / (third + (1 - third) / factor), factor]
    return ((4,), "F32", np.array(stored, np.float32).tobytes())


def test_rope_scaling_is_read_from_its_divisors(tmp_path):
    fields, tensors = make_model(
        huggingface_test.LLAMA, huggingface_test.make_tensors(huggingface_test.LLAMA)
    )
    path = tmp_path / "model.gguf"
    write(path, fields, tensors | {"rope_freqs.weight": make_rope_factors()})
    config, _ = huggingface.load(path)
    assert (config.rope_factor, config.rope_original_length) == (8.0, 8192)
    other = ((4,), "F32", np.array([1, 2, 4, 8], np.float32).tobytes())
    write(path, fields, tensors | {"rope_freqs.weight": other})
    with pytest.raises(PublishedError, match=r"rope_freqs\.weight is not what Llama 3 has"):
        huggingface.load(path)


# ---------------------------------------------------------------------------------------------
# Tokenizers


def make_tokenizer_fields(split="smollm", **changes):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|pad|>", "<|end|>", *alphabet, "ab", "12", "Ġab"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3, 3] + [1] * 259,
        "tokenizer.ggml.merges": ["a b", "1 2", "Ġ ab"],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
    }
    return fields | changes


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("smollm", ["ab", "Ġab", "Ġ", "1", "2"]),
        ("qwen2", ["ab", "Ġab", "Ġ", "1", "2"]),
        ("llama-bpe", ["ab", "Ġab", "Ġ", "12"]),
    ],
)
def test_a_tokenizer_is_made_of_the_fields(tmp_path, model, split, expected):
    fields, tensors = model
    tokens = make_tokenizer_fields(split)
    file = gguf.open_model(write(tmp_path / "model.gguf", fields | tokens, tensors))
    tokenizer = file.read_tokenizer(270, reserved=["<create>"])
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 0, 270)
    assert tokenizer.reserved == {"<create>": 261}
    pieces = tokens["tokenizer.ggml.tokens"]
    assert [pieces[i] for i in tokenizer.encode("ab ab 12")] == expected
    assert tokenizer.decode(tokenizer.encode("<|end|> ab")) == "<|end|> ab"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre='tekken': allowed are 'gpt2' and"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model='llama'"),
        ({"tokenizer.ggml.padding_token_id": 1}, "pad_token: found '<|end|>', which is also eos"),
        ({"tokenizer.ggml.padding_token_id": 999}, "pad_token is None; it must name a token"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, model, changes, words):
    fields, tensors = model
    fields |= make_tokenizer_fields(**changes)
    file = gguf.open_model(write(tmp_path / "model.gguf", fields, tensors))
    with pytest.raises(PublishedError) as caught:
        file.read_tokenizer(270)
    assert words in str(caught.value), str(caught.value)
    assert "model.gguf" in str(caught.value)


# ---------------------------------------------------------------------------------------------
# What is refused


def expect(path, *words):
    with pytest.raises(PublishedError) as caught:
        huggingface.load(path)
    for word in (path.name, *words):
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("field", "found", "words"),
    [
        ("general.architecture", "gemma3", ["general.architecture='gemma3'", "llama, qwen3"]),
        ("qwen3.rope.scaling.type", "yarn", ["qwen3.rope.scaling.type='yarn'"]),
        ("qwen3.block_count", None, ["field qwen3.block_count is missing"]),
        ("qwen3.block_count", 3, ["model.layers.2.input_layernorm.weight [16] is missing"]),
        ("qwen3.feed_forward_length", 32, ["mlp.gate_proj.weight is [24, 16]", "[32, 16]"]),
    ],
)
def test_fields_that_do_not_fit_are_named(tmp_path, model, field, found, words):
    fields, tensors = model
    fields[field] = found
    if found is None:
        del fields[field]
    expect(write(tmp_path / "model.gguf", fields, tensors), *words)


def test_tensors_that_do_not_fit_are_named(tmp_path, model):
    fields, tensors = model
    path = tmp_path / "model.gguf"
    bias = ((32,), "F32", bytes(128))
    expect(write(path, fields, tensors | {"blk.0.attn_q.bias": bias}), "blk.0.attn_q.bias [32]")
    cut = dict(tensors)
    cut["blk.1.ffn_up.weight"] = ((24, 16), "Q6_K", b"")
    expect(write(path, fields, cut), "blk.1.ffn_up.weight holds numbers of kind 14", "Q4_0, Q4_1")
    cut["blk.1.ffn_up.weight"] = ((24, 16), "Q8_0", b"")
    expect(write(path, fields, cut), "blk.1.ffn_up.weight [24, 16] is Q8_0")


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (slice(0, -8), ["truncated", "output.weight"]),
        (slice(0, 200), ["within its header"]),
        (slice(0, 2), ["begins with b'GG'"]),
    ],
)
def test_a_truncated_file_is_named(tmp_path, model, cut, words):
    path = write(tmp_path / "model.gguf", *model)
    path.write_bytes(path.read_bytes()[cut])
    expect(path, *words)


def test_files_of_another_kind_are_refused(tmp_path, model):
    path = tmp_path / "model.gguf"
    expect(path, "no such file")
    expect(write(path, *model, magic=b"GGJT"), "begins with b'GGJT'")
    expect(write(path, *model, version=1), "version=1: allowed are 2, 3")
