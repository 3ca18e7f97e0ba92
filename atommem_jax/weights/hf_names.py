"""Which published tensor is which of our parameters.

Hugging Face keeps every layer apart and matrices as [out, in]; we stack the layers and keep [in,
out]. The value head is ours. It lies beside the published tensors in value_head.safetensors, where
nobody else looks.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import Transformer, init_params

VALUE_HEAD_FILE = "value_head.safetensors"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Tensor:
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
        """Whether there is one for each layer."""
        return "{}" in self.name

    @property
    def transposed(self) -> bool:
        """Whether ours is [in, out] where the published one is [out, in]."""
        return self.path.endswith("kernel") or self.path == "head"


_HEADS, _KV_HEADS = "num_attention_heads x head_dim", "num_key_value_heads x head_dim"
_WIDTH, _MLP = "hidden_size", "intermediate_size"
TENSORS = (
    Tensor("embedder/embedding", "model.embed_tokens.weight", ("vocab_size", _WIDTH)),
    *(
        Tensor(f"layers/{ours}", f"model.layers.{{}}.{name}", fields)
        for ours, name, fields in (
            ("attention_norm/scale", "input_layernorm.weight", (_WIDTH,)),
            ("query/kernel", "self_attn.q_proj.weight", (_HEADS, _WIDTH)),
            ("query/bias", "self_attn.q_proj.bias", (_HEADS,)),
            ("key/kernel", "self_attn.k_proj.weight", (_KV_HEADS, _WIDTH)),
            ("key/bias", "self_attn.k_proj.bias", (_KV_HEADS,)),
            ("value/kernel", "self_attn.v_proj.weight", (_KV_HEADS, _WIDTH)),
            ("value/bias", "self_attn.v_proj.bias", (_KV_HEADS,)),
            ("query_norm/scale", "self_attn.q_norm.weight", ("head_dim",)),
            ("key_norm/scale", "self_attn.k_norm.weight", ("head_dim",)),
            ("out/kernel", "self_attn.o_proj.weight", (_WIDTH, _HEADS)),
            ("mlp_norm/scale", "post_attention_layernorm.weight", (_WIDTH,)),
            ("gate/kernel", "mlp.gate_proj.weight", (_MLP, _WIDTH)),
            ("up/kernel", "mlp.up_proj.weight", (_MLP, _WIDTH)),
            ("down/kernel", "mlp.down_proj.weight", (_WIDTH, _MLP)),
        )
    ),
    Tensor("final_norm/scale", "model.norm.weight", (_WIDTH,)),
    Tensor("head", "lm_head.weight", ("vocab_size", _WIDTH)),
)
"""In the order in which they are written."""
BY_PATH = {tensor.path: tensor for tensor in TENSORS}
"""Path of our parameter -> its tensor."""
VALUE_HEAD = {"value_head/kernel": "value_head.weight", "value_head/bias": "value_head.bias"}
"""Path of our parameter -> name in the file of the value head."""


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor of a model, layer by layer, without a value head."""
    return {
        name: tuple(reversed(shape)) if tensor.transposed else shape
        for tensor, shape in our_shapes(config)
        for name in list_names(tensor, config)
    }


def our_shapes(config: ModelConfig) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Each tensor with the shape of our parameter, without the axis of the layers."""
    shapes = traverse_util.flatten_dict(make_shapes(config), sep="/")
    for tensor in TENSORS:
        if tensor.path in shapes:
            yield tensor, shapes[tensor.path].shape[1 if tensor.stacked else 0 :]


def list_names(tensor: Tensor, config: ModelConfig) -> list[str]:
    """Its published name, or that of each layer."""
    return [tensor.name.format(i) for i in range(config.num_layers if tensor.stacked else 1)]


@functools.lru_cache(maxsize=8)
def make_shapes(config: ModelConfig) -> Any:
    """Our parameters as `jax.ShapeDtypeStruct`."""
    model = Transformer(config)
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def check_dtype(dtype: str) -> None:
    """Raises ValueError for a dtype that weights are not kept in."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
