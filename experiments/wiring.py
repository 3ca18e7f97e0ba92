"""Builds what the scripts share: a config becomes a tokenizer, an agent and a setting.

Every script goes through here, so that training, evaluation and serving cannot disagree about
the protocol, the prompt or the memory.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from atommem_jax import attention, chat, lora, rollout, sharding, workflows
from atommem_jax import optimizer as optimizer_lib
from atommem_jax import prompt as prompting
from atommem_jax import protocol as protocol_lib
from atommem_jax.config import ConfigError
from atommem_jax.embedding import HashedBagOfTokens
from atommem_jax.grammar import compile_grammar
from atommem_jax.model import ModelConfig, Transformer, without_adapters
from atommem_jax.sampling import Agent, SamplerConfig
from atommem_jax.tasks import episodes as episodes_lib
from atommem_jax.tasks import teacher
from atommem_jax.tokenizer import SentencePieceTokenizer, Tokenizer
from atommem_jax.types import Episode, Trajectory

HOW_TO_COMPUTE = ("remat", "remat_policy", "attention", "dtype")
"""Fields of `config.model` that change no parameter."""

_CACHE_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything that follows from a config and a tokenizer, parameters aside."""

    config: ConfigDict
    tokenizer: Tokenizer
    agent: Agent
    script: teacher.Script
    workflow: workflows.Workflow
    embed: HashedBagOfTokens

    def setting(self, shape: episodes_lib.EpisodeShape) -> rollout.Setting:
        """The rollout's sizes for episodes of this shape."""
        c = self.config
        longest = prompting.width(
            self.agent.template,
            questions=shape.questions,
            question_length=shape.question_length,
            scratchpad_length=c.memory.scratchpad_length,
            query_length=c.memory.query_length,
            entry_length=c.memory.entry_length,
            chunk_length=shape.chunk_length,
        )
        multiple = attention.row_multiple(self.agent.model.config.attention, longest)
        sizes = rollout.RolloutConfig(
            max_turns=1,
            prompt_width=-(-longest // multiple) * multiple,
            slots=c.memory.slots,
            entry_length=c.memory.entry_length,
            scratchpad_length=c.memory.scratchpad_length,
            query_length=c.memory.query_length,
            shown=c.memory.shown,
            key_dim=c.memory.key_dim,
            eviction=c.memory.eviction,
            read_budget=c.rollout.read_budget,
            answer_read_budget=c.rollout.answer_read_budget,
        )
        sizes = dataclasses.replace(sizes, **self.workflow.sizes(c.memory.shown))
        sizes = dataclasses.replace(
            sizes, max_turns=sizes.turn_bound(shape.chunks, shape.questions)
        )
        return rollout.Setting(
            grammar=self.agent.grammar,
            template=self.agent.template,
            config=sizes,
            embed=self.embed,
        )


def category_names(config: ConfigDict) -> list[str]:
    """Names of the task's categories of facts."""
    module = importlib.import_module(f"atommem_jax.tasks.{config.task.name}")
    return [category.name.lower() for category in module.FactCategory]


def prepare_devices(cpu_devices: int) -> None:
    """Splits a host without an accelerator into devices, and sets the compilation cache.

    Call it before anything else touches JAX's devices: opening a checkpoint does. The persistent
    compilation cache makes the second start of a script much faster.
    """
    cache = os.path.expanduser(os.environ.get("ATOMMEM_CACHE", "~/.cache/atommem_jax/programs"))
    jax.config.update("jax_compilation_cache_dir", cache)
    # JAX locks the folder only where its size is limited, and several runs may share it.
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Without effect where the devices exist already, as in a script that trains twice.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cpu_devices)


def make_mesh(config: ConfigDict) -> Mesh:
    """The mesh of a training run. Call it before anything else touches JAX's devices."""
    prepare_devices(config.mesh.cpu_devices)
    c = config.mesh
    try:
        return sharding.make_mesh(c.data, c.fsdp, c.tensor, slices=c.slices)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def make_optimizer(section: ConfigDict, steps: int) -> optax.GradientTransformation:
    """The optimiser of a stage."""
    return optimizer_lib.make_optimizer(subconfig(optimizer_lib.OptimizerConfig, section), steps)


def subconfig(cls, section: ConfigDict, **more):
    """A frozen dataclass from a config section of the same fields."""
    return cls(**{**section.to_dict(), **more})


