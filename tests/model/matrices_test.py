"""Products with a matrix, whose gradients on a CPU are written by hand, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.model import matrices
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import program

INNER, OUTER = 24, 40


def make(*rows, dtype=jnp.float32):
    """Rows, a matrix, and what the gradient of the product is."""
    rng = np.random.default_rng(0)
    shapes = ((*rows, INNER), (INNER, OUTER), (*rows, OUTER))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def multiply(x, matrix):
    return matrices.multiply(x, matrix, (((x.ndim - 1,), (0,)), ((), ())))


@functools.partial(jax.jit, static_argnames="remat")
def pull_back(x, matrix, gradient, remat=False):
    product = jax.checkpoint(multiply) if remat else multiply
    out, pull = jax.vjp(product, x, matrix)
    return out, *pull(gradient.astype(out.dtype))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("rows", [(7,), (3, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_a_product_and_its_gradients_equal_numpy(rows, dtype, rtol, remat):
    x, matrix, gradient = make(*rows, dtype=dtype)
    found = pull_back(x, matrix, gradient, remat)
    assert [leaf.dtype for leaf in found] == [jnp.float32, dtype, dtype]
    x, matrix, gradient = (np.asarray(leaf, np.float64) for leaf in (x, matrix, gradient))
    flat = x.reshape(-1, INNER), gradient.reshape(-1, OUTER)
    expected = (x @ matrix, gradient @ matrix.T, flat[0].T @ flat[1])
    for ours, theirs in zip(found, expected, strict=True):
        atol = rtol * np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=atol, rtol=0)


def test_each_of_a_batch_has_its_own_gradient():
    """As replicas do, each of which adds up what its own rows give."""
    x, matrix, gradient = make(4, 3, 5)
    found = jax.vmap(pull_back, in_axes=(0, None, 0))(x, matrix, gradient)[2]
    expected = np.einsum("rbti,rbto->rio", *(np.asarray(a, np.float64) for a in (x, gradient)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_nothing_is_kept_for_a_gradient_that_nobody_wants():
    x, matrix, _ = make(3, 5)

    def shapes(function, at):
        return [leaf.shape for leaf in jax.tree.leaves(jax.vjp(function, at)[1])]

    assert x.shape not in shapes(lambda x: multiply(x, matrix), x)
    assert matrix.shape not in shapes(lambda matrix: multiply(x, matrix), matrix)
    # Of a matrix in int8 there is none, and that of the rows is as ever.
    whole = jnp.round(matrix * 10)
    ours, theirs = (
        jax.grad(lambda x, m=m: multiply(x, m).sum())(x) for m in (whole.astype(jnp.int8), whole)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_devices_get_what_jax_writes(monkeypatch, platform):
    x, matrix, _ = make(3, 5)
    monkeypatch.setattr(program, "platform", lambda: platform)
    gradient = jax.grad(lambda *a: multiply(*a).sum(), argnums=1)
    jaxpr = str(jax.make_jaxpr(gradient)(x, matrix))
    assert ("optimization_barrier" in jaxpr) == (platform == "cpu")


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_a_program_knows_what_its_devices_are(monkeypatch, shape):
    """Those of its mesh, whatever the default is."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    mesh, found = mesh_lib.make_mesh(*shape), []

    def look(x):
        found.append(program.platform())
        return x

    for wrap in (program.data_parallel, program.fsdp_parallel):
        jax.jit(wrap(look, mesh, rows=("x",), out=program.ROWS))(np.zeros(8, np.float32))
    assert set(found) == {"cpu"}
    assert program.platform() == "tpu"
