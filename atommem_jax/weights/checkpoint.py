"""Checkpoints: everything a run needs to go on, written together or not at all.

A step holds the train state, the config, the tokenizer, the position in the data, the progress
counters and the metrics in one Orbax `Composite`. Orbax writes it under a temporary name and
renames it when it is whole, so an interrupted save leaves the previous steps as they were. The
last steps and the best ones are kept.

This is Orbax's first interface: its second lies under `orbax.checkpoint.experimental` in 0.12.8,
and its maintainers announce it as the main one for their version 1.0.
"""

import dataclasses
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from atommem_jax.config import paths
from atommem_jax.parallel import processes
from atommem_jax.weights import fingerprint
from atommem_jax.weights.records import decode, encode

PyTree = Any

_STATE, _CONFIG, _TOKENIZER, _DATA, _PROGRESS, _METRICS, _TREE = (
    "state",
    "config",
    "tokenizer",
    "data",
    "progress",
    "scores",  # Orbax reserves the name "metrics"
    "tree",
)
_LEAVES_SHOWN = 5
_CLOSE_SECONDS = 30  # that a save may still take when another process may be gone


class CheckpointError(ValueError):
    """A checkpoint is absent, unknown, or does not fit. The message names the next step."""


class CorruptCheckpointError(CheckpointError):
    """A step that is listed as complete cannot be read, or is not what was saved.

    Attributes:
      step: which.
      earlier: complete steps before it, ascending; they have not been read.
    """

    def __init__(self, directory: str, step: int, why: str, earlier: Sequence[int]):
        self.step, self.earlier = step, tuple(earlier)
        before = ", ".join(map(str, self.earlier))
        super().__init__(
            f"step {step} of {directory} is corrupt: {why}. "
            + (f"Complete steps before it: {before}" if before else "No step before it is complete")
        )


@dataclasses.dataclass(frozen=True)
class Restored:
    """One step as it was saved.

    `data_states` holds the data position of each process of the run that saved it, in the order
    of their index; `data_state` is the one that belongs to this process.
    """

    step: int
    state: PyTree
    config: ConfigDict  # locked
    tokenizer: bytes
    data_states: tuple[Any, ...]
    progress: dict[str, Any]
    metrics: dict[str, float]

    @property
    def data_state(self) -> Any:
        """Position of this process in the data.

        Raises CheckpointError if the number of processes has changed and their positions differed.
        """
        if len(self.data_states) == jax.process_count():
            return self.data_states[jax.process_index()]
        if all(state == self.data_states[0] for state in self.data_states):
            return self.data_states[0]
        raise CheckpointError(
            f"data_state: saved by {len(self.data_states)} processes at different positions, and "
            f"this run has {jax.process_count()}; start as many processes as before, or place the "
            f"iterator by the counters in `progress` ({', '.join(sorted(self.progress))})."
        )


