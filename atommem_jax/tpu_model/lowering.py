"""The real programs of a training run, lowered for a mesh whose devices need not exist.

What `train.py` runs is traced with shapes in place of arrays: nothing is allocated, so that a
laptop can compile for a pod. `programs` takes a config and a mesh (of
`jax.experimental.topologies`, or of devices that are there) and returns the jitted functions with
their arguments, by phase.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from atommem_jax.agent import build, play
from atommem_jax.config import Experiment
from atommem_jax.learning import optimizer as optimizer_lib
from atommem_jax.learning import trainer
from atommem_jax.model import lora
from atommem_jax.model.transformer import init_params
from atommem_jax.parallel import rules
from atommem_jax.tasks.encoding import EpisodeShape
from atommem_jax.types import Annotations, Episode

PHASES = ("sft", "rollout", "update")


class StandInTokenizer:
    """As many ids as a published tokenizer, and the reserved names of a config; no text.

    It makes the protocol's tables as large as they would be, and can neither encode nor decode.
    """

    def __init__(self, vocab_size: int, reserved: Sequence[str]):
        self.vocab_size, self.pad_id, self.eos_id = vocab_size, 0, 1
        self.reserved = {name: 2 + i for i, name in enumerate(reserved)}
        special = 2 + len(reserved)
        self.token_bytes = (b"",) * special + (b"x",) * (vocab_size - special)

    @property
    def information(self) -> Float[np.ndarray, " V"]:
        """Nothing: without text all tokens are alike."""
        return np.zeros(self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Raises NotImplementedError."""
        raise NotImplementedError("a stand-in tokenizer has sizes and no text")

    def decode(self, ids: Any) -> str:
        """Raises NotImplementedError."""
        raise NotImplementedError("a stand-in tokenizer has sizes and no text")

    def to_bytes(self) -> bytes:
        """Raises NotImplementedError."""
        raise NotImplementedError("a stand-in tokenizer has sizes and no text")


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of a phase and the abstract arguments to lower it with."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    state: Any  # the training state among the arguments, or the parameters alone
    frozen: Any | None  # parameters beside those of a training state
    rows: int  # trajectories of the whole batch

    def lower(self) -> Any:
        """`jax.stages.Lowered`, for the platform of the mesh."""
        return self.function.lower(*self.arguments, **self.keywords)


def make_parts(config: Experiment) -> build.Parts:
    """The agent of a config with `tokenizer.vocab_size` ids, without data or weights."""
    names = build.reserved_names(config)
    return build.build(config, StandInTokenizer(config.tokenizer.vocab_size, names))


def programs(
    config: Experiment, parts: build.Parts, shape: EpisodeShape, mesh: Mesh, phases: Sequence[str]
) -> dict[str, Program]:
    """The functions that `train.py` jits for this config, by phase."""
    made = {}
    for phase in phases:
        made[phase] = {"sft": _sft, "rollout": _rollout, "update": _update}[phase](
            config, parts, shape, mesh
        )
    return made


def _sft(config, parts, shape, mesh) -> Program:
    optimizer = optimizer_lib.make_optimizer(config.sft.optimizer, config.sft.steps)
    state, frozen = _state(parts, optimizer, mesh)
    rows = config.sft.episodes
    keep = _place(jax.ShapeDtypeStruct((rows,), jnp.bool_), mesh, PartitionSpec(rules.BATCH))
    return Program(
        trainer.sft_step,
        (
            _whole(parts.agent, mesh),
            state,
            _trajectories(parts, shape, mesh, rows),
            keep,
            frozen,
        ),
        {
            "optimizer": optimizer,
            "rows": config.sft.microbatch_rows,
            "length_buckets": config.sft.length_buckets,
            "mesh": mesh,
        },
        state,
        frozen,
        rows,
    )


def _rollout(config, parts, shape, mesh) -> Program:
    rows = config.rl.episodes * config.rl.ppo.group_size
    arguments = _rollout_arguments(parts, shape, mesh, rows)
    function = _player(parts, mesh)
    return Program(function, arguments, {}, arguments[2], None, rows)


def _player(parts, mesh):
    return play.make_program(parts, mesh, tensor=parts.config.mesh.rollout_tensor)


