"""How long a scratchpad must be before it does without a store. One seed, the budget of the demo.

    python experiments/sweep.py --config=experiments/configs/scratchpads.py \
        --workdir=runs/scratchpads --jobs=2

The main table gives the workflow `scratchpad_only` one token, as it gives every method; a question
needs an employer and a city, so that notes of eight tokens hold all that two questions need.
"""

from ml_collections import ConfigDict

from experiments.configs import synthetic

EVALUATIONS = [
    {"splits": ["test_1x", "test_4x"], "temperatures": [0.0, 1.0], "episodes": 256},
]


def get_config() -> ConfigDict:
    """The experiment of `make demo`."""
    return synthetic.get_config()


def sweep(add) -> None:
    """The number of tokens is in the name of the run."""
    for length in (8, 4, 2):
        scratchpad = {"workflow": "scratchpad_only", "memory.scratchpad_length": length}
        add(f"scratchpad_only_{length}", scratchpad)
