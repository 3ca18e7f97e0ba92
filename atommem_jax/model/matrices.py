"""Activations times matrices: how they are multiplied, rounded and adapted, whatever the layer.

A matrix may be int8 with scales beside it, see `quantized`, and with `lora` it gets a low-rank
branch, see `Adapter`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from atommem_jax.config import LoraConfig
from atommem_jax.model.lora import SUFFIX
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.parallel import program
from atommem_jax.parallel.program import constrain

_CHAIN = 32  # terms that are added one after the other where exactness is asked for


def multiply(lhs, rhs, dimension_numbers, precision=None, dtype=jnp.float32) -> Array:
    """`jax.lax.dot_general` over one axis; `jax.default_matmul_precision("highest")` is kept to.

    With it XLA multiplies float32 as float32 on a TPU. On a CPU it always does, but adds up a row
    in one chain, whose rounding grows with its length: there the chains are short, and their sums
    are added in pairs.
    """
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=dtype,
    )
    ((left,), (right,)), _ = dimension_numbers
    size = lhs.shape[left]
    if program.platform() != "cpu":
        return dot(lhs, rhs)
    if jax.config.jax_default_matmul_precision not in ("highest", "float32"):
        by_rows = (left, right, rhs.ndim) == (lhs.ndim - 1, 0, 2) and lhs.dtype == rhs.dtype
        return _multiply_rows(lhs, rhs, precision, dtype) if by_rows else dot(lhs, rhs)
    cuts = list(range(_CHAIN, size, _CHAIN))
    pairs = zip(jnp.split(lhs, cuts, left), jnp.split(rhs, cuts, right), strict=True)
    # Without the barriers the compiler could make one product of them.
    parts = [jax.lax.optimization_barrier(dot(a, b)) for a, b in pairs]
    while len(parts) > 1:
        parts = [sum(parts[i + 1 : i + 2], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _multiply_rows(lhs, rhs, precision, dtype) -> Array:
    """Rows [..., in] times a matrix [in, out] of their dtype, whose gradient XLA:CPU computes well.

    The gradient of the matrix is a product over all rows. As JAX writes it, XLA:CPU transposes both
    sides, each where it is made, and leaves it to its slower kernel. With the rows transposed
    beforehand it is a product like any other: an update of the small agent took .86 of the time.
    """
    axes = (((lhs.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(lhs, rhs, axes, precision, preferred_element_type=dtype)


def _multiply_rows_forward(lhs, rhs, precision, dtype):
    """As plain differentiation does, keeps nothing for a gradient that nobody wants."""
    keep = (lhs.value if rhs.perturbed else None, rhs.value if lhs.perturbed else None)
    return _multiply_rows(lhs.value, rhs.value, precision, dtype), keep


def _multiply_rows_backward(precision, dtype, kept, gradient):
    del dtype
    lhs, rhs = kept
    if isinstance(gradient, SymbolicZero):
        return None, None
    of_lhs = of_rhs = None
    if rhs is not None:
        axes = (((gradient.ndim - 1,), (1,)), ((), ()))
        of_lhs = jax.lax.dot_general(gradient, rhs, axes, precision).astype(rhs.dtype)
    if lhs is not None:
        rows = jax.lax.optimization_barrier(lhs.reshape(-1, lhs.shape[-1]).T)
        columns, axes = gradient.reshape(-1, gradient.shape[-1]), (((1,), (0,)), ((), ()))
        of_rhs = jax.lax.dot_general(rows, columns, axes, precision).astype(lhs.dtype)
    return of_lhs, of_rhs


_multiply_rows.defvjp(_multiply_rows_forward, _multiply_rows_backward, symbolic_zeros=True)


def dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
    """Accumulates in float32 whatever the operands: XLA:CPU crawls on a bfloat16 result.

    Over a tensor axis the result has the operands' type, so that half the bytes are summed there.
    """
    del preferred_element_type
    over_devices = program.partition_size("heads") > 1
    dtype = lhs.dtype if over_devices else jnp.float32
    return multiply(lhs, rhs, dimension_numbers, precision, dtype).astype(lhs.dtype)


class Dense(nn.Dense):
    """A matrix, which may be int8 with the scales of its output channels beside it.

    Its bias is added to what they have scaled.
    """

    biased: bool = False

    @nn.compact
    def __call__(self, inputs):
        out = super().__call__(inputs)
        scale: Array | None = self.get_variable("params", "scale")
        out = out if scale is None else rescale(out, scale[0])
        if not self.biased:
            return out
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return round_off(
            round_off(out) + bias.astype(out.dtype).reshape(*(1,) * (out.ndim - 1), -1)
        )


def rescale(x: Array, scale: Array) -> Array:
    """What int8 values gave, times their scale, in the dtype of `x`."""
    scale = scale.reshape(*(1,) * (x.ndim - scale.ndim), *scale.shape)
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def make_dense(
    features: int, dtype: str, name: str, product=dot_general, *, biased: bool = False
) -> nn.Dense:
    """The matrix of that name, within the module that has it."""
    return Dense(
        features, use_bias=False, dtype=dtype, dot_general=product, biased=biased, name=name
    )


class Adapter(nn.Module):
    """The branch (alpha / rank) (x A) B of a matrix; their product is never made.

    A [in, rank] is normal and B [rank, out] zero. Both are kept in float32 and used in the dtype of
    what they are applied to, as the matrix is.
    """

    shape: tuple[int, int]  # of the matrix
    config: LoraConfig
    deviation: float  # of A

    def setup(self):
        rank = self.config.rank
        self.a = self.param("a", nn.initializers.normal(self.deviation), (self.shape[0], rank))
        self.b = self.param("b", nn.initializers.zeros, (rank, self.shape[1]))

    def __call__(self, x: Float[Array, "B T in"]) -> Float[Array, "B T out"]:
        narrow = constrain(_product(x, self.a), "rows", None, None)
        return round_off(_product(narrow, self.b) * self.config.scale)

    def lookup(self, ids: Int[Array, "B T"], dtype: str) -> Float[Array, "B T out"]:
        """For a one-hot x: the matrix is a table."""
        narrow = jnp.take(constrain(self.a.astype(dtype), "vocab", None), ids, axis=0)
        return round_off(
            _product(constrain(narrow, "rows", None, None), self.b) * self.config.scale
        )

    def logits(
        self, x: Float[Array, "*batch width"], *, transposed: bool
    ) -> Float[Array, "*batch V"]:
        """For a readout, float32; `transposed` where the matrix is the table of the embeddings."""
        first, second = (self.b.T, self.a.T) if transposed else (self.a, self.b)
        narrow = _product(x, first)
        wide = jnp.matmul(narrow, second.astype(x.dtype), preferred_element_type=jnp.float32)
        return wide * self.config.scale


def _product(x: Float[Array, "B T in"], matrix: Float[Array, "in out"]) -> Float[Array, "B T out"]:
    return dot_general(x, matrix.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def round_off(x: Array) -> Array:
    """Rounds to bfloat16 where that is the dtype of `x`.

    XLA leaves roundings out between a product and a sum, in one program and not in another: the
    sampler and the learner would differ.
    """
    if x.dtype != jnp.bfloat16:
        return x
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def make_adapter(config: ModelConfig, path: str) -> Adapter | None:
    """The adapter of the matrix at `path`, within the module that has it; None without one."""
    if not config.lora.adapts(path):
        return None
    shape = config.matrices[path]
    # What A gives is of the size of one channel of its input; a token is one-hot.
    deviation = 1.0 if path == "embedder" else shape[0] ** -0.5
    return Adapter(shape, config.lora, deviation, name=path.rpartition("/")[2] + SUFFIX)


def gather(table: Array, axes: tuple[str, str]) -> Array:
    """A table whole in its width on every device, gathered after its cast and not before."""
    table = constrain(table, *axes)
    return constrain(table, *(None if axis == "embed" else axis for axis in axes))
