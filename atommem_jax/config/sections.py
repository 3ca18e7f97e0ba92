"""The sections of an experiment: frozen dataclasses, each of which validates itself.

What a field may hold stands beside it: `bounded(least=1)`, `choice("adamw", "muon")`. Numbers are
finite. A field without a default must be in a config; one with a default may be left out.
`Section.validate` checks the fields one by one, and then those of the section that must agree; what
concerns two sections is checked in `agent.validate`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from atommem_jax.config.errors import ConfigError, check

EVICTION_POLICIES = ("lru", "oldest", "reject")
"""What happens to a Create where no slot is free, see `memory.slot_table`."""

LENGTH_BUCKETS = (5, 8)
"""Eighths of the full width at which rows are scored, by default; each is compiled once."""

LAYERS = ("query", "key", "value", "out", "gate", "up", "down")
"""Names of the matrices of a layer: the default targets of adapters."""

_LARGEST_INTEGER = 2**31 - 1


def bounded(
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A field that holds a number of this range."""
    limits = {"least": least, "above": above, "most": most}
    return dataclasses.field(default=default, metadata=limits)


def choice(*allowed: str, default: Any = dataclasses.MISSING) -> Any:
    """A field that holds one of these names."""
    return dataclasses.field(default=default, metadata={"choices": allowed})


@dataclasses.dataclass(frozen=True)
class Section:
    """What all sections share."""

    def validate(self, prefix: str) -> None:
        """Raises ConfigError, naming the field, the value found and the values allowed.

        prefix: path of the section, as `rl.ppo`.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            path = f"{prefix}.{field.name}" if prefix else field.name
            if isinstance(value, Section):
                value.validate(path)
            else:
                _check_value(path, value, field)
        self._check_together(prefix)

    def _check_together(self, prefix: str) -> None:
        """Raises ConfigError where fields of this section disagree."""


def _check_value(path: str, value: Any, field: dataclasses.Field[Any]) -> None:
    meta = field.metadata
    if "choices" in meta:
        allowed = ", ".join(map(repr, meta["choices"]))
        check(value in meta["choices"], f"{path}={value!r}: allowed are {allowed}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    check(math.isfinite(value), f"{path}={value}: allowed are finite numbers; set --config.{path}")
    allowed = _describe_range(meta)
    check(
        abs(value) <= _LARGEST_INTEGER or isinstance(value, float),
        f"{path}={value}: allowed is {allowed or 'a number'} up to {_LARGEST_INTEGER}; "
        f"set --config.{path}",
    )
    least, above, most = (meta.get(name) for name in ("least", "above", "most"))
    check(
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most),
        f"{path}={value}: allowed is {allowed}; set --config.{path}",
    )


def _describe_range(meta: Mapping[str, Any]) -> str:
    least, above, most = (meta.get(name) for name in ("least", "above", "most"))
    if least is not None:
        if most is not None:
            return f"{least} to {most}"
        return "0 or more" if least == 0 else f"at least {least}"
    if above is not None:
        return f"above {above}" + (f" up to {most}" if most is not None else "")
    return f"at most {most}" if most is not None else ""


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Over how many devices a run is spread, see `parallel.mesh.make_mesh`."""

    data: int = bounded(least=0)  # replicas of the parameters; 0 for as many as there are devices
    fsdp: int = bounded(least=1)  # devices that share the parameters of a replica
    tensor: int = bounded(least=1)  # devices that share every matrix product
    slices: int = bounded(least=1)  # TPU slices, which only `data` crosses
    cpu_devices: int = bounded(least=1, most=1024)  # into which a host without accelerator is split


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

    vocab_size: int = bounded(least=8)
    character_coverage: float = bounded(1.0, above=0.0, most=1.0)  # share that are pieces


