"""A decoder-only transformer as one pure function of (params, tokens).

RMSNorm, rotary positions on a configurable share of each head, grouped-query attention with
optional query/key norms and biases, SwiGLU, tied or untied output head and a value head: the family
of Llama, SmolLM2, Qwen2 and Qwen3. Layers are stacked with `nn.scan` and optionally
rematerialised.

A row is addressed by *slots*: prompts are left-padded to a common width, so that decoding
writes the same slot in every row. `start[b]` is the first slot of row b that holds a token;
its rotary position is 0. That one integer per row gives positions and the attention mask.

Two input features serve models trained from scratch and are off for pretrained ones:
`token_shift` adds the embeddings of the previous tokens (a learned gate per channel), and
`num_features` projects flags that the prompt computes for each token (see `prompt.match`).

With `lora` matrices get a low-rank branch beside them, see `Adapter` and `lora`; without, nothing
of it is there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from atommem_jax.config import LoraConfig
from atommem_jax.model import attention
from atommem_jax.model.lora import SUFFIX
from atommem_jax.model.model_config import REMAT_POLICIES, ModelConfig
from atommem_jax.model.quantized import INT8, Quantized, Stored, quantize
from atommem_jax.parallel import program
from atommem_jax.parallel.program import constrain

_FEW_LAYERS = 8  # at most: leaving out a part of the last one is worth a program of its own
_CHAIN = 32  # terms that are added one after the other where exactness is asked for


@flax.struct.dataclass
class Prefix:
    """Keys and values of what a row begins with, for all layers; within a layer, its own.

    They stand before the row's first slot, and may be those of several rows that begin alike.
    """

    keys: Stored  # [*layers B kv_heads F head_width]
    values: Stored  # the same
    length: Int[Array, " B"]  # tokens: the first of the F

    @property
    def before(self) -> attention.Before:
        """What attention gets of one layer."""
        there = jnp.arange(self.values.shape[-2])[None, None] < self.length[:, None, None]
        return self.keys, self.values, there

    def repeat_length(self) -> "Prefix":
        """The length once for each layer, as a scan over layers wants it."""
        layers = self.values.shape[0]
        return self.replace(length=jnp.broadcast_to(self.length, (layers, *self.length.shape)))

    def place_by_rows(self, heads: int) -> "Prefix":
        """Each device has all `heads` of some rows, and each head once: not its copies."""

        def place(x: Array) -> Array:
            return constrain(x[:, :, :: x.shape[2] // heads], None, "rows", None, None, None)

        keys, values = jax.tree.map(place, (self.keys, self.values))
        return self.replace(keys=keys, values=values)

    def of_layer(self, i: int | Int[Array, ""]) -> "Prefix":
        """What one layer has of it."""
        keys, values = jax.tree.map(lambda x: x[i], (self.keys, self.values))
        return self.replace(keys=keys, values=values)


@flax.struct.dataclass
class Cache:
    """Keys and values of the slots written so far, for all layers; within a layer, its own.

    Those of the prompt are written once and then only read: decoding would spend most of its time
    copying them from step to step. What it writes lies apart, in the slots behind them.

    In int8 a head has a scale at every slot, see `quantized`.
    """

    keys: Stored  # [*layers B kv_heads slots head_width]
    values: Stored  # the same
    later_keys: Stored  # [*layers B kv_heads more head_width]
    later_values: Stored  # the same
    recent: Int[Array, "B token_shift"]  # the last tokens, oldest first
    prefix: Prefix | None = None  # before the first slot

    @property
    def prompt_slots(self) -> int:
        """Slots that are only read."""
        return self.values.shape[-2]

    @property
    def slots(self) -> int:
        """All slots, written or not."""
        return self.prompt_slots + self.later_values.shape[-2]

    def extend(self, slots: int) -> "Cache":
        """Room for `slots` more slots, which hold zeros until they are written."""
        pad = [(0, 0)] * 3 + [(0, slots), (0, 0)]
        later = self.later_keys, self.later_values
        keys, values = jax.tree.map(lambda x: jnp.pad(x, pad), later)
        return self.replace(later_keys=keys, later_values=values)


def multiply(lhs, rhs, dimension_numbers, precision=None, dtype=jnp.float32) -> Array:
    """`jax.lax.dot_general` over one axis; `jax.default_matmul_precision("highest")` is kept to.

    With it XLA multiplies float32 as float32 on a TPU. On a CPU it always does, but adds up a row
    in one chain, whose rounding grows with its length: there the chains are short, and their sums
    are added in pairs.
    """
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=dtype,
    )
    ((left,), (right,)), _ = dimension_numbers
    size = lhs.shape[left]
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
    if not exact or jax.default_backend() != "cpu":
        return dot(lhs, rhs)
    cuts = list(range(_CHAIN, size, _CHAIN))
    pairs = zip(jnp.split(lhs, cuts, left), jnp.split(rhs, cuts, right), strict=True)
    # Without the barriers the compiler could make one product of them.
    parts = [jax.lax.optimization_barrier(dot(a, b)) for a, b in pairs]
    while len(parts) > 1:
        parts = [sum(parts[i + 1 : i + 2], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


def dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
    """Accumulates in float32 whatever the operands: XLA:CPU crawls on a bfloat16 result.

    Over a tensor axis the result has the operands' type, so that half the bytes are summed there.
    """
    del preferred_element_type
    over_devices = program.partition_size("heads") > 1
    dtype = lhs.dtype if over_devices else jnp.float32
    return multiply(lhs, rhs, dimension_numbers, precision, dtype).astype(lhs.dtype)


class _Dense(nn.Dense):
    """A matrix, which may be int8 with the scales of its output channels beside it.

    Its bias is added to what they have scaled.
    """

    biased: bool = False

    @nn.compact
    def __call__(self, inputs):
        out = super().__call__(inputs)
        scale: Array | None = self.get_variable("params", "scale")
        out = out if scale is None else _rescale(out, scale[0])
        if not self.biased:
            return out
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return _round(_round(out) + bias.astype(out.dtype).reshape(*(1,) * (out.ndim - 1), -1))


def _rescale(x: Array, scale: Array) -> Array:
    """What int8 values gave, times their scale, in the dtype of `x`."""
    scale = scale.reshape(*(1,) * (x.ndim - scale.ndim), *scale.shape)
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def _dense(
    features: int, dtype: str, name: str, product=dot_general, *, biased: bool = False
) -> nn.Dense:
    return _Dense(
        features, use_bias=False, dtype=dtype, dot_general=product, biased=biased, name=name
    )


class Adapter(nn.Module):
    """The branch (alpha / rank) (x A) B of a matrix; their product is never made.

    A [in, rank] is normal and B [rank, out] zero. Both are kept in float32 and used in the dtype of
    what they are applied to, as the matrix is.
    """

    shape: tuple[int, int]  # of the matrix
    config: LoraConfig
    deviation: float  # of A

    def setup(self):
        rank = self.config.rank
        self.a = self.param("a", nn.initializers.normal(self.deviation), (self.shape[0], rank))
        self.b = self.param("b", nn.initializers.zeros, (rank, self.shape[1]))

    def __call__(self, x: Float[Array, "B T in"]) -> Float[Array, "B T out"]:
        narrow = constrain(_product(x, self.a), "rows", None, None)
        return _round(_product(narrow, self.b) * self.config.scale)

    def lookup(self, ids: Int[Array, "B T"], dtype: str) -> Float[Array, "B T out"]:
        """For a one-hot x: the matrix is a table."""
        narrow = jnp.take(constrain(self.a.astype(dtype), "vocab", None), ids, axis=0)
        return _round(_product(constrain(narrow, "rows", None, None), self.b) * self.config.scale)

    def logits(
        self, x: Float[Array, "*batch width"], *, transposed: bool
    ) -> Float[Array, "*batch V"]:
        """For a readout, float32; `transposed` where the matrix is the table of the embeddings."""
        first, second = (self.b.T, self.a.T) if transposed else (self.a, self.b)
        narrow = _product(x, first)
        wide = jnp.matmul(narrow, second.astype(x.dtype), preferred_element_type=jnp.float32)
        return wide * self.config.scale


def _product(x: Float[Array, "B T in"], matrix: Float[Array, "in out"]) -> Float[Array, "B T out"]:
    return dot_general(x, matrix.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def _round(x: Array) -> Array:
    """Rounds to bfloat16 where that is the dtype of `x`.

    XLA leaves roundings out between a product and a sum, in one program and not in another: the
    sampler and the learner would differ.
    """
    if x.dtype != jnp.bfloat16:
        return x
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _adapter(config: ModelConfig, path: str) -> Adapter | None:
    """The adapter of the matrix at `path`, within the module that has it; None without one."""
    if not config.lora.adapts(path):
        return None
    shape = config.matrices[path]
    # What A gives is of the size of one channel of its input; a token is one-hot.
    deviation = 1.0 if path == "embedder" else shape[0] ** -0.5
    return Adapter(shape, config.lora, deviation, name=path.rpartition("/")[2] + SUFFIX)


def _gather(table: Array, axes: tuple[str, str]) -> Array:
    """A table whole in its width on every device, gathered after its cast and not before."""
    table = constrain(table, *axes)
    return constrain(table, *(None if axis == "embed" else axis for axis in axes))


def rotary_frequencies(config: ModelConfig) -> Float[Array, " pairs"]:
    """Radians a position for each pair of rotated channels, float32.

    With `rope_factor` above 1 pairs are slowed, by `rope_type`. linear: all of them by the factor
    (Chen et al., 2023). llama3: a pair that turns fewer than `low` times over the original length
    is slowed by the factor, one that turns more than `high` times is kept, and between the two the
    share that is kept grows linearly with the turns. yarn (Peng et al., 2023, section 3.2): the
    same between `rope_beta_slow` and `rope_beta_fast` turns, but the share falls linearly with the
    number of the pair, from one whole number to another where `rope_truncate`.
    """
    c = config
    exponents = jnp.arange(0, c.rope_width, 2, dtype=jnp.float32) / max(c.rope_width, 1)
    frequencies = c.rope_theta ** (-exponents)
    if c.rope_factor == 1.0:
        return frequencies
    if c.rope_type == "linear":
        return frequencies / c.rope_factor
    if c.rope_type == "yarn":
        first, last = _yarn_range(c)
        pairs = jnp.arange(frequencies.shape[0], dtype=jnp.float32)
        kept = 1.0 - jnp.clip((pairs - first) / (last - first), 0.0, 1.0)
    else:
        low, high = c.rope_low_frequency_factor, c.rope_high_frequency_factor
        turns = c.rope_original_length * frequencies / (2 * math.pi)
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / c.rope_factor)


def _yarn_range(c: ModelConfig) -> tuple[float, float]:
    """The pairs between which YaRN goes from frequencies that are kept to slowed ones."""

    def find_pair(turns: float) -> float:
        """Where over the original length a pair turns so often; between two pairs, mostly."""
        longest = c.rope_original_length / (turns * 2 * math.pi)
        return c.rope_width * math.log(longest) / (2 * math.log(c.rope_theta))

    first, last = find_pair(c.rope_beta_fast), find_pair(c.rope_beta_slow)
    if c.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, c.rope_width - 1)
    return first, last + 0.001 if first == last else last


def rotary_scale(config: ModelConfig) -> float:
    """What rotated channels are multiplied by: YaRN's sharper attention over longer texts.

    Queries and keys both are, so that scores grow by its square (Peng et al., 2023, section 3.4).
    """
    if config.rope_type != "yarn":
        return 1.0
    return config.rope_attention_factor or 0.1 * math.log(config.rope_factor) + 1.0


def rotate(
    x: Float[Array, "B heads T depth"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " pairs"],
    scale: float = 1.0,
) -> Float[Array, "B heads T depth"]:
    """Rotary embedding of the first 2 x pairs channels, paired (i, i + pairs), in float32.

    scale: what they are multiplied by as well.
    """
    width = 2 * frequencies.shape[0]
    if width == 0:
        return x
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    rotated, passed = x[..., :width].astype(jnp.float32), x[..., width:]
    first, second = jnp.split(rotated, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), passed], axis=-1)


def list_slots(index: int | Int[Array, "*B"], length: int) -> Int[Array, "#B T"]:
    """The slots index .. index + length - 1, of every row or of each row."""
    return jnp.reshape(index, (-1, 1)) + jnp.arange(length, dtype=jnp.int32)[None]


def count_positions(
    start: Int[Array, " B"], slots: Int[Array, "#B T"], prefix: Prefix | None = None
) -> Int[Array, "B T"]:
    """Rotary positions of the tokens at `slots`: a row's first token has 0, or follows a prefix."""
    before = 0 if prefix is None else prefix.length[:, None]
    return jnp.maximum(slots - start[:, None], 0) + before


