"""The library from Python: load an agent, let it read, ask it, and play it on many episodes.

    import atommem_jax as am
    agent = am.load("runs/demo")
    memory = agent.read(open("notes.txt").read())
    agent.answer(memory, "Which city does Saltan work in?").text

Nothing is printed. Mistakes are `ConfigError`s that say what was found and what to pass instead.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from atommem_jax.agent import load as load_lib
from atommem_jax.config import ConfigError, Experiment, check
from atommem_jax.documents.memory_file import Memory
from atommem_jax.documents.reader import Answer, Reader, Turn
from atommem_jax.learning import evaluation
from atommem_jax.parallel import host_batches
from atommem_jax.parallel.mesh import batch_shards
from atommem_jax.tasks import batches, encoding
from atommem_jax.tasks.schema import Example
from atommem_jax.types import Episode, Phase, Trajectory


def load(
    path: str | PathLike[str],
    step: str | int = "last",
    *,
    settings: Mapping[str, Any] | None = None,
    base: str = "",
    chunk_tokens: int | None = None,
    question_tokens: int | None = None,
    cpu_devices: int = 2,
) -> "Agent":
    """An agent from a checkpoint, ready to read, answer and play.

    Args:
      path: the workdir of a training run or of a converted model, its folder of checkpoints, or
        one step in it.
      step: of a workdir: 'last', 'best' (on the validation split) or a number.
      settings: other sizes than the checkpoint's, such as {"memory.slots": 32}: fields of
        `task`, `memory`, `rollout` and `eval`.
      base: what a run with adapters was trained on, where that is no longer at its `init_from`.
      chunk_tokens: how many tokens are read at a time, at the most; by default as in training.
      question_tokens: how many a question may have; by default as in training.
      cpu_devices: into how many devices a host without an accelerator is split, for `Agent.play`.
        It has no effect once JAX has been used.

    Raises ConfigError where there is no such checkpoint, or a setting cannot be.
    """
    texts = [f"{field}={value}" for field, value in (settings or {}).items()]
    with _plain_errors():
        loaded = load_lib.load(fspath(path), str(step), cpu_devices, base=base, settings=texts)
    return Agent(loaded, chunk_tokens=chunk_tokens, question_tokens=question_tokens)


class Agent:
    """A trained agent. Nothing that it does changes it.

    Attributes:
      config: the experiment that it was trained in.
      step: of its checkpoint.
    """

    def __init__(
        self,
        loaded: load_lib.Loaded,
        *,
        chunk_tokens: int | None = None,
        question_tokens: int | None = None,
    ):
        """See `load`, which makes one."""
        self._loaded = loaded
        self._limits = {"chunk_tokens": chunk_tokens, "question_tokens": question_tokens}
        self.config: Experiment = loaded.parts.config
        self.step: int = loaded.step

    def __repr__(self) -> str:
        return f"Agent(step {self.step} of {self._loaded.workdir})"

    # ---------------------------------------------------------------------------------------------
    # One document

    def read(
        self,
        text: str,
        *,
        questions: Sequence[str] = (),
        memory: Memory | None = None,
        name: str = "text",
        on_turn: Callable[[Turn], Any] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Memory:
        """Reads a text of any length, part by part; returns what is remembered of it.

        Args:
          text: prose, Markdown, or sentences in lines.
          questions: that are known while it is read, so that the agent can tell what matters. They
            are not answered here: see `answer`.
          memory: to go on from; by default an empty one.
          name: of the text, kept in `Memory.documents`.
          on_turn: is called after every turn; `on_turn=print` shows what the agent does.
          temperature: 0 takes the likeliest tokens.
          seed: of sampling, where the temperature is above 0.

        Raises ConfigError for a text without anything to read, a question that is too long, and a
        memory of another kind of agent.
        """
        check(
            not isinstance(questions, str),
            f"questions={questions!r}: is one text; pass a list of them",
        )
        parts = [(name, part) for part in self._reader.split(name, text)]
        reading = self._reader.begin(parts, questions, memory, temperature=temperature, seed=seed)
        for turn in reading.turns(until=Phase.ANSWERING):
            if on_turn is not None:
                on_turn(turn)
        return reading.memory

    def answer(
        self,
        memory: Memory,
        question: str,
        *,
        on_turn: Callable[[Turn], Any] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Answer:
        """Answers a question from a memory, which stays as it is. Arguments are those of `read`.

        Raises ConfigError for a question that is empty or too long, and for a memory of another
        kind of agent.
        """
        reading = self._reader.begin([], [question], memory, temperature=temperature, seed=seed)
        for turn in reading.turns():
            if on_turn is not None:
                on_turn(turn)
        (answer,) = reading.answers()
        return answer

    def load_memory(self, path: str | PathLike[str]) -> Memory:
        """What `Memory.save` wrote.

        Raises ConfigError where there is none, or it is of another kind of agent.
        """
        return self._reader.load_memory(fspath(path))

    @functools.cached_property
    def _reader(self) -> Reader:
        return Reader(self._loaded, **self._limits)

    # ---------------------------------------------------------------------------------------------
    # Many episodes

    def play(
        self,
        episodes: Sequence[Example] | Episode,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        ids: Int[np.ndarray, " B"] | Sequence[int] | None = None,
    ) -> Trajectory:
        """Plays B episodes in one compiled program, shared by the devices that there are.

        Args:
          episodes: examples of a data set, or what `encode` made of them.
          seed: of sampling.
          temperature: 0 takes the likeliest tokens.
          ids: a number of each trajectory. With the seed it determines its randomness, whoever else
            is in the batch; by default 0, 1, ...

        Returns the trajectories, each leaf with a leading B; `answers_of` gives their answers.

        Raises ValueError where there are no episodes, or as many ids as there are none.
        """
        if not isinstance(episodes, Episode):
            episodes = self.encode(episodes)
        count = episodes.id.shape[0]
        numbers = np.arange(count, dtype=np.int32) if ids is None else np.asarray(ids, np.int32)
        if not count or numbers.shape != (count,):
            raise ValueError(
                f"ids have the shape {numbers.shape}, and there are {count} episodes; pass one or "
                "more episodes, and one id for each"
            )
        mesh = self._loaded.mesh
        # Every device plays as many: the last episode is played again, and dropped, to fill up.
        rows = np.minimum(
            np.arange(-(-count // batch_shards(mesh)) * batch_shards(mesh)), count - 1
        )
        batch = jax.tree.map(lambda x: np.asarray(x)[rows], (episodes, numbers))
        play = self._loaded.player(_measure(episodes))
        trajectories = play(
            self._loaded.params,
            *host_batches.shard(batch, mesh),
            host_batches.replicate(jax.random.key(seed), mesh),
            host_batches.replicate(np.float32(temperature), mesh),
        )
        return host_batches.first_rows(trajectories, count)

    def encode(self, examples: Sequence[Example]) -> Episode:
        """Examples as arrays, each with a leading B; all that were not longer than those of the
        training share a compiled program.

        Raises ValueError, naming the example, for one without facts or questions.
        """
        tokenizer, trained = self._loaded.parts.tokenizer, self._loaded.trained_shape
        shape = encoding.fit_shape(examples, tokenizer)
        shape = shape.join(trained) if trained else shape
        encoded = batches.EncodedDataset(examples, tokenizer, shape, cache_bytes=0)
        return encoded.stack(range(len(examples))).episodes

    def answers_of(self, trajectories: Trajectory) -> list[list[str]]:
        """The answer to each question of each trajectory; '' where none was given."""
        answers, lengths, numbers, live = jax.device_get(
            (
                trajectories.answers,
                trajectories.answer_lengths,
                trajectories.turns.question,
                trajectories.turns.live,
            )
        )
        texts = evaluation.decode_answers(answers, lengths, self._loaded.parts.tokenizer.decode)
        put = np.where(live, numbers, -1).max(axis=1) + 1  # questions are put in order
        return [row[:count] for row, count in zip(texts, put, strict=True)]


def _measure(episodes: Episode) -> encoding.EpisodeShape:
    """The static sizes of encoded episodes."""
    notes = episodes.annotations
    return encoding.EpisodeShape(
        chunks=episodes.chunks.shape[-2],
        chunk_length=episodes.chunks.shape[-1],
        facts=notes.start.shape[-1],
        questions=episodes.questions.shape[-2],
        question_length=episodes.questions.shape[-1],
        needs=notes.needs.shape[-1],
        answer_length=notes.gold.shape[-1],
        query_length=notes.focus.shape[-1],
        note_length=notes.note.shape[-1],
    )


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors of `agent.load` name the flags of the scripts; here they are arguments."""
    try:
        yield
    except ConfigError as error:
        message = str(error).replace("--set=", "settings: ")
        raise type(error)(re.sub(r"--(?=[a-z])", "", message)) from error
