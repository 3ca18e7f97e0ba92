"""One trajectory, played turn by turn on the host: for documents of a person, and for policies
that are no JAX program.

The same functions as in training do everything but the responding (`rollout.look`, `rollout.act`),
so prompts, parsing and memory are those of training, token for token.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atommem_jax.learning import environment, rollout
from atommem_jax.model import attention, groups
from atommem_jax.model.sampling import Agent
from atommem_jax.types import Episode, MemoryState, Phase, Response, Trajectory, Turns, View

BUCKETS = (2, 4, 6, 8)
"""Eighths of the prompt's width into which `model_responder` sorts prompts."""

Respond = Callable[[View, jax.Array], Response]
"""(view [1], key [1]) -> response [1] of one turn."""


class Turn(NamedTuple):
    """What a turn was like."""

    seen: rollout.Seen  # leaves lead with 1
    before: MemoryState  # after retrieval, as the turn saw it; no leading axis
    after: MemoryState
    record: Turns  # no leading axis


class Session:
    """Plays one episode. Iterate over `turns`; then `trajectory` is the whole of it.

    Args:
      setting: sizes and grammar.
      respond: the policy.
      episode: without a leading axis; of a long document the first window.
      window: (number of a chunk) -> the window from there on, where the document has more chunks
        than `episode` holds.
      max_turns: after which nothing is played any more; by default those of the setting.
      keep: whether the records of turns are kept, which `trajectory` needs.
      table: what is remembered before the first turn; None for an empty memory.
      trajectory_id: with `seed` it determines all randomness, as in `rollout.run`.
      seed: of sampling.
    """

    def __init__(
        self,
        setting: environment.Setting,
        respond: Respond,
        episode: Episode,
        *,
        window: Callable[[int], Episode] | None = None,
        max_turns: int | None = None,
        keep: bool = True,
        table: MemoryState | None = None,
        trajectory_id: int = 0,
        seed: int = 0,
    ):
        self.setting, self.respond = setting, respond
        self._window, self._keep = window, keep
        self._max_turns = setting.limits.max_turns if max_turns is None else max_turns
        self._last_held = -1
        self._hold(episode)
        self._ids = jnp.asarray([trajectory_id], jnp.int32)
        self._key = jax.random.fold_in(jax.random.key(seed), trajectory_id)
        self._env = _start(setting, self.episode, table)
        self._records: list[Turns] = []
        self._played = 0

    def _hold(self, episode: Episode) -> None:
        self.episode = jax.tree.map(lambda x: jnp.asarray(x)[None], episode)
        self._last_held = int(episode.first_chunk) + episode.chunks.shape[0] - 1

    @property
    def memory(self) -> MemoryState:
        """As it is now; no leading axis."""
        return _first(self._env.memory)

    def turns(self, until: Phase = Phase.DONE) -> Iterator[Turn]:
        """Plays the turns that are left, up to `max_turns`, each when it is asked for.

        until: the phase to stop at, before any of its turns.
        """
        while self._played < self._max_turns:
            if int(self._env.phase[0]) >= until:
                return
            if self._window is not None and int(self._env.chunk[0]) > self._last_held:
                self._hold(self._window(int(self._env.chunk[0])))
            seen = _look(self.setting, self._env, self.episode)
            key = jax.random.fold_in(self._key, self._played)
            response = self.respond(seen.view, key[None])
            self._env, record = _act(self.setting, self._env, seen, self.episode, response)
            record = jax.device_get(record)
            self._played += 1
            if self._keep:
                self._records.append(record)
            yield Turn(seen, _first(seen.env.memory), self.memory, _first(record))

    def answers(self) -> list[tuple[list[int], float]]:
        """Tokens and log-probability of the answer to each question; no tokens where none is."""
        env = jax.device_get(self._env)
        rows = zip(env.answers[0], env.answer_lengths[0], env.answer_log_prob[0], strict=True)
        return [(row[:length].tolist(), float(log_prob)) for row, length, log_prob in rows]

    def trajectory(self) -> Trajectory:
        """The turns played so far, as a batch of one.

        Raises ValueError before the first, and where records are not kept.
        """
        if not self._records:
            raise ValueError("trajectory: no turn was kept; iterate over turns(), with keep=True")
        records = jax.tree.map(lambda *leaves: np.stack(leaves), *self._records)
        return rollout.finish(self._ids, self._env, records)


def model_responder(agent: Agent, params, temperature: float) -> Respond:
    """The policy of a model; 0 is greedy.

    The prompt width must hold the longest prompt, and most are shorter: their padding is cut to one
    of a few widths, each of which is compiled when it is first needed.
    """
    heat = jnp.asarray(temperature, jnp.float32)
    # Chosen here, so that a width that no prompt needs is not compiled.
    sampler = dataclasses.replace(agent.sampler, prompt_buckets=(8,), group=0)
    agent = dataclasses.replace(agent, sampler=sampler)

    def respond(view: View, keys: jax.Array) -> Response:
        width = choose_width(agent, view.prompt.shape[1], int(view.prompt_length[0]))
        cut = dataclasses.replace(view, prompt=view.prompt[:, view.prompt.shape[1] - width :])
        return _generate(agent, params, cut, keys, heat)

    return respond


def choose_width(agent: Agent, prompt_width: int, length: int) -> int:
    """The least of the widths that holds `length` tokens."""
    multiple = attention.row_multiple(agent.model.config.attention, prompt_width)
    widths = groups.list_widths(prompt_width, multiple, BUCKETS)
    return next((width for width in widths if length <= width <= prompt_width), prompt_width)


@jax.jit
def _generate(agent: Agent, params, view: View, keys, temperature) -> Response:
    policy = rollout.model_policy(agent, params, temperature)
    no_episode: Any = None  # a model looks at nothing but the view
    return policy(view, no_episode, keys)


@jax.jit
def _start(setting, episodes, table):
    begin = functools.partial(environment.start, table=table)
    return jax.vmap(begin, in_axes=(None, 0))(setting, episodes)


_look = jax.jit(rollout.look)
_act = jax.jit(rollout.act)


def _first(tree):
    return jax.tree.map(lambda x: x[0], tree)
