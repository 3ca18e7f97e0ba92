"""Responders for `host_agent` that run our own model: what the host loop costs, and nothing else.

`HostLoop` is `sampling.prefill` and `sampling.decode_step` as two jitted programs with the host in
between, which looks at every token. `WholeGenerate` calls `sampling.generate`, one program a turn.
Both draw with the keys of `rollout.run`, so their trajectories are those of the jitted episode.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from atommem_jax.learning import rollout
from atommem_jax.model import attention, groups, sampling
from atommem_jax.model.sampling import Agent, Decoder, DecodeState
from atommem_jax.parallel import host_batches, program
from atommem_jax.types import Phase, Response
from experiments.benchmarks.host_agent import Reply, Text

PROMPTS = ("prompt", "lengths", "phase", "keys")
"""What of the arguments of these functions has a row for every prompt."""


def prefill(decoder: Decoder, prompt, lengths, phase, keys) -> DecodeState:
    """`sampling.prefill`; rows in Phase.DONE are padding."""
    return sampling.prefill(decoder, prompt, lengths, phase, keys, phase == Phase.DONE)


def generate(decoder: Decoder, prompt, lengths, phase, keys) -> Response:
    """`sampling.generate`; rows in Phase.DONE are padding."""
    return sampling.generate(decoder, prompt, lengths, phase, keys, phase == Phase.DONE)


class _Responder:
    """Pads the live trajectories to batches of fixed shape; subclasses answer a batch."""

    def __init__(self, agent: Agent, params: Any, mesh: Mesh, *, rows: int, width: int):
        """rows: of a batch, over all devices; width: P."""
        self._mesh, self._rows = mesh, rows
        multiple = attention.row_multiple(agent.model.config.attention, width)
        self._widths = groups.list_widths(width, multiple, agent.sampler.prompt_buckets)
        self._agent, self._params = host_batches.replicate((agent, params), mesh)
        self._pad = agent.grammar.pad_id
        self._fold = jax.jit(
            lambda seed, ids, turn: rollout.turn_keys(rollout.trajectory_keys(seed, ids), turn)
        )

    def play_with(self, ids: np.ndarray, seed: Any, temperature: float) -> "_Responder":
        """Sets the trajectory ids, the key and the temperature of the episodes to come."""
        self._ids, self._seed = ids, seed
        heat = host_batches.replicate(np.float32(temperature), self._mesh)
        self._decoder = jax.jit(sampling.make_decoder)(self._agent, self._params, heat)
        return self

    def __call__(
        self, prompts: list[Text], phases: list[Phase], rows: list[int], turn: int
    ) -> list[Reply]:
        replies: list[Reply] = []
        for first in range(0, len(prompts), self._rows):
            part = slice(first, first + self._rows)
            replies += self._answer(prompts[part], phases[part], self._ids[rows[part]], turn)
        return replies

    def _answer(self, prompts, phases, ids, turn) -> list[Reply]:
        count, longest = len(prompts), max(map(len, prompts))
        width = next(width for width in self._widths if width >= longest)
        prompt = np.full((self._rows, width), self._pad, np.int32)
        lengths, phase = np.zeros(self._rows, np.int32), np.full(self._rows, int(Phase.DONE))
        padded = np.zeros(self._rows, np.int32)
        for row, tokens in enumerate(prompts):
            lengths[row] = len(tokens)
            prompt[row, width - len(tokens) :] = tokens
        phase[:count], padded[:count] = phases, ids
        keys = self._fold(self._seed, padded, np.int32(turn))
        inputs = host_batches.shard((prompt, lengths, phase.astype(np.int32), keys), self._mesh)
        tokens, log_probs = self._generate(*inputs)
        replies = []
        for ids_, values in zip(tokens[:count].tolist(), log_probs[:count].tolist(), strict=True):
            end = ids_.index(self._pad) if self._pad in ids_ else len(ids_)
            replies.append(Reply(ids_[:end], values[:end]))
        return replies

    def _generate(self, prompt, lengths, phase, keys) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


class HostLoop(_Responder):
    """Two jitted programs, and a look at every token."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._prefill = jax.jit(
            program.data_parallel(prefill, self._mesh, rows=PROMPTS, out=program.ROWS)
        )
        self._step = jax.jit(
            program.data_parallel(
                sampling.decode_step, self._mesh, rows=("state",), out=program.ROWS
            ),
            donate_argnames="state",
        )

    def _generate(self, prompt, lengths, phase, keys):
        state = self._prefill(self._decoder, prompt, lengths, phase, keys)
        while not jax.device_get((state.tokens, state.log_probs, state.done))[2].all():
            state = self._step(self._decoder, state)
        return jax.device_get((state.tokens, state.log_probs))


class WholeGenerate(_Responder):
    """One jitted program a turn."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._run = jax.jit(
            program.data_parallel(generate, self._mesh, rows=PROMPTS, out=program.ROWS)
        )

    def _generate(self, prompt, lengths, phase, keys):
        response = self._run(self._decoder, prompt, lengths, phase, keys)
        return jax.device_get((response.tokens, response.log_probs))
