"""The typed experiment: what a config becomes when it has passed the door.

`parse` takes a `ConfigDict` or nested dicts, in names of any version, and returns an `Experiment`
whose fields have their types and are in their ranges. `Experiment.replace` changes fields by path
and parses again; `Experiment.to_dict` is what checkpoints keep.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import flax.traverse_util
from ml_collections import ConfigDict

from atommem_jax.config import paths
from atommem_jax.config.errors import ConfigError, check, check_path, is_section
from atommem_jax.config.fields import Choices, Count, Path, Section, check_value, read_hints
from atommem_jax.config.sections import (
    CheckpointConfig,
    DebugConfig,
    DecoderConfig,
    EvalConfig,
    LoraConfig,
    MemoryConfig,
    MeshConfig,
    ProtocolConfig,
    RlConfig,
    RolloutConfig,
    SftConfig,
    TaskConfig,
    TeacherConfig,
    TokenizerConfig,
)
from atommem_jax.config.upgrade import upgrade

OVERRIDABLE = ("task", "memory", "rollout", "eval")
"""Sections that say what an agent is tried on and how it plays, and nothing of its parameters."""


@dataclasses.dataclass(frozen=True)
class Experiment(Section):
    """A whole experiment, typed and in range."""

    seed: Count
    workflow: str  # "learned", or one of `tasks.workflows`: what it is compared with
    init_from: Path  # a checkpoint whose parameters training starts from; '' for new ones
    profile: bool  # trace the second step of each stage to <workdir>/profile
    prompt: Annotated[str, Choices("compact", "chat")]  # "chat": the format of a pretrained model
    mesh: MeshConfig
    task: TaskConfig
    tokenizer: TokenizerConfig
    protocol: ProtocolConfig
    memory: MemoryConfig
    rollout: RolloutConfig
    model: DecoderConfig
    lora: LoraConfig
    teacher: TeacherConfig
    sft: SftConfig
    rl: RlConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    debug: DebugConfig
    # Sizes of an `EpisodeShape`, where a config has them in place of data.
    shape: Mapping[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values: what `parse` reads back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.shape is None:
            del fields["shape"]
        return {name: _to_plain(value) for name, value in fields.items()}

    def replace(self, changes: Mapping[str, Any]) -> "Experiment":
        """A copy with the fields at these paths changed, such as {"rl.steps": 3}.

        Raises ConfigError for a path that is none, and a value that cannot be.
        """
        config = self.to_dict()
        for path, value in changes.items():
            check_path(config, path)
            *parents, name = path.split(".")
            section = config
            for part in parents:
                section = section[part]
            section[name] = value
        return parse(config)


def _to_plain(value: Any) -> Any:
    if isinstance(value, TaskConfig):
        return value.to_dict()
    if isinstance(value, Section):
        return {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else value


def parse(config: ConfigDict | Mapping[str, Any]) -> Experiment:
    """The experiment that a config describes.

    Raises ConfigError, naming the field, for one that is missing, unknown, of another type or out
    of range.
    """
    experiment = _parse_section(Experiment, upgrade(config), "")
    experiment.validate("")
    return experiment


def to_config_dict(experiment: Experiment) -> ConfigDict:
    """The locked `ConfigDict` of an experiment, for what changes fields by flag."""
    return ConfigDict(experiment.to_dict()).lock()


def flatten(section: Section | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{path: value} of every field that is no section."""
    plain = section if isinstance(section, Mapping) else _to_plain(section)
    flat = flax.traverse_util.flatten_dict(dict(plain), sep=".", keep_empty_nodes=True)
    return {f"{prefix}{path}": value for path, value in flat.items()}


def differences(
    ours: Section | Mapping[str, Any], theirs: Section | Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Paths whose values differ, with both values."""
    ours, theirs = flatten(ours), flatten(theirs)
    return [
        f"{prefix}{path}={ours.get(path)!r} (checkpoint: {theirs.get(path)!r})"
        for path in sorted({*ours, *theirs})
        if ours.get(path) != theirs.get(path)
    ]


def _parse_section(kind: type, values: Any, path: str) -> Any:
    prefix = f"{path}." if path else ""
    check(is_section(values), f"{path}={values!r}: allowed is a section with fields of its own")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            check_path(dict.fromkeys(fields), str(name))
    hints = read_hints(kind)
    parsed = {}
    for name, field in fields.items():
        if name in values:
            parsed[name] = _parse_value(hints[name], values[name], f"{prefix}{name}")
        elif field.default is dataclasses.MISSING:
            raise ConfigError(
                f"the config has no {prefix}{name}; start from get_config() of "
                "experiments/configs/synthetic.py, which has every field"
            )
    return kind(**parsed)


def parse_field(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type of a field, in its range. Raises ConfigError, naming `path`."""
    parsed = _parse_value(hint, value, path)
    for item in parsed if isinstance(parsed, tuple) else (parsed,):
        check_value(path, item, hint)
    return parsed


def _parse_value(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type of a field. Raises ConfigError where it is of another."""
    if hint == Path:
        return _parse_path(value, path)
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if hint is TaskConfig:
        return _parse_task(value, path)
    if isinstance(hint, type) and issubclass(hint, Section):
        return _parse_section(hint, value, path)
    if typing.get_origin(hint) is tuple:
        return _parse_tuple(typing.get_args(hint)[0], value, path)
    if typing.get_origin(hint) is types.UnionType:  # Mapping[str, int] | None
        if value is None:
            return None
        check(is_section(value), f"{path}={value!r}: allowed is a section of whole numbers")
        return {name: _parse_value(int, size, f"{path}.{name}") for name, size in value.items()}
    return _parse_scalar(hint, value, path)


_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def _parse_scalar(hint: type, value: Any, path: str) -> Any:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # NumPy's
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        check(abs(value) < 1e300, f"{path} is too large for a number; set --config.{path}")
        value = float(value)
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    check(
        fits,
        f"{path}={value!r} is a {type(value).__name__}: allowed is {_KINDS[hint]}; "
        f"set --config.{path.partition('[')[0]}",
    )
    return value


def _parse_path(value: Any, path: str) -> str:
    text = _parse_scalar(str, value, path)
    try:
        return paths.expand(text)
    except ConfigError as error:
        raise ConfigError(f"--config.{path}={error}") from error


def _parse_tuple(hint: type, value: Any, path: str) -> tuple[Any, ...]:
    check(
        isinstance(value, (tuple, list)),
        f"{path}={value!r} is a {type(value).__name__}: allowed is a tuple; set --config.{path}",
    )
    return tuple(_parse_scalar(hint, item, f"{path}[{i}]") for i, item in enumerate(value))


def _parse_task(value: Any, path: str) -> TaskConfig:
    check(
        is_section(value) and isinstance(value.get("name"), str),
        f"{path}: allowed is a section with a name, such as 'village'; found {value!r}",
    )
    fields = {name: _freeze(item) for name, item in value.items() if name != "name"}
    return TaskConfig(name=value["name"], fields=types.MappingProxyType(fields))


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
