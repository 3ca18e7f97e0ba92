"""Several processes as one run: how they meet, agree, pass notes, and stop together.

Every process runs the same program on its own devices and its own rows of the data. What must be
the same everywhere is compared before the first device is touched (`check_same`): a collective
among unlike processes hangs or computes nonsense, it does not fail. Notes between hosts go through
the store of JAX's coordinator (`gather`), not through the devices, so they need no program and
have a time limit.

All processes call these functions at the same places, `is_main` alone excepted: a call that only
some make waits for the others until the time limit. A single process returns from each at once.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import tqdm
from jax._src import distributed as jax_distributed  # its client has no public name
from jax.experimental import multihost_utils

from atommem_jax.config import ConfigError, StoreError, check

T = TypeVar("T")

PATIENCE_SECONDS = 600  # that processes wait for each other's notes; making a data set takes long
_PARTING_SECONDS = 5  # that one which failed waits for others that fail with it
_PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "sentencepiece",
    "tokenizers",
    "tensorflow-datasets",
)

_rounds = itertools.count()  # numbers the notes: all processes count alike
_asked_to_stop = threading.Event()
_steps_asked = itertools.count()  # how often `preempted` was called


class DistributedError(RuntimeError):
    """The other processes cannot be reached, or one has failed. It says what to look at."""


# ---------------------------------------------------------------------------------------------
# Meeting


def initialise(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_seconds: int = 100,
    initialization_timeout_seconds: int = 300,
) -> None:
    """Joins the processes of a run; call it before anything touches JAX's devices.

    Args:
      coordinator_address: host:port of process 0, which opens the port there.
      num_processes: how many there are.
      process_id: number of this one, from 0.
      heartbeat_timeout_seconds: after which silence a process counts as lost, and the others end.
      initialization_timeout_seconds: how long to wait for all to arrive.

    Without the first three it does nothing, except on a TPU slice of several hosts, where they
    come from the environment.

    Raises ConfigError where some of the three are given or they disagree, DistributedError where
    the others do not arrive in time.
    """
    limits: dict[str, Any] = {
        "heartbeat_timeout_seconds": heartbeat_timeout_seconds,
        "initialization_timeout": initialization_timeout_seconds,
    }
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if _count_tpu_hosts() > 1:
            _join({}, limits)
        return
    check(
        not missing,
        f"--{' and --'.join(missing)} missing: several processes need --coordinator_address, "
        "--num_processes and --process_id together; a single process, and a TPU slice, none",
    )
    host, _, port = str(coordinator_address).rpartition(":")
    check(
        bool(host) and port.isdigit(),
        f"--coordinator_address={coordinator_address}: give host:port, such as 10.0.0.1:8476, of "
        "process 0",
    )
    assert num_processes is not None
    assert process_id is not None
    check(num_processes >= 1, f"--num_processes={num_processes}: must be at least 1")
    check(
        0 <= process_id < num_processes,
        f"--process_id={process_id}: --num_processes={num_processes} allows 0 to "
        f"{num_processes - 1}",
    )
    _join(given, limits)


def _join(given: Mapping[str, Any], limits: Mapping[str, Any]) -> None:
    try:
        jax.distributed.initialize(**given, **limits)
    except jax.errors.JaxRuntimeError as error:
        where = given.get("coordinator_address") or "the coordinator of the TPU slice"
        raise DistributedError(
            f"process {given.get('process_id', '(by the environment)')} did not meet the others at "
            f"{where} within {limits['initialization_timeout']} s: {_first_line(error)}. Start all "
            "processes at about the same time, with the same address, and let it through the "
            "firewall"
        ) from error


def _count_tpu_hosts() -> int:
    """Hosts of the TPU slices that this host is part of; 1 without a TPU."""
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    if (platforms or "tpu").split(",")[0] != "tpu":
        return 1
    from jax._src.clusters import cloud_tpu_cluster as clusters

    for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
        if cluster.is_env_present():
            return cluster.get_process_count()
    return 1


def process_count() -> int:
    """How many processes the run has; unlike `jax.process_count` it starts no device."""
    return jax_distributed.global_state.num_processes


def process_index() -> int:
    """The number of this process, from 0; it starts no device."""
    return jax_distributed.global_state.process_id


def is_main() -> bool:
    """Whether this process writes what only one may write: logs, metrics, reports."""
    return process_index() == 0


# ---------------------------------------------------------------------------------------------
# Notes


def gather(value: Any) -> list[Any]:
    """What every process gave, in their order; the same list on each.

    `value` is JSON-able and small: kilobytes, not arrays. With several processes tuples come back
    as lists.

    Raises DistributedError where one has given nothing within `PATIENCE_SECONDS`.
    """
    if process_count() == 1:
        return [value]
    client = jax_distributed.global_state.client
    assert client is not None
    number = next(_rounds)
    folder = f"atommem_jax/notes/{number}"
    client.key_value_set(_note(number), json.dumps(value))
    try:
        client.wait_at_barrier(folder, PATIENCE_SECONDS * 1000)
        found = client.key_value_dir_get(f"{folder}/")
    except jax.errors.JaxRuntimeError as error:
        raise DistributedError(
            f"process {process_index()} waited for a note of every process, at most "
            f"{PATIENCE_SECONDS} s: {_first_line(error)}. Look for the first error in the output "
            "of the others"
        ) from error
    # All have come to this round, so all have read the one before.
    if number:
        client.key_value_delete(_note(number - 1))
    return [json.loads(text) for _, text in sorted(found)]


def _note(number: int) -> str:
    return f"atommem_jax/notes/{number}/{process_index():08d}"


def main_first(function: Callable[[], T]) -> T:
    """Calls `function` on process 0, then on the others, who find on disk what it made.

    Raises, on the others, the like of an error of process 0, with its message: ConfigError,
    StoreError, or for all else DistributedError. So all end with the same status, and either every
    supervisor starts its process again or none does.
    """
    outcome: list[T] = []
    problem: Exception | None = None
    if is_main():
        try:
            outcome.append(function())
        except Exception as error:
            problem = error
    failed = gather([_find_kind(problem), str(problem)] if problem else None)[0]
    if problem:
        raise problem
    if failed:
        kind, message = failed
        raise _KINDS[kind](f"process 0: {message}")
    return outcome[0] if outcome else function()


_KINDS: Mapping[str, type[Exception]] = {
    "passing": StoreError,
    "mistake": ConfigError,
    "other": DistributedError,
}


def _find_kind(error: Exception) -> str:
    return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "other")


@contextlib.contextmanager
def main_holds(enter: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Within it process 0 holds something for all, such as the lock of a folder.

    Errors as of `main_first`.
    """
    with contextlib.ExitStack() as stack:
        main_first(lambda: stack.enter_context(enter()) if is_main() else None)
        yield


