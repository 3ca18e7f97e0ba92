"""A mesh that cannot be names the fields of the config that ask for it."""

import numpy as np
import pytest

from atommem_jax.parallel import mesh as mesh_lib


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data": 4, "fsdp": 4}, ["mesh.data=4", "mesh.fsdp=4", "16 devices", "8 devices"]),
        ({"tensor": 0}, ["mesh.tensor=0", "at least 1"]),
        ({"data": 3, "slices": 2}, ["mesh.data=3", "mesh.slices=2"]),
    ],
)
def test_a_mesh_that_cannot_be_names_the_fields(arguments, words):
    with pytest.raises(ValueError) as caught:
        mesh_lib.make_mesh(**arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "tensor", "expected"),
    [
        ((1, 8, 1), 0, (1, 8, 1)),
        ((1, 8, 1), 4, (1, 2, 4)),
        ((1, 4, 2), 2, (1, 4, 2)),
        ((2, 2, 2), 4, (2, 1, 4)),
        ((1, 8, 1), 8, (1, 1, 8)),
    ],
)
def test_rollouts_see_the_same_devices_as_another_mesh(shape, tensor, expected):
    mesh = mesh_lib.make_mesh(*shape)
    found = mesh_lib.reshape_for_rollouts(mesh, tensor)
    assert tuple(found.shape.values()) == expected
    np.testing.assert_array_equal(found.devices.ravel(), mesh.devices.ravel())


@pytest.mark.parametrize(
    ("shape", "tensor", "allowed"),
    [((1, 8, 1), 3, "1, 2, 4, 8"), ((1, 4, 2), 1, "2, 4, 8"), ((2, 2, 2), 8, "2, 4")],
)
def test_what_rollouts_cannot_share_is_named(shape, tensor, allowed):
    with pytest.raises(ValueError) as caught:
        mesh_lib.reshape_for_rollouts(mesh_lib.make_mesh(*shape), tensor)
    assert f"mesh.rollout_tensor={tensor}: allowed are 0 (as mesh.tensor) and {allowed}:" in str(
        caught.value
    )
