"""Streaming multi-hop questions over generated names: the embedded default task.

`get_config()` trains at 1x (12 facts) with 5 slots, so that storing everything does not work.
Every size here suits two CPU cores; what it reaches is in docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment of `make demo`."""
    config = ConfigDict()
    config.seed = 0
    config.workflow = "learned"  # or one of atommem_jax.tasks.workflows, to compare with
    config.init_from = ""  # a checkpoint whose parameters training starts from

    config.profile = False  # trace the second step of each stage to <workdir>/profile

    config.mesh = ConfigDict()
    config.mesh.data = 0  # replicas of the parameters; 0 for as many as there are devices for
    config.mesh.fsdp = 1  # devices that share the parameters of a replica
    config.mesh.tensor = 1  # devices that share every matrix product
    config.mesh.rollout_tensor = 0  # the same of rollouts, of a replica's; 0: mesh.tensor
    config.mesh.slices = 1  # TPU slices, which only `data` crosses
    config.mesh.cpu_devices = 2  # into which a host without an accelerator is split

    config.task = ConfigDict()
    config.task.name = "facts"
    config.task.base_facts = 12
    config.task.facts_per_chunk = 1
    config.task.questions = (2, 2)
    config.task.two_hop = 1.0
    config.task.correction = 0.8
    config.task.decoys = 1
    config.task.train_examples = 20_000
    config.task.test_examples = 512
    config.task.scales = (1, 2, 4, 8)

    config.tokenizer = ConfigDict()
    config.tokenizer.vocab_size = 640
    config.tokenizer.character_coverage = 1.0  # share of the characters that are pieces

    config.protocol = ConfigDict()
    config.protocol.name = "compact"  # a key of atommem_jax.language.protocol.PROTOCOLS
    config.protocol.free_text = False  # between actions, as for thoughts
    config.prompt = "compact"  # or "chat", the format of a pretrained model

    config.memory = ConfigDict()
    config.memory.slots = 5
    config.memory.shown = 4
    config.memory.entry_length = 8
    config.memory.scratchpad_length = 1
    config.memory.query_length = 8
    config.memory.key_dim = 128
    config.memory.eviction = "lru"
    config.memory.weighting = "uniform"  # or "rarity": rare tokens count more in a search
    config.memory.embedding = "hashed"  # or "policy", "encoder": what a key is made of
    config.memory.encoder = ""  # directory or checkpoint of the text encoder

    config.rollout = ConfigDict()
    config.rollout.max_actions = 3
    config.rollout.response_length = 16
    config.rollout.answer_length = 2
    config.rollout.read_budget = 1
    config.rollout.answer_read_budget = 1
    config.rollout.constrained = True
    config.rollout.top_p = 1.0
    config.rollout.microbatch = 16  # turns written at a time on a device; 0 for all
    config.rollout.param_dtype = "float32"  # "bfloat16" with model.dtype="bfloat16"; or "int8"
    config.rollout.cache_dtype = ""  # of keys and values: model.dtype, or "int8"
    config.rollout.cpu_decode = (
        False  # decode with the layers apart: faster on a CPU, longer compiled
    )
    config.rollout.score_chunk = 0  # response tokens scored at a time; 0 for all
    config.rollout.cache_prefix = False  # read instructions and questions once a trajectory
    config.rollout.draft = 0  # tokens guessed and checked in a forward pass
    config.rollout.prompt_buckets = (4, 6, 8)  # eighths of the prompt's width; each is compiled
    config.rollout.least_rows = 0  # a micro-batch is halved down to so many as turns end; 0: never
    config.rollout.read_rows = 0  # prompts of a micro-batch that are read at a time; 0 for all
    config.rollout.context_length = 0  # tokens of a document that full_context shows; 0 for all

    config.model = ConfigDict()
    config.model.width = 64
    config.model.num_layers = 3
    config.model.num_heads = 2
    config.model.num_kv_heads = 2
    config.model.head_width = 32
    config.model.mlp_width = 192
    config.model.rope_theta = 10_000.0
    config.model.rope_fraction = 0.5
    config.model.qk_norm = False
    config.model.tie_embeddings = True
    config.model.token_shift = 2
    config.model.match_features = True
    config.model.remat = False  # True keeps less of the layers and computes it twice
    config.model.remat_policy = "full"
    config.model.attention = "auto"  # a blocked kernel on TPU, for long prompts
    config.model.dtype = "float32"

    config.lora = ConfigDict()
    config.lora.rank = 0  # of the adapters that are trained on init_from; 0 trains all parameters
    config.lora.alpha = 16.0
    config.lora.targets = ("query", "key", "value", "out", "gate", "up", "down")
    config.lora.base_dtype = "float32"  # "bfloat16" with model.dtype="bfloat16"

    config.teacher = ConfigDict()
    config.teacher.store_support = 0.9
    config.teacher.store_distractor = 0.5
    config.teacher.update_shown = 0.45
    config.teacher.delete = 0.0
    config.teacher.set_query = 0.75
    config.teacher.forget = 1.0
    config.teacher.count = 1.0
    config.teacher.read_missing = 1.0
    config.teacher.read_badly = 0.0
    config.teacher.answer_known = 0.96

    config.sft = ConfigDict()
    config.sft.data = ""  # a folder of collect.py to learn from; '' for the scripted teacher
    config.sft.student = "none"  # or "dagger", "rft": the student's own trajectories, at the end
    config.sft.student_after = 0  # steps that imitate the teacher's trajectories in any case
    config.sft.student_min_reward = 1.0  # of a trajectory of its own that "rft" learns from
    # What is learned from which step on, such as ("0: task.facts_per_chunk=1", "300:"), see README.
    config.sft.curriculum = ()
    config.sft.steps = 900
    config.sft.episodes = 8
    config.sft.min_reward = 0.5
    config.sft.log_every = 10
    config.sft.eval_every = 450
    config.sft.save_every = 150
    config.sft.microbatch_rows = 16
    config.sft.length_buckets = (5, 8)  # of the full width, where rows are scored; each is compiled
    config.sft.optimizer = ConfigDict()
    config.sft.optimizer.name = "muon"
    config.sft.optimizer.learning_rate = 1e-2
    config.sft.optimizer.adam_learning_rate = 3e-3
    config.sft.optimizer.schedule = "cosine"
    config.sft.optimizer.warmup_steps = 20
    config.sft.optimizer.weight_decay = 0.0
    config.sft.optimizer.b1 = 0.9
    config.sft.optimizer.b2 = 0.99
    config.sft.optimizer.clip_norm = 1.0
    config.sft.optimizer.moment_dtype = "float32"

    config.rl = ConfigDict()
    config.rl.steps = 36
    config.rl.episodes = 32
    config.rl.temperature = 1.0
    config.rl.least_reader = 0.0  # EM from a clean memory that RL asks for before it starts
    config.rl.resample = 0  # further rollouts a step, in the place of groups without contrast
    config.rl.curriculum = ()  # as of SFT
    config.rl.reward = ""  # or "exact_match", "f1"; '' is the task's own, or exact match
    config.rl.log_every = 1
    config.rl.eval_every = 10
    config.rl.save_every = 5
    config.rl.max_skipped_in_a_row = 3
    config.rl.optimizer = ConfigDict()
    config.rl.optimizer.name = "adamw"
    config.rl.optimizer.learning_rate = 1.5e-3
    config.rl.optimizer.adam_learning_rate = 0.0
    config.rl.optimizer.schedule = "cosine"
    config.rl.optimizer.warmup_steps = 4
    config.rl.optimizer.weight_decay = 0.0
    config.rl.optimizer.b1 = 0.9
    config.rl.optimizer.b2 = 0.99
    config.rl.optimizer.clip_norm = 1.0
    config.rl.optimizer.moment_dtype = "float32"
    config.rl.ppo = ConfigDict()
    config.rl.ppo.estimator = "group"
    config.rl.ppo.group_size = 8
    config.rl.ppo.divide_by_std = True
    config.rl.ppo.leave_one_out = False
    config.rl.ppo.credit = "question"
    config.rl.ppo.discount = 1.0
    config.rl.ppo.gae_lambda = 0.95
    config.rl.ppo.epochs = 1
    config.rl.ppo.minibatches = 4
    config.rl.ppo.microbatch_rows = 16  # on each device; fits the cache
    config.rl.ppo.length_buckets = (4, 5, 6, 8)
    config.rl.ppo.clip_low = 0.2
    config.rl.ppo.clip_high = 0.28
    config.rl.ppo.dual_clip = 3.0
    config.rl.ppo.importance_cap = 0.0  # of the ratio learner / sampler; 0: no such correction
    config.rl.ppo.weighting = "token_mean"
    config.rl.ppo.entropy_coef = 0.0
    config.rl.ppo.read_cost = 0.0  # of the trajectory's reward, for each Read applied
    config.rl.ppo.create_cost = 0.0
    config.rl.ppo.invalid_cost = 0.0
    config.rl.ppo.reward_kl_coef = 0.0  # for each nat of log(policy / reference), in the reward
    config.rl.ppo.learn_from_cut = False  # from turns that ended with their budget
    config.rl.ppo.kl_coef = 0.0
    config.rl.ppo.kl_kind = "k3"
    config.rl.ppo.value_coef = 0.5
    config.rl.ppo.value_clip = 0.0
    config.rl.ppo.value_warmup = 0  # first steps, in which the value head alone learns ("gae")

    config.eval = ConfigDict()
    config.eval.split = "validation_1x"
    config.eval.episodes = 256
    config.eval.batch_size = 256  # as many as RL plays, which saves compiling a program
    config.eval.segment = 0  # turns that evaluate.py plays at a time, of long documents; 0 for all
    config.eval.records = "answers"  # or "full": evaluate.py writes each turn of the segments

    config.checkpoint = ConfigDict()
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_best = 1

    config.debug = ConfigDict()
    config.debug.overfit = 0  # train and validate on so many samples alone; 0: on all
    return config
