"""Whole programs over eight devices do what they do on one; and what a program's spec says."""

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
from atommem_jax.model.transformer import init_params
from atommem_jax.parallel import host_batches, program
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.tpu_model import hlo, lowering
from tests.helpers import tiers, tiny

ONE = (1, 1, 1)
# The largest difference of a log-prob: with a tensor axis a product is summed in parts.
MESHES = {(8, 1, 1): 1e-5, (2, 2, 2): 2e-5}
PPO = {
    # An entropy bonus needs every row; without, those of no advantage are left out.
    (8, 1, 1): PPOConfig(
        group_size=2, minibatches=2, microbatch_rows=8, entropy_coef=0.01, importance_cap=2.0
    ),
    (2, 2, 2): PPOConfig(group_size=2, minibatches=2, microbatch_rows=8, importance_cap=2.0),
}
ROWS = 16
on_each_mesh = pytest.mark.parametrize("shape", tiers.first(reversed(MESHES)), ids=str)


@functools.cache
def make_parts(changes=()):
    """The tiny experiment with more heads, so that devices can share them."""
    config = tiny.make_config().replace(
        {
            "model.num_heads": 4,
            "model.num_kv_heads": 1,
            "model.num_layers": 2,
            "model.remat": True,
            "rollout.score_chunk": 5,
            "rollout.draft": 1,
            **dict(changes),
        }
    )
    return build.build(config, tiny.make_tokenizer())


@functools.cache
def make_params(changes=()):
    params = init_params(make_parts(changes).agent.model, jax.random.key(0))
    return tiny.disturb(params, 0.1)


@functools.cache
def make_episodes():
    episodes, _ = tiny.make_episodes([i // 4 for i in range(ROWS)])
    return jax.device_get(episodes)


@functools.cache
def make_optimizer():
    """Gradient descent, whose moment is the gradient: Adam's division would magnify rounding."""
    return optax.sgd(1.0, momentum=0.9)


@functools.cache
def play(shape, tensor=0, changes=()):
    """Trajectories of the model, on the mesh; rollouts with `tensor` on that axis."""
    mesh = mesh_lib.make_mesh(*shape)
    player = play_lib.make_player(make_parts(changes), tiny.make_shape(), mesh, tensor=tensor)
    params = place(make_params(changes), mesh)
    episodes, ids = host_batches.shard((make_episodes(), np.arange(ROWS, dtype=np.int32)), mesh)
    seed = host_batches.replicate(jax.random.key(3), mesh)
    heat = host_batches.replicate(np.float32(1.0), mesh)
    return player(params, episodes, ids, seed, heat)


def place(params, mesh):
    return jax.device_put(params, make_parts().agent.model.config.layout.shardings(params, mesh))


def new_state(mesh):
    state = optimizer_lib.create_state(jax.tree.map(jnp.copy, make_params()), make_optimizer())
    return place(state, mesh)


def assert_close(ours, theirs, rtol=1e-5):
    """rtol: relative to the largest entry of a leaf, or to one."""
    for (path, a), b in zip(
        jax.tree.leaves_with_path(jax.device_get(ours)),
        jax.tree.leaves(jax.device_get(theirs)),
        strict=True,
    ):
        size = float(np.abs(b).max())
        np.testing.assert_allclose(
            a, b, rtol=0, atol=rtol * max(size, 1.0), err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize(
    ("shape", "tensor"),
    tiers.first([((2, 4, 1), 2), *((shape, 0) for shape in MESHES), ((1, 8, 1), 2)], several=True),
    ids=str,
)
def test_a_rollout_is_the_same_on_any_mesh(shape, tensor):
    ours, theirs = play(shape, tensor), play(ONE)
    where = jax.NamedSharding(mesh_lib.make_mesh(*shape), program.ROWS)
    assert ours.id.sharding.is_equivalent_to(where, 1)
    assert len(ours.id.sharding.device_set) == 8
    # How rows are grouped depends on which are on a device.
    how = {"lanes": theirs.turns.lanes, "width": theirs.turns.width}
    ours = ours.replace(turns=ours.turns.replace(**how))
    assert np.asarray(theirs.turns.live).sum() > 3 * ROWS
    for (path, x), y in zip(
        jax.tree.leaves_with_path(jax.device_get(ours)),
        jax.tree.leaves(jax.device_get(theirs)),
        strict=True,
    ):
        if np.issubdtype(x.dtype, np.floating):
            np.testing.assert_allclose(
                x,
                y,
                rtol=0,
                atol=2e-5 if tensor else MESHES[shape],
                err_msg=jax.tree_util.keystr(path),
            )
        else:
            np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


INT8 = (("rollout.cache_dtype", "int8"), ("rollout.param_dtype", "int8"))
PREFIX = (("model.match_features", False), ("rollout.cache_prefix", True))


@pytest.mark.parametrize(
    "changes", [INT8, PREFIX, INT8 + PREFIX], ids=["int8", "prefix", "int8 prefix"]
)
@pytest.mark.long
def test_what_is_kept_lies_on_the_mesh_of_rollouts(changes):
    """Every device has one copy of the only key/value head."""
    ours, theirs = play((1, 8, 1), 2, changes), play(ONE, 0, changes)
    turns = jax.device_get(ours.turns)
    np.testing.assert_array_equal(turns.response, theirs.turns.response)
    # A sum in another order may round to another int8.
    atol = 5e-3 if changes[:2] == INT8 else 2e-5
    np.testing.assert_allclose(turns.log_probs, theirs.turns.log_probs, rtol=0, atol=atol)


@functools.cache
def fine_tune(shape):
    mesh = mesh_lib.make_mesh(*shape)
    keep = np.arange(ROWS) % 3 != 0
    return trainer.sft_step(
        host_batches.replicate(make_parts().agent, mesh),
        new_state(mesh),
        host_batches.shard(jax.device_get(play(ONE)), mesh),
        host_batches.shard(keep, mesh),
        optimizer=make_optimizer(),
        rows=8,
        mesh=mesh,
    )


@on_each_mesh
def test_sft_is_the_same_on_any_mesh(shape):
    state, metrics = fine_tune(shape)
    expected, expected_metrics = fine_tune(ONE)
    assert_close(state.params, expected.params)
    assert_close(state.opt_state, expected.opt_state)
    assert float(expected_metrics["gradient_norm"]) > 0.1
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, err_msg=name)


@functools.cache
def update(shape, ppo, contrasts=ROWS // 2):
    """One update; only the first `contrasts` groups have a better and a worse member."""
    mesh = mesh_lib.make_mesh(*shape)
    episodes = make_episodes()
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 2, (ROWS, 2)).astype(np.float32)
    rewards *= np.arange(2) < episodes.num_questions[:, None]
    rewards[contrasts * ppo.group_size :] = 0.0
    return trainer.update_step(
        host_batches.replicate(make_parts().agent, mesh),
        new_state(mesh),
        host_batches.shard(jax.device_get(play(ONE)), mesh),
        *host_batches.shard((rewards, episodes.num_questions), mesh),
        host_batches.replicate(jax.random.key(1), mesh),
        host_batches.replicate(np.float32(1.0), mesh),
        optimizer=make_optimizer(),
        config=ppo,
        mesh=mesh,
    )


@on_each_mesh
def test_an_update_is_the_same_on_any_mesh(shape):
    state, metrics = update(shape, PPO[shape])
    expected, expected_metrics = update(ONE, PPO[shape])
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), jax.device_get(expected.params), make_params()
    )
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert int(state.step) == int(expected.step) == 2
    assert_close(state.params, expected.params)
    assert_close(state.opt_state, expected.opt_state)
    assert float(expected_metrics["advantage_std"]) > 0
    assert metrics["log_prob_gap"] < metrics["log_prob_bound"] < 1e-4
    for name in set(expected_metrics) - {"log_prob_gap"}:
        np.testing.assert_allclose(
            metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
        )
    if shape == (8, 1, 1):  # no product is summed in parts
        assert_close(metrics, expected_metrics, rtol=5e-5)


