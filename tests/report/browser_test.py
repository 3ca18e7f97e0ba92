"""The page of a report in a browser, where there is one."""

import re

import pytest
from selenium.webdriver.common.keys import Keys

from atommem_jax.report import page as page_lib
from tests.helpers.browser import Browser
from tests.report import page_test

pytestmark = pytest.mark.browser

LEFT, UP, RIGHT, DOWN = Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_RIGHT, Keys.ARROW_DOWN


@pytest.fixture(scope="module")
def browser():
    started = Browser()
    yield started
    started.close()


def make_story(number: int, right: bool, turns: int) -> dict:
    """An episode of some reading turns and a question."""
    episode = page_test.make_episode(f"text {number} <b>{'long ' * 40}")
    reading = episode["turns"][0]
    asked = reading | {
        "phase": "answering", "chunk": None, "question": 0, "actions": [], "changes": [],
        "entries": [1, 1], "scripted": True,
    }  # fmt: skip
    episode |= {"episode": number, "em": float(right), "turns": [reading] * turns + [asked]}
    episode["questions"][0] |= {"em": float(right), "answer": "x" * 200}
    return episode


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Four episodes, of which 11 and 13 have a wrong answer."""
    stories = [make_story(10 + i, right=i % 2 == 0, turns=2 + i) for i in range(4)]
    scores = {f"method_{i}": {"1x": page_test.make_cell(0.5)} for i in range(9)}
    run = page_test.make_run(scores=scores, workdir="runs/" + "long" * 30)
    return page_lib.write(tmp_path_factory.mktemp("page"), [run], page_lib.Traces(stories, {}))


def test_keys_step_through_turns_and_episodes(browser, page):
    browser.open(page)
    assert browser.find_text("#turn-title").startswith("Turn 1 of 3: reading chunk 1 of 1")
    browser.press(RIGHT, RIGHT, RIGHT, LEFT)
    assert browser.find_text("#turn-title").startswith("Turn 2 of 3")
    browser.press("j")
    assert browser.find_text("#turn-title").startswith("Turn 1 of 4")
    assert "Episode 11" in browser.find_text("#questions")
    browser.press(RIGHT, "j", "j", "j", "k")
    assert "Episode 12" in browser.find_text("#questions")
    # Up and down scroll the page, except while a control of the trace has the focus.
    browser.press(DOWN)
    assert "Episode 12" in browser.find_text("#questions")
    browser.run("document.querySelector('#next').focus()")
    browser.press(DOWN)
    assert "Episode 13" in browser.find_text("#questions")
    browser.press(UP, UP)
    assert "Episode 11" in browser.find_text("#questions")
    assert browser.read_log() == []


def test_every_control_does_something(browser, page):
    browser.open(page)
    browser.click("#next")
    assert browser.find_text("#turn-title").startswith("Turn 2")
    browser.click("#previous")
    assert browser.find_text("#turn-title").startswith("Turn 1")
    assert browser.run("document.querySelector('#previous').disabled")
    browser.click("#timeline li:last-child button")
    assert browser.find_text("#turn-title").startswith("Turn 3 of 3: question 1 of 1")
    assert "program" in browser.find_text("#turn-title")
    assert "right" in browser.find_text("#did .answer")
    browser.click("#episode-list li:nth-child(2) button")
    assert "Episode 11" in browser.find_text("#questions")
    browser.click("#did summary")
    assert browser.run("document.querySelector('#did details').open")
    browser.press(RIGHT)
    assert browser.run("document.querySelector('#did details').open")


def test_the_filter_leaves_wrong_answers(browser, page):
    browser.open(page, "#episode=12&turn=2")
    assert "4 of 4" in browser.find_text("#count")
    browser.click("#only-wrong")
    assert browser.run("document.querySelectorAll('#episode-list button').length") == 2
    assert "2 of 4" in browser.find_text("#count")
    assert "Episode 11" in browser.find_text("#questions")
    browser.press("j", "j")
    assert "Episode 13" in browser.find_text("#questions")
    browser.click("#only-wrong")
    assert browser.run("document.querySelectorAll('#episode-list button').length") == 4
    assert "Episode 13" in browser.find_text("#questions")


def test_a_filter_that_leaves_nothing_says_so(browser, tmp_path):
    stories = [make_story(1, right=True, turns=1)]
    page = page_lib.write(tmp_path, [page_test.make_run()], page_lib.Traces(stories, {}))
    browser.open(page)
    browser.click("#only-wrong")
    assert browser.find_text("#count") == "No traced episode has a wrong answer."
    browser.press(RIGHT, "j")
    browser.click("#only-wrong")
    assert browser.find_text("#turn-title").startswith("Turn 1 of 2")
    assert browser.read_log() == []


def test_what_nobody_scored_carries_no_marks(browser, tmp_path):
    story = make_story(1, right=True, turns=1) | {"em": None}
    story["start"] = [{"slot": 1, "text": "kept before"}]
    story["questions"][0] |= {"em": None, "gold": []}
    page = page_lib.write(tmp_path, [page_test.make_run()], page_lib.Traces([story], {}))
    browser.open(page)
    assert "kept before" in browser.find_text("#table")
    browser.press(RIGHT)
    assert "kept before" in browser.find_text("#table")
    told = (
        browser.find_text("#episode-list")
        + browser.find_text("#timeline")
        + browser.find_text("#did")
    )
    for mark in ("\u2713", "\u2717", "right", "wrong", "gold"):
        assert mark not in told
    assert "gold" not in browser.find_text("#questions")
    assert not browser.run("document.querySelector('#only-wrong').checkVisibility()")
    assert browser.read_log() == []


def test_the_address_names_episode_and_turn(browser, page):
    browser.open(page, "#episode=12&turn=3")
    assert "Episode 12" in browser.find_text("#questions")
    assert browser.find_text("#turn-title").startswith("Turn 3 of 5")
    browser.press(RIGHT)
    assert browser.run("location.hash") == "#episode=12&turn=4"
    browser.click("#only-wrong")
    browser.run("location.hash = '#episode=10&turn=99'")
    browser.wait_for("#questions", "Episode 10")  # though the filter had hidden it
    assert browser.find_text("#turn-title").startswith("Turn 3 of 3")
    browser.open(page, "#episode=99")
    assert "Episode 10" in browser.find_text("#questions")


@pytest.mark.parametrize("width", [1280, 768, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_any_window_in_both_schemes(browser, page, width, dark):
    browser.open(page, "#episode=11&turn=1", width=width, dark=dark)
    root = "document.documentElement"
    assert browser.run("innerWidth") == width
    assert browser.run(f"{root}.scrollWidth - {root}.clientWidth") == 0
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    channels = [int(number) for number in re.findall(r"\d+", ground)[:3]]
    assert max(channels) < 64 if dark else min(channels) > 192
    assert browser.take_picture().startswith(b"\x89PNG")
    assert browser.read_log() == []
