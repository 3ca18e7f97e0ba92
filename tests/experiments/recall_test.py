"""recall.py: what a question needs is found, the better the more rare words count."""

import json
import re

import pytest

from tests.helpers import forks, runs
from tests.weights import hf_tokenizer_test, huggingface_test


@pytest.mark.long
def test_rare_words_find_more(shared_data):
    """On real questions, which share their function words with every document."""
    printed = runs.run(
        "recall.py",
        "--config=experiments/configs/hotpotqa.py:2wikimultihopqa",
        f"--config.task.data_file={shared_data / '2wikimultihopqa' / 'dev_82.json'}",
        "--slots=8,64",
        "--key_dims=1024",
    )
    rows = dict(re.findall(r"^(\w[\w ]*), 1024 +([\d. ]+)$", printed, re.MULTILINE))
    found = {name: [float(x) for x in row.split()] for name, row in rows.items()}
    assert set(found) == {"uniform", "rarity", "document frequency"}
    for few, many in found.values():
        assert many < few <= 1.0  # the more there is, the less of it is found
    assert found["rarity"][1] > found["uniform"][1] + 0.1
    assert abs(found["rarity"][1] - found["document frequency"][1]) < 0.1


def test_embeddings_of_models_are_compared(shared_data, tmp_path):
    """Random rows are a random projection of what is counted, as the hashed ones are."""
    fields = {**huggingface_test.QWEN, "vocab_size": 258, "hidden_size": 128}
    tensors = huggingface_test.make_tensors(fields)
    huggingface_test.write(tmp_path, fields, tensors)
    hf_tokenizer_test.write_tokenizer(tmp_path)
    whole = json.loads((shared_data / "2wikimultihopqa" / "dev_82.json").read_text())
    for question in whole:  # short documents, for a byte is a token here
        question["context"] = [[title, [text[0][:60]]] for title, text in question["context"]]
    (tmp_path / "short.json").write_text(json.dumps(whole[:30]))
    printed = runs.run(
        "recall.py",
        "--config=experiments/configs/hotpotqa.py:2wikimultihopqa",
        f"--config.task.data_file={tmp_path / 'short.json'}",
        "--config.tokenizer.vocab_size=600",
        *("--slots=16", "--key_dims=128", f"--policy={tmp_path}", f"--encoder={tmp_path}"),
    )
    rows = dict(re.findall(r"^(\w[\w ]*), 128 +([\d.]+)$", printed, re.MULTILINE))
    found = {name: float(recall) for name, recall in rows.items()}
    assert set(found) > {"uniform", "policy", "policy by rarity", "encoder"}
    assert abs(found["policy"] - found["uniform"]) < 0.12
    assert 0.15 < found["encoder"] < 0.9, "six of sixteen by chance are .375"


def test_what_cannot_be_measured_is_refused(shared_data):
    file = f"--config.task.data_file={shared_data / '2wikimultihopqa' / 'dev_82.json'}"
    config = "--config=experiments/configs/hotpotqa.py:2wikimultihopqa"
    printed = forks.refuse("recall.py", config, file, "--slots=2")
    assert "--slots=2: allowed are 4 to 643" in printed
    assert "--slots=few: allowed are numbers" in forks.refuse("recall.py", config, "--slots=few")
    printed = forks.refuse("recall.py", "--config=experiments/configs/synthetic.py")
    assert "task.name='facts': allowed is 'multihop_qa'" in printed
