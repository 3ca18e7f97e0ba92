"""Paths of a user: spelled out the same way wherever one is given, and tried before they count.

A flag, a field of a config and an argument of the library all go through `expand`, once each; it
changes nothing the second time. `locate` makes of it what reads and writes, in a folder or in a
bucket. `try_folder` and `try_file` find out before long work whether its outcome can be kept.
"""

import contextlib
import os
import pathlib
import re
from typing import Any

from etils import epath

from atommem_jax.config.errors import ConfigError, check

PathLike = str | os.PathLike[str]


def is_remote(path: PathLike) -> bool:
    """Whether it is the URL of an object store, such as gs://bucket/run."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def expand(path: PathLike) -> str:
    """A path as it is meant: no blanks around it, `~` as the home folder, no slash at its end.

    What is relative stays so; '' stays ''. Of URLs `file://` becomes a path, others are kept.

    Raises ConfigError for the home folder of somebody unknown, and a character that no path has.
    """
    text = os.fspath(path).strip()
    check("\0" not in text, f"{text!r}: has a NUL character; allowed are paths without")
    if text.startswith("file://"):
        text = text.removeprefix("file://").removeprefix("localhost") or "/"
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text)
    if scheme:
        return scheme[0] + text[scheme.end() :].rstrip("/")
    if text.startswith("~"):
        found = os.path.expanduser(text)
        check(
            not found.startswith("~"),
            f"{text}: there is no home folder of {text.partition('/')[0]}; pass the path in full, "
            "or ./~ for a folder of that name",
        )
        text = found
    return text.rstrip("/") or text[:1]


def locate(path: PathLike) -> Any:
    """What reads and writes at a path: a `pathlib.Path`, or its likeness for an object store."""
    text = expand(path)
    return epath.Path(text) if is_remote(text) else pathlib.Path(text)


def try_folder(path: PathLike, name: str) -> None:
    """Finds out whether a folder can be made and written to, and leaves all as it was.

    Args:
      path: of the folder; nothing is tried of one in an object store.
      name: what it is to the user, for the error: `--out=runs/answer`.

    Raises ConfigError where the folder cannot be written to.
    """
    if is_remote(path):
        return
    folder = pathlib.Path(expand(path))
    missing = []
    try:
        for part in (folder, *folder.parents):
            if part.is_dir():
                break
            what = "is a file" if part == folder else f"{part} is a file"
            check(not part.exists(), f"{name}: {what}; pass a folder")
            missing.append(part)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _write_and_remove(folder / f".{os.getpid()}.try")
        finally:
            for part in missing:  # the innermost first; one that others write to by now stays
                with contextlib.suppress(OSError):
                    part.rmdir()
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot be written to ({error.strerror}); pass a folder that you may write "
            "to, with space left"
        ) from error


def make_folder(path: PathLike, name: str) -> None:
    """Makes a folder that can be written to. As `try_folder`."""
    try_folder(path, name)
    locate(path).mkdir(parents=True, exist_ok=True)


def try_file(path: PathLike, name: str) -> None:
    """Finds out whether a file can be written, and leaves it as it is. As `try_folder`."""
    if is_remote(path):
        return
    file = pathlib.Path(expand(path))
    check(not file.is_dir(), f"{name}: is a folder; pass a file in it")
    check(file.parent.is_dir(), f"{name}: there is no folder {file.parent}; make it first")
    try:
        _write_and_remove(file.with_name(f".{os.getpid()}.try"))
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot be written ({error.strerror}); pass a file in a folder that you may "
            "write to, with space left"
        ) from error


def _write_and_remove(path: pathlib.Path) -> None:
    try:
        with path.open("wb") as file:
            file.write(b"\0")  # an empty file can be made on a disk that is full
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