def reserved_names(config: ConfigDict) -> list[str]:
    """Names of the tokens that protocol and prompt need, and that no text may encode to."""
    names: list[str] = []
    if config.protocol.name == "compact":
        names += find_protocol(config).reserved_names()
    if config.prompt == "compact":
        names += prompting.reserved_names(config.memory.shown)
    return list(dict.fromkeys(names))


def find_protocol(config: ConfigDict) -> protocol_lib.Protocol:
    """The action protocol, with all its kinds. Raises ValueError for an unknown one."""
    chosen = config.get("protocol", {"name": "compact", "free_text": False})  # older runs have none
    return protocol_lib.find(
        chosen["name"], config.memory.shown, free_text=bool(chosen["free_text"])
    )


def architecture(config: ConfigDict) -> ConfigDict:
    """What the parameters of a model depend on, with the values that its section leaves out."""
    fields = config.model.to_dict()
    features = fields.pop("match_features")
    sizes = dataclasses.asdict(ModelConfig(vocab_size=1, **fields))
    for name in (*HOW_TO_COMPUTE, "vocab_size", "pad_id", "num_features", "lora"):
        del sizes[name]  # the rest follows from the tokenizer, the prompt and a section of its own
    return ConfigDict(sizes | {"match_features": features})


def load_dataset(config: ConfigDict, data_root: str) -> episodes_lib.Dataset:
    """Prepares the task's data under `data_root`. Raises ConfigError where it cannot."""
    try:
        return episodes_lib.prepare(config.task.to_dict(), data_root)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error


def load_tokenizer(config: ConfigDict, dataset: episodes_lib.Dataset) -> SentencePieceTokenizer:
    """The tokenizer stored beside the data set; trained on its train split the first time."""
    names = reserved_names(config)
    coverage = config.tokenizer.get("character_coverage", 1.0)  # most tasks name none
    settings = (config.tokenizer.vocab_size, names) + ((coverage,) if coverage < 1.0 else ())
    mark = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
    path = pathlib.Path(dataset.directory) / f"tokenizer-{mark}.bin"
    if path.exists():
        return SentencePieceTokenizer.from_bytes(path.read_bytes())
    tokenizer = SentencePieceTokenizer.train(
        episodes_lib.tokenizer_texts(dataset),
        config.tokenizer.vocab_size,
        names,
        character_coverage=coverage,
    )
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_bytes(tokenizer.to_bytes())
    aside.replace(path)
    return tokenizer


def build(config: ConfigDict, tokenizer: Tokenizer) -> Parts:
    """Compiles protocol and prompt for the tokenizer and lays out the model."""
    m, r = config.memory, config.rollout
    max_text = max(m.entry_length, m.query_length, m.scratchpad_length, r.answer_length)
    workflow = workflows.find(config.get("workflow", "learned"))  # older runs have none
    protocol = find_protocol(config).restrict(workflow.kinds)
    grammar = compile_grammar(protocol, tokenizer, max_actions=r.max_actions, max_text=max_text)
    sizes = config.model.to_dict()
    features = prompting.NUM_FEATURES if sizes.pop("match_features") else 0
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        num_features=features,
        lora=lora_config(config),
        **sizes,
    )
    sampler = SamplerConfig(
        response_length=r.response_length,
        constrained=r.constrained,
        top_p=r.top_p,
        score_chunk=r.get("score_chunk", 0),  # older runs have none of these
        unstack=r.get("unstack", False),
    )
    return Parts(
        config=config,
        tokenizer=tokenizer,
        agent=Agent(
            grammar=grammar,
            template=make_template(config, tokenizer, protocol),
            model=Transformer(model),
            sampler=sampler,
        ),
        script=teacher.Script.compile(
            protocol, tokenizer, response_length=r.response_length, max_text=max_text
        ),
        workflow=workflow,
        embed=HashedBagOfTokens(vocab_size=tokenizer.vocab_size, dim=m.key_dim),
    )


def make_template(
    config: ConfigDict, tokenizer: Tokenizer, protocol: protocol_lib.Protocol
) -> prompting.Template:
    """The pieces of a prompt. Raises ConfigError for a tokenizer that cannot write them."""
    try:
        if config.get("prompt", "compact") == "chat":  # older runs have none
            return chat.template(tokenizer, protocol, thinking=protocol.free_text)
        return prompting.compact(tokenizer, config.memory.shown)
    except (KeyError, ValueError) as error:
        raise ConfigError(str(error.args[0])) from error


