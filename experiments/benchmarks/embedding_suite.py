"""Suite `embedding`: what a turn of the memory costs by what makes its keys.

A turn of B trajectories retrieves with a query and stores one new entry each, as long as an entry
may be. Models have random parameters, which cost what trained ones do.
"""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atommem_jax.memory import slot_table
from atommem_jax.memory.embedding import HashedBagOfTokens, PooledTokens
from atommem_jax.memory.encoder import EncoderEmbedding
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import Transformer, init_params
from atommem_jax.types import ActionKind, Actions, Embed, permitted_kinds
from experiments.benchmarks import timing

VOCABULARY, SLOTS, SHOWN, ACTIONS, QUERY = 49_152, 64, 4, 4, 32
SIZES = ((16, 32), (16, 128), (64, 32))  # trajectories, tokens of an entry
ENCODERS = {
    "encoder of 6 million": {"width": 256, "num_layers": 6, "num_heads": 4, "mlp_width": 768},
    "encoder of 106 million": {"width": 576, "num_layers": 30, "num_heads": 9, "mlp_width": 1536},
}
"""Name, by parameters beside the embedding -> sizes."""


def make_embeddings() -> dict[str, Embed]:
    """What is compared."""
    hashed = HashedBagOfTokens(VOCABULARY, 1024, weights=bytes([100] * VOCABULARY))
    rows = jax.random.normal(jax.random.key(0), (VOCABULARY, 576))
    pooled = PooledTokens(hashed, hashed.weights).bind({"embedder": {"embedding": rows}})
    return {
        "hashed, 1024": hashed,
        "policy, 576": pooled,
        **{name: make_encoder(**sizes) for name, sizes in ENCODERS.items()},
    }


def make_encoder(**sizes: int) -> EncoderEmbedding:
    """One of the family of Qwen3-Embedding, which reads the tokens of the policy as they are."""
    config = ModelConfig(
        VOCABULARY, num_kv_heads=1, head_width=64, qk_norm=True, attention="plain", **sizes
    )
    model = Transformer(config)
    return EncoderEmbedding(
        model=model,
        dim=config.width,
        end_id=0,
        params=jax.jit(lambda: init_params(model, jax.random.key(0)))(),
        pieces=jnp.arange(VOCABULARY, dtype=jnp.int32)[:, None],
        instruction=jnp.arange(1, 17, dtype=jnp.int32),
    )


@jax.jit
def _turn(embed: Embed, tables: Any, actions: Actions) -> Any:
    def play(embed, table, actions):
        table, _ = slot_table.retrieve(table, embed)
        permitted = permitted_kinds(jnp.int32(0))
        apply = functools.partial(slot_table.transition, eviction="lru", pad_id=0)
        return apply(table, actions, permitted=permitted, embed=embed)[0]

    return jax.vmap(play, (None, 0, 0))(embed, tables, actions)


def make_turn(trajectories: int, length: int, key_dim: int) -> tuple[Any, Actions]:
    """(tables with a query, one create and nothing else) of every trajectory."""
    rng = np.random.default_rng(0)
    text = rng.integers(1, VOCABULARY, (trajectories, ACTIONS, length)).astype(np.int32)
    kind = np.zeros((trajectories, ACTIONS), np.int32)
    kind[:, 0] = ActionKind.CREATE
    actions = Actions(
        kind=jnp.asarray(kind),
        target=jnp.zeros_like(kind),
        text=jnp.asarray(text),
        length=jnp.full_like(kind, length),
        well_formed=jnp.ones(kind.shape, bool),
        count=jnp.ones(trajectories, jnp.int32),
    )
    table = slot_table.init(
        slots=SLOTS, entry_length=length, scratchpad_length=1, query_length=QUERY,
        shown=SHOWN, key_dim=key_dim, pad_id=0,
    )  # fmt: skip
    query = jnp.asarray(rng.integers(1, VOCABULARY, QUERY).astype(np.int32))
    table = slot_table.set_query(table, query, jnp.int32(QUERY), 0)
    tables = jax.tree.map(lambda x: jnp.broadcast_to(x, (trajectories, *x.shape)), table)
    return tables, actions


def run(*, runs: int, embeddings: dict[str, Embed] | None = None) -> list[dict[str, Any]]:
    """Milliseconds of a turn of all trajectories, for each size and embedding."""
    points = []
    for trajectories, length in SIZES:
        contestants = {}
        for name, embed in (embeddings or make_embeddings()).items():
            width = embed(jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32)).shape[1]
            start = make_turn(trajectories, length, width)

            def play(_: Any, embed: Embed = embed, start: Any = start) -> None:
                jax.block_until_ready(_turn(embed, *start))

            contestants[name] = timing.Contestant(play)
        seconds = timing.measure(contestants, runs=runs, label=f"{trajectories} x {length}")
        points.append(
            {"trajectories": trajectories, "entry_length": length}
            | {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
        )
    return points
