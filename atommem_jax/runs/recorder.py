"""What a run leaves behind after a step: metrics, the validation's results, checkpoints.

It also looks whether training can go on: `TrainingError` says why not, and what to try.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from atommem_jax import text_files
from atommem_jax.config import Experiment
from atommem_jax.learning import collapse
from atommem_jax.metrics import BucketWriter, MetricWriter, SilentWriter, read_metrics
from atommem_jax.parallel import processes
from atommem_jax.runs.stages import Metrics, Stage, State, Validator
from atommem_jax.tasks.encoding import EpisodeShape
from atommem_jax.weights.checkpoint import Checkpointer


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


@dataclasses.dataclass
class Recorder:
    """Writes what each step of a run gives, as often as the config says.

    Attributes:
      tokenizer: its bytes, for the checkpoints.
      shape: of the episodes of the config itself, whatever its curriculum has before.
      base: {"base": fingerprint} where adapters are trained, else nothing.
      watch: looks for signs that the policy collapses under RL; absent on all but one process.
    """

    config: Experiment
    checkpointer: Checkpointer
    writer: MetricWriter | BucketWriter | SilentWriter
    validate: Validator
    tokenizer: bytes
    shape: EpisodeShape
    base: Mapping[str, str]
    watch: collapse.Watch | None = None

    def __post_init__(self) -> None:
        self._clock = time.perf_counter()

    def start(self) -> None:
        """A stage begins: from here on the seconds of its steps are counted."""
        self._clock = time.perf_counter()

    def record(
        self, stage: Stage, state: State, metrics: Metrics, done: int, step: int, data_state: Any
    ) -> bool:
        """Logs, validates and saves after `done` steps of a stage, `step` of the run.

        Returns whether the run was asked to stop, by SIGTERM; it is saved then.

        Raises TrainingError where parameters are broken; such are never saved.
        """
        check_progress(state["train"], metrics, self.config, stage.name, step)
        is_last = done == stage.config.steps
        if is_last or done % stage.config.log_every == 0:
            now = time.perf_counter()
            self.writer.write(step, stage.name, {**metrics, "seconds": now - self._clock})
            self._clock = now
        if stage.name == "rl" and self.watch:
            for sign in self.watch.look(metrics):
                text_files.warn(f"rl step {done}: {sign}")
        results = None
        if is_last or done % stage.config.eval_every == 0:
            results = self.validate(stage.params(state))
            self.writer.write(step, "eval", results)
            processes.say(f"{stage.name} step {done}: EM {results['em']:.3f}")
        stopping = processes.preempted(step)
        if results is not None or stopping or done % stage.config.save_every == 0:
            check_finite(state["train"].params, stage.name, step)
            self.writer.flush()  # who goes on from this checkpoint has the metrics up to it
            self.checkpointer.save(
                step,
                state,
                config=self.config.to_dict(),
                tokenizer=self.tokenizer,
                data_state=data_state,
                progress={
                    "stage": stage.name,
                    "stage_step": done,
                    "shape": dataclasses.asdict(self.shape),
                    **self.base,
                },
                metrics=results,
            )
        if stopping:
            self.checkpointer.wait()
        return stopping


def watch_rl(workdir: str, begun: int, step: int) -> collapse.Watch:
    """What looks for signs of collapse, having seen what was logged after `begun` up to `step`."""
    try:
        records = read_metrics(workdir) if step else []
    except FileNotFoundError:  # what only tells of a run does not keep it from going on
        records = []
    return collapse.Watch(r for r in records if r["stage"] == "rl" and begun < r["step"] <= step)


@jax.jit
def _all_finite(params: Any) -> Bool[Array, ""]:
    leaves = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def check_finite(params: Any, stage: str, step: int) -> None:
    """Raises TrainingError where a parameter is no finite number: a run could not go on from it."""
    if not bool(jax.device_get(_all_finite(params))):
        raise TrainingError(
            f"{stage} step {step}: a parameter is not finite, and no checkpoint is written of it. "
            f"Lower {stage}.optimizer.learning_rate or {stage}.optimizer.clip_norm; the same "
            "command goes on from the checkpoint before, with another --workdir from the start"
        )


def check_progress(state, metrics: Metrics, config: Experiment, stage: str, step: int) -> None:
    """Raises TrainingError where parameters are broken, or gradients were too often not finite."""
    # Without finite log-probs nothing can be sampled: empty turns, whose gradient is a sound zero.
    if not math.isfinite(metrics.get("sampled_nll", 0.0)):
        raise TrainingError(
            f"{stage} step {step}: the policy gives log-probs that are not finite, so its "
            f"parameters are broken. Lower {stage}.optimizer.learning_rate, and start from an "
            "earlier checkpoint or another --workdir"
        )
    in_a_row = int(jax.device_get(state.skipped_in_a_row))
    if in_a_row >= config.rl.max_skipped_in_a_row:
        raise TrainingError(
            f"{stage} step {step}: the gradient was not finite {in_a_row} times in a row "
            f"(rl.max_skipped_in_a_row={config.rl.max_skipped_in_a_row}); the parameters are those "
            f"from before. Lower {stage}.optimizer.learning_rate or {stage}.optimizer.clip_norm, "
            "and look at the last lines of metrics.jsonl"
        )
