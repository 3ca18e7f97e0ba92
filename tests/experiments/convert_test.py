"""The conversion script, in this process: published weights to a checkpoint and back."""

import json

import jax
import numpy as np
import pytest
from absl import flags as absl_flags

from atommem_jax.agent import build, load
from atommem_jax.config import ConfigError, parse
from atommem_jax.language.tokenizer import HuggingFaceTokenizer
from atommem_jax.weights import hf_config, hf_tokenizer, huggingface
from experiments import convert
from experiments.configs import synthetic
from tests.helpers import forks, tiny
from tests.weights import hf_config_test, hf_tokenizer_test, huggingface_test

FIELDS = {**huggingface_test.QWEN, "vocab_size": 320}


@pytest.fixture(autouse=True)
def _flags():
    absl_flags.FLAGS(["convert.py"])


@pytest.fixture
def source(tmp_path):
    """A published model with its tokenizer."""
    folder = huggingface_test.write(tmp_path / "in", FIELDS, huggingface_test.make_tensors(FIELDS))
    return hf_tokenizer_test.write_tokenizer(folder)


def test_to_a_checkpoint_and_back(tmp_path, source):
    config = parse(synthetic.get_config())
    convert.write_checkpoint(str(source), str(tmp_path / "run"), config)
    loaded = load.load(str(tmp_path / "run"))
    assert loaded.step == 0
    tokenizer = loaded.parts.tokenizer
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert set(build.reserved_names(config)) <= set(tokenizer.reserved)
    model = loaded.parts.agent.model.config
    assert (model.width, model.vocab_size, model.token_shift, model.num_features) == (16, 320, 0, 0)
    _, params = huggingface.load(source)
    huggingface_test.assert_same_bits(jax.device_get(loaded.params), params)

    convert.write_huggingface(str(tmp_path / "run"), str(tmp_path / "out"))
    again = huggingface_test.read_all(tmp_path / "out")
    huggingface_test.assert_same_bits(again, huggingface_test.make_tensors(FIELDS))
    read = hf_tokenizer.read_tokenizer(tmp_path / "out", 320)
    assert read.to_bytes() == tokenizer.to_bytes()


def test_between_published_forms(tmp_path, source):
    convert.write_huggingface(str(source), str(tmp_path / "out"), dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    found = huggingface_test.read_all(tmp_path / "out")
    stored = huggingface_test.make_tensors(FIELDS)["model.norm.weight"]
    np.testing.assert_array_equal(
        found["model.norm.weight"], stored.astype(huggingface_test.DTYPES["bfloat16"])
    )


@pytest.mark.parametrize("through", ["nothing", "a checkpoint"])
def test_an_export_keeps_what_training_did_not_change(tmp_path, source, through, capsys):
    fields = {
        **FIELDS,
        "max_position_embeddings": 40960,
        "eos_token_id": [256, 3],
        "bos_token_id": 3,
        "initializer_range": 0.02,
        "sliding_window": None,
    }
    settings = {"eos_token_id": [256, 3], "do_sample": True, "temperature": 0.6}
    templates = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    (source / "config.json").write_text(json.dumps(fields))
    (source / "generation_config.json").write_text(json.dumps(settings))
    hf_tokenizer_test.write_tokenizer(source, chat_template=templates, model_max_length=131072)
    (source / "README.md").write_text("of the model")
    start = source
    if through == "a checkpoint":
        start = tmp_path / "run"
        config = parse(synthetic.get_config())
        convert.write_checkpoint(str(source), str(start), config)
    convert.write_huggingface(str(start), str(tmp_path / "out"))

    def read(name):
        return json.loads((tmp_path / "out" / name).read_text())

    written = read("config.json")
    assert {name: written[name] for name in fields} == fields
    assert read("generation_config.json") == settings
    assert read("tokenizer_config.json")["chat_template"] == templates
    assert read("tokenizer_config.json")["model_max_length"] == 131072
    if through == "nothing":
        assert f"without README.md of {source}; copy what you need" in capsys.readouterr().out


def test_a_model_without_a_tokenizer_keeps_its_config(tmp_path):
    fields = {**FIELDS, "max_position_embeddings": 40960, "eos_token_id": [5, 6]}
    folder = huggingface_test.write(tmp_path / "in", fields, huggingface_test.make_tensors(fields))
    convert.write_huggingface(str(folder), str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in fields} == fields


def test_a_mistake_ends_the_script_with_status_2(source):
    (source / "model.safetensors").unlink()
    flags = [f"--source={source}", f"--target={source.parent / 'out'}"]
    printed = forks.refuse("convert.py", *flags)
    assert "holds neither model.safetensors nor model.safetensors.index.json" in printed


def test_what_cannot_be_converted_is_refused(tmp_path, source):
    config = parse(synthetic.get_config())
    with pytest.raises(ConfigError, match=r"--source=.*: --to=checkpoint needs a Hugging Face"):
        convert.write_checkpoint(str(tmp_path / "run"), str(tmp_path / "other"), config)
    (source / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"--tokenizer is missing: .* has no tokenizer\.json"):
        convert.write_checkpoint(str(source), str(tmp_path / "other"), config)


def test_a_vocabulary_without_room_for_the_protocol_is_widened_on_request(tmp_path):
    fields = {**FIELDS, "vocab_size": 258}
    folder = huggingface_test.write(tmp_path, fields, huggingface_test.make_tensors(fields))
    hf_tokenizer_test.write_tokenizer(folder)
    with pytest.raises(hf_config.PublishedError, match=r"reserved names added, and vocab_size"):
        convert.write_checkpoint(str(folder), str(tmp_path / "run"), parse(synthetic.get_config()))
    with pytest.raises(ConfigError, match=r"--vocab_size=200: must be at least the model's own"):
        convert.write_checkpoint(
            str(folder), str(tmp_path / "run"), parse(synthetic.get_config()), vocab_size=200
        )
    convert.write_checkpoint(
        str(folder), str(tmp_path / "run"), parse(synthetic.get_config()), vocab_size=320
    )
    params = load.load(str(tmp_path / "run")).params
    _, before = huggingface.load(folder)
    table = np.asarray(params["embedder"]["embedding"])
    known = np.asarray(before["embedder"]["embedding"])
    np.testing.assert_array_equal(table[:258], known)
    np.testing.assert_allclose(table[258:], np.tile(known.mean(0), (62, 1)), atol=1e-6)
    assert params["head"].shape == (16, 320)


def test_sizes_go_into_the_config():
    model = hf_config.parse_config(hf_config_test.LLAMA_3_1_8B)
    config = convert.describe_run(tiny.make_config(), model)
    assert config.model.rope_factor == 8.0
    assert config.tokenizer.vocab_size == 128_256
    assert tiny.make_config().model.width == 16, "the given config is as it was"