def test_an_update_is_the_same_where_one_device_had_all_that_counts():
    contrasts = ROWS // 4
    state, metrics = update((2, 1, 1), PPO[2, 2, 2], contrasts)
    expected, expected_metrics = update(ONE, PPO[2, 2, 2], contrasts)
    assert_close(state.params, expected.params)
    assert 0 < float(expected_metrics["scored_share"]) < 0.8
    for name in set(expected_metrics) - {"log_prob_gap"}:
        np.testing.assert_allclose(
            metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
        )


def test_parameters_come_back_where_they_lay():
    state, _ = update((2, 2, 2), PPO[2, 2, 2])
    where = make_parts().agent.model.config.layout.specs(state, mesh_lib.make_mesh(2, 2, 2))
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(where, is_leaf=lambda x: isinstance(x, PartitionSpec)),
        strict=True,
    )
    for (path, leaf), spec in leaves:
        expected = jax.NamedSharding(mesh_lib.make_mesh(2, 2, 2), spec)
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), jax.tree_util.keystr(path)


@pytest.mark.long
@pytest.mark.parametrize(("size", "tensor"), [((1, 4, 2), 0), ((1, 8, 1), 2)], ids=str)
def test_no_weight_is_gathered_while_decoding(size, tensor):
    mesh = mesh_lib.make_mesh(*size)
    config = make_parts().config.replace(
        {"rl.episodes": ROWS // 2, "rl.ppo.group_size": 2, "mesh.rollout_tensor": tensor}
    )
    parts, shape = dataclasses.replace(make_parts(), config=config), tiny.make_shape()
    lowered = lowering.programs(config, parts, shape, mesh, ["rollout"])["rollout"]
    text = lowered.lower().compile().as_text()
    sizes = dict(mesh_lib.reshape_for_rollouts(mesh, tensor).shape)
    traffic = hlo.read(text, sizes, {"turns": 4, "decode": 8})
    gathered = [
        each
        for each in traffic.collectives
        if each.kind == "all-gather" and each.weight.startswith("params")
    ]
    # Every matrix once, over fsdp, before the first turn.
    placed = [each for each in gathered if not each.is_in("turns")]
    assert placed
    if not tensor:
        assert len({each.weight for each in placed}) >= 7
    for each in placed:
        assert each.times == 1, each
        assert tensor or each.axes == ("fsdp",), each
    # Prompts are long: a device reads some rows, and gathers the layers for it.
    assert all(each.is_in("prefill") for each in gathered if each.is_in("turns"))
    sums = [each for each in traffic.collectives if each.kind == "all-reduce"]
    assert not any(each.is_in("prefill") for each in sums)
    assert not any(each.is_in("decode") for each in gathered)
    for each in traffic.inside("decode"):
        assert each.axes == ("tensor",), each
    # While decoding two sums a layer, one of the embeddings; and logits, dealt out by rows.
    layer = [each for each in traffic.inside("decode") if "layers" in each.op_name]
    assert {each.kind for each in layer} == {"all-reduce"}
    widths = 3  # `rollout.prompt_buckets`: each is a program of its own
    assert len(layer) == 2 * widths
    vocabulary = parts.agent.model.config.vocab_size
    rows = ROWS // sizes["data"] // sizes["fsdp"]
    most = max(each.payload for each in traffic.inside("decode", "all-to-all"))
    assert most <= 4 * rows * vocabulary


def lower_over_four(**changes):
    """Two devices on `tensor`, and four while rollouts, over which this vocabulary divides."""
    config = make_parts().config.replace(
        {"rl.episodes": ROWS // 2, "rl.ppo.group_size": 2, "mesh.rollout_tensor": 4, **changes}
    )
    parts = build.build(
        config, lowering.StandInTokenizer(456, build.reserved_names(make_parts().config))
    )
    mesh = mesh_lib.make_mesh(1, 4, 2)
    lowered = lowering.programs(config, parts, tiny.make_shape(), mesh, ["rollout"])["rollout"]
    return lowered.lower()


def test_heads_have_copies_behind_a_prefix_too():
    """Two key/value heads for four devices: a prefix has each twice, rows being read once."""
    assert lower_over_four(**{**dict(INT8 + PREFIX), "model.num_kv_heads": 2})


def test_neither_mesh_need_be_finer_than_the_other():
    text = lower_over_four().compile().as_text()
    traffic = hlo.read(text, {"data": 1, "fsdp": 2, "tensor": 4}, {"turns": 4, "groups": 1})
    assert {each.axes for each in traffic.inside("decode")} == {("tensor",)}


@pytest.mark.relaxed_promotion  # Optax raises a float to a counter
def test_replicas_meet_outside_of_the_loop_over_micro_batches():
    mesh = mesh_lib.make_mesh(2, 4, 1)
    parts = make_parts()
    config = parts.config.replace(
        {"rl.episodes": ROWS // 2, "rl.ppo.group_size": 2, "rl.ppo.microbatch_rows": 2}
    )
    lowered = lowering.programs(config, parts, tiny.make_shape(), mesh, ["update"])["update"]
    traffic = hlo.read(lowered.lower().compile().as_text(), dict(mesh.shape), {"microbatches": 8})
    inside = traffic.inside("microbatches")
    assert {axis for each in inside for axis in each.axes} == {"fsdp"}
    sums = [each for each in traffic.collectives if each.axes == ("data",)]
    params = jax.tree.leaves(jax.eval_shape(make_params))
    quarter = 4 * sum(leaf.size for leaf in params) // 4  # bytes of the gradients on a device
    assert sum(each.payload for each in sums) >= quarter


# ---------------------------------------------------------------------------------------------
# What a spec says


@pytest.mark.parametrize("wrap", [program.data_parallel, program.fsdp_parallel])
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_a_name_that_is_no_parameter_is_refused(wrap, shape):
    def add(left, right):
        return left + right

    mesh = mesh_lib.make_mesh(*shape)
    with pytest.raises(ValueError, match=r"rows=\('left', 'wrong'\): 'wrong' .* left, right"):
        wrap(add, mesh, rows=("left", "wrong"), out=program.ROWS)


def test_each_share_has_its_rows_and_all_of_what_is_whole():
    def shares(offset, rows):
        total = program.psum(rows.sum())
        most = program.pmax(rows.max())
        return rows + offset.sum() + rows.min(), (total, most)

    mesh = mesh_lib.make_mesh(4, 2, 1)
    out = (program.ROWS, (program.WHOLE, program.WHOLE))
    run = jax.jit(program.data_parallel(shares, mesh, rows=("rows",), out=out))
    rows = np.arange(16, dtype=np.int32)
    found, (total, most) = run(np.array([100, 200], np.int32), rows)
    np.testing.assert_array_equal(found, rows + 300 + rows // 2 * 2)
    assert (int(total), int(most)) == (120, 15)
