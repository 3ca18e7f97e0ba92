"""Writes our parameters as others read them.

`save` writes a Hugging Face directory, file by file; `save_adapters` writes low-rank adapters
alone, in the layout of PEFT. Both write our value head in a file of its own.
"""

import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from atommem_jax.language.tokenizer import HuggingFaceTokenizer
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.parallel import host_batches
from atommem_jax.weights import hf_config, hf_names, hf_shards, hf_tokenizer
from atommem_jax.weights.hf_config import PublishedError

ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def save(
    directory: str | os.PathLike[str],
    params: Any,
    config: ModelConfig,
    *,
    tokenizer: HuggingFaceTokenizer | None = None,
    dtype: str = "float32",
    max_file_bytes: int = 1 << 30,
    rest: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes a Hugging Face directory that `transformers` and `load` read.

    Every process calls it; the first one writes. The host holds the tensors of one file. What was
    published with the model, and is not ours, is written as it was.

    Args:
      directory: made if needed; files of the same names are replaced.
      params: as `load` returns them.
      config: of the model.
      tokenizer: written too, if given.
      dtype: of what is written, 'float32' or 'bfloat16'; the value head stays float32.
      max_file_bytes: size of a file, except where one tensor is larger.
      rest: see `hf_config.list_rest`; by default what the tokenizer brings along.

    Raises PublishedError for a model that no published architecture computes, and ValueError for
    parameters that are not of this config.
    """
    hf_names.check_dtype(dtype)
    fields = hf_config.format_config(config, dtype=dtype)
    leaves = traverse_util.flatten_dict(params, sep="/")
    _check_shapes(leaves, config)
    folder = pathlib.Path(directory)
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        hf_shards.remove(folder)
    stored = hf_names.DTYPES[dtype]
    plan = hf_shards.plan(hf_names.published_shapes(config), stored.itemsize, max_file_bytes)
    wanted = {
        name: (tensor, i)
        for tensor, _ in hf_names.our_shapes(config)
        for i, name in enumerate(hf_names.list_names(tensor, config))
    }
    for file, names in plan.filename_to_tensors.items():
        held = {}
        for name in names:
            tensor, i = wanted[name]
            host = _fetch(leaves[tensor.path], i if tensor.stacked else None)
            host = host.T if tensor.transposed else host
            if writes:
                held[name] = np.ascontiguousarray(host.astype(stored))
        if writes:
            safetensors.numpy.save_file(held, folder / file, metadata={"format": "pt"})
    head = {n: np.ascontiguousarray(_fetch(leaves[o]).T) for o, n in hf_names.VALUE_HEAD.items()}
    if writes:
        safetensors.numpy.save_file(head, folder / hf_names.VALUE_HEAD_FILE)
        if plan.is_sharded:
            hf_shards.write_index(folder, plan)
        if tokenizer is not None:
            hf_tokenizer.write_tokenizer(folder, tokenizer)
            fields |= {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
            rest = tokenizer.published if rest is None else rest
        rest = rest or {}
        hf_shards.write_json(
            folder / hf_config.CONFIG_FILE, {**fields, **rest.get(hf_config.CONFIG_FILE, {})}
        )
        (folder / hf_config.GENERATION_FILE).unlink(missing_ok=True)
        if hf_config.GENERATION_FILE in rest:
            hf_shards.write_json(
                folder / hf_config.GENERATION_FILE, rest[hf_config.GENERATION_FILE]
            )
        written = [*plan.filename_to_tensors, hf_names.VALUE_HEAD_FILE]
        _permit_reading(folder, written, like=hf_config.CONFIG_FILE)


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
    hf_names.check_dtype(dtype)
    hf_config.format_config(config, dtype=dtype)  # refuses what is not published
    leaves, lora = traverse_util.flatten_dict(params, sep="/"), config.lora
    paths = [path for path in config.matrices if lora.adapts(path)]
    if config.tie_embeddings and "embedder" in paths:
        raise PublishedError(
            "lora.targets: the adapter of embedder reads out too, as model.tie_embeddings=True "
            "says, and PEFT's would only embed; export the merged model, or train without it"
        )
    held: dict[str, np.ndarray] = {}
    for path in paths:
        ours = {"embedder": "embedder/embedding", "head": "head"}.get(path, f"{path}/kernel")
        tensor = hf_names.BY_PATH[ours]
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
    head = {n: np.ascontiguousarray(_fetch(leaves[o]).T) for o, n in hf_names.VALUE_HEAD.items()}
    if jax.process_index() != 0:
        return
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    held = {
        name: np.ascontiguousarray(x.astype(hf_names.DTYPES[dtype])) for name, x in held.items()
    }
    safetensors.numpy.save_file(held, folder / ADAPTER_FILE, metadata={"format": "pt"})
    safetensors.numpy.save_file(head, folder / hf_names.VALUE_HEAD_FILE)
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in held})
    fields = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base},
        **{"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none"},
        **{"target_modules": targets, "fan_in_fan_out": False, "inference_mode": True},
    }
    hf_shards.write_json(folder / ADAPTER_CONFIG_FILE, fields)
    _permit_reading(folder, [ADAPTER_FILE, hf_names.VALUE_HEAD_FILE], like=ADAPTER_CONFIG_FILE)


def _check_shapes(leaves: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises ValueError for parameters that are not of this config."""
    shapes = traverse_util.flatten_dict(hf_names.make_shapes(config), sep="/")
    if {n: x.shape for n, x in leaves.items()} != {n: x.shape for n, x in shapes.items()}:
        wrong = [n for n in leaves | shapes if _shape(leaves, n) != _shape(shapes, n)]
        raise ValueError(
            f"parameter {wrong[0]} is {_shape(leaves, wrong[0])}, and by the model's config it "
            f"must be {_shape(shapes, wrong[0])}; pass the config that the model was made with"
        )


def _permit_reading(folder: pathlib.Path, files: Sequence[str], *, like: str) -> None:
    """Gives files the mode of another: safetensors lets nobody else read what it writes."""
    for file in files:
        shutil.copymode(folder / like, folder / file)


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
