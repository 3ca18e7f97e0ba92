"""The report of a real run from the outside; and its page in a browser, where there is one."""

import base64
import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import urllib.request

import pytest

from atommem_jax import report
from atommem_jax.config import ConfigError
from experiments import reporting
from tests import report_test, runs
from tests.conftest import COMPILATION_CACHE

END = 4
FIGURES = ("em_by_scale", "em_curve", "operations", "occupancy", "policy", "sft")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_root):
    """The workdir of the smallest run, evaluated on one split."""
    workdir = tmp_path_factory.mktemp("runs") / "mine"
    overrides = runs.make_flags(sft__steps=2, rl__steps=2)
    where = (f"--workdir={workdir}", f"--data_root={data_root}")
    runs.run("train.py", *where, *overrides)
    runs.run("evaluate.py", f"--checkpoint={workdir}", where[1], "--split=test_1x")
    return workdir


@pytest.fixture(autouse=True)
def _cache(monkeypatch):
    """Scripts called in this process keep its own compilation cache."""
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))


def copy_run(trained: pathlib.Path, folder: pathlib.Path, *names: str) -> pathlib.Path:
    """A run with only some of the files of `trained`."""
    folder.mkdir(parents=True)
    for name in names:
        source = trained / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    return folder


def read_episodes(page: pathlib.Path) -> list[dict]:
    return json.loads(report_test.Page(page).scripts["data"])["episodes"]


# ---------------------------------------------------------------------------------------------
# The script


def test_the_script_makes_the_report_of_a_run(trained, data_root, tmp_path):
    other = copy_run(trained, tmp_path / "other" / "mine", "metrics.jsonl")
    printed = runs.run(
        "report.py",
        f"--workdir={trained}",
        f"--compare={other}",
        f"--data_root={data_root}",
        "--episodes=5",
    )
    page = trained / "report" / "index.html"
    assert f"report: {page}" in printed
    assert "not in the report" not in printed
    for name in FIGURES:
        assert {f"{name}.png", f"{name}.pdf"} <= {path.name for path in page.parent.iterdir()}
    told = "".join(report_test.Page(page).text)
    # Two runs of one name are told apart by their folders.
    assert f"{trained.parent.name}/mine" in told
    assert "other/mine" in told
    assert "lru" in told
    summary = json.loads((trained / "eval" / f"test_1x_t0_step{END}.json").read_text())
    assert f"{summary['em']:.3f}" in told

    # The episodes are those that were evaluated, answer by answer.
    lines = (trained / "eval" / f"test_1x_t0_step{END}.jsonl").read_text().splitlines()
    records = {(r["episode"], r["question"]): r for r in map(json.loads, lines)}
    episodes = read_episodes(page)
    assert len(episodes) == 5
    for episode in episodes:
        for q, question in enumerate(episode["questions"]):
            record = records[episode["episode"], q]
            assert (question["text"], question["answer"], question["em"], question["gold"]) == (
                record["text"],
                record["answer"],
                record["em"],
                record["aliases"],
            )
        assert len(episode["turns"]) == records[episode["episode"], 0]["turns"]


def test_split_step_and_temperature_choose_what_is_traced(trained, data_root, tmp_path):
    page = reporting.make(
        trained,
        str(data_root),
        split="test_2x",
        episodes=2,
        step="2",
        temperature=1.0,
        out=tmp_path,
    )
    assert page == tmp_path / "index.html"
    told = " ".join(report_test.Page(page).text)
    for fact in ("test_2x", "step 2", "temperature 1"):
        assert fact in told
    episodes = read_episodes(page)
    assert [len(episode["chunks"]) for episode in episodes] == [16, 16]


@pytest.mark.parametrize(
    ("files", "lacking"),
    [
        (("metrics.jsonl",), ["Exact match on test splits", "Memory traces"]),
        (("eval",), ["Curves: no metrics.jsonl", "Memory traces"]),
        ((), ["Curves", "Exact match on test splits", "Memory traces"]),
    ],
)
def test_a_run_that_lacks_something_gets_the_rest(
    trained, data_root, tmp_path, capsys, files, lacking
):
    bare = copy_run(trained, tmp_path / "bare", *files)
    page = reporting.make(bare, str(data_root))
    parsed = report_test.Page(page)
    told = "".join(parsed.text)
    printed = capsys.readouterr().out
    for what in lacking:
        assert what in told
        assert f"not in the report: {what}" in printed
    assert told.count("python experiments/") == printed.count("python experiments/") == len(lacking)
    assert ("svg" in parsed.tags) == bool(files)
    assert "button" not in parsed.tags


