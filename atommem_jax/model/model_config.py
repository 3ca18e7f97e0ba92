"""Sizes and switches of the transformer, and what must agree among them."""

import dataclasses
from collections.abc import Callable

import jax

from atommem_jax.config import LAYERS, ROPE_TYPES, LoraConfig
from atommem_jax.model import attention
from atommem_jax.parallel import rules

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": None,  # keep the input of each layer and recompute the rest
    "attention": jax.checkpoint_policies.save_only_these_names(attention.SAVED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass of a rematerialised layer finds ready."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a `Transformer`; `validate` says what must agree."""

    vocab_size: int
    width: int = 64
    num_layers: int = 3
    num_heads: int = 2
    num_kv_heads: int = 2
    head_width: int = 32
    mlp_width: int = 192
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0  # share of a head that is rotated
    rope_factor: float = 1.0  # the stretch to longer texts, see `rotary_frequencies`; 1: none
    rope_type: str = "llama3"  # how it is stretched, one of config.ROPE_TYPES
    rope_low_frequency_factor: float = 1.0  # of llama3
    rope_high_frequency_factor: float = 4.0
    rope_beta_slow: float = 1.0  # of yarn
    rope_beta_fast: float = 32.0
    rope_truncate: bool = True
    rope_attention_factor: float = 0.0  # 0: what yarn derives from rope_factor
    rope_original_length: int = 8192  # positions that it was trained for before the stretch
    qk_norm: bool = False
    qkv_bias: bool = False  # query, key and value have a bias: Qwen2
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-6
    token_shift: int = 0  # how many previous tokens' embeddings are mixed in
    num_features: int = 0  # flags per token
    pad_id: int = 0
    remat: bool = False  # recompute layers in the backward pass
    remat_policy: str = "full"  # a key of REMAT_POLICIES
    attention: str = "auto"  # one of attention.IMPLEMENTATIONS, for whole rows
    dtype: str = "float32"  # of activations; parameters, norms, softmax and logits are float32
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)  # adapters; none by default

    def validate(self) -> None:
        """Raises ValueError, naming the fields that disagree."""
        for name in (
            "vocab_size",
            "width",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_width",
            "mlp_width",
            "rope_original_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}; change one of the two"
            )
        if not 0.0 <= self.rope_fraction <= 1.0:
            raise ValueError(f"model.rope_fraction={self.rope_fraction}: allowed is 0.0 to 1.0")
        if self.rope_width % 2:
            raise ValueError(
                f"model.rope_fraction={self.rope_fraction} of model.head_width={self.head_width} "
                f"gives {self.rope_width} rotated channels; choose them so that it is even"
            )
        if self.rope_factor < 1.0:
            raise ValueError(
                f"model.rope_factor={self.rope_factor}: must be at least 1.0, which stretches "
                "nothing"
            )
        for low, high in (
            ("rope_low_frequency_factor", "rope_high_frequency_factor"),
            ("rope_beta_slow", "rope_beta_fast"),
        ):
            if not 0.0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"model.{low}={getattr(self, low)} must lie between 0 and "
                    f"model.{high}={getattr(self, high)}; change one of the two"
                )
        if self.rope_attention_factor < 0.0:
            raise ValueError(
                f"model.rope_attention_factor={self.rope_attention_factor}: must be above 0.0, or "
                "0.0 for what follows from model.rope_factor"
            )
        if self.rope_type == "yarn" and self.rope_factor > 1.0 and self.rope_theta <= 1.0:
            raise ValueError(
                f"model.rope_theta={self.rope_theta}: must be above 1.0 with "
                "model.rope_type='yarn', which counts channels by it"
            )
        for name, allowed in (
            ("rope_type", ROPE_TYPES),
            ("remat_policy", tuple(REMAT_POLICIES)),
            ("attention", attention.IMPLEMENTATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"model.{name}={getattr(self, name)!r}: allowed are {', '.join(allowed)}"
                )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype={self.dtype!r}: allowed are 'float32' and 'bfloat16'")
        self.lora.check_matrices(tuple(self.matrices), self.dtype)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Path -> (in, out) of the matrices that can be adapted; of one layer, where stacked."""
        heads, kv_heads = self.num_heads * self.head_width, self.num_kv_heads * self.head_width
        inputs = dict.fromkeys(LAYERS, self.width) | {"out": heads, "down": self.mlp_width}
        outputs = {
            **{"query": heads, "key": kv_heads, "value": kv_heads, "out": self.width},
            **{"gate": self.mlp_width, "up": self.mlp_width, "down": self.width},
        }
        shapes = {f"layers/{name}": (inputs[name], outputs[name]) for name in LAYERS}
        shapes["embedder"] = (self.vocab_size, self.width)
        if not self.tie_embeddings:
            shapes["head"] = (self.width, self.vocab_size)
        return shapes

    @property
    def rope_width(self) -> int:
        return int(self.head_width * self.rope_fraction)

    @property
    def layout(self) -> rules.Layout:
        """Where the parameters lie on a mesh."""
        return rules.Layout(self.num_heads, self.num_kv_heads)
