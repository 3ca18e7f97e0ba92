"""TPU generations, and topologies to compile for on a machine that has none.

Figures are those of the public Cloud TPU documentation (docs.cloud.google.com/tpu/docs: v4, v5e,
v5p, v6e, tpu7x), but for `hbm_limit_gib`: that is what the compiler of libtpu 0.0.42.1 says it has
when a program needs more. On v4 and TPU7x each chip is two JAX devices, and every figure here is
for one device: half a chip.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from atommem_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of TPU; all quantities are per JAX device.

    Attributes:
      name: as in a topology, before the colon.
      peak_flops: bfloat16, multiply and add counted apart, a second.
      hbm_limit_gib: GiB of memory that the compiler lets a program use.
      hbm_bandwidth: bytes a second.
      link_bandwidth: bytes a second over one link of the interconnect, in one direction.
      dimensions: of the torus; two links a chip in each.
      dcn_bandwidth: bytes a second to other slices, in one direction; a host's share.
      devices_per_chip: JAX devices.
      chips_per_host: where the compiler is not told otherwise.
      wrap: a slice's dimension is a ring where it is a multiple of this, and a line elsewhere.
      topologies: that libtpu 0.0.42.1 was tried with, by chips a side.
    """

    name: str
    peak_flops: float
    hbm_limit_gib: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    dcn_bandwidth: float
    devices_per_chip: int
    chips_per_host: tuple[int, int, int]
    wrap: int
    topologies: tuple[str, ...]


_GENERATIONS = (
    Generation(
        name="v4",
        peak_flops=275e12 / 2,
        hbm_limit_gib=15.25,
        hbm_bandwidth=1200e9 / 2,
        link_bandwidth=50e9 / 2,  # 2,400 Gbit/s a chip over six links
        dimensions=3,
        dcn_bandwidth=6.25e9 / 2,  # not published: taken to be that of v5p
        devices_per_chip=2,
        chips_per_host=(2, 2, 1),
        wrap=4,
        topologies=("2x2x1", "2x2x2", "4x4x4"),
    ),
    Generation(
        name="v5e",
        peak_flops=197e12,
        hbm_limit_gib=15.75,
        hbm_bandwidth=819e9,
        link_bandwidth=50e9,  # 400 GB/s a chip in both directions, over four links
        dimensions=2,
        dcn_bandwidth=3.125e9,  # 6.4 Tbit/s for 256 chips
        devices_per_chip=1,
        chips_per_host=(2, 2, 1),
        wrap=16,
        topologies=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32"),
    ),
    Generation(
        name="v5p",
        peak_flops=459e12,
        hbm_limit_gib=95.74,
        hbm_bandwidth=2765e9,
        link_bandwidth=100e9,  # 1,200 GB/s a chip in both directions, over six links
        dimensions=3,
        dcn_bandwidth=6.25e9,  # 50 Gbit/s a chip
        devices_per_chip=1,
        chips_per_host=(2, 2, 1),
        wrap=4,
        topologies=("2x2x1", "2x2x2", "2x2x4", "4x4x4", "8x8x8"),
    ),
    Generation(
        name="v6e",
        peak_flops=918e12,
        hbm_limit_gib=31.25,
        hbm_bandwidth=1600e9,
        link_bandwidth=100e9,  # 3,200 Gbit/s a chip over four links
        dimensions=2,
        dcn_bandwidth=12.5e9,  # 25.6 Tbit/s for 256 chips
        devices_per_chip=1,
        chips_per_host=(2, 2, 1),
        wrap=16,
        topologies=("1x1", "2x2", "4x4", "8x8", "16x16"),
    ),
    Generation(
        name="tpu7x",
        peak_flops=2307e12 / 2,
        hbm_limit_gib=94.75,
        hbm_bandwidth=7380e9 / 2,
        link_bandwidth=100e9 / 2,  # 1,200 GB/s a chip in both directions, over six links
        dimensions=3,
        dcn_bandwidth=12.5e9 / 2,  # 100 Gbit/s a chip
        devices_per_chip=2,
        chips_per_host=(2, 2, 1),
        wrap=4,
        topologies=("2x2x1", "4x4x4"),
    ),
)

GENERATIONS: Mapping[str, Generation] = {each.name: each for each in _GENERATIONS}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices of one shape.

    Attributes:
      generation: of its chips.
      shape: chips a side, one entry a dimension of the torus.
      slices: joined by the data-centre network.
    """

    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As it is parsed, without the slices: `v5e:8x8`."""
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.generation.devices_per_chip

    def axis_bandwidth(self, size: int) -> float:
        """Bytes a second that a device can send along a mesh axis of `size` devices.

        A ring sends in both directions, over two links; a line has one link at its ends, and the
        ends set the pace. An axis is taken to be a ring where it fills a dimension that wraps, or
        several.
        """
        whole = [side for side in self.shape if side > 1 and side % self.generation.wrap == 0]
        rings = {math.prod(whole[a:b]) for a in range(len(whole)) for b in range(a + 1, 4)}
        return self.generation.link_bandwidth * (2 if size in rings else 1)


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Reads a topology such as `v5e:8x8` or `v5p:4x4x4`.

    Raises ConfigError, with what is valid, for a generation or shape that is not in the table.
    """
    if slices < 1:
        raise ConfigError(f"--slices={slices}: must be at least 1")
    name, _, sides = text.lower().partition(":")
    generation = GENERATIONS.get(name)
    if generation is None:
        raise ConfigError(
            f"--topology={text}: no TPU generation {name!r}; the valid topologies are "
            f"{'; '.join(map(_list_topologies, _GENERATIONS))}"
        )
    if sides not in generation.topologies:
        raise ConfigError(
            f"--topology={text}: {name} has no slice {sides!r} here; the valid ones are "
            f"{_list_topologies(generation)}"
        )
    return Topology(generation, tuple(int(side) for side in sides.split("x")), slices)


def _list_topologies(generation: Generation) -> str:
    return ", ".join(f"{generation.name}:{sides}" for sides in generation.topologies)


def list_meshes(
    devices: int, *, slices: int = 1, tensor: tuple[int, ...] = (1, 2, 4, 8, 16)
) -> list[tuple[int, int, int]]:
    """Mesh shapes (data, fsdp, tensor) of `devices` devices where every slice holds whole replicas.

    tensor: sizes of that axis to consider; those that do not divide are left out.
    """
    shapes = []
    for last in tensor:
        if (devices // slices) % last:
            continue
        rest = devices // slices // last
        shapes += [(devices // (n * last), n, last) for n in range(1, rest + 1) if rest % n == 0]
    return shapes


def get_topology(topology: Topology) -> list[Any]:
    """Compile-only devices of a topology, for `parallel.mesh.make_mesh(..., devices=...)`.

    Lets several processes compile at once (`ALLOW_MULTIPLE_LIBTPU_LOAD`); otherwise the second
    would fail on libtpu's lock file. Set JAX_PLATFORMS=cpu where there is no TPU, before JAX
    starts: without it JAX looks for one.

    Raises ConfigError where libtpu is not installed, or refuses the topology.
    """
    from jax.experimental import topologies

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except RuntimeError as error:  # JAX's own errors are of this type, too
        if "not installed" in str(error):
            raise ConfigError(
                f"--topology={topology.name} needs the TPU compiler, which is not installed; run: "
                "pip install -e '.[tpu]'"
            ) from error
        raise ConfigError(
            f"--topology={topology.name} --slices={topology.slices}: libtpu refuses it ({error}); "
            f"the valid ones are {_list_topologies(topology.generation)}"
        ) from error
    return list(described.devices)
