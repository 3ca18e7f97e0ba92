"""The decoder of `atommem_jax.model.transformer` in plain PyTorch, on the same parameters.

Written as a PyTorch user would: `nn.Linear`, `F.rms_norm`, `F.scaled_dot_product_attention`, a
preallocated KV cache. float32 only. Rows are left-padded, as in the original.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from atommem_jax.language import prompt as prompting
from atommem_jax.model.model_config import ModelConfig


class Attention(nn.Module):
    """Grouped-query attention with rotary positions on part of each head."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.query = nn.Linear(c.width, c.num_heads * c.head_width, bias=c.qkv_bias)
        self.key = nn.Linear(c.width, c.num_kv_heads * c.head_width, bias=c.qkv_bias)
        self.value = nn.Linear(c.width, c.num_kv_heads * c.head_width, bias=c.qkv_bias)
        self.out = nn.Linear(c.num_heads * c.head_width, c.width, bias=False)
        if c.qk_norm:
            self.query_norm = nn.RMSNorm(c.head_width, c.norm_epsilon)
            self.key_norm = nn.RMSNorm(c.head_width, c.norm_epsilon)

    def forward(self, x, rotary, mask, cache=None, index=0):
        """x [B, T, width] -> [B, T, width]; with a cache, slots index.. are written and read."""
        c, (batch, length, _) = self.config, x.shape

        def heads(y, count):
            return y.view(batch, length, count, c.head_width).transpose(1, 2)

        q, k = heads(self.query(x), c.num_heads), heads(self.key(x), c.num_kv_heads)
        v = heads(self.value(x), c.num_kv_heads)
        if c.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, *rotary, c.rope_width), rotate(k, *rotary, c.rope_width)
        if cache is not None:
            keys, values = cache
            keys[:, :, index : index + length] = k
            values[:, :, index : index + length] = v
            k, v = keys[:, :, : index + length], values[:, :, : index + length]
        grouped = c.num_heads != c.num_kv_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(c.width, c.norm_epsilon)
        self.attention = Attention(c)
        self.mlp_norm = nn.RMSNorm(c.width, c.norm_epsilon)
        self.gate = nn.Linear(c.width, c.mlp_width, bias=False)
        self.up = nn.Linear(c.width, c.mlp_width, bias=False)
        self.down = nn.Linear(c.mlp_width, c.width, bias=False)

    def forward(self, x, rotary, mask, cache=None, index=0):
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache, index)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class TorchTransformer(nn.Module):
    """tokens -> hidden states, logits and values."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        if c.dtype != "float32":
            raise ValueError(
                f"model.dtype={c.dtype!r}: the PyTorch peer computes in 'float32' only"
            )
        if c.rope_factor != 1.0:
            raise ValueError(f"model.rope_factor={c.rope_factor}: the PyTorch peer has 1.0 only")
        self.config = c
        self.embedder = nn.Embedding(c.vocab_size, c.width)
        if c.token_shift:
            self.shift = nn.Parameter(torch.zeros(c.token_shift, c.width))
        if c.num_features:
            self.features = nn.Linear(c.num_features, c.width, bias=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.final_norm = nn.RMSNorm(c.width, c.norm_epsilon)
        if not c.tie_embeddings:
            self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        self.value_head = nn.Linear(c.width, 1)

    def forward(self, tokens, start, features=None, caches=None, index=0, recent=None):
        """Hidden states [B, T, width] of tokens [B, T] at slots index.. of rows begun at `start`.

        features: float [B, T, F]; recent: the token_shift tokens before these (pad without).
        """
        c, length = self.config, tokens.shape[1]
        x = self._embed(tokens, recent)
        if c.num_features:
            x = x + self.features(features)
        slots = torch.arange(index, index + length)
        rotary = angles((slots[None] - start[:, None]).clamp(min=0), c)
        keys = torch.arange(index + length)
        mask = (keys >= start[:, None])[:, None, None]
        if length > 1:
            # A padding slot attends to itself: a row without anything to attend to would be NaN.
            own = keys[None] == slots[:, None]
            mask = (mask & (keys[None] <= slots[:, None])) | own
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, None if caches is None else caches[i], index)
        return self.final_norm(x)

    def _embed(self, tokens, recent):
        c = self.config
        if recent is None:
            recent = tokens.new_full((len(tokens), c.token_shift), c.pad_id)
        window = torch.cat([recent, tokens], dim=1)
        embedded = self.embedder(window)
        if c.token_shift:
            embedded = embedded * (window != c.pad_id)[..., None]
        x = embedded[:, c.token_shift :]
        for back in range(1, c.token_shift + 1):
            first = c.token_shift - back
            x = x + self.shift[back - 1] * embedded[:, first : first + tokens.shape[1]]
        return x

    def logits(self, hidden):
        """[..., V]"""
        return (
            F.linear(hidden, self.embedder.weight)
            if self.config.tie_embeddings
            else self.head(hidden)
        )

    def value(self, hidden):
        """[...]"""
        return self.value_head(hidden)[..., 0]

    def new_caches(self, batch: int, slots: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [B, kv_heads, slots, head_width] of each layer."""
        c = self.config
        shape = (batch, c.num_kv_heads, slots, c.head_width)
        return [(torch.empty(shape), torch.empty(shape)) for _ in self.layers]


