"""The sections of an experiment: frozen dataclasses, each of which validates itself.

What a field may hold stands in its annotation, see `fields`. A field without a default must be in a
config; one with a default may be left out. What concerns two sections is checked in
`agent.validate`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from atommem_jax.config import curriculum
from atommem_jax.config.errors import ConfigError, check
from atommem_jax.config.fields import (
    AboveZero,
    Choices,
    Count,
    NotNegative,
    Path,
    Positive,
    Range,
    Section,
    Share,
)

EVICTION_POLICIES = ("lru", "oldest", "reject")
"""What happens to a Create where no slot is free, see `memory.slot_table`."""

LENGTH_BUCKETS = (5, 8)
"""Eighths of the full width at which rows are scored, by default; each is compiled once."""

PROMPT_BUCKETS = (4, 6, 8)
"""Eighths of the prompt's full width at which prompts are read, by default; each is compiled once.
"""

EMBEDDINGS = ("hashed", "policy", "encoder")
ROPE_TYPES = ("llama3", "linear", "yarn")
LAYERS = ("query", "key", "value", "out", "gate", "up", "down")
"""Names of the matrices of a layer: the default targets of adapters."""

DTYPES = ("float32", "bfloat16")
"""What can be computed in, and kept in."""


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Over how many devices a run is spread, see `parallel.mesh.make_mesh`."""

    data: Count  # replicas of the parameters; 0 for as many as there are devices
    fsdp: Positive  # devices that share the parameters of a replica
    tensor: Positive  # devices that share every matrix product
    slices: Positive  # TPU slices, which only `data` crosses
    cpu_devices: Annotated[
        int, Range(least=1, most=1024)
    ]  # into which a host without accelerator is split
    rollout_tensor: Count = 0  # devices that share every matrix product of rollouts; 0: `tensor`


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which family of tasks, and the fields of its own config class, see `tasks.datasets`."""

    name: str
    fields: Mapping[str, Any]

    def get(self, field: str, default: Any = None) -> Any:
        """A field of the family, or `default` where it has none of that name."""
        return self.fields.get(field, default)

    def to_dict(self) -> dict[str, Any]:
        """Name and fields, as a config file has them."""
        return {"name": self.name, **self.fields}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Section):
    """Of the SentencePiece model that is trained on the task's texts."""

    vocab_size: Annotated[int, Range(least=8)]
    character_coverage: Annotated[float, Range(above=0.0, most=1.0)] = 1.0  # share that are pieces


