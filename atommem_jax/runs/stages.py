"""The two stages of training: `rollout`, `reward` and `update`, functions of what they are given.

A stage owns its data stream, its optimiser and its jitted programs, none of which a step changes.
`experiments/train.py` loops over the steps and calls the three in this order, and before the update
`refill`, which plays more where groups have nothing to teach. All randomness is
derived from the config's seed and the step, so that a resumed run repeats what a killed one would
have done.

With several processes each reads, decodes and scores the rows that its devices hold. Batches and
trajectory ids are numbered over all of them, so that their number changes no trajectory.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from atommem_jax.agent import build, crossed, play
from atommem_jax.agent.phases import Steps
from atommem_jax.collection import store
from atommem_jax.config import check
from atommem_jax.learning import evaluation, life_cycle, trainer
from atommem_jax.learning import optimizer as optimizer_lib
from atommem_jax.learning import reward as reward_lib
from atommem_jax.model import lora
from atommem_jax.model.transformer import count_params, init_params
from atommem_jax.parallel import host_batches
from atommem_jax.tasks import batches as batches_lib
from atommem_jax.tasks import encoding
from atommem_jax.types import Trajectory
from atommem_jax.weights import fingerprint

# Streams of randomness, folded into the config's seed: no two of them share a key.
_INIT, _TEACHER, _ROLLOUT, _DEAL, _VALIDATE = range(5)
_PRIME = 1_000_003  # phases' orders of data are those of seeds that nobody chooses

State = dict[str, Any]
Metrics = dict[str, Any]


class Reward(NamedTuple):
    """What the host says of the trajectories of its rows."""

    scores: Float[np.ndarray, "B Q"]  # of each question, in [0, 1]: what is learned from
    exact: Float[np.ndarray, "B Q"]  # its exact match, which is logged
    counts: Float[np.ndarray, " B"]  # questions there are


class Stage:
    """What both stages share: all steps of a kind, or a phase of a curriculum, `first` to `last`.

    Phases of one kind go on with one state and one optimiser, which knows all of their steps.

    Attributes:
      optimizer: of this stage, with its schedule.
      lessons: collected trajectories to learn from, in place of played ones.
      frozen: parameters beside those of the state, where adapters are trained (`attach_base`).
    """

    name: str
    optimizer: optax.GradientTransformation
    lessons: store.Collection | None = None
    frozen: Any | None = None

    def __init__(
        self, section: str, parts: build.Parts, mesh: Mesh, examples, shape, steps: Steps | None
    ):
        self.parts, self.mesh, self.examples, self.shape = parts, mesh, examples, shape
        self.agent = host_batches.replicate(parts.agent, mesh)
        self.config = getattr(parts.config, section)
        whole: Steps = (0, self.config.steps)
        self.first, self.last = steps or whole
        self.steps = self.last - self.first
        self.metric = reward_lib.find(parts.config.task)

    def key(self, stream: int) -> jax.Array:
        """The key of one stream of randomness, on every device."""
        key = jax.random.fold_in(jax.random.key(self.parts.config.seed), stream)
        return host_batches.replicate(key, self.mesh)

    def batches(self) -> Any:
        """This stage's resumable stream of `EpisodeBatch`; each phase has an order of its own."""
        offset = (0 if self.name == "sft" else 1) + _PRIME * self.first
        return batches_lib.batches(
            self.examples,
            self.parts.tokenizer,
            self.shape,
            batch_size=self.config.episodes,
            seed=(2 * self.parts.config.seed + offset) % (1 << 32),
            rows=self.rows(),
        )

    def rows(self) -> np.ndarray:
        """The episodes of a batch that this process reads, ascending."""
        return host_batches.process_rows(self.mesh, self.config.episodes)

    def abstract_state(self) -> State:
        """Shapes, dtypes and placement of the state, for a restore; nothing is allocated."""
        shapes = jax.eval_shape(lambda: self._create(self._init_params()))
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            self._shardings(shapes),
        )

    def _shardings(self, tree: Any) -> Any:
        return self.parts.agent.model.config.layout.shardings(tree, self.mesh)

    def start(self, params: Any | None) -> State:
        """A fresh state; from new parameters where `params` is None.

        Nothing is ever whole on a host: every device makes its own part.
        """
        if params is None:
            params = self.init_params()
        else:
            params = jax.device_put(params, self._shardings(params))
        shapes = jax.eval_shape(self._create, params)
        return jax.jit(self._create, out_shardings=self._shardings(shapes))(params)

    def init_params(self) -> Any:
        """New parameters, those that are trained."""
        shapes = jax.eval_shape(self._init_params)
        return jax.jit(self._init_params, out_shardings=self._shardings(shapes))()

    def describe(self, state: State) -> str:
        """How many parameters are trained, in words."""
        frozen = count_params(self.frozen)
        return f"{count_params(state['train'].params):,} parameters" + (
            f" on {frozen:,} that are frozen" if frozen else ""
        )

    def params(self, state: State) -> Any:
        """All parameters of the policy, the frozen ones included."""
        return lora.join(state["train"].params, self.frozen)

    def _init_params(self) -> Any:
        key = jax.random.fold_in(jax.random.key(self.parts.config.seed), _INIT)
        model = self.parts.agent.model
        return lora.partition(init_params(model, key), model.config.lora)[0]

    def _create(self, params: Any) -> State:
        return {"train": optimizer_lib.create_state(params, self.optimizer)}

    def speed(self, metrics: Metrics, rollout_seconds: float, update_seconds: float) -> Metrics:
        """What a step's seconds come to, for the log; nothing where few would look at it."""
        del metrics, rollout_seconds, update_seconds
        return {}

    def score(self, trajectories, aliases) -> np.ndarray:
        """The task's reward of each question in the rows of this process, on the host: Float[B Q].

        Exact match, where the task has none of its own.
        """
        return evaluation.score_answers(self._decode(trajectories), aliases, self.metric)

    def _judge(self, trajectories, aliases, counts) -> Reward:
        """Scores and exact matches, which are the same where the task has no reward of its own."""
        scores = exact = self.score(trajectories, aliases)
        if self.metric is not reward_lib.exact_match:
            exact = evaluation.score_answers(self._decode(trajectories), aliases)
        return Reward(scores, exact, counts)

    def _decode(self, trajectories: Trajectory) -> list[list[str]]:
        answers, lengths = host_batches.fetch((trajectories.answers, trajectories.answer_lengths))
        return evaluation.decode_answers(answers, lengths, self.parts.tokenizer.decode)

    def ids(self, step: int, count: int) -> jax.Array:
        """Trajectory ids of a step with `count` trajectories in all, never used by another."""
        rows = host_batches.process_rows(self.mesh, count).astype(np.int32)
        return host_batches.shard(rows + step * count, self.mesh)


