"""Figures hold the run's numbers; the page loads nothing and takes no text for markup."""

import dataclasses
import html.parser
import json
import re
from xml.etree import ElementTree

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from atommem_jax.learning import life_cycle
from atommem_jax.report import failures, figures
from atommem_jax.report import page as page_lib

HOSTILE = '</script><img src=x onerror=alert(1)><b>&amp;"{{script}} <!-- $x^2$'


def make_records(rl_steps: int):
    """Records of a run with two SFT steps before RL."""
    evaluated = {"em": 0.4, "ci_low": 0.3, "ci_high": 0.5}
    records = [
        {"step": 1, "stage": "sft", "loss": 2.0},
        {"step": 2, "stage": "sft", "loss": 1.0},
        {"step": 2, "stage": "eval", **evaluated},
    ]
    for i in range(rl_steps):
        counts = {
            f"applied/{name}": 1.0 + i
            for name in ("create", "read", "update", "delete", "scratchpad")
        }
        rest = {"em": i / 10, "sampled_nll": 1.0, "clip_fraction": 0.1, "occupancy": 3.0}
        rest |= {"turns": 4.0, "evicted/create": 2.0}
        records.append({"step": 3 + i, "stage": "rl", **rest, **counts})
    return [*records, {"step": 2 + rl_steps, "stage": "eval", **evaluated}]


def make_cell(em: float):
    return {"em": em, "ci_low": em - 0.125, "ci_high": em + 0.125, "episodes": 16}


def make_episode(text: str = "Ann works at Foo."):
    """One episode of one turn, as `trace.describe` gives it."""
    action = {
        "kind": "create", "target": None, "text": text, "fates": ["applied"], "slot": 0, "was": "",
        "tokens": 5,
    }  # fmt: skip
    turn = {
        "phase": "reading", "chunk": 0, "question": None, "scripted": False, "query": text,
        "shown": [], "response": text, "actions": [action], "entries": [0, 1],
        "changes": [{"slot": 0, "events": ["added"], "before": None, "after": text}],
        "scratchpad": [["added", text]],
    }  # fmt: skip
    question = {"text": text, "gold": [text], "answer": text, "em": 1.0}
    return {
        "episode": 3, "trajectory": 3, "em": 1.0, "slots": 2, "chunks": [text],
        "questions": [question], "turns": [turn],
    }  # fmt: skip


def make_run(name: str = "mine", scores=None, records=None, **facts):
    records = make_records(4) if records is None else records
    return page_lib.Run(name, facts, records, scores or {}, slots=5)


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: tags, attributes, and text by element id."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.scripts = [], [], [], {}
        self._script = None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self._script = dict(attrs).get("id", "") if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text.append(data)
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


# ---------------------------------------------------------------------------------------------
# The learning plot


def test_a_plot_shows_the_run(tmp_path):
    page_lib.plot_learning(make_records(9), tmp_path / "long.png")
    page_lib.plot_learning(make_records(2), tmp_path / "short.png")
    pixels = {name: matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("long", "short")}
    height, width = pixels["long"].shape[:2]
    assert width > 2 * height > 400  # three panels side by side
    # Curves are coloured, axes and text are grey; every panel holds some.
    for panel in np.array_split(pixels["long"][..., :3], 3, axis=1):
        assert (np.ptp(panel, axis=-1) > 0.2).sum() > 500
    assert (pixels["long"] != pixels["short"]).any()


