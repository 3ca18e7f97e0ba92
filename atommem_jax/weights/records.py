"""Values that JSON has no type for, in JSON: tuples and bytes come back as they were.

A checkpoint keeps its config, its tokenizer and its position in the data so.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

_TUPLE, _BYTES = "__tuple__", "__bytes__"


def encode(value: Any, path: str) -> Any:
    """Returns `value` in JSON's types; tuples and bytes are tagged so that `decode` restores them.

    Raises ValueError naming the `path` of what JSON cannot hold.
    """
    if isinstance(value, (ConfigDict, Mapping)):
        plain = value.to_dict() if isinstance(value, ConfigDict) else value
        for name in plain:
            if not isinstance(name, str) or name in (_TUPLE, _BYTES):
                raise ValueError(f"{path}: key {name!r} is reserved or no string; rename it.")
        return {name: encode(item, f"{path}.{name}") for name, item in plain.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode("ascii")}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"{path} is a {type(value).__name__}; JSON holds str, int, float, bool, None, lists, "
        "tuples, bytes and dicts of them: name the thing with a string."
    )


def decode(value: Any) -> Any:
    """Undoes `encode`."""
    if isinstance(value, dict):
        if _TUPLE in value:
            return tuple(decode(item) for item in value[_TUPLE])
        if _BYTES in value:
            return base64.b64decode(value[_BYTES])
        return {name: decode(item) for name, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value
