"""Evaluation on documents without end: segment after segment, in the memory of one.

A segment is a fixed number of turns in one jitted program (`rollout.run_segment`). Between two of
them only the environments stay on the devices, and of the document only the window that the next
segment may need is made (`encoding.EpisodeStream`). Of the turns are kept those in which something
was written, a fact was read or a question put: enough to tell where a wrong answer broke.

Where it stands can be written down after any segment (`Saved`) and taken up again: trajectories
are those of a rollout over the whole, whatever the length of a segment and wherever it was killed.
"""

import base64
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from atommem_jax.learning import evaluation, reward
from atommem_jax.learning.environment import Environment
from atommem_jax.learning.evaluation import Record
from atommem_jax.parallel import host_batches, processes
from atommem_jax.tasks.batches import StreamBatch
from atommem_jax.types import EMPTY, Actions, Episode, Phase, Report, Trajectory, Turns

SEGMENTS_BETWEEN_SAVES = 32
"""So that what is lost with a killed process is a minute or so."""


class Player(Protocol):
    """Plays a batch of long episodes; jitted."""

    turns: int  # of a segment

    def start(self, episodes: Episode) -> Environment:
        """Environments [B] before the first turn."""

    def play(
        self, env: Environment, episodes: Episode, ids: Int[Array, " B"], first_turn: int
    ) -> tuple[Environment, Turns]:
        """Environments after the segment whose first turn has that number, and its turns [B T]."""


@dataclasses.dataclass
class Saved:
    """Where an evaluation stands, between two segments; `dataclasses.asdict` is JSON-able."""

    batch: int = 0  # number of the batch of documents
    turn: int = 0  # turns played of it
    chunks: list[int] = dataclasses.field(default_factory=list)  # next to read, of each row
    environments: str = ""  # leaves, see `_pack`; '' before the first turn
    played: list[int] = dataclasses.field(default_factory=list)  # turns, of each row
    handled: list[evaluation.Handled] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)  # turns of each row, see `_pack`
    records: list[Record] = dataclasses.field(default_factory=list)  # of the batches before
    sums: dict[str, float] = dataclasses.field(default_factory=dict)  # see `evaluation.tally`
    episodes: int = 0  # of the batches before
    tokens: int = 0  # of documents that this process has read


