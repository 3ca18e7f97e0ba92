"""A memory comes back from its file as it was, and only to those who can read it."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from atommem_jax.config import ConfigError
from atommem_jax.documents import memory_file
from atommem_jax.memory import slot_table
from atommem_jax.types import MemoryState
from tests.helpers import tiny
from tests.language import chat_test


def make_setting(**sizes):
    setting = tiny.make_parts().setting(tiny.make_shape())
    memory = dataclasses.replace(setting.limits.memory, **sizes)
    limits = dataclasses.replace(setting.limits, memory=memory)
    return dataclasses.replace(setting, limits=limits)


def make_memory() -> memory_file.Memory:
    """A memory with numbers in every field."""
    c, rng = make_setting().limits.memory, np.random.default_rng(0)
    empty = jax.device_get(
        slot_table.init(
            slots=c.slots,
            entry_length=c.entry_length,
            scratchpad_length=c.scratchpad_length,
            query_length=c.query_length,
            shown=c.shown,
            key_dim=c.key_dim,
            pad_id=make_setting().pad_id,
        )
    )

    def fill(leaf):
        if leaf.dtype == np.float32:
            return rng.normal(size=leaf.shape).astype(np.float32)
        return rng.integers(0, 2, leaf.shape).astype(leaf.dtype)

    setting, tokenizer = make_setting(), tiny.make_tokenizer()
    identity = memory_file.identify(setting.limits.memory, setting.embed, tokenizer)
    state = jax.tree.map(fill, empty)
    return memory_file.Memory(state, 3, ("notes.txt", "other.md"), identity, tokenizer)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "kept.npz"
    make_memory().save(file)
    return file


def load(path, setting=None, tokenizer=None):
    return memory_file.load(path, setting or make_setting(), tokenizer or tiny.make_tokenizer())


def test_a_memory_comes_back_as_it_was(path):
    found, saved = load(path), make_memory()
    assert (found.episodes, found.documents) == (3, ("notes.txt", "other.md"))
    assert (found.identity, found.entries) == (saved.identity, saved.entries)
    for field in dataclasses.fields(MemoryState):
        one, other = getattr(found.state, field.name), getattr(saved.state, field.name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert [file.name for file in path.parent.iterdir()] == ["kept.npz"]


def test_other_sizes_are_named_with_the_settings_that_make_them_fit(path):
    setting = make_setting(slots=9, entry_length=4)
    with pytest.raises(ConfigError, match=r"memory\.slots=6 \(here: 9\)") as error:
        load(path, setting)
    assert "load the agent with memory.slots=6 memory.entry_length=8" in str(error.value)


def test_another_tokenizer_or_embedding_is_refused(path):
    with pytest.raises(ConfigError, match=r"kept.npz: was written with the tokenizer \w{16}"):
        load(path, tokenizer=chat_test.make_tokenizer())
    setting = make_setting()
    other = dataclasses.replace(setting, embed=dataclasses.replace(setting.embed, seed=1))
    with pytest.raises(ConfigError, match=r"its keys are of \{'kind': 'HashedBagOfTokens'"):
        load(path, other)


def rewrite(path, **changes) -> None:
    with np.load(path) as archive:
        fields = {name: archive[name] for name in archive.files}
    fields |= changes
    with path.open("wb") as file:
        np.savez(file, **{name: leaf for name, leaf in fields.items() if leaf is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": None}, "its field entries is damaged"),
        ({"entries": np.full((6, 8), 10_000, np.int32)}, "its field entries is damaged"),
        ({"lengths": np.full(6, 9, np.int32)}, "its field lengths is damaged"),
        ({"clock": np.float32(1)}, "its field clock is damaged"),
        (
            {"about": np.array(json.dumps({"version": 0}))},
            "was written in another format than version 1",
        ),
        ({"about": None}, r"is no memory, or damaged \(KeyError\)"),
        ({"about": np.array("{")}, "is no memory, or damaged"),
    ],
)
def test_a_damaged_file_is_refused(path, changes, message):
    rewrite(path, **changes)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: {message}"):
        load(path)


def test_what_is_no_file_of_a_memory_is_explained(path):
    with pytest.raises(ConfigError, match=r"nowhere: No such file.*pass a memory that was saved"):
        load(path.with_name("nowhere"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="is no memory, or damaged"):
        load(path)
    path.write_text("some text")
    with pytest.raises(ConfigError, match="is no memory, or damaged"):
        load(path)


def test_entries_and_notes_are_texts():
    memory, encode = make_memory(), tiny.make_tokenizer().encode
    state = memory.state
    ids = encode("Saltan likes tea.")[: state.entries.shape[1]]
    state.entries[2, : len(ids)], state.lengths[2] = ids, len(ids)
    state.valid[:] = np.arange(len(state.valid)) == 2
    state.scratchpad[0], scratchpad = (
        encode("tea")[0],
        tiny.make_tokenizer().decode(encode("tea")[:1]),
    )
    memory = dataclasses.replace(
        memory, state=dataclasses.replace(state, scratchpad_length=np.int32(1))
    )
    assert memory.entries == [tiny.make_tokenizer().decode(ids)]
    assert memory.scratchpad == scratchpad
    assert repr(memory) == "Memory(1 of 6 entries, read: notes.txt, other.md)"


def test_a_place_that_is_none_is_refused(tmp_path):
    for place, message in [(tmp_path, "is a folder"), (tmp_path / "a" / "b.npz", "no folder")]:
        with pytest.raises(ConfigError, match=message):
            make_memory().save(place)
