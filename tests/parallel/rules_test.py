"""Where the rules put parameters and moments, and what they refuse."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from atommem_jax.config import OptimizerConfig
from atommem_jax.learning import optimizer as optimizer_lib
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import Transformer, init_params
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import rules as rules_lib


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


def test_biases_lie_with_the_outputs_of_their_matrices():
    sizes = {"num_heads": 8, "num_kv_heads": 4, "num_layers": 2, "qkv_bias": True}
    layers = specs_of((1, 2, 4), **sizes)["layers"]
    for name in ("query", "key", "value"):
        assert layers[name]["bias"] == PartitionSpec(None, "tensor")
    layers = specs_of((1, 1, 4), **{**sizes, "num_kv_heads": 2})["layers"]
    assert layers["query"]["bias"] == PartitionSpec(None, "tensor")
    assert layers["key"]["bias"] == PartitionSpec(None, None), "fewer heads than devices"


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
