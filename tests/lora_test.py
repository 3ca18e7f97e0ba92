"""Adapters against matrices merged by NumPy, gradients against those of the whole model, and steps
that move the adapters alone."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from absl import flags as absl_flags
from flax import traverse_util
from jax.sharding import PartitionSpec

from atommem_jax import lora, pretrained, sampling, sharding, trainer
from atommem_jax import optimizer as optimizer_lib
from atommem_jax.checkpoint import Checkpointer
from atommem_jax.config import ConfigError
from atommem_jax.lora import LoraConfig
from atommem_jax.model import ModelConfig, Transformer, init_params, without_adapters
from atommem_jax.optimizer import OptimizerConfig
from atommem_jax.published import PublishedError
from atommem_jax.trainer import PPOConfig
from experiments import agents, convert, train, validation, wiring
from experiments.configs import synthetic
from experiments.metrics import read_metrics
from tests import pretrained_test, published_test, runs, tiny
from tests.conftest import COMPILATION_CACHE

EVERYTHING = LoraConfig(rank=3, alpha=12.0, targets=(".*",))
SIZES = {
    "vocab_size": 42,
    "width": 16,
    "num_layers": 2,
    "num_kv_heads": 1,
    "head_width": 8,
    "mlp_width": 24,
    "token_shift": 1,
    "remat": True,
}


def flatten(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def make_model(lora_config=EVERYTHING, **sizes):
    config = ModelConfig(**SIZES | sizes, lora=lora_config)
    config.validate()
    return Transformer(config)


@functools.cache
def draw_params(model, scale=0.1):
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    return tiny.disturb(params, scale)


def matrix_of(path, tree):
    """The matrix that the adapter at `path`, such as layers/query_lora, belongs to."""
    return next(p for p in tree if p.split("/kernel")[0].split("/embedding")[0] == path[:-5])


def merge_by_hand(params, scale):
    """W + scale A B in NumPy's float64, layer by layer."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    plain = {path: leaf for path, leaf in flat.items() if "_lora" not in path}
    for path in {path[:-2] for path in flat if "_lora" in path}:
        a, b = flat[f"{path}/a"], flat[f"{path}/b"]
        for at in np.ndindex(a.shape[:-2]):
            plain[matrix_of(path, plain)][at] += scale * (a[at] @ b[at])
    flat = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in plain.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


TOKENS = np.random.default_rng(0).integers(1, SIZES["vocab_size"], (2, 7)).astype(np.int32)
START = np.array([0, 2], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def compute(model, params):
    hidden, _ = model.apply({"params": params}, TOKENS, START)
    logits = model.apply({"params": params}, hidden, method="logits")
    return logits, model.apply({"params": params}, hidden, method="value")


@pytest.mark.parametrize("tied", [True, False])
def test_the_branch_computes_what_merged_matrices_do(tied):
    model = make_model(tie_embeddings=tied)
    params = draw_params(model)
    assert len(lora.partition(params, EVERYTHING)[0]["layers"]) == len(lora.LAYERS)
    by_hand = merge_by_hand(params, EVERYTHING.scale)
    ours, theirs = compute(model, params), compute(without_adapters(model), by_hand)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
    merged = lora.merge(params, EVERYTHING)
    for path, leaf in flatten(merged).items():
        expected = flatten(by_hand)[path]
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6, err_msg=path)
    # It is no trifle that is compared.
    rest = {name: part for name, part in params.items() if not name.endswith("_lora")}
    rest["layers"] = {n: part for n, part in params["layers"].items() if not n.endswith("_lora")}
    base = compute(without_adapters(model), rest)[0]
    assert np.abs(base - ours[0]).max() > 0.1 * np.abs(ours[0]).max()