@dataclasses.dataclass(frozen=True)
class ProtocolConfig(Section):
    """How actions are written."""

    name: str  # a key of `language.protocol.PROTOCOLS`
    free_text: bool  # between actions, as for thoughts


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Section):
    """Static sizes of the memory of one trajectory, in slots and tokens."""

    slots: Positive = 5  # N
    shown: Positive = 4  # K
    entry_length: Positive = 8  # L
    scratchpad_length: Positive = 2  # S
    query_length: Positive = 8  # Y
    key_dim: Positive = 128  # D
    eviction: Annotated[str, Choices(*EVICTION_POLICIES)] = "lru"
    # How tokens count in a search: all alike, or the rarer the more, see `memory.embedding`.
    weighting: Annotated[str, Choices("uniform", "rarity")] = "uniform"
    # What a key is of: hashed token counts, the policy's token embeddings, or a text encoder.
    embedding: Annotated[str, Choices(*EMBEDDINGS)] = "hashed"
    encoder: str = ""  # directory or checkpoint of the text encoder

    def _check_together(self, prefix: str) -> None:
        check(
            bool(self.encoder) == (self.embedding == "encoder"),
            f"{prefix}.encoder={self.encoder!r} and {prefix}.embedding={self.embedding!r}: the "
            "first names the text encoder of the second; set "
            + (
                f"{prefix}.encoder to its directory"
                if self.embedding == "encoder"
                else f"{prefix}.embedding='encoder', or {prefix}.encoder=''"
            ),
        )
        check(
            self.embedding != "encoder" or self.weighting == "uniform",
            f"{prefix}.weighting={self.weighting!r}: allowed is 'uniform' with "
            f"{prefix}.embedding='encoder', which weighs tokens itself",
        )
        check(
            self.shown <= self.slots,
            f"{prefix}.shown={self.shown} is more than {prefix}.slots={self.slots}; show at most "
            "what there is",
        )


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Section):
    """What a turn may be, and how rollouts are computed."""

    max_actions: Positive  # A
    response_length: Annotated[int, Range(least=2)]  # R: one token and the end of sequence, or more
    answer_length: Positive
    read_budget: Count  # reading turns in a row that may keep the chunk
    answer_read_budget: Count  # turns a question that may read, not answer
    constrained: bool  # only tokens that the grammar allows
    top_p: Annotated[float, Range(above=0.0, most=1.0)]
    microbatch: Count  # trajectories whose turns are written at a time on a device; 0 for all
    # Of the matrices that sample; "int8" has a scale an output channel, see `model.quantized`.
    param_dtype: Annotated[str, Choices(*DTYPES, "int8")] = "float32"
    # Of keys and values; "int8" has a scale for each head and position, "" is the model's dtype.
    cache_dtype: Annotated[str, Choices("", "int8")] = ""
    cpu_decode: bool = False  # decode with the layers apart: faster on a CPU, longer compiled
    score_chunk: Count = 0  # response tokens scored at a time; 0 for all
    cache_prefix: bool = False  # read instructions and questions once, see `model.prefix`
    draft: Count = 0  # tokens guessed and checked in a forward pass, see `model.drafts`
    prompt_buckets: tuple[int, ...] = PROMPT_BUCKETS
    least_rows: Count = 0  # what a micro-batch is halved down to as its turns end; 0: never halved
    read_rows: Count = 0  # prompts of a micro-batch that are read at a time; 0 for all
    context_length: Count = 0  # tokens of the document that full_context shows; 0 for all

    def _check_together(self, prefix: str) -> None:
        check_length_buckets(self.prompt_buckets, f"{prefix}.prompt_buckets")


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Section):
    """Sizes and switches of the decoder, as in `model.model_config.ModelConfig`.

    What follows from the tokenizer, the prompt and the adapters is not among them.
    """

    width: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_width: Positive
    mlp_width: Positive
    rope_theta: AboveZero
    rope_fraction: Share
    qk_norm: bool
    tie_embeddings: bool
    token_shift: Annotated[int, Range(least=0, most=64)]
    match_features: bool
    remat: bool
    remat_policy: str
    attention: str
    dtype: Annotated[str, Choices(*DTYPES)]
    rope_factor: Annotated[float, Range(least=1.0)] = 1.0  # to longer texts; 1: as it was trained
    rope_type: Annotated[str, Choices(*ROPE_TYPES)] = "llama3"  # how that is done
    rope_low_frequency_factor: AboveZero = 1.0
    rope_high_frequency_factor: AboveZero = 4.0
    rope_beta_slow: AboveZero = 1.0
    rope_beta_fast: AboveZero = 32.0
    rope_truncate: bool = True
    rope_attention_factor: NotNegative = 0.0  # 0: what yarn derives from rope_factor
    rope_original_length: Positive = 8192
    qkv_bias: bool = False
    norm_epsilon: AboveZero = 1e-6

    def sizes(self) -> dict[str, Any]:
        """Keyword arguments of `ModelConfig`, features aside."""
        fields = dataclasses.asdict(self)
        del fields["match_features"]
        return fields


