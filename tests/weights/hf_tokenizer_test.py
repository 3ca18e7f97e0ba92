"""Tokenizer files: what was published, both ways, and what is refused by name."""

import dataclasses
import json

import pytest
import tokenizers

from atommem_jax.language.tokenizer import HuggingFaceTokenizer
from atommem_jax.weights import hf_config, hf_export, hf_tokenizer, huggingface
from atommem_jax.weights.hf_config import PublishedError
from tests.weights import huggingface_test


def write_tokenizer(folder, **names):
    """A byte-level tokenizer of 258 ids: the bytes, then <|end|> and <|pad|>."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>", "<|pad|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"eos_token": {"content": "<|end|>"}, "pad_token": "<|pad|>"} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def test_a_tokenizer_is_read_and_written(tmp_path):
    read = hf_tokenizer.read_tokenizer(
        write_tokenizer(tmp_path), 300, reserved=["<create>", "<end>"]
    )
    assert (read.eos_id, read.pad_id, read.vocab_size) == (256, 257, 300)
    assert read.reserved == {"<create>": 258, "<end>": 259}
    assert read.decode(read.encode("a <create> b")) == "a <create> b"
    hf_tokenizer.write_tokenizer(tmp_path, read)
    again = hf_tokenizer.read_tokenizer(tmp_path, 300, reserved=["<create>", "<end>"])
    assert again.to_bytes() == read.to_bytes()


def test_a_tokenizer_goes_with_its_model(tmp_path):
    fields = {**huggingface_test.QWEN, "vocab_size": 258}
    tensors = huggingface_test.make_tensors(fields)
    config, params = huggingface.load(huggingface_test.write(tmp_path / "in", fields, tensors))
    tokenizer = hf_tokenizer.read_tokenizer(write_tokenizer(tmp_path / "in"), config.vocab_size)
    hf_export.save(tmp_path / "out", params, config, tokenizer=tokenizer)
    read = hf_config.read_config(tmp_path / "out")
    assert read == dataclasses.replace(config, pad_id=257)
    again = hf_tokenizer.read_tokenizer(tmp_path / "out", read.vocab_size)
    assert isinstance(again, HuggingFaceTokenizer)
    assert again.to_bytes() == tokenizer.to_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 256


@pytest.mark.parametrize(
    ("size", "arguments", "names", "words"),
    [
        (257, {}, {}, ["tokenizer.json: has 258 ids", "vocab_size of the model is 257"]),
        (259, {"reserved": ["<a>", "<b>"]}, {}, ["has 260 ids with 2 reserved names added"]),
        (258, {}, {"pad_token": None}, ["pad_token is None", "pass pad_token"]),
        (258, {}, {"pad_token": "<|end|>"}, ["pad_token: found '<|end|>', which is also eos"]),
        (258, {}, {"eos_token": "<eos>"}, ["eos_token: found '<eos>'"]),
        (258, {"pad_token": "<none>"}, {}, ["pad_token: found '<none>'"]),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, size, arguments, names, words):
    with pytest.raises(PublishedError) as caught:
        hf_tokenizer.read_tokenizer(write_tokenizer(tmp_path, **names), size, **arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("WordLevel", [{"a": 0, "<|end|>": 1, "<|pad|>": 2}, "a"]),
        ("WordPiece", [{"a": 0, "<|end|>": 1, "<|pad|>": 2}]),
        ("Unigram", [[("a", -1.0), ("<|end|>", -2.0), ("<|pad|>", -2.0)]]),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path, kind, arguments):
    write_tokenizer(tmp_path)
    other = tokenizers.Tokenizer(getattr(tokenizers.models, kind)(*arguments))
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PublishedError, match=rf"tokenizer\.json: holds a {kind} tokenizer"):
        hf_tokenizer.read_tokenizer(tmp_path, 300)


def test_tokenizer_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(PublishedError, match=r"tokenizer\.json: no such file"):
        hf_tokenizer.read_tokenizer(tmp_path, 258)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PublishedError, match=r"tokenizer\.json: is no tokenizer"):
        hf_tokenizer.read_tokenizer(tmp_path, 258)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(PublishedError, match=r"tokenizer_config\.json: no such file"):
        hf_tokenizer.read_tokenizer(tmp_path, 258)
