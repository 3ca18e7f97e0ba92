"""Optimisers: schedules, Muon, clipping, and gradients that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atommem_jax.learning import optimizer as optimizer_lib
from tests.helpers.updates import make_optimizer


def updates_of(optimizer, params, grads, steps):
    state, found = optimizer.init(params), []
    step = jax.jit(optimizer.update)
    for _ in range(steps):
        change, state = step(grads, state, params)
        found.append(change)
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.02, 0.04, 0.06, 0.08, *[0.1] * 9]),
        (
            "cosine",
            [0.02, 0.04, 0.06, 0.08] + [0.05 * (1 + np.cos(np.pi * k / 8)) for k in range(9)],
        ),
    ],
)
def test_schedules_warm_up_and_end(schedule, expected):
    optimizer = make_optimizer(12, learning_rate=0.1, schedule=schedule, warmup_steps=4)
    params = {"w": jnp.ones((2, 2), jnp.float32)}
    # With a constant gradient Adam moves by exactly the learning rate.
    found = updates_of(optimizer, params, params, steps=13)
    np.testing.assert_allclose([-u["w"][0, 0] for u in found], expected, atol=1e-5)


def test_muon_turns_each_layer_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    params = {
        "layers": {"query": {"kernel": jnp.zeros((2, 6, 4))}, "norm": {"scale": jnp.ones((2, 6))}},
        "embedder": {"embedding": jnp.zeros((5, 6))},
    }
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    optimizer = make_optimizer(
        name="muon", learning_rate=0.1, adam_learning_rate=0.01, clip_norm=1e9
    )
    [found] = updates_of(optimizer, params, grads, steps=1)
    for path in (("layers", "norm", "scale"), ("embedder", "embedding")):
        ours, theirs = found, grads
        for name in path:
            ours, theirs = ours[name], theirs[name]
        # Its first step, Nesterov momentum included, has one size for all entries.
        np.testing.assert_allclose(np.abs(ours), np.abs(ours).max(), rtol=1e-4)
        np.testing.assert_array_equal(np.sign(ours), -np.sign(theirs))
        assert 0.01 <= np.abs(ours).max() < 0.02
    for layer in range(2):
        change = np.asarray(found["layers"]["query"]["kernel"][layer])
        singular = np.linalg.svd(change, compute_uv=False)
        assert singular.max() / singular.min() < 2.5, "not orthogonalised"
        assert (change * np.asarray(grads["layers"]["query"]["kernel"][layer])).sum() < 0


def test_large_gradients_are_clipped():
    # One step of plain momentum-free Adam hides the scale: compare first moments instead.
    optimizer = make_optimizer(clip_norm=1.0, b1=0.0)
    params = {"w": jnp.zeros((2,))}
    _, state = optimizer.update({"w": jnp.asarray([30.0, 40.0])}, optimizer.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,)]
    np.testing.assert_allclose(moments[0], [0.6, 0.8], rtol=1e-5)


def split_schedule(opt_state):
    """(the state without the schedules' counts, those counts)."""

    def is_schedule(x):
        return isinstance(x, optax.ScaleByScheduleState)

    leaves = jax.tree.leaves(opt_state, is_leaf=is_schedule)
    rest = [x for x in leaves if not is_schedule(x)]
    return rest, [int(x.count) for x in leaves if is_schedule(x)]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_not_taken_counts_for_the_schedule_and_changes_nothing_else(name):
    params = {"layers": {"w": jnp.ones((1, 2, 2))}}
    optimizer = make_optimizer(10, name=name, learning_rate=0.1, schedule="cosine")
    good = jax.tree.map(jnp.ones_like, params)
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    state, _ = optimizer_lib.apply_gradients(
        optimizer_lib.create_state(params, optimizer), good, optimizer
    )
    for grads, wanted, counted in ((good, False, "idle"), (bad, True, "skipped")):
        before, counts = split_schedule(state.opt_state)
        after, metrics = optimizer_lib.apply_gradients(state, grads, optimizer, jnp.array(wanted))
        same, now = split_schedule(after.opt_state)
        jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
        jax.tree.map(np.testing.assert_array_equal, same, before)
        assert now == [count + 1 for count in counts] != []
        assert after.step == state.step + 1
        assert [k for k in ("idle", "skipped") if float(metrics[k])] == [counted]
    # A zero gradient that was wanted moves parameters all the same, by the moments.
    zero = jax.tree.map(jnp.zeros_like, params)
    moved, metrics = optimizer_lib.apply_gradients(state, zero, optimizer)
    assert metrics["idle"] == 0
    assert np.abs(moved.params["layers"]["w"] - state.params["layers"]["w"]).max() > 1e-3


def test_gradients_that_are_not_finite_change_nothing_and_are_counted():
    params = {"w": jnp.asarray([1.0, 2.0])}
    optimizer = make_optimizer()
    state = optimizer_lib.create_state(params, optimizer)
    bad = {"w": jnp.asarray([1.0, jnp.nan])}
    good = {"w": jnp.asarray([1.0, -1.0])}
    for step, in_a_row in [(1, 1), (2, 2)]:
        state, metrics = optimizer_lib.apply_gradients(state, bad, optimizer)
        assert (state.step, state.skipped, state.skipped_in_a_row) == (step, step, in_a_row)
        assert metrics["skipped"] == 1
        np.testing.assert_array_equal(state.params["w"], params["w"])
    moments, fresh = (split_schedule(s)[0] for s in (state.opt_state, optimizer.init(params)))
    jax.tree.map(np.testing.assert_array_equal, moments, fresh)
    state, metrics = optimizer_lib.apply_gradients(state, good, optimizer)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (3, 2, 0)
    np.testing.assert_allclose(metrics["gradient_norm"], np.sqrt(2), rtol=1e-6)
    assert (np.sign(state.params["w"] - params["w"]) == [-1, 1]).all()
