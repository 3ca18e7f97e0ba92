"""Plays a split of a data set with a loaded agent, and keeps its records and their summary."""

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from atommem_jax import text_files
from atommem_jax.agent import build, long_score, results, validate
from atommem_jax.agent.load import Loaded, find_split
from atommem_jax.config import ConfigError, check, paths
from atommem_jax.learning import evaluation, life_cycle, reward
from atommem_jax.parallel import host_batches
from atommem_jax.tasks import batches as batches_lib
from atommem_jax.tasks import datasets, encoding, schema


class UnwrittenError(ConfigError):
    """What was played could not be written; `summary` is what came of it."""

    def __init__(self, out: pathlib.Path, summary: dict[str, Any], error: BaseException):
        """`error` is why."""
        why = getattr(error, "strerror", None) or error
        super().__init__(f"--out={out}: the results could not be written ({why}); pass another")
        self.summary = summary


def evaluate_split(
    loaded: Loaded,
    dataset: datasets.Dataset,
    split: str,
    *,
    temperature: float = 0.0,
    episodes: int = 0,
    seed: int = 0,
    out: pathlib.Path | None = None,
    label: str = "",
    skip_existing: bool = False,
) -> dict[str, Any]:
    """Plays a split once and returns its summary; with `out` it also writes both files.

    With `skip_existing` a summary that is in `out` already is returned instead, if it is of the
    same split, temperature, step, seed, settings and number of episodes. With `eval.segment`
    episodes are played in segments, and a killed evaluation goes on where it stood.

    Raises ConfigError for an unknown split, and where nothing can be written to `out`; and
    UnwrittenError where that turns out when all is played.
    """
    if out is not None:
        paths.try_folder(out, f"--out={out}")
    config, workflow = loaded.parts.config, loaded.parts.workflow
    examples = find_split(dataset, split)
    examples = examples[:episodes] if episodes else examples
    name = results.name_files(split, temperature, loaded.step, loaded.settings)
    cell: dict[str, Any] = {
        "split": split,
        "temperature": temperature,
        "seed": seed,
        "step": loaded.step,
    }
    if loaded.settings:
        cell["settings"] = loaded.settings
    if skip_existing and out is not None:
        found = _read_summary(out / f"{name}.json", cell | {"episodes": len(examples)})
        if found is not None:
            return found
    if workflow.program is not None and not workflow.writes_nothing:
        validate.validate_script(config, loaded.parts, loaded.shape(dataset, split), examples)
    check(
        not (workflow.is_untrained and config.eval.segment),
        f"eval.segment={config.eval.segment}: allowed is 0 with workflow={config.workflow!r}, "
        "which holds the document at once, or takes its turns in pairs",
    )
    clock = _Clock()
    if loaded.parts.config.eval.segment:
        records, statistics = long_score.play_long(
            loaded, dataset, examples, cell, label=label, out=out, name=name
        )
    else:
        shape = loaded.shape(dataset, split)
        records, statistics = _play_whole(loaded, shape, examples, cell, f"{label}{split}")
    summary: dict[str, Any] = evaluation.summarise(records)
    categories = build.category_names(loaded.parts.config)
    summary |= cell | {
        "workflow": config.workflow,
        "statistics": statistics,
        "seconds": clock.seconds() / len(examples),
        "categories": evaluation.category_rates(records, categories),
        "stages": life_cycle.count_stages(records),
        "drift": life_cycle.average_drift(records),
    }
    if out is not None:
        try:
            _write(out, name, records, summary)
        except (OSError, ConfigError) as error:
            raise UnwrittenError(out, summary, error) from error
    return summary


class _Clock:
    """Seconds since it was made, compilation aside; it may be asked once."""

    def __init__(self):
        self._start, self._compiling = time.perf_counter(), 0.0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self._compiling += duration_secs

    def seconds(self) -> float:
        jax.monitoring.unregister_event_duration_listener(self._note)
        return max(0.0, time.perf_counter() - self._start - self._compiling)


def _play_whole(
    loaded: Loaded,
    shape: encoding.EpisodeShape,
    examples: Sequence[schema.Example],
    cell: Mapping[str, Any],
    label: str,
) -> tuple[list[evaluation.Record], dict[str, float]]:
    """Records and statistics of episodes, each of which is one program."""
    tokenizer, mesh = loaded.parts.tokenizer, loaded.mesh
    size = loaded.parts.config.eval.batch_size
    play, limits = loaded.player(shape), loaded.parts.setting(shape).limits
    key = host_batches.replicate(jax.random.key(cell["seed"]), mesh)
    heat = host_batches.replicate(np.float32(cell["temperature"]), mesh)
    batches = batches_lib.iterate_split(examples, tokenizer, shape, batch_size=size)
    total = -(-len(examples) // size)
    return evaluation.evaluate(
        lambda e, ids: play(loaded.params, e, ids, key, heat),
        tqdm.tqdm(batches, desc=label, total=total, leave=False, mininterval=1.0),
        tokenizer.decode,
        mesh=mesh,
        metric=reward.find(loaded.parts.config.task),
        # What was not read turn by turn has no way through them.
        eviction="" if limits.reads_nothing else limits.memory.eviction,
    )


def _read_summary(path: pathlib.Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """The summary in a file, unless there is none or it is of something else."""
    summary = read_summary(path) if path.exists() else None
    if summary is None:
        return None
    same = all(summary.get(field) == value for field, value in expected.items())
    return summary if same else None


def read_summary(path: pathlib.Path) -> dict[str, Any] | None:
    """What `evaluate_split` wrote; None, with a warning, for a torn file or one of another kind."""
    return text_files.read_json(path, "summary of evaluate.py", _is_summary)


def _is_summary(value: Any) -> bool:
    numbers = ("step", "temperature", "em", "ci_low", "ci_high", "episodes")
    return (
        isinstance(value, dict)
        and isinstance(value.get("split"), str)
        and all(isinstance(value.get(name), (int, float)) for name in numbers)
    )


def _write(out: pathlib.Path, name: str, records: list, summary: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    paths.write_text(out / f"{name}.jsonl", lines)
    # Last: a summary that is there says that its records are too.
    paths.write_text(out / f"{name}.json", json.dumps(summary, indent=2) + "\n")
