"""The paper's run from its own config: a tiny model, 20 documents, from teacher to table."""

import csv
import functools
import json
import re

import jax
import numpy as np
import pytest
import tokenizers

from atommem_jax.agent import build, validate
from atommem_jax.collection import store
from atommem_jax.config import load_config, parse
from atommem_jax.language import chat, protocol
from atommem_jax.language.tokenizer import HuggingFaceTokenizer
from atommem_jax.metrics import read_metrics
from atommem_jax.model import transformer
from experiments.configs import atommem_8b, published
from tests.helpers import checkpoints, runs, tiny
from tests.helpers.multihop import PUBLISHED, make_record
from tests.helpers.stub_endpoint import Answer, Stub
from tests.language import chat_test

SPEC = "experiments/configs/atommem_8b.py:hotpotqa"
SFT_STEPS, RL_STEPS = 6, 2
SIZES = (20, 40, 60)
TRAIN, TEST = range(60), range(100, 130)
# What a laptop can hold. All else is the config's: its task, prompt, protocol, losses and budgets.
SMALL = {
    "mesh.fsdp": 1,
    "mesh.rollout_tensor": 0,
    "mesh.data": 1,
    "mesh.cpu_devices": 1,
    "task.documents": 20,
    "task.test_documents": SIZES,
    "task.chunk_tokens": 240,
    "memory.slots": 32,
    "memory.entry_length": 20,
    "memory.scratchpad_length": 8,
    "memory.query_length": 32,
    "rollout.response_length": 224,
    "rollout.answer_length": 12,
    "rollout.microbatch": 0,
    "rollout.read_rows": 0,
    "rollout.prompt_buckets": (8,),
    "rollout.score_chunk": 0,
    "model.width": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_width": 8,
    "model.mlp_width": 16,
    "sft.steps": SFT_STEPS,
    "sft.episodes": 4,
    "sft.microbatch_rows": 8,
    "sft.length_buckets": (8,),
    "sft.eval_every": SFT_STEPS,
    "sft.save_every": SFT_STEPS,
    "sft.optimizer.learning_rate": 1e-2,
    "sft.optimizer.warmup_steps": 1,
    "rl.steps": RL_STEPS,
    "rl.episodes": 2,
    "rl.eval_every": RL_STEPS,
    "rl.save_every": RL_STEPS,
    "rl.ppo.group_size": 4,
    "rl.ppo.microbatch_rows": 8,
    "rl.ppo.length_buckets": (8,),
    "eval.episodes": 2,
    "eval.batch_size": 4,
}


@functools.cache
def make_tokenizer() -> HuggingFaceTokenizer:
    """Knows the words of prompt and documents, so that rows are short."""
    texts = [json.dumps(make_record(i)) for i in (*TRAIN, *TEST)]
    texts.append(chat.system_message(protocol.atommem(6)))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=chat_test.CONTROL,
        show_progress=False,
    )
    bpe.train_from_iterator(texts * 2, trainer)
    return HuggingFaceTokenizer(
        bpe, eos_token="<|end|>", pad_token="<|pad|>", chat_template=chat_test.CHATML
    )


def teach(request: dict) -> Answer:
    """A good teacher: it stores where the firms lie that are asked for, and answers from there."""
    _, user = (message["content"] for message in request["messages"])
    asked = re.findall(r"Where is the firm of Person (\d+)\?", user.split("\n\nQuery:")[0])
    if "Part of the document:" in user:
        said = [] if "\n\nQuery:" in user else [f"<read_memory>Firm {asked[0]} Town</read_memory>"]
        read = user.split("Part of the document:\n")[1]
        found = set(re.findall(r": Firm (\d+)\nIt is old\.", read)) & set(asked)
        said += [
            f"<create_memory>Firm {firm}: It is in Town {firm}</create_memory>"
            for firm in sorted(found)
        ]
        return Answer("\n".join(said))
    known = re.search(rf"Firm {asked[0]}: It is in (Town {asked[0]})\n", user)
    if known or "Answer the question now." in user:
        return Answer(f"<answer>{known[1] if known else 'unknown'}</answer>")
    return Answer(f"<read_memory>Firm {asked[0]}</read_memory>")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Of every script: files, a base as convert.py leaves it, and the sizes above."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, numbers in (("train", TRAIN), ("test", TEST)):
        records = [make_record(i, distractors=1) for i in numbers]
        (folder / f"{name}.json").write_text(json.dumps(records))
    pool = [{"title": f"Pool {i}", "text": f"Pool {i} hums."} for i in range(40)]
    (folder / "pool.json").write_text(json.dumps(pool))
    config = load_config(SPEC)
    config.update_from_flattened_dict(SMALL)
    config = parse(config)
    tokenizer = make_tokenizer()
    model = build.build(config, tokenizer).agent.model
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = tiny.disturb(transformer.init_params(model, jax.random.key(0)), 0.1)
    base = checkpoints.save(folder / "base", config, tokenizer, params, {})
    files = {
        "init_from": base,
        "task.train_file": folder / "train.json",
        "task.test_file": folder / "test.json",
        "task.corpus_file": folder / "pool.json",
    }
    changes = SMALL | files
    return [f"--config={SPEC}", *(f"--config.{path}={value}" for path, value in changes.items())]


