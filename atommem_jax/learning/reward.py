"""Scores of answers: one number in [0, 1] for each question, on the host.

Normalisation and token F1 follow the SQuAD evaluation (Rajpurkar et al. 2016): lower case,
without ASCII punctuation, without English articles, single spaces. The training reward of the
paper (section 4) is the share of questions answered with an exact match.
"""

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from atommem_jax.config import TaskConfig
from atommem_jax.tasks import user_functions

Metric = Callable[[str, Sequence[str]], float]
"""(prediction, aliases) -> score in [0, 1]."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """SQuAD normalisation, except that a text of which it would leave nothing keeps more.

    "A", "The The" and "!!!" can be answers; were they to become empty, then no answer at all
    would match them. So the result is the first of these that is not empty, always in lower case
    and with single spaces:

    1. the text without punctuation and without articles: "The Paris." is "paris";
    2. the text without punctuation: "A.", "(A)" and "a" are "a", "The The!" is "the the";
    3. the text: "!!!" is "!!!".

    2 yields nothing but articles, of which 1 keeps none, and 3 nothing but punctuation. So texts
    that SQuAD normalisation leaves something of, and tells apart, stay apart, and none of them
    equals a text that it would empty.
    """
    lower = text.lower()
    words = lower.translate(_PUNCTUATION)
    steps = (_ARTICLES.sub(" ", words), words, lower)
    return next(filter(None, (" ".join(step.split()) for step in steps)), "")


def exact_match(prediction: str, aliases: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the aliases after normalisation, else 0.0."""
    _check_aliases(aliases)
    found = normalise(prediction)
    return float(any(found == normalise(alias) for alias in aliases))


def f1(prediction: str, aliases: Sequence[str]) -> float:
    """The best token F1 against an alias after normalisation."""
    _check_aliases(aliases)
    found = normalise(prediction).split()
    return max(_overlap(found, normalise(alias).split()) for alias in aliases)


def find(task: TaskConfig) -> Metric:
    """The reward of a task: the function that `task.reward` names, or `exact_match`.

    Raises ConfigError where there is no such function.
    """
    spec = task.get("reward", "")
    return user_functions.find(spec, "task.reward") if spec else exact_match


NAMED: Mapping[str, Metric] = {"exact_match": exact_match, "f1": f1}
"""What `rl.reward` may name."""


def score_answers(
    answers: Sequence[str], aliases: Sequence[Sequence[str]], metric: Metric = exact_match
) -> np.ndarray:
    """Scores answer i against the aliases of question i and of no other question.

    Args:
      answers: one per question; an empty string where none was given.
      aliases: the accepted answers of each question.
      metric: `exact_match`, `f1` or any other function of (prediction, aliases).

    Returns:
      float32 [Q], each in [0, 1].

    Raises:
      ValueError: numbers of answers and questions differ, a question has no alias, or the metric
        leaves [0, 1].
      TypeError: aliases of a question are a bare string.
    """
    if len(answers) != len(aliases):
        raise ValueError(
            f"len(answers)={len(answers)}: must be len(aliases)={len(aliases)}; "
            "pass one answer per question, '' where there is none"
        )
    scores = np.zeros(len(answers), np.float32)
    for index, (answer, accepted) in enumerate(zip(answers, aliases, strict=True)):
        score = metric(answer, accepted)
        if not 0.0 <= score <= 1.0:
            raise ValueError(
                f"metric score of question {index}={score}: must lie in [0, 1]; "
                "scale the metric's result"
            )
        scores[index] = score
    return scores


def _overlap(found: Sequence[str], expected: Sequence[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    shared = (collections.Counter(found) & collections.Counter(expected)).total()
    return 2.0 * shared / (len(found) + len(expected))


def _check_aliases(aliases: Sequence[str]) -> None:
    if isinstance(aliases, str):
        raise TypeError(
            f"aliases={aliases!r}: must be a sequence of strings, not one string; pass [alias]"
        )
    if not aliases:
        raise ValueError("aliases=[]: must hold at least one accepted answer; check the data set")
