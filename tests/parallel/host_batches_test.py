"""Batches go from the host to the devices of a mesh and come back as they went."""

import jax
import numpy as np
import pytest

from atommem_jax.parallel import host_batches
from atommem_jax.parallel import mesh as mesh_lib


def test_rows_of_a_batch_come_back_as_they_went():
    mesh = mesh_lib.make_mesh(8)
    tree = {"a": np.arange(16), "b": np.arange(32.0).reshape(16, 2).astype(np.float32)}
    placed = host_batches.shard(tree, mesh)
    assert [s.data.shape for s in placed["b"].addressable_shards] == [(2, 2)] * 8
    for found in (host_batches.fetch(placed), host_batches.gather_rows(tree, mesh)):
        jax.tree.map(np.testing.assert_array_equal, found, tree)
    np.testing.assert_array_equal(host_batches.process_rows(mesh, 16), np.arange(16))
    assert host_batches.whole_size(mesh, 16) == 16
    first = host_batches.first_rows(placed, 5)
    np.testing.assert_array_equal(first["a"], np.arange(5))


@pytest.mark.parametrize(
    ("shape", "rows", "message"),
    [
        ((8,), 12, r"a batch of 12 does not divide over mesh\.data=8 x mesh"),
        ((2, 2, 2), 6, r"a batch of 6 does not divide over mesh\.data=2 x mesh"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(shape, rows, message):
    with pytest.raises(ValueError, match=message):
        host_batches.shard(np.zeros((rows, 2)), mesh_lib.make_mesh(*shape))
