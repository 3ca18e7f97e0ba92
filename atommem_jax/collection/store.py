"""Trajectories of a teacher on disk: written one by one, checked, and read as SFT batches.

A folder holds

* `collection.json`: what was collected with. `setting` is what prompts and parsing follow from;
  training checks that it has the same. `source` is where the trajectories come from.
* `episodes.jsonl`: a line for each finished trajectory, with its turns in token ids.
* `failures.jsonl`: a line for each trajectory that could not be finished, and its cost.
* `summary.json`.

A line is appended when its trajectory is over. A kill can tear the last one, which is dropped.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from atommem_jax import folder_lock
from atommem_jax.agent import build
from atommem_jax.config import ConfigError, check, flatten
from atommem_jax.language.grammar import Grammar
from atommem_jax.learning import environment
from atommem_jax.parallel import processes
from atommem_jax.tasks import batches as batches_lib
from atommem_jax.types import Trajectory, Turns

ABOUT, EPISODES, FAILURES, SUMMARY = (
    "collection.json",
    "episodes.jsonl",
    "failures.jsonl",
    "summary.json",
)

Record = dict[str, Any]
Key = tuple[int, int]  # example, sample

_ROLLOUT_FIELDS = (
    "max_actions",
    "response_length",
    "answer_length",
    "read_budget",
    "answer_read_budget",
)


def describe_setting(parts: build.Parts) -> dict[str, Any]:
    """{field: value} of all that the prompts and the parsing of a trajectory follow from."""
    config = parts.config
    pieces = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(parts.agent.template)):
        pieces.update(f"{leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes())
    fields = {
        "tokenizer": hashlib.sha256(parts.tokenizer.to_bytes()).hexdigest()[:16],
        "workflow": config.workflow,
        "prompt": config.prompt,
        "prompt's template": pieces.hexdigest()[:16],
        **flatten(config.protocol, "protocol."),
        **flatten(config.memory, "memory."),
        **{f"rollout.{name}": getattr(config.rollout, name) for name in _ROLLOUT_FIELDS},
    }
    return json.loads(json.dumps(fields))


def digest(setting: Mapping[str, Any]) -> str:
    """The mark of a setting in every line."""
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]


def find_learnable(
    grammar: Grammar,
    constrained: bool,
    turns: Sequence[Mapping[str, Any]],
    max_turns: int,
    response_length: int,
) -> Bool[np.ndarray, " turns"]:
    """Which turns can be learned from.

    Not those that were cut: they end where the teacher did not end them. Nor, where masks constrain
    the agent, those that it could not write: they have no probability.
    """
    whole = np.array([not turn["cut"] for turn in turns], bool)
    if not constrained:
        return whole
    tokens = np.full((max_turns, response_length), grammar.pad_id, np.int32)
    phases, lengths = np.zeros((2, max_turns), np.int32)
    for t, turn in enumerate(turns):
        tokens[t, : len(turn["response"])] = turn["response"]
        phases[t], lengths[t] = turn["phase"], len(turn["response"])
    return whole & np.asarray(_admit(grammar, phases, tokens, lengths))[: len(turns)]


@jax.jit
def _admit(grammar: Grammar, phases, tokens, lengths):
    return jax.vmap(grammar.admits)(*map(jnp.asarray, (phases, tokens, lengths)))


# ---------------------------------------------------------------------------------------------
# Writing


class Writer:
    """Appends to a folder, and knows what is there already. Use it as a context manager.

    Args:
      folder: made where it does not exist.
      setting: of `describe_setting`.
      source: where the trajectories come from, JSON-able.

    Raises ConfigError where the folder holds another collection, or is being written to.
    """

    def __init__(self, folder: pathlib.Path, setting: Mapping[str, Any], source: Mapping[str, Any]):
        self.folder, self.fingerprint = folder, digest(setting)
        with contextlib.ExitStack() as stack:
            stack.enter_context(folder_lock.hold(folder, f"--out={folder}"))
            self._open(setting, source)
            self._held = stack.pop_all()

    def _open(self, setting: Mapping[str, Any], source: Mapping[str, Any]) -> None:
        """Compares what is there with what is to come, and opens the files."""
        folder = self.folder
        about = json.loads(json.dumps({"setting": dict(setting), "source": dict(source)}))
        if (folder / ABOUT).exists():
            found = _read_about(folder)
            changed = [
                line
                for part in ("setting", "source")
                for line in _compare(about[part], found[part])
            ]
            check(
                not changed,
                f"--out={folder} holds another collection: {'; '.join(changed)}. Pass the same "
                "flags to go on with it, or another folder",
            )
        else:
            write_json(folder / ABOUT, about)
        for name in (EPISODES, FAILURES):
            _drop_torn_line(folder / name)
        self._files = {name: (folder / name).open("ab") for name in (EPISODES, FAILURES)}

    def append(self, name: str, record: Record) -> None:
        """Adds a line to `EPISODES` or `FAILURES`; a kill loses no line that was added."""
        line = json.dumps({"fingerprint": self.fingerprint, **record}, allow_nan=False)
        self._files[name].write(line.encode() + b"\n")
        self._files[name].flush()

    def read(self, name: str) -> Iterator[Record]:
        """What the file holds. Raises ConfigError for a line that is not of this collection."""
        return (record for *_, record in _read_lines(self.folder / name, self.fingerprint))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *unused_error: object) -> None:
        for file in self._files.values():
            file.close()
        self._held.close()


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the whole file or none of it."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def _drop_torn_line(path: pathlib.Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def _read_about(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return {part: dict(about[part]) for part in ("setting", "source")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error!r}); pass a folder that experiments/collect.py wrote"
        ) from error


def _compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The fields that differ, with both values."""
    return [
        f"{name}={ours.get(name)!r} (collected with {theirs.get(name)!r})"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def _read_lines(path: pathlib.Path, fingerprint: str) -> Iterator[tuple[int, bytes, Record]]:
    """(offset, line, record) of every whole line."""
    if not path.exists():
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                found = record["fingerprint"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}, line {number} is no record ({error!r}); remove the line"
                ) from error
            check(
                found == fingerprint,
                f"{path}, line {number} has fingerprint={found!r}; allowed is {fingerprint!r}, "
                f"that of {ABOUT}. Remove the line, or collect into another folder",
            )
            yield offset, line, record
            offset += len(line)


