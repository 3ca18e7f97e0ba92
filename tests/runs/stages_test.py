"""What a stage learns from, and what it logs."""

import itertools
import types

import jax
import numpy as np
import pytest

from atommem_jax.config import PPOConfig
from atommem_jax.learning import evaluation, reward
from atommem_jax.parallel import host_batches
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.runs import stages

ANSWERS = [["cat", "dog"], ["hen", ""]]
ALIASES = [[["cat"], ["hen"]], [["hen"]]]


def half(answer: str, aliases: list[str]) -> float:
    """A reward of a user's own."""
    return 1.0 if answer in aliases else 0.5 * bool(answer)


@pytest.mark.parametrize(
    ("metric", "scores"),
    [(reward.exact_match, [[1.0, 0.0], [1.0, 0.0]]), (half, [[1.0, 0.5], [1.0, 0.0]])],
)
def test_a_task_with_a_reward_of_its_own_logs_exact_match_all_the_same(monkeypatch, metric, scores):
    monkeypatch.setattr(stages.Stage, "_decode", lambda self, trajectories: ANSWERS)
    stage = object.__new__(stages.Rl)
    stage.metric = metric
    found = stage._judge(None, ALIASES, np.array([2, 1], np.int32))
    np.testing.assert_array_equal(found.scores, scores)
    np.testing.assert_array_equal(found.exact, [[1.0, 0.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("contrast", "fresh", "kept"),
    [
        ([1, 1, 1], [1, 1, 1], [0, 1, 2]),
        ([1, 0, 0], [0, 1, 1], [0, 4, 5]),
        ([0, 1, 0], [0, 0, 1], [5, 1, 2]),
        ([0, 0, 0], [0, 0, 0], [0, 1, 2]),
    ],
)
def test_groups_without_contrast_give_way_to_those_that_have_one(contrast, fresh, kept):
    found = stages.choose_groups(np.array(contrast, bool), np.array(fresh, bool))
    np.testing.assert_array_equal(found, kept)


def make_rl(monkeypatch, worth, *, resample, credit="trajectory"):
    """A stage whose k-th rollout is worth worth[k] [B Q]; a trajectory is its number."""
    monkeypatch.setattr(evaluation, "statistics", lambda played: {"turns": played["number"][0]})
    stage = object.__new__(stages.Rl)
    stage.ppo = PPOConfig(group_size=2, credit=credit)
    stage.config = types.SimpleNamespace(steps=10, episodes=3, resample=resample, ppo=stage.ppo)
    stage.mesh, steps = mesh_lib.single(), []

    def rollout(state, batch, step):
        steps.append(step)
        numbers = np.arange(6, dtype=np.int32) + 100 * batch
        return host_batches.shard({"number": numbers}, stage.mesh)

    def score(trajectories, batch):
        scores = np.asarray(worth[batch], np.float32)
        return stages.Reward(scores, scores, np.full(6, scores.shape[1], np.float32))

    monkeypatch.setattr(stage, "rollout", rollout, raising=False)
    monkeypatch.setattr(stage, "reward", score, raising=False)
    batches = itertools.count(1)
    first = rollout(None, 0, 4)
    return (*stage.refill(None, first, score(first, 0), batches, 4), steps)


SAME, MIXED = [[1.0], [1.0]], [[1.0], [0.0]]


def test_more_is_played_until_every_group_has_a_contrast(monkeypatch):
    worth = [[*MIXED, *SAME, *SAME], [*SAME, *MIXED, *SAME], [*SAME, *SAME, *MIXED], [*MIXED] * 3]
    played, found, metrics, steps = make_rl(monkeypatch, worth, resample=5)
    np.testing.assert_array_equal(played["number"], [0, 1, 102, 103, 204, 205])
    np.testing.assert_array_equal(found.scores[:, 0], [1, 0, 1, 0, 1, 0])
    assert steps == [4, 14, 24], "no two rollouts number their trajectories alike"
    assert (metrics["resampled"], metrics["contrast"]) == (2, 1.0)
    # What is said of the policy is of its first rollout: what was kept is a selection.
    assert metrics["em"] == pytest.approx(5 / 6)
    assert metrics["turns"] == 0


def test_no_more_is_played_than_the_config_allows(monkeypatch):
    worth = [[*SAME] * 3, [*SAME, *SAME, *MIXED], [*MIXED] * 3]
    played, _, metrics, _ = make_rl(monkeypatch, worth, resample=1)
    np.testing.assert_array_equal(played["number"], [104, 105, 2, 3, 4, 5])
    assert metrics["contrast"] == pytest.approx(1 / 3)
    _, _, metrics, steps = make_rl(monkeypatch, worth, resample=0)
    assert metrics == {}
    assert len(steps) == 1


@pytest.mark.parametrize(("credit", "contrast"), [("trajectory", 0.0), ("question", 1.0)])
def test_credit_by_question_finds_contrast_where_sums_are_the_same(monkeypatch, credit, contrast):
    worth = [[[1.0, 0.0], [0.0, 1.0]] * 3] * 2
    _, _, metrics, steps = make_rl(monkeypatch, worth, resample=1, credit=credit)
    assert metrics["contrast"] == contrast
    assert len(steps) == (1 if contrast else 2)


def test_rows_of_two_batches_lie_where_those_of_one_do():
    mesh = mesh_lib.make_mesh(2, 1, 1)
    first, second = (
        host_batches.shard({"x": np.arange(6) + offset, "y": np.ones((6, 2))}, mesh)
        for offset in (0, 10)
    )
    found = host_batches.choose_rows(first, second, np.array([0, 7, 2, 9, 4, 5]), mesh)
    np.testing.assert_array_equal(found["x"], [0, 11, 2, 13, 4, 5])
    assert found["x"].sharding == first["x"].sharding
    assert len(jax.tree.leaves(found)[0].sharding.device_set) == 2
