"""A typed config and a tokenizer become an agent: protocol, prompt, model and memory.

Every script goes through here, so that training, evaluation and serving cannot disagree about
the protocol, the prompt or the memory.
"""

import dataclasses
import functools
import hashlib
import importlib
import os
import pathlib
from collections.abc import Hashable
from typing import Any

from jax.sharding import Mesh

from atommem_jax.agent import encoders
from atommem_jax.config import ConfigError, Experiment, TeacherConfig, check
from atommem_jax.language import chat
from atommem_jax.language import prompt as prompting
from atommem_jax.language import protocol as protocol_lib
from atommem_jax.language.grammar import Grammar, compile_grammar
from atommem_jax.language.tokenizer import SentencePieceTokenizer, Tokenizer, weigh_by_rarity
from atommem_jax.learning import environment
from atommem_jax.memory import embedding
from atommem_jax.memory.embedding import HashedBagOfTokens, PooledTokens, most_times
from atommem_jax.model import attention
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.sampling import Agent, SamplerConfig
from atommem_jax.model.transformer import Transformer
from atommem_jax.parallel import mesh
from atommem_jax.parallel.mesh import prepare_devices
from atommem_jax.tasks import datasets, encoding, keeper, teacher, workflows
from atommem_jax.types import ActionKind, Embed, Policy