def _update(config, parts, shape, mesh) -> Program:
    ppo = config.rl.ppo
    total = config.rl.steps * ppo.minibatches * ppo.epochs
    optimizer = optimizer_lib.make_optimizer(config.rl.optimizer, total)
    state, frozen = _state(parts, optimizer, mesh)
    rows = config.rl.episodes * ppo.group_size
    batch = PartitionSpec(rules.BATCH)
    rewards = jax.ShapeDtypeStruct((rows, shape.questions), jnp.float32)
    counts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return Program(
        trainer.update_step,
        (
            _whole(parts.agent, mesh),
            state,
            _trajectories(parts, shape, mesh, rows),
            _place(rewards, mesh, batch),
            _place(counts, mesh, batch),
            _key(mesh),
            _place(jax.ShapeDtypeStruct((), jnp.float32), mesh, PartitionSpec()),
            state.params if ppo.needs_reference else None,
            frozen,
        ),
        {"optimizer": optimizer, "config": ppo, "mesh": mesh},
        state,
        frozen,
        rows,
    )


def _rollout_arguments(parts, shape, mesh, rows):
    params = lora.join(*_params(parts, mesh))
    batch = PartitionSpec(rules.BATCH)
    episodes = _place(abstract_episodes(shape, rows), mesh, batch)
    ids = _place(jax.ShapeDtypeStruct((rows,), jnp.int32), mesh, batch)
    temperature = _place(jax.ShapeDtypeStruct((), jnp.float32), mesh, PartitionSpec())
    agent, setting = _whole((parts.agent, parts.setting(shape)), mesh)
    return agent, setting, params, episodes, ids, _key(mesh), temperature


def _trajectories(parts, shape, mesh, rows):
    """What a rollout of the agent leaves: a teacher's has the same shapes."""
    arguments = _rollout_arguments(parts, shape, mesh, rows)
    shapes = jax.eval_shape(_player(parts, mesh), *arguments)
    return _place(shapes, mesh, PartitionSpec(rules.BATCH))


def _state(parts, optimizer, mesh):
    """The training state, and the parameters that are frozen beside it."""
    trainable, frozen = _params(parts, mesh)
    shapes = jax.eval_shape(lambda params: optimizer_lib.create_state(params, optimizer), trainable)
    return _lay_out(shapes, parts, mesh), frozen


def _params(parts, mesh):
    """(trainable, frozen) as they lie while they are trained."""
    model = parts.agent.model
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    trainable, frozen = lora.partition(shapes, model.config.lora)
    if frozen is not None:
        frozen = jax.eval_shape(
            lambda params: play.cast_matrices(params, model.config.lora.base_dtype), frozen
        )
        frozen = _lay_out(frozen, parts, mesh)
    return _lay_out(trainable, parts, mesh), frozen


def _lay_out(shapes, parts, mesh):
    where = parts.agent.model.config.layout.shardings(shapes, mesh)
    return jax.tree.map(_with_sharding, shapes, where)


def abstract_episodes(shape: EpisodeShape, batch: int) -> Episode:
    """Shapes and dtypes of a batch of episodes."""
    s = shape

    def array(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((batch, *sizes), dtype)

    annotations = Annotations(
        start=array(s.chunks, s.facts),
        length=array(s.chunks, s.facts),
        note=array(s.chunks, s.facts, s.note_length),
        note_length=array(s.chunks, s.facts),
        subject_length=array(s.chunks, s.facts),
        support=array(s.chunks, s.facts, dtype=jnp.bool_),
        supersedes=array(s.chunks, s.facts),
        category=array(s.chunks, s.facts),
        needs=array(s.questions, s.needs),
        gold=array(s.questions, s.answer_length),
        gold_length=array(s.questions),
        focus=array(s.query_length),
        focus_length=array(),
    )
    return Episode(
        id=array(),
        chunks=array(s.chunks, s.chunk_length),
        chunk_lengths=array(s.chunks),
        first_chunk=array(),
        num_chunks=array(),
        questions=array(s.questions, s.question_length),
        question_lengths=array(s.questions),
        num_questions=array(),
        annotations=annotations,
    )


def _place(tree, mesh, spec):
    return jax.tree.map(lambda x: _with_sharding(x, NamedSharding(mesh, spec)), tree)


def _whole(tree, mesh):
    return _place(tree, mesh, PartitionSpec())


def _with_sharding(x, where):
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where)


def _key(mesh):
    shape = jax.eval_shape(lambda: jax.random.key(0))
    return _with_sharding(shape, NamedSharding(mesh, PartitionSpec()))