def lora_config(config: ConfigDict) -> lora.LoraConfig:
    """The adapters of a run; older ones have none."""
    if "lora" not in config:
        return lora.LoraConfig()
    return subconfig(lora.LoraConfig, config.lora, targets=tuple(config.lora.targets))


def in_groups(
    play: Callable[[Episode, jax.Array], Trajectory], group: int
) -> Callable[[Episode, jax.Array], Trajectory]:
    """Plays a batch `group` trajectories at a time, each group to its own end.

    On a CPU smaller groups are faster per trajectory (caches), and a group whose episodes are
    over does not wait for the others. On an accelerator use the whole batch.
    """

    def grouped(episodes: Episode, ids: jax.Array) -> Trajectory:
        size = ids.shape[0]
        if group <= 0 or group >= size:
            return play(episodes, ids)
        if size % group:
            raise ConfigError(
                f"rollout.group={group} does not divide the batch of {size} trajectories; "
                "choose a divisor, or 0 for the whole batch"
            )

        def split(x):
            return x.reshape(size // group, group, *x.shape[1:])

        played = jax.lax.map(lambda pair: play(*pair), (jax.tree.map(split, episodes), split(ids)))
        return jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), played)

    return grouped


def make_player(parts: Parts, shape: episodes_lib.EpisodeShape, mesh: Mesh):
    """Jitted (params, episodes, ids, seed key, temperature) -> trajectories of the model.

    Episodes and ids are sharded over `mesh`, and so are the trajectories. Parameters may lie
    anywhere: they are moved, and cast to `rollout.param_dtype`, once a rollout.
    """
    play = make_program(parts, mesh)
    return functools.partial(play, *sharding.replicate((parts.agent, parts.setting(shape)), mesh))


def make_program(parts: Parts, mesh: Mesh):
    """Jitted (agent, setting, params, episodes, ids, seed key, temperature) -> trajectories.

    Adapters are merged into their matrices once a rollout, in float32, and cost decoding nothing.
    A model that computes in bfloat16 keeps the branch: rounded after the sum, the matrices would be
    those of another policy than the one that learns.
    """
    group = parts.config.rollout.group
    model = parts.agent.model.config
    layout = model.layout
    dtype = parts.config.rollout.get("param_dtype", "float32")
    merges = model.dtype == "float32"

    def play_local(agent, setting, params, episodes, ids, seed, temperature):
        policy = rollout.model_policy(agent, params, temperature)
        policy = parts.workflow.apply(policy, parts.script)
        play = in_groups(lambda e, i: rollout.run(setting, policy, e, i, seed), group)
        return play(episodes, ids)

    play_shares = sharding.data_parallel(
        play_local,
        mesh,
        sharded=(False, False, False, True, True, False, False),
        sharded_out=True,
    )

    @jax.jit
    def play(agent, setting, params, *rest):
        if merges:
            params = lora.merge(params, model.lora)
            agent = agent.replace(model=without_adapters(agent.model))
        params = cast_matrices(params, dtype)
        for rules in (sharding.TRAINING, sharding.ROLLOUT):  # cast where they lie, then moved
            where = layout.shardings(params, mesh, rules)
            params = jax.lax.with_sharding_constraint(params, where)
        return play_shares(agent, setting, params, *rest)

    return play


def cast_matrices(params, dtype: str):
    """Matrices and embeddings in another dtype; norms and the value head stay in float32.

    With "bfloat16" it changes nothing of what a model with `dtype="bfloat16"` computes, which
    casts them anyway, but halves what decoding reads.
    """

    def cast(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf if "norm" in name or "value_head" in name else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def make_scripted_player(
    parts: Parts,
    shape: episodes_lib.EpisodeShape,
    config: teacher.TeacherConfig,
    mesh: Mesh,
):
    """Jitted (episodes, ids, seed key) -> trajectories of a scripted teacher in the workflow."""
    config = parts.workflow.restrict(config)
    # Rates are arguments of the program, so that teachers share what was compiled for one.
    rates = {
        name: np.float32(value)
        for name, value in dataclasses.asdict(config).items()
        if not isinstance(value, bool)
    }

    def play_local(setting, rates, episodes, ids, seed):
        policy = teacher.policy(dataclasses.replace(config, **rates), parts.script)
        policy = parts.workflow.apply(policy, parts.script)
        return rollout.run(setting, policy, episodes, ids, seed)

    play = jax.jit(
        sharding.data_parallel(
            play_local, mesh, sharded=(False, False, True, True, False), sharded_out=True
        )
    )
    return functools.partial(play, *sharding.replicate((parts.setting(shape), rates), mesh))
