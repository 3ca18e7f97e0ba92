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


# ---------------------------------------------------------------------------------------------
# The ways of facts


def write(kind: str, text: str, slot: int = 0, before: str | None = None) -> dict:
    """A reading turn that changed one entry."""
    event = {"create": "added", "update": "updated", "delete": "deleted"}[kind]
    after = None if kind == "delete" else text
    turn = page_test.make_episode(text)["turns"][0]
    action = turn["actions"][0] | {"kind": kind, "text": text, "slot": slot}
    change = {"slot": slot, "events": [event], "before": before, "after": after}
    return turn | {"actions": [action], "changes": [change], "scratchpad": []}


def idle(chunk: int = 0) -> dict:
    """A reading turn that did nothing."""
    return write("create", "x") | {"chunk": chunk, "actions": [], "changes": [], "response": ""}


def ask(question: int = 0) -> dict:
    """An answering turn."""
    return idle() | {"phase": "answering", "chunk": None, "question": question}


def make_chain(number: int, stage: str | None, turns: list[dict], **fact) -> dict:
    """An episode of one question and one fact behind it."""
    story = page_test.make_episode("Bo left. Ann works at Foo. Cy slept.")
    known = {
        "text": "Ann works at Foo.", "note": "", "chunk": 0, "stage": stage,
        "events": [], "holders": [], "updates": None, "survived": 1.0,
    } | fact  # fmt: skip
    right = float(stage is None)
    question = {"text": f"Where is {number}?", "gold": ["Foo"], "answer": "?", "em": right}
    question |= {"stage": stage, "facts": [known]}
    return story | {"episode": number, "em": right, "turns": turns, "questions": [question]}


