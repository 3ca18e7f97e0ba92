"""Choices of the RL algorithm, on the learned policy: two seeds.

    python experiments/sweep.py --config=experiments/configs/algorithms.py \
        --workdir=runs/algorithms --jobs=2

`reference` divides group advantages by their deviation, gives answer tokens the reward of their
own question, and has no KL and no entropy bonus. Every run has 256 trajectories a step, and starts
RL from the reference's SFT checkpoint.
"""

from ml_collections import ConfigDict

from experiments.configs import synthetic

EVALUATIONS = [
    {"splits": ["test_1x", "test_4x"], "temperatures": [0.0, 1.0], "episodes": 256},
]

TRAJECTORIES = 256  # rl.episodes * rl.ppo.group_size of the reference

SHARED_SFT = {"sft.steps": 0, "init_from": "@reference/seed{seed}:sft"}
CHOICES: dict[str, dict[str, object]] = {
    "reference": {},
    "no_division": {"rl.ppo.divide_by_std": False},
    "leave_one_out": {"rl.ppo.divide_by_std": False, "rl.ppo.leave_one_out": True},
    "credit_trajectory": {"rl.ppo.credit": "trajectory"},
    "gae": {"rl.ppo.estimator": "gae"},
    "kl_0.01": {"rl.ppo.kl_coef": 0.01},
    "entropy_0.001": {"rl.ppo.entropy_coef": 0.001},
    "rate_5e-4": {"rl.optimizer.learning_rate": 5e-4},
    "rate_3e-3": {"rl.optimizer.learning_rate": 3e-3},
    "group_4": {"rl.ppo.group_size": 4, "rl.episodes": TRAJECTORIES // 4},
    "group_16": {"rl.ppo.group_size": 16, "rl.episodes": TRAJECTORIES // 16},
    "minibatches_1": {"rl.ppo.minibatches": 1},
    "minibatches_8": {"rl.ppo.minibatches": 8},
}


def get_config() -> ConfigDict:
    """The experiment of `make demo`."""
    return synthetic.get_config()


def sweep(add) -> None:
    """Seeds outside, so that half of the time gives the whole table once."""
    for seed in range(2):
        for name, overrides in CHOICES.items():
            shared = {} if name == "reference" else SHARED_SFT
            add(f"{name}/seed{seed}", {"seed": seed, **shared, **overrides})
