"""Plays long documents of a split with a loaded agent, and goes on where a killed one stood."""

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import IO, Any

import jax
import numpy as np
import tqdm

from atommem_jax import text_files
from atommem_jax.agent import play
from atommem_jax.agent.load import Loaded
from atommem_jax.config import check, paths
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.learning import evaluation, long_evaluation, reward
from atommem_jax.parallel import host_batches
from atommem_jax.tasks import batches as batches_lib
from atommem_jax.tasks import datasets, encoding, schema
from atommem_jax.tasks.batches import StreamBatch
from atommem_jax.types import Phase, Turns


def play_long(
    loaded: Loaded,
    dataset: datasets.Dataset,
    examples: Sequence[schema.Example],
    cell: Mapping[str, Any],
    *,
    label: str = "",
    out: pathlib.Path | None = None,
    name: str = "",
) -> tuple[list[evaluation.Record], dict[str, float]]:
    """Records and statistics of `examples`, played in segments of `eval.segment` turns.

    Args:
      loaded: the agent.
      dataset: that the split is of.
      examples: of the split, that are played.
      cell: `split`, `temperature` and `seed`, and all else that says of what a file is.
      label: before the name of the split, in the progress bar.
      out: folder of the file that says where the evaluation stands, which is removed at its end,
        and with `eval.records='full'` of the turns; None writes neither.
      name: of both, without an ending.

    Raises ConfigError for a workflow whose program looks back further than a segment.
    """
    config, tokenizer = loaded.parts.config, loaded.parts.tokenizer
    program = loaded.parts.workflow.program
    check(
        program is None or program.update_shown == 0,
        f"eval.segment={config.eval.segment}: the program of workflow={config.workflow!r} asks "
        "what a fact replaces, which may lie in another segment; set eval.segment=0",
    )
    shape = loaded.shape(dataset, cell["split"], config.eval.segment)
    size = _fit_batch(loaded, len(examples))
    cell = {**cell, "episodes": len(examples), "segment": shape.chunks, "batch": size}
    place = out / f"{name}.partial.json" if out is not None else None
    stood = _read_stand(place, cell)
    tokens = sum(encoding.count_tokens(example, tokenizer) for example in examples)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm.tqdm(
                desc=f"{label}{cell['split']}",
                total=tokens,
                initial=0 if stood is None else stood.evaluation.tokens,
                unit=" tokens",
                unit_scale=True,
                mininterval=1.0,
                leave=False,
            )
        )
        file = on_turns = None
        if out is not None and config.eval.records == "full":
            file = stack.enter_context(_open_turns(out / f"{name}.turns.jsonl", stood))
            on_turns = functools.partial(write_turns, file, tokenizer)
        found = long_evaluation.LongEvaluation(
            player=_Player(loaded, loaded.segment_player(shape), cell),
            decode=tokenizer.decode,
            mesh=loaded.mesh,
            metric=reward.find(config.task),
            eviction=loaded.parts.setting(shape).limits.memory.eviction,
            save=None if place is None else functools.partial(_save, place, cell, file),
            on_turns=on_turns,
            on_tokens=bar.update,
        ).run(
            batches_lib.stream_split(examples, tokenizer, shape, batch_size=size),
            stood.evaluation if stood else None,
        )
    if place is not None:
        place.unlink(missing_ok=True)
    return found


def _fit_batch(loaded: Loaded, episodes: int) -> int:
    """Documents that are played at a time: no more than there are, as far as devices allow."""
    most, devices = loaded.parts.config.eval.batch_size, loaded.mesh.size
    return min(most, -(-episodes // devices) * devices)


class _Player:
    """The agent, at one temperature and with one seed, as `long_evaluation` wants it."""

    def __init__(self, loaded: Loaded, player: play.SegmentPlayer, cell: Mapping[str, Any]):
        self._player, self._mesh, self._params = player, loaded.mesh, loaded.params
        self._key = host_batches.replicate(jax.random.key(cell["seed"]), loaded.mesh)
        self._heat = host_batches.replicate(np.float32(cell["temperature"]), loaded.mesh)
        self.turns = player.turns

    def start(self, episodes):
        return self._player.start(episodes)

    def play(self, env, episodes, ids, first_turn):
        turn = host_batches.replicate(np.int32(first_turn), self._mesh)
        return self._player.play(self._params, env, episodes, ids, self._key, self._heat, turn)


@dataclasses.dataclass(frozen=True)
class _Stand:
    """Where an evaluation stands, and the file that its turns are written to."""

    evaluation: long_evaluation.Saved
    turns_bytes: int  # of the file of turns, 0 without one; what follows is played again


def _open_turns(path: pathlib.Path, stood: _Stand | None) -> IO[str]:
    """The file of turns, cut to those before the last save: they are written once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    file.truncate(0 if stood is None else stood.turns_bytes)
    return file


def _save(
    place: pathlib.Path, cell: Mapping[str, Any], file: IO[str] | None, saved: long_evaluation.Saved
) -> None:
    stand = _Stand(saved, 0 if file is None else file.seek(0, io.SEEK_END))
    place.parent.mkdir(parents=True, exist_ok=True)
    paths.write_text(place, json.dumps({"of": cell, "stands": dataclasses.asdict(stand)}))


def _read_stand(place: pathlib.Path | None, cell: Mapping[str, Any]) -> _Stand | None:
    """Where an evaluation of the same stood; None where there was none."""
    if place is None or not place.exists():
        return None
    value = text_files.read_json(place, "state of an evaluation", _is_stand)
    if value is None or value["of"] != json.loads(json.dumps(cell)):
        return None
    stands = value["stands"]
    return _Stand(long_evaluation.Saved(**stands["evaluation"]), stands["turns_bytes"])


def _is_stand(value: Any) -> bool:
    stands: Any = value.get("stands") if isinstance(value, dict) else None
    return _has_fields(stands, _Stand) and _has_fields(stands["evaluation"], long_evaluation.Saved)


def _has_fields(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and set(value) == {f.name for f in dataclasses.fields(kind)}


def write_turns(
    file: IO[str], tokenizer: Tokenizer, batch: StreamBatch, real: int, turns: Turns
) -> None:
    """Writes a line of JSON for each turn of a segment: what was shown, and what was said."""

    def decode(row: np.ndarray) -> str:
        return tokenizer.decode(row[row != tokenizer.pad_id].tolist())

    for b in range(real):
        for t in np.flatnonzero(turns.live[b]):
            line = {
                "episode": int(batch.ids[b]),
                "phase": Phase(int(turns.phase[b, t])).name.lower(),
                "chunk": int(turns.chunk[b, t]),
                "question": int(turns.question[b, t]),
                "shown": [decode(np.asarray(entry)) for entry in turns.shown_entries[b, t]],
                "said": decode(np.asarray(turns.response[b, t])),
                "applied": turns.report.applied[b, t].tolist(),
            }
            file.write(json.dumps(line) + "\n")
    file.flush()
