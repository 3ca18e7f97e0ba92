"""Low-rank adapters in runs of the scripts: saved, loaded, and exported.

That a run goes on with them is in tests/runs/resume_test.py.
"""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags as absl_flags

from atommem_jax.agent import build, load, validate
from atommem_jax.config import ConfigError, parse
from atommem_jax.metrics import read_metrics
from atommem_jax.model import lora
from atommem_jax.weights import fingerprint, hf_export
from atommem_jax.weights.checkpoint import Checkpointer
from atommem_jax.weights.hf_config import PublishedError
from experiments import convert, train
from experiments.configs import synthetic
from tests.conftest import COMPILATION_CACHE
from tests.helpers import runs
from tests.model.lora_test import (
    ADAPTED,
    EVERYTHING,
    draw_params,
    flatten,
    flatten_paths,
    make_model,
    merge_by_hand,
)
from tests.weights import hf_tokenizer_test, huggingface_test


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """Scripts called in this process keep its own compilation cache, and have their flags."""
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))
    absl_flags.FLAGS(["convert.py"])


def save_run(workdir, params, config, tokenizer, step=0, **progress):
    """A checkpoint of these parameters."""
    with Checkpointer(workdir / "checkpoints", best_metric="em") as checkpointer:
        checkpointer.save(
            step,
            {"train": {"params": params}},
            config=config.to_dict(),
            tokenizer=tokenizer.to_bytes(),
            data_state=b"",
            progress=progress,
        )
    return workdir


@functools.cache
def make_base(workdir, data_root, shift=0.0):
    """A run whose parameters are noise; `shift` is added to one number of them."""
    config = runs.make_config()
    tokenizer = build.fit_tokenizer(config, build.load_dataset(config, data_root))
    params = jax.device_get(draw_params(build.build(config, tokenizer).agent.model))
    scale = params["final_norm"]["scale"].copy()
    scale[3] += shift
    return save_run(workdir, params | {"final_norm": {"scale": scale}}, config, tokenizer)


@pytest.fixture(scope="module")
def base(tmp_path_factory, data_root):
    return make_base(tmp_path_factory.mktemp("base"), data_root)


END = 3  # one step of SFT, two of RL


