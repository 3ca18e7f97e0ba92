"""Flags of the scripts: a locked `--config file.py:arg`, and errors that read like sentences.

A script does

    CONFIG = flags.define_config("experiments/configs/tiny.py")

    def main(argv):
        config = CONFIG.value

    if __name__ == "__main__":
        flags.run(main)

A field is set with `--config.section.field=value`; an unknown one ends the script with status 2
and the nearest valid name, before anything is allocated.
"""

import logging as python_logging
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, logging
from absl import flags as absl_flags
from ml_collections import config_flags

from atommem_jax import config as config_lib
from atommem_jax.config import paths


class PathParser(absl_flags.ArgumentParser):
    """Paths as they are meant, wherever a script takes one: see `config.paths.expand`.

    local: whether the URL of an object store is refused.
    """

    def __init__(self, local: bool = False):
        super().__init__()
        self._local = local
        where = "" if local else ", and gs://BUCKET/... a bucket"
        self.syntactic_help = f"a path; ~ is the home folder{where}"

    def parse(self, argument: str) -> str:
        """The path that was typed. Raises ValueError where it is none."""
        path = paths.expand(argument)
        if self._local:
            paths.check_local(path, path)
        return path

    def flag_type(self) -> str:
        """What --help calls it."""
        return "string"


def define_path(
    name: str,
    default: str | None,
    about: str,
    *,
    local: bool = False,
    flag_values: Any = absl_flags.FLAGS,
) -> absl_flags.FlagHolder:
    """Defines a flag that is a path, `local` or in a bucket too; returns the holder."""
    return absl_flags.DEFINE(
        PathParser(local), name, default, about, flag_values, absl_flags.ArgumentSerializer()
    )


def define_paths(name: str, about: str, *, local: bool = False) -> absl_flags.FlagHolder:
    """Defines a flag that is a path and may be given several times; returns the holder."""
    return absl_flags.DEFINE_multi(
        PathParser(local), absl_flags.ArgumentSerializer(), name, [], about
    )


DATA_ROOT = define_path(
    "data_root", "runs/data", "Where prepared data sets are kept; shared by all runs.", local=True
)

# What is defined through this module from here on belongs to the script that asks for it.
absl_flags.disclaim_key_flags()

# Names of the flags defined here that a script has: --help shows them.
_SHARED = ["data_root"]

# Default file of each config flag: `run` applies it, because a default given to ml_collections is
# parsed where the flag is defined, and its errors could not be caught.
_DEFAULTS: dict[str, str] = {}


def define_config(default: str, name: str = "config") -> absl_flags.FlagHolder:
    """Defines `--config` (a config file, with `:arg` for its `get_config`); returns the holder.

    Args:
      default: the config used when the flag is not given, relative to the working directory or to
        the root of the repository.
      name: of the flag.
    """
    _DEFAULTS[name] = default
    about = f"Config file, file.py or file.py:argument (default {default})."
    return _share(
        name, lambda: config_flags.DEFINE_config_file(name, None, about, lock_config=True)
    )


def _share(name: str, define: Callable[[], absl_flags.FlagHolder]) -> absl_flags.FlagHolder:
    """The holder of a flag that several scripts have, which a test may import side by side."""
    if name in absl_flags.FLAGS:
        return absl_flags.FlagHolder(absl_flags.FLAGS, absl_flags.FLAGS[name])
    _SHARED.append(name)
    return define()


def require(holder: absl_flags.FlagHolder, advice: str) -> str:
    """The value of a flag that has no default. Raises ConfigError where it was not given.

    advice: what to pass.
    """
    config_lib.check(bool(holder.value), f"--{holder.name} is missing: {advice}")
    return holder.value


def read_changes(name: str = "config") -> tuple[str, dict[str, Any]]:
    """The config file that `--config` names, and {path: value} of the fields set by flag."""
    flag = absl_flags.FLAGS[name]
    return config_flags.get_config_filename(flag), dict(config_flags.get_override_values(flag))


