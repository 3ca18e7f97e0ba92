"""GGUF: a model against the same one in safetensors, tokenizers, split files, and what is refused.

The writer is that of `gguf_file_test`.
"""

import gc
import math
import sys
import tracemalloc

import gguf as library
import jax
import numpy as np
import pytest
import tokenizers

from atommem_jax.parallel import mesh
from atommem_jax.weights import gguf, huggingface
from atommem_jax.weights.hf_config import PublishedError
from tests.weights import huggingface_test
from tests.weights.gguf_file_test import write

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
    stem, _, kind = name.rpartition(".")
    if stem in OLD_NAMES:
        return f"{OLD_NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{OLD_NAMES[rest]}.{kind}"


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
    "fields",
    [huggingface_test.QWEN, huggingface_test.QWEN2, huggingface_test.LLAMA],
    ids=["qwen3", "qwen2", "llama"],
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


def test_ids_without_a_piece_are_free(tmp_path, model):
    """Files are filled up with pieces of type unused, at the end and, rarely, within."""
    fields, tensors = model
    tokens = make_tokenizer_fields()
    tokens["tokenizer.ggml.tokens"].insert(7, "[PAD7]")
    tokens["tokenizer.ggml.tokens"] += ["[PAD262]", "<unk>", "[PAD264]"]
    tokens["tokenizer.ggml.token_type"] = [3, 3, 1, 1, 1, 1, 1, 5] + [1] * 254 + [5, 2, 5]
    file = gguf.open_model(write(tmp_path / "model.gguf", fields | tokens, tensors))
    plain = file.read_tokenizer(265)
    assert [i for i, spelled in enumerate(plain.token_bytes) if not spelled] == [
        *(0, 1, 7),
        *range(262, 265),
    ]
    assert plain.encode("[PAD262]") == [plain.encode(c)[0] for c in "[PAD"] + [
        plain.encode(c)[0] for c in "262]"
    ]
    names = ["<create>", "<update>", "<delete>"]
    ours = file.read_tokenizer(265, reserved=names)
    assert ours.reserved == {"<create>": 7, "<update>": 262, "<delete>": 263}
    assert ours.encode("ab ab") == plain.encode("ab ab")
    assert ours.decode(ours.encode("<create> ab")) == "<create> ab"
    more = file.read_tokenizer(266, reserved=[*names, "<read>", "<end>"])
    assert (more.reserved["<read>"], more.reserved["<end>"]) == (264, 265)
    assert file.read_tokenizer(265, pad_token="[PAD264]").pad_id == 264


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.merges": ["a b", "zz y"]}, "tokenizer.ggml.merges do not fit"),
        ({"tokenizer.ggml.merges": ["ab"]}, "tokenizer.ggml.merges do not fit"),
        ({"tokenizer.ggml.merges": 3}, "tokenizer.ggml.merges is a int"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens is a list of other things"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "must be a list of 261 numbers"),
        ({"tokenizer.ggml.eos_token_id": "one"}, "eos_token is None; it must name a token"),
        (
            {"tokenizer.ggml.pre": "tekken"},
            "tokenizer.ggml.pre='tekken': allowed is one of 'qwen2'",
        ),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model='llama': allowed is one of"),
        ({"tokenizer.ggml.model": None}, "field tokenizer.ggml.model is missing, without which"),
        ({"tokenizer.ggml.pre": None}, "field tokenizer.ggml.pre is missing, without which"),
        ({"tokenizer.ggml.tokens": None}, "field tokenizer.ggml.tokens is missing, without"),
        ({"tokenizer.ggml.padding_token_id": 1}, "pad_token: found '<|end|>', which is also eos"),
        ({"tokenizer.ggml.padding_token_id": 999}, "pad_token is None; it must name a token"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, model, changes, words):
    fields, tensors = model
    fields |= make_tokenizer_fields(**changes)
    fields = {name: value for name, value in fields.items() if value is not None}
    file = gguf.open_model(write(tmp_path / "model.gguf", fields, tensors))
    with pytest.raises(PublishedError) as caught:
        file.read_tokenizer(270)
    assert words in str(caught.value), str(caught.value)
    assert "model.gguf" in str(caught.value)


def test_what_else_the_file_says_comes_along(tmp_path, model):
    fields, tensors = model
    fields |= make_tokenizer_fields(
        **{
            "qwen3.context_length": 32768,
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.chat_template": "d",
            "tokenizer.chat_templates": ["tool_use"],
            "tokenizer.chat_template.tool_use": "t",
        }
    )
    file = gguf.open_model(write(tmp_path / "model.gguf", fields, tensors))
    tokenizer = file.read_tokenizer(270)
    assert tokenizer.chat_template == {"default": "d", "tool_use": "t"}
    assert tokenizer.published == {
        "config.json": {"max_position_embeddings": 32768, "bos_token_id": 0}
    }


@pytest.mark.parametrize("name", ["MODEL.GGUF", "model.Gguf", "sha256-0123"])
def test_a_file_is_known_by_its_ending_in_any_case_or_by_its_beginning(tmp_path, model, name):
    config, whole = huggingface.load(write(tmp_path / "model.gguf", *model))
    found, params = huggingface.load(write(tmp_path / name, *model))
    assert found == config
    huggingface_test.assert_same_bits(params, whole)


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
        (
            "general.architecture",
            "gemma3",
            ["general.architecture='gemma3'", "llama, qwen2, qwen3"],
        ),
        ("qwen3.rope.scaling.type", "yarn", ["qwen3.rope.scaling.type='yarn'"]),
        ("qwen3.block_count", None, ["field qwen3.block_count is missing"]),
        ("qwen3.block_count", 3, ["blk.2.attn_norm.weight [16] is missing"]),
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
    biased = write(path, fields, tensors | {"blk.0.attn_q.bias": bias})
    expect(biased, "model.layers.0.self_attn.q_proj.bias [32]")
    missing = {name: stored for name, stored in tensors.items() if "blk.1.ffn_up" not in name}
    words = "is missing, and 0 more of", "tensors; copy the file again, or take another"
    expect(write(path, fields, missing), "blk.1.ffn_up.weight [", *words)
    cut = dict(tensors)
    cut["blk.1.ffn_up.weight"] = ((24, 16), "Q8_0", b"")
    expect(write(path, fields, cut), "blk.1.ffn_up.weight [24, 16] is Q8_0")


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("attention.head_count", [4, 4]),
        ("attention.head_count", 0),
        ("attention.head_count_kv", -2),
        ("embedding_length", 2**62),
        ("block_count", 2**31),
        ("feed_forward_length", "wide"),
        ("attention.key_length", 7),
        ("attention.layer_norm_rms_epsilon", math.inf),
        ("rope.freq_base", math.nan),
        ("rope.scaling.type", [1]),
    ],
)
def test_a_field_of_another_kind_is_refused(tmp_path, model, field, found):
    """Numbers that no model has, and lists where one number is wanted: sentences, no tracebacks."""
    fields, tensors = model
    path = write(tmp_path / "model.gguf", fields | {f"qwen3.{field}": found}, tensors)
    with pytest.raises(PublishedError):
        huggingface.load(path)


