"""BABILong (Kuratov et al., 2024): bAbI stories hidden in books, at any length.

    python experiments/train.py --config=experiments/configs/babilong.py:1 \
        --config.task.data_dir=/path/to/tasks_1-20_v1-2/en-10k --config.task.books=/path/to/books \
        --workdir=runs/babilong1
    python experiments/evaluate.py --checkpoint=runs/babilong1 --split=test_1k --split=test_1m

Trained on at most 2,000 tokens, evaluated on up to ten million, in segments of 64 turns. An entry
is a note of at most four words (`atommem_jax/tasks/babi.py`), and the whole table is shown at every
turn.
"""

from ml_collections import ConfigDict

from atommem_jax.config import check
from experiments.configs import synthetic


def get_config(task: str = "1") -> ConfigDict:
    """`task` is 1, 2 or 3."""
    check(task in ("1", "2", "3"), f"--config=babilong.py:{task}: allowed is babilong.py:1, :2, :3")
    number = int(task)
    config = synthetic.get_config()
    config.task = ConfigDict()
    config.task.name = "babilong"
    config.task.task = number
    config.task.data_dir = ""
    config.task.books = ""
    config.task.test_books = 4
    config.task.chunk_tokens = 128
    config.task.train_tokens = (0, 2000)
    config.task.decoys = 0.5
    config.task.decoy_phrases = 0.2
    config.task.everyone = True
    config.task.train_examples = 10_000
    config.task.test_examples = 200
    if number == 3:
        # The small files have 200 stories for training, which are learned by heart; and each is so
        # long that within 2,000 tokens a part of 128 tells of many things.
        config.task.simulated_stories = 2_000
        config.task.chunk_tokens = 32
    config.task.reward = "atommem_jax.tasks.babilong:occurs_in_answer"  # recorded beside EM

    config.tokenizer.vocab_size = 8192
    config.tokenizer.character_coverage = 0.9995

    config.memory.slots = 6
    config.memory.shown = 6
    config.memory.entry_length = 4
    config.rollout.max_actions = 6
    config.rollout.response_length = 44
    config.rollout.prompt_buckets = (4, 6, 8)

    # A note follows from those before it: a teacher that forgot one would teach to guess.
    config.teacher.store_support = 1.0
    config.teacher.store_distractor = 0.0
    config.teacher.update_shown = 1.0
    config.teacher.set_query = 1.0
    config.teacher.answer_known = 1.0

    config.sft.steps = {1: 1200, 2: 1200, 3: 800}[number]
    config.sft.eval_every = 400
    config.sft.episodes = 16
    config.sft.length_buckets = (4, 6, 8)
    config.rl.steps = 6
    config.rl.episodes = 16
    config.rl.reward = "exact_match"
    config.rl.optimizer.learning_rate = 3e-5
    config.rl.ppo.length_buckets = (4, 6, 8)
    config.eval.split = "validation"
    config.eval.episodes = 128
    config.eval.batch_size = 64
    config.eval.segment = 64
    return config
