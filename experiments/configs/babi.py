"""bAbI tasks 1 to 3 (Weston et al., 2015) from the published files.

    python experiments/train.py --config=experiments/configs/babi.py:1 \
        --config.task.data_dir=/path/to/tasks_1-20_v1-2/en-10k --workdir=runs/babi1

The sizes were chosen for task 1; tasks 2 and 3 have longer stories (`get_config("3")` puts more
sentences in a chunk) and are measured, not solved.
"""

from ml_collections import ConfigDict

from experiments.configs import synthetic

_SENTENCES_A_CHUNK = {1: 1, 2: 2, 3: 4}


def get_config(task: str = "1") -> ConfigDict:
    """`task` is 1, 2 or 3."""
    number = int(task)
    config = synthetic.get_config()
    config.task = ConfigDict()
    config.task.name = "babi"
    config.task.task = number
    config.task.data_dir = ""
    config.task.facts_per_chunk = _SENTENCES_A_CHUNK[number]

    config.memory.slots = 8
    config.memory.shown = 4
    config.rollout.max_actions = 1 + config.task.facts_per_chunk
    config.rollout.response_length = 8 + 12 * config.task.facts_per_chunk

    # Nearly clean: it forgets some updates and stores some of what is not asked for.
    config.teacher.store_support = 0.97
    config.teacher.store_distractor = 0.1
    config.teacher.update = 0.8
    config.teacher.set_query = 1.0
    config.teacher.answer_known = 1.0

    config.sft.steps = 600
    config.sft.eval_every = 300
    config.sft.episodes = 16
    # SFT already answers everything: at the synthetic task's rate RL forgets before it learns.
    config.rl.steps = 12
    config.rl.episodes = 16
    config.rl.optimizer.learning_rate = 2e-4
    config.eval.split = "validation"
    config.eval.episodes = 256
    return config
