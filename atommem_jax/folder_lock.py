"""One lock for whatever writes a folder: a second writer ends at once and is told of the first.

The lock is the file `.lock` in the folder. It says who holds it: host, process, boot of the host
and start of the process, and a number that grows while the holder lives. Three things tell a
holder that is gone from one that is at work:

- The kernel's lock on the file, which it lets go of when a process dies, however it does.
- Where a file system has no locks, or only within one host: on the same host, whether the process
  still runs, by its number, its start and the boot.
- From another host, and in a bucket, whether the number in the file still grows.

With several processes the first one holds it for all of them.
"""

import contextlib
import json
import os
import pathlib
import shlex
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import filelock

from atommem_jax.config import ConfigError, paths

FILE_NAME = ".lock"
BEAT_SECONDS = 10.0  # between two signs of life
SILENCE_SECONDS = 35.0  # without any, after which a holder on another host counts as gone
_POLL_SECONDS = 0.1
_SETTLE_SECONDS = 1.0  # in a bucket, within which two that take a lock at once have both written


@contextlib.contextmanager
def hold(
    folder: paths.PathLike, name: str, patience: float = 1.0, *, inherited: bool = False
) -> Iterator[int | None]:
    """Holds a folder, which is made where it does not exist, for this process.

    Yields the descriptor of the locked file, None in a bucket.

    Args:
      folder: local, or the URL of one in an object store.
      name: what it is to the user, for the error: `--workdir=runs/mine`.
      patience: seconds to wait for a holder on this host to end.
      inherited: whether commands inherit the descriptor. They hold the folder too, until they end.

    Raises ConfigError, which names the holder, where another process holds it.
    """
    held = _acquire(paths.locate(folder), name, patience)
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(held, stop), daemon=True)
    thread.start()
    try:
        yield held.descriptor
    finally:
        stop.set()
        thread.join()
        held.release(inherited)


def _acquire(folder: Any, name: str, patience: float) -> "_FileLock | _BucketLock":
    if paths.is_remote(folder):
        return _BucketLock(folder, name, patience)
    return _FileLock(folder, name, patience)


def _beat(held: "_FileLock | _BucketLock", stop: threading.Event) -> None:
    """Shows that this process lives, until it is told to stop."""
    beats = 0
    while not stop.wait(BEAT_SECONDS):
        beats += 1
        # Such as a full disk, or a bucket out of reach, whose client has its own errors: the
        # next beat may come through.
        with contextlib.suppress(Exception):
            held.write(_describe_this_process(beats))


# ---------------------------------------------------------------------------------------------
# Who holds it


def _describe_this_process(beats: int = 0) -> str:
    """What the file says: a line for people, and one for programs."""
    facts = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _read_boot(),
        "start": _read_start(os.getpid()),
        "since": _SINCE,
        "beats": beats,
    }
    command = textwrap.shorten(shlex.join(sys.argv), 200, placeholder=" ...")
    return f"{_name(facts)} ({command})\n{json.dumps(facts)}\n"


_SINCE = time.strftime("%Y-%m-%d %H:%M:%S")


def _name(facts: Mapping[str, Any]) -> str:
    return f"process {facts['pid']} on {facts['host']} since {facts['since']}"


def _read_boot() -> str:
    """Tells one boot of this host from another."""
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _read_start(pid: int) -> str:
    """When a process started, in the kernel's ticks; '' where it does not run."""
    with contextlib.suppress(OSError, IndexError):
        # The name, in brackets, may hold anything: fields are counted from its end.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _parse(content: str) -> dict[str, Any]:
    """The facts in the file; {} where it has none, as when it is being written."""
    try:
        facts = json.loads(content.strip().rpartition("\n")[2])
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) and {"host", "pid", "boot", "start"} <= {*facts} else {}


def _is_of_this_host(facts: Mapping[str, Any]) -> bool:
    return facts["host"] == socket.gethostname()


def _runs(facts: Mapping[str, Any]) -> bool:
    """Whether a holder on this host still runs: the same process, not one of the same number."""
    return facts["boot"] == _read_boot() and facts["start"] == _read_start(facts["pid"]) != ""


def _refuse(name: str, content: str) -> NoReturn:
    holder = content.partition("\n")[0].strip() or "another process"
    raise ConfigError(
        f"{name} is in use by {holder}; it, or a run that it has left behind, is still at work "
        f"there: wait for it or end it, or choose another {name.partition('=')[0]}"
    )


