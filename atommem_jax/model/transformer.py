"""A decoder-only transformer as one pure function of (params, tokens).

RMSNorm, rotary positions on a configurable share of each head, grouped-query attention with
optional query/key norms and biases, SwiGLU, tied or untied output head and a value head: the family
of Llama, SmolLM2, Qwen2 and Qwen3. Layers are stacked with `nn.scan` and optionally
rematerialised.

Prompts are left-padded: `start[b]` is the first slot of row b that holds a token, and gives
positions and the attention mask, see `kv_cache`.

Two input features serve models trained from scratch and are off for pretrained ones:
`token_shift` adds the embeddings of the previous tokens (a learned gate per channel), and
`num_features` projects flags that the prompt computes for each token (see `prompt.match`).

With `lora` matrices get a low-rank branch beside them, see `matrices.Adapter`; without, nothing of
it is there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from atommem_jax.config import LoraConfig
from atommem_jax.model import attention
from atommem_jax.model.kv_cache import (
    Cache,
    Prefix,
    count_positions,
    like_stored,
    list_slots,
    mask_pieces,
    mask_slots,
    write_slots,
)
from atommem_jax.model.matrices import (
    dot_general,
    gather,
    make_adapter,
    make_dense,
    multiply,
    rescale,
    round_off,
)
from atommem_jax.model.model_config import REMAT_POLICIES, ModelConfig
from atommem_jax.model.quantized import INT8, quantize
from atommem_jax.model.rope import rotary_frequencies, rotary_scale, rotate
from atommem_jax.parallel import program
from atommem_jax.parallel.program import constrain

_FEW_LAYERS = 8  # at most: leaving out a part of the last one is worth a program of its own


def _count_copies(config: ModelConfig) -> int:
    """Of each key/value head: with fewer than devices on `tensor`, each has what it needs."""
    return max(program.partition_size("heads") // config.num_kv_heads, 1)


class Block(nn.Module):
    """One pre-norm layer, which gives its keys and values back where `keep_cache`."""

    config: ModelConfig
    keep_cache: bool
    product: Callable[..., Array] = dot_general  # of activations and a matrix
    tail: int = 0  # what comes out is of so many last columns; keys and values of all. 0: all

    @nn.compact
    def __call__(self, x, cache, start, positions, mask, index):
        c = self.config
        x = constrain(x, "rows", None, None)
        norm = functools.partial(nn.RMSNorm, epsilon=c.norm_epsilon, dtype=c.dtype)
        batch = x.shape[0]

        def heads(y, count):  # [B heads T depth]: faster on CPU than [B T heads depth]
            return y.reshape(batch, y.shape[1], count, c.head_width).transpose(0, 2, 1, 3)

        copies = _count_copies(c)

        def place(y, copies=1):
            y = jnp.repeat(y, copies, axis=1) if copies > 1 else y
            return constrain(y, "rows", "heads", None, None)

        def dense(features, name, biased=False):
            adapter = make_adapter(c, f"layers/{name}")
            whole = make_dense(features, c.dtype, name, self.product, biased=biased)
            return whole if adapter is None else lambda y: round_off(whole(y)) + adapter(y)

        h = norm(name="attention_norm")(x)
        asks, at = h[:, -self.tail :], positions[:, -self.tail :]  # -0 is all
        q = heads(dense(c.num_heads * c.head_width, "query", c.qkv_bias)(asks), c.num_heads)
        k = heads(dense(c.num_kv_heads * c.head_width, "key", c.qkv_bias)(h), c.num_kv_heads)
        v = heads(dense(c.num_kv_heads * c.head_width, "value", c.qkv_bias)(h), c.num_kv_heads)
        if c.qk_norm:
            q, k = norm(name="query_norm")(q), norm(name="key_norm")(k)
        turns = rotary_frequencies(c), rotary_scale(c)
        q, k = rotate(q, at, *turns), rotate(k, positions, *turns)
        q, k, v = place(q), place(k, copies), place(v, copies)
        before = cache.before if isinstance(cache, Prefix) else None
        if not isinstance(cache, Prefix | None):
            attended, (k, v) = self.attend_cached(q, k, v, cache, mask, index)
        elif self.tail:
            length = k.shape[2]
            mask = mask_slots(start, list_slots(length - self.tail, self.tail), length)
            attended = attention.attend(q, (k,), (v,), mask, before)
        else:
            attended = attention.causal(q, k, v, start, before, implementation=c.attention)
        attended = place(attended).transpose(0, 2, 1, 3).reshape(batch, q.shape[2], -1)
        x = x[:, -self.tail :] + dense(c.width, "out")(attended)

        h = norm(name="mlp_norm")(x)
        gate = constrain(nn.silu(dense(c.mlp_width, "gate")(h)), "rows", None, "mlp")
        up = constrain(dense(c.mlp_width, "up")(h), "rows", None, "mlp")
        x = constrain(x + dense(c.width, "down")(gate * up), "rows", None, None)
        return x, ((k, v) if self.keep_cache else None)

    @nn.nowrap
    def attend_cached(self, q, k, v, cache, mask, index):
        """Attention to all slots of the cache, and to k and v behind them; and both as kept."""
        del index  # they are written when all layers have theirs
        k, v = (like_stored(cache.later_values, x, axis=-1) for x in (k, v))
        before = None if cache.prefix is None else cache.prefix.before
        keys, values = (cache.keys, cache.later_keys, k), (cache.values, cache.later_values, v)
        return attention.attend(q, keys, values, mask, before), (k, v)


class Transformer(nn.Module):
    """tokens -> hidden states; `logits` and `value` read them out.

    Call `init` with `method="init_all"` so that both heads get their parameters.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embedder = nn.Embed(
            c.vocab_size,
            c.width,
            embedding_init=nn.initializers.normal(c.width**-0.5),
            name="embedder",
        )
        self.embedder_lora = make_adapter(c, "embedder")
        if c.token_shift:
            self.shift = self.param("shift", nn.initializers.zeros, (c.token_shift, c.width))
        if c.num_features:
            self.features = make_dense(c.width, c.dtype, "features")
        block = Block
        if c.remat:
            policy = REMAT_POLICIES[c.remat_policy]
            block = nn.remat(Block, prevent_cse=False, policy=policy)

        def stack(keep_cache):
            return nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.num_layers,
            )(c, keep_cache, name="layers")

        self.stack = stack
        self.final_norm = nn.RMSNorm(epsilon=c.norm_epsilon, dtype=c.dtype, name="final_norm")
        if not c.tie_embeddings:
            self.head = self.param(
                "head", nn.initializers.normal(c.width**-0.5), (c.width, c.vocab_size)
            )
            self.head_lora = make_adapter(c, "head")
        self.value_head = nn.Dense(1, kernel_init=nn.initializers.zeros, name="value_head")

    @nn.compact
    def _layers(self, keep_cache, *args):
        return self.stack(keep_cache)(*args)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        start: Int[Array, " B"],
        *,
        features: Bool[Array, "B T F"] | None = None,
        cache: Cache | None = None,
        index: int | Int[Array, "*B"] = 0,
        tail: int = 0,
    ) -> tuple[Float[Array, "B T width"], Cache | None]:
        """Hidden states of `tokens`, which stand at slots index .. index + T - 1.

        With `cache` the tokens attend to its slots too, and the cache comes back with them
        written among its later slots, whose index may differ from row to row.

        tail: static; without a cache, only those of the last `tail` columns are wanted. A model of
          few layers leaves out what the last one would compute of the others; any returns just
          these columns. 0 for all.
        """
        length = tokens.shape[1]
        window = self._with_recent(tokens, None if cache is None else cache.recent)
        x = self.embed(window, features)
        slots = list_slots(index, length)
        layered: Any = None
        mask: Any = None
        offset: Any = index
        prefix = None
        if cache is not None:
            prefix = cache.prefix
            every = None if prefix is None else prefix.repeat_length()
            layered = cache.replace(recent=None, prefix=every)
            mask, offset = mask_pieces(start, slots, cache.slots), index - cache.prompt_slots
        positions = count_positions(start, slots, prefix)
        if 0 < tail < length and self.config.num_layers <= _FEW_LAYERS and cache is None:
            return self.final_norm(self._layers_with_tail(x, start, positions, tail)), None
        if cache is not None:  # whole on `tensor`: else they are gathered again in every layer
            positions, mask = (
                constrain(positions, "rows", None),
                constrain(mask, "rows", None, None),
            )
            offset = constrain(offset, "rows") if jnp.ndim(offset) else offset
        x, written = self._layers(cache is not None, x, layered, start, positions, mask, offset)
        x = self.final_norm(x[:, -tail:])
        if cache is None:
            return x, None
        # Once, and not layer by layer: a scan would copy all later slots to write a few.
        keys, values = (
            write_slots(old, new, offset, axis=3, rows=1)
            for old, new in zip((cache.later_keys, cache.later_values), written, strict=True)
        )
        cache = cache.replace(later_keys=keys, later_values=values, recent=window[:, length:])
        return x, cache

    @nn.nowrap
    def _layers_with_tail(self, x, start, positions, tail: int) -> Float[Array, "B tail width"]:
        """All layers, and of the last one `tail` columns."""
        stacked = self.variables["params"]["layers"]

        def run(x, own, tail=0):
            block = Block(self.config, False, tail=tail, parent=None)
            # The barriers keep roundings to bfloat16 that a loop makes, see `read`.
            x = jax.lax.optimization_barrier(x)
            x, _ = block.apply({"params": own}, x, None, start, positions, None, 0)
            return jax.lax.optimization_barrier(x)

        def remat(function):
            policy = REMAT_POLICIES[self.config.remat_policy]
            keep = functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
            return keep(function) if self.config.remat else function

        others = jax.tree.map(lambda p: p[:-1], stacked)
        with jax.named_scope("layers"):
            x, _ = jax.lax.scan(
                lambda x, own: (remat(run)(x, own), None),
                x,
                others,
                unroll=not self.config.remat,  # a loop would copy all that is kept
            )
        last = jax.tree.map(lambda p: p[-1], stacked)
        return remat(functools.partial(run, tail=tail))(x, last)

    @nn.nowrap
    def _with_recent(self, tokens: Array, recent: Array | None) -> Int[Array, "B shifted_T"]:
        """The tokens behind the `token_shift` before them; padding where there are none."""
        if recent is None:
            shape = (tokens.shape[0], self.config.token_shift)
            recent = jnp.full(shape, self.config.pad_id, tokens.dtype)
        return jnp.concatenate([recent, tokens], axis=1)

    def read(
        self,
        tokens: Int[Array, "B T"],
        start: Int[Array, " B"],
        *,
        features: Bool[Array, "B T F"] | None = None,
        recent: Int[Array, "B token_shift"] | None = None,
        prefix: Prefix | None = None,
        cache_dtype: str = "",
    ) -> tuple[Float[Array, "B 1 width"], Cache]:
        """The hidden state of the last of T tokens, and a cache of all: what `__call__` gives.

        Nothing but the keys and values of the last layer is computed of the others there.

        recent: tokens before the first column; None for padding.
        prefix: what stands before each row.
        cache_dtype: "int8", or "" for what the model computes in. The prompt attends to itself as
          it is computed, and only what is kept is rounded.
        """
        with program.rows_over_tensor(tokens.shape[0]) as by_rows:
            found = self._read(tokens, start, features, recent, prefix, cache_dtype, by_rows)
        hidden, (k, v), recent = found
        if by_rows:  # decoding wants heads apart
            copies = _count_copies(self.config)

            def place(x):
                return constrain(jnp.repeat(x, copies, 2), None, "rows", "heads", None, None)

            k, v = jax.tree.map(place, (k, v))
        none = jax.tree.map(lambda x: jnp.zeros((*x.shape[:3], 0, x.shape[4]), x.dtype), k)
        return program.whole(hidden), Cache(k, v, none, none, recent, prefix)

    @nn.nowrap
    def _read(self, tokens, start, features, recent, prefix, cache_dtype, by_rows):
        c = self.config
        batch, length = tokens.shape
        window = self._with_recent(tokens, recent)
        positions = count_positions(start, list_slots(0, length), prefix)
        stacked = self.variables["params"]["layers"]
        if by_rows and prefix is not None:
            prefix = prefix.place_by_rows(c.num_kv_heads)

        def keep(parts):
            kept = (quantize(part, axis=-1) if cache_dtype == INT8 else part for part in parts)
            return tuple(kept)

        def gather(path, p):
            """Whole, after the cast and not before; int8 and scales are what they are."""
            stays = path[-1].key == "scale" or p.dtype == jnp.int8
            return program.whole(p if stays else p.astype(c.dtype))

        def run(i, x, cache, **how):
            block = Block(c, True, parent=None, **how)
            own = jax.tree.map(lambda p: p[i], stacked)
            if by_rows:
                own = jax.tree_util.tree_map_with_path(gather, own)
            # Outside of a loop XLA leaves out roundings to bfloat16 that a loop makes.
            x = jax.lax.optimization_barrier(x)
            before = None if prefix is None else prefix.of_layer(i)
            x, new = block.apply({"params": own}, x, before, start, positions, None, 0)
            x = jax.lax.optimization_barrier(x)
            write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            return x, jax.tree.map(write, cache, keep(new))

        kv_heads = c.num_kv_heads * _count_copies(c)
        room = jnp.zeros((c.num_layers, batch, kv_heads, length, c.head_width), c.dtype)
        # Written layer by layer where it lies: pieces that are joined in the end would be copied.
        x, cache = self.embed(window, features), keep((room, room))
        with jax.named_scope("layers"):
            x, cache = jax.lax.fori_loop(
                0, c.num_layers - 1, lambda i, carry: run(i, *carry), (x, cache)
            )
        x, (k, v) = run(c.num_layers - 1, x, cache, tail=1)
        return self.final_norm(x), (k, v), window[:, length:]

    def embed(
        self, window: Int[Array, "B shifted_T"], features: Bool[Array, "B T F"] | None
    ) -> Float[Array, "B T width"]:
        """What the first layer reads of the tokens, before which `token_shift` others stand."""
        c = self.config
        length = window.shape[1] - c.token_shift
        # Looked up in a table that is whole in its width: cheaper than to move what it gives.
        table = self.embedder.embedding
        scale: Array | None = self.embedder.get_variable("params", "scale")
        table = gather(table if scale is not None else table.astype(c.dtype), ("vocab", "embed"))
        embedded = constrain(jnp.take(table, window, axis=0), "rows", None, None)
        if scale is not None:
            embedded = rescale(embedded.astype(c.dtype), jnp.take(scale, window, axis=0))
        if self.embedder_lora is not None:
            embedded = embedded + self.embedder_lora.lookup(window, c.dtype)
        if c.token_shift:  # padding is masked everywhere else, and a published id for it is used
            embedded = embedded * (window != c.pad_id)[..., None].astype(embedded.dtype)
        x = embedded[:, c.token_shift :]
        for back in range(1, c.token_shift + 1):
            first = c.token_shift - back
            gain = self.shift[back - 1][None, None].astype(c.dtype)
            x = x + gain * embedded[:, first : first + length]
        if c.num_features:
            if features is None:
                raise ValueError(
                    f"model.num_features={c.num_features}, but no features were passed"
                )
            x = x + self.features(features.astype(c.dtype))
        return x

    def readout(self, dtype) -> Float[Array, "width V"]:
        """The matrix that `logits` reads hidden states of `dtype` out with, scales aside."""
        head = self.embedder.embedding.T if self.config.tie_embeddings else self.head
        return gather(head.astype(dtype), ("embed", "vocab"))

    def logits(
        self,
        hidden: Float[Array, "*batch width"],
        readout: Float[Array, "width V"] | None = None,
        *,
        product: Callable[..., Array] = multiply,
    ) -> Float[Array, "*batch V"]:
        """float32 logits. Who reads out in pieces passes the same `readout` with each."""
        readout = self.readout(hidden.dtype) if readout is None else readout
        out = product(hidden, readout, (((hidden.ndim - 1,), (0,)), ((), ())))
        tied = self.config.tie_embeddings
        holder, name = (self.embedder, "scale") if tied else (self, "head_scale")
        scale: Array | None = holder.get_variable("params", name)
        if scale is not None:
            out = rescale(out, scale.reshape(-1))
        adapter = self.embedder_lora if tied else self.head_lora
        if adapter is not None:
            out = out + adapter.logits(hidden, transposed=tied)
        return constrain(out, "rows", *(None,) * (out.ndim - 2), "vocab")

    def value(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch"]:
        """Expected return, float32; the gradient reaches the trunk."""
        return self.value_head(hidden.astype(jnp.float32))[..., 0]

    def init_all(self, tokens: Int[Array, "B T"]):
        """Touches every parameter; for `init` only."""
        c = self.config
        features = jnp.zeros((*tokens.shape, c.num_features), bool) if c.num_features else None
        hidden, _ = self(tokens, jnp.zeros(tokens.shape[:1], jnp.int32), features=features)
        return self.logits(hidden), self.value(hidden)


def without_adapters(model: Transformer) -> Transformer:
    """The plain model, for parameters that were merged; `model` itself where it is one."""
    return Transformer(dataclasses.replace(model.config, lora=LoraConfig()))


def init_params(model: Transformer, key: Array):
    """Fresh float32 parameters."""
    tokens = jnp.zeros((1, 2), jnp.int32)  # too short for the kernel
    model = Transformer(dataclasses.replace(model.config, attention="plain"))
    return model.init(key, tokens, method="init_all")["params"]


def count_params(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
