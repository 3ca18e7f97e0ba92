"""How long a step would take on a TPU: a model with few, stated assumptions.

A phase is a list of parts that run one after the other (prefill, decode, score and backward,
optimiser). A part takes

    max(compute, memory, hidden collectives) + exposed collectives

where compute is hardware FLOPs over peak, memory is bytes moved between HBM and the chip over its
bandwidth, and collectives are bytes over the bandwidth of the axes that they span, each divided by
the share of the peak that is assumed to be reached, and the time that each hop from one device to
the next takes however little is sent: while decoding little is. A collective is hidden where the
compiled program starts it ahead of its use, and exposed where it waits for the result. MFU is model
FLOPs over what all devices could do in the time of the phase.

It is a model: nothing here was measured on a TPU. XLA's own `optimal_seconds` is not used; it
counts a loop's body once.

Bytes of HBM are analytic as well; `memory_*` give them, for one device.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from atommem_jax.model.model_config import ModelConfig
from atommem_jax.tpu_model import flops as flops_lib
from atommem_jax.tpu_model.device_groups import UNKNOWN_AXIS
from atommem_jax.tpu_model.hardware import Topology
from atommem_jax.tpu_model.hlo import DCN_AXIS, Traffic


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Shares of published peaks that a program reaches, and what does not overlap.

    Attributes:
      compute: of the peak FLOP/s, in matrix products.
      memory: of the HBM bandwidth.
      network: of the bandwidth of links.
      exposed: share of the overlapped collectives' time that computation does not hide.
      hop: seconds that a message takes to a neighbour however short it is. About one microsecond
        according to "How to Scale Your Model" (jax-ml.github.io/scaling-book/sharding, "A note on
        ICI latency").
    """

    compute: float = 0.75
    memory: float = 0.85
    network: float = 0.85
    exposed: float = 0.0
    hop: float = 1e-6

    def validate(self) -> None:
        """Raises ValueError, naming field, value and allowed values."""
        for name in ("compute", "memory", "network"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"assumptions.{name}={getattr(self, name)}: allowed is above 0 up to 1"
                )
        if not 0 <= self.exposed <= 1:
            raise ValueError(f"assumptions.exposed={self.exposed}: allowed is 0 to 1")
        if self.hop < 0:
            raise ValueError(f"assumptions.hop={self.hop}: allowed are 0 and more seconds")


@dataclasses.dataclass(frozen=True)
class Sent:
    """What collectives along the same mesh axes take.

    Attributes:
      bytes: that one device sends.
      hops: messages that one device waits for, one after the other.
    """

    bytes: float = 0.0
    hops: float = 0.0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.bytes + other.bytes, self.hops + other.hops)


