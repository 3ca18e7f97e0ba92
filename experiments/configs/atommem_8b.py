"""The paper's run: Qwen3-8B learns to keep a memory of 200 documents, on a TPU v6e-16.

    python experiments/train.py --config=experiments/configs/atommem_8b.py:hotpotqa \
        --config.task.train_file=hotpot_train_v1.1.json \
        --config.task.test_file=hotpot_dev_distractor_v1.json \
        --config.sft.data=runs/teacher_hotpotqa --workdir=runs/atommem_8b/hotpotqa/atommem

docs/reproduce.md leads there from an empty project, and from there to the paper's table. Figures
are the paper's (AtomMem, sections 4 and 5): 200 documents and 1 to 10 questions a sample, chunks of
4,096 tokens, six entries shown, SFT on trajectories worth at least half of their questions, then
100 steps of 16 tasks x 16 trajectories with the reward as it is less the group's mean, clips .2 and
.28 and 3.0, no KL, 1e-6 after 20 steps of warm-up, one update a rollout. Where it gives none, they
are those of `published.py`, or stand here with their reason.

What differs from the paper: entries are searched by the words that they share with the query, the
rarer the more (`memory.weighting`), not by Qwen3-Embedding; a turn is actions without thoughts
(`protocol.free_text`). `get_config` has one data set, and `sweep` the rows of its table.
"""

from ml_collections import ConfigDict

from experiments.configs import hotpotqa, published

DOCUMENTS = (200, 400, 800)
EPISODES = 128  # of each test split, about 400 questions

# Of every size of the test.
EVALUATIONS = [
    {"temperatures": [0.0], "episodes": EPISODES},
    {"step": "sft", "temperatures": [0.0], "episodes": EPISODES},
]


def get_config(dataset: str = "hotpotqa") -> ConfigDict:
    """`dataset` is hotpotqa, 2wikimultihopqa or musique; its files are to be given."""
    config = published.get_config("qwen3_8b")
    del config.shape  # of a config without data
    config.init_from = "runs/qwen3_8b"
    config.prompt = "chat"
    config.protocol.name = "atommem"

    config.task = hotpotqa.get_config(dataset).task
    config.task.documents = 200
    config.task.test_documents = DOCUMENTS
    config.task.questions = (1, 10)
    config.task.documents_per_chunk = 0
    config.task.chunk_sentences = 0
    config.task.chunk_words = 0
    config.task.chunk_tokens = 4_096
    config.task.max_sentence_words = 0
    config.task.max_question_words = 0
    config.task.max_answer_words = 0
    config.task.max_examples = 2_048  # RL sees 1,600
    config.task.max_test_examples = EPISODES
    # A scripted teacher, should it be wanted, stores what supports an answer and nothing else.
    config.teacher.store_support = 1.0
    config.teacher.store_distractor = 0.0

    # 16 chips share the parameters of an update; in rollouts eight share every product, and guess
    # two tokens a pass. See docs/scaling.md.
    config.mesh.fsdp = 16
    config.mesh.rollout_tensor = 8
    config.rollout.microbatch = 32
    config.rollout.read_rows = 16
    config.rollout.draft = 2

    config.sft.steps = 32  # about twice through a thousand collected trajectories
    config.sft.min_reward = 0.5
    config.sft.log_every = 1
    config.sft.eval_every = 32
    config.sft.save_every = 32
    config.sft.optimizer.adam_learning_rate = 0.0
    config.sft.optimizer.schedule = "cosine"
    config.sft.optimizer.warmup_steps = 3

    config.rl.steps = 100
    config.rl.eval_every = 20
    config.rl.save_every = 10
    for optimizer in (config.sft.optimizer, config.rl.optimizer):
        optimizer.b2 = 0.999
    config.eval.split = "validation"
    config.eval.episodes = EPISODES
    config.eval.batch_size = EPISODES
    return config


def sweep(add) -> None:
    """The rows that are trained: the paper's agent, and one that has a scratchpad alone."""
    add("atommem", {})
    add("scratchpad_only", {"workflow": "scratchpad_only"})