@pytest.mark.long
def test_the_papers_run_from_the_teacher_to_the_table(flags, tmp_path):
    root, run, taught = f"--data_root={tmp_path}/data", tmp_path / "runs/atommem", tmp_path / "sft"
    # ------------------------------------------------------------------ trajectories of a teacher
    with Stub(teach) as stub:
        printed = runs.run(
            "collect.py", *flags, root, f"--base_url={stub.url}", "--model=stub",
            "--episodes=12", f"--out={taught}", "--max_tokens=400",
        )  # fmt: skip
    assert "12 trajectories, 12 kept" in printed
    lines = map(json.loads, (taught / store.EPISODES).read_text().splitlines())
    assert {len(line["em"]) for line in lines} - {1}, "one question or several"

    # ------------------------------------------------------------------ SFT and RL
    printed = runs.run("train.py", *flags, root, f"--config.sft.data={taught}", f"--workdir={run}")
    metrics = read_metrics(run)
    sft, rl = ([r for r in metrics if r["stage"] == name] for name in ("sft", "rl"))
    assert (len(sft), len(rl)) == (SFT_STEPS, RL_STEPS)
    assert sft[-1]["loss"] < sft[0]["loss"]
    assert all(np.isfinite(record["loss"]) for record in metrics if "loss" in record)
    assert all(0 <= record["reward"] <= 1 for record in rl)

    # ------------------------------------------------------------------ three sizes, two steps
    for step in (SFT_STEPS, SFT_STEPS + RL_STEPS):
        runs.run(
            "evaluate.py", f"--checkpoint={run}", root, f"--step={step}", "--cpu_devices=1",
            "--episodes=4",
        )  # fmt: skip
    summaries = {
        path.stem: json.loads(path.read_text())
        for path in sorted((run / "eval").glob("*.json"))
    }  # fmt: skip
    assert len(summaries) == 2 * len(SIZES)
    counts = {(summary["episodes"], summary["questions"]) for summary in summaries.values()}
    assert len(counts) == 1, "the same questions among more documents"

    # ------------------------------------------------------------------ the table
    printed = runs.run("sweep.py", *flags, f"--workdir={run.parent}", "--table_only")
    rows = list(csv.DictReader((run.parent / "table.csv").open()))
    cells = {
        (row["run"], row["step"], row["split"]): float(row["em"]) for row in rows if row["split"]
    }
    assert cells == {
        ("atommem", step, f"test_{size}"): pytest.approx(
            summaries[f"test_{size}_t0_step{number}"]["em"], abs=1e-3
        )
        for step, number in (("sft", SFT_STEPS), ("last", SFT_STEPS + RL_STEPS))
        for size in SIZES
    }
    table = (run.parent / "table.md").read_text()
    assert all(f"test_{size}" in table for size in SIZES)
    assert "scratchpad_only" in table


def test_the_figures_are_the_papers():
    """Those that the paper states, by hand from its text (sections 4 and 5)."""
    config = parse(load_config(SPEC))
    ppo = config.rl.ppo
    assert (ppo.clip_low, ppo.clip_high, ppo.dual_clip, ppo.kl_coef) == (0.2, 0.28, 3.0, 0.0)
    assert (ppo.group_size, config.rl.episodes, config.rl.steps, ppo.minibatches) == (
        16,
        16,
        100,
        1,
    )
    assert (ppo.divide_by_std, ppo.credit, ppo.entropy_coef) == (False, "trajectory", 0.0)
    assert (ppo.epochs, ppo.weighting, config.sft.min_reward) == (1, "token_mean", 0.5)
    optimizer = config.rl.optimizer
    assert (optimizer.learning_rate, optimizer.schedule) == (1e-6, "constant")
    assert optimizer.warmup_steps == 20
    assert config.memory.shown == 6
    task = config.task
    assert (task.get("documents"), task.get("questions")) == (200, (1, 10))
    assert task.get("test_documents") == (200, 400, 800)
    assert config.mesh.fsdp == 16


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_every_data_set_has_its_run(dataset):
    config = parse(load_config(f"experiments/configs/atommem_8b.py:{dataset}"))
    validate.validate(config)
    assert config.model.width == published.PRESETS["qwen3_8b"].width
    added = {}
    atommem_8b.sweep(lambda name, overrides: added.update({name: overrides}))
    for overrides in added.values():
        validate.validate(config.replace(overrides))


def test_memory_and_budgets_are_those_that_were_compiled_for_the_slice():
    """docs/scaling.md and docs/reproduce.md compile `published.py`, which has no data."""
    ours, theirs = parse(load_config(SPEC)), parse(load_config("experiments/configs/published.py"))
    assert ours.memory == theirs.memory
    assert ours.model == theirs.model
    assert ours.rl.ppo == theirs.rl.ppo
    changed = {"microbatch": 32, "read_rows": 16, "draft": 2}
    assert ours.rollout == theirs.replace({f"rollout.{k}": v for k, v in changed.items()}).rollout
