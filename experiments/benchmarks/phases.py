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
from atommem_jax.learning import environment, rollout, trainer
from atommem_jax.learning import optimizer as optimizer_lib
from atommem_jax.memory import slot_table
from atommem_jax.model import attention, groups, sampling, scoring
from atommem_jax.model.sampling import Agent
from atommem_jax.parallel import host_batches, program
from atommem_jax.types import Batch, Phase
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

    Args:
      scene: what is played.
      whole: seconds of the jitted rollout of the whole scene, for comparison.
    """
    programs = _TurnPrograms(scene)
    episodes, ids = host_batches.shard((scene.episodes, scene.ids), scene.mesh)
    programs.play(episodes, ids, _Clock())  # compiles
    clock = _Clock()
    programs.play(episodes, ids, clock)
    seconds = clock.seconds
    seconds["decode"] = max(seconds.pop("generate") - seconds["prefill"], 0.0)
    return _summarise({name: seconds[name] for name in TURN}, whole)


class _TurnPrograms:
    """The phases of a turn, each jitted over the mesh."""

    def __init__(self, scene: Scene):
        agent, setting = scene.parts.agent, scene.parts.setting(scene.shape)
        self._max_turns, self._mesh = setting.limits.max_turns, scene.mesh
        self._agent, self._setting, self._params, self._seed, self._temperature = (
            host_batches.replicate(
                (agent, setting, scene.params, scene.seed, np.float32(scene.temperature)),
                scene.mesh,
            )
        )
        self._start = self._jit(_start, "episodes")
        self._keys = self._jit(_turn_keys, "ids")
        self._look = self._jit(rollout.look, "env", "episodes")
        self._act = self._jit(rollout.act, "env", "seen", "episodes", "response")
        self._retrieve = self._jit(_retrieve, "tables")
        self._assemble = self._jit(_assemble, "observation")
        make_decoder = jax.jit(sampling.make_decoder)
        self._decoder = make_decoder(self._agent, self._params, self._temperature)
        self._prefill = self._jit(_read, *jax_responders.PROMPTS)
        self._generate = self._jit(_respond, *jax_responders.PROMPTS)
        self._parse = self._jit(_parse, "response")
        self._transition = self._jit(_transition, "tables", "actions", "phase")

    def _jit(self, function, *rows: str):
        return jax.jit(program.data_parallel(function, self._mesh, rows=rows, out=program.ROWS))

    def play(self, episodes, ids, clock: _Clock) -> None:
        """Plays to the end as `rollout.run` does, timing the phases of every turn."""
        setting, decoder = self._setting, self._decoder
        env = self._start(setting, episodes)
        for turn in range(self._max_turns):
            if (jax.device_get(env.phase) == Phase.DONE).all():
                break
            keys = self._keys(self._seed, ids, np.int32(turn))
            clock("retrieve", self._retrieve, setting, env.memory)
            seen = jax.block_until_ready(self._look(setting, env, episodes))
            view = seen.view
            clock("assemble", self._assemble, setting, view.observation)
            inputs = (view.prompt, view.prompt_length, view.phase, keys)
            clock("prefill", self._prefill, decoder, *inputs)
            response = clock("generate", self._generate, decoder, *inputs)
            actions = clock("parse", self._parse, setting, response)
            clock("transition", self._transition, setting, seen.env.memory, actions, env.phase)
            env, _ = jax.block_until_ready(self._act(setting, env, seen, episodes, response))


def _start(setting, episodes):
    return jax.vmap(environment.start, in_axes=(None, 0))(setting, episodes)


def _turn_keys(seed, ids, turn):
    return rollout.turn_keys(rollout.trajectory_keys(seed, ids), turn)


def _retrieve(setting, tables):
    return jax.vmap(slot_table.retrieve, in_axes=(0, None))(tables, setting.embed)


def _assemble(setting, observation):
    def one(template, o):
        return prompting.assemble(template, o, prompt_width=setting.limits.prompt_width)

    return jax.vmap(one, in_axes=(None, 0))(setting.template, observation)


def _respond(decoder, prompt, lengths, phase, keys):
    return groups.respond(decoder, prompt, lengths, phase, keys, phase == Phase.DONE)


def _read(decoder, prompt, lengths, phase, keys):
    """`_respond`, which stops at the first token."""

    def begin(*inputs):
        return sampling.make_response(sampling.prefill(*inputs))

    skip = phase == Phase.DONE
    return groups.respond(decoder, prompt, lengths, phase, keys, skip, generate=begin)


def _parse(setting, response):
    return jax.vmap(setting.grammar.parse)(response.tokens, response.lengths)


def _transition(setting, tables, actions, phase):
    return jax.vmap(environment.apply_actions, in_axes=(None, 0, 0, 0))(
        setting, tables, actions, phase
    )


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
    packed = _pack(lesson, scene.parts.agent, mesh.size)
    parts = [(host_batches.shard(part, mesh), width) for part, width in packed]
    tokens = np.float32(lesson.batch.weights.sum())
    denominators = host_batches.replicate((tokens, np.float32(len(lesson.batch.phase))), mesh)

    def objective(params, agent, temperature, denominators, part: Batch, width: int):
        return trainer.ppo_objective(
            ppo, agent, temperature, None, denominators, params, part, width
        )

    def forward(width):
        def run(params, agent, temperature, denominators, part):
            return program.psum(objective(params, agent, temperature, denominators, part, width))

        return jax.jit(program.data_parallel(run, mesh, rows=("part",), out=program.WHOLE))

    def gradient(width):
        def run(params, agent, temperature, denominators, part):
            grads, _ = jax.grad(objective, has_aux=True)(
                params, agent, temperature, denominators, part, width
            )
            # Not summed over the devices: the trainer does that once a mini-batch, not here.
            return jax.tree.map(lambda g: g[None], grads)

        return jax.jit(program.data_parallel(run, mesh, rows=("part",), out=program.ROWS))

    widths = {width for _, width in parts}
    score = {width: forward(width) for width in widths}
    grad = {width: gradient(width) for width in widths}
    step = jax.jit(
        lambda state, grads: optimizer_lib.apply_gradients(state, grads, optimizer),
        donate_argnums=0,
    )
    # The state is donated, and its parameters with it: it has a copy of the scene's.
    own = jax.tree.map(jnp.copy, params)
    state = host_batches.replicate(optimizer_lib.create_state(own, optimizer), mesh)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):  # the first compiles
        clock = _Clock()
        for part, width in parts:
            arguments = (params, agent, temperature, denominators, part)
            clock("score", score[width], *arguments)
            clock("gradient", grad[width], *arguments)
        for _ in range(ppo.minibatches):
            state, _ = clock("optimiser", step, state, zeros)
    seconds = {name: value * ppo.epochs for name, value in clock.seconds.items()}
    seconds["backward"] = max(seconds.pop("gradient") - seconds["score"], 0.0)
    return _summarise({name: seconds[name] for name in UPDATE}, whole)


def _take(batch: Batch, rows: np.ndarray) -> Batch:
    return jax.tree.map(lambda x: x[rows], batch)


def _pack(lesson: Lesson, agent: Agent, devices: int) -> list[tuple[Batch, int]]:
    """Micro-batches of the rows that count, the longest first, and the width each is scored at.

    As `microbatches` packs them, but on the host: a program times one at a time.
    """
    ppo, batch = lesson.ppo, lesson.batch
    size = ppo.microbatch_rows * devices
    lengths = np.asarray(scoring.row_lengths(batch.prompt_lengths, batch.response_lengths))
    active = np.flatnonzero(np.any(batch.weights * batch.advantages != 0, axis=1))
    active = active[np.argsort(-lengths[active], kind="stable")]
    full = batch.prompt.shape[1] + batch.response.shape[1] - 1
    multiple = attention.row_multiple(agent.model.config.attention, full)
    widths = groups.list_widths(full, multiple, tuple(ppo.length_buckets))
    parts = []
    for first in range(0, len(active), size):
        rows = active[first : first + size]
        count = len(rows)
        part = _take(batch, np.resize(rows, size))
        part.weights[count:] = 0.0
        part.response_lengths[count:] = 0
        parts.append((part, next(width for width in widths if width >= lengths[rows[0]])))
    return parts
