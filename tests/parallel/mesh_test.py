"""A mesh that cannot be names the fields of the config that ask for it."""

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
