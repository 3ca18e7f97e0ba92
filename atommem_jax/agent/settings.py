"""What may be asked of a trained agent: fields that are set to other values than its checkpoint's.

A checkpoint says how an agent was trained: its parameters depend on model, tokenizer, protocol and
prompt. Memory, budgets, the task that it is tried on, in which workflow, and how positions are
scaled to longer texts (`model.rope_type` and what belongs to it) are open. A task's fields are
those of its family today, so that an older checkpoint can be asked for what came later.
"""

import hashlib
import re
import typing
from collections.abc import Sequence
from typing import Any

from atommem_jax.agent import validate
from atommem_jax.config import (
    OVERRIDABLE,
    ConfigError,
    Experiment,
    check,
    check_path,
    parse,
    parse_field,
)
from atommem_jax.tasks import datasets

_ROPE = "model.rope_"
_LONGEST_NAME = 120  # of settings in a file's name; most systems allow 255 bytes for all of it


def override(config: Experiment, settings: Sequence[str]) -> Experiment:
    """A copy of a checkpoint's config with other sizes; parameters do not depend on them.

    `task.name` takes another family of tasks, with its defaults, and must come before its fields.

    settings: texts such as "memory.entry_length=64" or "task.test_documents=200,400", of fields in
      `OVERRIDABLE` sections, of a `model.rope_` field, or "workflow=rag_documents".

    Raises ConfigError for another section or field, or a value out of range.
    """
    if not settings:
        return config
    plain = config.to_dict()
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, _, field = path.partition(".")
        is_open = section in OVERRIDABLE or path == "workflow" or path.startswith(_ROPE)
        check(
            bool(equals) and is_open,
            f"--set={setting}: allowed is FIELD=VALUE, of a field of {', '.join(OVERRIDABLE)}, "
            f"such as memory.entry_length=64, of {_ROPE}type and the like, or workflow=NAME",
        )
        if path == "workflow":
            plain["workflow"] = text
            continue
        if section == "task":
            _set_task(plain["task"], field, text, setting)
            continue
        check_path(plain, path)
        check(bool(field), f"--set={setting}: {section} is a section; name one of its fields")
        hints = typing.get_type_hints(type(getattr(config, section)))
        plain[section][field] = _parse_text(hints[field], plain[section][field], text, setting)
    config, trained = parse(plain), config
    if config.task != trained.task:  # else its files are none of our business
        try:
            datasets.parse_task(config.task.to_dict())
        except ValueError as error:
            raise ConfigError(str(error)) from error
    # Nothing learns from what a loaded agent plays.
    validate.validate(config.replace({"sft.steps": 0, "rl.steps": 0}))
    return config


def _set_task(task: dict[str, Any], field: str, text: str, setting: str) -> None:
    if field == "name":
        try:
            datasets.find_family(text)
        except ValueError as error:
            raise ConfigError(f"--set={setting}: {error}") from error
        if text != task["name"]:
            task.clear()
            task["name"] = text
        return
    hints = typing.get_type_hints(datasets.find_config(task["name"])) | {"reward": str}
    check(bool(field), f"--set={setting}: task is a section; name one of its fields")
    check_path({"task": hints}, f"task.{field}")
    value = _parse_text(hints[field], task.get(field), text, setting)
    task[field] = parse_field(hints[field], value, f"task.{field}")


def _parse_text(hint: Any, old: Any, text: str, setting: str) -> Any:
    """The value that a text spells, of the type of a field."""
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        items = [item.strip().strip("\"'") for item in text.strip("()[] ").split(",")]
        return tuple(_parse_scalar(kind, old, item, setting) for item in items if item)
    return _parse_scalar(hint, old, text, setting)


def _parse_scalar(kind: Any, old: Any, text: str, setting: str) -> Any:
    if kind is bool:
        words = {"true": True, "false": False}
        check(text.lower() in words, f"--set={setting}: allowed is true or false")
        return words[text.lower()]
    check(kind in (int, float, str), f"--set={setting}: this field cannot be spelled as a text")
    try:
        return kind(text)
    except ValueError:
        was = "" if old is None else f"; it was {old!r}"
        raise ConfigError(f"--set={setting}: {text!r} is no {kind.__name__}{was}") from None


def spell_name(settings: Sequence[str]) -> str:
    """The settings as part of a file's name: paths by their last part, and nothing too long.

    Other settings have another name: where anything is left out, a digest of all of it is in.
    """
    whole = "_".join(settings)
    short = [_shorten(setting) for setting in settings]
    name = re.sub(r"[^\w.,=+-]", "-", "_".join(short))[:_LONGEST_NAME]
    if name == whole:
        return name
    return f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _shorten(setting: str) -> str:
    field, equals, value = setting.partition("=")
    last = re.split(r"[/\\]", value)[-1]
    return f"{field}{equals}{last}"
