"""Evaluation on documents without end: segment after segment, in the memory of one.

A segment is a fixed number of turns in one jitted program (`rollout.run_segment`). Between two of
them only the environments stay on the devices, and of the document only the window that the next
segment may need is made (`encoding.EpisodeStream`). Records of turns are handed on, or dropped.

Where it stands can be written down after any segment (`Saved`) and taken up again: trajectories
are those of a rollout over the whole, whatever the length of a segment and wherever it was killed.
"""

import base64
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from atommem_jax.learning import evaluation, reward
from atommem_jax.learning.evaluation import Record
from atommem_jax.learning.rollout import Environment
from atommem_jax.parallel import host_batches, processes
from atommem_jax.tasks.batches import StreamBatch
from atommem_jax.types import Episode, Phase, Turns

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
    records: list[Record] = dataclasses.field(default_factory=list)  # of the batches before
    sums: dict[str, float] = dataclasses.field(default_factory=dict)  # see `evaluation.tally`
    episodes: int = 0  # of the batches before


@dataclasses.dataclass(frozen=True)
class LongEvaluation:
    """How documents are played, and who is told of it; every process does the same.

    Attributes:
      player: of an agent, or of a workflow.
      decode: token ids -> text.
      mesh: what the batches are sharded over.
      metric: the reward of the task.
      save: is called now and then with where it stands.
      on_turns: is handed the turns of each segment, on the host, with the batch and how many of its
        rows are real.
      on_tokens: is told how many tokens of documents this process has read since the last call.
    """

    player: Player
    decode: Callable[[Any], str]
    mesh: Mesh
    metric: reward.Metric = reward.exact_match
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
        mine = rows < real
        saved.played = saved.played or [0] * count
        saved.handled = saved.handled or [[] for _ in range(count)]
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
                self.on_turns(batch, int(mine.sum()), turns)
            _note(saved, turns, window)
            saved.turn += self.player.turns
            before = batch.tokens_read.sum()
            phases, chunks = host_batches.fetch((env.phase, env.chunk))
            window = batch.window(chunks)
            if self.on_tokens is not None:
                self.on_tokens(int(batch.tokens_read.sum() - before))
            if (host_batches.gather_rows(phases, self.mesh) == Phase.DONE).all():
                break
            episodes = host_batches.shard(window, self.mesh)
            if self.save is not None and segment % SEGMENTS_BETWEEN_SAVES == 0:
                saved.chunks = chunks.tolist()
                saved.environments = _pack(host_batches.fetch(env))
                self.save(saved)
        answers, lengths, log_probs = host_batches.fetch(
            (env.answers, env.answer_lengths, env.answer_log_prob)
        )
        given = evaluation.Given(answers, lengths, log_probs, np.array(saved.played), saved.handled)
        found = evaluation.make_records(
            given, batch.questions, batch.aliases, batch.ids, trajectories, self.decode, self.metric
        )
        saved.records += [record for row in np.flatnonzero(mine) for record in found[row]]


def _note(saved: Saved, turns: Turns, window: Episode) -> None:
    """What a segment came to, of each row."""
    played = np.asarray(turns.live).sum(axis=1)
    saved.played = [before + int(new) for before, new in zip(saved.played, played, strict=True)]
    found = evaluation.find_handling(
        turns, np.asarray(window.annotations.category), np.asarray(window.first_chunk)
    )
    pairs = zip(saved.handled, found, strict=True)
    saved.handled = [evaluation.join_handling(before, new) for before, new in pairs]


def _add(sums: dict[str, float], more: dict[str, Any]) -> None:
    for name, value in jax.device_get(more).items():
        sums[name] = sums.get(name, 0.0) + float(value)


def _pack(tree: Any) -> str:
    """The leaves of a tree of host arrays as text."""
    file = io.BytesIO()
    np.savez_compressed(file, *jax.tree.leaves(tree))
    return base64.b64encode(file.getvalue()).decode()


def _unpack(text: str, like: Any) -> Any:
    """The tree whose leaves were packed; `like` is another of the same structure.

    Raises ValueError where shapes differ.
    """
    with np.load(io.BytesIO(base64.b64decode(text))) as file:
        leaves = [file[f"arr_{i}"] for i in range(len(file.files))]
    old, structure = jax.tree.flatten(like)
    if [leaf.shape for leaf in old] != [leaf.shape for leaf in leaves]:
        raise ValueError("what was saved of this evaluation is of another agent; remove it")
    return jax.tree.unflatten(structure, leaves)
