"""Gradients summed over micro-batches, whose widths follow the length of their rows.

Rows that can contribute a gradient are moved to the front, the longest first, and micro-batches of
a fixed number of rows are accumulated for exactly as long as there are such rows. Each is scored at
the least of a few widths that holds its rows, so that little of the work is padding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from atommem_jax.config import LENGTH_BUCKETS
from atommem_jax.model import groups, scoring
from atommem_jax.parallel import program, rules
from atommem_jax.types import Batch

Metrics = dict[str, Float[Array, ""]]
PyTree = Any


def accumulate_gradients(
    loss_fn: Callable[[PyTree, Batch, int], tuple[Float[Array, ""], tuple[Metrics, Metrics]]],
    params: PyTree,
    batch: Batch,
    active: Bool[Array, " M"],
    rows: int,
    *,
    layout: rules.Layout | None = None,
    multiple: int = 1,
    length_buckets: tuple[int, ...] = LENGTH_BUCKETS,
) -> tuple[PyTree, Metrics, Metrics]:
    """Sums gradients over micro-batches of `rows` rows a device: active first, idle ones never.

    `layout` says where gradients lie on the mesh; `multiple` divides the widths of micro-batches.
    `loss_fn` returns (loss, (metrics to add up, metrics to take the maximum of)); its loss is a
    sum over rows with a denominator fixed beforehand, so that micro-batches add up. Its last
    argument is static: no row of the part has more `scoring.row_lengths` than that.
    """
    size = active.shape[0]
    rows = min(program.count_rows(rows), size)
    lengths = scoring.row_lengths(batch.prompt_lengths, batch.response_lengths)
    lengths = jnp.where(active, lengths, -1)
    order = jnp.argsort(-lengths, stable=True)
    widths = groups.list_widths(
        batch.prompt.shape[1] + batch.response.shape[1] - 1, multiple, length_buckets
    )
    # The last slice may reach past the end: repeat row order, with weights of zero.
    padded = -(-size // rows) * rows
    order = jnp.concatenate([order, jnp.zeros((padded - size,), order.dtype)])
    real = jnp.arange(padded) < active.sum()
    count = -(-active.sum() // rows)

    def slice_of(i):
        picked = jax.lax.dynamic_slice_in_dim(order, i * rows, rows)
        counts = jax.lax.dynamic_slice_in_dim(real, i * rows, rows)
        part = over_devices(jax.tree.map(lambda x: x[picked], batch))
        return part.replace(
            weights=jnp.where(counts[:, None], part.weights, 0.0),
            response_lengths=jnp.where(counts, part.response_lengths, 0),
        )

    # Every replica adds up its own gradients: they meet once, and not in every micro-batch.
    replicas = program.data_axis_size() if rows % program.data_axis_size() == 0 else 1

    def differentiate(width):
        def grad_fn(part):
            return jax.value_and_grad(loss_fn, has_aux=True)(params, part, width)

        return program.vmap_over_data(grad_fn) if replicas > 1 else grad_fn

    (loss_shape, aux_shape), grad_shape = jax.eval_shape(
        lambda: differentiate(widths[-1])(slice_of(0))
    )
    del loss_shape
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grad_shape, aux_shape))

    def place(grads, leading_data_axis=replicas > 1):
        if layout is None:
            return grads
        return program.constrain_params(layout, grads, leading_data_axis=leading_data_axis)

    zeros = (place(zeros[0]), zeros[1])

    def body(i, carry):
        grads, (sums, maxima) = carry
        longest = lengths[order[i * rows]]
        (_, (new_sums, new_maxima)), new_grads = jax.lax.switch(
            jnp.sum(longest > jnp.asarray(widths[:-1], jnp.int32)),
            [differentiate(width) for width in widths],
            slice_of(i),
        )
        return place(jax.tree.map(jnp.add, grads, new_grads)), (
            jax.tree.map(jnp.add, sums, new_sums),
            jax.tree.map(jnp.maximum, maxima, new_maxima),
        )

    with jax.named_scope("microbatches"):
        grads, (sums, maxima) = jax.lax.fori_loop(0, count, body, zeros)
    if replicas > 1:
        grads, sums = jax.tree.map(lambda x: x.sum(axis=0), (grads, sums))
        grads = place(grads, leading_data_axis=False)
        maxima = jax.tree.map(lambda x: x.max(axis=0), maxima)
    return grads, sums, maxima


def spread(work: Int[Array, " n"], shares: int) -> Int[Array, " n"]:
    """An order in which each of `shares` equal, consecutive parts has about as much work.

    The most is dealt out first, to and fro: what has none falls to all alike. n divides by shares.
    """
    rounds = jnp.argsort(-work, stable=True).reshape(-1, shares)
    back = jnp.arange(rounds.shape[0])[:, None] % 2 == 1
    return jnp.where(back, rounds[:, ::-1], rounds).T.reshape(-1)


def over_devices(tree: PyTree) -> PyTree:
    """Rows, the leading axis of every leaf, over the devices of a replica."""
    return jax.tree.map(lambda x: program.constrain(x, "rows", *(None,) * (x.ndim - 1)), tree)