@dataclasses.dataclass(frozen=True)
class Part:
    """Work of one device, apart from `flops`.

    Attributes:
      name: e.g. 'decode'.
      flops: of all devices together.
      hbm_bytes: read and written by one device.
      traffic: (mesh axes joined by '+', overlapped) -> what one device sends.
    """

    name: str
    flops: flops_lib.Flops = dataclasses.field(default_factory=flops_lib.Flops)
    hbm_bytes: float = 0.0
    traffic: Mapping[tuple[str, bool], Sent] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PartTime:
    """Seconds of a part, and what they are made of."""

    name: str
    seconds: float
    compute: float
    memory: float
    hidden: float  # collectives that run beside the other two
    exposed: float  # collectives that do not

    @property
    def bottleneck(self) -> str:
        """What takes longest: 'compute', 'memory' or 'network'."""
        spans = {
            "compute": self.compute,
            "memory": self.memory,
            "network": self.hidden + self.exposed,
        }
        return max(spans, key=lambda name: spans[name])


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A phase.

    Attributes:
      parts: in order.
      seconds: of the phase.
      mfu: model FLOPs over peak FLOPs of all devices in that time; 0 to 1.
      assumptions: sentences that belong beside the figures.
    """

    parts: tuple[PartTime, ...]
    seconds: float
    mfu: float
    assumptions: tuple[str, ...]

    @property
    def bottleneck(self) -> str:
        """Of the part that takes longest, e.g. 'decode: memory'; '' without parts."""
        if not self.parts:
            return ""
        longest = max(self.parts, key=lambda part: part.seconds)
        return f"{longest.name}: {longest.bottleneck}"


def estimate(
    parts: Sequence[Part],
    topology: Topology,
    mesh: Mapping[str, int],
    assumptions: Assumptions | None = None,
) -> Estimate:
    """Models the time of a phase.

    Args:
      parts: what it consists of.
      topology: that it runs on.
      mesh: sizes of the mesh axes.
      assumptions: None for the defaults.

    Raises ValueError for assumptions out of range, or traffic along an axis that the mesh has not.
    """
    assumptions = assumptions or Assumptions()
    assumptions.validate()
    peak = topology.generation.peak_flops
    times = []
    for part in parts:
        compute = part.flops.hardware / topology.devices / (peak * assumptions.compute)
        memory = part.hbm_bytes / (topology.generation.hbm_bandwidth * assumptions.memory)
        hidden = exposed = 0.0
        for (axes, overlapped), sent in part.traffic.items():
            bandwidth = axis_bandwidth(axes, topology, mesh) * assumptions.network
            share = assumptions.exposed if overlapped else 1.0
            taken = sent.bytes / bandwidth + sent.hops * assumptions.hop
            exposed += share * taken
            hidden += (1 - share) * taken
        seconds = max(compute, memory, hidden) + exposed
        times.append(PartTime(part.name, seconds, compute, memory, hidden, exposed))
    total = sum(time.seconds for time in times)
    model_flops = sum(part.flops.model for part in parts)
    mfu = model_flops / (peak * topology.devices * total) if total else 0.0
    return Estimate(tuple(times), total, mfu, tuple(describe(topology, assumptions)))


def axis_bandwidth(axes: str, topology: Topology, mesh: Mapping[str, int]) -> float:
    """Bytes a second that a device can send along mesh axes joined by '+'.

    With slices a collective over `data` is taken to stay within one: what crosses slices is an
    operation of its own, along DCN_AXIS. Along axes that are not known it is that of one link.

    Raises ValueError for an axis that the mesh has not.
    """
    if axes == DCN_AXIS:
        return topology.generation.dcn_bandwidth
    size = 1
    for axis in filter(None, axes.split("+")):
        if axis == UNKNOWN_AXIS:
            return topology.generation.link_bandwidth
        if axis not in mesh:
            raise ValueError(f"traffic along the axis {axis!r}: the mesh has {', '.join(mesh)}")
        size *= mesh[axis]
    return topology.axis_bandwidth(size)


def describe(topology: Topology, assumptions: Assumptions) -> list[str]:
    """The assumptions, as sentences."""
    g = topology.generation
    return [
        "A model, not a measurement: each part takes max(compute, HBM, hidden collectives) + "
        "exposed collectives.",
        f"Peaks of a {g.name} device: {g.peak_flops / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{g.hbm_bandwidth / 1e9:.0f} GB/s of HBM, {g.link_bandwidth / 1e9:.0f} GB/s a link and "
        f"direction, {g.dcn_bandwidth / 1e9:.2f} GB/s between slices (Cloud TPU documentation).",
        f"Reached of them: {assumptions.compute:.0%} of compute, {assumptions.memory:.0%} of HBM, "
        f"{assumptions.network:.0%} of the network. Matrices narrower than the matrix unit (128, "
        "on v6e and TPU7x 256) reach less.",
        "Hidden are collectives that the compiled program starts ahead of their use, "
        f"{assumptions.exposed:.0%} of them exposed all the same; the others wait.",
        "A collective sends by the ring algorithm along its mesh axes, over two links where the "
        f"axes fill a ring of the torus (of {g.name}: dimensions that are a multiple of {g.wrap}), "
        f"else over one; each hop takes {assumptions.hop * 1e6:.1f} microseconds beside that "
        "(jax-ml.github.io/scaling-book/sharding).",
        "MFU divides model FLOPs: causal half of the attention, no padding, nothing recomputed.",
        "HBM traffic: weights once a pass, the cache once a pass of decoding, activations as "
        "documented in atommem_jax/tpu_model/roofline.py; no start-up, no host, no latency of "
        "small operations.",
    ]


def traffic_of(
    traffic: Traffic, *, inside: Sequence[str] = (), outside: Sequence[str] = ()
) -> dict[tuple[str, bool], Sent]:
    """What a device sends, by (axes, overlapped), for `Part.traffic`.

    Args:
      traffic: of a compiled program.
      inside: scopes; only collectives traced within one of them. None given: all.
      outside: scopes to leave out.
    """
    sums: dict[tuple[str, bool], Sent] = {}
    for each in traffic.collectives:
        if inside and not any(map(each.is_in, inside)):
            continue
        if any(map(each.is_in, outside)):
            continue
        key = ("+".join(each.axes), each.overlapped)
        hops = count_hops(each.kind, each.group_size) * each.times if each.taken else 0
        sums[key] = sums.get(key, Sent()) + Sent(each.total, hops)
    return sums


def count_hops(kind: str, devices: int) -> int:
    """Messages that follow each other in a collective of a group of devices, on a ring."""
    if kind == "collective-permute":
        return 1
    return (devices - 1) * (2 if kind == "all-reduce" else 1)


# ------------------------------------------------------------------ bytes of HBM, one device


def bytes_of(dtype: str) -> int:
    """Of one number."""
    return {"int8": 1, "bfloat16": 2, "float32": 4}[dtype]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Over how many devices things are split.

    Attributes:
      rows: shares of the batch (data x fsdp).
      tensor: devices that share a matrix product.
      fsdp: devices that share parameters beside `tensor`.
    """

    rows: int = 1
    tensor: int = 1
    fsdp: int = 1