def test_the_ending_chooses_the_format(tmp_path):
    page_lib.plot_learning(make_records(2), tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("records", [[], [{"step": 1, "stage": "sft", "loss": 1.0}]])
def test_a_run_without_rl_is_refused(tmp_path, records):
    with pytest.raises(ValueError, match=r"rl\.steps > 0"):
        page_lib.plot_learning(records, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# Figures


def read_lines(axes) -> dict:
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.get_lines()}


def test_operations_are_counted_a_turn():
    figure = figures.draw_operations({"one": make_records(3), "two": make_records(1)})
    assert [axes.get_title("left") for axes in figure.axes] == [
        "create",
        "read",
        "update",
        "delete",
        "scratchpad",
    ]
    for axes in figure.axes:
        lines = read_lines(axes)
        np.testing.assert_allclose(lines["one"], [[1, 2, 3], [0.25, 0.5, 0.75]])
        np.testing.assert_allclose(lines["two"], [[1], [0.25]])
    plt.close(figure)


def test_the_table_is_drawn_with_its_capacity():
    figure = figures.draw_occupancy({"one": make_records(2)}, {"one": 5})
    lines = read_lines(figure.axes[0])
    np.testing.assert_allclose(lines["entries"][1], [3, 3])
    np.testing.assert_allclose(lines["evicted a turn"][1], [0.5, 0.5])
    np.testing.assert_allclose(lines["capacity, 5"][1], [5, 5])
    assert figure.axes[0].get_ylim()[1] > 5
    plt.close(figure)


def test_validation_stands_where_it_was_made():
    figure = figures.draw_em_curve({"one": make_records(3)})
    (container,) = figure.axes[0].containers
    np.testing.assert_allclose(container[0].get_xydata(), [[0, 0.4], [3, 0.4]])
    np.testing.assert_allclose(container[2][0].get_segments()[0], [[0, 0.3], [0, 0.5]])
    plt.close(figure)


def test_scores_are_ordered_by_value_with_their_intervals():
    scores = {
        "no_memory": {"1x": make_cell(0.25), "4x": make_cell(0.25)},
        "atommem_rl": {"1x": make_cell(0.75), "4x": make_cell(0.5)},
        "atommem_rl_t1": {"1x": make_cell(0.5)},
    }
    figure = figures.draw_scores({"one": scores}, ["1x", "4x"], {"atommem_rl": "learned"})
    first, second = figure.axes
    assert [text.get_text() for text in first.get_yticklabels()] == ["learned", "no_memory"]
    assert (first.get_title("left"), second.get_title("left")) == ("1x", "4x")
    dots = [container[0].get_xydata()[0] for container in first.containers]
    assert [em for em, _ in dots] == [0.75, 0.5, 0.25]
    assert [round(y) for _, y in dots] == [0, 0, 1]
    bar = first.containers[0][2][0].get_segments()[0]
    np.testing.assert_allclose(bar[:, 0], [0.625, 0.875])
    assert len(second.containers) == 2
    plt.close(figure)


def test_a_method_evaluated_by_sampling_only_has_its_row():
    scores = {"atommem_rl_t0.5": {"1x": make_cell(0.5)}, "store_all": {"1x": make_cell(0.25)}}
    assert figures.order_methods({"one": scores}) == [("one", "atommem_rl"), ("one", "store_all")]


SHARES = {"refused": 0.25, "evicted": 0.125}


def test_wrong_answers_are_stacked_in_the_order_of_their_stages():
    methods = {"atommem_rl_t1": {"4x": {"not_used": 0.25, **SHARES}, "1x": {}}, "store_all": {}}
    figure = failures.draw_failures({"one": methods}, ["1x", "2x", "4x"], {"atommem_rl": "mine"})
    first, last = figure.axes  # a scale that nobody tells of has no panel
    assert (first.get_title("left"), last.get_title("left")) == ("1x", "4x")
    assert not first.patches
    bars = [(bar.get_label(), bar[0].get_x(), bar[0].get_width()) for bar in last.containers]
    assert bars == [("refused", 0, 0.25), ("evicted", 0.25, 0.125), ("not_used", 0.375, 0.25)]
    assert [text.get_text() for text in first.get_yticklabels()] == [
        "mine · at 1",
        "store_all · greedy",
    ]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["refused", "evicted", "not used"]
    plt.close(figure)


def test_wrong_answers_over_training_are_a_bar_a_validation():
    rows = [{"step": step, "stage": "eval", "stage/refused": 1 / step} for step in (2, 4, 8)]
    figure = failures.draw_failures_over_training({"one": [*make_records(3), *rows], "two": []})
    (axes,) = figure.axes
    (bars,) = axes.containers
    assert [bar.get_height() for bar in bars] == [0.5, 0.25, 0.125]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["2", "4", "8"]
    plt.close(figure)


def test_every_stage_has_a_colour_of_its_own():
    shares = dict.fromkeys(life_cycle.STAGES, 1 / len(life_cycle.STAGES))
    figure = failures.draw_failures({"one": {"mine": {"1x": shares}}}, ["1x"], {})
    faces = [bar[0].get_facecolor() for bar in figure.axes[0].containers]
    assert len(set(faces)) == len(life_cycle.STAGES)
    plt.close(figure)


def test_shares_are_read_from_summaries_and_from_validations():
    assert failures.read_shares({"stages": {"refused": 3}, "questions": 12}) == {"refused": 0.25}
    assert failures.read_shares({"stage/refused": 0.5, "stage/new": 1}) == {"refused": 0.5}
    assert failures.read_shares({"em": 0.5, "stage": "eval"}) is None


def test_there_is_no_figure_of_nothing():
    assert failures.draw_failures({"one": {}}, ["1x"], {}) is None
    assert failures.draw_failures_over_training({"one": make_records(2)}) is None
    for draw in (figures.draw_em_curve, figures.draw_operations, figures.draw_occupancy):
        assert draw({"one": make_records(0)}) is None
    assert figures.draw_policy({}) is None
    assert figures.draw_sft({"one": []}) is None
    assert figures.draw_scores({"one": {}}, [], {}) is None


def test_a_drawing_follows_the_colours_of_the_page():
    figure = figures.draw_em_curve({"one": make_records(3), "<$x^2$>": make_records(2)})
    svg = figures.to_svg(figure, f"EM {HOSTILE}")
    plt.close(figure)
    root = ElementTree.fromstring(svg)  # well formed, without a namespace
    assert root.tag == "svg"
    assert root.get("aria-label") == f"EM {HOSTILE}"
    assert not re.search(r"(fill|stroke): #", svg)
    assert {"var(--ink)", "var(--series-0)", "var(--series-1)"} <= set(re.findall(r"var\S+\)", svg))
    assert any("<$x^2$>" in "".join(element.itertext()) for element in root.iter("text"))


# ---------------------------------------------------------------------------------------------
# The page


def test_a_report_is_a_page_and_pictures(tmp_path):
    run = make_run(scores={"atommem_rl": {"1x": make_cell(0.5)}}, seed="0")
    run = dataclasses.replace(run, failures={"atommem_rl": {"1x": SHARES}})
    page = page_lib.write(tmp_path / "new" / "report", [run], page_lib.Traces([make_episode()], {}))
    names = {"em_by_scale", "failures", "em_curve", "operations", "occupancy", "policy", "sft"}
    assert page.name == "index.html"
    assert {path.name for path in page.parent.iterdir()} == {
        "index.html",
        *(f"{name}.png" for name in names),
        *(f"{name}.pdf" for name in names),
    }
    for name in names:
        assert np.ptp(matplotlib.image.imread(page.parent / f"{name}.png")) > 0.5
        assert (page.parent / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert Page(page).tags.count("svg") == len(names)


def test_the_page_loads_nothing(tmp_path):
    run = make_run(scores={"atommem_rl": {"1x": make_cell(0.5)}})
    page = page_lib.write(tmp_path, [run], page_lib.Traces([make_episode()], {}))
    text = page.read_text()
    assert not re.search(r"https?:|//\w+\.\w|@import|@font-face", text)
    assert re.search(r"url\((?!#)", text) is None
    for tag, name, value in Page(page).attributes:
        assert name not in ("src", "srcset", "action", "data", "poster"), (tag, name, value)
        if "href" in name:
            assert value.startswith("#")
    assert "default-src 'none'" in text


def test_parts_of_drawings_keep_their_names_apart(tmp_path):
    page = page_lib.write(tmp_path, [make_run()], page_lib.Traces([make_episode()], {}))
    attributes = Page(page).attributes
    ids = [value for _, name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    named = {value[1:] for _, name, value in attributes if name == "href"}
    named |= set(re.findall(r"url\(#([^)]+)\)", page.read_text()))
    assert named <= set(ids)


def test_hostile_text_stays_text(tmp_path):
    run = make_run(HOSTILE, {HOSTILE: {HOSTILE: make_cell(0.5)}}, None, **{HOSTILE: HOSTILE})
    episodes = [make_episode(HOSTILE)]
    missing = [page_lib.Missing(HOSTILE, HOSTILE)]
    harmless = make_run("mine", {"m": {"s": make_cell(0.5)}}, None, fact="value")
    plain = page_lib.write(
        tmp_path / "plain",
        [harmless],
        page_lib.Traces([make_episode()], {"fact": "value"}),
        [page_lib.Missing("what", "command")],
    )
    page = page_lib.write(
        tmp_path / "hostile", [run], page_lib.Traces(episodes, {HOSTILE: HOSTILE}), missing
    )
    parsed = Page(page)

    def count(page):
        # Curves are drawn of as many parts as there is to draw.
        return sorted(tag for tag in page.tags if tag not in ("g", "path", "use", "text", "tspan"))

    assert count(parsed) == count(Page(plain))
    assert not [row for row in parsed.attributes if row[1].startswith("on")]
    assert json.loads(parsed.scripts["data"]) == {"episodes": episodes}
    assert parsed.scripts[""] == Page(plain).scripts[""]
    assert "".join(parsed.text).count(HOSTILE) >= 8


def test_scores_are_written_as_numbers(tmp_path):
    scores = {
        "store_all": {"10x": make_cell(0.25)},
        "atommem_rl_t1": {"2x": make_cell(0.5)},
        "atommem_rl": {"2x": make_cell(0.75), "10x": make_cell(0.5)},
    }
    page = page_lib.write(tmp_path, [make_run(scores=scores)])
    (table,) = re.findall(r'<table class="results">.*?</table>', page.read_text(), re.DOTALL)
    rows = [
        [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
        for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
    ]
    assert rows == [
        ["method", "temperature", "2x", "10x"],
        ["learned, after RL", "1", "0.500 [0.375, 0.625] of 16", "not evaluated"],
        ["learned, after RL", "greedy", "0.750 [0.625, 0.875] of 16", "0.500 [0.375, 0.625] of 16"],
        ["store all", "greedy", "not evaluated", "0.250 [0.125, 0.375] of 16"],
    ]


def test_what_a_run_lacks_is_left_out_and_said(tmp_path):
    full = make_run(scores={"m": {"1x": make_cell(0.5)}})
    page_lib.write(tmp_path, [full], page_lib.Traces([make_episode()], {}))
    bare = make_run(records=[])
    page = page_lib.write(
        tmp_path, [bare], None, [page_lib.Missing("Curves: none.", "python x.py")]
    )
    text = Page(page)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]  # nor the older ones
    assert "svg" not in text.tags
    assert "table" not in text.tags
    assert "button" not in text.tags
    assert {"Curves: none.", "python x.py"} <= set(text.text)


@pytest.mark.parametrize("names", [[], ["one", "one"]])
def test_runs_without_names_of_their_own_are_refused(tmp_path, names):
    with pytest.raises(ValueError, match="one or more, all different"):
        page_lib.write(tmp_path, [make_run(name) for name in names])


@pytest.mark.parametrize(
    ("step", "temperature", "workflow", "name"),
    [
        (2, 0.0, "learned", "atommem_sft"),
        (6, 0.0, "learned", "atommem_rl"),
        (6, 1.0, "learned", "atommem_rl_t1"),
        (4, 0.5, "learned", "atommem_step4_t0.5"),
        (6, 1.0, "store_all", "store_all_t1"),
        (2, 0.0, "store_all", "store_all_sft"),
    ],
)
def test_an_evaluation_is_called_as_in_the_results(step, temperature, workflow, name):
    assert page_lib.name_method(step, temperature, make_records(4), workflow) == name
