"""The table of the task that needs every operation: learned, without each one, fixed workflows.

    python experiments/sweep.py --config=experiments/configs/village_table.py \
        --workdir=runs/village_table --jobs=1

Three seeds of `make demo`'s learned policy. What lacks an operation has an SFT of its own, on the
best script that lacks it (`keeper.BEST_ABLATED`), and as much RL. Where a program manages the
memory, RL starts from the learned policy's SFT checkpoint of the same seed.
"""

from ml_collections import ConfigDict

from experiments.configs import main_table, village

ABLATIONS = ("no_update", "no_delete", "no_scratchpad", "no_read", "no_store", "scratchpad_only")

EVALUATIONS = [
    {"splits": main_table.SPLITS, "temperatures": [0.0, 1.0], "episodes": 512},
    # What RL starts from.
    {
        "runs": "^learned/",
        "step": "sft",
        "splits": main_table.SPLITS,
        "temperatures": [0.0, 1.0],
        "episodes": 512,
    },
]


def get_config() -> ConfigDict:
    """The experiment of `make demo`."""
    return village.get_config()


def sweep(add) -> None:
    """Seeds outside: after a third of the time the table has every method once."""
    for seed in range(3):
        add(f"learned/seed{seed}", {"seed": seed})
        for workflow in ABLATIONS:
            # The best of these scripts answers a third of the questions.
            settings = {"workflow": workflow, "sft.min_reward": 0.3}
            add(f"{workflow}/seed{seed}", {"seed": seed, **settings})
        for workflow in main_table.SHARED_SFT:
            start = {"sft.steps": 0, "init_from": "@learned/seed{seed}:sft"}
            add(f"{workflow}/seed{seed}", {"seed": seed, "workflow": workflow, **start})