def memory_of_weights(config: ModelConfig, placement: Placement, passes: float) -> float:
    """Bytes read when all weights are, `passes` times, in the dtype of activations.

    A pass reads a device's share of the tensor axis; with fsdp a layer is gathered first, so that
    its share is written once more than that.
    """
    whole = flops_lib.count_params(config) * bytes_of(config.dtype) / placement.tensor
    return passes * whole * (2 if placement.fsdp > 1 else 1)


def memory_of_activations(
    config: ModelConfig, placement: Placement, columns: float, *, train: bool
) -> float:
    """Bytes that activations move for `columns` (rows x width, of all devices).

    A layer reads and writes, for each column: the residual stream four times (two norms, two
    additions), queries, keys, values and the attended twice, the hidden layer of the MLP three
    times; attention is taken to be fused, its scores stay on the chip. A backward pass moves twice
    as much, and a rematerialised one the forward part again.
    """
    c = config
    split = placement.tensor
    heads = c.head_width * (2 * c.num_heads + 2 * c.num_kv_heads) * 2 / split
    values = 4 * 2 * c.width + heads + 3 * 2 * c.mlp_width / split
    passes = (4 if c.remat else 3) if train else 1
    return columns / placement.rows * c.num_layers * values * bytes_of(c.dtype) * passes


def memory_of_logits(
    config: ModelConfig, placement: Placement, positions: float, *, train: bool
) -> float:
    """Bytes that float32 logits move: written, read for the softmax; twice more with a gradient."""
    passes = 6 if train else 3
    share = positions / placement.rows * config.vocab_size / placement.tensor
    return share * 4 * passes


