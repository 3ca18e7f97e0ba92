"""Responders for `host_agent` that run our own model: what the host loop costs, and nothing else.

`HostLoop` is prefill and a decode step as two jitted programs with the host in between, which
looks at every token. `WholeGenerate` calls `sampling.generate`, one program a turn. Both draw
with the keys of `rollout.run`, so their trajectories are those of the jitted episode.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from atommem_jax.language import prompt as prompting
from atommem_jax.model import sampling
from atommem_jax.model import transformer as model_lib
from atommem_jax.model.sampling import Agent
from atommem_jax.parallel import host_batches, program
from atommem_jax.types import Phase
from experiments.benchmarks.host_agent import Reply, Text


@flax.struct.dataclass
class Decoding:
    """Where a batch of rows stands between two tokens."""

    last: Float[Array, "B width"]
    cache: model_lib.Cache
    state: Int[Array, " B"]
    done: Bool[Array, " B"]


def _features(agent: Agent, prompt, tokens):
    if not agent.model.config.num_features:
        return None
    return jax.vmap(prompting.match, in_axes=(None, 0, 0))(agent.template, prompt, tokens)


def prefill(agent: Agent, params, prompt, lengths, phase) -> Decoding:
    """Reads prompts [B, P]; rows in Phase.DONE are padding."""
    hidden, cache = agent.model.apply(
        {"params": params},
        prompt,
        prompt.shape[1] - lengths,
        features=_features(agent, prompt, prompt),
        keep_cache=True,
    )
    return Decoding(
        last=hidden[:, -1],
        cache=cache.extend(agent.sampler.response_length),
        state=jax.vmap(agent.grammar.start)(phase),
        done=phase == Phase.DONE,
    )


def decode_step(agent: Agent, params, now: Decoding, prompt, lengths, keys, position, temperature):
    """One token of every row: (Decoding, tokens [B], log-probs [B])."""
    model, grammar, config = agent.model, agent.grammar, agent.sampler
    width, limit = prompt.shape[1], config.response_length
    logits = model.apply({"params": params}, now.last, method="logits")
    if config.constrained:
        mask = jax.vmap(grammar.allowed, in_axes=(0, None))(now.state, limit - position)
    else:
        mask = jnp.broadcast_to(jnp.arange(logits.shape[1]) != grammar.pad_id, logits.shape)
    scale = jnp.where(temperature > 0, temperature, 1.0)
    log_probs = sampling.masked_log_softmax(logits, mask, scale)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)
    token = jax.vmap(
        lambda key, row: sampling.draw(key, row, temperature=temperature, top_p=config.top_p)
    )(row_keys, log_probs)
    chosen = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
    token = jnp.where(now.done, grammar.pad_id, token)
    hidden, cache = model.apply(
        {"params": params},
        token[:, None],
        width - lengths,
        features=_features(agent, prompt, token[:, None]),
        cache=now.cache,
        index=width + position,
    )
    after = Decoding(
        last=hidden[:, 0],
        cache=cache,
        state=jax.vmap(grammar.advance)(now.state, token),
        done=now.done | (token == grammar.eos_id),
    )
    return after, token, chosen


class _Responder:
    """Pads the live trajectories to batches of fixed shape; subclasses answer a batch."""

    def __init__(self, agent: Agent, params: Any, mesh: Mesh, *, rows: int, width: int):
        """rows: of a batch, over all devices; width: P."""
        self._mesh, self._rows, self._width = mesh, rows, width
        self._agent, self._params = host_batches.replicate((agent, params), mesh)
        self._pad, self._limit = agent.grammar.pad_id, agent.sampler.response_length
        self._fold = jax.jit(
            lambda seed, ids, turn: jax.vmap(
                lambda i: jax.random.fold_in(jax.random.fold_in(seed, i), turn)
            )(ids)
        )

    def play_with(self, ids: np.ndarray, seed: Any, temperature: float) -> "_Responder":
        """Sets the trajectory ids, the key and the temperature of the episodes to come."""
        self._ids, self._seed = ids, seed
        self._temperature = host_batches.replicate(np.float32(temperature), self._mesh)
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
        count = len(prompts)
        prompt = np.full((self._rows, self._width), self._pad, np.int32)
        lengths, phase = np.zeros(self._rows, np.int32), np.full(self._rows, int(Phase.DONE))
        padded = np.zeros(self._rows, np.int32)
        for row, tokens in enumerate(prompts):
            lengths[row] = len(tokens)
            prompt[row, self._width - len(tokens) :] = tokens
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
            program.data_parallel(
                prefill, self._mesh, sharded=(False, False, True, True, True), sharded_out=True
            )
        )
        self._step = jax.jit(
            program.data_parallel(
                decode_step,
                self._mesh,
                sharded=(False, False, True, True, True, True, False, False),
                sharded_out=(True, True, True),
            ),
            donate_argnums=2,
        )

    def _generate(self, prompt, lengths, phase, keys):
        now = self._prefill(self._agent, self._params, prompt, lengths, phase)
        tokens = np.full((self._rows, self._limit), self._pad, np.int32)
        log_probs = np.zeros((self._rows, self._limit), np.float32)
        for position in range(self._limit):
            now, token, chosen = self._step(
                self._agent,
                self._params,
                now,
                prompt,
                lengths,
                keys,
                np.int32(position),
                self._temperature,
            )
            tokens[:, position], log_probs[:, position], done = jax.device_get(
                (token, chosen, now.done)
            )
            if done.all():
                break
        return tokens, log_probs


class WholeGenerate(_Responder):
    """One jitted program a turn."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

        def generate(agent, params, prompt, lengths, phase, keys, temperature):
            skip = phase == Phase.DONE
            return sampling.generate(agent, params, prompt, lengths, phase, keys, temperature, skip)

        self._run = jax.jit(
            program.data_parallel(
                generate,
                self._mesh,
                sharded=(False, False, True, True, True, True, False),
                sharded_out=True,
            )
        )

    def _generate(self, prompt, lengths, phase, keys):
        response = self._run(
            self._agent, self._params, prompt, lengths, phase, keys, self._temperature
        )
        return jax.device_get((response.tokens, response.log_probs))
