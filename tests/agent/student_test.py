"""Learning from the student's own trajectories: what it did, and what is recorded of it."""

import jax
import numpy as np
import pytest

from atommem_jax.agent import crossed, play
from atommem_jax.metrics import read_metrics
from atommem_jax.parallel import host_batches
from atommem_jax.parallel import mesh as mesh_lib
from experiments import train
from tests.conftest import COMPILATION_CACHE
from tests.helpers import runs, tiny

pytestmark = pytest.mark.long

ROWS = 6


@pytest.fixture(scope="module")
def played():
    """The student's rollout as it was, with the teacher's words, and the teacher's own."""
    mesh = mesh_lib.single()
    episodes, _ = tiny.make_episodes(range(ROWS))
    rows = host_batches.shard((jax.device_get(episodes), np.arange(ROWS, dtype=np.int32)), mesh)
    key, heat = host_batches.replicate((jax.random.key(4), np.float32(1.0)), mesh)
    parts, shape, params = tiny.make_parts(), tiny.make_shape(), tiny.make_params(scale=0.3)
    own = play.make_player(parts, shape, mesh)(params, *rows, key, heat)
    labelled = play.make_player(parts, shape, mesh, teacher=crossed.CLEAN)(params, *rows, key, heat)
    teacher = play.make_scripted_player(parts, shape, crossed.CLEAN, mesh)(*rows, key)
    return jax.device_get((own, labelled, teacher))


def test_the_student_acts_and_the_teacher_is_recorded(played):
    own, labelled, teacher = (trajectory.turns for trajectory in played)
    # What was done, and so all states, are the student's.
    for field in ("live", "phase", "chunk", "question", "prompt", "shown", "occupancy"):
        np.testing.assert_array_equal(getattr(labelled, field), getattr(own, field))
    jax.tree.map(np.testing.assert_array_equal, labelled.actions, own.actions)
    np.testing.assert_array_equal(played[1].answers, played[0].answers)
    # In the first turn both are in the same state, with the same randomness.
    np.testing.assert_array_equal(labelled.response[:, 0], teacher.response[:, 0])
    # Later ones are other states: its words are those of a teacher who sees them.
    later = labelled.live & teacher.live & (np.arange(labelled.live.shape[1]) > 0)
    same = (labelled.response == teacher.response).all(axis=-1)
    assert same[later].any()
    assert not same[later].all()
    assert (labelled.response != own.response).any()


def test_what_is_recorded_can_be_said(played):
    """Every label is a turn of the grammar, whatever state the student came to."""
    labelled, setting = played[1], tiny.make_parts().setting(tiny.make_shape())
    turns = labelled.turns
    parse = jax.vmap(jax.vmap(setting.grammar.parse))
    actions = jax.device_get(parse(turns.response, turns.response_lengths))
    assert (turns.response_lengths[turns.live] > 0).all()
    begun = np.arange(actions.kind.shape[-1]) < actions.count[..., None]
    assert actions.well_formed[begun & turns.live[..., None]].all()
    assert not turns.response[~turns.live].any()


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize(
    ("student", "least", "kept"), [("dagger", 1.0, 1.0), ("rft", 1.0, 0.0), ("rft", 0.0, 1.0)]
)
def test_sft_goes_on_with_the_student(
    tmp_path, tmp_path_factory, monkeypatch, student, least, kept
):
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))
    config = runs.make_config(
        **{"sft__student": student, "sft__student_after": 2, "sft__steps": 3, "rl__steps": 0},
        **{"sft__min_reward": 0.0, "sft__student_min_reward": least},
    )
    train.train(config, str(tmp_path), str(tmp_path_factory.getbasetemp() / "data"))
    first, second, third = (r for r in read_metrics(tmp_path) if r["stage"] == "sft")
    assert "teacher_em" in first.keys() & second.keys()
    assert "student_em" in third
    # All that a teacher says is learned from; of the student's own only what was worth it, and
    # after two steps no answer is right.
    assert (first["kept"], third["kept"]) == (1.0, kept)
    assert (third["gradient_norm"] > 0) == (kept > 0)