def spell_changes(changes: Mapping[str, Any], name: str = "config") -> list[str]:
    """The flags that set these fields, in another process."""
    return [f"--{name}.{path}={value}" for path, value in changes.items()]


def define_workdir(about: str, default: str | None = None) -> absl_flags.FlagHolder:
    """Defines `--workdir`; `about` says what it is to the script. Returns the holder."""
    return _share("workdir", lambda: define_path("workdir", default, about))


def define_settings(about: str) -> absl_flags.FlagHolder:
    """Defines `--set=FIELD=VALUE` of a loaded agent; returns the holder.

    `--task.documents=20` is short for `--set=task.documents=20`, and so for every section that a
    checkpoint leaves open. about: which fields are meant, and what becomes of them.
    """
    return absl_flags.DEFINE_multi_string(
        _SETTINGS, [], f"FIELD=VALUE, for which --FIELD=VALUE is short: {about}"
    )


_SETTINGS = "set"


def _spell_settings(argv: Sequence[str]) -> list[str]:
    """Returns argv with `--task.documents=20` as `--set=task.documents=20`."""
    fields = re.compile(rf"--?((?:{'|'.join(config_lib.OVERRIDABLE)})\.[^=]+)(?:=(.*))?", re.DOTALL)
    spelled = []
    arguments = iter(argv)
    for argument in arguments:
        match = fields.fullmatch(argument)
        if match:
            value = match[2] if match[2] is not None else next(arguments, "")
            argument = f"--{_SETTINGS}={match[1]}={value}"
        spelled.append(argument)
    return spelled


def define_processes() -> Callable[[], dict[str, Any]]:
    """Defines the flags of a run of several processes.

    Returns what reads them: the arguments of `atommem_jax.parallel.processes.initialise`.
    """
    define = absl_flags.DEFINE_integer
    holders = {
        "coordinator_address": absl_flags.DEFINE_string(
            "coordinator_address",
            None,
            "host:port of process 0, where several processes meet; not needed on a TPU slice.",
        ),
        "num_processes": define(
            "num_processes", None, "How many processes there are; not needed on a TPU slice."
        ),
        "process_id": define(
            "process_id", None, "Number of this process, from 0; not needed on a TPU slice."
        ),
        "heartbeat_timeout_seconds": define(
            "heartbeat_timeout_seconds",
            100,
            "Seconds of silence after which a process counts as lost, and the others end.",
            lower_bound=1,
        ),
        "initialization_timeout_seconds": define(
            "initialization_timeout_seconds",
            300,
            "Seconds that processes wait for all to arrive.",
            lower_bound=1,
        ),
    }
    _SHARED.extend(holders)
    return lambda: {name: holder.value for name, holder in holders.items()}