# ---------------------------------------------------------------------------------------------
# Agreeing


def check_same(facts: Mapping[str, Any], advice: str) -> None:
    """Compares facts between all processes.

    Args:
      facts: {name: JSON-able value}.
      advice: what to do about a difference; the end of the message.

    Raises ConfigError, on every process, that names each fact which is not the same everywhere,
    its values, and the processes and hosts that have them.
    """
    reports = gather([socket.gethostname(), facts])
    names = [f"process {i} (host {host})" for i, (host, _) in enumerate(reports)]
    found = find_differences(names, [theirs for _, theirs in reports])
    check(not found, f"the processes differ: {'; '.join(found)}. {advice}")


def find_differences(names: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for every fact that processes disagree about, the odd ones by name.

    What most say is taken to be right; where as many say one thing as another, what the first
    says. Facts that a process lacks count as None.
    """
    sentences = []
    for fact in sorted({fact for theirs in facts for fact in theirs}):
        said: dict[str, list[str]] = collections.defaultdict(list)
        for name, theirs in zip(names, facts, strict=True):
            said[json.dumps(theirs.get(fact), sort_keys=True)].append(name)
        if len(said) == 1:
            continue
        usual = max(said, key=lambda value: len(said[value]))  # the first of equals
        odd = ", ".join(
            f"{value} on {', '.join(who)}" for value, who in said.items() if value != usual
        )
        many = len(said[usual])
        rest = said[usual][0] if many == 1 else f"{many} others"
        sentences.append(f"{fact} is {odd}, but {usual} on {rest}")
    return sentences


def describe_software(roots: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """{name: version} of Python and the packages that results depend on, and of our own code.

    The code is that of the Python files under each of `roots`, as a digest of their bytes.
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    for root in map(pathlib.Path, roots):
        digest = hashlib.sha256()
        for path in sorted(root.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
        found[f"code of {root.name}/"] = digest.hexdigest()[:16]
    return found


# ---------------------------------------------------------------------------------------------
# Stopping


def catch_preemption() -> None:
    """Makes SIGTERM a request to save and stop, which `preempted` tells; a second one kills.

    With several processes JAX listens for the signal, and a single one of them need receive it.
    """
    if process_count() > 1:
        return

    def note(*unused_signal: object) -> None:
        _asked_to_stop.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)


def preempted(step: int) -> bool:
    """Whether to save after this step and stop: the same answer on all processes.

    Call it once after every step, with its number. After a signal all processes go on to the
    first step that none of them has passed.
    """
    if process_count() > 1:
        # Until it is asked for the first time, JAX takes every process to be at step 0 and makes
        # them stop at step 1, which a run that goes on from a checkpoint has passed long ago.
        first = next(_steps_asked) == 0
        early = first and multihost_utils.reached_preemption_sync_point(1)
        return multihost_utils.reached_preemption_sync_point(step) or early
    return _asked_to_stop.is_set()


def leave(error: BaseException) -> None:
    """Ends this process at once after an error, if there are others; else returns.

    The usual way out waits for the others, who may be waiting for this process in a collective:
    they see a lost peer only when the connections to it break.
    """
    if process_count() == 1:
        return
    status: int | str | None = 1
    if isinstance(error, SystemExit):
        status = error.code
    elif isinstance(error, KeyboardInterrupt):
        status = 128 + signal.SIGINT
    else:
        traceback.print_exception(error)
    client = jax_distributed.global_state.client
    # What all of them refuse, all get to say: process 0 takes the coordinator with it.
    with contextlib.suppress(Exception):
        client.wait_at_barrier("atommem_jax/leave", _PARTING_SECONDS * 1000)  # type: ignore[union-attr]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def say(text: str) -> None:
    """Prints a line, on one process only, and not through a progress bar."""
    if is_main():
        tqdm.tqdm.write(text)
        sys.stdout.flush()