class Checkpointer:
    """Saves and restores the steps of one run in `directory`. Use it as a context manager.

    Args:
      directory: a local path (made absolute) or a bucket (`gs://...`).
      keep_last: how many of the latest steps to keep, at least 1.
      keep_best: how many of the best steps to keep besides; needs `best_metric`.
      keep_steps: steps to keep always, such as the ends of stages.
      best_metric: name in `metrics`, higher is better. A step in which it is absent or NaN is
        never the best.
      read_only: neither creates the directory nor removes the leavings of interrupted saves. Use it
        to look into the directory of a run that may still be writing.

    Raises ValueError for counts out of range, and ConfigError where a bucket cannot be reached, or
    old steps could not be removed from it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        keep_steps: Sequence[int] = (),
        best_metric: str | None = None,
        read_only: bool = False,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(
                f"keep_last={keep_last}, keep_best={keep_best}: keep_last must be at least 1 and "
                "keep_best at least 0; a run that keeps no checkpoint cannot resume."
            )
        self.directory = paths.absolute(directory)
        self._best_metric = best_metric
        self._read_only = read_only
        self._manager: ocp.CheckpointManager | None = None
        with paths.reaching(self.directory, self.directory):
            if not read_only or paths.is_remote(directory) or os.path.isdir(self.directory):
                if not read_only:
                    _ask_for_bucket(self.directory)
                self._manager = ocp.CheckpointManager(
                    self.directory, options=self._make_options(keep_last, keep_best, keep_steps)
                )

    def _make_options(
        self, keep_last: int, keep_best: int, keep_steps: Sequence[int]
    ) -> ocp.CheckpointManagerOptions:
        if self._read_only:
            # Orbax's own read_only warns at every opening; `save` refuses here instead.
            return ocp.CheckpointManagerOptions(create=False, best_fn=self._rank)
        policies: list[Any] = [
            checkpoint_managers.LatestN(keep_last),
            checkpoint_managers.CustomSteps(list(keep_steps)),
        ]
        if self._best_metric is not None and keep_best > 0:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=self._rank, n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        return ocp.CheckpointManagerOptions(
            best_fn=self._rank,  # without it Orbax does not write the metrics
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )

    def _rank(self, metrics: Mapping[str, float] | None) -> float:
        """Orders steps from worst to best."""
        value = (metrics or {}).get(self._best_metric or "", math.nan)
        return -math.inf if math.isnan(value) else value

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        config: ConfigDict | Mapping[str, Any],
        tokenizer: bytes,
        data_state: Any,
        progress: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to write `step`; returns once `state` is copied and may be donated.

        Args:
          step: number of the step, greater than every saved one.
          state: pytree of arrays of any shape and sharding.
          config: JSON-able; tuples are kept as tuples.
          tokenizer: the tokenizer's own file.
          data_state: position of this process in the data, bytes or JSON-able.
          progress: counters, JSON-able.
          metrics: scalars by which steps are compared.

        Raises CheckpointError for a step that is not the newest, ValueError for a value that JSON
        cannot hold.
        """
        if self._manager is None or self._read_only:
            raise CheckpointError(
                f"cannot save step {step}: {self.directory} was opened with read_only=True; open "
                "it without."
            )
        latest = self._manager.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"step={step}: {self.directory} already holds step {latest}, and steps must grow; "
                f"resume from step {latest} or choose an empty directory."
            )
        scores = {name: float(value) for name, value in (metrics or {}).items()}
        data_states = processes.gather(encode(data_state, "data_state"))
        items = {
            _STATE: ocp.args.PyTreeSave(state),
            _CONFIG: ocp.args.JsonSave(encode(config, "config")),
            _TOKENIZER: ocp.args.JsonSave(encode({"file": tokenizer}, "tokenizer")),
            _DATA: ocp.args.JsonSave({"processes": data_states}),
            _PROGRESS: ocp.args.JsonSave(encode(progress, "progress")),
            _METRICS: ocp.args.JsonSave(scores),
            _TREE: ocp.args.JsonSave(fingerprint.describe_exactly(state)),
        }
        # The training loop forbids implicit transfers; this one is meant.
        with jax.transfer_guard("allow"):
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=scores, force=True)

    def restore(
        self, step: int | None = None, *, abstract_state: PyTree, partial: bool = False
    ) -> Restored:
        """Restores `step`, the latest by default, bit for bit.

        Args:
          step: a saved step.
          abstract_state: the tree to fill: `jax.ShapeDtypeStruct` leaves (from `jax.eval_shape`) or
            arrays. Each leaf is restored onto its `sharding`, whatever it was saved from; onto the
            first device where it has none.
          partial: `abstract_state` may be a part of what was saved, such as
            `{"params": abstract_params}` for evaluation.

        Raises CheckpointError where there is no such step, or where the tree, a shape or a dtype
        differs from what was saved, and CorruptCheckpointError where it is damaged; on all
        processes, whichever of them noticed. ConfigError where a bucket cannot be reached or
        refuses: whether the step is sound is then not known.
        """
        step = self._resolve(step)
        abstract_state = jax.tree.map(_place, abstract_state)
        items = self._restore_items(step, _TREE, _CONFIG, _TOKENIZER, _DATA, _PROGRESS, _METRICS)
        self._check_fit(
            step, fingerprint.find_differences(abstract_state, items[_TREE], partial=partial)
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        tree_args = ocp.args.PyTreeRestore(
            abstract_state, restore_args=restore_args, partial_restore=partial
        )
        with jax.transfer_guard("allow"):
            state = self._read(step, {_STATE: tree_args})[_STATE]
            changed = fingerprint.find_changed(items[_TREE], state)
        if changed:
            shown = ", ".join(changed[:_LEAVES_SHOWN])
            raise self._corrupt(step, f"other bits than were saved in {len(changed)}: {shown}")
        return Restored(
            step=step,
            state=state,
            config=ConfigDict(decode(items[_CONFIG])).lock(),
            tokenizer=decode(items[_TOKENIZER])["file"],
            data_states=tuple(decode(s) for s in items[_DATA]["processes"]),
            progress=decode(items[_PROGRESS]),
            metrics=items[_METRICS],
        )

    def restore_config(self, step: int | None = None) -> ConfigDict:
        """Returns the locked config of `step` (default: the latest); reads no arrays.

        Raises CheckpointError where there is no such step.
        """
        step = self._resolve(step)
        return ConfigDict(decode(self._restore_items(step, _CONFIG)[_CONFIG])).lock()

    def restore_tokenizer(self, step: int | None = None) -> bytes:
        """Returns the tokenizer's file of `step` (default: the latest); reads no arrays.

        Raises CheckpointError where there is no such step.
        """
        step = self._resolve(step)
        return decode(self._restore_items(step, _TOKENIZER)[_TOKENIZER])["file"]

    def latest_step(self) -> int | None:
        """Returns the newest complete step, or None."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step with the highest `best_metric` (ties: the newer), or None."""
        ranked = []
        for step in self.all_steps():
            rank = self._rank(self._restore_items(step, _METRICS)[_METRICS])
            if rank > -math.inf:
                ranked.append((rank, step))
        return max(ranked)[1] if ranked else None

    def all_steps(self) -> list[int]:
        """Returns the complete steps in ascending order, once a save under way is finished."""
        if self._manager is None:
            return []
        self.wait()
        with paths.reaching(self.directory, self.directory):
            if self._read_only:
                self._manager.reload()  # the run that writes here may have added or removed steps
            return sorted(self._manager.all_steps())

    def set_aside(self, step: int) -> str:
        """Renames a step, so that it counts no longer; returns its new name.

        Raises CheckpointError where there is no such step, or the directory is read-only.
        """
        step = self._resolve(step)
        if self._read_only:
            raise CheckpointError(
                f"cannot set step {step} aside: {self.directory} was opened with read_only=True; "
                "open it without."
            )
        folder = paths.locate(self.directory)
        name, number = f"{step}.corrupt", 1
        while (folder / name).exists():
            name, number = f"{step}.corrupt.{number}", number + 1
        processes.gather(name)  # all have looked
        if processes.is_main():
            (folder / str(step)).rename(folder / name)
        processes.gather(name)  # it is done
        self._get_manager().reload()
        return name

    def wait(self) -> None:
        """Blocks until the save under way is on disk; raises its error if it failed."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way and releases the threads."""
        if self._manager is not None:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, error: type[BaseException] | None, *unused: object) -> None:
        if error is None or processes.process_count() == 1:
            self.close()
            return
        # A save under way can end only with the others, and they may be what this error is about.
        closing = threading.Thread(target=self.close, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def _get_manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            raise CheckpointError(f"no checkpoint in {self.directory}: no such directory.")
        return self._manager

    def _resolve(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            found = _describe_folder(self.directory)
            raise CheckpointError(
                f"no complete checkpoint in {self.directory}, which {found}; pass the directory "
                "that a training run saved to (the one with numbered folders), or start a run "
                "there."
            )
        if step is None:
            return steps[-1]
        if step not in steps:
            raise CheckpointError(
                f"step={step}: {self.directory} holds steps {', '.join(map(str, steps))}; choose "
                "one of them, or None for the latest."
            )
        return step

    def _check_fit(self, step: int, differing: Sequence[str]) -> None:
        if not differing:
            return
        shown = "; ".join(differing[:_LEAVES_SHOWN])
        more = len(differing) - _LEAVES_SHOWN
        raise CheckpointError(
            f"abstract_state does not fit step {step} of {self.directory}, leaves that differ: "
            f"{shown}{f'; and {more} more' if more > 0 else ''}. Build the model from "
            "restore_config() of this directory, or choose another directory."
        )

    def _restore_items(self, step: int, *names: str) -> dict[str, Any]:
        return self._read(step, {name: ocp.args.JsonRestore() for name in names})

    def _read(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        """Some items of a complete step; what cannot be read is corrupt, for all processes."""
        found: dict[str, Any] = {}
        why, cause, trouble = "", None, ""
        try:
            restored = self._get_manager().restore(step, args=ocp.args.Composite(**items))
            found = dict(restored.items())
            absent = [name for name in items if found.get(name) is None]
            why = f"it has no {', '.join(absent)}" if absent else ""
        except Exception as error:  # Orbax, TensorStore and JSON each raise their own
            cause = error
            why = f"{', '.join(items)} cannot be read ({paths.describe(error)})"
            trouble = paths.find_trouble(self.directory, error)
        if why and not trouble:  # of a bucket that refuses, Orbax says that items are not there
            refused = paths.ask(self.directory)
            trouble = paths.find_trouble(self.directory, refused)
            why = f"{why} ({paths.describe(refused)})" if refused and trouble else why
        found_by_all = processes.gather((why, trouble))
        for reason, kind in found_by_all:
            if kind:
                raise paths.make_error(
                    kind,
                    self.directory,
                    f"step {step} of {self.directory}: {reason}, so that whether it is sound is "
                    "not known",
                ) from cause
        reasons = [reason for reason, _ in found_by_all if reason]
        if reasons:
            raise self._corrupt(step, reasons[0]) from cause
        return found

    def _corrupt(self, step: int, why: str) -> CorruptCheckpointError:
        earlier = [other for other in self.all_steps() if other < step]
        return CorruptCheckpointError(self.directory, step, why, earlier)


def _ask_for_bucket(directory: str) -> None:
    """Asks for what Orbax asks for before it removes a step, which is hours into a run.

    Raises ConfigError where it is refused.
    """
    if not directory.startswith("gs://"):
        return
    from google.cloud import storage  # comes with gcsfs; imported here: it takes a second

    try:
        storage.Client().get_bucket(paths.bucket_of(directory).removeprefix("gs://"))
    except Exception as error:  # of the client, the network or the rights
        raise paths.make_error(
            paths.find_trouble(directory, error) or paths.RIGHTS,
            directory,
            f"{directory}: old checkpoints could not be removed, because what kind of bucket it is "
            f"cannot be asked ({paths.describe(error)}). Whoever trains needs the role Storage "
            "Legacy Bucket Reader (roles/storage.legacyBucketReader) beside Storage Object User",
        ) from error


def _place(leaf: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding Orbax falls back to the devices of the run that saved, which may be gone.
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe_folder(directory: str) -> str:
    if not paths.is_folder(directory, directory):
        return "does not exist"
    with paths.reaching(directory, directory):
        names = sorted(path.name for path in paths.locate(directory).iterdir())
    if not names:
        return "is empty"
    return f"contains {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