@dataclasses.dataclass(frozen=True)
class LoraConfig(Section):
    """Which matrices have adapters (`model.lora`), and how."""

    rank: Count = 0  # 0 turns it off: all parameters are trained
    alpha: AboveZero = 16.0  # the branch is scaled by alpha / rank
    # Regular expressions for the names of matrices: the end of a path, from a slash on.
    targets: tuple[str, ...] = LAYERS
    # What the frozen part is kept in while it is trained on.
    base_dtype: Annotated[str, Choices(*DTYPES)] = "float32"

    def check_matrices(self, matrices: Sequence[str], dtype: str, prefix: str = "lora") -> None:
        """Raises ConfigError for targets that are none of the model's, and for a dtype apart.

        Args:
          matrices: paths that can be adapted, such as those of `ModelConfig.matrices`.
          dtype: that the model computes in.
          prefix: of the fields' names.
        """
        self.validate(prefix)
        check(
            self.base_dtype in ("float32", dtype),
            f"{prefix}.base_dtype={self.base_dtype!r}: allowed are 'float32' and "
            f"model.dtype={dtype!r}, to which the base is cast anyway where it is used",
        )
        if not self.rank:
            return
        check(
            len(self.targets) > 0,
            f"{prefix}.targets is empty and {prefix}.rank={self.rank}: name some of "
            f"{', '.join(matrices)}, or set {prefix}.rank=0",
        )
        for target in self.targets:
            try:
                found = any(_matches(target, path) for path in matrices)
            except re.error as error:
                raise ConfigError(
                    f"{prefix}.targets: {target!r} is no regular expression ({error})"
                ) from error
            check(
                found,
                f"{prefix}.targets: {target!r} matches no matrix of the model; there are "
                f"{', '.join(matrices)}",
            )

    def adapts(self, path: str) -> bool:
        """Whether the matrix at `path`, such as 'layers/query', has an adapter."""
        return self.rank > 0 and any(_matches(target, path) for target in self.targets)

    @property
    def scale(self) -> float:
        """Of the branch."""
        return self.alpha / self.rank if self.rank else 0.0


def _matches(target: str, path: str) -> bool:
    return re.search(rf"(^|/)({target})$", path) is not None


@dataclasses.dataclass(frozen=True)
class TeacherConfig(Section):
    """Rates at which a scripted teacher (`tasks.teacher`) does the right thing."""

    store_support: Share = 1.0  # facts worth storing that are stored
    store_distractor: Share = 0.0  # other facts that are stored
    # Corrections of a shown entry made by Update, not Create.
    update_shown: Share = 1.0
    # Of the rest: the shown stale entry is deleted before the Create.
    delete: Share = 0.0
    set_query: Share = 1.0  # a standing query at the first chunk
    # Reads for a fact that is missing, where the budget allows.
    read_missing: Share = 1.0
    # Of those reads: asks for the end of the question instead.
    read_badly: Share = 0.0
    # Answers right when everything needed is shown.
    answer_known: Share = 1.0
    # What the text says is gone is deleted, and what is to be counted is counted in the scratchpad,
    # where the task has such facts (`tasks.keeper`).
    forget: Share = 1.0
    count: Share = 1.0
    scratchpad_only: bool = False  # no store: see `tasks.teacher`

    def validate(self, prefix: str = "teacher") -> None:
        """As `Section.validate`."""
        super().validate(prefix)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """An Optax chain: clip by global norm, then one of three methods under a schedule."""

    # "muon" is for matrices, with AdamW for the rest; "adafactor" keeps sums of rows and columns
    # where AdamW keeps squares, and no first moment.
    name: Annotated[str, Choices("adamw", "muon", "adafactor")] = "adamw"
    learning_rate: AboveZero = 1e-3
    adam_learning_rate: NotNegative = 0.0  # of Muon's AdamW; 0 takes learning_rate
    schedule: Annotated[str, Choices("constant", "cosine")] = "constant"  # cosine: to 0 at the end
    warmup_steps: Count = 0
    weight_decay: NotNegative = 0.0
    b1: Share = 0.9
    b2: Share = 0.999
    clip_norm: AboveZero = 1.0
    # Of AdamW's first moment; "bfloat16" halves it.
    moment_dtype: Annotated[str, Choices(*DTYPES)] = "float32"

    def validate(self, prefix: str = "optimizer") -> None:
        """As `Section.validate`."""
        super().validate(prefix)


