"""Differences between two sets of records, against draws of episodes one by one."""

import numpy as np
import pytest

from atommem_jax.learning import comparison


def make_records(scores, *, first=0):
    """Records of episodes, each with the scores of its questions."""
    return [
        {
            "episode": first + episode,
            "question": q,
            "aliases": [f"answer {episode} {q}"],
            "em": float(score),
            "f1": float(score) / 2,
        }
        for episode, row in enumerate(scores)
        for q, score in enumerate(row)
    ]


def test_the_interval_is_that_of_episodes_drawn_in_pairs():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, 60)
    hard = rng.random(60) < 0.5  # for both: what pairing takes out
    theirs = [
        [float(rng.random() < (0.1 if h else 0.9)) for _ in range(n)]
        for n, h in zip(sizes, hard, strict=True)
    ]
    ours = [[max(x, float(rng.random() < 0.15)) for x in row] for row in theirs]
    found = comparison.compare(make_records(ours), make_records(theirs), resamples=4000)
    gaps = [sum(a) - sum(b) for a, b in zip(ours, theirs, strict=True)]
    assert found["difference"] == pytest.approx(sum(gaps) / sizes.sum())
    assert found["ours"] - found["theirs"] == pytest.approx(found["difference"])
    assert (found["questions"], found["episodes"]) == (sizes.sum(), 60)

    draws = []
    for _ in range(4000):
        drawn = rng.integers(0, 60, 60)
        draws.append(sum(gaps[i] for i in drawn) / sum(sizes[i] for i in drawn))
    np.testing.assert_allclose(
        [found["low"], found["high"]], np.quantile(draws, [0.025, 0.975]), atol=0.012
    )
    # Not pairing would be too wide to see the difference.
    spread = found["high"] - found["low"]
    alone = [np.mean([np.mean(ours[i]) for i in rng.integers(0, 60, 60)]) for _ in range(500)]
    assert spread < np.quantile(alone, 0.975) - np.quantile(alone, 0.025)
    f1 = comparison.compare(make_records(ours), make_records(theirs), score="f1")
    assert f1["difference"] == pytest.approx(found["difference"] / 2)


def test_the_same_records_do_not_differ():
    records = make_records([[1, 0], [1], [0]])
    found = comparison.compare(records, records)
    assert (found["difference"], found["low"], found["high"]) == (0.0, 0.0, 0.0)


def test_only_questions_of_both_are_compared():
    ours, theirs = make_records([[1], [1], [0]]), make_records([[0], [0]], first=1)
    ours[1]["aliases"], ours[2]["aliases"] = theirs[0]["aliases"], theirs[1]["aliases"]
    found = comparison.compare(ours, theirs)
    assert (found["questions"], found["episodes"]) == (2, 2)
    assert found["difference"] == 0.5
    alone = comparison.compare(ours, theirs[:1])
    assert (alone["low"], alone["high"]) == (1.0, 1.0), "one episode is drawn in one way"


def test_other_questions_are_refused():
    ours = make_records([[1], [1]])
    with pytest.raises(ValueError, match="2 and 1 records have no question"):
        comparison.compare(ours, make_records([[0]], first=7))
    theirs = make_records([[1], [1]])
    theirs[1]["aliases"] = ["another"]
    with pytest.raises(ValueError, match=r"question 0 of episode 1 .*\['another'\] in the other"):
        comparison.compare(ours, theirs)