@dataclasses.dataclass(frozen=True)
class ProtocolConfig(Section):
    """How actions are written."""

    name: str  # a key of `language.protocol.PROTOCOLS`
    free_text: bool  # between actions, as for thoughts


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Section):
    """Static sizes of the memory of one trajectory, in slots and tokens."""

    slots: int = bounded(5, least=1)  # N
    shown: int = bounded(4, least=1)  # K
    entry_length: int = bounded(8, least=1)  # L
    scratchpad_length: int = bounded(2, least=1)  # S
    query_length: int = bounded(8, least=1)  # Y
    key_dim: int = bounded(128, least=1)  # D
    eviction: str = choice(*EVICTION_POLICIES, default="lru")

    def _check_together(self, prefix: str) -> None:
        check(
            self.shown <= self.slots,
            f"{prefix}.shown={self.shown} is more than {prefix}.slots={self.slots}; show at most "
            "what there is",
        )


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Section):
    """What a turn may be, and how rollouts are computed."""

    max_actions: int = bounded(least=1)  # A
    response_length: int = bounded(least=2)  # R: one token and the end of sequence, or more
    answer_length: int = bounded(least=1)
    read_budget: int = bounded(least=0)  # reading turns in a row that may keep the chunk
    answer_read_budget: int = bounded(least=0)  # turns a question that may read, not answer
    constrained: bool  # only tokens that the grammar allows
    top_p: float = bounded(above=0.0, most=1.0)
    microbatch: int = bounded(least=0)  # trajectories played at a time on a device; 0 for all
    param_dtype: str = choice("float32", "bfloat16", default="float32")
    cpu_decode: bool = False  # decode with the layers apart: faster on a CPU, longer compiled
    score_chunk: int = bounded(0, least=0)  # response tokens scored at a time; 0 for all


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Section):
    """Sizes and switches of the decoder, as in `model.transformer.ModelConfig`.

    What follows from the tokenizer, the prompt and the adapters is not among them.
    """

    width: int = bounded(least=1)
    num_layers: int = bounded(least=1)
    num_heads: int = bounded(least=1)
    num_kv_heads: int = bounded(least=1)
    head_width: int = bounded(least=1)
    mlp_width: int = bounded(least=1)
    rope_theta: float = bounded(above=0.0)
    rope_fraction: float = bounded(least=0.0, most=1.0)
    qk_norm: bool
    tie_embeddings: bool
    token_shift: int = bounded(least=0, most=64)
    match_features: bool
    remat: bool
    remat_policy: str
    attention: str
    dtype: str = choice("float32", "bfloat16")
    rope_factor: float = bounded(1.0, least=1.0)
    rope_low_frequency_factor: float = bounded(1.0, above=0.0)
    rope_high_frequency_factor: float = bounded(4.0, above=0.0)
    rope_original_length: int = bounded(8192, least=1)
    norm_epsilon: float = bounded(1e-6, above=0.0)

    def sizes(self) -> dict[str, Any]:
        """Keyword arguments of `ModelConfig`, features aside."""
        fields = dataclasses.asdict(self)
        del fields["match_features"]
        return fields


