"""What a workflow can know is held against the parts of a document, read by eye."""

import json
import types

import numpy as np
import pytest

from atommem_jax.config import ConfigError
from atommem_jax.tasks import encoding
from experiments.benchmarks import babilong_bounds
from tests.tasks import babilong_test


def test_what_is_shown_holds_the_answer_or_does_not(tmp_path):
    config = babilong_test.make_config(tmp_path, lengths=("1k",))
    dataset, tokenizer = babilong_test.prepare(config, tmp_path)
    examples = dataset.split("test_1k")
    retrieved = []
    for shown in (1, 3, 1000):
        memory = types.SimpleNamespace(shown=shown)
        parts = types.SimpleNamespace(
            tokenizer=tokenizer, config=types.SimpleNamespace(memory=memory)
        )
        loaded = types.SimpleNamespace(parts=parts)
        for example in examples:
            retrieval, window, count = babilong_bounds.find_bounds(loaded, example, 256)
            layout = encoding.lay_out(example, encoding.TextEncoder(tokenizer))
            chunks = [tokenizer.decode(babilong_bounds.join(chunk)) for chunk in layout]
            assert count == len(chunks)
            [question] = example["questions"]
            facts = [fact["text"] for fact in example["chunks"][0]]
            needed = [facts[number] for number in question["needs"]]
            # Every sentence of the stories written by hand is another, and none is of the books.
            assert window == all(any(n in c for c in chunks[-shown:]) for n in needed)
            retrieved.append(retrieval)
            if shown >= len(chunks):
                assert retrieval == window == 1.0
    one, three, every = (retrieved[i : i + len(examples)] for i in range(0, 9, len(examples)))
    assert all(a <= b <= c for a, b, c in zip(one, three, every, strict=True))


def test_bounds_are_added_to_what_a_results_file_says(tmp_path):
    path = tmp_path / "results.json"
    assert babilong_bounds.read_results(path) == {"methods": {}}
    cell = babilong_bounds.make_cell(np.array([1.0, 0.0, 1.0, 1.0]))
    assert cell["em"] == 0.75
    assert cell["episodes"] == 4
    assert cell["ci_low"] < 0.75 < cell["ci_high"] <= 1.0
    path.write_text(json.dumps({"methods": {"learned": {"1k": cell}}, "seconds": 3}))
    assert babilong_bounds.read_results(path)["seconds"] == 3
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"results.json: is no results.json, .* name another"):
        babilong_bounds.read_results(path)
    with pytest.raises(ConfigError, match=r"there is no folder"):
        babilong_bounds.read_results(tmp_path / "nowhere" / "results.json")