class Sft(Stage):
    """Supervised fine-tuning: on fresh trajectories of a scripted teacher, or collected ones."""

    name = "sft"

    def __init__(self, parts: build.Parts, mesh: Mesh, examples, shape, steps: Steps | None = None):
        super().__init__("sft", parts, mesh, examples, shape, steps)
        self.optimizer = optimizer_lib.make_optimizer(self.config.optimizer, self.config.steps)
        if self.config.data:
            self.lessons = store.Collection(
                self.config.data, parts, parts.setting(shape), self.config.min_reward
            )
            return
        teacher = parts.config.teacher
        self.play = play.make_scripted_player(parts, shape, teacher, mesh, parts.habits)
        self.seed = self.key(_TEACHER)
        if self.config.student != "none":
            self.play_student = play.make_player(
                parts,
                shape,
                mesh,
                tensor=parts.config.mesh.rollout_tensor,
                teacher=teacher if self.config.student == "dagger" else None,
            )
            self.temperature = host_batches.replicate(np.float32(1.0), mesh)

    def batches(self) -> Any:
        """This stage's resumable stream: of `EpisodeBatch`, or of `store.Lessons`."""
        if self.lessons is None:
            return super().batches()
        return self.lessons.batches(
            batch_size=self.config.episodes, seed=2 * self.parts.config.seed, rows=self.rows()
        )

    def rollout(self, state: State, batch, step: int) -> Trajectory:
        """What is learned from: the teacher's trajectories, played now or collected, or others."""
        if self.lessons is not None:
            return host_batches.shard(batch.trajectories, self.mesh)
        episodes = host_batches.shard(batch.episodes, self.mesh)
        ids = self.ids(step, self.config.episodes)
        if self._is_students(step):
            return self.play_student(self.params(state), episodes, ids, self.seed, self.temperature)
        return self.play(episodes, ids, self.seed)

    def reward(self, trajectories: Trajectory, batch) -> Reward:
        """What the teacher's answers are worth, and how many questions there are."""
        if self.lessons is not None:
            return Reward(batch.rewards[:, None], batch.rewards[:, None], batch.counts)
        counts = np.array([len(accepted) for accepted in batch.aliases], np.float32)
        return self._judge(trajectories, batch.aliases, counts)

    def update(
        self, state: State, trajectories: Trajectory, reward: Reward, step: int
    ) -> tuple[State, Metrics]:
        """One optimiser step on the trajectories that are good enough."""
        least = self.config.min_reward
        if self._is_students(step):
            # Whatever befalls the student, what the teacher says there is right.
            least = 0.0 if self.config.student == "dagger" else self.config.student_min_reward
        keep = reward.scores.sum(axis=1) / reward.counts >= least
        train, metrics = trainer.sft_step(
            self.agent,
            state["train"],
            trajectories,
            host_batches.shard(keep, self.mesh),
            self.frozen,
            optimizer=self.optimizer,
            rows=self.config.microbatch_rows,
            length_buckets=self.config.length_buckets,
            mesh=self.mesh,
        )
        exact = reward.exact.sum(axis=1)
        exact, counts = host_batches.gather_rows((exact, reward.counts), self.mesh)
        em = exact.sum() / counts.sum()
        whose = "student_em" if self._is_students(step) else "teacher_em"
        return {**state, "train": train}, {**jax.device_get(metrics), whose: em}

    def _is_students(self, step: int) -> bool:
        return self.config.student != "none" and step >= self.config.student_after

    def refill(
        self, state: State, trajectories: Trajectory, reward: Reward, batches: Any, step: int
    ) -> tuple[Trajectory, Reward, Metrics]:
        """Nothing: every trajectory teaches."""
        del state, batches, step
        return trajectories, reward, {}


