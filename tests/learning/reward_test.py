"""Answer scores against literal cases."""

import itertools
import string

import numpy as np
import pytest

from atommem_jax.learning import reward


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Paris.", "paris"),
        ("  The  Eiffel\tTower ", "eiffel tower"),
        ("An apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),  # an article only as a whole word
        ("rock-'n'-roll", "rocknroll"),
        ("São Paulo", "são paulo"),
        ("", ""),
        ("A", "a"),  # nothing would be left: articles are kept
        ("A.", "a"),
        ("(A)", "a"),
        ("An", "an"),
        ("The The!", "the the"),
        ("...the\n...  THE?", "the the"),
        ("!!!", "!!!"),  # nor that: punctuation is kept
        (" ? ! ", "? !"),
    ],
)
def test_normalise(text, normal):
    assert reward.normalise(text) == normal


def test_normalise_leaves_normal_text_alone():
    for text in ("Paris.", "The  Eiffel Tower", "A", "(A)", "The The!", "!!!", "U.S.A.", ""):
        once = reward.normalise(text)
        assert reward.normalise(once) == once


def squad(text: str) -> str:
    """The evaluation's own rule, written out word by word."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))


def test_what_is_kept_of_empty_answers_equals_no_other_answer():
    """Over all texts of up to four of these pieces, the same as SQuAD's rule where it keeps any."""
    pieces = ["a", "The", "an", ".", "!", " ", "b"]
    texts = {"".join(p) for n in range(5) for p in itertools.product(pieces, repeat=n)}
    kept = {text: reward.normalise(text) for text in texts if squad(text)}
    assert kept == {text: squad(text) for text in kept}
    rest = {text: reward.normalise(text) for text in texts - kept.keys()}
    assert not {*kept.values()} & {*rest.values()}
    assert all(bool(normal) == bool(text.strip()) for text, normal in rest.items())
    assert len({rest[text] for text in ("a", "an", "The", "a a", ".", "!", "! .", "")}) == 8


@pytest.mark.parametrize(
    ("prediction", "aliases", "score"),
    [
        ("A.", ["A"], 1.0),
        ("(A)", ["A"], 1.0),
        ("The The!", ["The The"], 1.0),
        ("The", ["The The"], 0.0),
        ("A", ["An"], 0.0),
        ("a.", ["."], 0.0),
        ("the Paris", ["Lyon", "Paris."], 1.0),
        ("Paris, France", ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
        ("", ["A"], 0.0),  # no answer must not match what normalisation would make empty
        ("", ["!!!"], 0.0),
        ("a", ["A"], 1.0),
        ("", [""], 1.0),
        ("2 + 2", ["22"], 0.0),
    ],
)
def test_exact_match(prediction, aliases, score):
    assert reward.exact_match(prediction, aliases) == score


@pytest.mark.parametrize(
    ("prediction", "aliases", "score"),
    [
        # "barack obama" against "barack hussein obama": precision 1, recall 2/3, F1 0.8.
        ("Barack Obama", ["Barack Hussein Obama"], 0.8),
        # Repeats count as often as both have them: shared 1 of 3 and 1, F1 2 / (3 + 1).
        ("paris paris paris", ["Paris"], 0.5),
        ("red fox", ["blue", "a red fox!"], 1.0),  # the best alias
        ("yes", ["no"], 0.0),
        ("", ["Paris"], 0.0),
        ("", [""], 1.0),
        ("The The!", ["The The"], 1.0),
        ("A.", ["An apple"], 0.0),
    ],
)
def test_f1(prediction, aliases, score):
    assert reward.f1(prediction, aliases) == pytest.approx(score)


def test_defect_5_an_answer_counts_for_its_own_question_only():
    """Right answers to the wrong questions, or to all at once, score nothing."""
    aliases = [["Paris"], ["Rome"], ["Oslo", "Christiania"]]
    scores = reward.score_answers(["Rome", "Paris", "oslo."], aliases)
    np.testing.assert_array_equal(scores, np.array([0, 0, 1], np.float32))
    assert scores.dtype == np.float32
    everything = "Paris Rome Oslo"
    np.testing.assert_array_equal(reward.score_answers([everything] * 3, aliases), [0, 0, 0])


def test_defect_5_text_is_normalised():
    np.testing.assert_array_equal(reward.score_answers(["The Paris."], [["paris"]]), [1])


def test_defect_5_scores_stay_in_the_unit_interval():
    repeated = reward.score_answers(["Paris"], [["Paris", "paris", "Paris."]])
    np.testing.assert_array_equal(repeated, [1])
    with pytest.raises(ValueError, match=r"metric score of question 0=2.0: must lie in \[0, 1\]"):
        reward.score_answers(["x"], [["x"]], lambda prediction, aliases: 2.0)
    with pytest.raises(ValueError, match="metric score of question 0=nan"):
        reward.score_answers(["x"], [["x"]], lambda prediction, aliases: float("nan"))


def test_score_answers_uses_the_metric_given():
    np.testing.assert_allclose(
        reward.score_answers(["new york city", ""], [["New York"], ["Oslo"]], reward.f1), [0.8, 0.0]
    )


def test_no_question_gives_no_score():
    assert reward.score_answers([], []).shape == (0,)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"len\(answers\)=1: must be len\(aliases\)=2"):
        reward.score_answers(["x"], [["x"], ["y"]])
    with pytest.raises(TypeError, match="aliases='Paris'"):
        reward.score_answers(["P"], ["Paris"])
    with pytest.raises(ValueError, match="at least one accepted answer"):
        reward.score_answers(["x"], [[]])
