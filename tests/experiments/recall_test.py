"""recall.py: what a question needs is found, the better the more rare words count."""

import re

from tests.helpers import forks, runs


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


def test_what_cannot_be_measured_is_refused(shared_data):
    file = f"--config.task.data_file={shared_data / '2wikimultihopqa' / 'dev_82.json'}"
    config = "--config=experiments/configs/hotpotqa.py:2wikimultihopqa"
    printed = forks.refuse("recall.py", config, file, "--slots=2")
    assert "--slots=2: allowed are 4 to 643" in printed
    assert "--slots=few: allowed are numbers" in forks.refuse("recall.py", config, "--slots=few")
    printed = forks.refuse("recall.py", "--config=experiments/configs/synthetic.py")
    assert "task.name='facts': allowed is 'multihop_qa'" in printed
