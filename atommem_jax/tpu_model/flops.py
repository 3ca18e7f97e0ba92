"""Exact FLOPs of the decoder, `model.transformer`, from its sizes and the length of rows.

A multiply and an add are two FLOPs. Matrix products count, those of the attention included;
softmax, norms, rotary embeddings, activations, masks, the sampling of a token, memory retrieval
and AdamW's arithmetic do not: they are no work for the matrix unit. Nor do three small products:
the value head, the flags of `prompt.match`, and Muon's orthogonalisation.

Two counts are kept apart. *Model* FLOPs are what the mathematics asks for: tokens that exist, keys
that a query may attend to (half of the square), logits that are read, and a backward pass of twice
the forward, or once where weights are frozen (`lora`). MFU divides these. *Hardware* FLOPs are what
is executed: also padding, the masked half of the square with plain attention, steps of the decode
loop for rows that have ended, and what rematerialisation computes again.
"""

import dataclasses
import math
from collections.abc import Iterable

from atommem_jax.config import LAYERS
from atommem_jax.model import attention
from atommem_jax.model.model_config import ModelConfig

BLOCK = 512
"""Queries and keys a step of the blocked attention kernel, which skips blocks that are masked."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs over all devices."""

    model: float = 0.0
    hardware: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.model + other.model, self.hardware + other.hardware)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.model * times, self.hardware * times)

    __rmul__ = __mul__


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of the same lengths; lists of these describe a batch.

    Attributes:
      count: rows on all devices.
      prompt: tokens of the prompt that exist.
      prefix: those of them that have been read before (`rollout.cache_prefix`).
      prefix_width: columns of what holds them; 0 for just `prefix`.
      response: tokens of the response, the end of sequence included.
      width: columns that are computed when scored, at least prompt + response - 1; 0 for just that.
      prompt_width: columns of the prompt that are prefilled; 0 for just `prompt - prefix`.
      limit: longest response, for which logits are computed; 0 for just `response`.
    """

    count: float
    prompt: int
    response: int
    width: int = 0
    prompt_width: int = 0
    limit: int = 0
    prefix: int = 0
    prefix_width: int = 0

    def __post_init__(self):
        for name, least in (
            ("width", self.fed),
            ("prompt_width", self.unread),
            ("prefix_width", self.prefix),
            ("limit", self.response),
        ):
            if getattr(self, name) and getattr(self, name) < least:
                raise ValueError(
                    f"Rows.{name}={getattr(self, name)} is less than the {least} that "
                    f"prompt={self.prompt} and response={self.response} need"
                )

    @property
    def unread(self) -> int:
        """Tokens of the prompt that prefill reads."""
        return self.prompt - self.prefix

    @property
    def before(self) -> int:
        """Columns in front of those that prefill reads."""
        return self.prefix_width or self.prefix

    @property
    def slots(self) -> int:
        """Columns that decoding finds in the cache, but for those of drafts."""
        return self.before + (self.prompt_width or self.unread) + (self.limit or self.response)

    @property
    def fed(self) -> int:
        """Tokens that scoring feeds: the last one predicts nothing."""
        return self.prompt + max(self.response - 1, 0)


def count_params(config: ModelConfig, *, value_head: bool = True) -> int:
    """Parameters of the model, without building it."""
    c = config
    layer = _layer_matrices(c) + 2 * c.width + (2 * c.head_width if c.qk_norm else 0)
    if c.qkv_bias:
        layer += c.head_width * (c.num_heads + 2 * c.num_kv_heads)
    embeddings = c.vocab_size * c.width * (1 if c.tie_embeddings else 2)
    inputs = (c.token_shift + c.num_features) * c.width
    return c.num_layers * layer + embeddings + inputs + c.width + (c.width + 1 if value_head else 0)


def count_trained(config: ModelConfig) -> int:
    """Those that have a gradient: all, or adapters and value head."""
    c = config
    if not c.lora.rank:
        return count_params(c)
    sizes = {path: sum(shape) for path, shape in c.matrices.items() if c.lora.adapts(path)}
    times = {path: c.num_layers if path.startswith("layers/") else 1 for path in sizes}
    return c.lora.rank * sum(sizes[path] * times[path] for path in sizes) + c.width + 1


def _attention_matrices(c: ModelConfig) -> int:
    return c.width * c.head_width * 2 * (c.num_heads + c.num_kv_heads)


def _layer_matrices(c: ModelConfig) -> int:
    return _attention_matrices(c) + 3 * c.width * c.mlp_width


def _adapters(c: ModelConfig) -> tuple[int, int]:
    """Numbers in the adapters that a token goes through in all layers, and a readout."""
    sizes = {path: shape for path, shape in c.matrices.items() if c.lora.adapts(path)}
    layers = sum(sum(shape) for path, shape in sizes.items() if path.startswith("layers/"))
    lookup = c.width if "embedder" in sizes else 0  # A is a table: no product
    readout = sum(sizes.get("embedder" if c.tie_embeddings else "head", ()))
    return c.lora.rank * (c.num_layers * layers + lookup), c.lora.rank * readout


def causal_pairs(length: int) -> int:
    """(query, key) pairs of a row that attends to itself and what came before."""
    return length * (length + 1) // 2


def computed_pairs(length: int, *, blocked: bool, before: int = 0) -> int:
    """Pairs that are computed, of rows with `before` columns in front of them.

    By the kernel: blocks that are not all masked. Without it: a few blocks of queries, each with
    all keys up to its end.
    """
    if not blocked:
        block = attention.query_block(length)
        spans = [(first, min(first + block, length)) for first in range(0, length, block)]
        return sum((last - first) * (before + last) for first, last in spans)
    both = math.gcd(length, before + length)
    block = next((b for b in (BLOCK, 256, 128) if both % b == 0), length)
    blocks = causal_pairs(length // block) + length // block * (before // block)
    return blocks * block * block


def forward(config: ModelConfig, tokens: float, pairs: float, logits: float) -> float:
    """FLOPs of a forward pass.

    Args:
      config: sizes.
      tokens: that go through the layers.
      pairs: (query, key) pairs in each layer and head.
      logits: positions where the head is read out.
    """
    c = config
    per_token = 2 * (c.num_layers * _layer_matrices(c) + c.num_features * c.width)
    narrow, readout = _adapters(c)
    per_token += 2 * narrow
    per_logit = 2 * (c.width * c.vocab_size + readout)
    return tokens * per_token + pairs * _per_pair(c) + logits * per_logit


def _per_pair(c: ModelConfig) -> int:
    return 4 * c.num_layers * c.num_heads * c.head_width  # queries x keys, weights x values


def backward(config: ModelConfig, tokens: float, pairs: float, logits: float) -> float:
    """FLOPs of the backward pass, nothing recomputed: two products for each of the forward pass.

    The flags of tokens (`num_features`) are data, and need one only. Weights that are frozen need
    one less: they have no gradient.
    """
    c = config
    left_out = tokens * 2 * c.num_features * c.width
    if c.lora.rank:
        per_token = c.num_layers * _layer_matrices(c) + c.num_features * c.width
        left_out += 2 * (tokens * per_token + logits * c.width * c.vocab_size)
    return 2 * forward(config, tokens, pairs, logits) - left_out


def recomputed(
    config: ModelConfig, tokens: float, pairs: float, logits: float, *, chunked: bool, blocked: bool
) -> float:
    """FLOPs that the backward pass repeats of the forward pass.

    What a layer hands to the next is not needed again, so its last product (`down`, and B of its
    adapter) is left out.

    Args:
      config: sizes, `remat` and `remat_policy`.
      tokens: as in `forward`.
      pairs: as in `forward`.
      logits: as in `forward`.
      chunked: logits are computed a chunk at a time (`rollout.score_chunk`), and again.
      blocked: attention by the kernel, which computes scores again whatever `remat` says: once in
        each of its two backward passes, for which `backward` counts one product a pair less.
    """
    c = config
    _, readout = _adapters(c)
    again = logits * 2 * (c.width * c.vocab_size + readout) if chunked else 0.0
    if blocked:
        # Five products a pair need scores once; the kernel's passes for queries and for keys and
        # values make them and the gradient of the weights twice: seven for the four of `backward`.
        again += pairs * _per_pair(c) * 3 / 2
    if not c.remat:
        return again
    policy = getattr(c, "remat_policy", "full")
    products = _layer_matrices(c) - c.mlp_width * c.width
    if policy != "dots":
        adapted = [n for n in LAYERS if c.lora.adapts(f"layers/{n}")]
        narrow = sum(sum(c.matrices[f"layers/{n}"]) for n in adapted)
        narrow -= c.width if "down" in adapted else 0
        again += tokens * 2 * c.num_layers * (products + c.lora.rank * narrow)
    if policy != "attention" or not blocked:
        again += pairs * _per_pair(c)
    return again


# ------------------------------------------------------------------ rows


def score(
    config: ModelConfig,
    rows: Iterable[Rows],
    *,
    train: bool,
    blocked: bool = False,
    chunked: bool = False,
) -> Flops:
    """Log-probs of given responses (`scoring.score`), with the gradient where `train`.

    Args:
      config: of the model.
      rows: what is scored.
      train: adds the backward pass and what it recomputes.
      blocked: attention by the kernel.
      chunked: see `recomputed`.
    """
    total = Flops()
    for row in rows:
        wanted = (row.fed, causal_pairs(row.fed), row.response)
        width = row.width or row.fed
        done = (width, computed_pairs(width, blocked=blocked), row.limit or row.response)
        model, hardware = forward(config, *wanted), forward(config, *done)
        if train:
            model += backward(config, *wanted)
            hardware += backward(config, *done)
            hardware += recomputed(config, *done, chunked=chunked, blocked=blocked)
        total += Flops(model, hardware) * row.count
    return total


def prefill(config: ModelConfig, rows: Iterable[Rows], *, blocked: bool = False) -> Flops:
    """The prompts of a rollout, into the cache. The first logits count as decoding."""
    total = Flops()
    for row in rows:
        width = row.prompt_width or row.unread
        pairs = computed_pairs(width, blocked=blocked, before=row.before)
        wanted = causal_pairs(row.prompt) - causal_pairs(row.prefix)
        total += row.count * Flops(
            forward(config, row.unread, wanted, 0),
            forward(config, width, pairs, 0) - _left_out(config, width, pairs, row.before),
        )
    return total


def _left_out(config: ModelConfig, width: int, pairs: float, before: int) -> float:
    """FLOPs of a prompt that `Transformer.read` leaves out: the last layer's, but for one column.

    Its keys and values are computed of all.
    """
    c = config
    keys_and_values = 2 * c.width * c.num_kv_heads * c.head_width
    products = 2 * (_layer_matrices(c) - keys_and_values) * (width - 1)
    return products + (pairs - width - before) * _per_pair(c) / c.num_layers


def decode(
    config: ModelConfig, rows: Iterable[Rows], *, passes: int | None = None, draft: int = 0
) -> Flops:
    """The responses of a rollout.

    The first token is read out of the prompt. Every pass feeds the token before and `draft` guesses
    and reads logits of all; all rows take part, ended or not, and each query is multiplied with
    every slot of the cache and with what is fed.

    Args:
      config: of the model.
      rows: their widths and `limit` say how many slots the cache has.
      passes: after the prompt's; None for one a token of the longest response in `rows`.
      draft: `rollout.draft`.
    """
    rows = list(rows)
    if passes is None:
        passes = max((row.response - 1 for row in rows), default=0)
    fed_columns = passes * (draft + 1)
    total = Flops()
    for row in rows:
        fed = max(row.response - 1, 0)
        attended = causal_pairs(row.prompt + fed) - causal_pairs(row.prompt)
        keys = row.slots + draft + (draft + 1)
        total += row.count * Flops(
            forward(config, fed, attended, row.response),
            forward(config, fed_columns, fed_columns * keys, fed_columns + 1),
        )
    return total


# ------------------------------------------------------------------ phases


def rollout(
    config: ModelConfig, turns: Iterable[Iterable[Rows]], *, blocked: bool = False
) -> Flops:
    """All turns of a batch of episodes; one list of rows a turn. Retrieval is not counted."""
    total = Flops()
    for turn in turns:
        rows = list(turn)
        total += prefill(config, rows, blocked=blocked) + decode(config, rows)
    return total


def sft(
    config: ModelConfig, rows: Iterable[Rows], *, blocked: bool = False, chunked: bool = False
) -> Flops:
    """One SFT step on the rows that are kept."""
    return score(config, rows, train=True, blocked=blocked, chunked=chunked)


def update(
    config: ModelConfig,
    rows: Iterable[Rows],
    *,
    epochs: int = 1,
    scorings: int = 0,
    blocked: bool = False,
    chunked: bool = False,
) -> Flops:
    """One PPO update: every row that has a gradient once an epoch.

    scorings: how often they are scored without a gradient beforehand: under the reference
      (`PPOConfig.needs_reference`), and under the learner itself (`ppo.importance_cap`).
    """
    rows = list(rows)
    total = epochs * score(config, rows, train=True, blocked=blocked, chunked=chunked)
    if scorings:
        total += scorings * score(config, rows, train=False, blocked=blocked)
    return total