def test_without_the_package_the_error_says_how_to_install_it(tmp_path, model, monkeypatch):
    path = write(tmp_path / "model.gguf", *model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(PublishedError, match=r"pip install 'atommem_jax\[gguf\]'"):
        huggingface.load(path)


# ---------------------------------------------------------------------------------------------
# Split files


def write_parts(folder, fields, tensors, count=3, **changes):
    """`count` files with the tensors dealt out; the fields stand in the first."""
    paths = []
    for i in range(count):
        told = {"split.no": i, "split.count": count, "split.tensors.count": len(tensors)} | changes
        held = {name: tensors[name] for j, name in enumerate(tensors) if j % count == i}
        path = folder / f"model-{i + 1:05}-of-{count:05}.gguf"
        paths.append(write(path, told | (fields if i == 0 else {}), held))
    return paths


def test_a_split_model_is_opened_by_any_of_its_parts(tmp_path, model):
    config, whole = huggingface.load(write(tmp_path / "whole.gguf", *model))
    for path in write_parts(tmp_path, *model):
        found, params = huggingface.load(path)
        assert found == config
        huggingface_test.assert_same_bits(params, whole)


def test_parts_may_end_in_capitals(tmp_path, model):
    config, _ = huggingface.load(write(tmp_path / "whole.gguf", *model))
    for path in write_parts(tmp_path, *model):
        path.rename(path.with_suffix(".GGUF"))
    assert huggingface.load(tmp_path / "model-00002-of-00003.GGUF")[0] == config


def test_parts_that_do_not_fit_are_named(tmp_path, model):
    paths = write_parts(tmp_path, *model)
    again = "merge them with llama-gguf-split --merge"
    paths[2].rename(tmp_path / "third.gguf")
    expect(tmp_path / "third.gguf", "is part 3 of 3", "-00001-of-00003.gguf", again)
    expect(paths[0], "is part 1 of 3", "model-00003-of-00003.gguf is not beside it", again)
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(PublishedError, match=r"00003.gguf: split.no=1 .*must be 2 and 3"):
        huggingface.load(paths[0])
    paths = write_parts(tmp_path, *model, **{"split.tensors.count": 99})
    expect(paths[1], "part 2 of 3", "hold 25 tensors, and split.tensors.count=99", again)


# ---------------------------------------------------------------------------------------------
# Damage and memory


def open_all(path):
    """Everything that is read before the first tensor is."""
    config, weights = huggingface.open_weights(path)
    huggingface.check(weights, config)
    gguf.open_model(path).read_tokenizer(config.vocab_size, reserved=["<create>"])


def test_a_damaged_header_is_read_or_refused_in_a_sentence(tmp_path):
    """Bytes, lengths and counts at random places: nothing but PublishedError, and little memory."""
    fields = {**huggingface_test.LLAMA, "vocab_size": 270, "num_hidden_layers": 1}
    described, tensors = make_model(fields, huggingface_test.make_tensors(fields))
    whole = write(tmp_path / "whole.gguf", described | make_tokenizer_fields(), tensors)
    open_all(whole)
    stored = whole.read_bytes()
    header = stored.index(b"output_norm.weight") + 50
    words = [i for i in range(24, header) if stored[i : i + 8].count(0) >= 6]  # lengths, mostly
    rng = np.random.default_rng(0)
    path, refused, largest = tmp_path / "model.gguf", 0, 0
    for i in range(400):
        data = bytearray(stored)
        if i % 4 == 0:
            del data[rng.integers(4, header) :]
        elif i % 4 == 1:
            at = rng.choice(words)
            data[at : at + 8] = (1 << int(rng.integers(63))).to_bytes(8, "little")
        else:
            for at in rng.integers(4, header, int(rng.integers(1, 4))):
                data[at] = rng.integers(256)
        path.write_bytes(data)
        if i % 4 == 1:  # tracing is slow
            tracemalloc.start()
        try:
            open_all(path)
        except PublishedError:
            refused += 1
        if i % 4 == 1:
            largest = max(largest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert 150 < refused < 390
    assert largest < 100 * len(stored)


def test_the_host_holds_one_decoded_tensor_at_a_time(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    fields = {**huggingface_test.LLAMA, **sizes}
    described, tensors = make_model(fields, huggingface_test.make_tensors(fields))
    largest = max(math.prod(shape) * 4 for shape, _, _ in tensors.values())
    for name, (shape, _, stored) in tensors.items():
        if len(shape) == 2:
            packed = library.quants.quantize(
                np.frombuffer(stored, np.float32).reshape(shape), library.GGMLQuantizationType.Q8_0
            )
            tensors[name] = (shape, "Q8_0", packed.tobytes())
    path = write(tmp_path / "model.gguf", described, tensors)
    del tensors, stored, packed
    huggingface.load(path)  # compiles
    gc.collect()
    tracemalloc.start()
    huggingface.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * largest