HOW_TO_COMPUTE = ("remat", "remat_policy", "attention", "dtype")
"""Fields of `config.model` that change no parameter."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything that follows from a config and a tokenizer, parameters aside."""

    config: Experiment
    tokenizer: Tokenizer
    agent: Agent
    script: teacher.Script
    workflow: workflows.Workflow
    embed: Embed
    pair: tuple[Grammar, ...] = ()  # masks of the two turns of a pair, where there are pairs

    @functools.cached_property
    def programs(self) -> dict[Hashable, Any]:
        """What `play` has compiled of them, so that training and validation share a program."""
        return {}

    @property
    def habits(self) -> keeper.Habits | None:
        """What the teacher does in place of operations that the workflow lacks; None: by rates."""
        if self.config.task.name != "village":
            return None
        return keeper.BEST_ABLATED.get(self.config.workflow)

    def make_teacher(self, rates: TeacherConfig, habits: keeper.Habits | None = None) -> Policy:
        """The scripted policy of the task, with rates of mistakes that may be traced.

        habits: what the village's script lacks and does instead; other tasks have none.

        Raises ConfigError for a tokenizer in which the words that a script knows are no tokens.
        """
        if self.config.task.name != "village":
            return teacher.policy(rates, self.script)
        try:
            words = keeper.Words.compile(self.tokenizer)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        actions = self.config.rollout.max_actions
        return keeper.policy(rates, self.script, words, actions=actions, habits=habits)

    def setting(self, shape: encoding.EpisodeShape, params: Any = None) -> environment.Setting:
        """The rollout's sizes for episodes of this shape.

        params: of the policy that plays, from which an embedding may take its rows; players take
          them by themselves, and None is right where no policy plays.
        """
        c, w = self.config, self.workflow
        whole = shape.chunks * shape.chunk_length
        context = min(c.rollout.context_length or whole, whole) if w.context else 0
        longest = prompting.width(
            self.agent.template,
            questions=shape.questions,
            question_length=shape.question_length,
            scratchpad_length=c.memory.scratchpad_length,
            query_length=c.memory.query_length,
            entry_length=c.memory.entry_length,
            chunk_length=context or shape.chunk_length,
        )
        multiple = attention.row_multiple(self.agent.model.config.attention, longest)
        reads = w.answer_reads
        limits = environment.EpisodeLimits(
            max_turns=0,
            prompt_width=-(-longest // multiple) * multiple,
            memory=w.limit(c.memory),
            # A pair is not torn apart.
            read_budget=c.rollout.read_budget | 1 if w.pair else c.rollout.read_budget,
            answer_read_budget=c.rollout.answer_read_budget if reads is None else reads,
            index=w.index,
            context=context,
            context_is_last=w.context == "last",
            pairs=bool(w.pair),
            linked=c.memory.shown // 2 if w.linked else 0,
        )
        turns = limits.turn_bound(shape.chunks, shape.questions)
        return environment.Setting(
            grammar=self.agent.grammar,
            template=self.agent.template,
            limits=dataclasses.replace(limits, max_turns=turns),
            embed=self.embed if params is None else embedding.bind(self.embed, params),
        )


def category_names(config: Experiment) -> list[str]:
    """Names of the task's categories of facts."""
    family = datasets.find_family(config.task.name)
    module = importlib.import_module(f"atommem_jax.tasks.{family}")
    return [category.name.lower() for category in module.FactCategory]


def make_mesh(config: Experiment) -> Mesh:
    """The mesh of a training run. Call it before anything else touches JAX's devices."""
    prepare_devices(config.mesh.cpu_devices)
    c = config.mesh
    try:
        return mesh.make_mesh(c.data, c.fsdp, c.tensor, slices=c.slices)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def reserved_names(config: Experiment) -> list[str]:
    """Names of the tokens that protocol and prompt need, and that no text may encode to."""
    names: list[str] = []
    if config.protocol.name == "compact":
        names += find_protocol(config).reserved_names()
    if config.prompt == "compact":
        names += prompting.reserved_names(config.memory.shown)
    return list(dict.fromkeys(names))


def find_protocol(config: Experiment) -> protocol_lib.Protocol:
    """The action protocol, with all its kinds. Raises ValueError for an unknown one."""
    chosen = config.protocol
    return protocol_lib.find(chosen.name, config.memory.shown, free_text=chosen.free_text)


def architecture(config: Experiment) -> dict[str, Any]:
    """What the parameters of a model depend on."""
    fields = dataclasses.asdict(config.model)
    return {name: value for name, value in fields.items() if name not in HOW_TO_COMPUTE}


def load_dataset(config: Experiment, data_root: str) -> datasets.Dataset:
    """Prepares the task's data under `data_root`. Raises ConfigError where it cannot."""
    try:
        return datasets.prepare(config.task.to_dict(), data_root)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error


def fit_tokenizer(config: Experiment, dataset: datasets.Dataset) -> SentencePieceTokenizer:
    """The tokenizer stored beside the data set; trained on its train split the first time.

    Raises ConfigError where the config's sizes are too small for these texts.
    """
    names = reserved_names(config)
    coverage = config.tokenizer.character_coverage
    settings = (config.tokenizer.vocab_size, names) + ((coverage,) if coverage < 1.0 else ())
    mark = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
    path = pathlib.Path(dataset.directory) / f"tokenizer-{mark}.bin"
    if path.exists():
        return SentencePieceTokenizer.from_bytes(path.read_bytes())
    try:
        tokenizer = SentencePieceTokenizer.train(
            datasets.tokenizer_texts(dataset),
            config.tokenizer.vocab_size,
            names,
            character_coverage=coverage,
        )
    except ValueError as error:
        raise ConfigError(f"tokenizer.{error}") from error
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_bytes(tokenizer.to_bytes())
    aside.replace(path)
    return tokenizer


def build(config: Experiment, tokenizer: Tokenizer) -> Parts:
    """Compiles protocol and prompt for the tokenizer and lays out the model."""
    m, r = config.memory, config.rollout
    max_text = max(m.entry_length, m.query_length, m.scratchpad_length, r.answer_length)
    workflow = workflows.find(config.workflow)
    protocol = find_protocol(config).restrict(workflow.kinds)
    grammar = compile_grammar(protocol, tokenizer, max_actions=r.max_actions, max_text=max_text)
    pair = [
        compile_grammar(
            protocol.restrict((*step.kinds, ActionKind.ANSWER)),
            tokenizer,
            max_actions=step.actions or r.max_actions,
            max_text=max_text,
        )
        for step in workflow.pair
    ]
    check(
        not (r.cache_prefix and config.model.match_features),
        "rollout.cache_prefix=True: allowed is False with model.match_features=True, whose flags "
        "tell of the whole prompt, so that nothing of it stays the same; set one of them to False",
    )
    features = prompting.NUM_FEATURES if config.model.match_features else 0
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        num_features=features,
        lora=config.lora,
        **config.model.sizes(),
    )
    sampler = SamplerConfig(
        response_length=r.response_length,
        constrained=r.constrained,
        top_p=r.top_p,
        score_chunk=r.score_chunk,
        cpu_decode=r.cpu_decode,
        cache_prefix=r.cache_prefix,
        draft=r.draft,
        group=r.microbatch,
        prompt_buckets=r.prompt_buckets,
        least_rows=r.least_rows,
        cache_dtype=r.cache_dtype,
        read_rows=r.read_rows,
    )
    return Parts(
        config=config,
        tokenizer=tokenizer,
        agent=Agent(
            grammar=grammar,
            template=make_template(config, tokenizer, protocol, workflow.guide),
            model=Transformer(model),
            sampler=sampler,
        ),
        script=teacher.Script.compile(
            protocol, tokenizer, response_length=r.response_length, max_text=max_text
        ),
        workflow=workflow,
        embed=make_embedding(config, tokenizer),
        pair=tuple(pair),
    )