def test_new_adapters_change_nothing():
    model = make_model()
    params, plain = (init_params(m, jax.random.key(1)) for m in (model, without_adapters(model)))
    for path, leaf in flatten(plain).items():
        # Drawn by two programs, whose scales may be multiplied in another order.
        np.testing.assert_allclose(leaf, flatten(params)[path], 1e-5, 1e-7, err_msg=path)
    shared = {path: flatten(params)[path] for path in flatten(plain)}
    plain = traverse_util.unflatten_dict(shared, sep="/")
    for ours, theirs in zip(
        compute(model, params), compute(without_adapters(model), plain), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    for path, leaf in flatten(params).items():
        if path.endswith("_lora/a"):
            wide = 1.0 if path.startswith("embedder") else leaf.shape[-2] ** -0.5
            np.testing.assert_allclose(np.std(leaf), wide, rtol=0.3, err_msg=path)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_adapters_are_projections_of_the_whole_gradient(tied):
    model = make_model(tie_embeddings=tied)
    params = draw_params(model)
    trainable, frozen = lora.partition(params, EVERYTHING)

    def loss(model, params):
        logits, values = compute(model, params)
        return jnp.square(jax.nn.log_softmax(logits)).mean() + jnp.square(values).sum()

    def on_the_base(trainable):
        return loss(model, lora.join(trainable, frozen))

    ours = flatten(jax.jit(jax.grad(on_the_base))(trainable))
    plain = merge_by_hand(params, EVERYTHING.scale)
    whole = flatten(jax.jit(jax.grad(functools.partial(loss, without_adapters(model))))(plain))
    adapters = flatten(trainable)
    for path, found in ours.items():
        if path.startswith("value_head"):
            expected = np.asarray(whole[path])
        else:
            name = path[:-2]
            gradient = np.asarray(whole[matrix_of(name, whole)], np.float64)
            if path.endswith("/a"):  # W + s A B: dA = s dW B^T, dB = s A^T dW
                expected = EVERYTHING.scale * gradient @ np.swapaxes(adapters[f"{name}/b"], -1, -2)
            else:
                expected = EVERYTHING.scale * np.swapaxes(adapters[f"{name}/a"], -1, -2) @ gradient
        assert np.abs(expected).max() > 0, path
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=path
        )


# ---------------------------------------------------------------------------------------------
# Forms of a tree


def test_partition_and_join_undo_each_other():
    params = draw_params(make_model(LoraConfig(rank=2, targets=("query", "embedder"))))
    config = make_model(LoraConfig(rank=2, targets=("query", "embedder"))).config.lora
    trainable, frozen = lora.partition(params, config)
    assert set(flatten(trainable)) == {
        *("layers/query_lora/a", "layers/query_lora/b", "embedder_lora/a", "embedder_lora/b"),
        *("value_head/kernel", "value_head/bias"),
    }
    assert not set(flatten(trainable)) & set(flatten(frozen))
    joined = lora.join(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, joined, params)
    with pytest.raises(ValueError, match=r"parameter embedder_lora/a is trainable and frozen"):
        lora.join(trainable, params)


def test_without_adapters_nothing_is_frozen():
    off = LoraConfig()
    params = init_params(make_model(off), jax.random.key(0))
    assert not [path for path in flatten(params) if "_lora" in path]
    assert lora.partition(params, off) == (params, None)
    assert lora.join(params, None) is params
    assert lora.merge(params, off) is params


def test_a_fingerprint_is_of_every_bit_and_not_of_where_it_lies():
    config = make_model().config
    _, frozen = lora.partition(draw_params(make_model()), EVERYTHING)
    mark = lora.fingerprint(frozen)
    placed = jax.device_put(frozen, config.layout.shardings(frozen, sharding.make_mesh(2, 2, 2)))
    assert lora.fingerprint(placed) == mark
    seen = {mark}
    for path, leaf in flatten(frozen).items():
        bits = np.array(leaf)
        bits.reshape(-1).view(np.uint32)[-1] ^= 1
        changed = flatten(frozen) | {path: jnp.asarray(bits)}
        seen.add(lora.fingerprint(traverse_util.unflatten_dict(changed, sep="/")))
    assert len(seen) == 1 + len(flatten(frozen))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": -1}, ["lora.rank=-1", "0 (off)"]),
        ({"rank": 2, "alpha": 0.0}, ["lora.alpha=0.0", "above 0"]),
        ({"rank": 2, "targets": ()}, ["lora.targets is empty", "layers/query", "lora.rank=0"]),
        (
            {"rank": 2, "targets": ("query", "output")},
            ["lora.targets: 'output' matches no", "layers/out,", "layers/down", "embedder"],
        ),
        ({"rank": 2, "targets": ("head",)}, ["'head' matches no matrix"]),  # tied: there is none
        ({"rank": 2, "targets": ("(",)}, ["lora.targets: '(' is no regular expression"]),
        ({"rank": 2, "base_dtype": "float16"}, ["lora.base_dtype='float16'", "model.dtype="]),
    ],
)
def test_what_cannot_be_adapted_is_named(fields, words):
    with pytest.raises(ValueError) as caught:
        ModelConfig(**SIZES, lora=LoraConfig(**fields)).validate()
    for word in words:
        assert word in str(caught.value)