def cache_bytes(
    config: ModelConfig, placement: Placement, rows: float, slots: int, *, cache_dtype: str = ""
) -> float:
    """Bytes of the key/value cache of `rows` (of all devices) on one device.

    A head lies on one device: with fewer key/value heads than `tensor`, several hold copies.

    cache_dtype: `rollout.cache_dtype`; int8 has a float32 scale a head and slot.
    """
    c = config
    heads = max(c.num_kv_heads / placement.tensor, 1)
    scale = 4 if cache_dtype == "int8" else 0
    a_head = c.head_width * bytes_of(cache_dtype or c.dtype) + scale
    per_slot = 2 * c.num_layers * heads * a_head
    return rows / placement.rows * slots * per_slot


def memory_of_decoding(
    config: ModelConfig,
    placement: Placement,
    rows: float,
    slots: int,
    passes: int,
    *,
    fed: int = 1,
    param_dtype: str = "float32",
    cache_dtype: str = "",
) -> float:
    """Bytes of `passes` of decoding: weights as they are stored, the cache and logits, each pass.

    Of the embeddings no more is read than a row a token, unless logits are read out with them.

    Args:
      config: of the model.
      placement: of the rollout, where `fsdp` does not split parameters.
      rows: of all devices.
      slots: of the cache, written or not: all are read.
      passes: of the loop.
      fed: tokens that each row is fed a pass, whose keys and values are written.
      param_dtype: `rollout.param_dtype`; the scales of int8 are not counted.
      cache_dtype: `rollout.cache_dtype`.
    """
    c = config
    looked_up = 0 if c.tie_embeddings else c.vocab_size * c.width
    weights = (flops_lib.count_params(c) - looked_up) * bytes_of(param_dtype) / placement.tensor
    cache = cache_bytes(c, placement, rows, slots + fed, cache_dtype=cache_dtype)
    return passes * (weights + cache + memory_of_logits(c, placement, rows * fed, train=False))


def memory_of_optimizer(
    config: ModelConfig, placement: Placement, *, moments: Sequence[str] = ("float32", "float32")
) -> float:
    """Bytes of one optimiser step: gradients read twice (norm, update); parameters and each moment
    read and written.

    moments: dtype of each, as they are stored.
    """
    count = flops_lib.count_trained(config) / (placement.tensor * placement.fsdp)
    return count * (2 * 4 + 2 * 4 + sum(2 * bytes_of(dtype) for dtype in moments))


def memory_of_scoring(
    config: ModelConfig,
    placement: Placement,
    rows: Sequence[flops_lib.Rows],
    *,
    microbatches: float,
    train: bool,
) -> float:
    """Bytes of scoring rows in micro-batches, with the gradient where `train`.

    Every micro-batch reads all weights: forward, backward, and once more where layers are
    rematerialised. With a gradient it adds to the accumulated float32 gradients: read and written.

    microbatches: that each device takes part in.
    """
    passes = (3 if config.remat else 2) if train else 1
    total = memory_of_weights(config, placement, passes * microbatches)
    if train:
        share = flops_lib.count_params(config) / (placement.tensor * placement.fsdp)
        total += microbatches * share * 4 * 3  # the new one, the sum before, the sum after
    for row in rows:
        columns = row.count * (row.width or row.fed)
        positions = row.count * (row.limit or row.response)
        total += memory_of_activations(config, placement, columns, train=train)
        total += memory_of_logits(config, placement, positions, train=train)
    return total


def memory_of_prefill(
    config: ModelConfig,
    placement: Placement,
    rows: Sequence[flops_lib.Rows],
    *,
    groups: float = 1,
    cache_dtype: str = "",
) -> float:
    """Bytes of reading prompts into the cache, `groups` of rows after each other."""
    total = memory_of_weights(config, dataclasses.replace(placement, fsdp=1), groups)
    for row in rows:
        width = row.prompt_width or row.unread
        total += memory_of_activations(config, placement, row.count * width, train=False)
        total += cache_bytes(config, placement, row.count, width, cache_dtype=cache_dtype)
    return total
