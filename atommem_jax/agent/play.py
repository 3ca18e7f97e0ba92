"""Jitted players: the rollouts of an agent, or of a scripted teacher, over a mesh."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from atommem_jax.agent.build import Parts
from atommem_jax.config import TeacherConfig
from atommem_jax.learning import environment, rollout
from atommem_jax.memory import embedding
from atommem_jax.model import lora, quantized
from atommem_jax.model.transformer import without_adapters
from atommem_jax.parallel import host_batches, program
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import rules as rules_lib
from atommem_jax.tasks import encoding, keeper
from atommem_jax.types import Episode, Policy


def make_player(
    parts: Parts,
    shape: encoding.EpisodeShape,
    mesh: Mesh,
    *,
    tensor: int = 0,
    teacher: TeacherConfig | None = None,
):
    """Jitted (params, episodes, ids, seed key, temperature) -> trajectories of the model.

    Episodes and ids are sharded over `mesh`, and so are the trajectories. Parameters may lie
    anywhere: they are moved, and cast to `rollout.param_dtype`, once a rollout.

    tensor: `mesh.rollout_tensor`, see `mesh.reshape_for_rollouts`; raises ValueError as it does.
    teacher: its responses to the views of the model are recorded, see `rollout.run`.
    """
    play = make_program(parts, mesh, tensor=tensor, teacher=teacher)
    return functools.partial(
        play, *host_batches.replicate((parts.agent, parts.setting(shape)), mesh)
    )


@dataclasses.dataclass(frozen=True)
class SegmentPlayer:
    """Plays long episodes a segment at a time, see `rollout.run_segment`.

    start: (episodes) -> environments, before the first turn.
    play: (params, environments, episodes, ids, seed key, temperature, number of the first turn) ->
      environments and records of the turns, [B T].
    """

    start: Callable[..., Any]
    play: Callable[..., Any]
    turns: int  # of a segment


def make_segment_player(
    parts: Parts, shape: encoding.EpisodeShape, mesh: Mesh, *, tensor: int = 0
) -> SegmentPlayer:
    """Jitted; `shape.chunks`, the length of a window, is the number of turns of a segment.

    tensor: as for `make_player`.
    """
    turns = shape.chunks

    def play_local(agent, setting, params, env, episodes, ids, seed, temperature, first_turn):
        policy = _make_policy(parts, agent, params, temperature, episodes)
        env, records = rollout.run_segment(
            setting, policy, env, episodes, ids, seed, first_turn, turns
        )
        return env, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), records)

    def start_local(setting, episodes):
        return jax.vmap(environment.start, in_axes=(None, 0))(setting, episodes)

    play = _compile(parts, mesh, tensor, play_local, rows=("env", "episodes", "ids"))
    start = jax.jit(program.data_parallel(start_local, mesh, rows=("episodes",), out=program.ROWS))
    agent, setting = host_batches.replicate((parts.agent, parts.setting(shape)), mesh)
    return SegmentPlayer(
        functools.partial(start, setting), functools.partial(play, agent, setting), turns
    )


def make_program(
    parts: Parts, mesh: Mesh, *, tensor: int = 0, teacher: TeacherConfig | None = None
):
    """Jitted (agent, setting, params, episodes, ids, seed key, temperature) -> trajectories.

    The same function whenever it is asked for the same: where shapes and the number of rows are
    equal too, rollouts of RL and validation are compiled once.

    tensor: as for `make_player`. What is given lies on `mesh`, and so does what comes back; between
      the two everything lies on the mesh of rollouts, which has the same devices.
    teacher: as for `make_player`.
    """

    def play_local(agent, setting, params, episodes, ids, seed, temperature):
        policy = _make_policy(parts, agent, params, temperature, episodes)
        label = None
        if teacher is not None:
            rates, scratchpad_only = _restrict(parts, teacher, parts.habits)
            known = TeacherConfig(
                **{name: float(rate) for name, rate in rates.items()},
                scratchpad_only=scratchpad_only,
            )
            label = parts.make_teacher(known, parts.habits)
            label = parts.workflow.apply(label, parts.make_teacher)
        return rollout.run(setting, policy, episodes, ids, seed, label=label)

    wanted = ("episodes", mesh, tensor, teacher)
    if wanted not in parts.programs:
        parts.programs[wanted] = _compile(parts, mesh, tensor, play_local, rows=("episodes", "ids"))
    return parts.programs[wanted]


def _make_policy(parts: Parts, agent, params, temperature, episodes: Episode) -> Policy:
    """The model in the workflow."""
    agents = [agent.replace(grammar=grammar) for grammar in parts.pair] or [agent]
    policies = [rollout.model_policy(each, params, temperature, episodes) for each in agents]
    policy = rollout.by_pair(*policies) if parts.pair else policies[0]
    return parts.workflow.apply(policy, parts.make_teacher)


def _compile(parts: Parts, mesh: Mesh, tensor: int, play_local: Any, rows: Sequence[str]):
    """Jitted `play_local`, a function of (agent, setting, params, ...) on a share of the `rows`.

    Adapters are merged into their matrices once a rollout, in float32, and cost decoding nothing.
    A model that computes in bfloat16 keeps the branch: rounded after the sum, the matrices would be
    those of another policy than the one that learns.
    """
    rollout_mesh = mesh_lib.reshape_for_rollouts(mesh, tensor)
    model = parts.agent.model.config
    layout = model.layout
    dtype = parts.config.rollout.param_dtype
    merges = model.dtype == "float32"
    play_shares = program.data_parallel(play_local, rollout_mesh, rows=rows, out=program.ROWS)

    @jax.jit
    def play(agent, setting, params, *rest):
        setting = setting.replace(embed=embedding.bind(setting.embed, params))
        if merges:
            params = lora.merge(params, model.lora)
            agent = agent.replace(model=without_adapters(agent.model))
        params = cast_matrices(params, dtype)
        params = place_for_rollouts(params, layout, mesh, rollout_mesh)
        trajectories = play_shares(agent, setting, params, *rest)
        return jax.lax.with_sharding_constraint(trajectories, NamedSharding(mesh, program.ROWS))

    return play


def place_for_rollouts(params: Any, layout: rules_lib.Layout, mesh: Mesh, rollout_mesh: Mesh):
    """Inside a program: parameters that lie on `mesh` by `TRAINING`, as rollouts want them.

    They stay where they lie while they are cast, are dealt out to the axes of rollouts, and only
    then gathered over `fsdp`.
    """
    by_inner = {**rules_lib.TRAINING, "embed": (rules_lib.FSDP, mesh_lib.INNER)}
    for to, rules in (
        (mesh, rules_lib.TRAINING),
        *([(mesh_lib.refine(mesh, rollout_mesh), by_inner)] if rollout_mesh != mesh else []),
        (rollout_mesh, rules_lib.TRAINING),
        (rollout_mesh, rules_lib.ROLLOUT),
    ):
        params = jax.lax.with_sharding_constraint(params, layout.shardings(params, to, rules))
    return params


def cast_matrices(params, dtype: str):
    """Matrices and embeddings in another dtype; norms and the value head stay in float32.

    With "bfloat16" it changes nothing of what a model with `dtype="bfloat16"` computes, which
    casts them anyway, but halves what decoding reads. With "int8" it is another policy, see
    `quantized.quantize_matrices`, and everything else is kept as it is.
    """
    if dtype == quantized.INT8:
        return quantized.quantize_matrices(params)

    def cast(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf if "norm" in name or "value_head" in name else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def make_scripted_player(
    parts: Parts,
    shape: encoding.EpisodeShape,
    config: TeacherConfig,
    mesh: Mesh,
    habits: keeper.Habits | None = None,
):
    """Jitted (episodes, ids, seed key) -> trajectories of a scripted teacher in the workflow.

    habits: see `Parts.make_teacher`.
    """
    scratchpad_only = _restrict(parts, config, habits)[1]
    play = make_scripted_program(parts, mesh, scratchpad_only=scratchpad_only)
    return bind_script(play, parts, shape, config, mesh, habits)


def make_scripted_program(parts: Parts, mesh: Mesh, *, scratchpad_only: bool = False):
    """Jitted (setting, rates, habits, episodes, ids, seed key) -> trajectories; see `bind_script`.

    Rates and habits are arguments, so that teachers share what was compiled for one.
    """

    def play_local(setting, rates, habits, episodes, ids, seed):
        config = TeacherConfig(**rates, scratchpad_only=scratchpad_only)
        policy = parts.make_teacher(config, habits)
        policy = parts.workflow.apply(policy, parts.make_teacher)
        return rollout.run(setting, policy, episodes, ids, seed)

    return jax.jit(
        program.data_parallel(play_local, mesh, rows=("episodes", "ids"), out=program.ROWS)
    )


def bind_script(
    play,
    parts: Parts,
    shape: encoding.EpisodeShape,
    config: TeacherConfig,
    mesh: Mesh,
    habits: keeper.Habits | None = None,
):
    """(episodes, ids, seed key) -> trajectories, of a `make_scripted_program` of these `parts`."""
    rates, _ = _restrict(parts, config, habits)
    traced = (parts.setting(shape), rates, jax.tree.map(np.asarray, habits))
    return functools.partial(play, *host_batches.replicate(traced, mesh))


def _restrict(
    parts: Parts, config: TeacherConfig, habits: keeper.Habits | None
) -> tuple[dict[str, np.float32], bool]:
    """Rates of a teacher that keeps to the workflow's kinds, and whether it has no store.

    Habits say themselves what a script has; then rates tell of its mistakes alone.
    """
    fields = dataclasses.asdict(config if habits else parts.workflow.restrict(config))
    scratchpad_only = fields.pop("scratchpad_only")
    return {name: np.float32(value) for name, value in fields.items()}, scratchpad_only
