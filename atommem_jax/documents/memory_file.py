"""Memories in files: what an agent remembers, kept from one call to the next.

A file is a NumPy archive of the fields of a MemoryState, and says what they were made with. Token
ids mean nothing to another tokenizer, and keys nothing to another embedding: both are compared
when a memory is loaded.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from atommem_jax.config import ConfigError, check
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.learning import rollout
from atommem_jax.memory import slot_table
from atommem_jax.types import MemoryState

VERSION = 1
_SIZES = ("slots", "entry_length", "scratchpad_length", "query_length", "shown", "key_dim")
_ABOUT = "about"


class Saved(NamedTuple):
    """What a file holds."""

    state: MemoryState  # NumPy leaves, no leading axis
    episodes: int  # how many were played to get there: the next one has this number
    documents: tuple[str, ...]  # names of those that were read


def save(path: pathlib.Path, saved: Saved, setting: rollout.Setting, tokenizer: Tokenizer) -> None:
    """Writes a memory; a file that is there is replaced when the new one is whole."""
    about = identify(setting, tokenizer) | {
        "version": VERSION,
        "episodes": saved.episodes,
        "documents": list(saved.documents),
    }
    fields = {field.name: np.asarray(getattr(saved.state, field.name)) for field in _fields()}
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            np.savez_compressed(file, **fields, **{_ABOUT: np.array(json.dumps(about))})
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load(path: pathlib.Path, setting: rollout.Setting, tokenizer: Tokenizer) -> Saved:
    """Reads what `save` wrote.

    Raises ConfigError where there is nothing to read, and for a memory of other sizes, another
    tokenizer or another embedding.
    """
    flag = f"--load_memory={path}"
    try:
        with np.load(path, allow_pickle=False) as archive:
            fields = {name: archive[name] for name in archive.files}
        about = json.loads(str(fields.pop(_ABOUT)))
    except OSError as error:
        told = error.strerror or "it cannot be read"
        raise ConfigError(f"{flag}: {told}; pass a file of --save_memory") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{flag}: is no memory, or damaged ({type(error).__name__}); pass a file of "
            "--save_memory"
        ) from error
    check(
        isinstance(about, dict) and about.get("version") == VERSION,
        f"{flag}: was written in another format than version {VERSION}; read the documents again",
    )
    _check_same(flag, about, identify(setting, tokenizer))
    _check_fields(flag, fields, setting, tokenizer)
    state = MemoryState(**{field.name: fields[field.name] for field in _fields()})
    return Saved(state, int(about["episodes"]), tuple(about["documents"]))


def _fields() -> tuple[Any, ...]:
    return dataclasses.fields(MemoryState)


def identify(setting: rollout.Setting, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the meaning of a memory depends on, in JSON's types."""
    embed: Any = setting.embed
    fields = dataclasses.fields(embed) if dataclasses.is_dataclass(embed) else ()
    values = {field.name: getattr(embed, field.name) for field in fields}
    plain = {name: v for name, v in values.items() if isinstance(v, (str, int, float))}
    return {
        "tokenizer": hashlib.sha256(tokenizer.to_bytes()).hexdigest()[:16],
        "embedding": {"kind": type(embed).__name__} | plain,
        "sizes": {name: getattr(setting.config, name) for name in _SIZES},
    }


def _check_same(flag: str, found: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    saved, here = found["tokenizer"], ours["tokenizer"]
    check(
        saved == here,
        f"{flag}: was written with the tokenizer {saved}, and the checkpoint has {here}; pass the "
        "--checkpoint that it was written with, or one trained from it",
    )
    differing = [name for name in _SIZES if found["sizes"].get(name) != ours["sizes"][name]]
    told = ", ".join(
        f"memory.{name}={found['sizes'].get(name)} (here: {ours['sizes'][name]})"
        for name in differing
    )
    flags = " ".join(f"--set=memory.{name}={found['sizes'].get(name)}" for name in differing)
    check(not differing, f"{flag}: has {told}; pass {flags}")
    saved, here = found["embedding"], ours["embedding"]
    check(
        saved == here,
        f"{flag}: its keys are of {saved}, and this checkpoint's of {here}; pass the --checkpoint "
        "that it was written with",
    )


def _check_fields(
    flag: str, fields: Mapping[str, np.ndarray], setting: rollout.Setting, tokenizer: Tokenizer
) -> None:
    """Every field must be there, of the right shape, with ids of tokens that there are."""
    sizes = {name: getattr(setting.config, name) for name in _SIZES}
    expected = jax.eval_shape(lambda: slot_table.init(**sizes, pad_id=setting.pad_id))
    for field in _fields():
        name, leaf = field.name, getattr(expected, field.name)
        found = fields.get(name)
        sound = found is not None and (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
        if sound and name in ("entries", "scratchpad", "query"):
            sound = bool(((found >= 0) & (found < tokenizer.vocab_size)).all())
        if sound and name in ("lengths", "scratchpad_length", "query_length"):
            widths = {"lengths": "entry_length"}
            sound = bool(((found >= 0) & (found <= sizes[widths.get(name, name)])).all())
        check(sound, f"{flag}: its field {name} is damaged; read the documents again")