CORRUPTED = make_chain(
    1,
    "corrupted",
    [idle(), write("create", "Ann Foo"), idle(), write("update", "Ann Bar", 0, "Ann Foo"), ask()],
    events=[[0, "seen"], [1, "seen"], [1, "stored"], [3, "corrupted"]],
    holders=[[1, [0]], [3, []]],
    updates=1,
    survived=0.5,
)
MISSED = make_chain(2, "not_written", [idle(), write("create", "Zed Qux", 1), ask()])
WHOLE = make_chain(3, None, [write("create", "Ann Foo"), ask()], holders=[[0, [0]]])


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Three episodes, and how another run played them."""
    other = [CORRUPTED | {"turns": [idle(), idle(), *WHOLE["turns"]]}, WHOLE, MISSED]
    beside = page_lib.Traces(other, {}, name="step 9")
    traces = page_lib.Traces([CORRUPTED, MISSED, WHOLE], {}, name="step 4", beside=beside)
    return page_lib.write(tmp_path_factory.mktemp("chains"), [page_test.make_run()], traces)


def read_class(browser, turn: int) -> set[str]:
    script = f"document.querySelector('#timeline [data-place=\"{turn}\"] button').className"
    return set(browser.run(script).split())


def test_the_way_of_a_fact_is_marked_from_turn_to_turn(browser, chains):
    browser.open(chains, "#episode=1&turn=2")
    ways = [read_class(browser, turn) & {"kept", "lost", "event"} for turn in range(5)]
    assert ways == [{"event"}, {"event", "kept"}, {"kept"}, {"event", "lost"}, set()]
    told = browser.find_text("#path")
    for words in ("Ann works at Foo.", "corrupted", "2 stored", "50% left"):
        assert words in told
    assert browser.find_text("#saw mark") == "Ann works at Foo."
    assert "fact 1" in browser.find_text("#table tbody tr")
    assert "fact 1 stored" in browser.find_text("#turn-events")
    browser.press("f")
    assert browser.find_text("#turn-title").startswith("Turn 4 of 5")
    assert "fact 1" not in browser.find_text("#table tbody tr")
    browser.press("f")
    assert "no later step" in browser.find_text("#jumped")
    browser.click("#path .event")
    assert browser.find_text("#turn-title").startswith("Turn 1 of 5")
    assert browser.read_log() == []


def test_the_filter_by_stage_leaves_what_broke_there(browser, chains):
    browser.open(chains)
    assert "corrupted: 1 answers in 1 episodes" in browser.find_text("#stage")
    for stage, episode, left in (("not_written", 2, 1), ("corrupted", 1, 1), ("", 1, 3)):
        browser.run(f"document.querySelector('#stage').value = '{stage}'")
        browser.run("document.querySelector('#stage').dispatchEvent(new Event('change'))")
        assert f"{left} of 3" in browser.find_text("#count")
        assert f"Episode {episode}," in browser.find_text("#questions")


def test_entries_are_searched_for_and_changes_jumped_to(browser, chains):
    browser.open(chains)
    browser.click("#next-change")
    assert browser.find_text("#turn-title").startswith("Turn 2 of 5")
    browser.press("c")
    assert browser.find_text("#turn-title").startswith("Turn 4 of 5")
    browser.press("c")
    assert "no later change" in browser.find_text("#jumped")
    browser.press("C")
    assert browser.find_text("#turn-title").startswith("Turn 2 of 5")
    browser.run("document.querySelector('#search').focus()")
    browser.press(*"qux", Keys.ENTER)
    browser.wait_for("#count", "1 of 3")
    assert "Episode 2," in browser.find_text("#questions")
    assert browser.find_text("#turn-title").startswith("Turn 2 of 3")
    assert "Zed Qux" in browser.find_text("#table tr.found")
    browser.press(*[Keys.BACKSPACE] * 3, *"nowhere", Keys.ENTER)
    browser.wait_for("#count", "No traced episode is left.")
    browser.press(*[Keys.BACKSPACE] * 7, Keys.ENTER)
    browser.wait_for("#count", "3 of 3")
    assert browser.read_log() == []


def test_two_runs_stand_side_by_side_at_the_same_part(browser, chains):
    browser.open(chains, "#episode=1&turn=5")
    assert "step 4" in browser.find_text("#questions")
    assert "step 9" in browser.find_text("#questions")
    assert browser.find_text("#beside-title").startswith("step 9: Turn 4 of 4: question 1")
    browser.press(LEFT, LEFT, LEFT, LEFT)
    assert browser.find_text("#beside-title").startswith("step 9: Turn 1 of 4: reading chunk 1")
    assert "Nothing" not in browser.find_text("#beside-table")
    browser.press("j")
    assert "Ann Foo" in browser.find_text("#beside-table")
    browser.click("#side-by-side")
    assert not browser.run("document.querySelector('#beside').checkVisibility()")
    assert "step 9" not in browser.find_text("#questions")
    assert browser.read_log() == []


@pytest.mark.parametrize("width", [1280, 360])
def test_a_page_of_two_runs_fits_any_window(browser, chains, width):
    browser.open(chains, "#episode=1&turn=2", width=width)
    root = "document.documentElement"
    assert browser.run(f"{root}.scrollWidth - {root}.clientWidth") == 0


# ---------------------------------------------------------------------------------------------
# Long lists

TURNS, EPISODES = 10_000, 1_000


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    """An episode of 10,000 turns, whose every third changes one of 64 entries, among 1,000."""
    turns = [
        write("create" if t < 192 else "update", f"entry {t}", t // 3 % 64, None)
        | {"chunk": t, "response": ""}
        if t % 3 == 0
        else idle(t)
        for t in range(TURNS - 1)
    ]
    held = [[3 * i, [i % 64]] for i in range(1000)]
    events = [[3 * i, "carried"] for i in range(1000)]
    chain = {"events": events, "holders": held}
    long = make_chain(0, "not_used", [*turns, ask()], **chain)
    long |= {"slots": 64, "chunks": ["Ann works at Foo."] * TURNS}
    short = [make_chain(i, None, [idle(), write("create", f"thing {i}"), ask()])
             for i in range(1, EPISODES)]  # fmt: skip
    traces = page_lib.Traces([long, *short], {})
    return page_lib.write(tmp_path_factory.mktemp("long"), [page_test.make_run()], traces)


def test_only_what_is_in_view_exists_of_long_lists(browser, long_page):
    browser.open(long_page)
    assert f"{EPISODES} of {EPISODES}" in browser.find_text("#count")
    for where in ("", f"#episode=0&turn={TURNS // 2}", f"#episode=0&turn={TURNS}"):
        browser.run(f"location.hash = '{where}'")
        browser.wait_for("#turn-title", f"of {TURNS:d}")
        for cells in ("#timeline", "#episode-list"):
            assert browser.run(f"document.querySelectorAll('{cells} li').length") < 1000
    browser.wait_for("#turn-title", f"Turn {TURNS} of {TURNS}")
    assert browser.run("document.querySelectorAll('#path .event').length") <= 40
    assert "960 earlier" in browser.find_text("#path")
    # The current turn is in view, and the table is that of all changes before.
    inside = "document.querySelector('#timeline [aria-current]').getBoundingClientRect().bottom"
    assert browser.run(f"{inside} <= document.querySelector('#timeline')"
                       ".getBoundingClientRect().bottom + 1")  # fmt: skip
    last = max(t for t in range(TURNS - 1) if t % 3 == 0)
    expected = {t // 3 % 64: f"entry {t}" for t in range(0, last + 1, 3)}
    rows = browser.run("[...document.querySelectorAll('#table tbody tr')].map(r => r.innerText)")
    assert len(rows) == 64
    for slot, row in enumerate(rows):
        assert row.split()[:3] == [f"{slot}", *expected[slot].split()]
    assert browser.read_log() == []


def test_a_long_list_scrolls_to_every_cell(browser, long_page):
    browser.open(long_page)
    for cells, count in (("#timeline", TURNS), ("#episode-list", EPISODES)):
        list_ = f"document.querySelector('{cells}')"
        browser.run(f"{list_}.scrollTop = {list_}.scrollHeight")
        browser.wait_for(f"{cells} li:last-child", "")
        browser.run(f"{list_}.dispatchEvent(new Event('scroll'))")
        assert browser.run(f"{list_}.lastElementChild.dataset.place") == f"{count - 1}"
        browser.click(f"{cells} li:last-child button")
        assert browser.run(
            f"{list_}.querySelector('[aria-current]').closest('li').dataset.place"
        ) == (f"{count - 1}")
        browser.open(long_page)


def test_long_traces_are_searched_and_stepped_through(browser, long_page):
    browser.open(long_page)
    browser.run("document.querySelector('#search').focus()")
    browser.press(*"entry 9996", Keys.ENTER)
    browser.wait_for("#count", f"1 of {EPISODES}")
    browser.wait_for("#turn-title", "Turn 9997 of")
    browser.run("document.querySelector('#search').blur()")
    browser.press("C", "C")
    assert browser.find_text("#turn-title").startswith("Turn 9991 of")
    browser.press(*[RIGHT] * 50)
    assert browser.find_text("#turn-title").startswith(f"Turn {TURNS} of")
    # More steps than a browser lets the address change: it refuses none, and says nothing.
    browser.run("Array.from({length: 300}, () => document.querySelector('#previous').click())")
    assert browser.find_text("#turn-title").startswith(f"Turn {TURNS - 300} of")
    assert browser.read_log() == []
