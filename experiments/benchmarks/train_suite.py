"""Suite `train`: one PPO update on one rollout, against PyTorch eager and compiled.

Both sides start from the same parameters and fresh AdamW moments, take the same number of
optimiser steps on the same rows with a constant learning rate, and leave out rows without an
advantage. Our side deals its mini-batches itself; PyTorch deals others of the same size.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from atommem_jax.config import OptimizerConfig, PPOConfig
from atommem_jax.learning import credit, evaluation, trainer
from atommem_jax.learning import optimizer as optimizer_lib
from atommem_jax.parallel import host_batches
from atommem_jax.types import Batch, Trajectory
from experiments.benchmarks import timing
from experiments.benchmarks.rollout_suite import Ours as OurRollout
from experiments.benchmarks.rollout_suite import Scene

PEERS = ("torch", "torch_compile")


@dataclasses.dataclass
class Lesson:
    """A finished rollout and what it was worth."""

    trajectories: Trajectory  # on the mesh
    rewards: np.ndarray  # [B, Q]
    counts: np.ndarray  # [B], int32
    batch: Batch  # the same as rows, on the host
    source: str  # of the rewards
    ppo: PPOConfig
    optimizer: OptimizerConfig


def make_lesson(scene: Scene) -> Lesson:
    """Plays the scene; random rewards stand in where no answer is right in part of a group."""
    config = scene.parts.config.rl
    ppo = config.ppo
    # Of the optimiser's schedule only the peak matters here: warm-up would start at zero.
    optimizer = dataclasses.replace(
        config.optimizer,
        schedule="constant",
        warmup_steps=0,
    )
    trajectories = OurRollout(scene).run()
    answers = jax.device_get((trajectories.answers, trajectories.answer_lengths))
    texts = evaluation.decode_answers(*answers, scene.parts.tokenizer.decode)
    rewards = np.asarray(evaluation.score_answers(texts, scene.aliases), np.float32)
    counts = np.array([len(accepted) for accepted in scene.aliases], np.int32)
    host = jax.device_get(trajectories)

    def weigh(rewards):
        advantages, returns = credit.turn_advantages(ppo, host, rewards, counts)
        return trainer.make_batch(host, advantages, returns)

    batch, source = weigh(rewards), "exact match"
    if not np.any(jax.device_get(batch.advantages * batch.weights)):
        rng = np.random.default_rng(0)
        put = np.arange(rewards.shape[1]) < counts[:, None]
        rewards = np.where(put, rng.integers(0, 2, rewards.shape), 0).astype(np.float32)
        batch, source = weigh(rewards), "random: no answer was right"
    return Lesson(trajectories, rewards, counts, jax.device_get(batch), source, ppo, optimizer)


class Ours:
    """`trainer.update_step`."""

    def __init__(self, scene: Scene, lesson: Lesson, optimizer: Any = None):
        """optimizer: an Optax transformation in the place of the lesson's own."""
        self._scene, self._lesson, mesh = scene, lesson, scene.mesh
        self._optimizer = optimizer or optimizer_lib.make_optimizer(lesson.optimizer, 1)
        self._agent, self._key, self._temperature = host_batches.replicate(
            (scene.parts.agent, jax.random.key(0), np.float32(scene.temperature or 1.0)), mesh
        )
        self._graded = host_batches.shard((lesson.rewards, lesson.counts), mesh)
        self._params = jax.device_get(scene.params)
        self._reference = (
            host_batches.replicate(self._params, mesh) if lesson.ppo.needs_reference else None
        )

    def prepare(self) -> optimizer_lib.TrainState:
        """A fresh state: the step consumes it."""
        state = optimizer_lib.create_state(self._params, self._optimizer)
        return jax.block_until_ready(host_batches.replicate(state, self._scene.mesh))

    def run(self, state: optimizer_lib.TrainState) -> tuple[Any, dict[str, Any]]:
        """One update; waits for it."""
        return jax.block_until_ready(
            trainer.update_step(
                self._agent,
                state,
                self._lesson.trajectories,
                *self._graded,
                self._key,
                self._temperature,
                self._reference,
                optimizer=self._optimizer,
                config=self._lesson.ppo,
                mesh=self._scene.mesh,
            )
        )


def make_torch_update(
    scene: Scene, lesson: Lesson, *, microbatch: int = 64, compiled: bool = False
) -> timing.Contestant:
    """The update in PyTorch. Raises ImportError without it."""
    from experiments.benchmarks import torch_model, torch_training

    agent, params = scene.parts.agent, jax.device_get(scene.params)
    model = torch_model.from_params(agent.model.config, params)
    rows = torch_training.Rows.of(lesson.batch)
    size, turns = lesson.trajectories.turns.live.shape
    minibatches = torch_training.deal(size, turns, lesson.ppo.minibatches) * lesson.ppo.epochs
    update = torch_training.TorchUpdate(
        agent,
        model,
        lesson.ppo,
        lesson.optimizer,
        temperature=scene.temperature or 1.0,
        microbatch=microbatch,
        compiled=compiled,
    )
    start = {name: leaf.clone() for name, leaf in model.state_dict().items()}

    def reset() -> None:
        model.load_state_dict(start)

    return timing.Contestant(lambda _: update(rows, minibatches), reset)


def run(
    scene: Scene, lesson: Lesson, clock: timing.CompileClock, *, runs: int, peers=PEERS
) -> timing.Result:
    """All comparisons of the suite."""
    ours = Ours(scene, lesson)
    with clock.of("update"):
        ours.run(ours.prepare())
    contestants = {"ours": timing.Contestant(ours.run, ours.prepare)}
    results: timing.Result = {}
    more: timing.Result = {}
    try:
        setting, tried = timing.find_torch_setting(
            lambda threads, size: timing.with_torch_threads(
                make_torch_update(scene, lesson, microbatch=size), threads
            ),
            (64, 32, 128),
            "micro-batch of torch",
        )
    except ImportError as error:
        return {name: timing.missing(error) for name in peers}
    except ValueError as error:  # the update that the config asks for is not implemented
        return {name: timing.failed(str(error)) for name in peers}
    for name in peers:
        compiled = name == "torch_compile"
        contestant = make_torch_update(
            scene, lesson, microbatch=setting["batch"], compiled=compiled
        )
        more[name] = dict(setting) | ({} if compiled else {"seconds_by_setting": tried})
        contestant = timing.with_torch_threads(contestant, setting["threads"])
        if compiled:
            try:
                first = timing.time_once(contestant)
                more[name]["first_call_seconds"] = first
            except Exception as error:  # the compiler's own, of many kinds
                results[name] = timing.failed(f"torch.compile: {type(error).__name__}: {error}")
                continue
        contestants[name] = contestant
    seconds = timing.measure(contestants, runs=runs, label="train")
    active = np.any(lesson.batch.weights * lesson.batch.advantages != 0, axis=1)
    for name in contestants:
        if name != "ours":
            results[name] = timing.compare(
                seconds["ours"], seconds[name], work=1, unit="updates"
            ) | {
                "rows": int(active.sum()),
                "rewards": lesson.source,
                "minibatches": lesson.ppo.minibatches,
                **more[name],
            }
    return {name: results[name] for name in peers}
