"""Functions of a user, named in a config: `my_task.py:samples`, or `my_package.my_task:samples`."""

import functools
import importlib
import importlib.util
import inspect
import pathlib
import types
from collections.abc import Callable
from typing import Any

from atommem_jax.config import ConfigError, check


def find(spec: str, field: str) -> Callable[..., Any]:
    """The function that a field of a config names.

    Args:
      spec: 'FILE.py:FUNCTION' or 'MODULE:FUNCTION'.
      field: path of the field, for errors.

    Raises ConfigError where there is no such function.
    """
    where, colon, name = spec.rpartition(":")
    check(
        bool(where and colon and name),
        f"{field}={spec!r}: allowed is 'FILE.py:FUNCTION' or 'MODULE:FUNCTION'",
    )
    module = _load_file(where, field) if where.endswith(".py") else _load_module(where, field)
    function = getattr(module, name, None)
    if not callable(function):
        here = [
            other
            for other, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise ConfigError(
            f"{field}={spec!r}: {where} has no function {name}; it has: {', '.join(here) or 'none'}"
        )
    return function


def read_source(function: Callable[..., Any]) -> bytes:
    """The file that a function stands in; b'' where there is none."""
    file = inspect.getsourcefile(inspect.unwrap(function))
    return pathlib.Path(file).read_bytes() if file else b""


def _load_file(path: str, field: str) -> types.ModuleType:
    file = pathlib.Path(path).resolve()
    check(file.is_file(), f"{field}: there is no file {path}; pass its path from here, or in full")
    return _run_file(file, file.stat().st_mtime_ns)


@functools.cache
def _run_file(file: pathlib.Path, changed: int) -> types.ModuleType:
    """The module in a file; run again where that has changed."""
    del changed
    spec = importlib.util.spec_from_file_location(f"task_{file.stem}", file)
    assert spec is not None, file  # it ends in .py
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_module(name: str, field: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise  # what the module itself imports is missing
        raise ConfigError(
            f"{field}: there is no module {name!r}; put its folder on PYTHONPATH, or pass the path "
            "of its file, FILE.py:FUNCTION"
        ) from error