def check_length_buckets(buckets: Sequence[Any], field: str) -> None:
    """Raises ConfigError, naming the field, unless rows of every length have a width."""
    check(
        8 in buckets and all(isinstance(part, int) and 1 <= part <= 8 for part in buckets),
        f"{field}={tuple(buckets)}: allowed are numbers from 1 to 8, 8 among them; rows are scored "
        "at that many eighths of the full width",
    )


@dataclasses.dataclass(frozen=True)
class PPOConfig(Section):
    """How advantages are estimated and what the loss is, see `learning.trainer`."""

    estimator: Annotated[str, Choices("group", "gae")] = (
        "group"  # "gae": by turn, with the value head
    )
    # Trajectories of the same episode, next to each other in the batch.
    group_size: Positive = 16
    divide_by_std: bool = False
    leave_one_out: bool = False
    # "question": answer tokens use their own question's reward.
    credit: Annotated[str, Choices("trajectory", "question")] = "trajectory"
    discount: Share = 1.0
    gae_lambda: Share = 0.95
    epochs: Positive = 1
    minibatches: Positive = 1
    microbatch_rows: Positive = 128
    length_buckets: tuple[int, ...] = LENGTH_BUCKETS
    clip_low: NotNegative = 0.2
    clip_high: NotNegative = 0.28
    dual_clip: NotNegative = 3.0  # 0 turns it off
    # Of the ratio learner / sampler that corrects a token, see `loss.importance_weights`; 0: none.
    importance_cap: NotNegative = 0.0
    weighting: Annotated[str, Choices("token_mean", "trajectory_equal")] = "token_mean"
    entropy_coef: float = 0.0
    # What a turn costs, in units of the reward of a trajectory.
    read_cost: NotNegative = 0.0  # for each Read that was applied
    create_cost: NotNegative = 0.0  # for each Create that was applied
    invalid_cost: NotNegative = 0.0  # for each action that was invalid
    reward_kl_coef: NotNegative = 0.0  # for each nat of log(policy / reference) of its tokens
    learn_from_cut: bool = False  # from turns that ended with the budget, not with themselves
    kl_coef: NotNegative = 0.0  # KL to the reference in the loss, with estimator `kl_kind`
    kl_kind: Annotated[str, Choices("k1", "k2", "k3")] = "k3"
    value_coef: NotNegative = 0.5  # used with estimator "gae" only
    value_clip: NotNegative = 0.0  # 0 turns it off
    value_warmup: Count = 0  # first steps of RL, in which the value head alone learns ("gae")

    def validate(self, prefix: str = "ppo") -> None:
        """As `Section.validate`."""
        super().validate(prefix)

    def _check_together(self, prefix: str) -> None:
        check_length_buckets(self.length_buckets, f"{prefix}.length_buckets")
        check(
            not self.kl_coef or self.kl_kind != "k1",
            f"{prefix}.kl_kind='k1': allowed with {prefix}.kl_coef={self.kl_coef} are 'k2' and "
            "'k3', for in a loss the expected gradient of k1 is zero; or take "
            f"{prefix}.kl_coef=0.0 and {prefix}.reward_kl_coef, where k1 is right",
        )
        check(
            self.estimator != "group" or self.group_size >= 2,
            f"{prefix}.estimator='group' needs {prefix}.group_size of at least 2, found "
            f"{self.group_size}; raise it or use {prefix}.estimator='gae'",
        )
        check(
            self.value_warmup == 0 or self.estimator == "gae",
            f"{prefix}.value_warmup={self.value_warmup}: {prefix}.estimator={self.estimator!r} has "
            "no use for values; set it to 0, or the estimator to 'gae'",
        )

    @property
    def needs_reference(self) -> bool:
        """True where log-probs of the reference are looked at."""
        return self.kl_coef != 0 or self.reward_kl_coef != 0

    @property
    def needs_every_row(self) -> bool:
        """True where a row with zero advantage has a gradient all the same."""
        return self.entropy_coef != 0 or self.kl_coef != 0 or self.estimator == "gae"


