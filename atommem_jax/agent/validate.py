"""Checks of a whole config before anything is allocated: the fields that disagree, by name."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from atommem_jax.agent import build
from atommem_jax.config import ConfigError, Experiment, check, differences, paths
from atommem_jax.model import quantized
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import init_params
from atommem_jax.parallel.mesh import reshape_for_rollouts
from atommem_jax.tasks import encoding, keeper, schema, workflows
from atommem_jax.types import ActionKind, Phase


def validate(config: Experiment) -> None:
    """Raises ConfigError for two sections that disagree, and for names that there are not.

    What a section can say of itself was checked when it was parsed.
    """
    try:
        workflow = workflows.find(config.workflow)
        build.find_protocol(config)
        ModelConfig(vocab_size=1, lora=config.lora, **config.model.sizes()).validate()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    paths.check_local(config.sft.data, f"sft.data={config.sft.data}")
    check(
        config.rollout.param_dtype in ("float32", config.model.dtype, quantized.INT8),
        f"rollout.param_dtype={config.rollout.param_dtype!r}: allowed are 'float32', 'int8' and "
        f"model.dtype={config.model.dtype!r}; anything else would sample from another model than "
        "the one that learns",
    )
    for field in ("param_dtype", "cache_dtype"):
        check(
            getattr(config.rollout, field) != quantized.INT8
            or config.rl.steps == 0
            or config.rl.ppo.importance_cap > 0,
            f"rollout.{field}='int8' samples from another policy than the one that learns, and "
            f"rl.ppo.importance_cap={config.rl.ppo.importance_cap} does not correct for it: "
            "allowed is above 0, such as 2.0. Set it, or rl.steps=0 where nothing learns from "
            "rollouts",
        )
    check(
        config.debug.overfit == 0 or not config.sft.data,
        f"debug.overfit={config.debug.overfit} trains on a few samples, and sft.data="
        f"{config.sft.data} brings trajectories of others; set sft.data='', or debug.overfit=0",
    )
    check(
        config.prompt == "compact" or not config.model.match_features,
        f"model.match_features=True needs headers of one token each, and prompt={config.prompt!r} "
        "has others; set model.match_features=False",
    )
    check(
        not workflow.is_untrained or config.sft.steps == config.rl.steps == 0,
        f"workflow={config.workflow!r} is there to be compared with, not to be trained: allowed "
        f"are sft.steps=0 and rl.steps=0, found {config.sft.steps} and {config.rl.steps}; evaluate "
        "with --workflow instead",
    )
    check(
        workflow.program is None or config.rl.ppo.estimator == "group",
        f"rl.ppo.estimator={config.rl.ppo.estimator!r} learns a value for every turn, but "
        f"workflow={config.workflow!r} has turns that a program writes; use "
        "rl.ppo.estimator='group'",
    )
    check(
        config.lora.rank == 0 or bool(config.init_from),
        f"lora.rank={config.lora.rank} trains adapters of a base that stays as it is, and "
        "init_from is empty: a base of random numbers would be adapted. Set init_from to a "
        "checkpoint, or lora.rank=0 to train all parameters",
    )
    check(
        config.rl.steps == 0 or config.rollout.top_p == 1.0,
        f"rollout.top_p={config.rollout.top_p}: allowed with rl.steps={config.rl.steps} is 1.0: "
        "the learner scores tokens under the whole distribution; evaluate with "
        "--set rollout.top_p instead",
    )
    check(
        config.rl.resample == 0 or config.rl.ppo.estimator == "group",
        f"rl.resample={config.rl.resample}: allowed with rl.ppo.estimator="
        f"{config.rl.ppo.estimator!r} is 0, for only groups can be without contrast",
    )
    trajectories = config.rl.episodes * config.rl.ppo.group_size
    check(
        config.rl.ppo.group_size % config.rl.ppo.minibatches == 0
        or trajectories % config.rl.ppo.minibatches == 0,
        f"rl.episodes * rl.ppo.group_size = {trajectories} does not divide by "
        f"rl.ppo.minibatches={config.rl.ppo.minibatches}",
    )


def validate_devices(config: Experiment, data: int, fsdp: int = 1) -> None:
    """Batches must divide over `data` replicas of `fsdp` devices each.

    Raises ConfigError naming the fields.
    """
    shares = data * fsdp
    devices = f"mesh.data={data} x mesh.fsdp={fsdp}" if fsdp > 1 else f"mesh.data={data}"
    trajectories = config.rl.episodes * config.rl.ppo.group_size
    rollout = f"rl.episodes={config.rl.episodes} x rl.ppo.group_size={config.rl.ppo.group_size}"
    for field, size, parts in (
        (f"sft.episodes={config.sft.episodes}", config.sft.episodes, shares),
        (f"eval.batch_size={config.eval.batch_size}", config.eval.batch_size, shares),
        (rollout, trajectories, shares),
        # Without fsdp a device computes the advantages of whole groups.
        (f"rl.episodes={config.rl.episodes}", config.rl.episodes, data if fsdp == 1 else 1),
    ):
        check(
            size % parts == 0,
            f"{field} does not divide over {devices}; choose a multiple, or set mesh.data"
            f"{' or mesh.fsdp' if fsdp > 1 else ''}",
        )


def validate_parameters(parts: build.Parts, mesh: Mesh) -> None:
    """Raises ConfigError for a parameter that does not divide over the mesh; allocates nothing.

    The same for rollouts, on the mesh of theirs.
    """
    model = parts.agent.model
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    try:
        model.config.layout.specs(shapes, mesh)
        rollouts = reshape_for_rollouts(mesh, parts.config.mesh.rollout_tensor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        model.config.layout.specs(shapes, rollouts)
    except ValueError as error:
        raise ConfigError(str(error).replace("mesh.tensor", "mesh.rollout_tensor")) from error


def validate_shape(
    config: Experiment,
    parts: build.Parts,
    shape: encoding.EpisodeShape,
    examples: Sequence[schema.Example],
) -> None:
    """Token budgets against the data. Raises ConfigError naming field and least value."""
    validate_turns(config, parts)
    # Of a collected teacher each turn is judged by itself, see `store.find_learnable`.
    if not config.sft.data or parts.workflow.program is not None:
        validate_script(config, parts, shape, examples)
    check(
        config.rollout.answer_length >= shape.answer_length,
        f"rollout.answer_length={config.rollout.answer_length}: an answer has "
        f"{shape.answer_length} tokens; raise it",
    )


def validate_script(
    config: Experiment,
    parts: build.Parts,
    shape: encoding.EpisodeShape,
    examples: Sequence[schema.Example],
) -> None:
    """What a script writes must fit into a turn. Raises ConfigError as `validate_shape`."""
    limit = config.rollout.response_length
    longest, actions = _longest_turn(parts, shape, examples)
    check(
        limit >= longest,
        f"rollout.response_length={limit}: a reading turn of the teacher may take {longest} "
        f"tokens, {actions} actions; raise it, or lower what a chunk holds",
    )
    check(
        config.rollout.max_actions >= actions,
        f"rollout.max_actions={config.rollout.max_actions}: the teacher writes up to {actions} "
        "actions a turn; raise it, or lower what a chunk holds",
    )


def validate_turns(config: Experiment, parts: build.Parts) -> None:
    """A response must have room for the shortest turn. Raises ConfigError as `validate_shape`."""
    limit = config.rollout.response_length
    for phase in (Phase.READING, Phase.ANSWERING, Phase.FINAL):
        least = parts.agent.grammar.min_tokens(phase)
        check(
            limit >= least,
            f"rollout.response_length={limit}: a turn while {phase.name} needs {least}",
        )


def _longest_turn(
    parts: build.Parts,
    shape: encoding.EpisodeShape,
    examples: Sequence[schema.Example],
) -> tuple[int, int]:
    """Tokens, and actions, of the longest reading turn that a teacher writes."""
    script, program = parts.script, parts.workflow.program
    if parts.config.task.name == "village":
        return keeper.longest_turn(script, parts.config.rollout.max_actions)
    stored, facts = max(shape.chunk_length, shape.facts * shape.note_length), shape.facts
    stores_all = parts.config.teacher.store_distractor > 0 or program is not None
    if not stores_all:
        stored, facts = encoding.longest_support(examples, parts.tokenizer, cap=script.max_text)
    around = {kind: script.tokens_around(kind) for kind in ActionKind}
    # A stale entry is deleted before the new one is created, or it is updated.
    deletes = (parts.config.teacher if program is None else program).delete > 0
    create = around[ActionKind.CREATE] + (around[ActionKind.DELETE] if deletes else 0)
    edit = max(create, around[ActionKind.UPDATE])
    query = around[ActionKind.READ] + shape.query_length
    return query + stored + facts * edit + 1, 1 + facts * (2 if deletes else 1)


def check_same_config(config: Experiment, saved: Experiment, workdir: str) -> None:
    """Raises ConfigError naming what changed since the checkpoint was written.

    On which devices a run goes on is free, and whether it is profiled; with adapters also where
    the base lies, which has a fingerprint.
    """
    free = ("mesh.", "profile=", *(["init_from="] if config.lora.rank else []))
    changed = [path for path in differences(config, saved) if not path.startswith(free)]
    check(
        not changed,
        f"{workdir} was started with another config: {'; '.join(changed)}. Pass the same "
        "config to resume, or another --workdir.",
    )
