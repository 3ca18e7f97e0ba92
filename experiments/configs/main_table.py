"""The main table: the learned policy against fixed workflows, three seeds.

    python experiments/sweep.py --config=experiments/configs/main_table.py \
        --workdir=runs/main_table --jobs=2

All methods have the same model, data, SFT and RL; `workflow` alone differs.
"""

from ml_collections import ConfigDict

from experiments.configs import synthetic

WORKFLOWS = (
    "learned",
    "scratchpad_only",
    "store_all",
    "store_all_update",
    "store_all_one_read",
    "sliding_window",
    "no_memory",
)
SPLITS = ["test_1x", "test_2x", "test_4x", "test_8x"]

EVALUATIONS = [
    {"splits": SPLITS, "temperatures": [0.0, 1.0], "episodes": 512},
    # What RL starts from.
    {"runs": "^learned/", "step": "sft", "splits": SPLITS, "episodes": 512},
]


def get_config() -> ConfigDict:
    """The experiment of `make demo`."""
    return synthetic.get_config()


def sweep(add) -> None:
    """Seeds outside: after a third of the time the table has every method once."""
    for seed in range(3):
        for workflow in WORKFLOWS:
            add(f"{workflow}/seed{seed}", {"seed": seed, "workflow": workflow})
