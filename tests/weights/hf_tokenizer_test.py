"""Tokenizer files: what was published, both ways, and what is refused by name."""

import dataclasses
import json

import pytest
import tokenizers

from atommem_jax.language import chat
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


# ---------------------------------------------------------------------------------------------
# What a tokenizer.json or a tokenizer_config.json may say


def change(folder, **parts):
    """Changes parts of the tokenizer.json in a folder."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def test_truncation_and_padding_are_ignored_and_kept(tmp_path):
    plain = hf_tokenizer.read_tokenizer(write_tokenizer(tmp_path), 258)
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {
        **{"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None},
        **{"pad_id": 257, "pad_type_id": 0, "pad_token": "<|pad|>"},
    }
    change(tmp_path, truncation=cut, padding=pad)
    read = hf_tokenizer.read_tokenizer(tmp_path, 258)
    text = "longer than four <|end|>"
    assert read.encode(text) == plain.encode(text)
    assert read.encode_control(text) == plain.encode_control(text)
    assert read.encode_control(text)[-1] == 256
    hf_tokenizer.write_tokenizer(tmp_path, read)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (written["truncation"], written["padding"]) == (cut, pad), "kept as published"


def test_a_space_before_text_is_not_added(tmp_path):
    """`add_prefix_space`: what is encoded stands within a prompt, and comes back as it was."""
    write_tokenizer(tmp_path)
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    for pre in (level, {"type": "Sequence", "pretokenizers": [digits, level]}):
        change(tmp_path, pre_tokenizer=pre)
        read = hf_tokenizer.read_tokenizer(tmp_path, 258)
        for text in ("a", " a", "", "a 12", "\na"):
            assert read.decode(read.encode(text)) == text
        hf_tokenizer.write_tokenizer(tmp_path, read)
        assert json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"] == pre


@pytest.mark.parametrize(
    "pre_tokenizer", [{"type": "Whitespace"}, {"type": "WhitespaceSplit"}, {"type": "Punctuation"}]
)
def test_a_tokenizer_that_loses_text_is_refused(tmp_path, pre_tokenizer):
    change(write_tokenizer(tmp_path), pre_tokenizer=pre_tokenizer)
    with pytest.raises(PublishedError, match=r"tokenizer\.json: the text 'It Is 12.* comes back"):
        hf_tokenizer.read_tokenizer(tmp_path, 258)


TEMPLATES = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": "d"}]


def test_templates_by_name_are_read_and_written(tmp_path):
    read = hf_tokenizer.read_tokenizer(write_tokenizer(tmp_path, chat_template=TEMPLATES), 258)
    assert read.chat_template == {"tool_use": "{{ tools }}", "default": "d"}
    assert chat.find_chat_template(read) == "d"
    hf_tokenizer.write_tokenizer(tmp_path, HuggingFaceTokenizer.from_bytes(read.to_bytes()))
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["chat_template"] == TEMPLATES
    only = hf_tokenizer.read_tokenizer(write_tokenizer(tmp_path, chat_template=TEMPLATES[:1]), 258)
    with pytest.raises(ValueError, match=r"found several, named tool_use; allowed is one, or"):
        chat.find_chat_template(only)


def test_templates_in_files_count_more_than_the_field(tmp_path):
    write_tokenizer(tmp_path, chat_template="old")
    (tmp_path / "chat_template.jinja").write_text("new")
    read = hf_tokenizer.read_tokenizer(tmp_path, 258)
    assert read.chat_template == "new"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    both = hf_tokenizer.read_tokenizer(tmp_path, 258)
    assert both.chat_template == {"default": "new", "tool_use": "{{ tools }}"}
    # What an earlier export left does not hide what is written now.
    hf_tokenizer.write_tokenizer(tmp_path, read)
    assert hf_tokenizer.read_tokenizer(tmp_path, 258).chat_template == "new"
    hf_tokenizer.write_tokenizer(tmp_path, both)
    assert hf_tokenizer.read_tokenizer(tmp_path, 258).chat_template == both.chat_template


@pytest.mark.parametrize("field", [3, [3], [{"name": "default"}], [{"name": 1, "template": "x"}]])
def test_a_template_of_another_kind_is_refused(tmp_path, field):
    with pytest.raises(
        PublishedError, match=r"tokenizer_config\.json: chat_template is .* text, or"
    ):
        hf_tokenizer.read_tokenizer(write_tokenizer(tmp_path, chat_template=field), 258)


def test_a_tokenizer_config_comes_back(tmp_path):
    fields = {
        "eos_token": {"content": "<|end|>", "lstrip": False, "special": True},
        "pad_token": "<|pad|>",
        "bos_token": "<|pad|>",
        "model_max_length": 131072,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        "additional_special_tokens": ["<|pad|>"],
        "chat_template": "{{ messages }}",
    }
    read = hf_tokenizer.read_tokenizer(
        write_tokenizer(tmp_path, **fields, auto_map={"AutoTokenizer": ["code.T", None]}), 258
    )
    (tmp_path / "out").mkdir()
    hf_tokenizer.write_tokenizer(tmp_path / "out", read)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == fields
    other = hf_tokenizer.read_tokenizer(
        write_tokenizer(tmp_path, **{**fields, "pad_token": {"content": "<|end|>"}}),
        258,
        pad_token="<|pad|>",
    )
    hf_tokenizer.write_tokenizer(tmp_path / "out", other)
    assert hf_tokenizer.read_tokenizer(tmp_path / "out", 258).pad_id == 257


@pytest.mark.parametrize(
    ("published", "written"),
    [([256, 7], [256, 7]), (256, 256), (7, [256, 7]), ([7, 8], [256, 7, 8]), (None, 256)],
)
def test_all_ids_that_end_a_text_are_kept_and_ours_is_among_them(tmp_path, published, written):
    fields = {**huggingface_test.QWEN, "vocab_size": 258, "eos_token_id": published}
    tensors = huggingface_test.make_tensors(fields)
    folder = write_tokenizer(huggingface_test.write(tmp_path / "in", fields, tensors))
    settings = {"eos_token_id": published, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    config, params = huggingface.load(folder)
    tokenizer = hf_tokenizer.read_tokenizer(folder, 258)
    hf_export.save(tmp_path / "out", params, config, tokenizer=tokenizer)
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["eos_token_id"] == written
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {**settings, "eos_token_id": None if published is None else written}
    again = hf_tokenizer.read_tokenizer(tmp_path / "out", 258)
    assert again.to_bytes() == tokenizer.to_bytes()
    # An export of a model without such a file leaves none of another model.
    hf_export.save(tmp_path / "out", params, config)
    assert not (tmp_path / "out" / "generation_config.json").exists()
