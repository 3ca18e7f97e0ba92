"""The mesh and its rules, and whole programs over eight devices against the same on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from atommem_jax.agent import build
from atommem_jax.agent import play as play_lib
from atommem_jax.config import OptimizerConfig, PPOConfig
from atommem_jax.learning import optimizer as optimizer_lib
from atommem_jax.learning import trainer
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import Transformer, init_params
from atommem_jax.parallel import host_batches
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import rules as rules_lib
from atommem_jax.tpu_model import hlo, lowering
from tests.helpers import tiny

MESHES = [(2, 2, 2)]  # data alone: parallel_test
ROWS = 16


@functools.cache
def make_parts():
    """The tiny experiment with more heads, so that devices can share them."""
    config = tiny.make_config().copy_and_resolve_references()
    config.model.num_heads = 4
    config.model.num_kv_heads = 1
    config.model.num_layers = 2
    config.model.remat = True
    config.rollout.score_chunk = 5
    return build.build(config, tiny.make_tokenizer())


@functools.cache
def make_params():
    params = init_params(make_parts().agent.model, jax.random.key(0))
    return tiny.disturb(params, 0.1)


@functools.cache
def make_episodes():
    episodes, _ = tiny.make_episodes([i // 4 for i in range(ROWS)])
    return jax.device_get(episodes)


def make_optimizer():
    """Plain gradient descent: Adam's division would magnify rounding."""
    return optax.sgd(1.0)


@functools.cache
def play(shape, temperature):
    """(trajectories of the model, on the mesh; the mesh)."""
    mesh = mesh_lib.make_mesh(*shape)
    player = play_lib.make_player(make_parts(), tiny.make_shape(), mesh)
    params = place(make_params(), mesh)
    episodes, ids = host_batches.shard((make_episodes(), np.arange(ROWS, dtype=np.int32)), mesh)
    seed = host_batches.replicate(jax.random.key(3), mesh)
    heat = host_batches.replicate(np.float32(temperature), mesh)
    return player(params, episodes, ids, seed, heat), mesh


def place(params, mesh):
    return jax.device_put(params, make_parts().agent.model.config.layout.shardings(params, mesh))


def new_state(mesh):
    state = optimizer_lib.create_state(jax.tree.map(jnp.copy, make_params()), make_optimizer())
    return place(state, mesh)


def assert_same_parameters(ours, theirs, rtol=1e-5):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        size = float(np.abs(b).max())
        np.testing.assert_allclose(
            a, b, rtol=0, atol=rtol * max(size, 1.0), err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_rollout_is_the_same_on_any_mesh(shape):
    ours, _ = play(shape, 1.0)
    theirs, _ = play((1, 1, 1), 1.0)
    np.testing.assert_array_equal(ours.turns.response, theirs.turns.response)
    np.testing.assert_array_equal(ours.answers, theirs.answers)
    np.testing.assert_array_equal(ours.memory.entries, theirs.memory.entries)
    np.testing.assert_allclose(ours.turns.log_probs, theirs.turns.log_probs, atol=2e-5, rtol=0)
    assert np.asarray(theirs.turns.live).sum() > 3 * ROWS


@functools.cache
def fine_tune(shape):
    trajectories, _ = play((1, 1, 1), 1.0)
    mesh = mesh_lib.make_mesh(*shape)
    keep = np.arange(ROWS) % 3 != 0
    state, metrics = trainer.sft_step(
        host_batches.replicate(make_parts().agent, mesh),
        new_state(mesh),
        host_batches.shard(jax.device_get(trajectories), mesh),
        host_batches.shard(keep, mesh),
        optimizer=make_optimizer(),
        rows=8,
        mesh=mesh,
    )
    return state, jax.device_get(metrics)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_sft_is_the_same_on_any_mesh(shape):
    state, metrics = fine_tune(shape)
    expected, expected_metrics = fine_tune((1, 1, 1))
    assert_same_parameters(jax.device_get(state.params), jax.device_get(expected.params))
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, err_msg=name)