def test_paths_narrow_a_target():
    config = LoraConfig(rank=1, targets=("layers/(query|value)", "head"))
    paths = ModelConfig(**SIZES, tie_embeddings=False).matrices
    assert [path for path in paths if config.adapts(path)] == [
        *("layers/query", "layers/value", "head")
    ]
    assert not LoraConfig(rank=0).adapts("layers/query")


def test_a_lies_with_the_inputs_of_its_matrix_and_b_with_the_outputs():
    model = make_model(num_heads=4, num_kv_heads=4, vocab_size=48, tie_embeddings=False)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    specs = model.config.layout.specs(params, sharding.make_mesh(1, 2, 4))
    flat = traverse_util.flatten_dict(
        specs, sep="/", is_leaf=lambda _, x: isinstance(x, PartitionSpec)
    )
    checked = 0
    for path, spec in flat.items():
        if path.endswith("_lora/a"):
            name = path[:-7]
            matrix = flat[matrix_of(path[:-2], flat)]
            assert tuple(spec) == (*matrix[:-1], None), path
            assert tuple(flat[f"{name}_lora/b"]) == (*matrix[:-2], None, matrix[-1]), path
            checked += 1
    assert checked == len(model.config.matrices)


# ---------------------------------------------------------------------------------------------
# Steps


ROWS = 16
PPO = PPOConfig(group_size=2, microbatch_rows=8, eighths=(8,), kl_coef=0.1)
ADAPTED = LoraConfig(rank=3, alpha=12.0, targets=(*lora.LAYERS, "embedder"))


@functools.cache
def make_parts(lora_config=ADAPTED, param_dtype="float32", **sizes):
    """The tiny experiment with adapters, and more heads so that devices can share them."""
    config = tiny.make_config().copy_and_resolve_references()
    config.model.num_heads = 4
    config.model.num_layers = 2
    config.model.remat = True
    config.model.update(sizes)
    config.rollout.param_dtype = param_dtype
    config.lora.update(dataclasses.asdict(lora_config))
    return wiring.build(config, tiny.make_tokenizer())


@functools.cache
def make_policy():
    """(trainable, frozen); B is not zero."""
    return lora.partition(draw_params(make_parts().agent.model), ADAPTED)


def place(tree, mesh):
    return jax.device_put(tree, make_parts().agent.model.config.layout.shardings(tree, mesh))


@functools.cache
def make_episodes():
    episodes, _ = tiny.make_episodes([i // 2 for i in range(ROWS)])
    return jax.device_get(episodes)


@functools.cache
def play(shape):
    """A rollout, which merges what the learner does not."""
    mesh = sharding.make_mesh(*shape)
    player = wiring.make_player(make_parts(), tiny.make_shape(), mesh)
    params = place(lora.join(*make_policy()), mesh)
    episodes, ids = sharding.shard((make_episodes(), np.arange(ROWS, dtype=np.int32)), mesh)
    seed, heat = sharding.replicate((jax.random.key(3), np.float32(1.0)), mesh)
    return jax.device_get(player(params, episodes, ids, seed, heat))


def new_state(optimizer, mesh):
    state = optimizer_lib.create_state(jax.tree.map(jnp.copy, make_policy()[0]), optimizer)
    return place(state, mesh)


SGD = optax.sgd(1.0)  # Adam's division would magnify rounding


@functools.cache
def fine_tune(shape):
    mesh = sharding.make_mesh(*shape)
    state, metrics = trainer.sft_step(
        sharding.replicate(make_parts().agent, mesh),
        new_state(SGD, mesh),
        sharding.shard(play((1, 1, 1)), mesh),
        sharding.shard(np.arange(ROWS) % 3 != 0, mesh),
        place(make_policy()[1], mesh),
        optimizer=SGD,
        rows=8,
        eighths=(8,),
        mesh=mesh,
    )
    return jax.device_get((state, metrics))


@functools.cache
def update(shape, optimizer=SGD):
    mesh = sharding.make_mesh(*shape)
    rewards = np.random.default_rng(0).integers(0, 2, (ROWS, 2)).astype(np.float32)
    counts = make_episodes().num_questions
    state, metrics = trainer.update_step(
        sharding.replicate(make_parts().agent, mesh),
        new_state(optimizer, mesh),
        sharding.shard(play((1, 1, 1)), mesh),
        *sharding.shard((rewards * (np.arange(2) < counts[:, None]), counts), mesh),
        *sharding.replicate((jax.random.key(1), np.float32(1.0)), mesh),
        place(make_policy()[0], mesh),
        place(make_policy()[1], mesh),
        optimizer=optimizer,
        config=PPO,
        mesh=mesh,
    )
    return jax.device_get((state, metrics))


def test_a_rollout_samples_from_what_the_learner_scores():
    turns = play((1, 1, 1)).turns
    assert turns.live.sum() > 3 * ROWS
    _, metrics = update((1, 1, 1))
    assert 0 < metrics["log_prob_gap"] < 2e-5
    assert metrics["reference_kl"] < 1e-6  # the adapters of the reference are on the same base


@pytest.mark.relaxed_promotion
def test_so_it_does_in_bfloat16():
    """There the rollout keeps the branch: merged and rounded it was .1 off for these adapters."""
    parts = make_parts(dtype="bfloat16", param_dtype="bfloat16")
    mesh = sharding.single()
    player = wiring.make_player(parts, tiny.make_shape(), mesh)
    trainable, frozen = make_policy()
    small = {p: x * 0.02 if p.endswith("/b") else x for p, x in flatten(trainable).items()}
    params = place(lora.join(traverse_util.unflatten_dict(small, sep="/"), frozen), mesh)
    episodes, ids = sharding.shard((make_episodes(), np.arange(ROWS, dtype=np.int32)), mesh)
    seed, heat = sharding.replicate((jax.random.key(3), np.float32(1.0)), mesh)
    rows = trainer.make_batch(player(params, episodes, ids, seed, heat))
    scores = jax.jit(sampling.score)(
        parts.agent,
        params,
        *(rows.prompt, rows.prompt_lengths, rows.response, rows.response_lengths, rows.phase),
        heat,
    )
    gap = np.where(rows.weights > 0, scores.log_probs - rows.old_log_probs, 0.0)
    assert 0 < np.abs(gap).max() < 1e-5


@pytest.mark.parametrize("step", [fine_tune, update])
def test_eight_devices_do_what_one_does(step):
    (ours, our_metrics), (theirs, metrics) = step((2, 2, 2)), step((1, 1, 1))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours.params),
        jax.tree.leaves(theirs.params),
        strict=True,
    ):
        bound = 1e-5 * max(float(np.abs(b).max()), 1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))
    for name in set(metrics) - {"log_prob_gap"}:
        np.testing.assert_allclose(
            our_metrics[name], metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
        )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), theirs.params, make_policy()[0])
    assert all(moved["layers"][name][m] > 1e-4 for name in moved["layers"] for m in "ab")


