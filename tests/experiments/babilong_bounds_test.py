"""What a workflow can know is held against the parts of a document, read by eye."""

import types

from atommem_jax.tasks import encoding
from experiments.benchmarks import babilong_bounds
from tests.tasks import babilong_test


def test_what_is_shown_holds_the_answer_or_does_not(tmp_path):
    config = babilong_test.make_config(tmp_path, lengths=("1k",))
    dataset, tokenizer = babilong_test.prepare(config, tmp_path)
    examples = dataset.split("test_1k")
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
            assert retrieval in (0.0, 1.0)
            if shown >= len(chunks):
                assert retrieval == window == 1.0
            names = question["text"].rstrip("?").split()[-1]
            if shown == 3 and sum(names in chunk for chunk in chunks) <= 3:
                assert retrieval == 1.0, "the few parts that name the person were not found"