def run(
    main: Callable[[Sequence[str]], Any],
    *,
    leave: Callable[[BaseException], None] = lambda error: None,
) -> None:
    """Parses the flags and runs `main(argv)`; a mistake of the user ends with status 2.

    Mistakes are flags and configs that cannot be parsed, and any `ConfigError` that `main` raises
    while it checks its config; where it is a PassingError, the status is 1. An object store that
    fails or refuses in the middle of the work ends in a sentence too, whichever client has raised
    it. Other exceptions keep their traceback. `leave` is called with what ended `main` early; it
    may end the process in its own way.
    """

    # --help shows the flags of the script's own module: add those that scripts share.
    for name in _SHARED:
        absl_flags.FLAGS.register_key_flag_for_module(sys.argv[0], absl_flags.FLAGS[name])

    def quiet_main(argv: Sequence[str]) -> Any:
        # Libraries tell every step of a save at level INFO; --verbosity=0 brings that back.
        if not absl_flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)
            # Of a bucket out of reach they print tracebacks, at every attempt; what they raise in
            # the end is told in a sentence.
            for name in ("gcsfs", "fsspec"):
                python_logging.getLogger(name).setLevel(python_logging.CRITICAL)
            python_logging.getLogger("absl").addFilter(_without_traceback)
        try:
            return _exit_on_mistake(main, argv)
        except BaseException as error:
            leave(error)
            raise

    app.run(quiet_main, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    return _exit_on_mistake(_parse_checked, argv)


def _parse_checked(argv: Sequence[str]) -> list[str]:
    try:
        for name, default in _DEFAULTS.items():
            argv, spec = _resolve_spec(name, default, argv)
            argv = _read_overrides(name, spec, argv)
        if _SETTINGS in absl_flags.FLAGS:
            argv = _spell_settings(argv)
        return absl_flags.FLAGS(argv)
    except absl_flags.Error as error:
        raise config_lib.ConfigError(f"{error}\nPass --helpshort for the flags.") from error


def _resolve_spec(name: str, default: str, argv: Sequence[str]) -> tuple[list[str], str]:
    """Returns argv with `--name` given once and absolute, and what it gives.

    The last of several counts, and `default` where there is none.
    """
    rest, spec = [], default
    arguments = iter(argv)
    for argument in arguments:
        match = re.fullmatch(rf"--?{re.escape(name)}(?:=(.*))?", argument)
        if match:
            spec = match[1] if match[1] is not None else next(arguments, "")
        else:
            rest.append(argument)
    file, *parameter = spec.split(":", 1)
    spec = ":".join([str(config_lib.find_config(file).resolve()), *parameter])
    return [rest[0], f"--{name}={spec}", *rest[1:]], spec


def _read_overrides(name: str, spec: str, argv: Sequence[str]) -> list[str]:
    """Returns argv, whose first flag is `--name`, with each field set once: the last one counts.

    ml_collections would join tuples that are given twice, and answer an unknown field with a
    traceback of its own internals.
    """
    config = config_lib.load_config(spec)
    values = config_lib.flatten(config.to_dict())
    rest: list[str] = [argv[0]]
    found: dict[str, str] = {}
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument == "--":
            rest += [argument, *arguments]
            break
        match = re.fullmatch(rf"--?(no)?{re.escape(name)}\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            rest.append(argument)
            continue
        negated, path, value = match.groups()
        config_lib.check_path(config, path)
        if value is None and not isinstance(values.get(path), bool):
            value = next(arguments, None)
        if value is None:
            found[path] = argument
        else:
            found[path] = f"--{negated or ''}{name}.{path}={_spell(values.get(path), value)}"
    return [*rest[:2], *found.values(), *rest[2:]]


def _spell(default: Any, value: str) -> str:
    """A tuple of texts as Python spells it: `query,key` and `(query,key)` are two names."""
    is_texts = isinstance(default, tuple) and all(isinstance(item, str) for item in default)
    if not (is_texts and default) or re.search("[\"']", value):
        return value
    names = [part.strip() for part in value.strip().strip("()[]").split(",")]
    return repr(tuple(part for part in names if part))


def _without_traceback(record: python_logging.LogRecord) -> bool:
    """Orbax logs what fails in its threads before it raises it."""
    record.exc_info = record.exc_text = None
    return True


def _exit_on_mistake(function: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> Any:
    found: config_lib.ConfigError | None
    try:
        return function(argv)
    except config_lib.ConfigError as error:
        found = error
    except Exception as error:
        found = paths.explain(find_addresses(" ".join(sys.argv[1:])), error)
        if found is None:
            raise
    print(f"{pathlib.Path(sys.argv[0]).name}: {found}", file=sys.stderr)
    # What passes is no mistake: supervise.py starts the command again.
    sys.exit(1 if isinstance(found, config_lib.PassingError) else 2)


def find_addresses(text: str) -> list[str]:
    """What looks like the address of an object store or a server, such as gs://bucket/run."""
    # Looking back keeps a long value from being read once for each of its characters.
    return re.findall(r"(?<![a-z0-9])[a-z0-9]++://[^\s'\",)]+", text)
