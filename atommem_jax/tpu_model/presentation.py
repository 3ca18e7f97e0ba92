"""What the compile report prints and writes: a table a phase, JSON, and what to do where it
does not fit."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from atommem_jax.tpu_model.flops import Flops
from atommem_jax.tpu_model.hardware import Topology
from atommem_jax.tpu_model.hlo import Traffic
from atommem_jax.tpu_model.loops import Loop
from atommem_jax.tpu_model.roofline import Estimate

GIB = 1024**3

REMEDIES: Mapping[str, str] = {
    "parameters": "raise mesh.fsdp or mesh.tensor; for a rollout set "
    "rollout.param_dtype='bfloat16'",
    "optimiser": "raise mesh.fsdp; set optimizer.moment_dtype='bfloat16' or "
    "optimizer.name='adafactor'",
    "gradients": "raise mesh.fsdp or mesh.tensor",
    "KV cache": "lower rollout.microbatch; raise mesh.tensor (up to model.num_kv_heads) or the "
    "number of devices",
    "memory tables": "lower rollout.microbatch, memory.slots, memory.entry_length or "
    "memory.key_dim",
    "activations": "lower rl.ppo.microbatch_rows or sft.microbatch_rows; set model.remat=True and "
    "model.remat_policy='full'; model.attention='splash' for long prompts; raise mesh.tensor",
    "logits": "set rollout.score_chunk to fewer response tokens; raise mesh.tensor",
}
"""Contributor -> config fields that reduce it."""

SPLIT = ("parameters", "optimiser", "gradients", "KV cache", "memory tables", "activations")
"""Into what the memory of a phase is split, in the order of the table."""


# ------------------------------------------------------------------ programs that do not fit


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One of the largest buffers that XLA lists; `contributor` is a key of REMEDIES."""

    gib: float
    shape: str
    op_name: str

    @property
    def contributor(self) -> str:
        """Guessed from where the buffer was traced; see REMEDIES."""
        return guess_contributor(self.op_name)


@dataclasses.dataclass(frozen=True)
class Overflow:
    """A program that needs more memory than a device has.

    Attributes:
      required_gib: by the program.
      available_gib: that the compiler allows.
      allocations: the largest, as far as the message lists them.
    """

    required_gib: float
    available_gib: float
    allocations: tuple[Allocation, ...] = ()

    @property
    def excess_gib(self) -> float:
        """By which it does not fit."""
        return self.required_gib - self.available_gib


