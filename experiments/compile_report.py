"""Compiles the programs of a training run for a TPU topology, on a machine without one.

    python experiments/compile_report.py --config=experiments/configs/published.py:qwen3_8b \
        --topology=v5e:8x8 --config.mesh.fsdp=16 --config.mesh.tensor=4 --json=report.json

For each phase (SFT step, rollout, PPO update) it tells whether the program fits, what the memory
of a chip goes to, exact FLOPs, the collectives of the compiled program, and a roofline model of
the step time with its assumptions; it ends with status 1 where one does not fit. `--search` tries
mesh shapes and micro-batches. The compiler is the real one (`pip install -e '.[tpu]'`); step times
are modelled, not measured.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

# Without a TPU JAX would look for one for a minute; the compiler for it needs none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import tqdm
from absl import flags as absl_flags
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from atommem_jax.agent import build, validate
from atommem_jax.config import ConfigError, Experiment, check, parse
from atommem_jax.learning import microbatches
from atommem_jax.model import attention
from atommem_jax.model.transformer import without_adapters
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import rules
from atommem_jax.tasks import encoding
from atommem_jax.tasks.encoding import EpisodeShape
from atommem_jax.tpu_model import flops as flops_lib
from atommem_jax.tpu_model import hardware, hlo, lowering, presentation, roofline
from atommem_jax.tpu_model.flops import Rows
from experiments import flags

CONFIG = flags.define_config("experiments/configs/published.py:qwen3_8b")
TOPOLOGY = absl_flags.DEFINE_string("topology", "v5e:8x8", "TPU generation and topology.")
SLICES = absl_flags.DEFINE_integer("slices", 1, "Slices, joined by the data-centre network.")
PHASES = absl_flags.DEFINE_list("phase", list(lowering.PHASES), "Phases to compile.")
JSON = absl_flags.DEFINE_string("json", None, "Where the figures are written.")
SEARCH = absl_flags.DEFINE_bool("search", False, "Try mesh shapes and micro-batch sizes.")
TURNS = absl_flags.DEFINE_integer("turns", 11, "Turns of a trajectory (paper: 10.9 calls a task).")
PROMPT = absl_flags.DEFINE_integer("prompt_tokens", 0, "Mean prompt; 0: three quarters of P.")
RESPONSE = absl_flags.DEFINE_integer("response_tokens", 0, "Mean response; 0: a quarter of R.")
LONGEST = absl_flags.DEFINE_integer("longest_response", 0, "Decode steps a turn; 0: half of R.")
QUICK = absl_flags.DEFINE_bool("quick", False, "Compile with least effort, as for a fit check.")

GIB = presentation.GIB
_QUICK_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: flags start with --; see --help")
    for phase in PHASES.value:
        check(
            phase in lowering.PHASES,
            f"--phase={phase}: the phases are {', '.join(lowering.PHASES)}",
        )
    topology = hardware.parse_topology(TOPOLOGY.value, SLICES.value)
    config = parse(CONFIG.value)
    devices = hardware.get_topology(topology)
    fits = True
    if SEARCH.value:
        report: dict[str, Any] = search(config, topology, devices, PHASES.value)
    else:
        phases, mesh = compile_phases(config, topology, devices, PHASES.value)
        print(presentation.render(phases, topology, dict(mesh.shape)))
        report = describe(config, topology, mesh, phases)
        fits = all(phase.fits for phase in phases)
    if JSON.value:
        with open(JSON.value, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
        print(f"figures: {JSON.value}")
    if not fits:
        sys.exit(1)


def describe(config, topology, mesh: Mesh, phases) -> dict[str, Any]:
    """The report of one mesh as plain data."""
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "microbatch_rows": config.rl.ppo.microbatch_rows,
        "rollout_microbatch": config.rollout.microbatch,
        "quick": QUICK.value,
        **presentation.to_json(phases),
    }


def compile_phases(
    config: Experiment, topology: hardware.Topology, devices: Sequence[Any], names: Sequence[str]
) -> tuple[list[presentation.Phase], Mesh]:
    """Lowers and compiles each phase for the mesh of the config.

    Raises ConfigError for a mesh that the topology, the model or a batch cannot have.
    """
    config = prepare(config)
    mesh = make_mesh(config, topology, devices)
    validate.validate(config)
    validate.validate_devices(config, mesh.shape[rules.DATA], mesh.shape[rules.FSDP])
    parts, shape = load_agent(config)
    phases = []
    progress = tqdm.tqdm(names, disable=len(names) < 2 and not sys.stderr.isatty())
    try:
        for name in progress:
            progress.set_description(f"{name} for {topology.name}")
            program = lowering.programs(config, parts, shape, mesh, [name])[name]
            phases.append(compile_phase(name, program, config, parts, shape, topology, mesh))
    except ValueError as error:  # a rule of sharding that does not divide
        raise ConfigError(str(error)) from error
    return phases, mesh


def prepare(config: Experiment) -> Experiment:
    """A copy with the choices that a TPU would make at run time."""
    long = config.shape is not None and config.shape["chunk_length"] >= 1024
    if config.model.attention == "auto" and long:
        return config.replace({"model.attention": "splash"})
    return config


def make_mesh(config: Experiment, topology: hardware.Topology, devices: Sequence[Any]) -> Mesh:
    """The mesh of the config on the devices of a topology; with all of them."""
    c = config.mesh
    slices = max(topology.slices, c.slices)
    valid = hardware.list_meshes(topology.devices, slices=slices)
    hint = (
        f"{topology.name} x {topology.slices} slices has {topology.devices} devices; valid "
        f"mesh.data x mesh.fsdp x mesh.tensor are {', '.join('x'.join(map(str, m)) for m in valid)}"
    )
    try:
        mesh = mesh_lib.make_mesh(c.data, c.fsdp, c.tensor, slices=slices, devices=devices)
    except ValueError as error:
        raise ConfigError(f"{error}. {hint}") from error
    check(mesh.size == topology.devices, f"the mesh uses {mesh.size} devices. {hint}")
    return mesh


def load_agent(config: Experiment) -> tuple[build.Parts, EpisodeShape]:
    """What is trained, and the sizes of its episodes: of `config.shape`, or of the data."""
    if config.shape is not None:
        return lowering.make_parts(config), EpisodeShape(**config.shape)
    dataset = build.load_dataset(config, flags.DATA_ROOT.value)
    tokenizer = build.fit_tokenizer(config, dataset)
    shape = encoding.fit_shape(dataset.split("train"), tokenizer)
    return build.build(config, tokenizer), shape


def compile_phase(
    name: str,
    program: lowering.Program,
    config: Experiment,
    parts: build.Parts,
    shape: EpisodeShape,
    topology: hardware.Topology,
    mesh: Mesh,
) -> presentation.Phase:
    """Compiles one program and models its step."""
    work = Work(config, parts, shape, mesh, program.rows)
    flops = work.flops(name)
    split = work.split(name, program)
    limit = topology.generation.hbm_limit_gib
    started = time.perf_counter()
    if QUICK.value:
        jax.config.update("jax_exec_time_optimization_effort", -1.0)
    lowered = program.lower()
    try:
        compiled = lowered.compile(compiler_options=_QUICK_OPTIONS if QUICK.value else None)
    except JaxRuntimeError as error:
        overflow = presentation.parse_overflow(str(error))
        if overflow is None:
            raise
        return presentation.Phase(
            name, overflow.required_gib, limit, flops, split=split, overflow=overflow
        )
    seconds = time.perf_counter() - started
    tqdm.tqdm.write(f"{name}: lowered and compiled in {seconds:.0f} s", file=sys.stderr)
    sizes = compiled.memory_analysis()
    hbm = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    ) / GIB
    traffic = hlo.read(
        compiled.as_text(), dict(mesh.shape), work.trips(name), slices=topology.slices
    )
    estimate = roofline.estimate(work.parts(name, traffic, flops), topology, dict(mesh.shape))
    return presentation.Phase(name, hbm, limit, flops, split, traffic, estimate)


class Work:
    """How much there is to do in a step, from the flags that describe trajectories."""

    def __init__(self, config, parts, shape, mesh, rows):
        self.config, self.rows = config, rows
        self.model = parts.agent.model.config
        self.played = self.model
        if self.model.dtype == "float32":  # adapters are merged
            self.played = without_adapters(parts.agent.model).config
        self.sizes = parts.setting(shape).config
        self.mesh = dict(mesh.shape)
        self.shares = mesh_lib.batch_shards(mesh)
        limit = config.rollout.response_length
        self.prompt = PROMPT.value or max(self.sizes.prompt_width * 3 // 4, 1)
        self.response = RESPONSE.value or max(limit // 4, 1)
        self.steps = LONGEST.value or max(limit // 2, 1)
        self.blocked = self.model.attention == "splash"
        check(
            self.prompt <= self.sizes.prompt_width,
            f"--prompt_tokens={self.prompt}: the prompt has at most {self.sizes.prompt_width}",
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
        full = self.sizes.prompt_width + self.config.rollout.response_length - 1
        section = self.config.sft if name == "sft" else self.config.rl.ppo
        multiple = attention.row_multiple(self.model.attention, full)
        widths = microbatches.list_widths(full, multiple, section.length_buckets)
        fed = self.prompt + self.response - 1
        width = next(w for w in widths if w >= fed)
        return [
            Rows(
                self.rows * TURNS.value,
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
            prompt_width=self.sizes.prompt_width,
            limit=self.config.rollout.response_length,
        )

    @property
    def groups(self) -> int:
        """Groups that a share of the batch plays one after the other."""
        share, group = self.rows // self.shares, self.config.rollout.microbatch
        return share // group if 0 < group < share else 1

    def microbatches(self, name: str) -> int:
        """Of a step, that all devices take part in."""
        return -(-self.rows * TURNS.value // self._microbatch_rows(name))

    def trips(self, name: str) -> dict[str, int]:
        """How often loops run whose number of rounds the program does not say."""
        if name == "rollout":
            return {"turns": TURNS.value, "decode": self.steps}
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
            reference=bool(ppo.kl_coef),
            blocked=self.blocked,
            chunked=chunked,
        )

    def _prefill(self) -> flops_lib.Flops:
        return TURNS.value * flops_lib.prefill(self.played, [self._played()], blocked=self.blocked)

    def _decode(self) -> flops_lib.Flops:
        return TURNS.value * flops_lib.decode(self.played, [self._played()], steps=self.steps)

    def split(self, name: str, program: lowering.Program) -> dict[str, float]:
        """GiB a device of what is known by its shape."""
        if name == "rollout":
            params = flops_lib.count_params(self.model) / self.mesh[rules.TENSOR]
            stored = presentation.device_bytes(program.state)
            width = 2 if self.config.rollout.param_dtype == "bfloat16" else 4
            group = self.config.rollout.microbatch or self.rows // self.shares
            slots = self.sizes.prompt_width + self.config.rollout.response_length
            rows = min(group, self.rows // self.shares) * self.shares
            placement = roofline.Placement(self.shares, self.mesh[rules.TENSOR])
            return {
                "parameters": (params * width + stored) / GIB,
                "KV cache": roofline.cache_bytes(self.model, placement, rows, slots) / GIB,
                "memory tables": self._table_bytes() / GIB,
            }
        trained = presentation.device_bytes(program.state.params) / GIB
        return {
            "parameters": trained + presentation.device_bytes(program.frozen) / GIB,
            "optimiser": presentation.device_bytes(program.state.opt_state) / GIB,
            "gradients": trained,
        }

    def _table_bytes(self) -> float:
        s = self.sizes
        slot = s.entry_length * 4 + s.key_dim * 4 + 13
        return (self.rows // self.shares) * (s.slots * slot + 4 * s.scratchpad_length)

    def parts(self, name: str, traffic: hlo.Traffic, flops: flops_lib.Flops) -> list[roofline.Part]:
        """What a step consists of, for the roofline."""
        tensor, fsdp = self.mesh[rules.TENSOR], self.mesh[rules.FSDP]
        if name == "rollout":
            placement = roofline.Placement(self.shares, tensor)
            turns, slots = (
                TURNS.value,
                self.sizes.prompt_width + self.config.rollout.response_length,
            )
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
                        self.steps,
                        param_dtype=dtype,
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


def search(
    config: Experiment, topology: hardware.Topology, devices: Sequence[Any], names: Sequence[str]
) -> dict[str, Any]:
    """Tries mesh shapes and micro-batches; prints those that fit, the best modelled first."""
    rows = sorted({config.rl.ppo.microbatch_rows, 1, 2})
    if set(names) == {"rollout"}:  # it has no micro-batches
        rows = rows[:1]
    candidates, reports = [], []
    grid = list(
        itertools.product(hardware.list_meshes(topology.devices, slices=topology.slices), rows)
    )
    for (data, fsdp, tensor), count in tqdm.tqdm(grid, desc="meshes"):
        trial = config.replace(
            {
                "mesh.data": data,
                "mesh.fsdp": fsdp,
                "mesh.tensor": tensor,
                "mesh.slices": topology.slices,
                "rl.ppo.microbatch_rows": count,
                "sft.microbatch_rows": count,
            }
        )
        label = f"mesh {data} x {fsdp} x {tensor}, {count} rows a micro-batch"
        try:
            phases, mesh = compile_phases(trial, topology, devices, names)
        except ConfigError as error:
            tqdm.tqdm.write(f"{label}: left out: {error}", file=sys.stderr)
            continue
        candidates.append((label, phases))
        reports.append(describe(trial, topology, mesh, phases))
    check(bool(candidates), "no mesh shape suits this config; see the reasons above")
    print(presentation.render_search(candidates))
    return {"candidates": reports}


if __name__ == "__main__":
    flags.run(main)
