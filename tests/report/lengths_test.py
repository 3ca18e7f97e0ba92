"""Lengths are read from names, and what is drawn is what was measured."""

import matplotlib.pyplot as plt
import pytest

from atommem_jax.config import parse
from atommem_jax.report import lengths, page
from atommem_jax.report import run as run_lib
from experiments.configs import babilong, village


def make_cell(em):
    return {"em": em, "ci_low": em - 0.1, "ci_high": em + 0.05, "episodes": 8}


def test_a_length_is_read_from_the_name_of_a_split():
    found = {
        name: lengths.find_tokens(name)
        for name in ("test_0k", "64k", "test_1m", "test_10m", "test_4x", "test", "test_200", "")
    }
    assert found == {
        "test_0k": 0,
        "64k": 64_000,
        "test_1m": 1_000_000,
        "test_10m": 10_000_000,
        "test_4x": None,
        "test": None,
        "test_200": None,
        "": None,
    }


def test_lines_go_from_the_shortest_document_to_the_longest():
    cells = {name: make_cell(em) for name, em in (("10m", 0.7), ("1k", 0.9), ("512k", 0.8))}
    cited = (lengths.Cited("others", (2_000, 5_000_000), 0.6),)
    figure = lengths.draw({"ours": cells | {"4x": make_cell(0.1)}, "none": {}}, cited)
    [axes] = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {
        "ours": [[1e3, 0.9], [512e3, 0.8], [1e7, 0.7]],
        "others": [[2e3, 0.6], [5e6, 0.6]],
    }
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1k", "512k", "5m"]
    [band] = axes.collections
    low, high = band.get_datalim(axes.transData).intervaly
    assert (low, high) == pytest.approx((0.6, 0.95))
    plt.close(figure)


def test_a_document_without_background_has_its_place_on_a_logarithmic_scale():
    figure = lengths.draw({"ours": {"0k": make_cell(0.9), "1k": make_cell(0.8)}})
    [axes] = figure.axes
    assert 0 < axes.lines[0].get_xdata()[0] < 1000
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0k", "1k"]
    plt.close(figure)


@pytest.mark.parametrize("names", [(), ("1k",), ("1x", "4x")])
def test_nothing_is_drawn_without_two_lengths(names):
    assert lengths.draw({"ours": {name: make_cell(0.5) for name in names}}) is None


def test_columns_are_sorted_by_their_length():
    names = ("10m", "1k", "0k", "1m", "512k", "2k")
    run = page.Run("a", {}, scores={"ours": {name: make_cell(0.5) for name in names}})
    assert page.sort_columns([run]) == ["0k", "1k", "2k", "512k", "1m", "10m"]


def test_scales_that_are_no_lengths_are_not_lost(tmp_path):
    scores = {"ours": {name: make_cell(0.5) for name in ("1k", "1m", "4x")}}
    text = page.write(tmp_path, [page.Run("a", {}, scores=scores)]).read_text()
    assert "Exact match by scale" in text
    assert "by length of the document" not in text


def test_the_page_draws_lengths_and_says_who_is_cited(tmp_path):
    scores = {"ours": {name: make_cell(0.5) for name in ("1k", "1m")}}
    cited = run_lib.find_cited(parse(babilong.get_config("2")))
    [point] = cited
    assert (point.tokens, point.em) == ((32_000, 32_000), 0.874)
    assert point.name == "RMT, 137M, fine-tuned, task 2"  # as told from those of other tasks
    text = page.write(tmp_path, [page.Run("a", {}, scores=scores, cited=cited)]).read_text()
    assert "Exact match by length of the document" in text
    assert "grey: published by others" in text
    assert run_lib.find_cited(parse(village.get_config())) == ()
