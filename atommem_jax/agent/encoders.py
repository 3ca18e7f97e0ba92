"""Text encoders for memory, read from where `memory.encoder` says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from atommem_jax.config import ConfigError, check, parse, paths
from atommem_jax.language import tokenizer as tokenizer_lib
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.memory import encoder as encoder_lib
from atommem_jax.memory.encoder import EncoderEmbedding
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import Transformer, init_params
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.weights import gguf, gguf_file, hf_config, hf_tokenizer, huggingface
from atommem_jax.weights.checkpoint import Checkpointer, CheckpointError


def read_embedding(path: str, policy: Tokenizer, dim: int, dtype: str) -> EncoderEmbedding:
    """The encoder at `path` as the keys of a memory whose texts are in tokens of the policy.

    Args:
      path: a Hugging Face directory, a .gguf file, or a checkpoint of `convert.py`.
      policy: tokenizer of the policy.
      dim: `memory.key_dim`.
      dtype: that the encoder is kept in and computes in, 'float32' or 'bfloat16'.

    Raises ConfigError where no encoder can be read there, or its vectors are too narrow.
    """
    model, params, tokenizer = read(path, dtype)
    width = model.config.width
    check(
        dim <= width,
        f"memory.key_dim={dim}: at most {width} with memory.encoder={path}, whose vectors are as "
        "wide",
    )
    before = tokenizer.encode(encoder_lib.instruct(encoder_lib.TASK, ""))
    return EncoderEmbedding(
        model=model,
        dim=dim,
        end_id=tokenizer.pad_id,
        params=params,
        pieces=jnp.asarray(encoder_lib.translate(policy, tokenizer)),
        instruction=jnp.asarray(before, jnp.int32),
    )


@functools.lru_cache(maxsize=2)
def read(path: str, dtype: str) -> tuple[Transformer, dict, Tokenizer]:
    """Model, parameters on the first device, and tokenizer of an encoder.

    Raises ConfigError as `read_embedding`.
    """
    mesh = mesh_lib.make_mesh(1, devices=jax.local_devices()[:1])  # every process reads it
    try:
        if (paths.locate(path) / hf_config.CONFIG_FILE).is_file() or gguf_file.is_gguf(path):
            config, params, tokenizer = _read_published(path, mesh)
        else:
            config, params, tokenizer = _read_checkpoint(path, mesh)
    except (hf_config.PublishedError, CheckpointError, ValueError) as error:
        raise ConfigError(f"memory.encoder={path}: {error}") from error
    config = dataclasses.replace(config, attention="plain", remat=False, dtype=dtype)
    return Transformer(config), jax.tree.map(lambda x: x.astype(dtype), params), tokenizer


def _read_published(path: str, mesh: Mesh) -> tuple[ModelConfig, dict, Tokenizer]:
    local = str(paths.locate(path))
    config, params = huggingface.load(local, mesh)
    if gguf_file.is_gguf(local):
        return config, params, gguf.open_model(local).read_tokenizer(config.vocab_size)
    return config, params, hf_tokenizer.read_tokenizer(local, config.vocab_size)


def _read_checkpoint(path: str, mesh: Mesh) -> tuple[ModelConfig, dict, Tokenizer]:
    """The last step of a run."""
    folder = paths.locate(path)
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    with Checkpointer(folder, best_metric="em", read_only=True) as checkpointer:
        step = checkpointer.latest_step()
        run = parse(checkpointer.restore_config(step))
        tokenizer = tokenizer_lib.from_bytes(checkpointer.restore_tokenizer(step))
        check(
            not run.lora.rank and not run.model.token_shift and not run.model.match_features,
            "it holds adapters, or a model that was trained from scratch with model.token_shift or "
            "model.match_features; pass what convert.py made of a text encoder",
        )
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, **run.model.sizes()
        )
        shapes = jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))
        abstract = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            config.layout.shardings(shapes, mesh),
        )
        state = {"train": {"params": abstract}}
        restored = checkpointer.restore(step, abstract_state=state, partial=True)
    return config, restored.state["train"]["params"], tokenizer
