"""What a stage learns from, and what it logs."""

import numpy as np
import pytest

from atommem_jax.learning import reward
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
