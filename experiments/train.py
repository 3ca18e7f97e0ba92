"""Trains an agent: SFT on a teacher's trajectories, then RL on its own.

    python experiments/train.py --config=experiments/configs/synthetic.py --workdir=runs/mine

The teacher is scripted, or one whose trajectories `collect.py` has written to `config.sft.data`.

Killed at any moment, the same command resumes from the last checkpoint and ends with the same
parameters, bit for bit. Metrics go to <workdir>/metrics.jsonl and <workdir>/tensorboard. SIGTERM,
as of a machine that is taken away, saves first and ends with status 0.

On several hosts run the same command on each, with a workdir that all of them see. On a TPU slice
the hosts find each other; elsewhere say where process 0 is:

    python experiments/train.py --workdir=/shared/mine \\
        --coordinator_address=10.0.0.1:8476 --num_processes=4 --process_id=0   # 1, 2, 3

A run may go on with another number of processes or devices. `supervise.py` restarts what died.
"""

import contextlib
import dataclasses
import math
import os
import sys
import time
from typing import Any

import jax
import tqdm
from absl import flags as absl_flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from atommem_jax.agent import build, load
from atommem_jax.agent import validate as validate_lib
from atommem_jax.config import ConfigError, check
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.metrics import SilentWriter, open_writer
from atommem_jax.model.transformer import count_params
from atommem_jax.parallel import processes, rules
from atommem_jax.runs import agreement, stages
from atommem_jax.tasks import encoding
from atommem_jax.weights.checkpoint import (
    Checkpointer,
    CheckpointError,
    CorruptCheckpointError,
    Restored,
)
from experiments import flags

CONFIG = flags.define_config("experiments/configs/synthetic.py")
WORKDIR = absl_flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")
FALL_BACK = absl_flags.DEFINE_bool(
    "fall_back",
    False,
    "Where the last checkpoint is corrupt, rename it to <step>.corrupt and resume from the one "
    "before; without this flag the run stops and says so.",
)
PROCESSES = flags.define_processes()


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


def main(argv) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: flags start with --; see --help")
    check(bool(WORKDIR.value), "--workdir is missing: pass a directory for checkpoints and metrics")
    processes.initialise(**PROCESSES())
    processes.catch_preemption()
    train(CONFIG.value, WORKDIR.value, flags.DATA_ROOT.value, fall_back=FALL_BACK.value)


def train(config: ConfigDict, workdir: str, data_root: str, *, fall_back: bool = False) -> None:
    """Runs or resumes both stages; every process of a run calls it.

    With `fall_back` a corrupt checkpoint is set aside and the one before it is used.

    Raises ConfigError before anything is computed.
    """
    # ------------------------------------------------------------------ config, devices
    agreement.check_same_run(config)
    validate_lib.validate(config)
    check(
        "shape" not in config,
        "this config names the sizes of a published model and no data (config.shape): it can be "
        "compiled with experiments/compile_report.py and not be trained yet; train "
        "experiments/configs/synthetic.py, babi.py or hotpotqa.py",
    )
    mesh = build.make_mesh(config)
    agreement.check_every_process(mesh)
    validate_lib.validate_devices(config, mesh.shape[rules.DATA], mesh.shape[rules.FSDP])

    # ------------------------------------------------------------------ data
    dataset = processes.main_first(lambda: build.load_dataset(config, data_root))
    tokenizer = load.choose_tokenizer(config, dataset)
    examples = dataset.split("train")
    shape = encoding.fit_shape(examples, tokenizer)
    agreement.check_same_data(tokenizer, examples, shape)

    # ------------------------------------------------------------------ agent, stages
    parts = build.build(config, tokenizer)
    validate_lib.validate_shape(config, parts, shape, examples)
    validate_lib.validate_parameters(parts, mesh)
    plan = [stage(parts, mesh, examples, shape) for stage in (stages.Sft, stages.Rl)]
    validate = stages.Validator(parts, mesh, dataset.split(config.eval.split), shape)
    last = sum(stage.steps for stage in plan)
    say(
        f"{mesh.size} {jax.devices()[0].platform} devices; "
        f"{len(examples)} training samples; vocabulary {tokenizer.vocab_size}; {shape}"
    )
    if plan[0].lessons is not None:
        say(f"sft.data: {plan[0].lessons}")

    # ------------------------------------------------------------------ resume
    with (
        Checkpointer(
            os.path.join(workdir, "checkpoints"),
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            keep_steps=stage_ends(config),
            best_metric="em",
        ) as checkpointer,
        open_writer(workdir) if processes.is_main() else SilentWriter() as writer,
    ):
        step, saved = resume(checkpointer, config, plan, tokenizer, workdir, fall_back)
        if step and step == last:
            say(f"{workdir} is finished: it holds step {step} of {last}")
            return
        state = saved.state if saved else None
        if saved:
            say(f"resuming {workdir} at step {step} of {last}")
        writer.resume(step)

        # -------------------------------------------------------------- loop
        index, local = _locate(plan, step)
        params, base = None, {}
        if not step or config.lora.rank:
            params = load_initial(config, tokenizer, mesh)
        if config.lora.rank:
            params, fingerprint = stages.attach_base(plan, params)
            base = {"base": fingerprint}
            if saved:
                load.check_base(config.init_from, fingerprint, saved, workdir)
        for stage in plan[index:]:
            iterator = stage.batches()
            if state is None:
                state = stage.start(params)
                frozen = count_params(stage.frozen)
                say(
                    f"{stage.name}: {count_params(state['train'].params):,} parameters"
                    + (f" on {frozen:,} that are frozen" if frozen else "")
                )
            elif saved is not None:  # always so: a state without `start` was restored
                iterator.set_state(saved.data_state)
            remaining = range(local, stage.steps)
            clock = time.perf_counter()
            for local_step in tqdm.tqdm(
                remaining,
                desc=stage.name,
                initial=local,
                total=stage.steps,
                mininterval=2.0,
                disable=not processes.is_main(),
            ):
                batch = next(iterator)
                # The first step compiles.
                folder = os.path.join(workdir, "profile", stage.name)
                traced = config.profile and local_step == remaining.start + 1
                with jax.transfer_guard("disallow"), profile(folder if traced else None):
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
                    results = validate(stage.params(state))
                    writer.write(step, "eval", results)
                    say(f"{stage.name} step {done}: EM {results['em']:.3f}")
                stopping = processes.preempted(step)
                if results is not None or stopping or done % stage.config.save_every == 0:
                    checkpointer.save(
                        step,
                        state,
                        config=config,
                        tokenizer=tokenizer.to_bytes(),
                        data_state=iterator.get_state(),
                        progress={
                            "stage": stage.name,
                            "stage_step": done,
                            "shape": dataclasses.asdict(shape),
                            **base,
                        },
                        metrics=results,
                    )
                if stopping:
                    checkpointer.wait()
                    say(f"SIGTERM: saved step {step} of {last}; the same command goes on from it")
                    return
            params, state, local = state["train"].params, None, 0


