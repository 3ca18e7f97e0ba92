"""Signs that a policy collapses, in the metrics of its rollouts, before its reward tells of it.

A policy under RL can stop exploring, write ever longer or ever shorter turns, read in circles, or
do nothing at all, and keep its reward for a while. Each sign compares one metric of
`evaluation.statistics` with what it was in the first steps of the stage.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

STEPS_OF_REFERENCE = 3
"""How many of the first steps of a stage the later ones are compared with."""

_WRITING = ("create", "update", "delete", "scratchpad")


@dataclasses.dataclass(frozen=True)
class Sign:
    """One way of collapsing.

    Attributes:
      metric: what a warning names: a metric, or a quotient of two.
      measure: its value from the metrics of a step.
      is_bad: whether (value, value in the first steps) means a collapse.
      meaning: what the policy does then, and what to try.
    """

    metric: str
    measure: Callable[[Mapping[str, float]], float]
    is_bad: Callable[[float, float], bool]
    meaning: str


SIGNS: Sequence[Sign] = (
    Sign(
        "sampled_nll",
        lambda m: m["sampled_nll"],
        lambda now, then: now < min(0.002, then / 4),
        "almost nothing is left to chance, so nothing new is tried: raise rl.ppo.entropy_coef or "
        "lower rl.optimizer.learning_rate",
    ),
    Sign(
        "sampled_nll",
        lambda m: m["sampled_nll"],
        lambda now, then: now > 0.2 and now > 3 * then,
        "the policy dissolves into noise: lower rl.ppo.entropy_coef and "
        "rl.optimizer.learning_rate, or raise rl.ppo.kl_coef",
    ),
    Sign(
        "attempted/read / turns",
        lambda m: m["attempted/read"] / max(m["turns"], 1.0),
        lambda now, then: now > 0.6 and now > 1.5 * then,
        "turns are spent on reading in circles: set rl.ppo.read_cost, or lower rollout.read_budget",
    ),
    Sign(
        "attempted/(create, update, delete, scratchpad) / reading_turns",
        lambda m: sum(m[f"attempted/{kind}"] for kind in _WRITING) / max(m["reading_turns"], 1.0),
        lambda now, then: now < 0.2 * then,
        "documents pass and nothing is written: lower rl.ppo.create_cost and rl.ppo.invalid_cost, "
        "or begin from a better SFT checkpoint",
    ),
    Sign(
        "response_tokens",
        lambda m: m["response_tokens"],
        lambda now, then: now > 2 * then,
        "turns grow longer: look at what they say (experiments/report.py), and lower "
        "rollout.response_length",
    ),
    Sign(
        "response_tokens",
        lambda m: m["response_tokens"],
        lambda now, then: now < 0.35 * then,
        "turns shrink to almost nothing: lower rl.optimizer.learning_rate, or raise rl.ppo.kl_coef",
    ),
    Sign(
        "ended",
        lambda m: m["ended"],
        lambda now, then: now < then - 0.2,
        "turns are cut at rollout.response_length instead of being ended: leave "
        "rl.ppo.learn_from_cut=False, or raise the length",
    ),
)


class Watch:
    """Looks at the metrics of one RL stage, step by step, and tells of each sign once."""

    def __init__(self, earlier: Iterable[Mapping[str, float]] = ()):
        """`earlier` are the metrics of steps before a run was interrupted, in order."""
        self._first: list[Mapping[str, float]] = []
        self._told: set[Sign] = set()
        for metrics in earlier:
            self.look(metrics)

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """Sentences about what is wrong for the first time in these metrics; mostly none.

        Metrics in which what a sign measures is absent say nothing of it.
        """
        if len(self._first) < STEPS_OF_REFERENCE:
            self._first.append(metrics)
            return []
        found = []
        for sign in SIGNS:
            if sign in self._told:
                continue
            try:
                now = sign.measure(metrics)
                then = float(np.mean([sign.measure(first) for first in self._first]))
            except KeyError:
                continue
            if sign.is_bad(now, then):
                self._told.add(sign)
                found.append(f"{sign.metric} is {now:.3g}, at first {then:.3g}: {sign.meaning}")
        return found
