"""Checks a machine before training: versions, devices, memory, a collective, the bucket, the lock.

    python tpu_setup/check_env.py --bucket=gs://my-bucket
    python tpu_setup/check_env.py --require_tpu --expect_devices=16 --bucket=gs://my-bucket

On a laptop it says what it finds, and which checks do not apply there; --checks=bucket tries what
a run does in a bucket, checkpoints included, and needs nothing else. On the workers of a TPU it
has to run on all of them at the same time, as setup_vm.sh does: they wait for each other. Several
processes elsewhere are told of each other by --coordinator_address, --num_processes, --process_id.

The status is 1 where something is wrong: what it is and what to do stands at the end.
"""

import contextlib
import dataclasses
import glob
import importlib.metadata
import logging as python_logging
import os
import pathlib
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from packaging.requirements import Requirement

CHECKS = ("versions", "lock", "devices", "hbm", "collective", "bucket")

ROOT = pathlib.Path(__file__).resolve().parent.parent
OK, WRONG, SKIPPED = "ok", "WRONG", "does not apply"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a check has found."""

    check: str
    state: str  # OK, WRONG or SKIPPED
    found: str
    next_step: str = ""  # where it is wrong


def define_flags() -> None:
    """Defines the flags. Not on import: train.py has some of the same names."""
    flags.DEFINE_list("checks", list(CHECKS), f"Which: some of {', '.join(CHECKS)}.")
    flags.DEFINE_bool("require_tpu", False, "Whether devices other than TPUs are wrong.")
    flags.DEFINE_integer(
        "expect_devices", 0, "How many there must be over all processes; 0 for any number.", 0
    )
    flags.DEFINE_string("bucket", "", "gs://NAME or a folder, to be written; '' for none.")
    flags.DEFINE_bool(
        "remove_stale_lock", False, "Remove libtpu's lock file if no process holds it."
    )
    flags.DEFINE_string("lock_file", "/tmp/libtpu_lockfile", "libtpu's lock file.")
    flags.DEFINE_string("coordinator_address", "", "host:port of process 0; on a TPU JAX finds it.")
    flags.DEFINE_integer("num_processes", 1, "Of --coordinator_address.", 1)
    flags.DEFINE_integer("process_id", 0, "Of --coordinator_address.", 0)
    flags.DEFINE_integer(
        "timeout", 300, "Seconds after which processes that do not answer are given up.", 1
    )


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    values = flags.FLAGS
    unknown = [name for name in values.checks if name not in CHECKS]
    if len(argv) > 1 or unknown:
        wrong = f"--checks={','.join(unknown)}" if unknown else f"arguments {list(argv[1:])}"
        print(f"check_env.py: {wrong}: allowed checks are {', '.join(CHECKS)}", file=sys.stderr)
        sys.exit(2)
    who, results = socket.gethostname(), []
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of a save
    python_logging.getLogger("gcsfs").setLevel(python_logging.CRITICAL)  # what it raises is told
    # A process that waits for another inside a compiled program cannot be interrupted otherwise.
    timer = threading.Timer(values.timeout, _give_up, [who, values.timeout])
    timer.daemon = True
    timer.start()
    for result in run_checks(values):
        results.append(result)
        print(f"{who}  {result.check:<10}  {result.state:<14}  {result.found}", flush=True)
    timer.cancel()
    wrong_ones = [result for result in results if result.state == WRONG]
    if wrong_ones:
        print(f"\n{who}: {len(wrong_ones)} wrong", file=sys.stderr)
        for number, result in enumerate(wrong_ones, start=1):
            print(f"{number}. {result.check}: {result.found}", file=sys.stderr)
            print(f"   next: {result.next_step}", file=sys.stderr)
        sys.exit(1)


def run_checks(values: flags.FlagValues) -> Iterator[Result]:
    """The results, in the order in which one failure explains the next."""
    chosen = values.checks
    if "versions" in chosen:
        yield check_versions(values.require_tpu)
    if "lock" in chosen:
        yield check_lock(pathlib.Path(values.lock_file), values.remove_stale_lock)
    on_devices: dict[str, Callable[[], Result]] = {
        "devices": lambda: check_devices(values.require_tpu, values.expect_devices),
        "hbm": check_hbm,
        "collective": check_collective,
    }
    due = [name for name in on_devices if name in chosen]
    if due:
        problem = connect(values)
        if problem:
            yield problem
        for name in due:
            yield (
                Result(name, SKIPPED, "there are no devices")
                if problem
                else _guard(name, on_devices[name])
            )
    if "bucket" in chosen:
        if not due:  # by itself it needs no TPU, which would have to wait for all workers
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        yield check_bucket(values.bucket, with_checkpoint=not (due and problem))


def _guard(name: str, check: Callable[[], Result]) -> Result:
    try:
        return check()
    except Exception as error:  # whatever the runtime raises is a finding, not a traceback
        return Result(
            name,
            WRONG,
            _first_line(error),
            "look for another process on the TPU (--checks=lock), and whether all workers ran "
            "this at the same time; then create the TPU anew",
        )


def _give_up(who: str, seconds: int) -> None:
    print(
        f"{who}: no answer from the devices or the other processes after --timeout="
        f"{seconds} s\n   next: run this on all workers at the same time "
        "(tpu_setup/setup_vm.sh does), look for a worker that is down, or raise --timeout",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# ---------------------------------------------------------------------------------------------
# Software


def check_versions(require_tpu: bool) -> Result:
    """The installed packages against what requirements.txt and the installed JAX allow.

    Other versions than those that the tests run with (constraints.txt) are right, and remarked.
    """
    with_tpu = require_tpu or bool(find_version("libtpu"))
    needed = [("allowed", each) for each in read_requirements()]
    needed += [("needed by jax", each) for each in requirements_of_jax(with_tpu)]
    wrong = [
        f"{each.name} {find_version(each.name) or 'is missing'} "
        f"({whose}: {each.specifier or 'any'})"
        for whose, each in needed
        if not _fits(each)
    ]
    if wrong:
        return Result(
            "versions", WRONG, "; ".join(wrong), "tpu_setup/setup_vm.sh, or pip install -e '.[tpu]'"
        )
    python = ".".join(map(str, sys.version_info[:3]))
    libtpu = find_version("libtpu") or "none"
    found = f"Python {python}, jax {find_version('jax')}, libtpu {libtpu}"
    others = [
        f"{name} {find_version(name)} (pinned: {pin})"
        for name, pin in read_pins().items()
        if find_version(name) != pin
    ]
    if not others:
        return Result("versions", OK, f"{found}, and all that is pinned")
    remark = f"all that is there is allowed; the tests run with other versions: {', '.join(others)}"
    return Result("versions", OK, f"{found}; {remark}")


def read_requirements() -> list[Requirement]:
    """What the library needs: the lines of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def requirements_of_jax(with_tpu: bool) -> list[Requirement]:
    """What the installed JAX asks for, jaxlib and libtpu among it; nothing where there is none."""
    try:
        lines = importlib.metadata.requires("jax") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    extra = {"extra": "tpu" if with_tpu else ""}
    needed = map(Requirement, lines)
    return [each for each in needed if each.marker is None or each.marker.evaluate(extra)]


