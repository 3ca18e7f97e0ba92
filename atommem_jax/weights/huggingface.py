"""Published weights ↔ our parameters, tensor by tensor.

`load` puts a Hugging Face directory (safetensors in one or more files) or a GGUF file onto a mesh.
Hugging Face keeps every layer apart and matrices as [out, in]; we stack the layers and keep [in,
out]. A stack is made on the devices and filled layer by layer: each device's part is read from the
file alone, and the host never holds more than one tensor. `save` goes the other way, file by file.

`save_adapters` writes low-rank adapters alone, in the layout of PEFT.

The value head is ours. It lies beside the published tensors in value_head.safetensors, where
nobody else looks, and is zero where there is no such file.
"""

import dataclasses
import functools
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atommem_jax.language.tokenizer import HuggingFaceTokenizer
from atommem_jax.model.transformer import ModelConfig, Transformer, init_params
from atommem_jax.parallel import host_batches
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import rules as rules_lib
from atommem_jax.weights import gguf, hf_config, hf_shards
from atommem_jax.weights.hf_config import PublishedError

VALUE_HEAD_FILE = "value_head.safetensors"
ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

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


# ---------------------------------------------------------------------------------------------
# Names


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One published tensor, or one a layer.

    Attributes:
      path: of our parameter.
      name: that was published, with {} for the number of the layer.
      fields: of config.json that give its dimensions, as published.
    """

    path: str
    name: str
    fields: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    @property
    def transposed(self) -> bool:
        return self.path.endswith("kernel") or self.path == "head"


_HEADS, _KV_HEADS = "num_attention_heads x head_dim", "num_key_value_heads x head_dim"
_WIDTH, _MLP = "hidden_size", "intermediate_size"
_TENSORS = (
    _Tensor("embedder/embedding", "model.embed_tokens.weight", ("vocab_size", _WIDTH)),
    *(
        _Tensor(f"layers/{ours}", f"model.layers.{{}}.{name}.weight", fields)
        for ours, name, fields in (
            ("attention_norm/scale", "input_layernorm", (_WIDTH,)),
            ("query/kernel", "self_attn.q_proj", (_HEADS, _WIDTH)),
            ("key/kernel", "self_attn.k_proj", (_KV_HEADS, _WIDTH)),
            ("value/kernel", "self_attn.v_proj", (_KV_HEADS, _WIDTH)),
            ("query_norm/scale", "self_attn.q_norm", ("head_dim",)),
            ("key_norm/scale", "self_attn.k_norm", ("head_dim",)),
            ("out/kernel", "self_attn.o_proj", (_WIDTH, _HEADS)),
            ("mlp_norm/scale", "post_attention_layernorm", (_WIDTH,)),
            ("gate/kernel", "mlp.gate_proj", (_MLP, _WIDTH)),
            ("up/kernel", "mlp.up_proj", (_MLP, _WIDTH)),
            ("down/kernel", "mlp.down_proj", (_WIDTH, _MLP)),
        )
    ),
    _Tensor("final_norm/scale", "model.norm.weight", (_WIDTH,)),
    _Tensor("head", "lm_head.weight", ("vocab_size", _WIDTH)),
)
_BY_PATH = {tensor.path: tensor for tensor in _TENSORS}
_VALUE_HEAD = {"value_head/kernel": "value_head.weight", "value_head/bias": "value_head.bias"}
_UNUSED = re.compile(r"rotary_emb\.inv_freq$")  # what older versions wrote and nobody reads


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor of a model, layer by layer, without a value head."""
    return {
        name: tuple(reversed(shape)) if tensor.transposed else shape
        for tensor, shape in _our_shapes(config)
        for name in _names(tensor, config)
    }


def _our_shapes(config: ModelConfig) -> Iterator[tuple[_Tensor, tuple[int, ...]]]:
    """Each tensor with the shape of our parameter, without the axis of the layers."""
    shapes = _flatten(_abstract(config))
    for tensor in _TENSORS:
        if tensor.path in shapes:
            yield tensor, shapes[tensor.path].shape[1 if tensor.stacked else 0 :]


def _names(tensor: _Tensor, config: ModelConfig) -> list[str]:
    return [tensor.name.format(i) for i in range(config.num_layers if tensor.stacked else 1)]


def _abstract(config: ModelConfig) -> Any:
    model = Transformer(config)
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