def angles(positions: torch.Tensor, c: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B, 1, T, rope_width / 2] of positions [B, T]."""
    exponent = torch.arange(0, c.rope_width, 2, dtype=torch.float32) / max(c.rope_width, 1)
    turned = positions[:, None, :, None].float() * c.rope_theta ** (-exponent)
    return turned.cos(), turned.sin()


def rotate(x, cos, sin, width: int):
    """Turns the first `width` channels of x [B, heads, T, depth], paired (i, i + width/2)."""
    if width == 0:
        return x
    half = width // 2
    first, second = x[..., :half], x[..., half:width]
    turned = [first * cos - second * sin, second * cos + first * sin, x[..., width:]]
    return torch.cat(turned, dim=-1)


class Matcher:
    """The flags of `prompt.match`: does a token also occur in segment f of the prompt?"""

    def __init__(self, template: prompting.Template):
        is_text = torch.from_numpy(np.array(template.is_text))
        self.vocab, self.is_text = len(is_text), is_text
        self.header = torch.full((self.vocab,), -1)
        for segment, ids in (
            (prompting.Segment.QUESTION, template.question[:1]),
            (prompting.Segment.SCRATCHPAD, template.scratchpad[:1]),
            (prompting.Segment.QUERY, template.query[:1]),
            (prompting.Segment.MEMORY, template.memory[:, 0]),
            (prompting.Segment.CHUNK, template.chunk[:1]),
        ):
            self.header[torch.from_numpy(np.array(ids)).long()] = int(segment)

    def table(self, prompt: torch.Tensor) -> torch.Tensor:
        """Float [B, V, F]: what each token of the vocabulary matches in prompts [B, P]."""
        count = prompting.NUM_FEATURES
        opens = self.header[prompt]
        position = torch.arange(prompt.shape[1]).expand_as(prompt)
        latest = torch.where(opens >= 0, position, -1).cummax(dim=1).values
        segment = opens.gather(1, latest.clamp(min=0))
        inside = (latest >= 0) & self.is_text[prompt]
        place = torch.where(inside, prompt * count + segment, self.vocab * count)
        flat = torch.zeros(len(prompt), self.vocab * count + 1)
        flat.scatter_(1, place, 1.0)
        return flat[:, :-1].view(len(prompt), self.vocab, count)

    @staticmethod
    def look_up(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Flags [B, T, F] of tokens [B, T]."""
        return table[torch.arange(len(tokens))[:, None], tokens]


# ---------------------------------------------------------------------------------------------
# Parameters, both ways

_NORMS = ("attention_norm", "mlp_norm")
_ATTENTION = ("query", "key", "value", "out")
_ATTENTION_NORMS = ("query_norm", "key_norm")
_MLP = ("gate", "up", "down")


def name_parameters(params: Any) -> dict[str, np.ndarray]:
    """The parameters of `Transformer` under PyTorch's names, matrices as [out, in]."""
    named: dict[str, np.ndarray] = {
        "embedder.weight": params["embedder"]["embedding"],
        "final_norm.weight": params["final_norm"]["scale"],
        "value_head.weight": np.transpose(params["value_head"]["kernel"]),
        "value_head.bias": params["value_head"]["bias"],
    }
    if "shift" in params:
        named["shift"] = params["shift"]
    if "features" in params:
        named["features.weight"] = np.transpose(params["features"]["kernel"])
    if "head" in params:
        named["head.weight"] = np.transpose(params["head"])
    layers = params["layers"]
    for i in range(len(layers["attention_norm"]["scale"])):
        for name in _NORMS:
            named[f"layers.{i}.{name}.weight"] = layers[name]["scale"][i]
        for name in (n for n in _ATTENTION_NORMS if n in layers):
            named[f"layers.{i}.attention.{name}.weight"] = layers[name]["scale"][i]
        for name in _ATTENTION:
            named[f"layers.{i}.attention.{name}.weight"] = layers[name]["kernel"][i].T
            if "bias" in layers[name]:
                named[f"layers.{i}.attention.{name}.bias"] = layers[name]["bias"][i]
        for name in _MLP:
            named[f"layers.{i}.{name}.weight"] = layers[name]["kernel"][i].T
    return {name: np.asarray(leaf, np.float32) for name, leaf in named.items()}


def from_params(config: ModelConfig, params: Any) -> TorchTransformer:
    """A PyTorch model with a copy of the parameters (host arrays)."""
    model = TorchTransformer(config)
    model.load_state_dict(
        {name: torch.from_numpy(leaf.copy()) for name, leaf in name_parameters(params).items()}
    )
    return model