def list_shapes(jaxpr):
    """Shapes of all that a program computes, loops and branches included."""
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {getattr(v.aval, "shape", ()) for v in equation.outvars}
        inner = [
            x
            for value in equation.params.values()
            for x in jax.tree.leaves(value, is_leaf=_is_jaxpr)
        ]
        for each in inner:
            if _is_jaxpr(each):
                shapes |= list_shapes(getattr(each, "jaxpr", each))
    return shapes


def _is_jaxpr(x):
    return isinstance(x, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr))


@pytest.mark.parametrize("rank", [0, 3])
def test_frozen_matrices_have_no_gradient_and_no_moments(rank):
    config = LoraConfig(rank=rank)
    # No other array of the program has the shape of a matrix.
    agent = make_parts(config, width=24, head_width=12, mlp_width=44).agent
    params = jax.eval_shape(lambda: init_params(agent.model, jax.random.key(0)))
    trainable, frozen = lora.partition(params, config)
    optimizer = optimizer_lib.make_optimizer(OptimizerConfig(), 1)
    state = jax.eval_shape(lambda params: optimizer_lib.create_state(params, optimizer), trainable)
    played = jax.eval_shape(lambda: play((1, 1, 1)))
    with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to a counter
        program = trainer.sft_step.trace(
            agent,
            state,
            played,
            jax.ShapeDtypeStruct((ROWS,), bool),
            frozen,
            optimizer=optimizer,
            rows=8,
            eighths=(8,),
        )
    computed = list_shapes(program.jaxpr.jaxpr)
    flat = flatten(params)
    stacks = {flat[p].shape for p in flat if p.startswith("layers") and p.endswith("kernel")}
    matrices = {shape[1:] for shape in stacks}
    table = {flat["embedder/embedding"].shape}
    for shapes in (stacks, matrices, table):
        assert shapes & computed == (set() if rank else shapes)
    moments = [path for path in flatten_paths(state.opt_state) if "/mu/" in path]
    assert len(moments) == len(jax.tree.leaves(trainable))


def flatten_paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


# ---------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


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
            config=config,
            tokenizer=tokenizer.to_bytes(),
            data_state=b"",
            progress=progress,
        )
    return workdir


