"""Reads published weights, tensor by tensor, as our parameters.

`load` puts a Hugging Face directory (safetensors in one or more files) or a GGUF file onto a mesh.
A stack of layers is made on the devices and filled layer by layer: each device's part is read from
the file alone, and the host never holds more than one tensor. The value head is zero where there is
no file of it. `hf_export` goes the other way.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atommem_jax.model.model_config import ModelConfig
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import rules as rules_lib
from atommem_jax.weights import gguf, gguf_file, hf_config, hf_names, hf_shards
from atommem_jax.weights.hf_config import PublishedError

_UNUSED = re.compile(r"rotary_emb\.inv_freq$")  # what older versions wrote and nobody reads

Index = tuple[slice, ...]


class Weights(Protocol):
    """Tensors under their published names and in their published orientation.

    Attributes:
      place: the directory or file, for errors.
      shapes: name -> shape.
    """

    place: str

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor, float32, float16 or bfloat16; one slice for each dimension."""
        ...


class _Renamed:
    """Weights of a bare trunk, which were published without the prefix 'model.'."""

    def __init__(self, weights: Weights):
        self._weights, self.place = weights, weights.place
        self.shapes = {f"model.{name}": shape for name, shape in weights.shapes.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """See `Weights.read`."""
        return self._weights.read(name.removeprefix("model."), index)


def open_weights(path: str | os.PathLike[str]) -> tuple[ModelConfig, Weights]:
    """Config and weights of a Hugging Face directory or of a .gguf file; reads headers only.

    Raises PublishedError for what cannot be read.
    """
    if gguf_file.is_gguf(path):
        file = gguf.open_model(path)
        return hf_config.parse_config(file.config_fields, where=str(path)), file
    config = hf_config.read_config(path)
    weights: Weights = hf_shards.Directory(path)
    if "embed_tokens.weight" in weights.shapes:
        weights = _Renamed(weights)
        # The larger Qwen3-Embedding say that their head is their own, and have none.
        config = dataclasses.replace(config, tie_embeddings=True)
    return config, weights


def load(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    *,
    rules: Mapping[str, Any] = rules_lib.TRAINING,
    dtype: str = "float32",
) -> tuple[ModelConfig, Any]:
    """Model config and parameters of a Hugging Face directory or of a .gguf file.

    Every process calls it, and reads what its own devices hold.

    Args:
      path: directory with config.json and safetensors, or the file.
      mesh: where the parameters go; the first device by default.
      rules: how they lie there, see `rules.Layout`.
      dtype: of the parameters, 'float32' or 'bfloat16'.

    Raises PublishedError for what cannot be read, naming the field or the tensor, and ValueError
    for a mesh that the model does not divide over.
    """
    config, weights = open_weights(path)
    return config, place(weights, config, mesh, rules=rules, dtype=dtype)


def place(
    weights: Weights,
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    rules: Mapping[str, Any] = rules_lib.TRAINING,
    dtype: str = "float32",
) -> Any:
    """The parameters of a model, read tensor by tensor onto the mesh; see `load`."""
    hf_names.check_dtype(dtype)
    mesh = mesh_lib.single() if mesh is None else mesh
    check(weights, config)
    shapes = hf_names.make_shapes(config)
    layouts = traverse_util.flatten_dict(config.layout.shardings(shapes, mesh, rules), sep="/")
    value_head = _read_value_head(weights, config)

    def make(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if name in hf_names.VALUE_HEAD:
            host = value_head[name]
            return jax.make_array_from_callback(
                leaf.shape, layouts[name], lambda index: host[index]
            )
        tensor, layout = hf_names.BY_PATH[name], layouts[name]
        with jax.transfer_guard("allow"):
            if tensor.stacked:
                return _stack(weights, tensor, leaf.shape, layout, dtype)
            return _cast(layout, dtype)(_read(weights, tensor, tensor.name, leaf.shape, layout))

    leaves = traverse_util.flatten_dict(shapes, sep="/")
    params = {name: make(name, leaf) for name, leaf in leaves.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def widen(params: Any, config: ModelConfig, vocab_size: int) -> tuple[ModelConfig, Any]:
    """Room for more tokens: new rows of embedding and head are the mean of those there are.

    Raises ValueError for fewer tokens than the model has.
    """
    if vocab_size < config.vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: must be at least the model's own {config.vocab_size}"
        )

    def grow(leaf: jax.Array, axis: int) -> jax.Array:
        shape = list(leaf.shape)
        shape[axis] = vocab_size - config.vocab_size
        mean = leaf.astype(jnp.float32).mean(axis, keepdims=True).astype(leaf.dtype)
        grown = jnp.concatenate([leaf, jnp.broadcast_to(mean, shape)], axis)
        return jax.device_put(grown, leaf.sharding)

    params = {**params, "embedder": {"embedding": grow(params["embedder"]["embedding"], 0)}}
    if "head" in params:
        params["head"] = grow(params["head"], 1)
    return dataclasses.replace(config, vocab_size=vocab_size), params


def check(weights: Weights, config: ModelConfig) -> None:
    """Raises PublishedError for a tensor that is missing, not expected, or of the wrong shape."""
    if config.num_layers > len(weights.shapes):
        raise PublishedError(
            f"{weights.place}: {config.num_layers} layers by {hf_config.CONFIG_FILE}, and only "
            f"{len(weights.shapes)} tensors are there; copy all files of the model"
        )
    expected = hf_names.published_shapes(config)
    missing = [name for name in expected if name not in weights.shapes]
    if missing:
        in_one_file = isinstance(weights, gguf.Model)
        name = gguf.spell(missing[0]) if in_one_file else missing[0]
        copy = (
            "copy the file again, or take another of the whole model"
            if in_one_file
            else f"copy all files of the model, and check that {hf_config.CONFIG_FILE} is of the "
            "same one"
        )
        raise PublishedError(
            f"{weights.place}: {name} {list(expected[missing[0]])} is missing, and "
            f"{len(missing) - 1} more of {len(expected)} tensors; {copy}"
        )
    unknown = [n for n in weights.shapes if n not in expected and not _UNUSED.search(n)]
    if config.tie_embeddings:  # some were published with a copy of the embeddings as head
        unknown = [name for name in unknown if not name.endswith("lm_head.weight")]
    if unknown:
        raise PublishedError(
            f"{weights.place}: found {unknown[0]} {list(weights.shapes[unknown[0]])}, and "
            f"{len(unknown) - 1} more, which a model of {hf_config.CONFIG_FILE} does not have; "
            "check that both are of the same model"
        )
    for tensor, _ in hf_names.our_shapes(config):
        for name in hf_names.list_names(tensor, config):
            if tuple(weights.shapes[name]) != expected[name]:
                raise PublishedError(
                    f"{weights.place}: {name} is {list(weights.shapes[name])}, and by "
                    f"{hf_config.CONFIG_FILE} it must be {list(expected[name])} "
                    f"([{', '.join(tensor.fields)}]); check that both are of the same model"
                )


def _stack(
    weights: Weights,
    tensor: hf_names.Tensor,
    shape: tuple[int, ...],
    layout: NamedSharding,
    dtype: str,
) -> jax.Array:
    """All layers of a tensor. They are written one by one into a stack on the devices."""
    one = NamedSharding(layout.mesh, PartitionSpec(*layout.spec[1:]))
    stack = _zeros(shape, layout, dtype)()
    write = _writer(layout)
    for i in range(shape[0]):
        layer = _read(weights, tensor, tensor.name.format(i), shape[1:], one)
        # Waits: otherwise the host would read on, and hold what has not been written yet.
        stack = jax.block_until_ready(write(stack, layer, np.int32(i)))
    return stack


def _read(
    weights: Weights,
    tensor: hf_names.Tensor,
    name: str,
    shape: tuple[int, ...],
    layout: NamedSharding,
) -> jax.Array:
    """One tensor in our orientation and the published dtype, each device's part read alone."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # replicas are read once

    def read(index: Any) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in parts:
            ordered = tuple(reversed(bounds)) if tensor.transposed else bounds
            found = weights.read(name, tuple(slice(*pair) for pair in ordered))
            if found.dtype == np.float64:
                found = found.astype(np.float32)
            parts[bounds] = found.T if tensor.transposed else found
        return parts[bounds]

    return jax.make_array_from_callback(shape, layout, read)


@functools.cache
def _zeros(shape: tuple[int, ...], layout: NamedSharding, dtype: str) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=layout)


@functools.cache
def _writer(layout: NamedSharding) -> Callable[..., jax.Array]:
    def write(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), i, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=layout)


@functools.cache
def _cast(layout: NamedSharding, dtype: str) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.astype(dtype), out_shardings=layout)


def _read_value_head(weights: Weights, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our path -> float32 array; zeros where there is no file."""
    shapes = {"value_head/kernel": (config.width, 1), "value_head/bias": (1,)}
    path = pathlib.Path(weights.place) / hf_names.VALUE_HEAD_FILE
    if not path.is_file():
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    found = hf_shards.read_shapes(path)
    for ours, name in hf_names.VALUE_HEAD.items():
        expected = tuple(reversed(shapes[ours]))
        if found.get(name) != expected:
            raise PublishedError(
                f"{path}: {name} is {list(found.get(name, ()))}, and must be {list(expected)}; "
                "remove the file for a value head of zeros"
            )
    with safetensors.safe_open(path, "numpy") as file:
        return {o: file.get_tensor(n).astype(np.float32).T for o, n in hf_names.VALUE_HEAD.items()}
