"""Where a run goes on: the last checkpoint of its workdir, or what training starts from."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from atommem_jax.agent import build, load, validate
from atommem_jax.config import ConfigError, Experiment, check, differences, parse
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.parallel import processes
from atommem_jax.parallel.rules import TRAINING
from atommem_jax.runs.stages import Stage, attach_base
from atommem_jax.weights.checkpoint import (
    Checkpointer,
    CheckpointError,
    CorruptCheckpointError,
    Restored,
)


def find_saved(
    checkpointer: Checkpointer,
    config: Experiment,
    plan: Sequence[Stage],
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
            validate.check_same_config(config, parse(checkpointer.restore_config(step)), workdir)
            if step == last:
                return step, None
            owner, _ = locate(plan, step)
            saved = checkpointer.restore(step, abstract_state=plan[owner].abstract_state())
        except CorruptCheckpointError as error:
            check(fall_back, f"{error}. {_advise(error)}")
            processes.say(f"{error}; it is now called {checkpointer.set_aside(step)}")
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


def find_start(
    config: Experiment,
    plan: Sequence[Stage],
    tokenizer: Tokenizer,
    mesh: Mesh,
    saved: Restored | None,
    workdir: str,
) -> tuple[Any | None, dict[str, str]]:
    """Parameters that training starts from, None for new ones; the base of adapters, if any.

    With adapters the stages of the plan get their base (`stages.attach_base`), and what is
    returned with the parameters goes into every checkpoint: {"base": its fingerprint}.

    Raises ConfigError where `init_from` does not fit, or saved adapters have another base.
    """
    params = None
    if saved is None or config.lora.rank:
        params = load_initial(config, tokenizer, mesh)
    if not config.lora.rank:
        return params, {}
    params, fingerprint = attach_base(plan, params)
    if saved is not None:
        load.check_base(config.init_from, fingerprint, saved, workdir)
    return params, {"base": fingerprint}


def load_initial(config: Experiment, tokenizer: Tokenizer, mesh: Mesh | None = None) -> Any | None:
    """The parameters of `config.init_from`, each where it is trained; None where it is empty.

    Raises ConfigError where there are none, or they belong to another tokenizer or model.
    """
    if not config.init_from:
        return None
    loaded = load.load(
        config.init_from,
        cpu_devices=config.mesh.cpu_devices,
        mesh=mesh,
        rules=TRAINING,
        merge=True,
    )
    check(
        loaded.parts.tokenizer.to_bytes() == tokenizer.to_bytes(),
        f"init_from={config.init_from}: its tokenizer is not that of this task; pass a checkpoint "
        "trained on the same task and memory.shown",
    )
    ours, theirs = (build.architecture(c) for c in (config, loaded.parts.config))
    changed = differences(ours, theirs, "model.")
    check(not changed, f"init_from={config.init_from} holds another model: {'; '.join(changed)}")
    return loaded.params


def stage_ends(config: Experiment) -> list[int]:
    """Global steps at which the stages end; their checkpoints are always kept."""
    return [config.sft.steps, config.sft.steps + config.rl.steps]


def locate(plan: Sequence[Stage], step: int) -> tuple[int, int]:
    """(stage, steps done of its kind) of the run after `step` steps, as a checkpoint holds it."""
    begun = 0  # steps before the first of this kind
    for index, stage in enumerate(plan):
        if index and stage.name != plan[index - 1].name:
            begun += plan[index - 1].last
        if step - begun <= stage.last and (step > 0 or stage.last > 0):
            return index, step - begun
    return len(plan) - 1, plan[-1].last
