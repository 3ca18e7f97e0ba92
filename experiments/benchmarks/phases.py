"""Where the time goes: each phase of a turn and of an update as a program of its own.

The phases are timed on what a played rollout really holds, turn by turn and micro-batch by
micro-batch. Separate programs pay for their own start and cannot be fused with their neighbours,
so their sum differs from the whole, which is reported beside it.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atommem_jax.language import prompt as prompting
from atommem_jax.learning import loss, rollout
from atommem_jax.learning import optimizer as optimizer_lib
from atommem_jax.memory import slot_table
from atommem_jax.model import sampling
from atommem_jax.parallel import host_batches, program
from atommem_jax.types import ActionKind, Batch, Phase
from experiments.benchmarks import jax_responders, timing
from experiments.benchmarks.rollout_suite import Scene
from experiments.benchmarks.train_suite import Lesson

TURN = ("retrieve", "assemble", "prefill", "decode", "parse", "transition")
UPDATE = ("score", "backward", "optimiser")


class _Clock:
    """Adds up the seconds of calls by name, waiting for each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, function, *arguments) -> Any:
        started = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        elapsed = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
        return result


def _summarise(seconds: dict[str, float], whole: list[float]) -> timing.Result:
    total = sum(seconds.values())
    return {
        "seconds": seconds,
        "share": {name: value / total for name, value in seconds.items()},
        "sum_seconds": total,
        "whole_seconds": statistics.median(whole),
    }


# ---------------------------------------------------------------------------------------------
# A rollout


def measure_rollout(scene: Scene, whole: list[float]) -> timing.Result:
    """Seconds of each phase over a rollout of the scene.

    Plays the first `scene.group` episodes and scales up to all of them.

    Args:
      scene: what is played.
      whole: seconds of the jitted rollout of the whole scene, for comparison.
    """
    rows = scene.group
    programs = _TurnPrograms(scene)
    episodes = host_batches.shard(jax.tree.map(lambda x: x[:rows], scene.episodes), scene.mesh)
    ids = host_batches.shard(scene.ids[:rows], scene.mesh)
    programs.play(episodes, ids, _Clock())  # compiles
    clock = _Clock()
    programs.play(episodes, ids, clock)
    seconds = clock.seconds
    seconds["decode"] = max(seconds.pop("generate") - seconds["prefill"], 0.0)
    share = len(scene.aliases) / rows
    return _summarise({name: seconds[name] * share for name in TURN}, whole)


class _TurnPrograms:
    """The phases of a turn, each jitted over the mesh."""

    def __init__(self, scene: Scene):
        agent, setting = scene.parts.agent, scene.parts.setting(scene.shape)
        self._max_turns, self._mesh = setting.config.max_turns, scene.mesh
        self._agent, self._setting, self._params, self._seed, self._temperature = (
            host_batches.replicate(
                (agent, setting, scene.params, scene.seed, np.float32(scene.temperature)),
                scene.mesh,
            )
        )
        whole, rows = False, True
        self._start = self._jit(_start, whole, rows)
        self._keys = self._jit(_fold_keys, whole, rows, whole)
        self._begin = self._jit(_begin, whole, rows, rows)
        self._end = self._jit(_end, whole, rows, rows, rows, rows)
        self._retrieve = self._jit(_retrieve, whole, rows)
        self._assemble = self._jit(_assemble, whole, rows)
        self._prefill = self._jit(jax_responders.prefill, whole, whole, rows, rows, rows)
        self._generate = self._jit(_generate, whole, whole, rows, rows, whole)
        self._parse = self._jit(_parse, whole, rows)
        self._transition = self._jit(_transition, whole, rows, rows, rows)

    def _jit(self, function, *sharded: bool):
        return jax.jit(
            program.data_parallel(function, self._mesh, sharded=sharded, sharded_out=True)
        )

    def play(self, episodes, ids, clock: _Clock) -> None:
        """Plays to the end as `rollout.run` does, timing the phases of every turn."""
        setting, agent, params = self._setting, self._agent, self._params
        env = self._start(setting, episodes)
        for turn in range(self._max_turns):
            if (jax.device_get(env.phase) == Phase.DONE).all():
                break
            keys = self._keys(self._seed, ids, np.int32(turn))
            clock("retrieve", self._retrieve, setting, env.memory)
            seen, view = jax.block_until_ready(self._begin(setting, env, episodes))
            clock("assemble", self._assemble, setting, view.observation)
            clock(
                "prefill",
                self._prefill,
                agent,
                params,
                view.prompt,
                view.prompt_length,
                view.phase,
            )
            response = clock(
                "generate", self._generate, agent, params, view, keys, self._temperature
            )
            actions = clock("parse", self._parse, setting, response)
            clock("transition", self._transition, setting, seen.memory, actions, env.phase)
            env = jax.block_until_ready(self._end(setting, env, seen, episodes, response))


def _start(setting, episodes):
    return jax.vmap(rollout.start, in_axes=(None, 0))(setting, episodes)


def _fold_keys(seed, ids, turn):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(seed, i), turn))(ids)


def _begin(setting, env, episodes):
    return jax.vmap(rollout.begin_turn, in_axes=(None, 0, 0))(setting, env, episodes)[:2]


