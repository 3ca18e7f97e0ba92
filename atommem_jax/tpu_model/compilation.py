"""Compiles the programs of a training run for a topology, and models what a step would cost."""

import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import tqdm
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from atommem_jax.agent import build, validate
from atommem_jax.config import ConfigError, Experiment, check
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import rules
from atommem_jax.tasks import encoding
from atommem_jax.tasks.encoding import EpisodeShape
from atommem_jax.tpu_model import hardware, hlo, lowering, presentation, roofline
from atommem_jax.tpu_model.workload import GIB, Lengths, Workload

_QUICK_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for, and how.

    Attributes:
      devices: compile-only devices of the topology.
      quick: compile with least effort, as for a fit check.
      data_root: where prepared data lies, for configs that name some.
    """

    topology: hardware.Topology
    devices: Sequence[Any]
    lengths: Lengths = dataclasses.field(default_factory=Lengths)
    quick: bool = False
    data_root: str = "runs/data"


def compile_phases(
    config: Experiment, target: Target, names: Sequence[str]
) -> tuple[list[presentation.Phase], Mesh]:
    """Lowers and compiles each phase for the mesh of the config.

    Raises ConfigError for a mesh that the topology, the model or a batch cannot have.
    """
    config = prepare(config)
    mesh = make_mesh(config, target)
    validate.validate(config)
    validate.validate_devices(config, mesh.shape[rules.DATA], mesh.shape[rules.FSDP])
    parts, shape = load_agent(config, target.data_root)
    phases = []
    progress = tqdm.tqdm(names, disable=len(names) < 2 and not sys.stderr.isatty())
    try:
        for name in progress:
            progress.set_description(f"{name} for {target.topology.name}")
            program = lowering.programs(config, parts, shape, mesh, [name])[name]
            phases.append(compile_phase(name, program, config, parts, shape, target, mesh))
    except ValueError as error:  # a rule of sharding that does not divide
        raise ConfigError(str(error)) from error
    return phases, mesh


def describe(
    config: Experiment, target: Target, mesh: Mesh, phases: Sequence[presentation.Phase]
) -> dict[str, Any]:
    """The report of one mesh as plain data."""
    return {
        "topology": target.topology.name,
        "slices": target.topology.slices,
        "chips": target.topology.chips,
        "mesh": dict(mesh.shape),
        "microbatch_rows": config.rl.ppo.microbatch_rows,
        "rollout_microbatch": config.rollout.microbatch,
        "quick": target.quick,
        **presentation.to_json(phases),
    }


def search(
    config: Experiment, target: Target, names: Sequence[str]
) -> tuple[list[tuple[str, list[presentation.Phase]]], list[dict[str, Any]]]:
    """Tries mesh shapes and micro-batches: those that fit, by label, and their reports.

    Raises ConfigError where none fits.
    """
    topology = target.topology
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
            phases, mesh = compile_phases(trial, target, names)
        except ConfigError as error:
            tqdm.tqdm.write(f"{label}: left out: {error}", file=sys.stderr)
            continue
        candidates.append((label, phases))
        reports.append(describe(trial, target, mesh, phases))
    check(bool(candidates), "no mesh shape suits this config; see the reasons above")
    return candidates, reports


def prepare(config: Experiment) -> Experiment:
    """A copy with the choices that a TPU would make at run time."""
    long = config.shape is not None and config.shape["chunk_length"] >= 1024
    if config.model.attention == "auto" and long:
        return config.replace({"model.attention": "splash"})
    return config


def make_mesh(config: Experiment, target: Target) -> Mesh:
    """The mesh of the config on the devices of a topology; with all of them."""
    c, topology, devices = config.mesh, target.topology, target.devices
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


def load_agent(config: Experiment, data_root: str) -> tuple[build.Parts, EpisodeShape]:
    """What is trained, and the sizes of its episodes: of `config.shape`, or of the data."""
    if config.shape is not None:
        return lowering.make_parts(config), EpisodeShape(**config.shape)
    dataset = build.load_dataset(config, data_root)
    tokenizer = build.fit_tokenizer(config, dataset)
    shape = encoding.fit_shape(dataset.split("train"), tokenizer)
    return build.build(config, tokenizer), shape


def compile_phase(
    name: str,
    program: lowering.Program,
    config: Experiment,
    parts: build.Parts,
    shape: EpisodeShape,
    target: Target,
    mesh: Mesh,
) -> presentation.Phase:
    """Compiles one program and models its step."""
    topology = target.topology
    work = Workload(config, parts, shape, mesh, program.rows, target.lengths)
    flops = work.flops(name)
    split = work.split(name, program)
    limit = topology.generation.hbm_limit_gib
    started = time.perf_counter()
    if target.quick:
        jax.config.update("jax_exec_time_optimization_effort", -1.0)
    lowered = program.lower()
    try:
        compiled = lowered.compile(compiler_options=_QUICK_OPTIONS if target.quick else None)
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
    axes = work.axes(name)
    traffic = hlo.read(compiled.as_text(), axes, work.trips(name), slices=topology.slices)
    estimate = roofline.estimate(work.parts(name, traffic, flops), topology, axes)
    return presentation.Phase(name, hbm, limit, flops, split, traffic, estimate)
