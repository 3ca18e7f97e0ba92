"""HotpotQA, 2WikiMultihopQA and MuSiQue from the published files.

    python experiments/train.py --config=experiments/configs/hotpotqa.py:hotpotqa \
        --config.task.train_file=/path/to/hotpot_train_v1.1.json --workdir=runs/hotpotqa

One sentence a chunk, one question a sample, ten documents: sizes at which a small model can be
trained from scratch, to try the machinery on real text. The paper's setting is `atommem_8b.py`.
"""

from ml_collections import ConfigDict

from experiments.configs import synthetic


def get_config(dataset: str = "hotpotqa") -> ConfigDict:
    """`dataset` is hotpotqa, 2wikimultihopqa or musique."""
    config = synthetic.get_config()
    config.task = ConfigDict()
    config.task.name = "multihop_qa"
    config.task.dataset = dataset
    config.task.train_file = ""
    config.task.test_file = ""
    config.task.data_file = ""
    config.task.corpus_file = ""
    config.task.documents = 10
    config.task.test_documents = ()
    config.task.questions = (1, 1)
    config.task.documents_per_chunk = 1
    config.task.chunk_sentences = 1
    config.task.chunk_words = 0
    config.task.chunk_tokens = 0
    config.task.chunk_overlap = 0
    # Few are longer, and every row is as wide as the longest.
    config.task.max_sentence_words = 32
    config.task.max_question_words = 30
    config.task.max_answer_words = 6
    config.task.test_every = 20
    config.task.validation_every = 20
    config.task.max_examples = 5_000
    config.task.max_test_examples = 0
    config.task.seed = 0

    config.tokenizer.vocab_size = 8192
    config.tokenizer.character_coverage = 0.9995  # rare letters are spelled in bytes

    config.memory.slots = 8
    config.memory.shown = 6
    config.memory.entry_length = 128
    config.memory.query_length = 64
    config.memory.key_dim = 1024
    config.memory.weighting = "rarity"
    config.rollout.max_actions = 2
    config.rollout.response_length = 320
    config.rollout.answer_length = 32
    config.rollout.microbatch = 8

    config.model.width = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.mlp_width = 384
    config.model.remat = True  # the attention of all layers at once would take gigabytes

    # Nearly clean. There is nothing to update: no sentence replaces another.
    config.teacher.store_support = 0.97
    config.teacher.store_distractor = 0.05
    config.teacher.update_shown = 1.0
    config.teacher.set_query = 1.0
    config.teacher.answer_known = 1.0

    config.rl.episodes = 8
    config.rl.optimizer.learning_rate = 2e-4
    config.eval.split = "validation"
    config.eval.batch_size = 32
    return config
