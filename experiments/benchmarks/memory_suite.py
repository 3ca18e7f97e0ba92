"""Suite `memory`: mixed operations and a retrieval a turn, on the tables of many trajectories.

Every contestant plays the same operations on its own tables, block after block, and embeds the
texts itself. A turn retrieves K entries, reads their texts, and applies A operations. Ours is two
jitted calls a turn, since a policy writes between them, with the state donated; the operations lie
ready on each side in its own form.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atommem_jax.config import MemoryConfig
from atommem_jax.memory import slot_table
from atommem_jax.memory.embedding import HashedBagOfTokens
from atommem_jax.parallel import host_batches, program
from atommem_jax.types import PERMITTED, ActionKind, Actions, Phase, permitted_kinds
from experiments.benchmarks import timing
from experiments.benchmarks.host_memory import (
    FaissIndex,
    HostAction,
    HostEmbedding,
    HostMemory,
    NumpyIndex,
    apply_all,
    retrieve_all,
)
from experiments.benchmarks.numpy_tables import NumpyTables

VOCAB = 640
_PAD = 0
_MIX = {
    ActionKind.CREATE: 0.4,
    ActionKind.UPDATE: 0.2,
    ActionKind.DELETE: 0.15,
    ActionKind.READ: 0.15,
    ActionKind.SCRATCHPAD: 0.1,
}
PEERS = ("faiss", "numpy", "numpy_per_trajectory")


@dataclasses.dataclass(frozen=True)
class Load:
    """How much there is to do."""

    trajectories: int = 256
    slots: int = 256
    entry_length: int = 32
    key_dim: int = 128
    shown: int = 6
    actions: int = 4  # a turn
    turns: int = 8  # a run
    eviction: str = "lru"

    @property
    def sizes(self) -> MemoryConfig:
        return MemoryConfig(
            slots=self.slots,
            entry_length=self.entry_length,
            scratchpad_length=self.entry_length,
            query_length=self.entry_length,
            shown=self.shown,
            key_dim=self.key_dim,
            eviction=self.eviction,
        )


@dataclasses.dataclass
class Operations:
    """Random operations of `blocks` runs, and what fills the tables before; NumPy."""

    fill: np.ndarray  # [B, N, L], full texts
    query: np.ndarray  # [B, L], the first standing query
    kind: np.ndarray  # [blocks, T, B, A]
    target: np.ndarray
    text: np.ndarray  # [blocks, T, B, A, L], right-padded with _PAD
    length: np.ndarray


def draw_operations(load: Load, *, blocks: int, seed: int = 0) -> Operations:
    """The operations of the suite; texts hold half to all of L tokens."""
    rng = np.random.default_rng(seed)
    shape = (blocks, load.turns, load.trajectories, load.actions)
    lengths = rng.integers(-(-load.entry_length // 2), load.entry_length + 1, shape)

    def texts(*leading):
        size = (*leading, load.entry_length)
        return rng.integers(_PAD + 1, VOCAB, size).astype(np.int32)

    written = np.arange(load.entry_length) < lengths[..., None]
    return Operations(
        fill=texts(load.trajectories, load.slots),
        query=texts(load.trajectories),
        kind=rng.choice(list(_MIX), shape, p=list(_MIX.values())).astype(np.int32),
        target=rng.integers(1, load.shown + 1, shape).astype(np.int32),
        text=np.where(written, texts(*shape), _PAD),
        length=lengths.astype(np.int32),
    )


class Ours:
    """The slot tables on the mesh."""

    def __init__(self, load: Load, operations: Operations, mesh: Mesh):
        self._load, self._mesh, self._cursor = load, mesh, 0
        self._embed = HashedBagOfTokens(vocab_size=VOCAB, dim=load.key_dim)
        self._blocks = [self._place(operations, block) for block in range(len(operations.kind))]

        def compile(function, *rows):
            mapped = program.data_parallel(jax.vmap(function), mesh, rows=rows, out=program.ROWS)
            return jax.jit(mapped, donate_argnums=0)

        self._look = compile(self._show, "state")
        self._act = compile(self._transition, "state", "actions")
        self.state = self._start(operations)

    def _place(self, operations: Operations, block: int) -> list[Actions]:
        """Actions [B] of each turn, on the devices."""
        o, shape = operations, operations.kind.shape[2:]
        return [
            host_batches.shard(
                Actions(
                    kind=o.kind[block, turn],
                    target=o.target[block, turn],
                    text=o.text[block, turn],
                    length=o.length[block, turn],
                    well_formed=np.ones(shape, bool),
                    count=np.full(shape[0], shape[1], np.int32),
                ),
                self._mesh,
            )
            for turn in range(o.kind.shape[1])
        ]

    def _start(self, operations: Operations):
        """Tables filled by creates, and the first query."""
        length = self._load.entry_length
        # How it is searched and what gives way are no sizes of a table.
        no_sizes = {"eviction", "weighting", "embedding", "encoder"}
        fields = dataclasses.asdict(self._load.sizes).items()
        sizes = {name: value for name, value in fields if name not in no_sizes}

        def start(texts, query):
            slots = texts.shape[0]
            creates = Actions(
                kind=jnp.full(slots, int(ActionKind.CREATE), jnp.int32),
                target=jnp.zeros(slots, jnp.int32),
                text=texts,
                length=jnp.full(slots, length, jnp.int32),
                well_formed=jnp.ones(slots, bool),
                count=jnp.int32(slots),
            )
            state, _ = self._transition(slot_table.init(**sizes, pad_id=_PAD), creates)
            return slot_table.set_query(state, query, jnp.int32(length), _PAD)

        fill = program.data_parallel(
            jax.vmap(start), self._mesh, rows=("texts", "query"), out=program.ROWS
        )
        return jax.jit(fill)(*host_batches.shard((operations.fill, operations.query), self._mesh))

    def _transition(self, state, actions):
        return slot_table.transition(
            state,
            actions,
            permitted=permitted_kinds(Phase.READING),
            eviction=self._load.sizes.eviction,
            embed=self._embed,
            pad_id=_PAD,
        )

    def _show(self, state):
        state, _ = slot_table.retrieve(state, self._embed)
        return state, slot_table.observe(state, _PAD)[0]

    def run(self, _: Any = None) -> list:
        """Plays the next block; returns what was shown and the reports, turn by turn."""
        results = []
        for actions in self._blocks[self._cursor]:
            self.state, shown = self._look(self.state)
            self.state, report = self._act(self.state, actions)
            results.append((shown, report))
        self._cursor += 1
        jax.block_until_ready((self.state, results))
        return results

    def tables(self) -> list[list[tuple[int, ...]]]:
        """The text in each slot of each trajectory; () in a free one."""
        entries, valid = jax.device_get((self.state.entries, self.state.valid))
        return _list_tables(entries, valid, _PAD)


class PerTrajectory:
    """A Python object a trajectory, with an index of its own."""

    def __init__(self, load: Load, operations: Operations, index: Any):
        self._embed = HostEmbedding(HashedBagOfTokens(vocab_size=VOCAB, dim=load.key_dim))
        self._cursor, self._slots = 0, load.slots
        self._blocks = _list_actions(operations)
        self._permitted = [PERMITTED[Phase.READING]] * load.trajectories
        self.memories = []
        for texts, query in zip(operations.fill, operations.query, strict=True):
            table = HostMemory(load.sizes, index)
            table.fill(texts.tolist(), self._embed.embed_padded(texts))
            table.set_query(query.tolist())
            self.memories.append(table)

    def run(self, _: Any = None) -> list:
        results = []
        for actions in self._blocks[self._cursor]:
            shown = retrieve_all(self.memories, self._embed)
            applied = apply_all(self.memories, actions, self._permitted, self._embed)
            results.append((shown, applied))
        self._cursor += 1
        return results

    def tables(self) -> list[list[tuple[int, ...]]]:
        return [
            [tuple(table.entries.get(slot, ())) for slot in range(self._slots)]
            for table in self.memories
        ]


class Vectorised:
    """`NumpyTables` for all trajectories."""

    def __init__(self, load: Load, operations: Operations):
        embed = HostEmbedding(HashedBagOfTokens(vocab_size=VOCAB, dim=load.key_dim))
        self._tables = NumpyTables(load.trajectories, load.sizes, embed, VOCAB)
        self._operations, self._cursor = operations, 0
        self._text = np.where(operations.text == _PAD, VOCAB, operations.text)
        self._permitted = np.asarray(permitted_kinds(Phase.READING))
        keys = embed.embed_padded(operations.fill.reshape(-1, load.entry_length))
        self._tables.fill(operations.fill, keys.reshape(*operations.fill.shape[:2], -1))
        self._tables.set_query(np.arange(load.trajectories), operations.query)

    def run(self, _: Any = None) -> list:
        results, o = [], self._operations
        for turn in range(o.kind.shape[1]):
            at = (self._cursor, turn)
            shown = self._tables.retrieve()
            applied = self._tables.transition(
                o.kind[at], o.target[at], self._text[at], self._permitted
            )
            results.append((shown, applied))
        self._cursor += 1
        return results

    def tables(self) -> list[list[tuple[int, ...]]]:
        return _list_tables(self._tables.entries, self._tables.valid, VOCAB)


def _list_tables(entries, valid, pad) -> list[list[tuple[int, ...]]]:
    return [
        [
            tuple(token for token in row if token != pad) if used else ()
            for row, used in zip(rows, flags, strict=True)
        ]
        for rows, flags in zip(entries.tolist(), valid.tolist(), strict=True)
    ]


def _list_actions(o: Operations) -> list[list[list[list[HostAction]]]]:
    """[blocks][turns][B][A] of parsed actions."""

    def read(kind, target, text, length):
        return [
            HostAction(ActionKind(k), t, words[:n])
            for k, t, words, n in zip(kind, target, text, length, strict=True)
        ]

    columns = (o.kind.tolist(), o.target.tolist(), o.text.tolist(), o.length.tolist())
    return [
        [[read(*row) for row in zip(*turn, strict=True)] for turn in zip(*block, strict=True)]
        for block in zip(*columns, strict=True)
    ]


def make_peer(name: str, load: Load, operations: Operations) -> tuple[Any, timing.Contestant]:
    """A peer and how to run it. Raises ImportError where its library is missing."""
    if name == "faiss":
        import faiss

        # Threads only slow a single query down: 8 instead of 6 us on an idle machine of two
        # cores, and several times more on a busy one.
        faiss.omp_set_num_threads(1)
        peer = PerTrajectory(load, operations, FaissIndex)
        return peer, timing.Contestant(peer.run)
    if name == "numpy":
        vectorised = Vectorised(load, operations)
        return vectorised, timing.Contestant(vectorised.run)
    peer = PerTrajectory(load, operations, NumpyIndex)
    return peer, timing.Contestant(peer.run)


def run(load: Load, mesh: Mesh, *, runs: int, peers=PEERS, one_core: bool = True) -> timing.Result:
    """All comparisons of the suite: on all cores and, where the system can, on one."""
    operations = draw_operations(load, blocks=(runs + 1) * (1 + one_core))
    ours = Ours(load, operations, mesh)
    contestants, players, results = {"ours": timing.Contestant(ours.run)}, {}, {}
    for name in peers:
        try:
            players[name], contestants[name] = make_peer(name, load, operations)
        except ImportError as error:
            results[name] = timing.missing(error)
    work = load.trajectories * load.turns

    def compare(suffix: str) -> None:
        seconds = timing.measure(contestants, runs=runs, label=f"memory{suffix}")
        for name in players:
            results[name + suffix] = timing.compare(
                seconds["ours"], seconds[name], work=work, unit="turns"
            )

    compare("")
    if one_core:
        with timing.one_core() as confined:
            if confined:
                compare("_one_core")
    tables = ours.tables()
    for name, player in players.items():
        same = [a == b for a, b in zip(tables, player.tables(), strict=True)]
        results[name]["same_tables"] = float(np.mean(same))
    return results
