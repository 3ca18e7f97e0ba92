"""Suite `decode`: its contestants write the same tokens, and its results are complete.

Needs the extras "hf" and "llama" (`pip install -e '.[test,hf,llama]'`).
"""

import numpy as np
import pytest

from experiments.benchmarks import decode_suite
from tests.helpers import multihop, smollm2
from tests.model import parity_test

SIZES = {
    "PREFILL": (2, 16),
    "PROMPT": 12,
    "STEPS": 6,
    "BATCHES": (1, 2),
    "GRAMMAR_BATCH": 2,
    "TURNS": 2,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(decode_suite, name, value)


@pytest.fixture
def subject(tmp_path):
    theirs = parity_test.make_theirs("qwen3-tied")
    theirs.save_pretrained(tmp_path)
    parity_test.write_tokenizer(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text(parity_test.FORMATS["system and user"], encoding="utf-8")
    return decode_suite.load(str(tmp_path), "<|endoftext|>")


@pytest.mark.peer
def test_contestants_write_the_same_tokens(subject):
    prompts = decode_suite.make_prompts(2, 12, subject.agent.model.config.vocab_size)
    ours = decode_suite.Ours(subject).generate(prompts).run(None)
    theirs = decode_suite.Transformers(subject).generate(prompts).run(None)
    assert ours.shape == (2, SIZES["STEPS"])
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.peer
def test_llama_cpp_writes_the_same_tokens():
    subject = decode_suite.load(str(smollm2.find()), "<|endoftext|>")
    prompts = decode_suite.make_prompts(1, 12, subject.agent.model.config.vocab_size)
    ours = decode_suite.Ours(subject).generate(prompts).run(None)
    peer = decode_suite.LlamaCpp(subject)
    np.testing.assert_array_equal(ours, [peer.write(prompts)])
    whole = peer.generate(prompts).run(None)["usage"]
    assert (whole["prompt_tokens"], whole["completion_tokens"]) == (12, SIZES["STEPS"])
    assert peer.prefill(prompts).run(None)["usage"]["completion_tokens"] == 1


@pytest.mark.peer
def test_turns_are_prompts_of_one_length_that_show_a_document(tmp_path):
    subject = decode_suite.load(str(smollm2.find()), "<|endoftext|>")
    records = [multihop.make_record(number, distractors=60) for number in range(2)]
    config = multihop.write(tmp_path, records)
    turns = decode_suite.make_turns(subject, config.data_file)
    assert turns.shape == (2, decode_suite.TURN_PROMPT)
    texts = [subject.tokenizer.decode(row.tolist()) for row in turns]
    for number in range(2):  # in the order in which samples are dealt
        assert any(f"Where is the firm of Person {number}?" in text for text in texts)
    for text in texts:
        assert "Noise" in text
        assert text.rstrip().endswith("assistant")
    plain = decode_suite.OneByOne(decode_suite.Ours(subject)).generate(turns).run(None)
    guessed = decode_suite.OneByOne(decode_suite.Ours(subject, draft=3)).generate(turns).run(None)
    np.testing.assert_array_equal(guessed, plain)


@pytest.mark.peer
def test_results_are_complete(subject):
    results = decode_suite.run(subject, runs=2)
    measured = {
        *(f"transformers.{part}_{batch}" for part in ("decode", "generate") for batch in (1, 2)),
        "transformers.prefill",
    }
    assert measured | {"bandwidth", "grammar"} <= results.keys()
    for name in measured:
        assert results[name]["ours"] > 0
        assert results[name]["peer"] > 0
        assert len(results[name]["ours_seconds"]) == 2
    for mine, whole in zip(
        results["transformers.decode_2"]["ours_seconds"],
        results["transformers.generate_2"]["ours_seconds"],
        strict=True,
    ):
        assert mine < whole
    assert results["bandwidth"]["share"] > 0
    assert len(results["grammar"]["shares"]) == 4