def _end(setting, env, seen, episodes, response):
    """The environments after the turn; those that are over stay as they are."""
    new = jax.vmap(rollout.end_turn, in_axes=(None, 0, 0, 0))(setting, seen, episodes, response)[0]
    live = env.phase != Phase.DONE

    def choose(after, before):
        return jnp.where(live.reshape(live.shape + (1,) * (after.ndim - 1)), after, before)

    return jax.tree.map(choose, new, env)


def _retrieve(setting, tables):
    return jax.vmap(slot_table.retrieve, in_axes=(0, None))(tables, setting.embed)


def _assemble(setting, observation):
    def one(template, o):
        return prompting.assemble(template, o, prompt_width=setting.config.prompt_width)

    return jax.vmap(one, in_axes=(None, 0))(setting.template, observation)


def _generate(agent, params, view, keys, temperature):
    skip = view.phase == Phase.DONE
    return sampling.generate(
        agent, params, view.prompt, view.prompt_length, view.phase, keys, temperature, skip
    )


def _parse(setting, response):
    return jax.vmap(setting.grammar.parse)(response.tokens, response.lengths)


def _transition(setting, tables, actions, phase):
    def one(table, actions, phase):
        kind = jnp.arange(len(ActionKind))
        permitted = (kind == ActionKind.ANSWER) == (phase != Phase.READING)
        return slot_table.transition(
            table,
            actions,
            permitted=permitted,
            eviction=setting.config.eviction,
            embed=setting.embed,
            pad_id=setting.pad_id,
        )

    return jax.vmap(one)(tables, actions, phase)


# ---------------------------------------------------------------------------------------------
# An update


def measure_update(scene: Scene, lesson: Lesson, whole: list[float]) -> timing.Result:
    """Seconds of each phase over one update.

    Args:
      scene: agent, parameters and mesh.
      lesson: the rows to learn from.
      whole: seconds of `trainer.update_step` on them, for comparison.
    """
    ppo, mesh = lesson.ppo, scene.mesh
    optimizer = optimizer_lib.make_optimizer(lesson.optimizer, 1)
    agent, params, temperature = host_batches.replicate(
        (scene.parts.agent, scene.params, np.float32(scene.temperature or 1.0)), mesh
    )
    parts = [host_batches.shard(part, mesh) for part in _split(lesson.batch, ppo, mesh.size)]
    flags = (False, False, False, True)

    def objective(params, agent, temperature, part: Batch):
        scores = sampling.score(
            agent,
            params,
            part.prompt,
            part.prompt_lengths,
            part.response,
            part.response_lengths,
            part.phase,
            temperature,
        )
        value, metrics = loss.ppo_loss(
            scores.log_probs,
            part.old_log_probs,
            part.advantages,
            part.weights,
            jnp.float32(lesson.batch.weights.sum()),
            clip_low=ppo.clip_low,
            clip_high=ppo.clip_high,
            dual_clip=ppo.dual_clip or None,
        )
        metrics["entropy"] = loss.masked_sum(scores.entropy, part.weights)
        return value, metrics

    def forward(*arguments):
        return program.psum(objective(*arguments))

    def gradient(*arguments):
        # Not summed over the devices: the trainer does that once a mini-batch, not here.
        return jax.tree.map(lambda g: g[None], jax.grad(objective, has_aux=True)(*arguments)[0])

    score = jax.jit(program.data_parallel(forward, mesh, sharded=flags, sharded_out=False))
    grad = jax.jit(program.data_parallel(gradient, mesh, sharded=flags, sharded_out=True))
    step = jax.jit(
        lambda state, grads: optimizer_lib.apply_gradients(state, grads, optimizer),
        donate_argnums=0,
    )
    state = host_batches.replicate(optimizer_lib.create_state(params, optimizer), mesh)
    # The state is donated, and its parameters with it: the others keep a copy.
    params = jax.tree.map(jnp.copy, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):  # the first compiles
        clock = _Clock()
        for part in parts:
            clock("score", score, params, agent, temperature, part)
            clock("gradient", grad, params, agent, temperature, part)
        for _ in range(ppo.minibatches):
            state, _ = clock("optimiser", step, state, zeros)
    seconds = {name: value * ppo.epochs for name, value in clock.seconds.items()}
    seconds["backward"] = max(seconds.pop("gradient") - seconds["score"], 0.0)
    return _summarise({name: seconds[name] for name in UPDATE}, whole)


def _take(batch: Batch, rows: np.ndarray) -> Batch:
    return jax.tree.map(lambda x: x[rows], batch)


def _split(batch: Batch, ppo, devices: int) -> list[Batch]:
    """Micro-batches of the rows that count, the longest first, prompts cropped to eighths of P."""
    size = ppo.microbatch_rows * devices
    active = np.flatnonzero(np.any(batch.weights * batch.advantages != 0, axis=1))
    active = active[np.argsort(-batch.prompt_lengths[active], kind="stable")]
    parts, full = [], batch.prompt.shape[1]
    for first in range(0, len(active), size):
        rows = active[first : first + size]
        count = len(rows)
        part = _take(batch, np.resize(rows, size))
        part.weights[count:] = 0.0
        part.response_lengths[count:] = 0
        eighths = -(-int(part.prompt_lengths.max()) * 8 // full)
        width = -(-full * eighths // 8)
        parts.append(part.replace(prompt=part.prompt[:, full - width :]))
    return parts
