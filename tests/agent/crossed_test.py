"""Who reads and who answers: each turn is written by the policy that it belongs to."""

import dataclasses

import jax
import numpy as np
import pytest

from atommem_jax.agent import build, crossed, play
from atommem_jax.config import ConfigError, TeacherConfig
from atommem_jax.model.transformer import init_params
from atommem_jax.parallel import host_batches, program
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.runs import stages
from atommem_jax.types import Phase
from tests.helpers import tiny

pytestmark = pytest.mark.long

ROWS = 6
FORGETFUL = TeacherConfig(store_support=0.0, set_query=0.0)


def make_inputs(mesh):
    episodes, _ = tiny.make_episodes(range(ROWS))
    rows = host_batches.shard((jax.device_get(episodes), np.arange(ROWS, dtype=np.int32)), mesh)
    return rows, host_batches.replicate((jax.random.key(4), np.float32(1.0)), mesh)


def run(reading=None, answering=None, first=None, second=None):
    mesh = mesh_lib.single()
    (episodes, ids), (key, heat) = make_inputs(mesh)
    player = crossed.make_player(
        tiny.make_parts(), tiny.make_shape(), mesh, reading=reading, answering=answering
    )
    return jax.device_get(player(first, second, episodes, ids, key, heat))


def test_one_policy_for_both_plays_as_it_does_alone():
    mesh, params = mesh_lib.single(), tiny.make_params(scale=0.3)
    (episodes, ids), (key, heat) = make_inputs(mesh)
    expected = play.make_player(tiny.make_parts(), tiny.make_shape(), mesh)(
        params, episodes, ids, key, heat
    )
    found = run(first=params, second=params)
    np.testing.assert_array_equal(found.turns.response, expected.turns.response)
    np.testing.assert_allclose(found.turns.log_probs, expected.turns.log_probs, atol=1e-5)

    scripted = play.make_scripted_player(tiny.make_parts(), tiny.make_shape(), crossed.CLEAN, mesh)
    found = run(reading=crossed.CLEAN, answering=crossed.CLEAN)
    np.testing.assert_array_equal(found.turns.response, scripted(episodes, ids, key).turns.response)


def test_a_rollout_mesh_changes_no_turn():
    config = tiny.make_config().replace({"model.num_heads": 4, "model.num_kv_heads": 2})
    parts, rows = build.build(config, tiny.make_tokenizer()), 8
    params = tiny.disturb(init_params(parts.agent.model, jax.random.key(0)), 0.3)

    def play_on(mesh, tensor):
        player = crossed.make_player(
            parts, tiny.make_shape(), mesh, reading=crossed.CLEAN, answering=None, tensor=tensor
        )
        episodes = jax.device_get(tiny.make_episodes([i // 2 for i in range(rows)])[0])
        given = host_batches.shard((episodes, np.arange(rows, dtype=np.int32)), mesh)
        seeds = host_batches.replicate((jax.random.key(4), np.float32(1.0)), mesh)
        layout = parts.agent.model.config.layout
        second = jax.device_put(params, layout.shardings(params, mesh))
        return player(None, second, *given, *seeds)

    mesh = mesh_lib.make_mesh(1, 4, 1, devices=jax.devices()[:4])
    found, alone = play_on(mesh, 2), play_on(mesh_lib.single(), 0)
    where = jax.NamedSharding(mesh, program.ROWS)
    assert found.id.sharding.is_equivalent_to(where, 1)
    np.testing.assert_array_equal(found.turns.response, alone.turns.response)
    np.testing.assert_allclose(found.turns.log_probs, alone.turns.log_probs, atol=2e-5)


def test_each_turn_is_written_by_whom_it_belongs_to():
    params = tiny.make_params(scale=0.3)
    teacher = run(reading=crossed.CLEAN, answering=crossed.CLEAN)
    found = run(reading=crossed.CLEAN, second=params)
    turns = found.turns
    reading = turns.live & (turns.phase == Phase.READING)
    np.testing.assert_array_equal(turns.response[reading], teacher.turns.response[reading])
    assert not turns.log_probs[reading].any(), "a script has none"
    answering = turns.live & (turns.phase != Phase.READING)
    assert (turns.log_probs[answering].sum(axis=1) < 0).all()

    turned = run(first=params, answering=crossed.CLEAN).turns
    reading = turned.live & (turned.phase == Phase.READING)
    assert (turned.log_probs[reading].sum(axis=1) < 0).all()
    assert not turned.log_probs[turned.live & ~reading].any()


@pytest.fixture(scope="module")
def table():
    minds = {
        "clean": crossed.CLEAN,
        "forgetful": FORGETFUL,
        "model": tiny.make_params(scale=0.3),
    }
    return crossed.measure(
        tiny.make_parts(), mesh_lib.single(), minds, tiny.make_examples(), tiny.make_shape()
    )


def test_the_table_tells_which_half_falls_short(table):
    assert table["clean"]["clean"] == 1.0
    assert table["forgetful"]["clean"] < 0.3, "what was not stored cannot be answered"
    assert table["clean"]["forgetful"] == 1.0, "it forgets while it reads"
    assert table["clean"]["model"] < 0.3, "a random reader"


def test_the_table_is_printed_with_names_on_both_sides(table):
    lines = crossed.render(table).splitlines()
    assert lines[0].split() == ["reads", "\\", "answers", "clean", "forgetful", "model"]
    assert lines[1].split()[:2] == ["clean", "1.000"]
    assert [line.split()[0] for line in lines[1:]] == list(table)


def test_rl_does_not_start_on_a_reader_that_is_a_coin():
    parts = tiny.make_parts()
    eval_ = dataclasses.replace(parts.config.eval, episodes=8, batch_size=8)
    parts = dataclasses.replace(parts, config=dataclasses.replace(parts.config, eval=eval_))
    validator = stages.Validator(parts, mesh_lib.single(), tiny.make_examples(), tiny.make_shape())
    params = tiny.make_params(scale=0.3)
    with pytest.raises(ConfigError, match=r"rl\.least_reader=0\.95: .* answers 0\.\d+ of the"):
        validator.check_reader(params, 0.95)
    assert validator.check_reader(params, 0.0) < 0.5