@functools.cache
def update(shape):
    trajectories, _ = play((1, 1, 1), 1.0)
    mesh = mesh_lib.make_mesh(*shape)
    episodes = make_episodes()
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 2, (ROWS, 2)).astype(np.float32)
    rewards *= np.arange(2) < episodes.num_questions[:, None]
    state, metrics = trainer.update_step(
        host_batches.replicate(make_parts().agent, mesh),
        new_state(mesh),
        host_batches.shard(jax.device_get(trajectories), mesh),
        *host_batches.shard((rewards, episodes.num_questions), mesh),
        host_batches.replicate(jax.random.key(1), mesh),
        host_batches.replicate(np.float32(1.0), mesh),
        optimizer=make_optimizer(),
        config=PPOConfig(group_size=2, minibatches=2, microbatch_rows=8),
        mesh=mesh,
    )
    return state, jax.device_get(metrics)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_an_update_is_the_same_on_any_mesh(shape):
    state, metrics = update(shape)
    expected, expected_metrics = update((1, 1, 1))
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), jax.device_get(expected.params), make_params()
    )
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert_same_parameters(jax.device_get(state.params), jax.device_get(expected.params))
    assert metrics["log_prob_gap"] < 2e-5
    for name in set(expected_metrics) - {"log_prob_gap"}:
        np.testing.assert_allclose(
            metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
        )


def test_parameters_come_back_where_they_lay():
    state, _ = update((2, 2, 2))
    where = make_parts().agent.model.config.layout.specs(state, mesh_lib.make_mesh(2, 2, 2))
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(where, is_leaf=lambda x: isinstance(x, PartitionSpec)),
        strict=True,
    )
    for (path, leaf), spec in leaves:
        expected = jax.NamedSharding(mesh_lib.make_mesh(2, 2, 2), spec)
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), jax.tree_util.keystr(path)


def test_no_weight_is_gathered_while_decoding():
    mesh = mesh_lib.make_mesh(1, 4, 2)
    parts = make_parts()
    shape = tiny.make_shape()
    config = parts.config.copy_and_resolve_references()
    config.rl.episodes, config.rl.ppo.group_size = ROWS, 1
    program = lowering.programs(config, parts, shape, mesh, ["rollout"])["rollout"]
    text = program.lower().compile().as_text()
    traffic = hlo.read(text, dict(mesh.shape), {"turns": 4, "decode": 8})
    gathered = [each for each in traffic.collectives if each.kind == "all-gather" and each.weight]
    # Every matrix once, over fsdp, before the first turn; then nothing but what sampling needs.
    assert len({each.weight for each in gathered}) >= 7
    for each in gathered:
        assert (each.axes, each.times) == (("fsdp",), 1), each
        assert not each.is_in("turns"), each
    assert not traffic.inside("decode", "all-gather", weights_only=True)
    for each in traffic.inside("decode"):
        assert each.axes == ("tensor",), each


@pytest.mark.relaxed_promotion  # Optax raises a float to a counter
def test_replicas_meet_outside_of_the_loop_over_micro_batches():
    mesh = mesh_lib.make_mesh(2, 4, 1)
    parts = make_parts()
    config = parts.config.copy_and_resolve_references()
    config.rl.episodes, config.rl.ppo.group_size = ROWS // 2, 2
    config.rl.ppo.microbatch_rows = 2
    program = lowering.programs(config, parts, tiny.make_shape(), mesh, ["update"])["update"]
    traffic = hlo.read(program.lower().compile().as_text(), dict(mesh.shape), {"microbatches": 8})
    inside = traffic.inside("microbatches")
    assert {axis for each in inside for axis in each.axes} == {"fsdp"}
    sums = [each for each in traffic.collectives if each.axes == ("data",)]
    params = jax.tree.leaves(jax.eval_shape(make_params))
    quarter = 4 * sum(leaf.size for leaf in params) // 4  # bytes of the gradients on a device
    assert sum(each.payload for each in sums) >= quarter


# ---------------------------------------------------------------------------------------------
# Rules


def specs_of(mesh_shape, rules=rules_lib.TRAINING, **sizes):
    config = ModelConfig(**{"vocab_size": 64, "width": 16, "mlp_width": 32, **sizes})
    params = jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))
    return config.layout.specs(params, mesh_lib.make_mesh(*mesh_shape), rules)


