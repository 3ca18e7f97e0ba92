"""The smallest things that play whole episodes: a tokenizer, a config, parts, a few episodes.

Everything is made once a process. Sizes are as small as the semantics allow, because tracing and
compiling is what these tests spend their time on.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from atommem_jax.agent import build
from atommem_jax.config import Experiment, parse
from atommem_jax.language.tokenizer import SentencePieceTokenizer
from atommem_jax.learning import rollout
from atommem_jax.model import scoring
from atommem_jax.model import transformer as model_lib
from atommem_jax.tasks import batches, encoding, synthetic
from atommem_jax.types import ActionKind, Phase
from experiments.configs import synthetic as synthetic_config

EXAMPLES = 24


@functools.cache
def make_config() -> Experiment:
    """The synthetic experiment, shrunk. Every field that a test relies on is set here."""
    config = synthetic_config.get_config()
    config.task.base_facts = 6
    config.task.facts_per_chunk = 1
    config.task.questions = (1, 2)
    config.task.two_hop = 0.5
    config.task.correction = 0.5
    config.task.decoys = 0
    config.task.train_examples = EXAMPLES
    config.task.test_examples = EXAMPLES
    config.task.scales = (1,)
    config.tokenizer.vocab_size = 640
    config.memory.slots = 6
    config.memory.shown = 4
    config.memory.entry_length = 8
    config.memory.scratchpad_length = 1
    config.memory.query_length = 8
    config.memory.key_dim = 64
    config.memory.eviction = "lru"
    config.rollout.max_actions = 3
    config.rollout.response_length = 14
    config.rollout.answer_length = 2
    config.rollout.read_budget = 1
    config.rollout.answer_read_budget = 1
    config.rollout.constrained = True
    config.rollout.top_p = 1.0
    config.rollout.microbatch = 0
    config.model.width = 16
    config.model.num_layers = 1
    config.model.num_heads = 2
    config.model.num_kv_heads = 1
    config.model.head_width = 8
    config.model.mlp_width = 16
    config.model.rope_fraction = 0.5
    config.model.qk_norm = False
    config.model.tie_embeddings = True
    config.model.token_shift = 1
    config.model.match_features = True
    config.model.remat = False
    config.model.dtype = "float32"
    return parse(config)


def make_task_config() -> synthetic.SyntheticConfig:
    return synthetic.SyntheticConfig(**make_config().task.fields)


@functools.cache
def make_examples() -> list:
    """The train split in plain Python."""
    task = make_task_config()
    return [synthetic.generate(task, "train", i) for i in range(EXAMPLES)]


@functools.cache
def make_tokenizer() -> SentencePieceTokenizer:
    config = make_config()
    texts = [
        text
        for example in make_examples()
        for text in [
            *(fact["text"] for chunk in example["chunks"] for fact in chunk),
            *(question["text"] for question in example["questions"]),
            *(alias for question in example["questions"] for alias in question["aliases"]),
            example["focus"],
        ]
    ]
    return SentencePieceTokenizer.train(
        texts, config.tokenizer.vocab_size, build.reserved_names(config)
    )


@functools.cache
def make_parts() -> build.Parts:
    return build.build(make_config(), make_tokenizer())


@functools.cache
def make_shape() -> encoding.EpisodeShape:
    return encoding.fit_shape(make_examples(), make_tokenizer())


@functools.cache
def make_dataset() -> batches.EncodedDataset:
    return batches.EncodedDataset(make_examples(), make_tokenizer(), make_shape())


def make_episodes(indices):
    """Episodes [B] on the device, and their aliases."""
    batch = make_dataset().stack(indices)
    return jax.device_put(batch.episodes), batch.aliases


def score_rows(agent, params, rows) -> scoring.Scores:
    """What the learner says of the responses in `rows`, a `Batch` or `Turns`, at temperature 1."""
    return scoring.score(
        agent,
        params,
        rows.prompt,
        rows.prompt_lengths,
        rows.response,
        rows.response_lengths,
        rows.phase,
        jnp.float32(1.0),
    )


@jax.jit
def _play(agent, setting, params, episodes, ids, seed, temperature, widths):
    policy = rollout.model_policy(agent, params, temperature)
    return rollout.run(setting, policy, episodes, ids, seed, widths)


def play(params, episodes, ids, seed, temperature=1.0, widths=None):
    """Trajectories of the tiny model; one program for each number of episodes.

    widths: of a rollout to be repeated.
    """
    parts = make_parts()
    setting = parts.setting(make_shape())
    ids = jnp.asarray(ids, jnp.int32)
    temperature = jnp.asarray(temperature, jnp.float32)
    seed = jax.random.key(seed)
    return _play(parts.agent, setting, params, episodes, ids, seed, temperature, widths)


def make_params(seed: int = 0, scale: float = 0.0):
    """Fresh parameters, each moved by noise of `scale` so that none is zero or one."""
    params = model_lib.init_params(make_parts().agent.model, jax.random.key(seed))
    return disturb(params, scale, seed)


def disturb(params, scale: float, seed: int = 0):
    """Adds NumPy noise to every leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0.0, scale, x.shape), x.dtype), params)


# ---------------------------------------------------------------------------------------------
# What the code under test must agree with, in plain Python


def spell_action(kind: ActionKind, text=(), target: int = 0, closed: bool = True) -> list[int]:
    """Token ids of one action in the compact protocol."""
    reserved = make_tokenizer().reserved
    ids = [reserved[f"<{kind.name.lower()}>"]]
    if target:
        ids.append(reserved[f"<{target}>"])
    return [*ids, *text, *([reserved["<end>"]] if closed else [])]


def spell_prompt(
    *,
    phase: Phase,
    questions=(),
    scratchpad=(),
    query=(),
    shown=(),
    chunk=(),
) -> list[int]:
    """The prompt of the compact template: lists of token ids in, one list out."""
    reserved = make_tokenizer().reserved
    ids: list[int] = []
    for text in questions:
        ids += [reserved["<question>"], *text]
    for header, text in [("<notes>", scratchpad), ("<query>", query)]:
        if text:
            ids += [reserved[header], *text]
    for number, text in enumerate(shown, start=1):
        if text:
            ids += [reserved[f"<{number}>"], *text]
    if chunk:
        ids += [reserved["<chunk>"], *chunk]
    return [*ids, reserved[f"<{phase.name.lower()}>"]]


# ---------------------------------------------------------------------------------------------
# Compilations

_COMPILED: list[str] = []


def _note(event: str, seconds: float, **details) -> None:
    del seconds, details
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


def count_compilations() -> int:
    """Programs compiled, or loaded from the cache on disk, by this process so far."""
    return len(_COMPILED)
