"""Groups of devices, in each of the ways that HLO writes them, and the mesh axes they span."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from atommem_jax.tpu_model.hlo_text import HloError

UNKNOWN_AXIS = "?"
"""Stands for the axes of a group that is no block of the mesh, or cannot be read."""


def read_groups(attributes: str, devices: int) -> list[list[int]]:
    """Groups of devices, in each of the ways that HLO writes them. [] where they cannot be read."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if pairs:
        found = [sorted({int(a), int(b)}) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return [pair for pair in found if len(pair) == 2]
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if listed:
        groups = [[int(k) for k in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [list(range(devices))]  # {} is everybody
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        ids = _iota(iota[3], iota[4])
        return ids.reshape(int(iota[1]), int(iota[2])).tolist()
    named = re.search(r"replica_groups=@?mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes)
    if named:
        return _read_mesh_groups(named[1], named[2], named[3])
    return []


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers 0 .. 7 as a 2 x 4 matrix, transposed."""
    shape = [int(size) for size in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids


def _read_mesh_groups(axes: str, device_ids: str, names: str) -> list[list[int]]:
    """`mesh['a'=2,'b'=4] {'b'}`, and sub-axes such as `'b':(2)2`: groups along the named axes."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)
    if device_ids.strip(", ") and order is None:
        return []
    ids = np.arange(math.prod(sizes.values())) if order is None else _iota(order[1], order[2])
    # Cut each axis into (before, size, after) where a sub-axis is named.
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", names)
    shape: list[int] = []
    inside: list[bool] = []
    for name, size in sizes.items():
        parts = sorted((int(pre or 1), int(sub or size)) for n, pre, sub in wanted if n == name)
        at = 1
        for pre, sub in parts:
            shape += [pre // at, sub]
            inside += [False, True]
            at = pre * sub
        shape.append(size // at)
        inside.append(False)
    ids = ids.reshape(shape)
    outer = [axis for axis, within in enumerate(inside) if not within]
    inner = [axis for axis, within in enumerate(inside) if within]
    width = math.prod(shape[axis] for axis in inner)
    return ids.transpose(outer + inner).reshape(-1, width).tolist()


def axes_of(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    if not groups:
        return (UNKNOWN_AXIS,)
    devices = math.prod(mesh.values())
    largest = max(max(group) for group in groups)
    if largest >= devices:
        raise HloError(
            f"the program runs on device {largest} and the mesh {dict(mesh)} has {devices} "
            "devices; pass the sizes of the mesh that it was compiled for"
        )
    differing: set[str] = set()
    for group in groups:
        places = np.array(np.unravel_index(list(group), tuple(mesh.values())))
        for name, along in zip(mesh, places, strict=True):
            if len(set(along.tolist())) > 1:
                differing.add(name)
    return tuple(name for name in mesh if name in differing)