@dataclasses.dataclass(frozen=True)
class LongEvaluation:
    """How documents are played, and who is told of it; every process does the same.

    Attributes:
      player: of an agent, or of a workflow.
      decode: token ids -> text.
      mesh: what the batches are sharded over.
      metric: the reward of the task.
      eviction: of the memory that is played with; '' leaves out where wrong answers broke.
      save: is called now and then with where it stands.
      on_turns: is handed the turns of each segment, on the host, with the batch and how many of its
        rows are real.
      on_tokens: is told how many tokens of documents this process has read since the last call.
    """

    player: Player
    decode: Callable[[Any], str]
    mesh: Mesh
    metric: reward.Metric = reward.exact_match
    eviction: str = ""
    save: Callable[[Saved], None] | None = None
    on_turns: Callable[[StreamBatch, int, Turns], None] | None = None
    on_tokens: Callable[[int], None] | None = None

    def run(
        self, batches: Iterable[tuple[StreamBatch, int]], saved: Saved | None = None
    ) -> tuple[list[Record], dict[str, float]]:
        """Plays every sample once, as `evaluation.evaluate` does, and returns what it does.

        Args:
          batches: from `tasks.batches.stream_split`, with the rows of this process.
          saved: where a killed evaluation of the same stood; None begins.
        """
        saved = saved or Saved()
        for number, (batch, real) in enumerate(batches):
            if number < saved.batch:
                continue
            self._play(batch, real, saved)
            saved = Saved(
                batch=number + 1,
                records=saved.records,
                sums=saved.sums,
                episodes=saved.episodes + real,
                tokens=saved.tokens,
            )
            if self.save is not None:
                self.save(saved)
        records = evaluation.merge(processes.gather(saved.records))
        means = evaluation.describe(saved.sums, max(saved.episodes, 1)) if saved.sums else {}
        return records, {name: float(value) for name, value in means.items()}

    def _play(self, batch: StreamBatch, real: int, saved: Saved) -> None:
        """A batch to its end, or on from where `saved` stands, which is brought up to date."""
        count = len(batch.aliases)
        rows = host_batches.process_rows(self.mesh, host_batches.whole_size(self.mesh, count))
        trajectories = (saved.episodes + rows).astype(np.int32)
        ids = host_batches.shard(trajectories, self.mesh)
        mine = int((rows < real).sum())  # rows are ascending
        saved.played = saved.played or [0] * count
        saved.handled = saved.handled or [[] for _ in range(count)]
        kept = [_unpack_turns(text) for text in saved.kept] or [[] for _ in range(count)]
        for stream, before in zip(batch.streams, kept, strict=True):
            stream.mark(_find_chunks(before))
        window = batch.window(np.array(saved.chunks or [0] * count))
        episodes = host_batches.shard(window, self.mesh)
        env = self.player.start(episodes)
        if saved.environments:
            held = _unpack(saved.environments, host_batches.fetch(env))
            env = host_batches.shard(held, self.mesh)
        for segment in itertools.count(1):
            env, turns = self.player.play(env, episodes, ids, saved.turn)
            _add(saved.sums, evaluation.tally(host_batches.first_rows(turns, real)))
            turns = host_batches.fetch(turns)
            if self.on_turns is not None:
                self.on_turns(batch, mine, turns)
            _note(saved, turns, window)
            _keep(kept, turns, window, batch)
            saved.turn += self.player.turns
            read = batch.tokens_read.sum()
            phases, chunks = host_batches.fetch((env.phase, env.chunk))
            window = batch.window(chunks)
            more = int(batch.tokens_read.sum() - read)
            saved.tokens += more
            if self.on_tokens is not None:
                self.on_tokens(more)
            if (host_batches.gather_rows(phases, self.mesh) == Phase.DONE).all():
                break
            episodes = host_batches.shard(window, self.mesh)
            if self.save is not None and segment % SEGMENTS_BETWEEN_SAVES == 0:
                saved.chunks = chunks.tolist()
                saved.environments = _pack(host_batches.fetch(env))
                saved.kept = [_pack(_join_turns(row) if row else []) for row in kept]
                self.save(saved)
        found = self._score(batch, host_batches.fetch(env), saved, kept, trajectories)
        saved.records += [record for row in found[:mine] for record in row]

    def _score(
        self,
        batch: StreamBatch,
        env: Environment,
        saved: Saved,
        kept: Sequence[list[Turns]],
        trajectories: Int[np.ndarray, " B"],
    ) -> list[list[Record]]:
        """The records of a batch whose trajectories are over."""
        given = evaluation.Given(
            np.asarray(env.answers),
            np.asarray(env.answer_lengths),
            np.asarray(env.answer_log_prob),
            np.array(saved.played),
            saved.handled,
        )
        found = evaluation.make_records(
            given, batch.questions, batch.aliases, batch.ids, trajectories, self.decode, self.metric
        )
        if self.eviction:
            for b, records in enumerate(found):
                row = jax.tree.map(lambda leaf, b=b: leaf[b], env)
                digest = make_digest(int(trajectories[b]), row, kept[b])
                evaluation.tell_paths(
                    [records],
                    jax.tree.map(lambda leaf: np.asarray(leaf)[None], digest),
                    jax.tree.map(lambda leaf: leaf[None], batch.streams[b].digest()),
                    self.decode,
                    self.eviction,
                )
        return found


def make_digest(number: int, env: Environment, kept: Sequence[Turns]) -> Trajectory:
    """The turns of a long trajectory that were kept, as a trajectory of an `EpisodeStream.digest`.

    Args:
      number: id of the trajectory.
      env: at its end, without a leading axis.
      kept: turns without a leading axis, in their order.
    """
    turns = _join_turns(kept)
    numbers = np.array(_find_chunks(kept), np.int64)
    chunk = np.where(turns.chunk == EMPTY, EMPTY, np.searchsorted(numbers, turns.chunk))
    return Trajectory(
        id=jnp.int32(number),
        turns=turns.replace(chunk=chunk.astype(np.int32)),
        answers=env.answers,
        answer_lengths=env.answer_lengths,
        answer_log_prob=env.answer_log_prob,
        memory=env.memory,
    )


