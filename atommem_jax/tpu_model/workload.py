"""How much there is to do in a step: FLOPs, bytes and rounds of loops, from mean lengths."""

import dataclasses
import functools
import math

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
    longest: int = 0  # of a turn's responses, in tokens; 0 for half of R
    tokens_a_pass: float = 1.0  # that a forward pass adds to a row, with drafts


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
        rollouts = mesh_lib.reshape_for_rollouts(mesh, config.mesh.rollout_tensor)
        self.rollout_mesh = dict(rollouts.shape)
        self.rollout_shares = mesh_lib.batch_shards(rollouts)
        limit = config.rollout.response_length
        self.prompt = lengths.prompt or max(self.limits.prompt_width * 3 // 4, 1)
        self.response = lengths.response or max(limit // 4, 1)
        self.steps = lengths.longest or max(limit // 2, 1)
        self.tokens_a_pass = lengths.tokens_a_pass
        template = parts.agent.template
        asked = shape.questions * (template.question.shape[0] + shape.question_length)
        self.prefix_widths = template.prefix.shape[0], asked
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
        most = config.rollout.draft + 1
        check(
            1.0 <= self.tokens_a_pass <= most,
            f"--tokens_a_pass={self.tokens_a_pass}: with rollout.draft={config.rollout.draft} a "
            f"pass adds 1 to {most} tokens; raise rollout.draft, or lower it",
        )

    def axes(self, name: str) -> dict[str, int]:
        """Sizes of the axes of the mesh that a phase runs on."""
        return self.rollout_mesh if name == "rollout" else self.mesh

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
        """The turns of all trajectories, as the rollout reads and answers them."""
        full, prefix = self.limits.prompt_width, self._prefix()
        multiple = attention.row_multiple(self.model.attention, full)
        widths = groups.list_widths(full, multiple, self.config.rollout.prompt_buckets)
        read = 0 if prefix is None else round(self.prompt / full * prefix.prompt)
        return Rows(
            self.rows,
            self.prompt,
            self.response,
            prompt_width=min(next(w for w in widths if w >= self.prompt - read), full),
            limit=self.config.rollout.response_length,
            prefix=read,
            prefix_width=0 if prefix is None else prefix.before + prefix.prompt_width,
        )

    def _prefix(self) -> Rows | None:
        """What prompts begin with where it is read once a trajectory (`model.prefix`)."""
        if not self.config.rollout.cache_prefix:
            return None
        fixed, questions = self.prefix_widths
        multiple = attention.row_multiple(self.model.attention, questions)
        wide = -(-(fixed + questions) // multiple) * multiple - fixed
        return Rows(self.rows, fixed + questions, 0, prompt_width=wide, prefix=fixed)

    @property
    def groups(self) -> int:
        """Groups that a share of the batch answers one after the other."""
        share, group = self.rows // self.rollout_shares, self.config.rollout.microbatch
        return -(-share // group) if 0 < group < share else 1

    @property
    def passes(self) -> int:
        """Of a turn, after the prompt's, which gives the first token."""
        return max(math.ceil((self.steps - 1) / self.tokens_a_pass), 1)

    @property
    def slots(self) -> int:
        """Of the cache of a row."""
        return self._played().slots + self.config.rollout.draft

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
        turns, once = [self._played()], [] if (prefix := self._prefix()) is None else [prefix]
        read = functools.partial(flops_lib.prefill, self.played, blocked=self.blocked)
        return self.turns * read(turns) + read(once)

    def _decode(self) -> flops_lib.Flops:
        return self.turns * flops_lib.decode(
            self.played, [self._played()], passes=self.passes, draft=self.config.rollout.draft
        )

    def split(self, name: str, program: lowering.Program) -> dict[str, float]:
        """GiB a device of what is known by its shape."""
        if name == "rollout":
            placement = self._rollout_placement()
            params = flops_lib.count_params(self.model) / placement.tensor
            stored = presentation.device_bytes(program.state)
            width = roofline.bytes_of(self.config.rollout.param_dtype)
            share, kept = self.rows // self.rollout_shares, self.config.rollout.cache_dtype
            rows = min(self.config.rollout.microbatch or share, share) * self.rollout_shares
            cache = roofline.cache_bytes(self.model, placement, rows, self.slots, cache_dtype=kept)
            return {
                "parameters": (params * width + stored) / GIB,
                "KV cache": cache / GIB,
                "memory tables": self._table_bytes() / GIB,
            }
        trained = presentation.device_bytes(program.state.params) / GIB
        return {
            "parameters": trained + presentation.device_bytes(program.frozen) / GIB,
            "optimiser": presentation.device_bytes(program.state.opt_state) / GIB,
            "gradients": trained,
        }

    def _rollout_placement(self) -> roofline.Placement:
        return roofline.Placement(self.rollout_shares, self.rollout_mesh[rules.TENSOR])

    def _table_bytes(self) -> float:
        s = self.limits.memory
        slot = s.entry_length * 4 + s.key_dim * 4 + 13
        return (self.rows / self.shares) * (s.slots * slot + 4 * s.scratchpad_length)

    def parts(self, name: str, traffic: hlo.Traffic, flops: flops_lib.Flops) -> list[roofline.Part]:
        """What a step consists of, for the roofline."""
        tensor, fsdp = self.mesh[rules.TENSOR], self.mesh[rules.FSDP]
        if name == "rollout":
            return self._rollout_parts(traffic)
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

    def _rollout_parts(self, traffic: hlo.Traffic) -> list[roofline.Part]:
        placement, played, rollout = self._rollout_placement(), self._played(), self.config.rollout
        placed = roofline.Part(
            "placing weights", traffic=roofline.traffic_of(traffic, outside=["turns", "prefix"])
        )
        # What is not of the model (memory, prompts, records) is taken to cost nothing but traffic.
        prefill = roofline.Part(
            "prefill",
            self._prefill(),
            self.turns
            * roofline.memory_of_prefill(
                self.model,
                placement,
                [played],
                groups=self.read_parts,
                cache_dtype=rollout.cache_dtype,
            ),
            roofline.traffic_of(traffic, inside=["turns", "prefix"], outside=["decode"]),
        )
        passes = self.turns * self.groups * self.passes
        decode = roofline.Part(
            "decode",
            self._decode(),
            roofline.memory_of_decoding(
                self.model,
                placement,
                self.rows / self.groups,
                self.slots,
                passes,
                fed=rollout.draft + 1,
                param_dtype=rollout.param_dtype,
                cache_dtype=rollout.cache_dtype,
            ),
            roofline.traffic_of(traffic, inside=["decode"]),
        )
        return [placed, prefill, decode]

    @property
    def read_parts(self) -> int:
        """Parts of a turn's batch that a share reads the prompts of, one after the other."""
        share = self.rows // self.rollout_shares
        group = min(self.config.rollout.microbatch or share, share)
        rows = self.config.rollout.read_rows
        return self.groups * (-(-group // rows) if 0 < rows < group else 1)
