"""Suite `rollout`: whole episodes, jitted, against the same agent driven turn by turn.

| peer | model | between two turns |
|---|---|---|
| host_loop | ours: jitted prefill and decode step | Python prompts, parsing, memory on NumPy |
| host_generate | ours: prefill and decode as one program | the same |
| torch_faiss | PyTorch with a KV cache, on the same weights | the same, memory on FAISS |

All play the same episodes with the same parameters. Greedily they play the same trajectories, up
to rounding; `tokens` and `turns` tell how much each did.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from atommem_jax.agent import build, play
from atommem_jax.parallel import host_batches, rules
from atommem_jax.tasks import encoding
from atommem_jax.types import Episode, Trajectory
from experiments.benchmarks import timing
from experiments.benchmarks.host_agent import HostEpisode, HostPlayer, HostTurn
from experiments.benchmarks.host_memory import FaissIndex, NumpyIndex
from experiments.benchmarks.jax_responders import HostLoop, WholeGenerate

PEERS = ("host_loop", "host_generate", "torch_faiss")


@dataclasses.dataclass
class Scene:
    """Who plays what: shared by the suites that need episodes."""

    parts: build.Parts
    params: Any
    mesh: Mesh
    shape: encoding.EpisodeShape
    episodes: Episode  # [B], on the host
    aliases: list[list[list[str]]]
    temperature: float

    @property
    def ids(self) -> np.ndarray:
        return np.arange(len(self.aliases), dtype=np.int32)

    @property
    def seed(self) -> jax.Array:
        return jax.random.key(self.parts.config.seed)

    @property
    def group(self) -> int:
        """Rows of a batch over all devices: `rollout.microbatch` on each, at most what there is."""
        group = self.parts.config.rollout.microbatch * self.mesh.shape[rules.DATA]
        return min(group, len(self.aliases)) or len(self.aliases)


class Ours:
    """The jitted episode."""

    def __init__(self, scene: Scene):
        self._player = play.make_player(scene.parts, scene.shape, scene.mesh)
        place = host_batches.replicate
        self._arguments = (
            place(scene.params, scene.mesh),
            *host_batches.shard((scene.episodes, scene.ids), scene.mesh),
            place(scene.seed, scene.mesh),
            place(np.float32(scene.temperature), scene.mesh),
        )

    def run(self, _: Any = None) -> Trajectory:
        """Plays all episodes and waits."""
        self.trajectories = jax.block_until_ready(self._player(*self._arguments))
        return self.trajectories


class HostPeer:
    """A host player with a responder."""

    def __init__(self, scene: Scene, index: Any, respond: Any):
        setting = scene.parts.setting(scene.shape)
        self._player = HostPlayer(scene.parts.agent, setting, scene.parts.tokenizer, index)
        self._episodes, self._respond = scene.episodes, respond

    def prepare(self) -> list[HostEpisode]:
        return self._player.start(self._episodes)

    def run(self, episodes: list[HostEpisode]) -> list[HostTurn]:
        """Plays all episodes to their end."""
        self.played, self.turns = episodes, self._player(episodes, self._respond)
        return self.turns


def make_peer(name: str, scene: Scene, *, torch_threads: int = 1, torch_batch: int = 0) -> HostPeer:
    """A peer by name. Raises ImportError where its libraries are missing."""
    if name == "torch_faiss":
        import faiss

        from experiments.benchmarks import torch_model, torch_sampling

        faiss.omp_set_num_threads(1)
        agent = scene.parts.agent
        model = torch_model.from_params(agent.model.config, jax.device_get(scene.params))
        respond = torch_sampling.TorchResponder(
            agent,
            model.eval(),
            temperature=scene.temperature,
            threads=torch_threads,
            batch=torch_batch,
        )
        return HostPeer(scene, FaissIndex, respond)
    cls = {"host_loop": HostLoop, "host_generate": WholeGenerate}[name]
    width = scene.parts.setting(scene.shape).limits.prompt_width
    respond = cls(scene.parts.agent, scene.params, scene.mesh, rows=scene.group, width=width)
    respond.play_with(scene.ids, scene.seed, scene.temperature)
    return HostPeer(scene, NumpyIndex, respond)


def _make_contestant(scene: Scene, name: str) -> tuple[HostPeer, timing.Contestant, timing.Result]:
    """A peer, how to run it, and what to note of it."""

    def make(threads: int = 1, size: int = 0) -> tuple[HostPeer, timing.Contestant]:
        peer = make_peer(name, scene, torch_threads=threads, torch_batch=size)
        return peer, timing.Contestant(peer.run, peer.prepare)

    if name != "torch_faiss":
        return *make(), {}
    total = len(scene.aliases)
    sizes = sorted({size for size in (64, total) if size <= total}, reverse=True)
    setting, tried = timing.find_torch_setting(lambda *s: make(*s)[1], sizes, name)
    peer, contestant = make(setting["threads"], setting["batch"])
    return peer, contestant, setting | {"seconds_by_setting": tried}


def same_answers(trajectories: Trajectory, episodes: list[HostEpisode]) -> float:
    """Share of the questions to which both gave the same answer, token for token."""
    answers, lengths = jax.device_get((trajectories.answers, trajectories.answer_lengths))
    same = [
        answers[i, q, : lengths[i, q]].tolist() == answer
        for i, episode in enumerate(episodes)
        for q, answer in enumerate(episode.answers)
    ]
    return float(np.mean(same))


def run(scene: Scene, clock: timing.CompileClock, *, runs: int, peers=PEERS) -> timing.Result:
    """All comparisons of the suite."""
    ours = Ours(scene)
    with clock.of("rollout"):
        ours.run()
    contestants, players = {"ours": timing.Contestant(ours.run)}, {}
    results: timing.Result = {}
    more: dict[str, timing.Result] = {name: {} for name in peers}
    for name in peers:
        try:
            players[name], contestants[name], more[name] = _make_contestant(scene, name)
        except ImportError as error:
            results[name] = timing.missing(error)
    seconds = timing.measure(contestants, runs=runs, label="rollout")
    turns = jax.device_get(ours.trajectories.turns)
    for name, player in players.items():
        comparison = timing.compare(
            seconds["ours"], seconds[name], work=len(scene.aliases), unit="trajectories"
        )
        results[name] = comparison | {
            "same_answers": same_answers(ours.trajectories, player.played),
            "ours_turns": int(turns.live.sum()),
            "peer_turns": len(player.turns),
            "ours_tokens": int(turns.response_lengths[turns.live].sum()),
            "peer_tokens": sum(len(turn.reply.tokens) for turn in player.turns),
            **more[name],
        }
    return {name: results[name] for name in peers}