@functools.cache
def make_base(workdir, data_root, shift=0.0):
    """A run whose parameters are noise; `shift` is added to one number of them."""
    config = runs.make_config()
    tokenizer = wiring.load_tokenizer(config, wiring.load_dataset(config, data_root))
    params = jax.device_get(draw_params(wiring.build(config, tokenizer).agent.model))
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
        assert record["stage"] != "rl" or record["log_prob_gap"] < 2e-5


def interrupt(adapted, workdir):
    """A copy of the run as it was before its last step."""
    shutil.copytree(adapted, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(END))
    return workdir


@pytest.mark.relaxed_promotion
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, adapted, base, data_root, capsys):
    moved = tmp_path / "elsewhere"  # where a base lies may change
    shutil.copytree(base, moved)
    workdir = interrupt(adapted, tmp_path / "run")
    train.train(make_run_config(moved), str(workdir), data_root)
    assert "resuming" in capsys.readouterr().out
    ours, theirs = runs.read_state(workdir, END), runs.read_state(adapted, END)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.tobytes() == b.tobytes()


def test_another_base_is_refused(tmp_path, adapted, data_root):
    other = make_base(tmp_path / "other", data_root, shift=1e-3)
    with pytest.raises(ConfigError, match=r"init_from=.*other has the fingerprint .* step 2 of"):
        train.train(make_run_config(other), str(interrupt(adapted, tmp_path / "run")), data_root)
    with pytest.raises(ConfigError, match=r"other has the fingerprint .* step 3 of .*that they"):
        agents.load(str(adapted), base=str(other))
    with pytest.raises(ConfigError, match=r"of init_from=.*gone, which cannot .*--base"):
        agents.load(str(adapted), base=str(tmp_path / "gone"))


def test_a_loaded_run_is_the_plain_model_that_was_trained(adapted, base):
    loaded = agents.load(str(adapted))
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
    mark = lora.fingerprint(frozen)
    tokenizer = agents.load(str(base)).parts.tokenizer
    save_run(tmp_path, trained, config, tokenizer, base=mark)
    loaded = agents.load(str(tmp_path))
    assert loaded.parts.agent.model.config.lora.rank == 2
    expected = flatten(lora.join(trained, frozen))
    assert flatten(loaded.params).keys() == expected.keys()
    for path, leaf in flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    merged = agents.load(str(tmp_path), merge=True)
    assert merged.parts.agent.model.config.lora.rank == 0
    assert not any("lora" in path for path in flatten(merged.params))


def test_adapters_need_a_base():
    with pytest.raises(ConfigError, match=r"lora\.rank=2 .* init_from is empty.*lora\.rank=0"):
        validation.validate(runs.make_config(lora__rank=2))
    with pytest.raises(ConfigError, match=r"lora\.targets: 'output' matches no matrix"):
        validation.validate(
            runs.make_config(
                init_from="base", sft__steps=0, lora__rank=2, lora__targets=("output",)
            )
        )


# ---------------------------------------------------------------------------------------------
# Exports


def test_what_is_exported_adds_up(tmp_path):
    fields = {**pretrained_test.QWEN, "vocab_size": 320, "tie_word_embeddings": False}
    published = pretrained_test.make_tensors(fields)
    source = pretrained_test.write(tmp_path / "in", fields, published)
    published_test.write_tokenizer(source)
    config = synthetic.get_config()
    convert.write_checkpoint(str(source), str(tmp_path / "base"), config)
    below = agents.load(str(tmp_path / "base"))

    config = below.parts.config.copy_and_resolve_references()
    config.lora.update(
        {"rank": 2, "alpha": 6.0, "targets": ("query", "out", "up", "head", "embedder")}
    )
    config.init_from = str(tmp_path / "base")
    parts = wiring.build(config, below.parts.tokenizer)
    trainable, _ = lora.partition(draw_params(parts.agent.model), parts.agent.model.config.lora)
    mark = lora.fingerprint(lora.partition(below.params, parts.agent.model.config.lora)[1])
    run = save_run(tmp_path / "run", trainable, config, below.parts.tokenizer, 7, base=mark)

    convert.write_huggingface(str(run), str(tmp_path / "merged"))
    convert.write_adapters(str(run), str(tmp_path / "alone"), base="Qwen/Qwen3-tiny")
    merged = pretrained_test.read_all(tmp_path / "merged")
    alone = safetensors.numpy.load_file(tmp_path / "alone" / pretrained.ADAPTER_FILE)
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
    described = json.loads((tmp_path / "alone" / pretrained.ADAPTER_CONFIG_FILE).read_text())
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
        pretrained.save_adapters(tmp_path, trainable, model.config)
