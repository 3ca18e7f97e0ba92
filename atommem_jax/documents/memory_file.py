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
from typing import Any

import jax
import numpy as np

from atommem_jax.config import ConfigError, MemoryConfig, check, paths
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.learning import environment
from atommem_jax.memory import slot_table
from atommem_jax.types import MemoryState
from atommem_jax.weights import fingerprint

VERSION = 1
_SIZES = ("slots", "entry_length", "scratchpad_length", "query_length", "shown", "key_dim")
_ABOUT = "about"


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """What an agent remembers. Nothing changes it: reading on gives another one."""

    state: MemoryState  # NumPy leaves, no leading axis
    episodes: int  # how many were played to get there: the next one has this number
    documents: tuple[str, ...]  # names of those that were read
    identity: Mapping[str, Any]  # what its meaning depends on, see `identify`
    tokenizer: Tokenizer

    @property
    def entries(self) -> list[str]:
        """The texts of its entries, in the order of their slots."""
        rows = zip(self.state.entries, self.state.lengths, self.state.valid, strict=True)
        return [self.tokenizer.decode(row[:n].tolist()) for row, n, valid in rows if valid]

    @property
    def scratchpad(self) -> str:
        """The notes that every turn sees whole."""
        return self.tokenizer.decode(
            self.state.scratchpad[: int(self.state.scratchpad_length)].tolist()
        )

    def save(self, path: str | pathlib.Path) -> None:
        """Writes it to a file; one that is there is replaced when the new one is whole."""
        save(paths.locate(path), self)

    def __repr__(self) -> str:
        read = ", ".join(self.documents) or "nothing"
        return f"Memory({len(self.entries)} of {len(self.state.valid)} entries, read: {read})"


def save(path: pathlib.Path, memory: Memory) -> None:
    """See `Memory.save`. Raises ConfigError where there is no folder for it."""
    check(not path.is_dir(), f"{path}: is a folder; pass a file in it")
    check(path.parent.is_dir(), f"{path}: there is no folder {path.parent}; make it first")
    about = dict(memory.identity) | {
        "version": VERSION,
        "episodes": memory.episodes,
        "documents": list(memory.documents),
    }
    fields: dict[str, Any] = {
        field.name: np.asarray(getattr(memory.state, field.name)) for field in _fields()
    }
    fields[_ABOUT] = np.array(json.dumps(about))
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            np.savez_compressed(file, **fields)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load(path: pathlib.Path, setting: environment.Setting, tokenizer: Tokenizer) -> Memory:
    """Reads what `save` wrote.

    Raises ConfigError where there is nothing to read, and for a memory of other sizes, another
    tokenizer or another embedding.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            fields = {name: archive[name] for name in archive.files}
        about = json.loads(str(fields.pop(_ABOUT)))
    except OSError as error:
        told = error.strerror or "it cannot be read"
        raise ConfigError(f"{path}: {told}; pass a memory that was saved") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path}: is no memory, or damaged ({type(error).__name__}); pass a memory that was "
            "saved"
        ) from error
    check(
        isinstance(about, dict) and about.get("version") == VERSION,
        f"{path}: was written in another format than version {VERSION}; read the documents again",
    )
    identity = identify(setting.limits.memory, setting.embed, tokenizer)
    check_same(str(path), about, identity)
    _check_fields(str(path), fields, setting, tokenizer)
    state = MemoryState(**{field.name: fields[field.name] for field in _fields()})
    return Memory(state, int(about["episodes"]), tuple(about["documents"]), identity, tokenizer)


def _fields() -> tuple[Any, ...]:
    return dataclasses.fields(MemoryState)


def identify(sizes: MemoryConfig, embed: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the meaning of a memory depends on, in JSON's types."""
    fields = dataclasses.fields(embed) if dataclasses.is_dataclass(embed) else ()
    values = {field.name: getattr(embed, field.name) for field in fields}
    plain = {name: v for name, v in values.items() if isinstance(v, (str, int, float))}
    digests = {name: v for name, v in values.items() if isinstance(v, bytes) and v}
    plain |= {name: hashlib.sha256(v).hexdigest()[:16] for name, v in digests.items()}
    learned = jax.tree.leaves(embed)
    if learned:
        plain["parameters"] = fingerprint.fingerprint_base(learned)
    return {
        "tokenizer": hashlib.sha256(tokenizer.to_bytes()).hexdigest()[:16],
        "embedding": {"kind": type(embed).__name__} | plain,
        "sizes": {name: getattr(sizes, name) for name in _SIZES},
    }


def check_same(name: str, found: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises ConfigError unless a memory means to this agent what it meant to its own.

    name: of the memory, for the error; found: its identity; ours: that of this agent's memories.
    """
    saved, here = found["tokenizer"], ours["tokenizer"]
    check(
        saved == here,
        f"{name}: was written with the tokenizer {saved}, and this agent has {here}; take the "
        "checkpoint that it was written with, or one trained from it",
    )
    differing = [size for size in _SIZES if found["sizes"].get(size) != ours["sizes"][size]]
    told = ", ".join(
        f"memory.{size}={found['sizes'].get(size)} (here: {ours['sizes'][size]})"
        for size in differing
    )
    settings = " ".join(f"memory.{size}={found['sizes'].get(size)}" for size in differing)
    check(not differing, f"{name}: has {told}; load the agent with {settings}")
    saved, here = found["embedding"], ours["embedding"]
    check(
        saved == here,
        f"{name}: its keys are of {saved}, and this agent's of {here}; take the checkpoint that "
        "it was written with",
    )


def _check_fields(
    name: str, fields: Mapping[str, np.ndarray], setting: environment.Setting, tokenizer: Tokenizer
) -> None:
    """Every field must be there, of the right shape, with ids of tokens that there are."""
    sizes = {name: getattr(setting.limits.memory, name) for name in _SIZES}
    expected = jax.eval_shape(lambda: slot_table.init(**sizes, pad_id=setting.pad_id))
    for field in _fields():
        leaf, found = getattr(expected, field.name), fields.get(field.name)
        damaged = f"{name}: its field {field.name} is damaged; read the documents again"
        if found is None or (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise ConfigError(damaged)
        if field.name in ("entries", "scratchpad", "query"):
            check(bool(((found >= 0) & (found < tokenizer.vocab_size)).all()), damaged)
        if field.name in ("lengths", "scratchpad_length", "query_length"):
            most = sizes["entry_length" if field.name == "lengths" else field.name]
            check(bool(((found >= 0) & (found <= most)).all()), damaged)
