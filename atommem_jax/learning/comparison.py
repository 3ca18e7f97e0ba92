"""Two sets of records of the same questions: how much better is one, and is it chance?

Both answered the same questions of the same episodes, so that the difference of each episode is
what is resampled: what makes an episode hard for both cancels. As in `evaluation`, questions of an
episode share a memory and are drawn together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from atommem_jax.learning.evaluation import Record

_DRAWN_AT_ONCE = 1 << 20  # episodes; bounds the memory


def compare(
    ours: Sequence[Record],
    theirs: Sequence[Record],
    *,
    score: str = "em",
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, float]:
    """The mean of ours less that of theirs, over the questions that both have, and its interval.

    Args:
      ours: records of a split, as `evaluation.evaluate` gives them.
      theirs: of the same split, by another policy.
      score: 'em', 'f1', or another number of each record.
      resamples: of episodes, for the interval.
      seed: of the draws.

    Returns:
      `difference` with the bounds `low` and `high` of 95% (percentiles of a paired bootstrap),
      `ours` and `theirs`, which are the two means, and how many `questions` and `episodes` both
      have.

    Raises ValueError where they have no question in common, or one has other answers in the two.
    """
    first, second = (_index(records) for records in (ours, theirs))
    both = sorted(first.keys() & second.keys())
    if not both:
        raise ValueError(
            f"{len(ours)} and {len(theirs)} records have no question of an episode in common; "
            "compare records of the same split"
        )
    for place in both:
        found, expected = first[place]["aliases"], second[place]["aliases"]
        if list(found) != list(expected):
            raise ValueError(
                f"question {place[1]} of episode {place[0]} is to be answered by {list(found)} in "
                f"one and by {list(expected)} in the other; compare records of the same split and "
                "data"
            )
    means = [float(np.mean([side[place][score] for place in both])) for side in (first, second)]
    episodes, rows = np.unique([episode for episode, _ in both], return_inverse=True)
    gaps = [first[place][score] - second[place][score] for place in both]
    sums = np.bincount(rows, weights=gaps)
    low, high = _find_interval(sums, np.bincount(rows).astype(np.float64), resamples, seed)
    return {
        **{"difference": means[0] - means[1], "low": low, "high": high},
        **{"ours": means[0], "theirs": means[1]},
        **{"questions": len(both), "episodes": len(episodes)},
    }


def render(summaries: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown: a row a workflow, with its scores and what an episode cost.

    summaries: of evaluations of one split, each with what `compare` says where it was compared.
    """
    heads = ["workflow", "EM (95% interval)", "F1", "EM less the other's (95% interval)", "turns"]
    heads += ["tokens read", "tokens written", "retrievals", "seconds"]
    lines = [heads, ["---"] * len(heads)]
    for one in summaries:
        told = one["statistics"]
        gap = ""
        if one.get("difference") is not None:
            gap = f"{one['difference']:+.3f} ({one['low']:+.3f} .. {one['high']:+.3f})"
        costs = [told["turns"], told["tokens_read"], told["tokens_written"], told["retrievals"]]
        lines.append(
            [
                one["workflow"],
                f"{one['em']:.3f} ({one['ci_low']:.3f} .. {one['ci_high']:.3f})",
                f"{one['f1']:.3f}",
                gap,
                *(f"{cost:,.1f}" for cost in costs),
                f"{one['seconds']:,.1f}",
            ]
        )
    count = f"{summaries[0]['episodes']} episodes, {summaries[0]['questions']} questions"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + (
        f"\n\n{count}; costs are of an episode, tokens those of the model, compilation aside."
    )


def _index(records: Sequence[Record]) -> Mapping[tuple[int, int], Record]:
    return {(record["episode"], record["question"]): record for record in records}


def _find_interval(
    sums: Float[np.ndarray, " E"], counts: Float[np.ndarray, " E"], resamples: int, seed: int
) -> tuple[float, float]:
    from scipy import stats  # most of a second that those who compare nothing can save

    def mean(sums, counts, axis=-1):
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    if len(counts) == 1:  # there is one way to draw it, which SciPy refuses
        alone = float(mean(sums, counts))
        return alone, alone
    found = stats.bootstrap(
        (sums, counts),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _DRAWN_AT_ONCE // len(counts)),
        # BCa has no bounds for differences that are all the same.
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
