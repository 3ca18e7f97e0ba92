"""Memories of every embedding: played, mapped over devices, replayed, saved and read again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.agent import build, load, play
from atommem_jax.config import ConfigError
from atommem_jax.documents import memory_file
from atommem_jax.documents.reader import Reader
from atommem_jax.memory import encoder as encoder_lib
from atommem_jax.memory.embedding import HashedBagOfTokens, PooledTokens
from atommem_jax.memory.encoder import EncoderEmbedding
from atommem_jax.metrics import read_metrics
from atommem_jax.model.transformer import Transformer
from atommem_jax.parallel import host_batches
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.report import replay
from atommem_jax.weights import hf_tokenizer, huggingface
from tests.helpers import checkpoints, runs, tiers, tiny
from tests.weights import hf_tokenizer_test, huggingface_test

ROWS = 8


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A text encoder as it is published: a bare trunk of Qwen3 with its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    fields = {
        **huggingface_test.QWEN,
        **{"vocab_size": 258, "architectures": ["Qwen3Model"], "tie_word_embeddings": True},
    }
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in huggingface_test.make_tensors(fields).items()
    }
    huggingface_test.write(folder, fields, tensors)
    return str(hf_tokenizer_test.write_tokenizer(folder))


def make_config(kind, path):
    changes = {"memory.embedding": kind, "memory.key_dim": 16}
    return tiny.make_config().replace(
        changes | ({"memory.encoder": path} if kind == "encoder" else {})
    )


def run(parts, params, shape=(1, 1, 1)):
    mesh = mesh_lib.make_mesh(*shape)
    episodes, _ = tiny.make_episodes([i // 2 for i in range(ROWS)])
    rows = host_batches.shard((jax.device_get(episodes), np.arange(ROWS, dtype=np.int32)), mesh)
    params = jax.device_put(params, parts.agent.model.config.layout.shardings(params, mesh))
    seed, heat = host_batches.replicate((jax.random.key(3), np.float32(1.0)), mesh)
    player = play.make_player(parts, tiny.make_shape(), mesh)
    return jax.device_get(episodes), jax.device_get(player(params, *rows, seed, heat))


def embed_entries(embed, memory):
    """The keys that the entries of final memories should have."""
    flat = jax.jit(lambda embed, *text: embed(*text))(
        embed,
        jnp.asarray(memory.entries.reshape(-1, memory.entries.shape[-1])),
        jnp.asarray(memory.lengths.reshape(-1)),
    )
    return np.asarray(flat).reshape(memory.keys.shape)


@pytest.mark.parametrize("kind", tiers.first(["policy", "encoder"]))
def test_what_is_remembered_has_the_keys_of_its_text(kind, published):
    parts = build.build(make_config(kind, published), tiny.make_tokenizer())
    params = tiny.make_params(scale=0.3)
    episodes, found = run(parts, params)
    setting = parts.setting(tiny.make_shape(), params)
    assert isinstance(setting.embed, PooledTokens if kind == "policy" else EncoderEmbedding)
    memory = found.memory
    assert memory.valid.sum() > 8
    expected = embed_entries(setting.embed, memory)
    gap = np.abs(memory.keys - expected)[memory.valid]
    assert gap.max() <= 2.0**-11, "keys are rounded to a grid"
    # Of cosines, too: an entry that is shown has one that is no rounding error.
    assert (np.abs(found.turns.shown_scores) > 1e-3).sum() > 8

    again = replay.replay(setting, found, episodes)
    assert again.after.valid.any()

    _, spread = run(parts, params, (2, 1, 2))
    np.testing.assert_array_equal(spread.turns.response, found.turns.response)
    np.testing.assert_array_equal(spread.turns.shown, found.turns.shown)
    if kind == "policy":
        np.testing.assert_array_equal(spread.memory.keys, memory.keys)
    else:
        np.testing.assert_allclose(spread.memory.keys, memory.keys, atol=2.0**-11)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 4, 2), (2, 2, 2)])
def test_an_encoder_has_its_keys_where_parameters_are_split(shape, published):
    """Parameters of the policy lie over `fsdp`; every share of the rows has the whole encoder."""
    parts = build.build(make_config("encoder", published), tiny.make_tokenizer())
    params = tiny.make_params(scale=0.3)
    _, alone = run(parts, params)
    _, spread = run(parts, params, shape)
    np.testing.assert_array_equal(spread.turns.response, alone.turns.response)
    np.testing.assert_array_equal(spread.turns.shown, alone.turns.shown)
    np.testing.assert_allclose(spread.memory.keys, alone.memory.keys, atol=2.0**-11)
    expected = embed_entries(parts.embed, spread.memory)
    assert np.abs(spread.memory.keys - expected)[spread.memory.valid].max() <= 2.0**-11


@pytest.mark.long
def test_an_agent_with_an_encoder_is_trained_over_fsdp(tmp_path, data_root, published):
    """Both stages, eight devices, and the evaluation of what they leave."""
    run_flags = runs.make_flags(
        **{"mesh__data": 2, "mesh__fsdp": 4, "mesh__cpu_devices": 8},
        **{"memory__embedding": "encoder", "memory__encoder": published, "memory__key_dim": 16},
        **{"sft__steps": 1, "sft__eval_every": 1, "sft__save_every": 1, "sft__episodes": 8},
        **{"rl__steps": 1, "rl__eval_every": 1, "rl__save_every": 1},
    )
    here = f"--data_root={data_root}"
    runs.run("train.py", *run_flags, here, f"--workdir={tmp_path}")
    metrics = read_metrics(tmp_path)
    (learned,) = [r for r in metrics if r["stage"] == "rl" and "log_prob_gap" in r]
    assert learned["log_prob_gap"] <= learned["log_prob_bound"]
    assert all(np.isfinite(record["loss"]) for record in metrics if "loss" in record)
    printed = runs.run(
        "evaluate.py", f"--checkpoint={tmp_path}", here, "--split=test_1x", "--episodes=8",
        "--fsdp=4", "--cpu_devices=8",
    )  # fmt: skip
    assert "test_1x" in printed


def test_keys_follow_the_policy_that_plays(published):
    parts = build.build(make_config("policy", published), tiny.make_tokenizer())
    first, second = tiny.make_params(scale=0.3), tiny.make_params(scale=0.5)
    settings = [parts.setting(tiny.make_shape(), params) for params in (first, second)]
    text = jnp.array([20, 30, 40]), jnp.int32(3)
    one, other = (setting.embed(*text) for setting in settings)
    assert np.abs(one - other).max() > 0.01
    rows = np.asarray(first["embedder"]["embedding"])[[20, 30, 40]].sum(axis=0)
    np.testing.assert_allclose(one, rows / np.linalg.norm(rows), atol=2e-3)
    unbound = parts.setting(tiny.make_shape()).embed
    np.testing.assert_array_equal(
        unbound(*text), HashedBagOfTokens(parts.tokenizer.vocab_size, 16)(*text)
    )


def test_an_encoder_is_read_from_where_it_was_published(published):
    embed = build.make_embedding(make_config("encoder", published), tiny.make_tokenizer())
    tokenizer = tiny.make_tokenizer()
    ids = tokenizer.encode("Anna moved to Oslo.")
    found = embed(jnp.asarray(ids, jnp.int32), jnp.int32(len(ids)))
    config, params = huggingface.load(published)
    theirs = hf_tokenizer.read_tokenizer(published, config.vocab_size)
    # Letters: the text is the same however it is cut; ours begins with the space of a word.
    text = encoder_lib.encode(theirs, [" Anna moved to Oslo."], 40)
    expected = encoder_lib.embed(Transformer(config), params, *text)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    asked = encoder_lib.encode(
        theirs, [encoder_lib.instruct(encoder_lib.TASK, " Anna moved to Oslo.")], 160
    )
    expected = encoder_lib.embed(Transformer(config), params, *asked)[0]
    np.testing.assert_allclose(
        embed.ask(jnp.asarray(ids, jnp.int32), jnp.int32(len(ids))), expected, atol=1e-5
    )


def test_an_encoder_may_be_a_checkpoint(tmp_path, published):
    config, params = huggingface.load(published)
    tokenizer = hf_tokenizer.read_tokenizer(published, config.vocab_size)
    sizes = {
        f"model.{name}": getattr(config, name)
        for name in ("width", "num_layers", "num_heads", "num_kv_heads", "head_width", "mlp_width")
    }
    run_config = tiny.make_config().replace(
        sizes
        | {
            **{"model.qk_norm": True, "model.rope_theta": 1e6, "model.rope_fraction": 1.0},
            **{"model.token_shift": 0, "model.match_features": False},
        }
    )
    workdir = checkpoints.save(tmp_path / "run", run_config, tokenizer, params, {})
    text = jnp.array([20, 30, 40]), jnp.int32(3)
    first, second = (
        build.make_embedding(make_config("encoder", path), tiny.make_tokenizer())(*text)
        for path in (published, workdir)
    )
    np.testing.assert_allclose(first, second, atol=1e-6)
    trained = checkpoints.save_trained(tmp_path / "agent")
    with pytest.raises(ConfigError, match=r"memory\.encoder=.*trained from scratch"):
        build.make_embedding(make_config("encoder", trained), tiny.make_tokenizer())


@pytest.mark.parametrize("kind", tiers.first(["policy", "encoder"]))
def test_a_loaded_agent_reads_with_its_embedding(tmp_path, kind, published):
    """From a checkpoint, as answer.py does; a saved memory belongs to that embedding."""
    shape = dataclasses.asdict(tiny.make_shape())
    workdir = checkpoints.save(
        tmp_path / "run",
        make_config(kind, published),
        tiny.make_tokenizer(),
        tiny.make_params(scale=0.3),
        {"stage": "rl", "stage_step": 1, "shape": shape},
    )
    loaded = load.load(workdir)
    reader = Reader(loaded)
    reading = reader.begin(
        [("it", part) for part in reader.split("it", checkpoints.make_document())],
        checkpoints.make_questions()[:1],
    )
    assert len(list(reading.turns())) > 3
    memory = reading.memory
    assert memory.identity["embedding"]["kind"] == type(loaded.parts.embed).__name__
    memory.save(tmp_path / "memory.npz")
    again = reader.load_memory(tmp_path / "memory.npz")
    np.testing.assert_array_equal(again.state.keys, memory.state.keys)
    embed = loaded.parts.setting(tiny.make_shape(), tiny.make_params(scale=0.5)).embed
    other = memory_file.identify(reader.sizes, embed, reader.tokenizer)
    same = other["embedding"] == memory.identity["embedding"]
    assert same == (kind == "encoder"), "keys of another policy mean something else"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory.embedding": "encoder"}, ["memory.encoder=''", "to its directory"]),
        ({"memory.encoder": "there"}, ["memory.encoder='there'", "memory.embedding='hashed'"]),
        ({"memory.embedding": "tfidf"}, ["memory.embedding='tfidf'", "'hashed'"]),
        (
            {"memory.embedding": "encoder", "memory.encoder": "x", "memory.weighting": "rarity"},
            ["memory.weighting='rarity': allowed is 'uniform'"],
        ),
        ({"memory.embedding": "policy"}, ["memory.key_dim=64: must be model.width=16"]),
        (
            {
                **{"memory.embedding": "policy", "memory.key_dim": 16},
                **{"lora.rank": 2, "lora.targets": ("embedder",)},
            },
            ["lora.targets=('embedder',)", "leave it out"],
        ),
        (
            {"memory.embedding": "encoder", "memory.encoder": "/nowhere"},
            ["memory.encoder=/nowhere: "],
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    with pytest.raises(ConfigError) as caught:
        build.build(tiny.make_config().replace(changes), tiny.make_tokenizer())
    for word in words:
        assert word in str(caught.value)


def test_a_key_is_no_wider_than_the_encoder(published):
    config = make_config("encoder", published).replace({"memory.key_dim": 17})
    with pytest.raises(ConfigError, match=r"memory\.key_dim=17: at most 16 with memory\.encoder="):
        build.build(config, tiny.make_tokenizer())