def _grows(read: Callable[[], str], content: str, name: str) -> bool:
    """Waits until the file says something else than `content`, or nobody can be at work."""
    print(
        f"{name}: {content.partition(chr(10))[0]} left its lock; waiting up to "
        f"{SILENCE_SECONDS:g} s for a sign of its life",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if read() != content:
            return bool(read())  # an empty file was let go of
    return False


# ---------------------------------------------------------------------------------------------
# The locks


class _FileLock:
    """The lock of a local folder, or of one that hosts share."""

    def __init__(self, folder: pathlib.Path, name: str, patience: float):
        self._made = [part for part in (folder, *folder.parents) if not part.exists()]
        paths.make_folder(folder, name)
        self._path = folder / FILE_NAME
        deadline = time.monotonic() + patience
        while not self._take(name):
            if time.monotonic() > deadline:
                _refuse(name, self._read_path())
            time.sleep(_POLL_SECONDS)

    def _take(self, name: str) -> bool:
        """Opens and locks the file; False where another holds it."""
        self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        taken = False
        try:
            locked = _lock(self.descriptor)
            if locked is False or not self._is_in_place():
                return False
            content = self.read()
            facts = _parse(content)
            if facts and _is_of_this_host(facts):
                # With the kernel's lock in hand, whoever wrote this is gone.
                if locked is None and _runs(facts):
                    return False
            elif facts and _grows(self.read, content, name):
                _refuse(name, self.read())
            self.write(_describe_this_process())
            if locked is None:  # two may have come at once: the last one to write has it
                time.sleep(2 * _POLL_SECONDS)
                if self.read() != _describe_this_process():
                    return False
            taken = True
            return True
        finally:
            if not taken:
                os.close(self.descriptor)

    def _is_in_place(self) -> bool:
        """Whether the file that was locked is still the one in the folder."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _read_path(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def read(self) -> str:
        """What the locked file says."""
        return os.pread(self.descriptor, 1 << 16, 0).decode("utf-8", "replace")

    def write(self, content: str) -> None:
        """In place: the lock belongs to the file, not to its name."""
        data = content.encode("utf-8", "replace")
        os.pwrite(self.descriptor, data, 0)
        os.ftruncate(self.descriptor, len(data))

    def release(self, inherited: bool) -> None:
        """Removes the file, or where others have inherited it says that nobody else is at work.

        Closed and not unlocked: a command that has inherited it goes on to hold it.
        """
        with contextlib.suppress(OSError):
            if inherited:
                os.ftruncate(self.descriptor, 0)
            elif self._is_in_place():
                self._path.unlink()
                for part in self._made:  # where nothing came of it, as after a mistake
                    part.rmdir()
        os.close(self.descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether the kernel's lock was taken; None where the file system has no locks."""
    try:
        return filelock.lock_descriptor(descriptor, blocking=False)
    except (OSError, NotImplementedError):
        return None


class _BucketLock:
    """The lock of a folder in an object store: nothing but the signs of life."""

    descriptor: int | None = None

    def __init__(self, folder: Any, name: str, patience: float):
        self._path = folder / FILE_NAME
        with paths.reaching(folder, name):
            self._take(name, patience)

    def _take(self, name: str, patience: float) -> None:
        content = self.read()
        facts = _parse(content)
        if facts and _is_of_this_host(facts):
            deadline = time.monotonic() + patience
            while self.read() and _runs(facts):
                if time.monotonic() > deadline:
                    _refuse(name, self.read())
                time.sleep(_POLL_SECONDS)
        elif facts and _grows(self.read, content, name):
            _refuse(name, self.read())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.write(_describe_this_process())
        time.sleep(_SETTLE_SECONDS)  # two may have come at once: the last one to write has it
        content = self.read()
        if content != _describe_this_process():
            _refuse(name, content)

    def read(self) -> str:
        """What the object says; '' where there is none."""
        try:
            return self._path.read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def write(self, content: str) -> None:
        """Writes the object anew."""
        self._path.write_bytes(content.encode("utf-8", "replace"))

    def release(self, inherited: bool) -> None:
        """Removes the object, if it is still that of this process."""
        del inherited  # there is no descriptor
        with contextlib.suppress(Exception):  # what is left is seen to be stale
            if _parse(self.read()).get("pid") == os.getpid():
                self._path.unlink()