def make_run_config(base, **fields):
    fields = {"sft__steps": 1, "rl__steps": 2, "rl__eval_every": 2} | fields
    fields["sft__optimizer__warmup_steps"] = 0  # or the first step would change nothing
    return runs.make_config(
        init_from=str(base), lora__rank=2, lora__targets=("query", "down", "embedder"), **fields
    )


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, data_root, base):
    """Workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("adapted")
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))
        train.train(make_run_config(base), str(workdir), data_root)
    return workdir


def test_a_checkpoint_holds_what_was_trained_and_no_base(adapted, base):
    state = runs.read_state(adapted, END)
    names = ("embedder_lora", "layers/down_lora", "layers/query_lora")
    trained = {f"{name}/{part}" for name in names for part in "ab"}
    trained |= {"value_head/kernel", "value_head/bias"}
    assert set(flatten(state["train"]["params"])) == trained
    assert set(flatten(state["reference"])) == trained
    moments = [p for p in flatten_paths(state["train"]["opt_state"]) if "/mu/" in p]
    assert {path.partition("/mu/")[2] for path in moments} == trained
    for path, leaf in flatten(state["train"]["params"]).items():
        if not path.startswith("value_head"):  # which neither stage has used
            before = flatten(state["reference"])[path]
            assert before.any(), path  # B is zero before SFT
            assert np.abs(leaf - before).max() > 0, path
    value_head = runs.read_state(base, 0)["train"]["params"]["value_head"]
    jax.tree.map(np.testing.assert_array_equal, state["train"]["params"]["value_head"], value_head)
    for record in read_metrics(adapted):
        assert record["stage"] == "eval" or record["gradient_norm"] > 0
        assert record["stage"] != "rl" or record["log_prob_gap"] < record["log_prob_bound"]


def interrupt(adapted, workdir):
    """A copy of the run as it was before its last step."""
    shutil.copytree(adapted, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(END))
    return workdir


def test_another_base_is_refused(tmp_path, adapted, data_root):
    other = make_base(tmp_path / "other", data_root, shift=1e-3)
    with pytest.raises(ConfigError, match=r"init_from=.*other has the fingerprint .* step 2 of"):
        train.train(make_run_config(other), str(interrupt(adapted, tmp_path / "run")), data_root)
    with pytest.raises(ConfigError, match=r"other has the fingerprint .* step 3 of .*that they"):
        load.load(str(adapted), base=str(other))
    with pytest.raises(ConfigError, match=r"of init_from=.*gone, which cannot .*--base"):
        load.load(str(adapted), base=str(tmp_path / "gone"))


def test_a_loaded_run_is_the_plain_model_that_was_trained(adapted, base):
    loaded = load.load(str(adapted))
    assert loaded.parts.agent.model.config.lora.rank == 0
    below = runs.read_state(base, 0)["train"]["params"]
    trained = runs.read_state(adapted, END)["train"]["params"]
    expected = flatten(merge_by_hand(lora.join(trained, lora.partition(below, ADAPTED)[1]), 8.0))
    for path, leaf in flatten(loaded.params).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-7, err_msg=path)
    assert np.abs(expected["layers/query/kernel"] - below["layers"]["query"]["kernel"]).max() > 0


@pytest.mark.relaxed_promotion
def test_a_bfloat16_run_is_loaded_with_its_adapters_apart(tmp_path, adapted, base):
    """As its rollouts play in training; what is exported is merged."""
    config = make_run_config(base, model__dtype="bfloat16")
    below = runs.read_state(base, 0)["train"]["params"]
    trained = runs.read_state(adapted, END)["train"]["params"]
    frozen = lora.partition(below, ADAPTED)[1]
    mark = fingerprint.fingerprint_base(frozen)
    tokenizer = load.load(str(base)).parts.tokenizer
    save_run(tmp_path, trained, config, tokenizer, base=mark)
    loaded = load.load(str(tmp_path))
    assert loaded.parts.agent.model.config.lora.rank == 2
    expected = flatten(lora.join(trained, frozen))
    assert flatten(loaded.params).keys() == expected.keys()
    for path, leaf in flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    merged = load.load(str(tmp_path), merge=True)
    assert merged.parts.agent.model.config.lora.rank == 0
    assert not any("lora" in path for path in flatten(merged.params))


def test_adapters_need_a_base():
    with pytest.raises(ConfigError, match=r"lora\.rank=2 .* init_from is empty.*lora\.rank=0"):
        validate.validate(runs.make_config(lora__rank=2))
    with pytest.raises(ConfigError, match=r"lora\.targets: 'output' matches no matrix"):
        validate.validate(
            runs.make_config(
                init_from="base", sft__steps=0, lora__rank=2, lora__targets=("output",)
            )
        )


# ---------------------------------------------------------------------------------------------
# Exports


def test_what_is_exported_adds_up(tmp_path):
    fields = {**huggingface_test.QWEN, "vocab_size": 320, "tie_word_embeddings": False}
    published = huggingface_test.make_tensors(fields)
    source = huggingface_test.write(tmp_path / "in", fields, published)
    hf_tokenizer_test.write_tokenizer(source)
    config = parse(synthetic.get_config())
    convert.write_checkpoint(str(source), str(tmp_path / "base"), config)
    below = load.load(str(tmp_path / "base"))

    config = below.parts.config.replace(
        {
            "lora.rank": 2,
            "lora.alpha": 6.0,
            "lora.targets": ("query", "out", "up", "head", "embedder"),
            "init_from": str(tmp_path / "base"),
        }
    )
    parts = build.build(config, below.parts.tokenizer)
    trainable, _ = lora.partition(draw_params(parts.agent.model), parts.agent.model.config.lora)
    mark = fingerprint.fingerprint_base(
        lora.partition(below.params, parts.agent.model.config.lora)[1]
    )
    run = save_run(tmp_path / "run", trainable, config, below.parts.tokenizer, 7, base=mark)

    convert.write_huggingface(str(run), str(tmp_path / "merged"))
    convert.write_adapters(str(run), str(tmp_path / "alone"), base="Qwen/Qwen3-tiny")
    merged = huggingface_test.read_all(tmp_path / "merged")
    alone = safetensors.numpy.load_file(tmp_path / "alone" / hf_export.ADAPTER_FILE)
    # PEFT: W + lora_alpha / r * B A, and for embeddings its transpose.
    expected = {name: np.asarray(tensor, np.float64) for name, tensor in published.items()}
    for name, a in alone.items():
        module, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        if kind == "A.weight":
            b = alone[name.replace("lora_A", "lora_B")]
            expected[f"{module}.weight"] += 3.0 * b @ a
        elif kind == "embedding_A":
            b = alone[name.replace("embedding_A", "embedding_B")]
            expected[f"{module}.weight"] += 3.0 * (b @ a).T
    changed = {name for name in expected if np.abs(expected[name] - published[name]).max() > 1e-3}
    layers = range(fields["num_hidden_layers"])
    assert changed == {
        *("model.embed_tokens.weight", "lm_head.weight"),
        *(f"model.layers.{i}.self_attn.{n}_proj.weight" for i in layers for n in "qo"),
        *(f"model.layers.{i}.mlp.up_proj.weight" for i in layers),
    }
    for name, tensor in expected.items():
        np.testing.assert_allclose(merged[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)
    described = json.loads((tmp_path / "alone" / hf_export.ADAPTER_CONFIG_FILE).read_text())
    targets = ["embed_tokens", "lm_head", "o_proj", "q_proj", "up_proj"]
    assert (described["peft_type"], described["r"], described["lora_alpha"]) == ("LORA", 2, 6.0)
    assert described["target_modules"] == targets
    assert described["base_model_name_or_path"] == "Qwen/Qwen3-tiny"
    with pytest.raises(ConfigError, match=r"base has no adapters: lora\.rank=0"):
        convert.write_adapters(str(tmp_path / "base"), str(tmp_path / "none"))


def test_the_adapter_of_a_tied_table_is_exported_merged_only(tmp_path):
    model = make_model(token_shift=0, tie_embeddings=True)
    trainable, _ = lora.partition(draw_params(model), EVERYTHING)
    with pytest.raises(PublishedError, match=r"lora\.targets: the adapter of embedder reads out"):
        hf_export.save_adapters(tmp_path, trainable, model.config)