# ---------------------------------------------------------------------------------------------
# Reading


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
    if pathlib.Path(path).suffix == ".gguf":
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
    _check_dtype(dtype)
    mesh = mesh_lib.single() if mesh is None else mesh
    check(weights, config)
    shapes = _abstract(config)
    layouts = _flatten(config.layout.shardings(shapes, mesh, rules))
    value_head = _read_value_head(weights, config)

    def make(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in _VALUE_HEAD:
            host = value_head[name]
            return jax.make_array_from_callback(
                leaf.shape, layouts[name], lambda index: host[index]
            )
        tensor, layout = _BY_PATH[name], layouts[name]
        with jax.transfer_guard("allow"):
            if tensor.stacked:
                return _stack(weights, tensor, leaf.shape, layout, dtype)
            return _cast(layout, dtype)(_read(weights, tensor, tensor.name, leaf.shape, layout))

    return jax.tree_util.tree_map_with_path(make, shapes)


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
    expected = published_shapes(config)
    missing = [name for name in expected if name not in weights.shapes]
    if missing:
        raise PublishedError(
            f"{weights.place}: {missing[0]} {list(expected[missing[0]])} is missing, and "
            f"{len(missing) - 1} more of {len(expected)} tensors; copy all files of the model, "
            f"and check that {hf_config.CONFIG_FILE} is of the same one"
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
    for tensor, _ in _our_shapes(config):
        for name in _names(tensor, config):
            if tuple(weights.shapes[name]) != expected[name]:
                raise PublishedError(
                    f"{weights.place}: {name} is {list(weights.shapes[name])}, and by "
                    f"{hf_config.CONFIG_FILE} it must be {list(expected[name])} "
                    f"([{', '.join(tensor.fields)}]); check that both are of the same model"
                )


def _stack(
    weights: Weights, tensor: _Tensor, shape: tuple[int, ...], layout: NamedSharding, dtype: str
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
    tensor: _Tensor,
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
    path = pathlib.Path(weights.place) / VALUE_HEAD_FILE
    if not path.is_file():
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    found = hf_shards.read_shapes(path)
    for ours, name in _VALUE_HEAD.items():
        expected = tuple(reversed(shapes[ours]))
        if found.get(name) != expected:
            raise PublishedError(
                f"{path}: {name} is {list(found.get(name, ()))}, and must be {list(expected)}; "
                "remove the file for a value head of zeros"
            )
    with safetensors.safe_open(path, "numpy") as file:
        return {o: file.get_tensor(n).astype(np.float32).T for o, n in _VALUE_HEAD.items()}


# ---------------------------------------------------------------------------------------------
# Writing


def save(
    directory: str | os.PathLike[str],
    params: Any,
    config: ModelConfig,
    *,
    tokenizer: HuggingFaceTokenizer | None = None,
    dtype: str = "float32",
    max_file_bytes: int = 1 << 30,
) -> None:
    """Writes a Hugging Face directory that `transformers` and `load` read.

    Every process calls it; the first one writes. The host holds the tensors of one file.

    Args:
      directory: made if needed; files of the same names are replaced.
      params: as `load` returns them.
      config: of the model.
      tokenizer: written too, if given.
      dtype: of what is written, 'float32' or 'bfloat16'; the value head stays float32.
      max_file_bytes: size of a file, except where one tensor is larger.

    Raises PublishedError for a model that no published architecture computes, and ValueError for
    parameters that are not of this config.
    """
    _check_dtype(dtype)
    fields = hf_config.format_config(config, dtype=dtype)
    leaves, shapes = _flatten(params), _flatten(_abstract(config))
    if {n: x.shape for n, x in leaves.items()} != {n: x.shape for n, x in shapes.items()}:
        wrong = [n for n in leaves | shapes if _shape(leaves, n) != _shape(shapes, n)]
        raise ValueError(
            f"parameter {wrong[0]} is {_shape(leaves, wrong[0])}, and by the model's config it "
            f"must be {_shape(shapes, wrong[0])}; pass the config that the model was made with"
        )
    folder = pathlib.Path(directory)
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        hf_shards.remove(folder)
    files = hf_shards.plan_files(published_shapes(config), _DTYPES[dtype].itemsize, max_file_bytes)
    wanted = {
        name: (tensor, i)
        for tensor, _ in _our_shapes(config)
        for i, name in enumerate(_names(tensor, config))
    }
    for file, names in files.items():
        held = {}
        for name in names:
            tensor, i = wanted[name]
            host = _fetch(leaves[tensor.path], i if tensor.stacked else None)
            host = host.T if tensor.transposed else host
            if writes:
                held[name] = np.ascontiguousarray(host.astype(_DTYPES[dtype]))
        if writes:
            safetensors.numpy.save_file(held, folder / file, metadata={"format": "pt"})
    head = {n: np.ascontiguousarray(_fetch(leaves[o]).T) for o, n in _VALUE_HEAD.items()}
    if writes:
        safetensors.numpy.save_file(head, folder / VALUE_HEAD_FILE)
        if len(files) > 1:
            hf_shards.write_index(folder, files, published_shapes(config), _DTYPES[dtype].itemsize)
        if tokenizer is not None:
            hf_config.write_tokenizer(folder, tokenizer)
            fields |= {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        hf_shards.write_json(folder / hf_config.CONFIG_FILE, fields)
        for file in [*files, VALUE_HEAD_FILE]:  # safetensors lets nobody else read what it writes
            shutil.copymode(folder / hf_config.CONFIG_FILE, folder / file)


def save_adapters(
    directory: str | os.PathLike[str],
    params: Any,
    config: ModelConfig,
    *,
    base: str = "",
    dtype: str = "float32",
) -> None:
    """Writes low-rank adapters as PEFT reads them, and the value head beside them.

    Every process calls it; the first one writes.

    Args:
      directory: made if needed; files of the same names are replaced.
      params: the trainable ones, see `lora.partition`.
      config: of the model, with its `lora`.
      base: name or path of the published model, for whoever reads.
      dtype: of what is written, 'float32' or 'bfloat16'; the value head stays float32.

    Raises PublishedError for adapters that PEFT does not apply as we do.
    """
    _check_dtype(dtype)
    hf_config.format_config(config, dtype=dtype)  # refuses what is not published
    leaves, lora = _flatten(params), config.lora
    paths = [path for path in config.matrices if lora.adapts(path)]
    if config.tie_embeddings and "embedder" in paths:
        raise PublishedError(
            "lora.targets: the adapter of embedder reads out too, as model.tie_embeddings=True "
            "says, and PEFT's would only embed; export the merged model, or train without it"
        )
    held: dict[str, np.ndarray] = {}
    for path in paths:
        ours = {"embedder": "embedder/embedding", "head": "head"}.get(path, f"{path}/kernel")
        tensor = _BY_PATH[ours]
        for i in range(config.num_layers if tensor.stacked else 1):
            name = tensor.name.format(i).removesuffix(".weight")
            for part in ("a", "b"):
                host = _fetch(leaves[f"{path}_lora/{part}"], i if tensor.stacked else None)
                kind = (
                    f"lora_embedding_{part.upper()}"
                    if path == "embedder"
                    else (f"lora_{part.upper()}.weight")
                )
                held[f"base_model.model.{name}.{kind}"] = host.T
    head = {n: np.ascontiguousarray(_fetch(leaves[o]).T) for o, n in _VALUE_HEAD.items()}
    if jax.process_index() != 0:
        return
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: np.ascontiguousarray(x.astype(_DTYPES[dtype])) for name, x in held.items()}
    safetensors.numpy.save_file(held, folder / ADAPTER_FILE, metadata={"format": "pt"})
    safetensors.numpy.save_file(head, folder / VALUE_HEAD_FILE)
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in held})
    fields = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base},
        **{"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none"},
        **{"target_modules": targets, "fan_in_fan_out": False, "inference_mode": True},
    }
    hf_shards.write_json(folder / ADAPTER_CONFIG_FILE, fields)
    for file in (ADAPTER_FILE, VALUE_HEAD_FILE):  # safetensors lets nobody else read what it writes
        shutil.copymode(folder / ADAPTER_CONFIG_FILE, folder / file)


def _shape(leaves: Mapping[str, Any], name: str) -> list[int] | str:
    return list(leaves[name].shape) if name in leaves else "absent"


def _fetch(leaf: Any, layer: int | None = None) -> np.ndarray:
    """A parameter, or one layer of it, on the host; a collective with several processes."""
    if isinstance(leaf, jax.Array):
        with jax.transfer_guard("allow"):
            leaf = leaf if layer is None else _take_layer(leaf, np.int32(layer))
            if not leaf.is_fully_addressable:
                leaf = host_batches.replicate(leaf, leaf.sharding.mesh)
            return np.asarray(leaf)
    return np.asarray(leaf if layer is None else leaf[layer])


@jax.jit
def _take_layer(stack: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, i, 0, keepdims=False)


def _check_dtype(dtype: str) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(_DTYPES)}")