def _note(saved: Saved, turns: Turns, window: Episode) -> None:
    """What a segment came to, of each row."""
    played = np.asarray(turns.live).sum(axis=1)
    saved.played = [before + int(new) for before, new in zip(saved.played, played, strict=True)]
    found = evaluation.find_handling(
        turns, np.asarray(window.annotations.category), np.asarray(window.first_chunk)
    )
    pairs = zip(saved.handled, found, strict=True)
    saved.handled = [evaluation.join_handling(before, new) for before, new in pairs]


def _keep(kept: list[list[Turns]], turns: Turns, window: Episode, batch: StreamBatch) -> None:
    """Keeps the turns that tell of the memory, and marks their chunks in the documents."""
    # What a prompt was is most of a record, and follows from the rest.
    turns = turns.replace(prompt=np.zeros((*turns.live.shape, 0), np.int32))
    has_fact = (np.asarray(window.annotations.category) != EMPTY).any(axis=2)
    places = np.clip(turns.chunk - np.asarray(window.first_chunk)[:, None], 0, None)
    reads_fact = np.take_along_axis(has_fact, np.minimum(places, has_fact.shape[1] - 1), axis=1)
    tells = turns.live & ((turns.actions.count > 0) | (turns.phase != Phase.READING) | reads_fact)
    for b, row in enumerate(tells):
        at = np.flatnonzero(row)
        if at.size:
            kept[b].append(jax.tree.map(lambda leaf, b=b, at=at: leaf[b, at], turns))
            numbers = turns.chunk[b, at]
            batch.streams[b].mark(numbers[numbers != EMPTY].tolist())


def _join_turns(parts: Sequence[Turns]) -> Turns:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _find_chunks(parts: Sequence[Turns]) -> list[int]:
    """The numbers of the chunks that turns have read, ascending."""
    return sorted({int(n) for part in parts for n in np.asarray(part.chunk) if n != EMPTY})


def _add(sums: dict[str, float], more: dict[str, Any]) -> None:
    for name, value in jax.device_get(more).items():
        sums[name] = sums.get(name, 0.0) + float(value)


def _pack(tree: Any) -> str:
    """The leaves of a tree of host arrays as text."""
    file = io.BytesIO()
    np.savez_compressed(file, *jax.tree.leaves(tree))
    return base64.b64encode(file.getvalue()).decode()


def _read_leaves(text: str) -> list[np.ndarray]:
    with np.load(io.BytesIO(base64.b64decode(text))) as file:
        return [file[f"arr_{i}"] for i in range(len(file.files))]


def _unpack_turns(text: str) -> list[Turns]:
    """The turns of one row that were packed; none where there were none."""
    leaves = _read_leaves(text)
    if not leaves:
        return []
    nested: dict[str, Any] = {"actions": _name_fields(Actions), "report": _name_fields(Report)}
    structure = jax.tree.structure(Turns(**{**vars(_name_fields(Turns)), **nested}))
    return [jax.tree.unflatten(structure, leaves)]


def _name_fields(kind: Any) -> Any:
    """One of its kind, that holds nothing but the names of its fields."""
    return kind(**{field.name: field.name for field in dataclasses.fields(kind)})


def _unpack(text: str, like: Any) -> Any:
    """The tree whose leaves were packed; `like` is another of the same structure.

    Raises ValueError where shapes differ.
    """
    leaves = _read_leaves(text)
    old, structure = jax.tree.flatten(like)
    if [leaf.shape for leaf in old] != [leaf.shape for leaf in leaves]:
        raise ValueError("what was saved of this evaluation is of another agent; remove it")
    return jax.tree.unflatten(structure, leaves)