def profile(folder: str | None) -> contextlib.AbstractContextManager[Any]:
    """Traces what is done within it to `folder`, for xprof or TensorBoard; None traces nothing.

    The phases are named scopes: retrieve, assemble, prefill, decode, parse, transition,
    microbatches and optimizer.
    """
    return contextlib.nullcontext() if folder is None else jax.profiler.trace(folder)


def say(text: str) -> None:
    """Prints a line, on one process only, and not through a progress bar."""
    if processes.is_main():
        tqdm.tqdm.write(text)
        sys.stdout.flush()


def resume(
    checkpointer: Checkpointer,
    config: ConfigDict,
    plan: list,
    tokenizer: Tokenizer,
    workdir: str,
    fall_back: bool,
) -> tuple[int, Restored | None]:
    """The step to go on from and what was saved there; (0, None) where nothing was.

    Of the last step, with which a run is finished, nothing is read but its config.

    Raises ConfigError where what was saved belongs to another run, or is corrupt.
    """
    last = sum(stage.steps for stage in plan)
    while True:
        step = checkpointer.latest_step() or 0
        processes.check_same(
            {"last checkpoint": step},
            f"Every process must see the same --workdir={workdir}: put it where all hosts can",
        )
        if not step:
            return 0, None
        try:
            validate_lib.check_same_config(config, checkpointer.restore_config(step), workdir)
            if step == last:
                return step, None
            owner, _ = _locate(plan, step)
            saved = checkpointer.restore(step, abstract_state=plan[owner].abstract_state())
        except CorruptCheckpointError as error:
            check(fall_back, f"{error}. {_advise(error)}")
            say(f"{error}; it is now called {checkpointer.set_aside(step)}")
            continue
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        check(
            saved.tokenizer == tokenizer.to_bytes(),
            f"{workdir} was trained with another tokenizer than that of this data; pass the "
            "--data_root that it was started with, or another --workdir",
        )
        return step, saved


def _advise(error: CorruptCheckpointError) -> str:
    after = f"go on from step {error.earlier[-1]}" if error.earlier else "start afresh"
    return (
        f"Copy step {error.step} back from where it is sound; or pass --fall_back, which renames "
        f"it to {error.step}.corrupt, to {after}"
    )


def load_initial(config: ConfigDict, tokenizer: Tokenizer, mesh: Mesh | None = None) -> Any | None:
    """The parameters of `config.init_from`, each where it is trained; None where it is empty.

    Raises ConfigError where there are none, or they belong to another tokenizer or model.
    """
    if not config.init_from:
        return None
    loaded = load.load(
        config.init_from,
        cpu_devices=config.mesh.cpu_devices,
        mesh=mesh,
        rules=rules.TRAINING,
        merge=True,
    )
    check(
        loaded.parts.tokenizer.to_bytes() == tokenizer.to_bytes(),
        f"init_from={config.init_from}: its tokenizer is not that of this task; pass a checkpoint "
        "trained on the same task and memory.shown",
    )
    ours, theirs = (build.architecture(c) for c in (config, loaded.parts.config))
    changed = validate_lib.differences(ours, theirs, "model.")
    check(not changed, f"init_from={config.init_from} holds another model: {'; '.join(changed)}")
    return loaded.params


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
    flags.run(main, leave=processes.leave)
