"""Trains an agent: on a teacher's trajectories (SFT), then on its own by reinforcement (RL).

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
import os
import time
from collections.abc import Iterable, Iterator

import jax
import tqdm
from absl import flags as absl_flags

from atommem_jax import folder_lock
from atommem_jax.agent import build, load, phases, validate
from atommem_jax.config import Experiment, check, parse, paths
from atommem_jax.metrics import SilentWriter, open_writer
from atommem_jax.parallel import processes, rules
from atommem_jax.runs import agreement, curriculum, resume, stages
from atommem_jax.runs.recorder import Recorder, watch_rl
from atommem_jax.tasks import encoding
from atommem_jax.weights.checkpoint import Checkpointer
from experiments import flags

CONFIG = flags.define_config("experiments/configs/synthetic.py")
WORKDIR = flags.define_workdir("Where checkpoints and metrics go.")
FALL_BACK = absl_flags.DEFINE_bool(
    "fall_back",
    False,
    "Where the last checkpoint is corrupt, rename it to <step>.corrupt and resume from the one "
    "before; without this flag the run stops and says so.",
)
PROCESSES = flags.define_processes()


def main(argv) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: flags start with --; see --help")
    workdir = flags.require(WORKDIR, "pass a directory for checkpoints and metrics")
    processes.initialise(**PROCESSES())
    processes.catch_preemption()
    with processes.main_holds(lambda: folder_lock.hold(workdir, f"--workdir={workdir}")):
        train(parse(CONFIG.value), workdir, flags.DATA_ROOT.value, fall_back=FALL_BACK.value)


def train(config: Experiment, workdir: str, data_root: str, *, fall_back: bool = False) -> None:
    """Runs or resumes both stages; every process of a run calls it.

    With `fall_back` a corrupt checkpoint is set aside and the one before it is used.

    Raises ConfigError before anything is computed.
    """
    # ------------------------------------------------------------------ config, devices
    agreement.check_same_run(config)
    validate.validate(config)
    phases.check(config)
    check(
        config.shape is None,
        "this config names the sizes of a published model and no data (config.shape): it can be "
        "compiled with experiments/compile_report.py and not be trained yet; train "
        "experiments/configs/synthetic.py, babi.py or hotpotqa.py",
    )
    mesh = build.make_mesh(config)
    agreement.check_every_process(mesh)
    validate.validate_devices(config, mesh.shape[rules.DATA], mesh.shape[rules.FSDP])

    # ------------------------------------------------------------------ data
    dataset = processes.main_first(lambda: build.load_dataset(config, data_root))
    tokenizer = load.choose_tokenizer(config, dataset)
    examples = load.find_split(dataset, "train", "the split")
    validation = load.find_split(dataset, config.eval.split, "eval.split")
    if config.debug.overfit:
        examples = validation = examples[: config.debug.overfit]
    shape = encoding.fit_shape(examples, tokenizer)
    agreement.check_same_data(tokenizer, examples, shape)

    # ------------------------------------------------------------------ agent, stages
    parts = build.build(config, tokenizer)
    validate.validate_shape(config, parts, shape, examples)
    validate.validate_parameters(parts, mesh)
    plan = curriculum.make_plan(
        parts,
        mesh,
        examples,
        shape,
        lambda config: processes.main_first(lambda: build.load_dataset(config, data_root)),
    )
    validator = stages.Validator(parts, mesh, validation, shape)
    last = sum(stage.steps for stage in plan)
    processes.say(
        f"{mesh.size} {jax.devices()[0].platform} devices; "
        f"{len(examples)} training samples; vocabulary {tokenizer.vocab_size}; {shape}"
    )
    if plan[0].lessons is not None:
        processes.say(f"sft.data: {plan[0].lessons}")

    # ------------------------------------------------------------------ resume
    with (
        Checkpointer(
            os.path.join(workdir, "checkpoints"),
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            keep_steps=resume.stage_ends(config),
            best_metric="em",
        ) as checkpointer,
        open_writer(workdir) if processes.is_main() else SilentWriter() as writer,
    ):
        step, saved = resume.find_saved(checkpointer, config, plan, tokenizer, workdir, fall_back)
        if step and step == last:
            processes.say(f"{workdir} is finished: it holds step {step} of {last}")
            return
        if saved:
            processes.say(f"resuming {workdir} at step {step} of {last}")
        writer.resume(step)
        params, base = resume.find_start(config, plan, tokenizer, mesh, saved, workdir)
        recorder = Recorder(
            config, checkpointer, writer, validator, tokenizer.to_bytes(), shape, base
        )

        # -------------------------------------------------------------- loop
        first, local = resume.locate(plan, step)
        state = saved.state if saved else None
        for number, stage in enumerate(plan[first:], start=first):
            batches = stage.batches()
            if state is None or saved is not None:
                recorder.start()
            if state is None:
                state = stage.start(params)
                processes.say(f"{stage.name}: {stage.describe(state)}")
                if stage.name == "rl" and config.rl.least_reader:
                    found = validator.check_reader(stage.params(state), config.rl.least_reader)
                    processes.say(f"rl: answers {found:.3f} from a memory without mistakes")
            elif saved is not None:  # always so: a state without `start` was restored
                batches.set_state(saved.data_state)
                saved = None
            if processes.is_main():  # what is normal differs from phase to phase
                recorder.watch = watch_rl(workdir, step - (local - stage.first), step)
            if stage.steps < stage.config.steps:
                processes.say(f"{stage.name}: steps {stage.first} to {stage.last}, {stage.shape}")
            for local_step in show_progress(stage, local):
                batch = next(batches)
                traced = config.profile and local_step == local + 1  # the first step compiles
                folder = os.path.join(workdir, "profile", stage.name) if traced else None
                with jax.transfer_guard("disallow"), profile(folder):
                    started = time.perf_counter()
                    trajectories = stage.rollout(state, batch, local_step)
                    reward = stage.reward(trajectories, batch)
                    trajectories, reward, drawn = stage.refill(
                        state, trajectories, reward, batches, local_step
                    )
                    played = time.perf_counter()
                    state, metrics = stage.update(state, trajectories, reward, local_step)
                    done = time.perf_counter()
                metrics |= drawn | stage.speed(metrics, played - started, done - played)
                step += 1
                if recorder.record(
                    stage, state, metrics, local_step + 1, step, batches.get_state()
                ):
                    processes.say(
                        f"SIGTERM: saved step {step} of {last}; the same command goes on from it"
                    )
                    return
            local = stage.last
            if number + 1 < len(plan) and plan[number + 1].name != stage.name:
                params, state, local = state["train"].params, None, 0


def show_progress(stage: stages.Stage, done: int) -> Iterable[int]:
    """The steps of a stage that are left, under a progress bar on one process."""
    return tqdm.tqdm(
        range(done, stage.last),
        desc=stage.name,
        initial=done,
        total=stage.config.steps,
        mininterval=2.0,
        disable=not processes.is_main(),
    )


@contextlib.contextmanager
def profile(folder: str | None) -> Iterator[None]:
    """Traces what is done within it to `folder`, for xprof or TensorBoard; None traces nothing.

    The phases are named scopes: retrieve, assemble, prefill, decode, parse, transition,
    microbatches and optimizer.
    """
    if folder is None:
        yield
        return
    # XLA has a client of its own for buckets, which knows neither our rights nor our errors.
    with paths.made_here(folder) as local, jax.profiler.trace(local):
        yield


if __name__ == "__main__":
    flags.run(main, leave=processes.leave)