@dataclasses.dataclass(frozen=True)
class LoraConfig(Section):
    """Which matrices have adapters (`model.lora`), and how."""

    rank: int = bounded(0, least=0)  # 0 turns it off: all parameters are trained
    alpha: float = bounded(16.0, above=0.0)  # the branch is scaled by alpha / rank
    # Regular expressions for the names of matrices: the end of a path, from a slash on.
    targets: tuple[str, ...] = LAYERS
    # What the frozen part is kept in while it is trained on.
    base_dtype: str = choice("float32", "bfloat16", default="float32")

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

    store_support: float = bounded(1.0, least=0.0, most=1.0)  # facts worth storing that are stored
    store_distractor: float = bounded(0.0, least=0.0, most=1.0)  # other facts that are stored
    # Corrections of a shown entry made by Update, not Create.
    update: float = bounded(1.0, least=0.0, most=1.0)
    # Of the rest: the shown stale entry is deleted before the Create.
    delete: float = bounded(0.0, least=0.0, most=1.0)
    set_query: float = bounded(1.0, least=0.0, most=1.0)  # a standing query at the first chunk
    # Reads for a fact that is missing, where the budget allows.
    read_missing: float = bounded(1.0, least=0.0, most=1.0)
    # Of those reads: asks for the end of the question instead.
    read_badly: float = bounded(0.0, least=0.0, most=1.0)
    # Answers right when everything needed is shown.
    answer_known: float = bounded(1.0, least=0.0, most=1.0)
    scratchpad_only: bool = False  # no store: see `tasks.teacher`

    def validate(self, prefix: str = "teacher") -> None:
        """As `Section.validate`."""
        super().validate(prefix)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """An Optax chain: clip by global norm, then one of three methods under a schedule."""

    # "muon" is for matrices, with AdamW for the rest; "adafactor" keeps sums of rows and columns
    # where AdamW keeps squares, and no first moment.
    name: str = choice("adamw", "muon", "adafactor", default="adamw")
    learning_rate: float = bounded(1e-3, above=0.0)
    adam_learning_rate: float = bounded(0.0, least=0.0)  # of Muon's AdamW; 0 takes learning_rate
    schedule: str = choice("constant", "cosine", default="constant")  # cosine: to 0 at the end
    warmup_steps: int = bounded(0, least=0)
    weight_decay: float = bounded(0.0, least=0.0)
    b1: float = bounded(0.9, least=0.0, most=1.0)
    b2: float = bounded(0.999, least=0.0, most=1.0)
    clip_norm: float = bounded(1.0, above=0.0)
    # Of AdamW's first moment; "bfloat16" halves it.
    moment_dtype: str = choice("float32", "bfloat16", default="float32")

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

    estimator: str = choice("group", "gae", default="group")  # "gae": by turn, with the value head
    # Trajectories of the same episode, next to each other in the batch.
    group_size: int = bounded(16, least=1)
    divide_by_std: bool = False
    leave_one_out: bool = False
    # "question": answer tokens use their own question's reward.
    credit: str = choice("trajectory", "question", default="trajectory")
    discount: float = bounded(1.0, least=0.0, most=1.0)
    gae_lambda: float = bounded(0.95, least=0.0, most=1.0)
    epochs: int = bounded(1, least=1)
    minibatches: int = bounded(1, least=1)
    microbatch_rows: int = bounded(128, least=1)
    length_buckets: tuple[int, ...] = LENGTH_BUCKETS
    clip_low: float = bounded(0.2, least=0.0)
    clip_high: float = bounded(0.28, least=0.0)
    dual_clip: float = bounded(3.0, least=0.0)  # 0 turns it off
    weighting: str = choice("token_mean", "trajectory_equal", default="token_mean")
    entropy_coef: float = bounded(0.0)
    kl_coef: float = bounded(0.0, least=0.0)  # KL to the reference, with estimator `kl_kind`
    kl_kind: str = choice("k1", "k2", "k3", default="k3")
    value_coef: float = bounded(0.5, least=0.0)  # used with estimator "gae" only
    value_clip: float = bounded(0.0, least=0.0)  # 0 turns it off

    def validate(self, prefix: str = "ppo") -> None:
        """As `Section.validate`."""
        super().validate(prefix)

    def _check_together(self, prefix: str) -> None:
        check_length_buckets(self.length_buckets, f"{prefix}.length_buckets")
        check(
            self.estimator != "group" or self.group_size >= 2,
            f"{prefix}.estimator='group' needs {prefix}.group_size of at least 2, found "
            f"{self.group_size}; raise it or use {prefix}.estimator='gae'",
        )

    @property
    def needs_every_row(self) -> bool:
        """True where a row with zero advantage has a gradient all the same."""
        return self.entropy_coef != 0 or self.kl_coef != 0 or self.estimator == "gae"


@dataclasses.dataclass(frozen=True)
class SftConfig(Section):
    """Supervised fine-tuning on a teacher's trajectories."""

    data: str  # a folder of collect.py to learn from; '' for the scripted teacher
    steps: int = bounded(least=0)
    episodes: int = bounded(least=1)  # a step
    min_reward: float = bounded(least=0.0, most=1.0)  # of a trajectory that is learned from
    log_every: int = bounded(least=1)
    eval_every: int = bounded(least=1)
    save_every: int = bounded(least=1)
    microbatch_rows: int = bounded(least=1)
    length_buckets: tuple[int, ...]
    optimizer: OptimizerConfig

    def _check_together(self, prefix: str) -> None:
        check_length_buckets(self.length_buckets, f"{prefix}.length_buckets")


@dataclasses.dataclass(frozen=True)
class RlConfig(Section):
    """PPO on the agent's own rollouts."""

    steps: int = bounded(least=0)
    episodes: int = bounded(least=1)  # a step; each is played `ppo.group_size` times
    temperature: float = bounded(above=0.0)
    log_every: int = bounded(least=1)
    eval_every: int = bounded(least=1)
    save_every: int = bounded(least=1)
    max_skipped_in_a_row: int = bounded(least=1)
    optimizer: OptimizerConfig
    ppo: PPOConfig


@dataclasses.dataclass(frozen=True)
class EvalConfig(Section):
    """What is evaluated while training, and how many episodes are played at a time."""

    split: str
    episodes: int = bounded(least=1)
    batch_size: int = bounded(least=1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    """Which checkpoints are kept."""

    keep_last: int = bounded(least=1)
    keep_best: int = bounded(least=0)