# ---------------------------------------------------------------------------------------------
# Reading


class Lessons(NamedTuple):
    """A batch to learn from; NumPy leaves, each with a leading B.

    Of the trajectories there is what SFT reads: ids and turns. `scripted` marks turns that cannot
    be learned from, see `find_learnable`.
    """

    trajectories: Trajectory
    rewards: Float[np.ndarray, " B"]  # questions answered right
    counts: Float[np.ndarray, " B"]  # questions


class Collection:
    """The trajectories of a folder whose reward is at least `min_reward`.

    Lines are read when they are needed; only where they stand is kept in memory. With several
    processes all of them make it.

    Args:
      folder: that `Writer` wrote.
      parts: of the agent that is to learn.
      setting: of its episodes, with the widths of the batches.
      min_reward: in [0, 1].

    Raises ConfigError for a folder that is none, was collected with another setting (naming the
    fields), has nothing to learn from, or holds a trajectory wider than `setting`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        parts: build.Parts,
        setting: environment.Setting,
        min_reward: float,
    ):
        self._path = pathlib.Path(folder) / EPISODES
        self._limits, self._pad_id = setting.limits, setting.pad_id
        self._width = parts.config.rollout.response_length
        ours = describe_setting(parts)
        changed = _compare(ours, _read_about(self._path.parent)["setting"])
        check(
            not changed,
            f"sft.data={folder} was collected for another agent: {'; '.join(changed)}. Pass the "
            "config and the --data_root that it was collected with, or collect anew",
        )
        self._offsets: list[int] = []
        self._learnable: list[Bool[np.ndarray, " turns"]] = []
        content = hashlib.sha256()
        self.seen = 0
        for offset, line, record in _read_lines(self._path, digest(ours)):
            self.seen += 1
            content.update(line)
            if record["reward"] >= min_reward:
                self._check_fits(record)
                self._offsets.append(offset)
                self._learnable.append(
                    find_learnable(
                        setting.grammar,
                        parts.config.rollout.constrained,
                        record["turns"],
                        self._limits.max_turns,
                        self._width,
                    )
                )
        self._content = content.hexdigest()[:16]
        check(
            any(turns.any() for turns in self._learnable),
            f"sft.data={folder}: of {self.seen} trajectories {len(self)} have a reward of "
            f"sft.min_reward={min_reward} or more, and none of those a turn that can be learned; "
            "collect more, or lower sft.min_reward",
        )
        processes.check_same(
            {"sft.data": self._content}, "Let all processes see the same folder at sft.data"
        )

    def __len__(self) -> int:
        return len(self._offsets)

    def __str__(self) -> str:
        turns = sum(map(len, self._learnable))
        learned = sum(int(each.sum()) for each in self._learnable)
        return (
            f"{len(self)} of {self.seen} trajectories of {self._path.parent} kept; "
            f"{learned} of their {turns} turns can be learned"
        )

    def _check_fits(self, record: Record) -> None:
        turns = record["turns"]
        for name, size, cap in (
            ("turns", len(turns), self._limits.max_turns),
            ("tokens in a prompt", _longest(turns, "prompt"), self._limits.prompt_width),
            ("tokens in a response", _longest(turns, "response"), self._width),
        ):
            check(
                size <= cap,
                f"{self._path}: example {record['example']} has {size} {name}; the episodes that "
                f"this run trains on have at most {cap}. Collect on the split and the task that "
                "are trained on",
            )

    def stack(self, indices: Int[np.ndarray, " B"] | Sequence[int]) -> Lessons:
        """The trajectories of these numbers, in their order."""
        records = []
        with self._path.open("rb") as file:
            for index in indices:
                file.seek(self._offsets[index])
                records.append(json.loads(file.readline()))
        rows = [self._pad(r, self._learnable[i]) for r, i in zip(records, indices, strict=True)]
        turns = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        unread: dict[str, Any] = dict.fromkeys(
            ("answers", "answer_lengths", "answer_log_prob", "memory")
        )
        return Lessons(
            trajectories=Trajectory(id=np.asarray(indices, np.int32), turns=turns, **unread),
            rewards=np.array([sum(r["em"]) for r in records], np.float32),
            counts=np.array([len(r["em"]) for r in records], np.float32),
        )

    def _pad(self, record: Record, learnable: Bool[np.ndarray, " turns"]) -> Turns:
        size, width, limit = self._limits.max_turns, self._limits.prompt_width, self._width
        turns = record["turns"]
        counters = {name: np.zeros(size, np.int32) for name in ("phase", "chunk", "question")}
        prompt = np.full((size, width), self._pad_id, np.int32)
        response = np.full((size, limit), self._pad_id, np.int32)
        prompt_lengths, response_lengths = np.zeros((2, size), np.int32)
        for t, turn in enumerate(turns):
            for name, column in counters.items():
                column[t] = turn[name]
            prompt_lengths[t], response_lengths[t] = len(turn["prompt"]), len(turn["response"])
            prompt[t, width - len(turn["prompt"]) :] = turn["prompt"]
            response[t, : len(turn["response"])] = turn["response"]
        unread: dict[str, Any] = dict.fromkeys(
            ("actions", "report", "shown", "shown_entries", "shown_scores", "occupancy")
        )
        return Turns(
            live=np.arange(size) < len(turns),
            prompt=prompt,
            prompt_lengths=prompt_lengths,
            response=response,
            response_lengths=response_lengths,
            log_probs=np.zeros((size, limit), np.float32),
            values=np.zeros(size, np.float32),
            scripted=np.pad(~learnable, (0, size - len(turns))),
            passes=np.zeros(size, np.int32),
            lanes=np.zeros(size, np.int32),
            width=np.zeros(size, np.int32),
            **counters,
            **unread,
        )

    def batches(
        self, *, batch_size: int, seed: int, rows: Int[np.ndarray, " rows"]
    ) -> "LessonIterator":
        """A resumable stream of `Lessons`; batch k depends on (data, seed, batch_size, k) alone.

        rows: those of each batch that this process holds, as of `host_batches.process_rows`.
        """
        stream = batches_lib.shuffled(
            self.stack, len(self), batch_size=batch_size, seed=seed, rows=rows
        )
        return LessonIterator(stream, self._content, str(self._path.parent))


class LessonIterator:
    """`Lessons`, one batch after the other; its state also says of which data it is."""

    def __init__(self, stream: Any, content: str, folder: str):
        self._stream, self._content, self._folder = stream, content, folder

    def __next__(self) -> Lessons:
        return next(self._stream)

    def get_state(self) -> dict[str, Any]:
        """JSON-able; for `set_state`."""
        return {"position": self._stream.get_state(), "content": self._content}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. Raises ConfigError where it is a position in other data."""
        check(
            state.get("content") == self._content,
            f"sft.data={self._folder} has changed since the checkpoint was saved; to resume put "
            f"back the {EPISODES} that the run was started with, or pass another --workdir",
        )
        self._stream.set_state(state["position"])


def _longest(turns: Sequence[Mapping[str, Any]], field: str) -> int:
    return max((len(turn[field]) for turn in turns), default=0)
