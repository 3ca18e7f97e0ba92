"""Checks of a whole config before anything is allocated: the fields that disagree, by name."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from atommem_jax.agent import build
from atommem_jax.config import ConfigError, check
from atommem_jax.learning.microbatches import check_eighths
from atommem_jax.learning.optimizer import OptimizerConfig
from atommem_jax.learning.trainer import PPOConfig
from atommem_jax.memory import slot_table
from atommem_jax.model.sampling import SamplerConfig
from atommem_jax.model.transformer import ModelConfig, init_params
from atommem_jax.tasks import encoding, schema, teacher, workflows
from atommem_jax.types import ActionKind, Phase


def validate(config: ConfigDict) -> None:
    """Raises ConfigError for a value out of range or two fields that disagree."""
    try:
        workflow = workflows.find(config.workflow)
        build.find_protocol(config)
        build.subconfig(teacher.TeacherConfig, config.teacher).validate()
        build.subconfig(OptimizerConfig, config.sft.optimizer).validate("sft.optimizer")
        build.subconfig(OptimizerConfig, config.rl.optimizer).validate("rl.optimizer")
        build.subconfig(PPOConfig, config.rl.ppo).validate("rl.ppo")
        check_eighths(config.sft.eighths, "sft.eighths")
        model = config.model.to_dict()
        model.pop("match_features")
        ModelConfig(vocab_size=1, lora=build.lora_config(config), **model).validate()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    validate_play(config)
    _validate_sizes(config)
    check(
        config.prompt in ("compact", "chat"),
        _message("prompt", config, "'compact' or 'chat'"),
    )
    check(
        config.prompt == "compact" or not config.model.match_features,
        f"model.match_features=True needs headers of one token each, and prompt={config.prompt!r} "
        "has others; set model.match_features=False",
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
    check(config.rl.temperature > 0, _message("rl.temperature", config, "above 0"))
    check(0 <= config.sft.min_reward <= 1, _message("sft.min_reward", config, "0 to 1"))


def validate_play(config: ConfigDict) -> None:
    """Raises ConfigError for sizes of `memory` or `rollout` that nothing can be played with."""
    r, dtype = config.rollout, config.model.dtype
    score_chunk, param_dtype = r.get("score_chunk", 0), r.get("param_dtype", "float32")  # if older
    try:
        SamplerConfig(r.response_length, r.constrained, r.top_p, score_chunk).validate()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check(
        param_dtype in ("float32", dtype),
        f"rollout.param_dtype={param_dtype!r}: allowed are 'float32' and model.dtype={dtype!r}; "
        "anything else would sample from another model than the one that learns",
    )
    for name in ("max_actions", "answer_length"):
        check(r[name] >= 1, _message(f"rollout.{name}", config, "at least 1"))
    for name in ("read_budget", "answer_read_budget", "group"):
        check(r[name] >= 0, _message(f"rollout.{name}", config, "0 or more"))
    _validate_memory(config)


def _validate_memory(config: ConfigDict) -> None:
    m = config.memory
    check(
        m.shown <= m.slots,
        f"memory.shown={m.shown} is more than memory.slots={m.slots}; show at most what there is",
    )
    check(
        m.eviction in slot_table.EVICTION_POLICIES,
        f"memory.eviction={m.eviction!r}: allowed are {', '.join(slot_table.EVICTION_POLICIES)}",
    )
    for name in ("slots", "shown", "entry_length", "scratchpad_length", "query_length", "key_dim"):
        check(m[name] >= 1, _message(f"memory.{name}", config, "at least 1"))


def _validate_sizes(config: ConfigDict) -> None:
    for path in (
        "sft.episodes",
        "rl.episodes",
        "sft.save_every",
        "sft.eval_every",
        "rl.save_every",
        "rl.eval_every",
        "eval.episodes",
        "eval.batch_size",
        "mesh.cpu_devices",
        "mesh.fsdp",
        "mesh.tensor",
        "mesh.slices",
        "rl.max_skipped_in_a_row",
    ):
        check(_get(config, path) >= 1, _message(path, config, "at least 1"))
    for path in (
        "sft.steps",
        "rl.steps",
        "mesh.data",
    ):
        check(_get(config, path) >= 0, _message(path, config, "0 or more"))
    trajectories = config.rl.episodes * config.rl.ppo.group_size
    check(
        config.rl.ppo.group_size % config.rl.ppo.minibatches == 0
        or trajectories % config.rl.ppo.minibatches == 0,
        f"rl.episodes * rl.ppo.group_size = {trajectories} does not divide by "
        f"rl.ppo.minibatches={config.rl.ppo.minibatches}",
    )


def validate_devices(config: ConfigDict, data: int, fsdp: int = 1) -> None:
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
    share, group = trajectories // shares, config.rollout.group
    check(
        group in (0,) or group >= share or share % group == 0,
        f"rollout.group={group} does not divide the {share} trajectories of a device "
        f"({rollout} over {devices}); choose a divisor, or 0 for all at once",
    )


def validate_parameters(parts: build.Parts, mesh: Mesh) -> None:
    """Raises ConfigError for a parameter that does not divide over the mesh; allocates nothing."""
    model = parts.agent.model
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    try:
        model.config.layout.specs(shapes, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def validate_shape(
    config: ConfigDict,
    parts: build.Parts,
    shape: encoding.EpisodeShape,
    examples: Sequence[schema.Example],
) -> None:
    """Token budgets against the data. Raises ConfigError naming field and least value."""
    validate_turns(config, parts)
    limit = config.rollout.response_length
    # Of a collected teacher each turn is judged by itself, see `collected.find_learnable`.
    if not config.sft.data or parts.workflow.program is not None:
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
    check(
        config.rollout.answer_length >= shape.answer_length,
        f"rollout.answer_length={config.rollout.answer_length}: an answer has "
        f"{shape.answer_length} tokens; raise it",
    )


def validate_turns(config: ConfigDict, parts: build.Parts) -> None:
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


def _get(config: ConfigDict, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = value[part]
    return value


def _message(path: str, config: ConfigDict, allowed: str) -> str:
    return f"{path}={_get(config, path)}: allowed is {allowed}; set --config.{path}"


def differences(ours: ConfigDict, theirs: ConfigDict, prefix: str = "") -> list[str]:
    """Paths whose values differ, with both values."""
    found = []
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name), theirs.get(name)
        path = f"{prefix}{name}"
        if isinstance(a, ConfigDict) and isinstance(b, ConfigDict):
            found += differences(a, b, f"{path}.")
        elif _plain(a) != _plain(b):
            found.append(f"{path}={a!r} (checkpoint: {b!r})")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def check_same_config(config: ConfigDict, saved: ConfigDict, workdir: str) -> None:
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