def _fits(needed: Requirement) -> bool:
    found = find_version(needed.name)
    return bool(found) and needed.specifier.contains(found, prereleases=True)


def read_pins() -> dict[str, str]:
    """{package: version} of constraints.txt, of what the library needs (requirements.txt)."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    names = {each.name for each in read_requirements()} | {"jaxlib"}
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;#]+)", pins, re.MULTILINE)
    return {name: pin for name, pin in found if name in names}


def find_version(name: str) -> str:
    """The installed version of a package; '' where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---------------------------------------------------------------------------------------------
# The lock of libtpu


def check_lock(path: pathlib.Path, remove: bool, locks: str = "/proc/locks") -> Result:
    """Whether a process holds the TPU, or one that ended has left its lock file behind.

    Args:
      path: the lock file.
      remove: whether a file that nobody holds is removed.
      locks: the kernel's list of locks.
    """
    if not path.exists():
        return Result("lock", OK, "no process holds a TPU")
    holders = find_holders(path, locks)
    if holders is None:
        return Result("lock", SKIPPED, f"{path} exists; who holds it is known on Linux alone")
    if holders:
        return Result(
            "lock",
            WRONG,
            f"{path} is held by process {', '.join(map(str, holders))}",
            "tpu_setup/stop.sh ends the runs on this TPU; a process of someone else is theirs to "
            f"end (ps -o user,pid,args -p {holders[0]})",
        )
    if remove:
        try:
            path.unlink()
        except OSError as error:
            return Result(
                "lock", WRONG, f"{path} is stale: {_first_line(error)}", f"sudo rm {path}"
            )
        return Result("lock", OK, f"{path} was stale, and is removed")
    if not os.access(path, os.W_OK):
        return Result(
            "lock", WRONG, f"{path} is stale, and belongs to another user", f"sudo rm {path}"
        )
    return Result("lock", OK, f"{path} is there, and no process holds it")


