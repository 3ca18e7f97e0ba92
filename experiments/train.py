"""Trains an agent: SFT on a scripted teacher's trajectories, then RL on its own.

    python experiments/train.py --config=experiments/configs/synthetic.py --workdir=runs/mine

Killed at any moment, the same command resumes from the last checkpoint and ends with the same
parameters, bit for bit. Metrics go to <workdir>/metrics.jsonl and <workdir>/tensorboard.
"""

import math
import os
import time
from typing import Any

import jax
import tqdm
from absl import flags as absl_flags
from ml_collections import ConfigDict

from atommem_jax import sharding
from atommem_jax.checkpoint import Checkpointer
from atommem_jax.config import check
from atommem_jax.model import count_params
from atommem_jax.tasks import episodes as episodes_lib
from atommem_jax.tokenizer import Tokenizer
from experiments import agents, flags, stages, validation, wiring
from experiments.metrics import MetricWriter

CONFIG = flags.define_config("experiments/configs/synthetic.py")
WORKDIR = absl_flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


def main(argv) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: flags start with --; see --help")
    check(bool(WORKDIR.value), "--workdir is missing: pass a directory for checkpoints and metrics")
    train(CONFIG.value, WORKDIR.value, flags.DATA_ROOT.value)


def train(config: ConfigDict, workdir: str, data_root: str) -> None:
    """Runs or resumes both stages. Raises ConfigError before anything is computed."""
    # ------------------------------------------------------------------ config, devices
    validation.validate(config)
    mesh = wiring.make_mesh(config)
    validation.validate_devices(config, mesh.shape[sharding.DATA], mesh.shape[sharding.FSDP])

    # ------------------------------------------------------------------ data
    dataset = wiring.load_dataset(config, data_root)
    tokenizer = wiring.load_tokenizer(config, dataset)
    examples = dataset.split("train")
    shape = episodes_lib.fit_shape(examples, tokenizer)

    # ------------------------------------------------------------------ agent, stages
    parts = wiring.build(config, tokenizer)
    validation.validate_shape(config, parts, shape)
    plan = [stage(parts, mesh, examples, shape) for stage in (stages.Sft, stages.Rl)]
    validate = stages.Validator(parts, mesh, dataset.split(config.eval.split), shape)
    last = sum(stage.steps for stage in plan)
    print(
        f"{mesh.size} {jax.devices()[0].platform} devices; "
        f"{len(examples)} training samples; vocabulary {tokenizer.vocab_size}; {shape}",
        flush=True,
    )

    # ------------------------------------------------------------------ resume
    with (
        Checkpointer(
            os.path.join(workdir, "checkpoints"),
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            keep_steps=stage_ends(config),
            best_metric="em",
        ) as checkpointer,
        MetricWriter(workdir) as writer,
    ):
        step = checkpointer.latest_step() or 0
        state, saved = None, None
        if step:
            validation.check_same_config(config, checkpointer.restore_config(step), workdir)
            if step == last:
                print(f"{workdir} is finished: it holds step {step} of {last}", flush=True)
                return
            owner, _ = _locate(plan, step)
            saved = checkpointer.restore(step, abstract_state=plan[owner].abstract_state())
            state = saved.state
            print(f"resuming {workdir} at step {step} of {last}", flush=True)
        writer.resume(step)

        # -------------------------------------------------------------- loop
        index, local = _locate(plan, step)
        params = None if step else load_initial(config, tokenizer)
        for stage in plan[index:]:
            iterator = stage.batches()
            if state is None:
                state = stage.start(params)
                print(f"{stage.name}: {count_params(state['train'].params):,} parameters")
            elif saved is not None:  # always so: a state without `start` was restored
                iterator.set_state(saved.data_state)
            remaining = range(local, stage.steps)
            clock = time.perf_counter()
            for local_step in tqdm.tqdm(
                remaining, desc=stage.name, initial=local, total=stage.steps, mininterval=2.0
            ):
                batch = next(iterator)
                with jax.transfer_guard("disallow"):
                    state, metrics = stage.step(state, batch, local_step)
                step += 1
                done = local_step + 1
                _check_progress(state["train"], metrics, config, stage.name, step)
                if done % stage.config.log_every == 0 or done == stage.steps:
                    now = time.perf_counter()
                    writer.write(step, stage.name, {**metrics, "seconds": now - clock})
                    clock = now
                is_last = done == stage.steps
                results = None
                if is_last or done % stage.config.eval_every == 0:
                    results = validate(state["train"].params)
                    writer.write(step, "eval", results)
                    tqdm.tqdm.write(f"{stage.name} step {done}: EM {results['em']:.3f}")
                if results is not None or done % stage.config.save_every == 0:
                    checkpointer.save(
                        step,
                        state,
                        config=config,
                        tokenizer=tokenizer.to_bytes(),
                        data_state=iterator.get_state(),
                        progress={"stage": stage.name, "stage_step": done},
                        metrics=results,
                    )
            params, state, local = state["train"].params, None, 0


def load_initial(config: ConfigDict, tokenizer: Tokenizer) -> Any | None:
    """The parameters of `config.init_from`; None where it is empty.

    Raises ConfigError where there are none, or they belong to another tokenizer or model.
    """
    if not config.init_from:
        return None
    loaded = agents.load(config.init_from, cpu_devices=config.mesh.cpu_devices)
    check(
        loaded.parts.tokenizer.to_bytes() == tokenizer.to_bytes(),
        f"init_from={config.init_from}: its tokenizer is not that of this task; pass a checkpoint "
        "trained on the same task and memory.shown",
    )
    changed = validation.differences(config.model, loaded.parts.config.model, "model.")
    check(not changed, f"init_from={config.init_from} holds another model: {'; '.join(changed)}")
    return jax.device_get(loaded.params)


def stage_ends(config: ConfigDict) -> list[int]:
    """Global steps at which the stages end; their checkpoints are always kept."""
    return [config.sft.steps, config.sft.steps + config.rl.steps]


def _locate(plan: list, step: int) -> tuple[int, int]:
    """(stage, steps done in it) of the run after `step` steps, as a checkpoint there holds it."""
    for index, stage in enumerate(plan):
        if step <= stage.steps and (step > 0 or stage.steps > 0):
            return index, step
        step -= stage.steps
    return len(plan) - 1, plan[-1].steps


def _check_progress(state, metrics, config: ConfigDict, stage: str, step: int) -> None:
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


if __name__ == "__main__":
    flags.run(main)
