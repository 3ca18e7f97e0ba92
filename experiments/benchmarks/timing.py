"""Timing: contestants take turns in every round, and results are medians with their spread."""

import contextlib
import dataclasses
import gc
import importlib.metadata
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_PACKAGES = ("jax", "jaxlib", "numpy", "torch", "faiss-cpu", "transformers", "xllamacpp")

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One side of a comparison.

    Attributes:
      run: does the whole work and returns when it is done; its argument is what `prepare` made.
      prepare: makes what a run consumes, outside the timed part.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


def measure(
    contestants: Mapping[str, Contestant], *, runs: int, label: str = ""
) -> dict[str, list[float]]:
    """Seconds of `runs` runs of each, in rounds A B C C B A, after one run of each to warm up.

    So none always follows the same one, which may leave a core hot or memory in use.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    total = (runs + 1) * len(contestants)
    with (
        _without_old_garbage(),
        tqdm.tqdm(total=total, desc=label, leave=False, mininterval=1.0) as bar,
    ):
        for round_ in range(runs + 1):
            order = list(contestants.items())[:: -1 if round_ % 2 else 1]
            for name, contestant in order:
                bar.set_postfix_str(name)
                elapsed = time_once(contestant)
                if round_:
                    seconds[name].append(elapsed)
                bar.update()
    return seconds


@contextlib.contextmanager
def _without_old_garbage() -> Iterator[None]:
    """Spares contestants made of Python objects the search through all that was there before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def time_once(contestant: Contestant) -> float:
    """Seconds of one run, without its preparation."""
    prepared = contestant.prepare()
    time.sleep(0.02)  # threads of the contestant before may still spin for a few milliseconds
    started = time.perf_counter()
    contestant.run(prepared)
    return time.perf_counter() - started


def compare(ours: list[float], peer: list[float], *, work: float, unit: str) -> Result:
    """Throughputs and their ratio; above 1 ours is faster.

    Args:
      ours: seconds of each round.
      peer: seconds of the same rounds.
      work: units done in a run, the same for both; the result is in `unit`s a second.
      unit: plural noun.
    """
    rounds = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    our_median, peer_median = statistics.median(ours), statistics.median(peer)
    return {
        "unit": f"{unit} a second",
        "ours": work / our_median,
        "peer": work / peer_median,
        "ratio": peer_median / our_median,
        "ratio_min": min(rounds),
        "ratio_max": max(rounds),
        "runs": len(rounds),
        "ours_seconds": ours,
        "peer_seconds": peer,
    }


def failed(reason: str) -> Result:
    """The entry of a peer that could not run."""
    return {"ours": None, "peer": None, "ratio": None, "reason": reason}


def missing(error: ImportError) -> Result:
    """The entry of a peer whose library is not there."""
    return failed(f"{error}; install the peers with: pip install -e '.[bench]'")


def find_torch_setting(
    make: Callable[[int, int], Contestant], sizes: Sequence[int], label: str
) -> tuple[dict[str, int], dict[str, float]]:
    """Threads and batch size at which a PyTorch contestant is fastest, found one after the other.

    Args:
      make: (threads, batch size) -> contestant.
      sizes: to try; threads are chosen, of one and all cores, at the first of them.
      label: of the progress bar.

    Returns:
      {"threads", "batch"}, and the seconds of each setting tried.
    """
    tried: dict[str, float] = {}

    def attempt(threads: int, size: int) -> float:
        contestant = make(threads, size)
        time_once(contestant)  # warms up
        tried[f"{threads} threads, batch {size}"] = seconds = time_once(contestant)
        return seconds

    settings = [(threads, sizes[0]) for threads in sorted({1, count_cores()})]
    with tqdm.tqdm(total=len(settings) + len(sizes) - 1, desc=label, leave=False) as bar:
        results = {}
        for threads, size in settings:
            results[threads, size] = attempt(threads, size)
            bar.update()
        best = min(results, key=lambda setting: results[setting])[0]
        for size in sizes[1:]:
            results[best, size] = attempt(best, size)
            bar.update()
    threads, size = min(results, key=lambda setting: results[setting])
    return {"threads": threads, "batch": size}, tried


def with_torch_threads(contestant: Contestant, threads: int) -> Contestant:
    """The contestant, with that many threads for PyTorch whenever it runs."""
    import torch

    def prepare() -> Any:
        torch.set_num_threads(threads)
        return contestant.prepare()

    return Contestant(contestant.run, prepare)


class CompileClock:
    """Seconds that XLA spent on compiling, by name of what was compiled."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name: str | None = None
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration: float, **details: Any) -> None:
        del details
        if event == _COMPILE_EVENT and self._name is not None:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + duration

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Books what is compiled inside under `name`."""
        self._name, before = name, self._name
        try:
            yield
        finally:
            self._name = before


@contextlib.contextmanager
def one_core() -> Iterator[bool]:
    """Confines every thread of this process to one core; yields whether the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield False
        return
    allowed = os.sched_getaffinity(0)
    _confine({min(allowed)})
    try:
        yield True
    finally:
        _confine(allowed)


def _confine(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> Result:
    """Processor, versions and commit: what a figure is worth nothing without."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": _read_cpu_model(),
        "cores": count_cores(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "devices": f"{jax.device_count()} {jax.devices()[0].platform}",
        "commit": _read_commit(),
    }


def _read_cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _read_commit() -> str | None:
    """The commit of the checkout, with a plus where files differ from it; None without git."""
    root = pathlib.Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
