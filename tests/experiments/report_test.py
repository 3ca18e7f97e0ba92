"""The report of a real run, from the outside."""

import json
import pathlib
import re
import shlex
import shutil

import pytest

from atommem_jax.config import ConfigError
from atommem_jax.report import run as run_lib
from tests.conftest import COMPILATION_CACHE
from tests.helpers import forks, runs
from tests.report import page_test

END = 4
FIGURES = ("em_by_scale", "em_curve", "operations", "occupancy", "policy", "sft")


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
    return json.loads(page_test.Page(page).scripts["data"])["episodes"]


@pytest.mark.long
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
    told = "".join(page_test.Page(page).text)
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


@pytest.mark.long
def test_split_step_and_temperature_choose_what_is_traced(trained, data_root, tmp_path):
    page = run_lib.make(
        trained,
        str(data_root),
        split="test_2x",
        episodes=2,
        step="2",
        temperature=1.0,
        out=tmp_path,
    )
    assert page == tmp_path / "index.html"
    told = " ".join(page_test.Page(page).text)
    for fact in ("test_2x", "step 2", "temperature 1"):
        assert fact in told
    episodes = read_episodes(page)
    assert [len(episode["chunks"]) for episode in episodes] == [16, 16]


@pytest.mark.long
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
    page = run_lib.make(bare, str(data_root))
    parsed = page_test.Page(page)
    told = "".join(parsed.text)
    printed = capsys.readouterr().out
    for what in lacking:
        assert what in told
        assert f"not in the report: {what}" in printed
    assert told.count("python experiments/") == printed.count("python experiments/") == len(lacking)
    assert ("svg" in parsed.tags) == bool(files)
    assert "button" not in parsed.tags


@pytest.mark.long
def test_a_run_without_rl_says_how_to_get_its_curves(trained, data_root, tmp_path):
    bare = copy_run(trained, tmp_path / "sft", "metrics.jsonl")
    lines = (bare / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"stage": "rl"' not in line]
    (bare / "metrics.jsonl").write_text("".join(kept))
    page = run_lib.make(bare, str(data_root), episodes=0)
    assert "--config.rl.steps" in "".join(page_test.Page(page).text)
    assert {path.stem for path in page.parent.glob("*.png")} == {"failures_over_training", "sft"}


@pytest.mark.long
def test_side_files_that_are_broken_are_left_out_with_a_warning(
    trained, data_root, tmp_path, caplog
):
    bare = copy_run(trained, tmp_path / "run", "metrics.jsonl", "eval")
    sound = run_lib.read_run("run", bare)
    assert sound.scores
    whole = json.loads(next((bare / "eval").glob("*.json")).read_text())
    stray = {
        "note": '{"note": 1}', "empty": "", "torn": '{"split": "te', "list": "[]",
        "text": json.dumps(whole | {"em": "high"}), "binary": "\udcff",
    }  # fmt: skip
    for name, content in stray.items():
        (bare / "eval" / f"{name}.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    (bare / "eval" / "folder.json").mkdir()
    for content in ("", "[1]", '{"methods": 3}', '{"methods": {"a": {"1x": {"em": 1}}}}'):
        (bare / "results.json").write_text(content)
        assert run_lib.read_run("run", bare).scores == sound.scores
    lines = (bare / "metrics.jsonl").read_text().splitlines()
    lines[1] = '{"step": 1, "sta'
    (bare / "metrics.jsonl").write_text("\n".join([*lines, "", ""]))
    page = run_lib.make(bare, str(data_root), episodes=0)
    assert page.is_file()
    for name in (*stray, "folder"):
        line = ", line 1" if name in ("empty", "torn") else ""
        assert f"{name}.json{line}: is no summary of evaluate.py and is left out" in caplog.text
    assert f"{bare / 'results.json'}, line 1: is no results.json of demo.py" in caplog.text
    assert f"{bare / 'results.json'}: is no results.json of demo.py" in caplog.text
    assert f"{bare / 'metrics.jsonl'}, line 2: is no record of a run" in caplog.text


@pytest.mark.long
def test_commands_can_be_pasted(trained, data_root, tmp_path, capsys):
    bare = copy_run(trained, tmp_path / "it's a run; rm", "metrics.jsonl")
    run_lib.make(bare, str(data_root), episodes=0)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "evaluate.py" in line]
    command = line[line.index("python experiments/") :]
    assert shlex.split(command)[2] == f"--checkpoint={bare}"


@pytest.mark.long
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_played(
    trained, data_root, tmp_path
):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out=.*file: is a file; pass a folder"):
        run_lib.make(trained, str(data_root), out=tmp_path / "file")


@pytest.mark.long
def test_results_of_a_demo_have_the_last_word(trained, data_root, tmp_path):
    bare = copy_run(trained, tmp_path / "demo", "metrics.jsonl", "eval")
    cell = {"em": 0.875, "ci_low": 0.75, "ci_high": 1.0, "episodes": 9}
    broken = {"stages": {"refused": 3}, "questions": 12}
    poor = cell | {"em": 0.125, "ci_low": 0.0} | broken
    methods = {"atommem_rl": {"1x": cell}, "no_memory": {"1x": poor}}
    (bare / "results.json").write_text(json.dumps({"methods": methods}))
    run = run_lib.read_run("demo", bare)
    assert run.scores == methods
    assert run.failures["no_memory"] == {"1x": {"refused": 0.25}}


@pytest.mark.long
def test_what_is_asked_for_and_not_there_is_an_error(trained, data_root, tmp_path):
    with pytest.raises(ConfigError, match=r"--workdir=.*nowhere: no such folder"):
        run_lib.make(tmp_path / "nowhere", str(data_root))
    with pytest.raises(ConfigError, match=r"--compare=.*nowhere: no such folder"):
        run_lib.make(trained, str(data_root), compare=[tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="given twice"):
        run_lib.make(trained, str(data_root), compare=[trained])
    with pytest.raises(ConfigError, match=r"--split=test_3x.*test_2x"):
        run_lib.make(trained, str(data_root), split="test_3x", out=tmp_path)
    with pytest.raises(ConfigError, match="step=99"):
        run_lib.make(trained, str(data_root), step="99", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_with_status_2():
    printed = forks.refuse("report.py", "--workdir=/nowhere")
    assert "--workdir=/nowhere: no such folder" in printed


def test_help_lists_the_flags():
    printed = forks.run("report.py", "--help").stdout
    names = ("workdir", "compare", "split", "episodes", "step", "temperature", "out", "data_root")
    for name in names:
        assert re.search(rf"^  --{name}:", printed, re.MULTILINE), name