def test_every_parameter_is_split_over_both_axes_of_training():
    specs = specs_of((1, 2, 4), num_heads=4, num_kv_heads=4, tie_embeddings=False, qk_norm=True)
    assert specs["embedder"]["embedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["head"] == PartitionSpec("fsdp", "tensor")
    layers = specs["layers"]
    for name in ("query", "key", "value", "gate", "up"):
        assert layers[name]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    for name in ("out", "down"):
        assert layers[name]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert layers["query_norm"]["scale"] == PartitionSpec(None, None)


def test_rollouts_split_over_tensor_alone():
    specs = specs_of((1, 2, 4), rules_lib.ROLLOUT, num_heads=4, num_kv_heads=4)
    named = {axis for spec in jax.tree.leaves(specs, is_leaf=_is_spec) for axis in spec}
    assert named == {None, "tensor"}


def _is_spec(x):
    return isinstance(x, PartitionSpec)


def test_fewer_key_heads_than_devices_stay_whole():
    specs = specs_of((1, 1, 4), num_heads=8, num_kv_heads=2)
    assert specs["layers"]["key"]["kernel"] == PartitionSpec(None, None, None)
    assert specs["layers"]["query"]["kernel"] == PartitionSpec(None, None, "tensor")


@pytest.mark.parametrize(
    ("mesh", "sizes", "words"),
    [
        ((1, 1, 4), {"num_heads": 6, "num_kv_heads": 2}, ["model.num_heads=6", "mesh.tensor=4"]),
        ((1, 1, 4), {"num_heads": 12, "num_kv_heads": 3}, ["model.num_kv_heads=3"]),
        ((1, 8, 1), {"width": 20}, ["model.width=20", "mesh.fsdp=8"]),
        ((1, 1, 4), {"num_heads": 4, "vocab_size": 65}, ["vocabulary=65", "mesh.tensor=4"]),
        ((1, 1, 8), {"num_heads": 8, "mlp_width": 36}, ["model.mlp_width=36", "mesh.tensor=8"]),
    ],
)
def test_an_axis_that_does_not_divide_is_named(mesh, sizes, words):
    with pytest.raises(ValueError) as caught:
        specs_of(mesh, **sizes)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_parameter_is_refused():
    layout = rules_lib.Layout(4, 4)
    with pytest.raises(ValueError, match=r"layers/router/kernel \[3, 8, 8\]: no rule"):
        layout.specs({"layers": {"router": {"kernel": jnp.zeros((3, 8, 8))}}}, mesh_lib.single())


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_moments_lie_with_their_parameters(name):
    config = ModelConfig(vocab_size=64, width=16, num_heads=4, num_kv_heads=4, mlp_width=256)
    mesh = mesh_lib.make_mesh(1, 2, 4)
    optimizer = optimizer_lib.make_optimizer(OptimizerConfig(name=name), 1)

    def create():
        params = init_params(Transformer(config), jax.random.key(0))
        return optimizer_lib.create_state(params, optimizer)

    shapes = jax.eval_shape(create)
    specs = config.layout.specs(shapes, mesh)
    by_shape = {
        leaf.shape: spec
        for leaf, spec in zip(
            jax.tree.leaves(shapes.params), jax.tree.leaves(specs.params, is_leaf=_is_spec),
            strict=True,
        )
    }  # fmt: skip
    moments = zip(
        jax.tree.leaves(shapes.opt_state),
        jax.tree.leaves(specs.opt_state, is_leaf=_is_spec),
        strict=True,
    )
    checked = 0
    for leaf, spec in moments:
        if leaf.shape in by_shape:
            assert spec == by_shape[leaf.shape]
            checked += 1
        else:
            assert not any(spec)
    assert checked >= len(jax.tree.leaves(shapes.params))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data": 4, "fsdp": 4}, ["mesh.data=4", "mesh.fsdp=4", "16 devices", "8 devices"]),
        ({"tensor": 0}, ["mesh.tensor=0", "at least 1"]),
        ({"data": 3, "slices": 2}, ["mesh.data=3", "mesh.slices=2"]),
    ],
)
def test_a_mesh_that_cannot_be_names_the_fields(arguments, words):
    with pytest.raises(ValueError) as caught:
        mesh_lib.make_mesh(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_batch_smaller_than_the_mesh_is_refused():
    with pytest.raises(ValueError, match=r"a batch of 6 does not divide over mesh\.data=2 x mesh"):
        host_batches.shard(np.zeros((6, 2)), mesh_lib.make_mesh(2, 2, 2))