class Rl(Stage):
    """PPO on the agent's own rollouts."""

    name = "rl"

    def __init__(self, parts: build.Parts, mesh: Mesh, examples, shape, steps: Steps | None = None):
        super().__init__("rl", parts, mesh, examples, shape, steps)
        if self.config.reward:
            self.metric = reward_lib.NAMED[self.config.reward]
        self.ppo = self.config.ppo
        total = self.config.steps * self.ppo.minibatches * self.ppo.epochs
        self.optimizer = optimizer_lib.make_optimizer(self.config.optimizer, total)
        tensor = parts.config.mesh.rollout_tensor
        self.play = play.make_player(parts, shape, mesh, tensor=tensor)
        self.seed, self.deal = self.key(_ROLLOUT), self.key(_DEAL)
        self.temperature = host_batches.replicate(np.float32(self.config.temperature), mesh)

    def _create(self, params: Any) -> State:
        state = super()._create(params)
        if self.ppo.needs_reference:
            # A copy: the parameters of the train state are donated at every step.
            state["reference"] = jax.tree.map(jnp.copy, params)
        return state

    def rows(self) -> np.ndarray:
        """The episodes of a batch of which this process holds trajectories, ascending."""
        return np.unique(self._trajectories() // self.ppo.group_size)

    def _trajectories(self) -> np.ndarray:
        """The trajectories of a step that this process holds."""
        return host_batches.process_rows(self.mesh, self.config.episodes * self.ppo.group_size)

    def rollout(self, state: State, batch, step: int) -> Trajectory:
        """Trajectories of the policy; siblings, of one episode, are neighbours."""
        # A group may lie over several processes.
        chosen = self._chosen()
        episodes = host_batches.shard(jax.tree.map(lambda x: x[chosen], batch.episodes), self.mesh)
        ids = self.ids(step, self.config.episodes * self.ppo.group_size)
        return self.play(self.params(state), episodes, ids, self.seed, self.temperature)

    def reward(self, trajectories: Trajectory, batch) -> Reward:
        """What the answer to each question is worth, and how many questions there are."""
        aliases = [batch.aliases[i] for i in self._chosen()]
        counts = np.array([len(accepted) for accepted in aliases], np.int32)
        return self._judge(trajectories, aliases, counts)

    def refill(
        self, state: State, trajectories: Trajectory, reward: Reward, batches: Any, step: int
    ) -> tuple[Trajectory, Reward, Metrics]:
        """Other episodes in the place of groups without contrast (dynamic sampling, DAPO).

        Those whose trajectories are all worth the same teach nothing. Up to `rl.resample` further
        rollouts of the same policy are played, until every group has a better and a worse member;
        groups that are still missing stay as they were.

        Returns trajectories, rewards, and metrics: of the policy they are those of the first
        rollout, for what is kept is a selection.
        """
        size, count = self.ppo.group_size, self.config.episodes * self.ppo.group_size
        if not self.config.resample:
            return trajectories, reward, {}
        found = Reward(*host_batches.gather_rows(tuple(reward), self.mesh))
        first, played = self._describe(found), 0
        first |= jax.device_get(evaluation.statistics(trajectories))
        contrast = self._find_contrast(found)
        while played < self.config.resample and not contrast.all():
            played += 1
            batch = next(batches)
            # A step that no other rollout has: its trajectories are numbered apart.
            more = self.rollout(state, batch, step + played * self.config.steps)
            graded = host_batches.gather_rows(tuple(self.reward(more, batch)), self.mesh)
            groups = choose_groups(contrast, fresh := self._find_contrast(Reward(*graded)))
            rows = (groups[:, None] * size + np.arange(size)).reshape(-1)
            trajectories = host_batches.choose_rows(trajectories, more, rows, self.mesh)
            both = (np.concatenate(pair) for pair in zip(found, graded, strict=True))
            found = Reward(*(x[rows] for x in both))
            contrast = np.concatenate([contrast, fresh])[groups]
        here = host_batches.process_rows(self.mesh, count)
        drawn = {"resampled": played, "contrast": contrast.mean()}
        return trajectories, Reward(*(x[here] for x in found)), first | drawn

    def _find_contrast(self, reward: Reward) -> Bool[np.ndarray, " groups"]:
        """Which groups have trajectories, or answers to a question, of different worth."""
        scores = reward.scores.reshape(-1, self.ppo.group_size, reward.scores.shape[1])
        if self.ppo.credit != "question":
            scores = scores.sum(axis=2, keepdims=True)
        return (np.ptp(scores, axis=1) > 1e-6).any(axis=1)

    def _describe(self, reward: Reward) -> Metrics:
        """Means of a rollout, of all processes."""
        scores, exact, counts = reward
        return {
            "em": exact.sum() / counts.sum(),
            "reward": float((scores.sum(axis=1) / counts).mean()),
        }

    def update(
        self, state: State, trajectories: Trajectory, reward: Reward, step: int
    ) -> tuple[State, Metrics]:
        """`ppo.epochs` passes over the trajectories, and what is to be known of them."""
        statistics = jax.device_get(evaluation.statistics(trajectories))
        train, metrics = trainer.update_step(
            self.agent,
            state["train"],
            trajectories,
            *host_batches.shard((reward.scores, reward.counts), self.mesh),
            jax.random.fold_in(self.deal, state["train"].step),
            self.temperature,
            state.get("reference"),
            self.frozen,
            optimizer=self.optimizer,
            config=self.ppo,
            mesh=self.mesh,
            warming=step < self.ppo.value_warmup,
        )
        metrics = jax.device_get(metrics)
        whole = Reward(*host_batches.gather_rows(tuple(reward), self.mesh))
        return {**state, "train": train}, {
            **self._describe(whole),
            **metrics,
            **statistics,
        }

    def speed(self, metrics: Metrics, rollout_seconds: float, update_seconds: float) -> Metrics:
        """See `Stage.speed`."""
        seconds = rollout_seconds + update_seconds
        trajectories = self.config.episodes * self.ppo.group_size
        return {
            "rollout_seconds": rollout_seconds,
            "update_seconds": update_seconds,
            "tokens_per_second": metrics["tokens"] / seconds,
            "trajectories_per_second": trajectories / seconds,
        }

    def _chosen(self) -> np.ndarray:
        """Of each trajectory that this process holds, the row of its episode in the batch."""
        return np.searchsorted(self.rows(), self._trajectories() // self.ppo.group_size)


def choose_groups(
    contrast: Bool[np.ndarray, " G"], fresh: Bool[np.ndarray, " G"]
) -> Int[np.ndarray, " G"]:
    """Which of 2 G groups, new behind old, are kept: new ones with contrast for old ones without.

    Places stay as they are: the i-th group without contrast gives way to the i-th fresh one.
    """
    groups = np.arange(len(contrast))
    missing, found = np.flatnonzero(~contrast), np.flatnonzero(fresh)
    count = min(len(missing), len(found))
    groups[missing[:count]] = len(contrast) + found[:count]
    return groups


def attach_base(plan: Sequence[Stage], params: Any) -> tuple[Any, str]:
    """Has all stages train adapters on `params`, those of a plain model.

    Returns what training starts from, new adapters and the value head of the base, and the
    fingerprint of what is frozen.
    """
    first = plan[0]
    config = first.parts.agent.model.config.lora
    start, frozen = lora.partition(params, config)
    where = first._shardings(frozen)
    frozen = jax.device_put(frozen, where)
    mark = fingerprint.fingerprint_base(frozen)
    cast = functools.partial(play.cast_matrices, dtype=config.base_dtype)
    frozen = jax.jit(cast, out_shardings=where)(frozen)
    for stage in plan:
        stage.frozen = frozen
    return first.init_params() | start, mark


class Validator:
    """Greedy EM on the first `eval.episodes` of the validation split."""

    def __init__(self, parts: build.Parts, mesh: Mesh, examples, shape):
        config = parts.config.eval
        self.parts, self.mesh, self.shape, self.batch_size = parts, mesh, shape, config.batch_size
        self.examples = examples[: config.episodes]
        fitted = encoding.fit_shape(self.examples, parts.tokenizer)
        self.shape = shape.join(fitted)
        tensor = parts.config.mesh.rollout_tensor
        self.play = play.make_player(parts, self.shape, mesh, tensor=tensor)
        key = jax.random.fold_in(jax.random.key(parts.config.seed), _VALIDATE)
        self.seed = host_batches.replicate(key, mesh)
        self.greedy = host_batches.replicate(np.float32(0.0), mesh)

    def check_reader(self, params: Any, least: float) -> float:
        """Greedy EM of a model that answers from the memory of a teacher without mistakes.

        Raises ConfigError where it is below `least`.
        """
        minds = {"clean": crossed.CLEAN, "model": params}
        table = crossed.measure(
            self.parts,
            self.mesh,
            minds,
            self.examples,
            self.shape,
            readers=["clean"],
            answerers=["model"],
            tensor=self.parts.config.mesh.rollout_tensor,
        )
        found = table["clean"]["model"]
        check(
            found >= least,
            f"rl.least_reader={least:g}: from the memory of a teacher without mistakes the model "
            f"answers {found:.3f} of the questions of {len(self.examples)} validation episodes. RL "
            "cannot tell what is worth storing by such answers: train longer (sft.steps), with a "
            "teacher that can be imitated, or set rl.least_reader=0.0 to go on all the same",
        )
        return found

    def __call__(self, params: Any) -> dict[str, float]:
        """Mean EM, its interval, and operations an episode."""
        records, statistics = evaluation.evaluate(
            lambda episodes, ids: self.play(params, episodes, ids, self.seed, self.greedy),
            batches_lib.iterate_split(
                self.examples,
                self.parts.tokenizer,
                self.shape,
                batch_size=self.batch_size,
                rows=host_batches.process_rows(self.mesh, self.batch_size),
            ),
            self.parts.tokenizer.decode,
            mesh=self.mesh,
            metric=reward_lib.find(self.parts.config.task),
            eviction=self.parts.setting(self.shape).limits.memory.eviction,
        )
        return {**statistics, **evaluation.summarise(records), **life_cycle.share_stages(records)}
