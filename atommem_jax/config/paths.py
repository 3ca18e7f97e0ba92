"""Paths of a user: spelled out the same way wherever one is given, and tried before they count.

A flag, a field of a config and an argument of the library all go through `expand`, once each; it
changes nothing the second time. `locate` makes of it what reads and writes, in a folder or in a
bucket, `write_text` writes whole or not at all in both. `try_folder` and `try_file` find out
before long work whether its outcome can be kept.
"""

import contextlib
import os
import pathlib
import re
import socket
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec
from etils import epath

from atommem_jax.config.errors import ConfigError, StoreError, check

PathLike = str | os.PathLike[str]

# gcsfs keeps every listing for as long as the process lives, sizes included: what others write in
# the meantime would not be seen, or cut to the size that it had before. It is meant for Orbax too.
for _protocol in ("gcs", "gs"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)

_STORES = ("gs://", "s3://", "az://", "hf://")  # that `epath` has; gs:// is what tests hold


def is_remote(path: PathLike) -> bool:
    """Whether it is the URL of an object store, such as gs://bucket/run."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def expand(path: PathLike) -> str:
    """A path as it is meant: no blanks around it, `~` as the home folder, no slash at its end.

    What is relative stays so; '' stays ''. Of URLs `file://` becomes a path, others are kept.

    Raises ConfigError for the home folder of somebody unknown, a character that no path has, and a
    URL of something else than an object store.
    """
    text = os.fspath(path).strip()
    check("\0" not in text, f"{text!r}: has a NUL character; allowed are paths without")
    if text.startswith("file://"):
        text = text.removeprefix("file://").removeprefix("localhost") or "/"
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text)
    if scheme:
        check(
            scheme[0].lower() in _STORES,
            f"{text}: {scheme[0]} is no object store that is known here; allowed are "
            f"{', '.join(_STORES)} and local paths",
        )
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


def absolute(path: PathLike) -> str:
    """A path that means the same from everywhere; a URL does already."""
    text = expand(path)
    return text if is_remote(text) else os.path.abspath(text)


def locate(path: PathLike) -> Any:
    """What reads and writes at a path: a `pathlib.Path`, or its likeness for an object store."""
    text = expand(path)
    return epath.Path(text) if is_remote(text) else pathlib.Path(text)


def check_local(path: PathLike, name: str) -> None:
    """Raises ConfigError for the URL of an object store; `name` as of `try_folder`."""
    check(
        not is_remote(path),
        f"{name}: is in an object store, and this is read and written on this machine alone; pass "
        "a local path, and copy with `gcloud storage cp --recursive FROM TO`",
    )


def write_text(path: PathLike, text: str) -> None:
    """Replaces a file in one go: whoever reads it finds what was there before, or all of `text`.

    Its folder must be there. Raises OSError where it cannot be written, and in an object store
    whatever its client does.
    """
    file = locate(path)
    if is_remote(path):  # an object is whole or not there, and has no folder
        file.write_bytes(text.encode())
        return
    aside = file.with_name(f"{file.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


@contextlib.contextmanager
def made_here(folder: PathLike) -> Iterator[str]:
    """A local folder for what cannot write to an object store; copied there when it is full.

    Yields the folder itself where that is local.
    """
    if not is_remote(folder):
        yield expand(folder)
        return
    with tempfile.TemporaryDirectory() as name:
        yield name
        for file in sorted(pathlib.Path(name).rglob("*")):
            if file.is_file():
                (locate(folder) / file.relative_to(name).as_posix()).write_bytes(file.read_bytes())


@contextlib.contextmanager
def reaching(path: PathLike, name: str) -> Iterator[None]:
    """Whatever goes wrong within, with a path in an object store, becomes a ConfigError.

    It is a StoreError where the store gave no answer. `name` as of `try_folder`.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # each client raises its own, for the network as for rights
        if not is_remote(path):
            raise
        if isinstance(error, ImportError):
            raise ConfigError(
                f"{name}: needs a package that is missing ({describe(error)}); for gs:// run: "
                "pip install -e '.[tpu]', or pip install gcsfs"
            ) from error
        kind = find_trouble(path, error) or RIGHTS
        raise make_error(
            kind, path, f"{name}: cannot be read or written ({describe(error)})"
        ) from error


RIGHTS, PASSING = "rights", "passing"  # what `find_trouble` finds
# What TensorStore, which raises ValueError for all, and gRPC call what is no matter of an object;
# and google-auth, while a machine that just started does not tell yet which account it has.
_REFUSED = re.compile("PERMISSION_DENIED|UNAUTHENTICATED")
_NO_ANSWER = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|Metadata server unavailable"
)


