"""Config files: Python files with `get_config()`, found from here or in the checkout."""

import contextlib
import importlib.util
import inspect
import pathlib
import traceback
from collections.abc import Iterator

from ml_collections import ConfigDict

from atommem_jax.config.errors import ConfigError, check


def load_config(spec: str) -> ConfigDict:
    """Returns `get_config()` of the file, or `get_config(arg)` for `file.py:arg`.

    Raises ConfigError if there is no such file, or it has no `get_config`, or `get_config` refuses.
    """
    name, *arguments = spec.split(":", 1)
    path = find_config(name)
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(
            f"--config={spec}: {path} is no Python file; pass a file.py that defines get_config()."
        )
    module = importlib.util.module_from_spec(module_spec)
    with _explain(spec, path):
        module_spec.loader.exec_module(module)
    check(
        hasattr(module, "get_config"),
        f"--config={spec}: {path} does not define get_config(); it must return a ConfigDict.",
    )
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"--config={spec}: get_config{inspect.signature(module.get_config)}: {error}; what "
            "follows the colon is its argument."
        ) from error
    with _explain(spec, path):
        return module.get_config(*arguments)


@contextlib.contextmanager
def _explain(spec: str, path: pathlib.Path) -> Iterator[None]:
    """What goes wrong in a config file is a mistake in it: a sentence that names the line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = path if line is None else f"{path}, line {line}"
        raise ConfigError(f"--config={spec}: {where}: {type(error).__name__}: {error}") from error


def find_config(name: str) -> pathlib.Path:
    """Returns the file, looked up from the working directory and then from the repository.

    Raises ConfigError that lists the configs there are.
    """
    root = pathlib.Path(__file__).resolve().parents[2]
    for path in (pathlib.Path(name), root / name):
        if path.is_file():
            return path
    folder = root / "experiments" / "configs"
    known = sorted(f"{p.relative_to(root)}" for p in folder.glob("*.py") if p.stem != "__init__")
    raise ConfigError(
        f"--config={name}: no such file. Configs there are: {', '.join(known) or 'none'}; a new "
        "one is a Python file with get_config()."
    )
