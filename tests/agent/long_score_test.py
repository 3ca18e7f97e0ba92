"""An evaluation in segments writes the same whether it was killed on the way or not."""

import dataclasses
import io
import json
import types

import pytest

from atommem_jax.agent import load, long_score
from atommem_jax.learning import long_evaluation
from atommem_jax.parallel import mesh as mesh_lib
from tests.helpers import tiny

CELL = {"split": "test_1x", "temperature": 1.0, "seed": 0}
EXAMPLES = 8
DATASET = types.SimpleNamespace(
    splits=("test_1x",), split=lambda unused_name: tiny.make_examples()[:EXAMPLES]
)


@pytest.fixture(scope="module")
def loaded():
    parts = tiny.make_parts()
    config = parts.config
    chosen = dataclasses.replace(config.eval, segment=3, records="full", batch_size=4)
    config = dataclasses.replace(config, eval=chosen)
    parts = dataclasses.replace(parts, config=config)
    return load.Loaded("", 0, parts, tiny.make_params(scale=0.3), mesh_lib.single())


def play(loaded, out):
    return long_score.play_long(
        loaded, DATASET, DATASET.split("test_1x"), CELL, out=out, name="here"
    )


@pytest.mark.parametrize("die_at", [1, 3, 5])
def test_turns_are_written_once_by_an_evaluation_that_was_killed(
    die_at, loaded, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(long_evaluation, "SEGMENTS_BETWEEN_SAVES", 2)
    expected = play(loaded, tmp_path / "whole")
    whole = (tmp_path / "whole" / "here.turns.jsonl").read_text()

    calls = []
    segment = long_score._Player.play

    def die(self, *arguments):
        calls.append(1)
        if len(calls) == die_at + 1:
            raise KeyboardInterrupt
        return segment(self, *arguments)

    monkeypatch.setattr(long_score._Player, "play", die)
    with pytest.raises(KeyboardInterrupt):
        play(loaded, tmp_path / "killed")
    before = (tmp_path / "killed" / "here.turns.jsonl").read_text()
    assert whole.startswith(before)
    records, means = play(loaded, tmp_path / "killed")
    assert json.dumps(records) == json.dumps(expected[0])
    assert means == pytest.approx(expected[1])
    assert (tmp_path / "killed" / "here.turns.jsonl").read_text() == whole
    assert not list(tmp_path.glob("*/*.partial.json"))


def test_the_progress_bar_goes_on_where_the_killed_one_stood(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(long_evaluation, "SEGMENTS_BETWEEN_SAVES", 1)
    bars = []

    class Bar(long_score.tqdm.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options, file=io.StringIO())
            bars.append(self)

    monkeypatch.setattr(long_score.tqdm, "tqdm", Bar)
    segment = long_score._Player.play

    def die(self, *arguments):
        if arguments[-1] >= 3:
            raise KeyboardInterrupt
        return segment(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(long_score._Player, "play", die)
        with pytest.raises(KeyboardInterrupt):
            play(loaded, tmp_path)
    play(loaded, tmp_path)
    killed, resumed = bars
    assert 0 < resumed.initial <= killed.n
    assert resumed.n == resumed.total
