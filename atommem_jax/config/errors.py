"""Mistakes in a config: errors that name the field, and the nearest field for a misspelt one.

Knows nothing of flags or files. A config is a nested `ml_collections.ConfigDict` or dict; a
*path* names one field of it with dots (`model.width`).
"""

import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

RENAMED: Mapping[str, str] = {
    "rollout.group": "rollout.microbatch",
    "rollout.unstack": "rollout.cpu_decode",
    "sft.eighths": "sft.length_buckets",
    "rl.ppo.eighths": "rl.ppo.length_buckets",
    "teacher.update": "teacher.update_shown",  # no flag could set it: a ConfigDict has a method
}
"""Old path of a field -> its path now."""


class ConfigError(ValueError):
    """The config cannot run. The message names the field, its value and the next step."""


class PassingError(ConfigError):
    """Something else than the config failed. No mistake: the same command may succeed later."""


class StoreError(PassingError):
    """An object store gives no answer."""


def check(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds.

    The message should name the field(s), the value found, the values allowed and what to do.
    """
    if not condition:
        raise ConfigError(message)


def list_paths(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the path of every field, sections included, in alphabetical order."""
    paths = []
    for name in sorted(config):
        path = f"{prefix}{name}"
        paths.append(path)
        if is_section(config[name]):
            paths.extend(list_paths(config[name], prefix=f"{path}."))
    return paths


def is_section(value: Any) -> bool:
    """Tells a section (nested config) from a field that holds a value."""
    return isinstance(value, (ConfigDict, Mapping))


def suggest(config: ConfigDict | Mapping[str, Any], unknown_key: str) -> str | None:
    """Returns the valid path nearest to `unknown_key`, or None where nothing is near.

    The last part must resemble (`widht`, `width`); among those the whole path decides, so that a
    field of the section that was meant comes before one of the same name elsewhere.
    """

    def compare(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    leaf = unknown_key.rpartition(".")[2]
    scores = {}
    for path in list_paths(config):
        likeness = compare(leaf, path.rpartition(".")[2])
        if likeness >= 0.6:
            scores[path] = likeness + compare(unknown_key, path)
    return max(scores, key=lambda path: scores[path], default=None)


def check_path(config: ConfigDict | Mapping[str, Any], path: str) -> None:
    """Raises `ConfigError` unless `path` names a field of `config`.

    The message gives the nearest valid path and the fields of the deepest section of `path`
    that exists.
    """
    section: Any = config
    parts = path.split(".")
    for depth, part in enumerate(parts):
        if is_section(section) and part in section:
            section = section[part]
            continue
        parent = ".".join(parts[:depth])
        if not is_section(section):
            raise ConfigError(
                f"unknown config field '{path}': '{parent}' holds the value {section!r} and has "
                f"no fields; set '{parent}' itself."
            )
        if path in RENAMED:
            raise ConfigError(f"config field '{path}' is now called '{RENAMED[path]}'")
        nearest = suggest(config, path)
        hint = f"; did you mean '{nearest}'?" if nearest else "."
        of = f"of '{parent}'" if parent else "at the top"
        raise ConfigError(
            f"unknown config field '{path}'{hint} Valid fields {of}: {', '.join(sorted(section))}."
        )
