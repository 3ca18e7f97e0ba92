"""How much there is to do in a step: FLOPs, bytes and rounds of loops, from mean lengths."""

import dataclasses

from jax.sharding import Mesh

from atommem_jax.agent import build
from atommem_jax.config import Experiment, check
from atommem_jax.model import attention, groups
from atommem_jax.model.transformer import without_adapters
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import rules
from atommem_jax.tasks.encoding import EpisodeShape
from atommem_jax.tpu_model import flops as flops_lib
from atommem_jax.tpu_model import hlo, lowering, presentation, roofline
from atommem_jax.tpu_model.flops import Rows

GIB = presentation.GIB


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What trajectories are like on average, where the data does not say."""

    turns: int = 11  # of a trajectory (paper: 10.9 calls a task)
    prompt: int = 0  # mean tokens; 0 for three quarters of P
    response: int = 0  # mean tokens; 0 for a quarter of R
    longest: int = 0  # decode steps a turn; 0 for half of R


class Workload:
    """How much there is to do in a step of a training run."""

    def __init__(
        self,
        config: Experiment,
        parts: build.Parts,
        shape: EpisodeShape,
        mesh: Mesh,
        rows: int,
        lengths: Lengths,
    ):
        """rows: trajectories of a step, over all devices."""
        self.config, self.rows, self.turns = config, rows, lengths.turns
        self.model = parts.agent.model.config
        self.played = self.model
        if self.model.dtype == "float32":  # adapters are merged
            self.played = without_adapters(parts.agent.model).config
        self.limits = parts.setting(shape).limits
        self.mesh = dict(mesh.shape)
        self.shares = mesh_lib.batch_shards(mesh)
        limit = config.rollout.response_length
        self.prompt = lengths.prompt or max(self.limits.prompt_width * 3 // 4, 1)
        self.response = lengths.response or max(limit // 4, 1)
        self.steps = lengths.longest or max(limit // 2, 1)
        self.blocked = self.model.attention == "splash"
        check(
            self.prompt <= self.limits.prompt_width,
            f"--prompt_tokens={self.prompt}: the prompt has at most {self.limits.prompt_width}",
        )
        check(
            self.response <= self.steps <= limit,
            f"--response_tokens={self.response} --longest_response={self.steps}: allowed is "
            f"response <= longest <= rollout.response_length={limit}",
        )

    def _microbatch_rows(self, name):
        section = self.config.sft if name == "sft" else self.config.rl.ppo
        return section.microbatch_rows * self.shares

    def _scored(self, name) -> list[Rows]:
        """Rows of an update: every turn of every trajectory, at the least width that holds it."""
        full = self.limits.prompt_width + self.config.rollout.response_length - 1
        section = self.config.sft if name == "sft" else self.config.rl.ppo
        multiple = attention.row_multiple(self.model.attention, full)
        widths = groups.list_widths(full, multiple, section.length_buckets)
        fed = self.prompt + self.response - 1
        width = next(w for w in widths if w >= fed)
        return [
            Rows(
                self.rows * self.turns,
                self.prompt,
                self.response,
                width=width,
                limit=self.config.rollout.response_length,
            )
        ]

    def _played(self) -> Rows:
        return Rows(
            self.rows,
            self.prompt,
            self.response,
            prompt_width=self.limits.prompt_width,
            limit=self.config.rollout.response_length,
        )

    @property
    def groups(self) -> int:
        """Groups that a share of the batch answers one after the other."""
        share, group = self.rows // self.shares, self.config.rollout.microbatch
        return -(-share // group) if 0 < group < share else 1

    @property
    def passes(self) -> int:
        """Of a turn, after the prompt's, which gives the first token."""
        return max(self.steps - 1, 1)

    def microbatches(self, name: str) -> int:
        """Of a step, that all devices take part in."""
        return -(-self.rows * self.turns // self._microbatch_rows(name))

    def trips(self, name: str) -> dict[str, int]:
        """How often loops run whose number of rounds the program does not say."""
        if name == "rollout":
            return {"turns": self.turns, "groups": self.groups, "decode": self.passes}
        return {"microbatches": self.microbatches(name)}

    def flops(self, name: str) -> flops_lib.Flops:
        """Of one step, on all devices."""
        chunked = 0 < self.config.rollout.score_chunk < self.config.rollout.response_length
        if name == "rollout":
            return self._prefill() + self._decode()
        if name == "sft":
            return flops_lib.sft(
                self.model, self._scored(name), blocked=self.blocked, chunked=chunked
            )
        ppo = self.config.rl.ppo
        return flops_lib.update(
            self.model,
            self._scored(name),
            epochs=ppo.epochs,
            scorings=ppo.needs_reference + bool(ppo.importance_cap),
            blocked=self.blocked,
            chunked=chunked,
        )

    def _prefill(self) -> flops_lib.Flops:
        return self.turns * flops_lib.prefill(self.played, [self._played()], blocked=self.blocked)

    def _decode(self) -> flops_lib.Flops:
        return self.turns * flops_lib.decode(self.played, [self._played()], steps=self.steps)

    def split(self, name: str, program: lowering.Program) -> dict[str, float]:
        """GiB a device of what is known by its shape."""
        if name == "rollout":
            params = flops_lib.count_params(self.model) / self.mesh[rules.TENSOR]
            stored = presentation.device_bytes(program.state)
            width = roofline.bytes_of(self.config.rollout.param_dtype)
            kept = self.config.rollout.cache_dtype
            group = self.config.rollout.microbatch or self.rows // self.shares
            slots = self.limits.prompt_width + self.config.rollout.response_length
            rows = min(group, self.rows // self.shares) * self.shares
            placement = roofline.Placement(self.shares, self.mesh[rules.TENSOR])
            return {
                "parameters": (params * width + stored) / GIB,
                "KV cache": roofline.cache_bytes(self.model, placement, rows, slots, kept) / GIB,
                "memory tables": self._table_bytes() / GIB,
            }
        trained = presentation.device_bytes(program.state.params) / GIB
        return {
            "parameters": trained + presentation.device_bytes(program.frozen) / GIB,
            "optimiser": presentation.device_bytes(program.state.opt_state) / GIB,
            "gradients": trained,
        }

    def _table_bytes(self) -> float:
        s = self.limits.memory
        slot = s.entry_length * 4 + s.key_dim * 4 + 13
        return (self.rows // self.shares) * (s.slots * slot + 4 * s.scratchpad_length)

    def parts(self, name: str, traffic: hlo.Traffic, flops: flops_lib.Flops) -> list[roofline.Part]:
        """What a step consists of, for the roofline."""
        tensor, fsdp = self.mesh[rules.TENSOR], self.mesh[rules.FSDP]
        if name == "rollout":
            placement = roofline.Placement(self.shares, tensor)
            turns = self.turns
            slots = self.limits.prompt_width + self.config.rollout.response_length
            dtype = self.config.rollout.param_dtype
            return [
                roofline.Part(
                    "placing weights",
                    traffic=roofline.traffic_of(traffic, outside=["turns"]),
                ),
                roofline.Part(
                    "prefill",
                    self._prefill(),
                    turns
                    * roofline.memory_of_prefill(
                        self.model, placement, [self._played()], groups=self.groups
                    ),
                    roofline.traffic_of(traffic, inside=["prefill"]),
                ),
                roofline.Part(
                    "decode",
                    self._decode(),
                    turns
                    * self.groups
                    * roofline.memory_of_decoding(
                        self.model,
                        placement,
                        self.rows / self.groups,
                        slots,
                        self.passes,
                        param_dtype=dtype,
                        cache_dtype=self.config.rollout.cache_dtype,
                    ),
                    roofline.traffic_of(traffic, inside=["decode"]),
                ),
            ]
        placement = roofline.Placement(self.shares, tensor, fsdp)
        return [
            roofline.Part(
                "score and backward",
                flops,
                roofline.memory_of_scoring(
                    self.model,
                    placement,
                    self._scored(name),
                    microbatches=self.microbatches(name),
                    train=True,
                ),
                roofline.traffic_of(traffic, inside=["microbatches"]),
            ),
            roofline.Part(
                "optimiser",
                hbm_bytes=roofline.memory_of_optimizer(self.model, placement),
                traffic=roofline.traffic_of(traffic, outside=["microbatches"]),
            ),
        ]