_REQUIRED = (
    # libtpu 0.0.42
    re.compile(
        r"required for ([\w ]{1,80}?) \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)(\w?)"
    ),
    # longer messages of the TPU runtime
    re.compile(r"(Used) ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)
_ALLOCATION = re.compile(
    r"^[ \t]*+\d++\. Size: ([\d.]+)([KMGT]?)[ \t]*+$(.*?)(?=^[ \t]*+\d++\. Size:|\Z)",
    re.MULTILINE | re.DOTALL,
)
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": GIB, "T": 1024**4}


def parse_overflow(message: str) -> Overflow | None:
    """Reads the RESOURCE_EXHAUSTED error of a compilation; None for any other message."""
    for pattern in _REQUIRED:
        found = pattern.search(message)
        if found:
            break
    else:
        return None
    required, available = _gib(found[2], found[3]), _gib(found[4], found[5])
    allocations = []
    for size, unit, rest in _ALLOCATION.findall(message):
        shape = re.search(r"Shape: (\S+)", rest)
        op_name = re.search(r'op_name="([^"]*)"', rest)
        allocations.append(
            Allocation(_gib(size, unit), shape[1] if shape else "", op_name[1] if op_name else "")
        )
    return Overflow(required, available, tuple(allocations))


def _gib(number: str, unit: str) -> float:
    return float(number) * _UNITS.get(unit, 1) / GIB


def guess_contributor(op_name: str) -> str:
    """Which key of REMEDIES a buffer belongs to, from the scopes that it was traced in."""
    for pattern, contributor in (
        (r"optimizer|opt_state", "optimiser"),
        (r"score_chunks|logits|log_softmax", "logits"),
        (r"retrieve|transition|memory", "memory tables"),
        (r"dynamic_update_slice.*|decode.*(key|value|cache)", "KV cache"),
        (r"params", "parameters"),
    ):
        if re.search(pattern, op_name):
            return contributor
    return "activations"


def explain_overflow(overflow: Overflow, split: Mapping[str, float] | None = None) -> list[str]:
    """Sentences: by how much, what the largest contributors are, and which fields reduce them.

    split: GiB by contributor, where they are known (parameters from shapes, say); what is left
      of the required memory counts as activations.
    """
    sizes = dict(split or {})
    rest = overflow.required_gib - sum(sizes.values())
    if rest > 0:
        sizes["activations"] = sizes.get("activations", 0.0) + rest
    lines = [
        f"does not fit: needs {overflow.required_gib:.2f} GiB a device, the compiler has "
        f"{overflow.available_gib:.2f}: {overflow.excess_gib:.2f} GiB too much"
    ]
    for allocation in overflow.allocations[:5]:
        lines.append(
            f"  {allocation.gib:8.2f} GiB  {allocation.contributor}: {allocation.shape} "
            f"{allocation.op_name}".rstrip()
        )
    for name, gib in sorted(sizes.items(), key=lambda item: -item[1]):
        if gib >= 0.05 * overflow.required_gib:
            lines.append(f"  {gib:8.2f} GiB  {name}: {REMEDIES.get(name, 'no field reduces it')}")
    return lines


# ------------------------------------------------------------------ sizes of arguments


def device_bytes(tree: Any) -> int:
    """Bytes of a pytree of arrays or ShapeDtypeStructs on one device, by their shardings.

    A leaf without a sharding is whole on every device.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


# ------------------------------------------------------------------ the report


@dataclasses.dataclass(frozen=True)
class Phase:
    """All that is known of one phase; memory is that of one device.

    Attributes:
      name: 'sft', 'rollout' or 'update'.
      hbm_gib: peak of the program.
      hbm_limit_gib: that the compiler allows.
      flops: of one step, over all devices.
      split: GiB by the names in SPLIT; the rest of `hbm_gib` is shown as activations.
      traffic: None where it was not compiled.
      estimate: None where the time was not modelled.
      overflow: what the compiler said where it does not fit.
    """

    name: str
    hbm_gib: float
    hbm_limit_gib: float
    flops: Flops
    split: Mapping[str, float] = dataclasses.field(default_factory=dict)
    traffic: Traffic | None = None
    estimate: Estimate | None = None
    overflow: Overflow | None = None

    @property
    def fits(self) -> bool:
        """Whether the compiler accepted it and it is within the limit."""
        return self.overflow is None and self.hbm_gib <= self.hbm_limit_gib

    @property
    def whole_split(self) -> dict[str, float]:
        """`split` in the order of SPLIT, with what it leaves over as activations."""
        sizes = {name: self.split.get(name, 0.0) for name in SPLIT}
        sizes["activations"] += max(self.hbm_gib - sum(sizes.values()), 0.0)
        return sizes


def to_json(phases: Sequence[Phase]) -> dict[str, Any]:
    """The report as plain data: `{"phases": {name: {...}}}`; sizes in GiB, times in seconds.

    `flops` are model FLOPs of a step; bytes of collectives are what one device sends in a step.
    """
    return {"phases": {phase.name: _phase_to_json(phase) for phase in phases}}


def _phase_to_json(phase: Phase) -> dict[str, Any]:
    time = phase.estimate
    return {
        "fits": phase.fits,
        "hbm_gib": phase.hbm_gib,
        "hbm_limit_gib": phase.hbm_limit_gib,
        "hbm_split_gib": phase.whole_split,
        "flops": phase.flops.model,
        "hardware_flops": phase.flops.hardware,
        "step_seconds": None if time is None else time.seconds,
        "mfu": None if time is None else time.mfu,
        "bottleneck": None if time is None else time.bottleneck,
        "parts": {} if time is None else {p.name: _part_to_json(p) for p in time.parts},
        "collectives": _collectives_to_json(phase.traffic),
        "unknown_loops": [
            loop.path or loop.name
            for loop in (phase.traffic.unknown_loops if phase.traffic else ())
        ],
        "assumptions": [] if time is None else list(time.assumptions),
    }


def _part_to_json(part) -> dict[str, Any]:
    return {
        "seconds": part.seconds,
        "compute_seconds": part.compute,
        "memory_seconds": part.memory,
        "network_seconds": part.hidden + part.exposed,
        "bottleneck": part.bottleneck,
    }


def _collectives_to_json(traffic: Traffic | None) -> dict[str, Any]:
    if traffic is None:
        return {}
    result: dict[str, Any] = {
        kind: {"count": total.count, "bytes": total.bytes, "axes": {}}
        for kind, total in traffic.totals().items()
    }
    for (kind, axes), total in traffic.by_kind_and_axes().items():
        result[kind]["axes"][axes] = {"count": total.count, "bytes": total.bytes}
    for kind, entry in result.items():
        entry["overlapped_bytes"] = sum(
            each.total for each in traffic.collectives if each.kind == kind and each.overlapped
        )
    return result


def render(phases: Sequence[Phase], topology: Topology, mesh: Mapping[str, int]) -> str:
    """The report as text: one block a phase, the assumptions once at the end."""
    devices = topology.generation.devices_per_chip
    shape = " x ".join(f"{name} {size}" for name, size in mesh.items())
    slices = f", {topology.slices} slices" if topology.slices > 1 else ""
    lines = [f"{topology.name}{slices}: {topology.chips} chips, mesh {shape}"]
    if devices > 1:
        lines.append(f"each chip is {devices} devices: figures are for a device, half a chip")
    for phase in phases:
        lines += ["", *_render_phase(phase)]
    assumptions = dict.fromkeys(
        line for phase in phases if phase.estimate for line in phase.estimate.assumptions
    )
    if assumptions:
        lines += ["", "assumptions", *(f"  - {line}" for line in assumptions)]
    return "\n".join(lines)


def _render_phase(phase: Phase) -> list[str]:
    rows: list[tuple[str, str]] = []
    if phase.overflow is not None:
        first, *more = explain_overflow(phase.overflow, phase.split)
        return [f"{phase.name}: {first}", *more]
    spare = phase.hbm_limit_gib - phase.hbm_gib
    verdict = f"fits, {spare:.2f} GiB to spare" if phase.fits else f"{-spare:.2f} GiB too much"
    rows.append(("HBM", f"{phase.hbm_gib:.2f} of {phase.hbm_limit_gib:.2f} GiB"))
    rows += [(f"  {name}", f"{gib:.2f} GiB") for name, gib in phase.whole_split.items() if gib]
    rows.append(("FLOPs", _render_flops(phase.flops)))
    if phase.traffic is not None:
        for (kind, axes), total in phase.traffic.by_kind_and_axes().items():
            size = _render_bytes(total.bytes)
            rows.append((kind, f"{size} a chip over {axes}, {total.count} times"))
        if not phase.traffic.collectives:
            rows.append(("collectives", "none"))
    if phase.estimate is not None:
        rows.append(
            (
                "modelled step",
                f"{_render_seconds(phase.estimate.seconds)}, MFU {phase.estimate.mfu:.1%}",
            )
        )
        for part in phase.estimate.parts:
            rows.append((f"  {part.name}", _render_part(part)))
    width = max(len(label) for label, _ in rows)
    lines = [f"{phase.name}: {verdict}", *(f"  {label:{width}}  {text}" for label, text in rows)]
    if phase.traffic is not None and phase.traffic.unknown_loops:
        lines.append(
            f"  counted once, for want of a trip count: {_names(phase.traffic.unknown_loops)}"
        )
    if not phase.fits:
        overflow = Overflow(phase.hbm_gib, phase.hbm_limit_gib)
        lines += explain_overflow(overflow, phase.whole_split)[1:]
    return lines


def _names(loops: Sequence[Loop]) -> str:
    return ", ".join(dict.fromkeys(loop.path or loop.name for loop in loops))


def _render_flops(flops: Flops) -> str:
    overhead = flops.hardware / flops.model - 1 if flops.model else 0.0
    return f"{flops.model:.4g} a step by the model; {flops.hardware:.4g} executed (+{overhead:.0%})"


def _render_part(part) -> str:
    spans = (
        f"compute {_render_seconds(part.compute)}",
        f"HBM {_render_seconds(part.memory)}",
        f"network {_render_seconds(part.hidden)} hidden + {_render_seconds(part.exposed)} exposed",
    )
    return f"{_render_seconds(part.seconds)}: {', '.join(spans)}; bound by {part.bottleneck}"


def _render_bytes(count: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 1024**2), ("KiB", 1024)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _render_seconds(seconds: float) -> str:
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def render_search(candidates: Sequence[tuple[str, Sequence[Phase]]]) -> str:
    """A line a candidate that fits, the least modelled time first; how many did not fit, last.

    candidates: (what was tried, its phases); a phase without an estimate counts no time.
    """
    fitting = [(name, phases) for name, phases in candidates if all(p.fits for p in phases)]

    def seconds(phases):
        return sum(phase.estimate.seconds for phase in phases if phase.estimate)

    fitting.sort(key=lambda item: seconds(item[1]))
    width = max((len(name) for name, _ in fitting), default=0)
    lines = []
    for name, phases in fitting:
        each = ", ".join(
            f"{phase.name} {_render_seconds(phase.estimate.seconds)} "
            f"(MFU {phase.estimate.mfu:.1%}, {phase.hbm_gib:.1f} GiB)"
            if phase.estimate
            else f"{phase.name} {phase.hbm_gib:.1f} GiB"
            for phase in phases
        )
        lines.append(f"{name:{width}}  {_render_seconds(seconds(phases))}: {each}")
    left = len(candidates) - len(fitting)
    lines.append(f"{left} of {len(candidates)} did not fit" if fitting else "none of them fits")
    return "\n".join(lines)
