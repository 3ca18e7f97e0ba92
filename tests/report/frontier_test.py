"""The frontier is held against every point compared with every other."""

import hypothesis
import pytest
from hypothesis import strategies

from atommem_jax.report import frontier
from atommem_jax.report.frontier import Point


def make_point(em, tokens, split="test_1x", slots=3, method="learned"):
    return Point(method, split, slots, 1, em, em - 0.1, em + 0.1, 5.0, tokens)


@hypothesis.given(
    strategies.lists(
        strategies.tuples(strategies.integers(0, 6), strategies.integers(1, 6)), max_size=12
    )
)
def test_the_frontier_is_what_nothing_is_better_than(pairs):
    points = [make_point(em / 6, float(tokens)) for em, tokens in pairs]

    def is_beaten(point):
        return any(
            other.tokens <= point.tokens
            and other.em >= point.em
            and (other.tokens, other.em) != (point.tokens, point.em)
            for other in points
        )

    expected = {(p.em, p.tokens) for p in points if not is_beaten(p)}
    found = frontier.find_frontier(points)
    assert {(p.em, p.tokens) for p in found} == expected
    assert [p.tokens for p in found] == sorted(p.tokens for p in found)


def test_lengths_are_not_compared():
    with pytest.raises(ValueError, match=r"'test_1x', 'test_4x'.* cannot be compared"):
        frontier.find_frontier([make_point(0.5, 10.0), make_point(0.6, 40.0, "test_4x")])
    table = frontier.render([make_point(0.9, 10.0), make_point(0.6, 40.0, "test_4x")])
    assert "| test_1x | learned | 3 | 1 | **0.900** | 0.800 .. 1.000 | 5.0 | 10 |" in table
    assert "| **0.600** |" in table


def test_tokens_are_those_that_are_read_and_written():
    summary = {"split": "test_2x", "em": 0.5, "ci_low": 0.4, "ci_high": 0.6, "episodes": 4}
    told = {"turns": 10.0, "prompt_tokens": 30.0, "tokens": 200.0}  # written by all episodes
    point = Point.of("scratchpad", 6, 2, summary | {"statistics": told})
    assert point.tokens == 10 * 30 + 50
    assert (point.split, point.slots, point.reads) == ("test_2x", 6, 2)


def test_a_panel_is_drawn_for_each_length():
    points = [
        make_point(0.5, 10.0),
        make_point(0.7, 20.0, slots=6, method="store_all"),
        make_point(0.6, 40.0, "test_4x"),
    ]
    figure = frontier.draw(points)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["test_1x", "test_4x"]
    figure.draw_without_rendering()
    for axes in figure.axes:
        told = [text.get_text() for text in axes.get_xticklabels(which="both")]
        assert any(told)
        assert all(text.replace(",", "").isdigit() for text in told if text), told
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["learned", "store_all", "3 slots", "6 slots"]
    assert frontier.draw([]) is None
