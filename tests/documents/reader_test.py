"""What a reader makes of a document does not depend on how much of it is held at a time."""

import functools

import pytest

from atommem_jax.agent import load
from atommem_jax.documents import reader as reader_lib
from atommem_jax.parallel import mesh as mesh_lib
from tests.helpers import tiers, tiny

QUESTION = tiny.make_examples()[0]["questions"][0]["text"]


def make_reader() -> reader_lib.Reader:
    parts, params = tiny.make_parts(), tiny.make_params(2, scale=0.3)
    return reader_lib.Reader(
        load.Loaded("runs/tiny", 0, parts, params, mesh_lib.single(), tiny.make_shape())
    )


@functools.cache
def make_document() -> str:
    facts = [f["text"] for e in tiny.make_examples()[:3] for c in e["chunks"] for f in c]
    return " ".join(facts)


def read(full: bool):
    """(reading after its end, its turns, the parts)."""
    reader = make_reader()
    parts = [("notes", part) for part in reader.split("notes", make_document())]
    reading = reader.begin(parts, [QUESTION], temperature=1.0, seed=5, full=full)
    turns = [(turn.part, turn.question, turn.data) for turn in reading.turns()]
    return reading, turns, parts


@pytest.mark.parametrize("window", tiers.first([4, 1]))
def test_windows_of_any_length_read_the_same(window, monkeypatch):
    expected, turns, parts = read(full=True)
    assert len(parts) == 18
    assert sorted({part for part, _, _ in turns}) == list(range(-1, 18))
    monkeypatch.setattr(reader_lib, "WINDOW", window)
    found, same, _ = read(full=True)
    assert same == turns
    assert found.answers() == expected.answers()
    assert found.memory.entries == expected.memory.entries
    assert found.describe() == expected.describe()
    # All but what the last window holds was read before it.
    assert found.tokens_read > expected.tokens_read == 0


def test_what_is_kept_of_a_long_document_are_the_turns_that_tell(monkeypatch):
    monkeypatch.setattr(reader_lib, "WINDOW", 4)
    whole, turns, parts = read(full=True)
    short, _, _ = read(full=False)
    assert short.answers() == whole.answers()
    assert short.memory.entries == whole.memory.entries
    told, everything = short.describe(), whole.describe()
    wrote = [(part, data) for part, question, data in turns if question >= 0 or data["actions"]]
    assert 1 < len(wrote) < len(turns)
    assert len(told["turns"]) == len(wrote)
    for turn, (part, data) in zip(told["turns"], wrote, strict=True):
        if part < 0:
            assert turn == data
            continue
        text = everything["chunks"][part]
        assert told["chunks"][turn["chunk"]] == f"[part {part + 1}] {text}"
        assert {**turn, "chunk": part} == data
    assert len(told["chunks"]) < len(parts)