def mask_slots(
    start: Int[Array, " B"], slots: Int[Array, "#B T"], count: int
) -> Bool[Array, "B T count"]:
    """Which of a cache's `count` slots the tokens at `slots` attend to: none later than theirs."""
    key_slots = jnp.arange(count, dtype=jnp.int32)
    return (key_slots[None, None, :] <= slots[:, :, None]) & (
        key_slots[None, None, :] >= start[:, None, None]
    )


def mask_pieces(
    start: Int[Array, " B"], slots: Int[Array, "#B T"], count: int
) -> Bool[Array, "B T count+T"]:
    """`mask_slots` where what stands at `slots` is not among the cache's, but follows them."""
    first = jnp.broadcast_to(slots[:, :1], slots.shape)
    written = mask_slots(start, first - 1, count)
    new = (slots[:, None, :] <= slots[:, :, None]) & (slots[:, None, :] >= start[:, None, None])
    return jnp.concatenate([written, new], axis=2)


def like_stored(old: Stored, new: Array, *, axis: int) -> Stored:
    """`new` as `old` is kept: where that is int8, with a scale for the vectors along `axis`."""
    return quantize(new, axis=axis) if isinstance(old, Quantized) else new


def write_slots(
    old: Stored, new: Stored, index: int | Int[Array, "*B"], *, axis: int, rows: int = 0
) -> Stored:
    """`old` with `new` at `index` of an axis, the same in every row or one for each.

    rows: the axis that they lie along.
    """

    def write(old, new):
        if jnp.ndim(index) == 0:
            return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis)
        write_row = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
        return jax.vmap(write_row, (rows, rows, 0), rows)(old, new, index)

    return jax.tree.map(write, old, new)


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
            adapter = _adapter(c, f"layers/{name}")
            whole = _dense(features, c.dtype, name, self.product, biased=biased)
            return whole if adapter is None else lambda y: _round(whole(y)) + adapter(y)

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
        self.embedder_lora = _adapter(c, "embedder")
        if c.token_shift:
            self.shift = self.param("shift", nn.initializers.zeros, (c.token_shift, c.width))
        if c.num_features:
            self.features = _dense(c.width, c.dtype, "features")
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
            self.head_lora = _adapter(c, "head")
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
            x, _ = jax.lax.scan(lambda x, own: (remat(run)(x, own), None), x, others)
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
        table = _gather(table if scale is not None else table.astype(c.dtype), ("vocab", "embed"))
        embedded = constrain(jnp.take(table, window, axis=0), "rows", None, None)
        if scale is not None:
            embedded = _rescale(embedded.astype(c.dtype), jnp.take(scale, window, axis=0))
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
        return _gather(head.astype(dtype), ("embed", "vocab"))

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
            out = _rescale(out, scale.reshape(-1))
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