def find_holders(path: pathlib.Path, locks: str) -> list[int] | None:
    """Processes with a lock on the file; None where the system has no list of locks."""
    try:
        lines = pathlib.Path(locks).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    inode = path.stat().st_ino
    # A line reads `1: FLOCK  ADVISORY  WRITE 4242 08:01:131075 0 EOF`; one that waits has an arrow.
    rows = [line.split() for line in lines if "->" not in line]
    return sorted({int(row[4]) for row in rows if int(row[5].rpartition(":")[2]) == inode})


# ---------------------------------------------------------------------------------------------
# Devices


def connect(values: flags.FlagValues) -> Result | None:
    """Makes all processes one; returns what hinders it."""
    try:
        import jax

        if values.coordinator_address:
            jax.distributed.initialize(
                values.coordinator_address,
                values.num_processes,
                values.process_id,
                initialization_timeout=values.timeout,
            )
        elif has_tpu() and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
            jax.distributed.initialize(initialization_timeout=values.timeout)
        jax.devices()
    except Exception as error:  # a missing JAX, libtpu that cannot start, workers that are absent
        return Result(
            "connect",
            WRONG,
            _first_line(error),
            "mend the versions first; then --checks=lock; and run this on all workers at the same "
            "time, as tpu_setup/setup_vm.sh does",
        )
    return None


