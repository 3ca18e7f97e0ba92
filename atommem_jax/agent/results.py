"""Records that evaluations left on disk: what they are called, where they are, and read again."""

import pathlib
from collections.abc import Sequence

from atommem_jax import text_files
from atommem_jax.agent.settings import spell_name
from atommem_jax.config import ConfigError, check, paths
from atommem_jax.learning.evaluation import Record

_NEEDED = ("episode", "question", "text", "answer", "aliases", "em", "f1")


def name_files(split: str, temperature: float, step: int, settings: Sequence[str] = ()) -> str:
    """What the two files of an evaluation are called, without their endings."""
    spelt = [spell_name(settings)] if settings else []
    return "_".join([f"{split}_t{temperature:g}_step{step}", *spelt])


def find(chosen: str, out: pathlib.Path, split: str, temperature: float) -> pathlib.Path:
    """The records that `--against` means.

    Args:
      chosen: a file of records, the workdir of another run, a folder of results, or what the name
        of the records in `out` has behind split and temperature, such as 'step900'.
      out: where this evaluation keeps its results.
      split: of which records are wanted.
      temperature: that they were sampled at.

    Raises ConfigError where there are none, or several.
    """
    wanted, flag = f"{split}_t{temperature:g}", f"--against={chosen}"
    place = paths.locate(chosen)
    if place.is_file():
        return place
    if not place.is_dir():
        labelled = out / f"{wanted}_{chosen}.jsonl"
        check(
            labelled.is_file(),
            f"{flag}: is neither a file of records nor a run, and {out} has no {labelled.name}; it "
            f"has {_list(out, wanted)}. Evaluate that one first, or pass another",
        )
        return labelled
    folder = place / "eval" if (place / "eval").is_dir() else place
    found = sorted(folder.glob(f"{wanted}_*.jsonl"))
    check(
        len(found) == 1,
        f"{flag}: {folder} has {len(found)} files of records of {split} at temperature "
        f"{temperature:g}, and one is needed: {_list(folder, wanted)}. Pass the path of one, or "
        "evaluate that run first",
    )
    return found[0]


def _list(folder: pathlib.Path, wanted: str) -> str:
    return ", ".join(path.name for path in sorted(folder.glob(f"{wanted}_*.jsonl"))) or "none"


def read(path: pathlib.Path) -> list[Record]:
    """The records in a file. Raises ConfigError for a file of something else."""
    records = list(text_files.read_records(path))
    for number, record in enumerate(records, 1):
        missing = [name for name in _NEEDED if not isinstance(record, dict) or name not in record]
        if missing:
            raise ConfigError(
                f"{path}: record {number} has no {missing[0]}; pass records that evaluate.py wrote"
            )
    check(bool(records), f"{path}: holds no record; evaluate that split again")
    return records
