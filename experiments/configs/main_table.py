"""The main table: the learned policy against fixed workflows, three seeds.

    python experiments/sweep.py --config=experiments/configs/main_table.py \
        --workdir=runs/main_table --jobs=2

All methods have the same model, data and budget of SFT and RL. Those whose memory a program manages
start RL from the learned policy's SFT checkpoint of the same seed, so that their reader has seen as
much: SFT inside such a workflow has little to learn from (see CHANGELOG.md, "Decisions").
"""

from ml_collections import ConfigDict

from experiments.configs import synthetic

OWN_SFT = ("learned", "scratchpad_only")
SHARED_SFT = (
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
        for workflow in OWN_SFT:
            add(f"{workflow}/seed{seed}", {"seed": seed, "workflow": workflow})
        for workflow in SHARED_SFT:
            add(
                f"{workflow}/seed{seed}",
                {
                    "seed": seed,
                    "workflow": workflow,
                    "sft.steps": 0,
                    "init_from": "@learned/seed{seed}:sft",
                },
            )