def has_tpu() -> bool:
    """Whether this machine has TPU chips, whatever JAX makes of them."""
    on_cloud = "TPU_WORKER_HOSTNAMES" in os.environ or find_version("libtpu") != ""
    return bool(on_cloud and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


def check_devices(require_tpu: bool, expected: int) -> Result:
    """Their kind and their number, over all processes."""
    import jax

    first = jax.devices()[0]
    found = (
        f"{jax.device_count()} x {first.device_kind} ({first.platform}), "
        f"{jax.local_device_count()} of them here; process {jax.process_index()} of "
        f"{jax.process_count()}"
    )
    if first.platform != "tpu" and (require_tpu or has_tpu()):
        return Result(
            "devices",
            WRONG,
            f"{found}; TPUs are needed",
            "pip install -e '.[tpu]', unset JAX_PLATFORMS, and see --checks=lock: a TPU that "
            "another process holds cannot be seen",
        )
    if expected and jax.device_count() != expected:
        return Result(
            "devices",
            WRONG,
            f"{found}; expected: {expected}",
            "compare ACCELERATOR_TYPE and SLICES in tpu_setup/env.sh with the TPU "
            "(tpu_setup/status.sh), and run this on all workers at the same time",
        )
    return Result("devices", OK, found)


def check_hbm() -> Result:
    """Whether the memory of the devices of this process is free."""
    import jax

    stats = [device.memory_stats() for device in jax.local_devices()]
    stats = [one for one in stats if one and "bytes_limit" in one]
    if not stats:
        return Result(
            "hbm", SKIPPED, f"{jax.default_backend()} devices have no memory of their own"
        )
    least = min(one["bytes_limit"] for one in stats)
    used = max(one.get("bytes_in_use", 0) for one in stats)
    found = f"{least / 2**30:.2f} GiB a device, {used / 2**20:.0f} MiB in use"
    if used > 0.05 * least:
        return Result("hbm", WRONG, found, "another process is on the TPU: tpu_setup/stop.sh")
    return Result("hbm", OK, found)


def check_collective() -> Result:
    """A sum over all devices of all processes, whose result is known."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    count = jax.device_count()
    mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
    numbers = np.arange(1, count + 1, dtype=np.int32)
    split = NamedSharding(mesh, PartitionSpec("all"))
    array = jax.make_array_from_callback((count,), split, lambda index: numbers[index])
    total: Any = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    result = int(total(array))
    started = time.perf_counter()
    total(array).block_until_ready()
    milliseconds = 1000 * (time.perf_counter() - started)
    if result != numbers.sum():
        return Result(
            "collective",
            WRONG,
            f"the sum over {count} devices is {result}, and should be {numbers.sum()}",
            "a chip or a link is broken: delete the TPU and create it anew",
        )
    return Result("collective", OK, f"a sum over {count} devices took {milliseconds:.1f} ms")


# ---------------------------------------------------------------------------------------------
# The bucket


def check_bucket(bucket: str, with_checkpoint: bool = True) -> Result:
    """What a run does there: a file written, listed, read and removed; two checkpoints.

    Args:
      bucket: gs://NAME or a folder; '' for none.
      with_checkpoint: whether checkpoints are tried too. Processes that are connected write them
        together, so all of them have to run this.
    """
    if not bucket:
        return Result("bucket", SKIPPED, "no --bucket was named")
    did = "written"
    try:
        content = uuid.uuid4().hex
        from atommem_jax.config import paths

        path = paths.locate(bucket) / "check_env" / f"{socket.gethostname()}-{content}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        did = "listed"
        names = [other.name for other in path.parent.iterdir()]
        did = "read"
        read = path.read_text()
        did = "cleared: a file cannot be removed"
        path.unlink()
        if read != content or path.name not in names or path.exists():
            return Result(
                "bucket", WRONG, f"{bucket} gave back something else", "look at what writes to it"
            )
        if not with_checkpoint:
            return Result("bucket", OK, f"{bucket} can be written, listed and read")
        did = "used for checkpoints"
        problem = _try_checkpoints(bucket)
    except Exception as error:  # of the client, the network or the rights
        return Result(
            "bucket",
            WRONG,
            f"{bucket} cannot be {did}: {_first_line(error)}",
            "is there such a bucket (gcloud storage ls)? Has the account of the VM or node the "
            "roles Storage Object User and Storage Legacy Bucket Reader on it (docs/tpu.md), and "
            "the scope cloud-platform? On a laptop: gcloud auth application-default login; is "
            "gcsfs installed (pip install -e '.[tpu]')?",
        )
    if problem:
        return Result("bucket", WRONG, f"{bucket}: {problem}", "look at what writes to it")
    return Result("bucket", OK, f"{bucket} holds files and checkpoints")


def _try_checkpoints(bucket: str) -> str:
    """Two steps saved by Orbax, the first removed, the second restored; says what is wrong."""
    import jax
    import numpy as np
    from etils import epath

    from atommem_jax.config import paths
    from atommem_jax.parallel import processes
    from atommem_jax.weights.checkpoint import Checkpointer

    folder = f"{paths.absolute(bucket)}/check_env/{processes.gather(uuid.uuid4().hex)[0]}"
    state = {"a": np.arange(1 << 12, dtype=np.float32), "b": np.ones((3, 5), np.int32)}
    rest: dict[str, Any] = {"config": {"x": 1}, "tokenizer": b"check_env", "data_state": 0}
    try:
        with Checkpointer(folder, keep_last=1, keep_best=0) as checkpointer:
            for step in (1, 2):
                checkpointer.save(step, state, progress={"step": step}, **rest)
                checkpointer.wait()
            left = checkpointer.all_steps()
            found = checkpointer.restore(abstract_state=state)
        processes.gather("read")  # by all, before it is removed
    finally:
        if processes.is_main():
            with contextlib.suppress(Exception):
                epath.Path(folder).rmtree()
    if left != [2]:
        return f"of two checkpoints {left} are left, and should be [2]"
    same = jax.tree.map(lambda x, y: bool((np.asarray(y) == x).all()), state, found.state)
    return "" if all(jax.tree.leaves(same)) else "a checkpoint came back with other numbers"


if __name__ == "__main__":
    define_flags()
    app.run(main)