def make_embedding(config: Experiment, tokenizer: Tokenizer) -> Embed:
    """What makes keys of texts, by `memory.embedding`.

    Raises ConfigError for an encoder that cannot be read, and for a width that does not fit.
    """
    m = config.memory
    if m.embedding == "encoder":
        return encoders.read_embedding(m.encoder, tokenizer, m.key_dim, config.model.dtype)
    hashed = HashedBagOfTokens(
        vocab_size=tokenizer.vocab_size, dim=m.key_dim, weights=weigh_tokens(config, tokenizer)
    )
    if m.embedding == "hashed":
        return hashed
    check(
        m.key_dim == config.model.width,
        f"memory.key_dim={m.key_dim}: must be model.width={config.model.width} with "
        "memory.embedding='policy', whose keys are as wide as its token embeddings",
    )
    check(
        not config.lora.adapts("embedder"),
        f"lora.targets={config.lora.targets}: adapters of embedder are not allowed with "
        "memory.embedding='policy', whose keys are of the embedding without them; leave it out",
    )
    weights = weigh_by_rarity(tokenizer, 255) if m.weighting == "rarity" else b""
    return PooledTokens(scripted=hashed, weights=weights)


def weigh_tokens(config: Experiment, tokenizer: Tokenizer) -> bytes:
    """How often each token counts in a search, see `HashedBagOfTokens`.

    Raises ConfigError for texts too long to be weighed.
    """
    m = config.memory
    if m.weighting == "uniform":
        return b""
    longest = max(m.entry_length, m.query_length)
    most = most_times(m.key_dim, longest)
    check(
        most > 1,
        f"memory.weighting='rarity' leaves no room for weights with texts of {longest} tokens "
        f"(memory.entry_length, memory.query_length) in memory.key_dim={m.key_dim}; lower one, or "
        "set memory.weighting='uniform'",
    )
    return weigh_by_rarity(tokenizer, most)


def make_template(
    config: Experiment, tokenizer: Tokenizer, protocol: protocol_lib.Protocol, guide: str = ""
) -> prompting.Template:
    """The pieces of a prompt. Raises ConfigError for a tokenizer that cannot write them."""
    try:
        if config.prompt == "chat":
            return chat.template(tokenizer, protocol, thinking=protocol.free_text, guide=guide)
        return prompting.compact(tokenizer, config.memory.shown)
    except (KeyError, ValueError) as error:
        raise ConfigError(str(error.args[0])) from error
