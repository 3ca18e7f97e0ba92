"""Signs of collapse: each is told once, by the name of its metric, and a sound run has none."""

import pytest

from atommem_jax.learning import collapse

SOUND = {
    "sampled_nll": 0.12,
    "turns": 16.0,
    "reading_turns": 12.0,
    "attempted/read": 3.0,
    "attempted/create": 8.0,
    "attempted/update": 3.0,
    "attempted/delete": 1.0,
    "attempted/scratchpad": 2.0,
    "response_tokens": 5.0,
    "ended": 0.99,
}


def watch():
    found = collapse.Watch()
    for _ in range(collapse.STEPS_OF_REFERENCE):
        assert found.look(SOUND) == []
    return found


def test_a_policy_that_learns_is_not_warned_of():
    """The last RL step of a run of `facts` that had reached .98, beside its first ones."""
    learned = SOUND | {"sampled_nll": 0.013, "attempted/create": 4.0, "response_tokens": 4.6}
    assert watch().look(learned) == []


@pytest.mark.parametrize(
    ("change", "metric", "advice"),
    [
        ({"sampled_nll": 0.001}, "sampled_nll is 0.001, at first 0.12", "entropy_coef"),
        ({"sampled_nll": 1.5}, "sampled_nll is 1.5", "noise"),
        ({"attempted/read": 12.0}, "attempted/read / turns is 0.75", "read_cost"),
        (
            {f"attempted/{kind}": 0.1 for kind in ("create", "update", "delete", "scratchpad")},
            "attempted/(create, update, delete, scratchpad) / reading_turns is 0.0333",
            "nothing is written",
        ),
        ({"response_tokens": 11.0}, "response_tokens is 11", "longer"),
        ({"response_tokens": 1.2}, "response_tokens is 1.2", "shrink"),
        ({"ended": 0.7}, "ended is 0.7", "response_length"),
    ],
)
def test_each_sign_is_told_once_by_its_metric(change, metric, advice):
    looking = watch()
    (told,) = looking.look(SOUND | change)
    assert told.startswith(metric)
    assert advice in told
    assert looking.look(SOUND | change) == []


def test_the_first_steps_count_across_an_interruption():
    resumed = collapse.Watch([SOUND] * collapse.STEPS_OF_REFERENCE)
    assert len(resumed.look(SOUND | {"response_tokens": 11.0})) == 1


def test_metrics_that_are_not_there_say_nothing():
    looking = collapse.Watch([{"em": 0.5}] * collapse.STEPS_OF_REFERENCE)
    assert looking.look({"em": 0.0}) == []
