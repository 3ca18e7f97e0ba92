"""The config for one card parses, builds, and takes two steps a stage with a tiny model."""

import json

import jax
import numpy as np
import pytest

from atommem_jax.agent import build, validate
from atommem_jax.config import ConfigError, load_config, parse
from atommem_jax.metrics import read_metrics
from atommem_jax.model import transformer
from experiments import train
from experiments.configs import hotpotqa_smollm2_gpu, published
from tests.conftest import COMPILATION_CACHE
from tests.experiments.atommem_8b_test import TEST, TRAIN, make_tokenizer
from tests.helpers import checkpoints, tiny
from tests.helpers.multihop import make_record

FILE = "experiments/configs/hotpotqa_smollm2_gpu.py"
SMALL = {
    "mesh.data": 1,
    "model.width": 16, "model.num_layers": 1, "model.num_heads": 2, "model.num_kv_heads": 1,
    "model.head_width": 8, "model.mlp_width": 16,
    "task.test_documents": (20, 40), "task.chunk_words": 100,
    "memory.entry_length": 20, "memory.query_length": 32,
    "rollout.response_length": 320, "rollout.prompt_buckets": (8,),
    "sft.steps": 2, "sft.episodes": 2, "sft.eval_every": 2, "sft.save_every": 2,
    "sft.log_every": 1, "sft.length_buckets": (8,),
    "rl.steps": 2, "rl.episodes": 1, "rl.eval_every": 2, "rl.save_every": 2,
    "rl.ppo.group_size": 4, "rl.ppo.length_buckets": (8,),
    "eval.episodes": 2, "eval.batch_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("trained", hotpotqa_smollm2_gpu.TRAINED)
def test_it_parses_and_builds(trained):
    config = parse(load_config(f"{FILE}:{trained}"))
    validate.validate(config)
    assert config.model.width == published.PRESETS["smollm2_135m"].width
    assert (config.lora.rank > 0) == (trained == "lora")
    assert config.task.get("documents") == 20
    small = config.replace({path: SMALL[path] for path in SMALL if path.startswith("model.")})
    parts = build.build(small, make_tokenizer())
    validate.validate_turns(small, parts)
    assert parts.agent.model.config.width == 16


def test_another_name_is_refused():
    with pytest.raises(ConfigError, match="'head': allowed are whole, lora"):
        hotpotqa_smollm2_gpu.get_config("head")


@pytest.mark.long
@pytest.mark.relaxed_promotion  # optax's schedules
def test_two_steps_of_each_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))
    for name, numbers in (("train", TRAIN), ("test", TEST)):
        records = [make_record(i, distractors=2) for i in numbers]
        (tmp_path / name).write_text(json.dumps(records))
    pool = [{"title": f"Pool {i}", "text": f"Pool {i} hums."} for i in range(20)]
    (tmp_path / "pool").write_text(json.dumps(pool))
    config = load_config(FILE)
    files = {f"task.{name}_file": str(tmp_path / name) for name in ("train", "test")}
    config.update_from_flattened_dict(SMALL | files | {"task.corpus_file": str(tmp_path / "pool")})
    config = parse(config)
    tokenizer = make_tokenizer()
    model = build.build(config, tokenizer).agent.model
    params = tiny.disturb(transformer.init_params(model, jax.random.key(0)), 0.1)
    base = checkpoints.save(tmp_path / "base", config, tokenizer, params, {})
    config = config.replace({"init_from": base})
    train.train(config, str(tmp_path / "run"), str(tmp_path / "data"))
    metrics = read_metrics(tmp_path / "run")
    # Groups of an untrained model may have no contrast: such a step of RL has no loss.
    assert [r["stage"] for r in metrics if r["stage"] != "eval"] == ["sft", "sft", "rl", "rl"]
    assert all("loss" in record for record in metrics if record["stage"] == "sft")
    assert all(np.isfinite(record["loss"]) for record in metrics if "loss" in record)
