"""What int8 keeps: numbers, attention, the size of a cache, and how far log-probs move."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from atommem_jax.agent import build
from atommem_jax.agent import play as play_lib
from atommem_jax.config import PPOConfig
from atommem_jax.learning import optimizer as optimizer_lib
from atommem_jax.learning import trainer
from atommem_jax.model import attention, quantized, sampling
from atommem_jax.model.quantized import Quantized
from atommem_jax.model.transformer import Transformer, init_params
from atommem_jax.parallel import host_batches
from atommem_jax.parallel import mesh as mesh_lib
from tests.helpers import tiers, tiny
from tests.model import groups_test, prefix_test, sampling_test
from tests.model.sampling_test import PROMPT, RESPONSE, ROWS, make_agent, make_params, make_prompts

# Largest and mean |log-prob of the sampler - of the learner| of the tokens that these models write,
# in nats. Measured: .031 and .0056 for the cache of one layer, .087 and .0077 for that of two with
# a prefix, .11 and .017 for the weights, .24 and .021 for weights and cache; in float32 it is 7e-6
# and 3e-7.
BOUNDS = {
    "cache": (0.1, 0.015),
    "prefix": (0.25, 0.02),
    "weights": (0.3, 0.04),
    "both": (0.5, 0.05),
}
FLOAT32 = 2e-5

# ---------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_no_number_is_off_by_more_than_half_a_scale(axis):
    x = np.random.default_rng(0).normal(0.0, [[[1e-3]], [[1.0]], [[1e4]]], (3, 5, 7))
    x = x.astype(np.float32)
    x[1] = 0.0
    found = quantized.quantize(jnp.asarray(x), axis)
    assert found.values.dtype == jnp.int8
    assert found.scale.dtype == jnp.float32
    largest = np.abs(x).max(axis=axis, keepdims=True)
    np.testing.assert_allclose(found.scale, largest / 127, rtol=1e-6)
    again = np.asarray(quantized.dequantize(found, jnp.float32))
    assert (np.abs(again - x) <= largest / 254 * (1 + 1e-5)).all()
    assert not again[1].any()
    assert np.abs(again - x).max() > 0


@pytest.mark.parametrize("key_axes", ["sd", "ds"])
def test_attention_to_int8_is_that_to_the_numbers_it_stands_for(key_axes):
    rng = np.random.default_rng(1)
    queries = jnp.asarray(rng.normal(size=(2, 4, 3, 8)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 3, 9)) < 0.7)

    def draw(slots):
        return jnp.asarray(rng.normal(0, 2, (2, 2, slots, 8)), jnp.float32)

    def turn(x):
        return quantized.swap_axes(x, 2, 3) if key_axes == "ds" else x

    pieces = [quantized.quantize(draw(slots), -1) for slots in (4, 9 - 4, 6, 4, 5, 6)]
    there = jnp.asarray(rng.random((2, 1, 6)) < 0.5)
    keys, values = pieces[:3], pieces[3:]
    plain = [quantized.dequantize(x, jnp.float32) for x in pieces]

    def attend(keys, values):
        before = turn(keys[2]), values[2], there
        given = [turn(x) for x in keys[:2]]
        return attention.attend(queries, given, values[:2], mask, before, key_axes=key_axes)

    np.testing.assert_allclose(attend(keys, values), attend(plain[:3], plain[3:]), atol=2e-6)
    other = [x * 1.01 for x in plain]
    assert np.abs(attend(keys, values) - attend(other[:3], other[3:])).max() > 1e-3


@pytest.mark.parametrize("implementation", ["plain", "splash", "fused"])
def test_a_prompt_attends_to_an_int8_prefix(implementation):
    rng = np.random.default_rng(2)
    length = attention.LANES
    queries, keys, values = (
        jnp.asarray(rng.normal(size=(1, 2, length, 16)), jnp.float32) for _ in range(3)
    )
    first = [quantized.quantize(jnp.asarray(rng.normal(size=keys.shape)), -1) for _ in range(2)]
    there = jnp.ones((1, 1, length), bool)
    start = jnp.array([5])
    run = functools.partial(attention.causal, queries, keys, values, start)
    expected = run(
        (*(quantized.dequantize(x, jnp.float32) for x in first), there), implementation="plain"
    )
    found = run((*first, there), implementation=implementation, interpret=True)
    np.testing.assert_allclose(found[:, :, 5:], expected[:, :, 5:], atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Memory


def count_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("cpu_decode", [False, True])
def test_a_cache_of_int8_takes_a_byte_a_number_and_four_a_scale(cpu_decode):
    model = make_agent().model.config
    heads = model.num_layers * ROWS * model.num_kv_heads * 2 * (PROMPT + RESPONSE)

    def cache(**how):
        decoder = sampling.make_decoder(
            make_agent(cpu_decode=cpu_decode, **how), make_params(), jnp.float32(1.0)
        )
        skip = np.zeros(ROWS, bool)
        inputs = (*make_prompts(), sampling_test.make_keys(), skip)
        return jax.eval_shape(lambda *x: sampling.prefill(decoder, *x), *inputs).cache

    def stored(cache):
        return count_bytes(cache.replace(recent=None))

    assert stored(cache()) == heads * 4 * model.head_width
    assert stored(cache(cache_dtype="int8")) == heads * (model.head_width + 4)


def test_matrices_of_int8_take_a_byte_a_number():
    params = make_big_params()
    found = quantized.quantize_matrices(params)
    layers = found["layers"]
    for name in ("query", "key", "value", "out", "gate", "up", "down"):
        assert layers[name]["kernel"].dtype == jnp.int8
        width = params["layers"][name]["kernel"].shape[-1]
        assert layers[name]["scale"].shape == (2, 1, width)
    assert found["embedder"]["scale"].shape == (found["embedder"]["embedding"].shape[0], 1)
    assert found["head_scale"].shape == (1, found["head"].shape[1])
    for path, x in jax.tree.leaves_with_path(found):
        name = jax.tree_util.keystr(path)
        assert x.dtype == (jnp.int8 if x.ndim > 1 and is_matrix(name) else jnp.float32), name
    mesh = mesh_lib.make_mesh(1, 2, 2)
    specs = make_big_agent().model.config.layout.specs(found, mesh)
    assert specs["head"] == PartitionSpec("fsdp", "tensor")
    assert specs["head_scale"] == specs["layers"]["query"]["scale"] == PartitionSpec()


def is_matrix(name):
    parts = ("layers", "embedding", "head")
    return not name.endswith(("scale']", "bias']")) and any(f"'{key}'" in name for key in parts)


# ---------------------------------------------------------------------------------------------
# Log-probs


def gaps(response, model=None, params=None):
    """|sampler - learner| of the tokens written."""
    agent = make_agent() if model is None else make_agent().replace(model=model)
    prompts, lengths, phases = make_prompts()
    params = make_params() if params is None else params
    scores = sampling_test.score(
        agent, params, prompts, lengths, response, jnp.float32(1.0), phases
    )
    gap = np.abs(np.asarray(scores.log_probs) - np.asarray(response.log_probs))
    return gap[sampling_test.written(response)]


def assert_moved(gap, what):
    largest, mean = BOUNDS[what]
    print(f"{what}: largest {gap.max():.4f}, mean {gap.mean():.4f}")
    assert FLOAT32 < gap.max() < largest
    assert gap.mean() < mean


def answer(params, agent=None, **how):
    agent = make_agent(**how) if agent is None else agent
    skip = np.zeros(ROWS, bool)
    return sampling_test.generate(
        agent, params, *make_prompts(), sampling_test.make_keys(), jnp.float32(1.0), skip
    )


def test_log_probs_of_float32_are_the_learners():
    assert gaps(sampling_test.answer(make_agent())).max() < FLOAT32


@functools.cache
def answer_from_int8():
    return answer(make_params(), cache_dtype="int8")


@pytest.mark.parametrize(
    "how", tiers.first([{}, {"cpu_decode": True}, {"draft": 2, "least_rows": 1}]), ids=str
)
def test_a_cache_of_int8_moves_log_probs_a_little(how):
    found = answer(make_params(), cache_dtype="int8", **how)
    assert_moved(gaps(found), "cache")
    # However it is decoded, what is rounded is the same.
    np.testing.assert_array_equal(found.tokens, answer_from_int8().tokens)
    np.testing.assert_allclose(found.log_probs, answer_from_int8().log_probs, atol=FLOAT32)


def test_groups_keep_their_cache_in_int8():
    agent = make_agent(group=2, prompt_buckets=(2, 4, 6, 8), cache_dtype="int8")
    found = groups_test.answer(agent)
    assert_moved(gaps(found), "cache")
    np.testing.assert_allclose(found.log_probs, answer_from_int8().log_probs, atol=FLOAT32)


@pytest.mark.long
@pytest.mark.parametrize("how", [{}, {"cpu_decode": True, "draft": 2, "group": 2}], ids=str)
def test_a_prefix_is_kept_in_int8(how):
    played = prefix_test.run(cache_prefix=True, cache_dtype="int8", **how)
    parts = prefix_test.make_parts()
    rows = trainer.make_batch(played)
    scores = jax.jit(tiny.score_rows)(parts.agent, prefix_test.make_params(), rows)
    gap = np.abs(np.asarray(scores.log_probs - rows.old_log_probs))[np.asarray(rows.weights) > 0]
    assert played.turns.live.sum() > 10
    assert_moved(gap, "prefix")


@pytest.mark.parametrize("cpu_decode", [False, True])
def test_weights_of_int8_move_log_probs_a_little(cpu_decode):
    params = play_lib.cast_matrices(make_params(), "int8")
    assert_moved(gaps(answer(params, cpu_decode=cpu_decode)), "weights")
    assert_moved(gaps(answer(params, cpu_decode=cpu_decode, cache_dtype="int8")), "both")


@functools.cache
def make_big_agent():
    """Two layers with an untied readout, which computes in bfloat16."""
    config = dataclasses.replace(
        make_agent().model.config,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        qkv_bias=True,
        tie_embeddings=False,
    )
    return make_agent().replace(model=Transformer(config))


@functools.cache
def make_big_params():
    return tiny.disturb(init_params(make_big_agent().model, jax.random.key(1)), 0.1)


@pytest.mark.relaxed_promotion  # Flax' norms of bfloat16 mix types
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_int8_are_those_numbers_whatever_is_computed_in(dtype):
    """The model of int8 weights is the model of the numbers that they stand for."""
    config = dataclasses.replace(make_big_agent().model.config, dtype=dtype)
    agent = make_big_agent().replace(model=Transformer(config))
    whole = quantized.quantize_matrices(make_big_params())

    def plain(tree):
        if not isinstance(tree, dict):
            return tree
        tree = {name: plain(x) for name, x in tree.items()}
        for name, scale in (("kernel", "scale"), ("embedding", "scale"), ("head", "head_scale")):
            if name in tree and scale in tree:
                pair = Quantized(tree[name], tree.pop(scale))
                tree[name] = quantized.dequantize(pair, jnp.float32)
        return tree

    prompts, lengths, _ = make_prompts()

    @jax.jit
    def logits(params):
        hidden, _ = agent.model.apply(
            {"params": params},
            prompts,
            PROMPT - lengths,
            features=sampling.match_features(agent, prompts, prompts),
        )
        return agent.model.apply({"params": params}, hidden, method="logits")

    found, expected = logits(whole), logits(plain(whole))
    assert found.dtype == jnp.float32
    size, gap = np.abs(expected).max(), np.abs(found - expected)
    largest, mean = (1e-5, 1e-6) if dtype == "float32" else (0.06, 0.008)
    print(f"{dtype}: largest {gap.max() / size:.1e}, mean {gap.mean() / size:.1e}")
    assert gap.max() < largest * size
    assert gap.mean() < mean * size
    other = logits(make_big_params())
    assert np.abs(other - expected).max() > 1e-3 * size


# ---------------------------------------------------------------------------------------------
# Training


@pytest.mark.long
@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_rl_trains_on_what_an_int8_policy_sampled(qkv_bias):
    """Two steps over four devices: finite, and the gap is told and corrected for."""
    changes = {
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.num_layers": 2,
        "model.qkv_bias": qkv_bias,
        "rollout.param_dtype": "int8",
        "rollout.cache_dtype": "int8",
    }
    parts = build.build(tiny.make_config().replace(changes), tiny.make_tokenizer())
    mesh, count = mesh_lib.make_mesh(2, 1, 2), 8
    player = play_lib.make_player(parts, tiny.make_shape(), mesh)
    optimizer = optax.adam(1e-3)
    params = tiny.disturb(init_params(parts.agent.model, jax.random.key(0)), 0.2)
    state = optimizer_lib.create_state(params, optimizer)
    state = jax.device_put(state, parts.agent.model.config.layout.shardings(state, mesh))
    episodes = jax.device_get(tiny.make_episodes([i // 4 for i in range(count)])[0])
    rewards = np.random.default_rng(0).integers(0, 2, (count, 2)).astype(np.float32)
    rewards *= np.arange(2) < episodes.num_questions[:, None]
    seed, heat = host_batches.replicate((jax.random.key(3), np.float32(1.0)), mesh)
    for step in range(2):
        ids = np.arange(count, dtype=np.int32) + step * count
        before = jax.device_get(state.params)
        played = player(state.params, *host_batches.shard((episodes, ids), mesh), seed, heat)
        state, metrics = trainer.update_step(
            host_batches.replicate(parts.agent, mesh),
            state,
            played,
            *host_batches.shard((rewards, episodes.num_questions), mesh),
            seed,
            heat,
            optimizer=optimizer,
            config=PPOConfig(group_size=4, microbatch_rows=16, importance_cap=2.0),
            mesh=mesh,
        )
        assert all(np.isfinite(value) for value in jax.device_get(metrics).values())
        assert metrics["skipped"] == 0
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, state.params)
        assert max(jax.tree.leaves(moved)) > 1e-4
        # No gate: the policy that sampled is another, by as much as the metrics tell.
        assert FLOAT32 < metrics["log_prob_gap"] < 1.0
        assert 0 < metrics["sampler_kl"] < 0.05
        np.testing.assert_allclose(metrics["ratio"], 1.0, atol=1e-4)
        np.testing.assert_allclose(metrics["importance"], 1.0, atol=0.02)
