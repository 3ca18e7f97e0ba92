"""Crossed policies: one reads the document, another answers from the memory that it left.

They tell which half of an agent falls short. A model that answers from the memory of a teacher
without mistakes is a *reader* by itself: reinforcement learning of what to store is blind where the
reader is a coin, for what is stored is judged by what is answered.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from atommem_jax.agent import play as play_lib
from atommem_jax.agent.build import Parts
from atommem_jax.config import TeacherConfig
from atommem_jax.learning import evaluation, rollout
from atommem_jax.memory import embedding
from atommem_jax.parallel import host_batches, program
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.tasks import batches as batches_lib
from atommem_jax.tasks import encoding
from atommem_jax.types import Policy

CLEAN = TeacherConfig()
"""A teacher that makes no mistake."""

Table = dict[str, dict[str, float]]
"""EM by who reads and who answers."""


def make_player(
    parts: Parts,
    shape: encoding.EpisodeShape,
    mesh: Mesh,
    *,
    reading: TeacherConfig | None,
    answering: TeacherConfig | None,
    tensor: int = 0,
):
    """Jitted (params of who reads, of who answers, episodes, ids, seed key, temperature).

    It gives trajectories; `None` is a model, whose parameters are taken, and a teacher takes none
    (pass None). tensor: as for `play.make_player`, and models are placed as there.
    """
    rollout_mesh = mesh_lib.reshape_for_rollouts(mesh, tensor)
    layout = parts.agent.model.config.layout

    def make_policy(script, agent, params, temperature, episodes) -> Policy:
        if script is None:
            return rollout.model_policy(agent, params, temperature, episodes)
        return parts.make_teacher(parts.workflow.restrict(script))

    def play_local(agent, setting, first, second, episodes, ids, seed, temperature):
        reader = make_policy(reading, agent, first, temperature, episodes)
        answerer = make_policy(answering, agent, second, temperature, episodes)
        return rollout.run(setting, rollout.by_phase(reader, answerer), episodes, ids, seed)

    play_shares = program.data_parallel(
        play_local, rollout_mesh, rows=("episodes", "ids"), out=program.ROWS
    )

    @jax.jit
    def play(agent, setting, first, second, *rest):
        mind = second if first is None else first  # who reads writes the entries
        if mind is not None:
            setting = setting.replace(embed=embedding.bind(setting.embed, mind))
        minds = [
            None if mind is None else play_lib.place_for_rollouts(mind, layout, mesh, rollout_mesh)
            for mind in (first, second)
        ]
        trajectories = play_shares(agent, setting, *minds, *rest)
        return jax.lax.with_sharding_constraint(trajectories, NamedSharding(mesh, program.ROWS))

    return functools.partial(
        play, *host_batches.replicate((parts.agent, parts.setting(shape)), mesh)
    )


def measure(
    parts: Parts,
    mesh: Mesh,
    minds: Mapping[str, Any],
    examples: Any,
    shape: encoding.EpisodeShape,
    *,
    readers: list[str] | None = None,
    answerers: list[str] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    tensor: int = 0,
) -> Table:
    """EM of every pair of policies on some examples.

    Args:
      parts: of the agent.
      mesh: that the parameters lie on.
      minds: by name, a `TeacherConfig` or the parameters of a model.
      examples: of a split.
      shape: that they fit.
      readers: names of those that read; None for all.
      answerers: names of those that answer; None for all.
      temperature: of models; 0 is greedy.
      seed: of all randomness.
      tensor: `mesh.rollout_tensor`.
    """
    key = host_batches.replicate(jax.random.key(seed), mesh)
    heat = host_batches.replicate(np.float32(temperature), mesh)

    def split(mind: Any) -> tuple[TeacherConfig | None, Any]:
        return (mind, None) if isinstance(mind, TeacherConfig) else (None, mind)

    table: Table = {}
    for reader in readers or list(minds):
        table[reader] = {}
        for answerer in answerers or list(minds):
            (reading, first), (answering, second) = split(minds[reader]), split(minds[answerer])
            play = make_player(
                parts, shape, mesh, reading=reading, answering=answering, tensor=tensor
            )
            batches = batches_lib.iterate_split(
                examples,
                parts.tokenizer,
                shape,
                batch_size=(size := parts.config.eval.batch_size),
                rows=host_batches.process_rows(mesh, size),
            )
            records, _ = evaluation.evaluate(
                functools.partial(_call, play, first, second, key, heat),
                batches,
                parts.tokenizer.decode,
                mesh=mesh,
            )
            table[reader][answerer] = evaluation.summarise(records)["em"]
    return table


def _call(play, first, second, key, heat, episodes, ids):
    return play(first, second, episodes, ids, key, heat)


def render(table: Table) -> str:
    """The table, aligned: who reads from above to below, who answers from left to right."""
    answerers = list(next(iter(table.values())))
    head = "reads \\ answers"
    width = max(map(len, [*table, head]))
    lines = [f"{head:{width}}" + "".join(f"{name:>12}" for name in answerers)]
    for reader, row in table.items():
        lines.append(f"{reader:{width}}" + "".join(f"{row[name]:12.3f}" for name in answerers))
    return "\n".join(lines)