@dataclasses.dataclass(frozen=True)
class SftConfig(Section):
    """Supervised fine-tuning on a teacher's trajectories."""

    data: Path  # a folder of collect.py to learn from; '' for the scripted teacher
    steps: Count
    episodes: Positive  # a step
    min_reward: Share  # of a trajectory that is learned from
    log_every: Positive
    eval_every: Positive
    save_every: Positive
    microbatch_rows: Positive
    length_buckets: tuple[int, ...]
    optimizer: OptimizerConfig
    # Whose trajectories are learned from after `student_after` steps: the teacher's ('none'); the
    # student's own states, with what the teacher would have done there ('dagger'); the student's
    # own, where they are worth `student_min_reward` ('rft', rejection-sampling fine-tuning).
    student: Annotated[str, Choices("none", "dagger", "rft")] = "none"
    student_after: Count = 0
    student_min_reward: Share = 1.0
    # What is learned when: "STEP: FIELD=VALUE ...", each from its step to the next one's, of fields
    # of task, memory and rollout; "STEP:" is the config itself, as before the first.
    curriculum: tuple[str, ...] = ()

    def _check_together(self, prefix: str) -> None:
        check_length_buckets(self.length_buckets, f"{prefix}.length_buckets")
        check(
            self.student == "none" or not self.data,
            f"{prefix}.student={self.student!r} plays new trajectories, and {prefix}.data="
            f"{self.data} brings collected ones; set one of them to nothing",
        )
        curriculum.read(self.curriculum, self.steps, f"{prefix}.curriculum")
        check(
            not self.curriculum or not self.data,
            f"{prefix}.curriculum plays tasks of its own, and {prefix}.data={self.data} brings "
            "collected trajectories; set one of them to nothing",
        )


@dataclasses.dataclass(frozen=True)
class RlConfig(Section):
    """PPO on the agent's own rollouts."""

    steps: Count
    episodes: Positive  # a step; each is played `ppo.group_size` times
    temperature: AboveZero
    log_every: Positive
    eval_every: Positive
    save_every: Positive
    max_skipped_in_a_row: Positive
    optimizer: OptimizerConfig
    ppo: PPOConfig
    # EM that the model must reach when it answers from the memory of a teacher without mistakes,
    # before RL starts; 0.0 does not ask.
    least_reader: Share = 0.0
    resample: Count = 0  # further rollouts a step, where groups have no contrast (DAPO)
    curriculum: tuple[str, ...] = ()  # as of SFT
    # What an answer is worth: '' is the task's own reward, or exact match where it has none.
    reward: Annotated[str, Choices("", "exact_match", "f1")] = ""

    def _check_together(self, prefix: str) -> None:
        curriculum.read(self.curriculum, self.steps, f"{prefix}.curriculum")


@dataclasses.dataclass(frozen=True)
class EvalConfig(Section):
    """What is evaluated while training, and how many episodes are played at a time."""

    split: str
    episodes: Positive
    batch_size: Positive
    # Turns that evaluate.py plays at a time, and chunks that it holds of a document; 0 for all.
    segment: Count = 0
    # What evaluate.py writes of turns that are played in segments: nothing, or each.
    records: Annotated[str, Choices("answers", "full")] = "answers"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    """Which checkpoints are kept."""

    keep_last: Positive
    keep_best: Count


@dataclasses.dataclass(frozen=True)
class DebugConfig(Section):
    """Aids for finding out why something is not learned."""

    overfit: Count  # train on so many samples alone, and validate on the same; 0: on all
