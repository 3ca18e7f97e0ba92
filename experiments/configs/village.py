"""Chronicles of a village: the task that needs every operation (`atommem_jax.tasks.village`).

    python experiments/validity.py --config=experiments/configs/village.py

The memory holds what the story asks for and nothing beside it: three entries of three tokens, one
shown, no eviction. The argument is the number of facts a chunk: `village.py:1`, or 2, or 3, which
is the default.
"""

from ml_collections import ConfigDict

from atommem_jax.config import check
from experiments.configs import synthetic


def get_config(facts_per_chunk: str = "3") -> ConfigDict:
    """The experiment; hyper-parameters are those of `synthetic.py`. `facts_per_chunk`: 1 to 3."""
    check(
        facts_per_chunk in ("1", "2", "3"),
        f"--config=village.py:{facts_per_chunk}: allowed is village.py:1, :2 or :3",
    )
    config = synthetic.get_config()
    config.task = ConfigDict()
    config.task.name = "village"
    config.task.facts_per_chunk = int(facts_per_chunk)
    config.task.rounds = (2, 3)
    config.task.oldest_lost = 0.8
    config.task.others = 0.5
    config.task.train_examples = 20_000
    config.task.test_examples = 512
    config.task.scales = (1, 2, 4, 8)

    config.memory.slots = 3
    config.memory.shown = 1
    config.memory.entry_length = 3
    config.memory.scratchpad_length = 1
    config.memory.query_length = 1
    config.memory.key_dim = 256
    config.memory.eviction = "reject"

    config.rollout.max_actions = 2
    config.rollout.response_length = 12
    config.rollout.answer_length = 2
    config.rollout.read_budget = 1
    config.rollout.answer_read_budget = 1
    config.rollout.prompt_buckets = (6, 7, 8)

    config.teacher.store_support = 0.98
    config.teacher.store_distractor = 0.02
    config.teacher.update_shown = 1.0
    config.teacher.delete = 0.0
    config.teacher.forget = 1.0
    config.teacher.count = 1.0
    config.teacher.set_query = 1.0
    config.teacher.answer_known = 1.0

    config.sft.steps = 900
    config.sft.eval_every = 450
    config.sft.length_buckets = (6, 7, 8)
    config.rl.steps = 40
    config.rl.optimizer.learning_rate = 7e-4
    config.rl.ppo.length_buckets = (6, 7, 8)
    return config