def find_trouble(path: PathLike, error: BaseException | None) -> str:
    """What keeps this machine from an object store; '' for an error that is about the object.

    Returns "passing" where the store gave no answer, "rights" where it refused.
    """
    while error is not None and is_remote(path):
        code = str(getattr(error, "code", ""))  # of gcsfs' HttpError
        text = str(error)
        of_a_client = type(error).__module__.startswith(("aiohttp.", "requests."))
        if code in ("408", "429") or re.fullmatch(r"5\d\d", code) or _NO_ANSWER.search(text):
            return PASSING
        if of_a_client or isinstance(error, (ConnectionError, TimeoutError)):
            return PASSING
        if code in ("401", "403") or "Forbidden" in text or _REFUSED.search(text):
            return RIGHTS
        if type(error).__module__.startswith("google.auth."):
            return RIGHTS
        error = error.__cause__ or error.__context__
    return ""


def ask(path: PathLike) -> BaseException | None:
    """What an object store answers to a request at a path; None where it answers it.

    Clients take much that keeps them out for what is not there: of a bucket that refuses, they say
    that a folder does not exist. Ask before something is called absent or damaged. A local path
    is not asked for.
    """
    if not is_remote(path):
        return None
    try:
        (locate(path) / _ASKED_FOR).read_bytes()
    except FileNotFoundError:
        return None
    except Exception as error:  # each client raises its own
        return error
    return None


_ASKED_FOR = ".asked_for"  # an object that nobody makes


def is_folder(path: PathLike, name: str) -> bool:
    """Whether there is such a folder; `name` as of `try_folder`.

    Raises ConfigError where an object store cannot be asked.
    """
    with reaching(path, name):
        found = locate(path).is_dir()
        error = None if found else ask(path)
        if error is not None:
            raise error
    return found


_CLIENTS = ("etils.epath.", "fsspec.", "gcsfs.", "google.cloud.")


def explain(urls: Iterable[str], error: Exception) -> ConfigError | None:
    """What to tell of an error in the middle of work on object stores; None where none has failed.

    A process that is lost raises much the same as a store that gives no answer. An error is the
    store's where a client of it was at work, or where its text names a bucket, as TensorStore's.

    urls: of what the work was told to read and write.
    """
    for url in filter(is_remote, urls):
        trouble = find_trouble(url, error)
        if trouble and (_comes_through_client(error) or bucket_of(url) in str(error)):
            return make_error(trouble, url, f"{url}: cannot be read or written ({describe(error)})")
    return None


def _comes_through_client(error: BaseException | None) -> bool:
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_globals.get("__name__", "").startswith(_CLIENTS):
                return True
        error = error.__cause__ or error.__context__
    return False


def make_error(trouble: str, path: PathLike, what: str) -> ConfigError:
    """The error of what an object store is in the way of; `trouble` as `find_trouble` names it."""
    check = f"python tpu_setup/check_env.py --checks=bucket --bucket={bucket_of(path)}"
    if trouble == PASSING:
        return StoreError(f"{what}. Start the same command again once {check} finds nothing wrong")
    return ConfigError(f"{what}. Is there such a bucket, and what is allowed there: {check}")


def describe(error: BaseException) -> str:
    """An error on one line, its kind first."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{' ...' if len(text) > 300 else ''}"


def bucket_of(path: PathLike) -> str:
    """gs://bucket of gs://bucket/run/file."""
    return "/".join(expand(path).split("/")[:3])


def try_folder(path: PathLike, name: str) -> None:
    """Finds out whether a folder can be made and written to, and leaves all as it was.

    Args:
      path: of the folder; in an object store, where there are none, of what begins like it.
      name: what it is to the user, for the error: `--out=runs/answer`.

    Raises ConfigError where the folder cannot be written to.
    """
    if is_remote(path):
        _try_object(path, name)
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
    with reaching(path, name):
        locate(path).mkdir(parents=True, exist_ok=True)


def try_file(path: PathLike, name: str) -> None:
    """Finds out whether a file can be written, and leaves it as it is. As `try_folder`."""
    if is_remote(path):
        _try_object(locate(path).parent, name)
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


def make_place(path: PathLike | None, name: str) -> None:
    """Makes the folder of a local file that will be written; None, no file, passes.

    Raises ConfigError where the file could not be written. `name` as of `try_folder`.
    """
    if path:
        make_folder(pathlib.Path(expand(path)).parent, name)
        try_file(path, name)


def _try_object(folder: PathLike, name: str) -> None:
    with reaching(folder, name):
        file = locate(folder) / f".{socket.gethostname()}.{os.getpid()}.try"
        file.write_bytes(b"\0")
        file.unlink()


def _write_and_remove(path: pathlib.Path) -> None:
    try:
        with path.open("wb") as file:
            file.write(b"\0")  # an empty file can be made on a disk that is full
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