def test_a_run_without_rl_says_how_to_get_its_curves(trained, data_root, tmp_path):
    bare = copy_run(trained, tmp_path / "sft", "metrics.jsonl")
    lines = (bare / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"stage": "rl"' not in line]
    (bare / "metrics.jsonl").write_text("".join(kept))
    page = reporting.make(bare, str(data_root), episodes=0)
    assert "--config.rl.steps" in "".join(report_test.Page(page).text)
    assert {path.stem for path in page.parent.glob("*.png")} == {"sft"}


def test_results_of_a_demo_have_the_last_word(trained, data_root, tmp_path):
    bare = copy_run(trained, tmp_path / "demo", "metrics.jsonl", "eval")
    cell = {"em": 0.875, "ci_low": 0.75, "ci_high": 1.0, "episodes": 9}
    methods = {"atommem_rl": {"1x": cell}, "no_memory": {"1x": cell | {"em": 0.125, "ci_low": 0.0}}}
    (bare / "results.json").write_text(json.dumps({"methods": methods}))
    run = reporting.read_run("demo", bare)
    assert run.scores == methods


def test_what_is_asked_for_and_not_there_is_an_error(trained, data_root, tmp_path):
    with pytest.raises(ConfigError, match=r"--workdir=.*nowhere: no such folder"):
        reporting.make(tmp_path / "nowhere", str(data_root))
    with pytest.raises(ConfigError, match=r"--compare=.*nowhere: no such folder"):
        reporting.make(trained, str(data_root), compare=[tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="given twice"):
        reporting.make(trained, str(data_root), compare=[trained])
    with pytest.raises(ConfigError, match=r"--split=test_3x.*test_4x"):
        reporting.make(trained, str(data_root), split="test_3x", out=tmp_path)
    with pytest.raises(ConfigError, match="step=99"):
        reporting.make(trained, str(data_root), step="99", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_with_status_2():
    printed = runs.run("report.py", "--workdir=/nowhere", status=2)
    assert "--workdir=/nowhere: no such folder" in printed
    assert "Traceback" not in printed


def test_help_lists_the_flags():
    printed = runs.run("report.py", "--help", status=1)
    names = ("workdir", "compare", "split", "episodes", "step", "temperature", "out", "data_root")
    for name in names:
        assert re.search(rf"^  --{name}:", printed, re.MULTILINE), name


# ---------------------------------------------------------------------------------------------
# In a browser

LEFT, UP, RIGHT, DOWN = "\ue012", "\ue013", "\ue014", "\ue015"


class Browser:
    """A headless Chromium, driven through chromedriver's HTTP interface."""

    def __init__(self):
        command = ["chromedriver", "--port=0"]
        self._driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._driver.stdout is not None
        port = None
        for line in self._driver.stdout:
            found = re.search(r"started successfully on port (\d+)", line)
            if found:
                port = found[1]
                break
        self._root = f"http://127.0.0.1:{port}/session"
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu"]}
        wanted = {
            "alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        }
        self._root += "/" + self.post("", {"capabilities": wanted})["sessionId"]

    def post(self, path: str, body: dict):
        request = urllib.request.Request(
            self._root + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())["value"]

    def cdp(self, command: str, **parameters):
        return self.post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, page: pathlib.Path, fragment: str = "", width: int = 1280, dark: bool = False):
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=800, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        self.post("/url", {"url": "about:blank"})
        self.post("/url", {"url": page.as_uri() + fragment})

    def run(self, script: str):
        return self.post("/execute/sync", {"script": f"return {script}", "args": []})

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, *keys: str) -> None:
        presses = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self.post("/actions", {"actions": [{"type": "key", "id": "keys", "actions": presses}]})

    def read_log(self) -> list:
        return self.post("/se/log", {"type": "browser"})

    def take_picture(self) -> bytes:
        return base64.b64decode(self.cdp("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            request = urllib.request.Request(self._root, method="DELETE")
            urllib.request.urlopen(request).close()
        self._driver.terminate()
        self._driver.wait()


@pytest.fixture(scope="module")
def browser():
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("no chromium and chromedriver here: the page was not opened in a browser")
    started = Browser()
    yield started
    started.close()


def make_story(number: int, right: bool, turns: int) -> dict:
    """An episode of some reading turns and a question."""
    episode = report_test.make_episode(f"text {number} <b>{'long ' * 40}")
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
    scores = {f"method_{i}": {"1x": report_test.make_cell(0.5)} for i in range(9)}
    run = report_test.make_run(scores=scores, workdir="runs/" + "long" * 30)
    return report.write(tmp_path_factory.mktemp("page"), [run], report.Traces(stories, {}))


def test_keys_step_through_turns_and_episodes(browser, page):
    browser.open(page)
    assert browser.text("#turn-title").startswith("Turn 1 of 3: reading chunk 1 of 1")
    browser.press(RIGHT, RIGHT, RIGHT, LEFT)
    assert browser.text("#turn-title").startswith("Turn 2 of 3")
    browser.press("j")
    assert browser.text("#turn-title").startswith("Turn 1 of 4")
    assert "Episode 11" in browser.text("#questions")
    browser.press(RIGHT, "j", "j", "j", "k")
    assert "Episode 12" in browser.text("#questions")
    # Up and down scroll the page, except while a control of the trace has the focus.
    browser.press(DOWN)
    assert "Episode 12" in browser.text("#questions")
    browser.run("document.querySelector('#next').focus()")
    browser.press(DOWN)
    assert "Episode 13" in browser.text("#questions")
    browser.press(UP, UP)
    assert "Episode 11" in browser.text("#questions")
    assert browser.read_log() == []


def test_every_control_does_something(browser, page):
    browser.open(page)
    browser.click("#next")
    assert browser.text("#turn-title").startswith("Turn 2")
    browser.click("#previous")
    assert browser.text("#turn-title").startswith("Turn 1")
    assert browser.run("document.querySelector('#previous').disabled")
    browser.click("#timeline li:last-child button")
    assert browser.text("#turn-title").startswith("Turn 3 of 3: question 1 of 1")
    assert "program" in browser.text("#turn-title")
    assert "right" in browser.text("#did .answer")
    browser.click("#episode-list li:nth-child(2) button")
    assert "Episode 11" in browser.text("#questions")
    browser.click("#did summary")
    assert browser.run("document.querySelector('#did details').open")
    browser.press(RIGHT)
    assert browser.run("document.querySelector('#did details').open")


def test_the_filter_leaves_wrong_answers(browser, page):
    browser.open(page, "#episode=12&turn=2")
    assert "4 of 4" in browser.text("#count")
    browser.click("#only-wrong")
    assert browser.run("document.querySelectorAll('#episode-list button').length") == 2
    assert "2 of 4" in browser.text("#count")
    assert "Episode 11" in browser.text("#questions")
    browser.press("j", "j")
    assert "Episode 13" in browser.text("#questions")
    browser.click("#only-wrong")
    assert browser.run("document.querySelectorAll('#episode-list button').length") == 4
    assert "Episode 13" in browser.text("#questions")


def test_a_filter_that_leaves_nothing_says_so(browser, tmp_path):
    stories = [make_story(1, right=True, turns=1)]
    page = report.write(tmp_path, [report_test.make_run()], report.Traces(stories, {}))
    browser.open(page)
    browser.click("#only-wrong")
    assert browser.text("#count") == "No traced episode has a wrong answer."
    browser.press(RIGHT, "j")
    browser.click("#only-wrong")
    assert browser.text("#turn-title").startswith("Turn 1 of 2")
    assert browser.read_log() == []


def test_what_nobody_scored_carries_no_marks(browser, tmp_path):
    story = make_story(1, right=True, turns=1) | {"em": None}
    story["start"] = [{"slot": 1, "text": "kept before"}]
    story["questions"][0] |= {"em": None, "gold": []}
    page = report.write(tmp_path, [report_test.make_run()], report.Traces([story], {}))
    browser.open(page)
    assert "kept before" in browser.text("#table")
    browser.press(RIGHT)
    assert "kept before" in browser.text("#table")
    told = browser.text("#episode-list") + browser.text("#timeline") + browser.text("#did")
    for mark in ("\u2713", "\u2717", "right", "wrong", "gold"):
        assert mark not in told
    assert "gold" not in browser.text("#questions")
    assert not browser.run("document.querySelector('#only-wrong').checkVisibility()")
    assert browser.read_log() == []


def test_the_address_names_episode_and_turn(browser, page):
    browser.open(page, "#episode=12&turn=3")
    assert "Episode 12" in browser.text("#questions")
    assert browser.text("#turn-title").startswith("Turn 3 of 5")
    browser.press(RIGHT)
    assert browser.run("location.hash") == "#episode=12&turn=4"
    browser.click("#only-wrong")
    browser.run("location.hash = '#episode=10&turn=99'")
    assert "Episode 10" in browser.text("#questions")  # though the filter had hidden it
    assert browser.text("#turn-title").startswith("Turn 3 of 3")
    browser.open(page, "#episode=99")
    assert "Episode 10" in browser.text("#questions")


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
