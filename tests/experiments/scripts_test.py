"""The scripts beside training, from the outside: demo, evaluate, validity, and their help."""

import json
import pathlib
import re
import string
import subprocess
import sys

import jax
import matplotlib.image
import numpy as np
import pytest

from atommem_jax.agent import build, load, score
from atommem_jax.config import ConfigError, parse
from atommem_jax.language.tokenizer import SentencePieceTokenizer
from atommem_jax.runs import resume, validity
from atommem_jax.tasks import encoding
from atommem_jax.weights.checkpoint import Checkpointer
from tests.conftest import COMPILATION_CACHE, ROOT
from tests.helpers import forks, runs, tiny

SFT_END = runs.SFT_STEPS
END = runs.SFT_STEPS + runs.RL_STEPS
EPISODES = runs.OVERRIDES["task.test_examples"]
QUESTIONS = 3  # an episode of the village
BASELINES = ("scratchpad_only", "store_all_one_read")
METHODS = tuple(
    f"{name}{suffix}"
    for name in ("atommem_sft", "atommem_rl", *BASELINES)
    for suffix in ("", "_t1")
)


def make_flags(**overrides) -> list[str]:
    """The tiny config as flags, without what the demo's task has no field for."""
    return [flag for flag in runs.make_flags(**overrides) if "task.base_facts" not in flag]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, data_root):
    """(workdir, printed) of one small tour."""
    workdir = tmp_path_factory.mktemp("demo")
    printed = runs.run(
        "demo.py",
        f"--workdir={workdir}",
        f"--data_root={data_root}",
        f"--baselines={','.join(BASELINES)}",
        *make_flags(),
    )
    return workdir, printed


@pytest.fixture(autouse=True)
def _cache(monkeypatch):
    """Scripts called in this process keep its own compilation cache."""
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------
# demo.py


@pytest.mark.long
def test_the_demo_writes_the_results_that_others_read(demo):
    workdir, _ = demo
    results = json.loads((workdir / "results.json").read_text())
    assert set(results["methods"]) == set(METHODS)
    for row in results["methods"].values():
        assert list(row) == ["1x", "2x"]
        for cell in row.values():
            assert set(cell) == {"em", "ci_low", "ci_high", "episodes", "questions", "stages"}
            assert sum(cell["stages"].values()) == round((1 - cell["em"]) * cell["questions"])
            assert 0 <= cell["ci_low"] <= cell["em"] <= cell["ci_high"] <= 1
            assert cell["episodes"] == EPISODES
    seconds = results["seconds"]
    assert set(seconds) == {"sft", "rl", "total"}
    assert 0 < seconds["sft"] + seconds["rl"] < seconds["total"]


# Another writer comes while the demo evaluates; then the demo comes while another writes.
_TWO_WRITERS = """
import pathlib, sys
from atommem_jax import folder_lock
from atommem_jax.config import ConfigError, parse
from experiments import demo
from experiments.configs import synthetic

config, folder = parse(synthetic.get_config()), pathlib.Path(sys.argv[1])
demo._train = lambda *unused: None

def write(*unused):
    with folder_lock.hold(folder, "--workdir=other", 0.2):
        demo.run(config, folder, "", ())

demo._compare = write
for begin in (lambda: demo.run(config, folder, "", ()), write):
    try:
        begin()
    except ConfigError as error:
        print(error)
"""


def test_the_demo_and_other_writers_keep_out_of_each_others_way(tmp_path):
    folder = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-c", _TWO_WRITERS, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=runs.make_environment() | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("--workdir=other is in use by process ")
    assert second.startswith(f"--workdir={folder} is in use by process ")


@pytest.mark.long
def test_the_demo_draws_and_prints_what_it_measured(demo):
    workdir, printed = demo
    assert np.ptp(matplotlib.image.imread(workdir / "learning.png")) > 0.5
    results = json.loads((workdir / "results.json").read_text())
    for name in METHODS:
        (line,) = re.findall(rf"^ +{name} .*$", printed, re.MULTILINE)
        scores = [float(x) for x in re.findall(r"([\d.]+) \[", line)]
        measured = [results["methods"][name][scale]["em"] for scale in ("1x", "2x")]
        np.testing.assert_allclose(scores, measured, atol=6e-4)


@pytest.mark.long
def test_the_demo_has_a_page_before_its_baselines_and_after_them(demo):
    workdir, printed = demo
    path, again = re.findall(r"^open this in a browser: (.*)$", printed, re.MULTILINE)
    assert path == again
    assert pathlib.Path(path) == (workdir / "report" / "index.html").resolve()
    assert printed.index(path) < printed.index("\nbaseline ")
    assert printed.rindex("\nbaseline ") < printed.rindex(path) < printed.index("Exact match")
    page = pathlib.Path(path).read_text(encoding="utf-8")
    for name in ("learned, after SFT", "learned, after RL", *BASELINES):
        assert f">{name.replace('_', ' ')}<" in page


@pytest.mark.long
def test_a_program_leaves_only_rl_which_starts_where_the_learned_policy_does(demo):
    workdir, _ = demo
    folder, end = workdir / "baselines" / "store_all_one_read", read_params(workdir, SFT_END)
    with Checkpointer(folder / "checkpoints", best_metric="em", read_only=True) as source:
        assert source.latest_step() == runs.RL_STEPS
        config = parse(source.restore_config(runs.RL_STEPS))
        tokenizer = SentencePieceTokenizer.from_bytes(source.restore_tokenizer(runs.RL_STEPS))
    assert (config.workflow, config.sft.steps) == ("store_all_one_read", 0)
    assert_equal(resume.load_initial(config, tokenizer), end)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), read_params(folder), end)
    assert max(jax.tree.leaves(moved)) > 0


@pytest.mark.long
def test_a_masked_baseline_has_an_sft_of_its_own(demo):
    folder = demo[0] / "baselines" / "scratchpad_only" / "checkpoints"
    with Checkpointer(folder, best_metric="em", read_only=True) as source:
        assert source.latest_step() == END
        config = source.restore_config(END)
    assert (config.workflow, config.init_from) == ("scratchpad_only", "")


@pytest.mark.long
def test_rl_cannot_start_from_another_tokenizer_or_model(demo):
    workdir, _ = demo
    config = runs.make_config(sft__steps=0, init_from=str(workdir))
    with pytest.raises(ConfigError, match=r"init_from=.*tokenizer is not that of this task"):
        resume.load_initial(config, tiny.make_tokenizer())
    own = load.load(str(workdir)).parts.tokenizer
    wider = runs.make_config(sft__steps=0, init_from=str(workdir), model__width=32)
    with pytest.raises(ConfigError, match=r"another model: model\.width=32 \(checkpoint: 16\)"):
        resume.load_initial(wider, own)


def test_the_demo_needs_the_scale_that_it_trains_at():
    flags = make_flags(task__scales=(2, 4))
    printed = forks.refuse("demo.py", "--workdir=nowhere", *flags)
    assert "task.scales=(2, 4): the demo needs 1 among them" in printed


def test_an_unknown_baseline_ends_with_status_2():
    printed = forks.refuse("demo.py", "--workdir=nowhere", "--baselines=store_all,rag")
    assert "--baselines=rag: allowed are scratchpad_only, store_all," in printed


@pytest.mark.long
def test_the_demo_compares_the_ends_of_both_stages_greedily_and_sampled(demo):
    workdir, _ = demo
    found = {path.stem for path in (workdir / "eval").glob("*.json")}
    assert found == {
        f"test_{scale}_t{temperature}_step{step}"
        for scale in ("1x", "2x")
        for temperature in (0, 1)
        for step in (SFT_END, END)
    }


# ---------------------------------------------------------------------------------------------
# evaluate.py


@pytest.mark.long
def test_every_sample_of_a_split_is_scored_once(demo):
    workdir, _ = demo
    for scale in ("1x", "2x"):
        stem = f"test_{scale}_t1_step{END}"
        records = read_lines(workdir / "eval" / f"{stem}.jsonl")
        summary = json.loads((workdir / "eval" / f"{stem}.json").read_text())
        # The last batch is filled up to 16: what fills it is not counted.
        rows = [(record["episode"], record["question"]) for record in records]
        assert sorted(rows) == [(e, q) for e in range(EPISODES) for q in range(QUESTIONS)]
        assert (summary["episodes"], summary["questions"]) == (EPISODES, QUESTIONS * EPISODES)
        right = []
        for record in records:
            words = record["answer"].lower().strip(string.punctuation + " ")
            right.append(words in [alias.lower() for alias in record["aliases"]])
            assert record["em"] == right[-1]
        assert summary["em"] == pytest.approx(np.mean(right))
        assert summary["ci_low"] <= summary["em"] <= summary["ci_high"]
        assert summary["f1_ci_low"] <= summary["f1"] <= summary["f1_ci_high"]
        assert summary["f1"] >= summary["em"]


@pytest.mark.long
def test_the_command_repeats_what_the_demo_measured(demo, data_root, tmp_path):
    workdir, _ = demo
    printed = runs.run(
        "evaluate.py",
        f"--checkpoint={workdir}",
        f"--data_root={data_root}",
        f"--out={tmp_path}",
        "--split=test_1x",
        "--temperature=1",
        "--temperature=0",
    )
    assert re.findall(r"temperature (\d)", printed) == ["1", "0"]
    lines = re.findall(r"^test_1x .* \.\. .*$", printed, re.MULTILINE)
    for temperature, line in zip((1, 0), lines, strict=True):
        name = f"test_1x_t{temperature}_step{END}"
        records = read_lines(tmp_path / f"{name}.jsonl")
        assert records == read_lines(workdir / "eval" / f"{name}.jsonl")
        summary = json.loads((tmp_path / f"{name}.json").read_text())
        measured = json.loads((workdir / "eval" / f"{name}.json").read_text())
        assert summary | {"seconds": 0} == measured | {"seconds": 0}
        assert line.split()[-2:] == [str(EPISODES), str(QUESTIONS * EPISODES)]
        assert f"{summary['ci_low']:.3f} .. {summary['ci_high']:.3f}" in line


@pytest.mark.long
def test_what_was_measured_is_not_played_again(demo, data_root, monkeypatch):
    workdir, _ = demo
    loaded = load.load(str(workdir))
    dataset = build.load_dataset(loaded.parts.config, str(data_root))

    class PlayedError(Exception):
        pass

    def refuse(shape):
        raise PlayedError

    monkeypatch.setattr(loaded, "player", refuse)

    def ask(split="test_2x", out=workdir / "eval", **options):
        return score.evaluate_split(loaded, dataset, split, out=out, skip_existing=True, **options)

    for options in ({}, {"episodes": EPISODES}, {"episodes": 2 * EPISODES}):
        saved = workdir / "eval" / f"test_2x_t0_step{END}.json"
        assert ask(**options) == json.loads(saved.read_text())
    assert ask(temperature=1.0)["temperature"] == 1.0
    for options in (
        {"episodes": EPISODES - 1},
        {"seed": 1},
        {"temperature": 0.5},
        {"split": "validation_1x"},
        {"out": None},
    ):
        with pytest.raises(PlayedError):
            ask(**options)
    loaded.settings = ["rollout.constrained=false"]  # which is another measurement
    with pytest.raises(PlayedError):
        ask()


@pytest.mark.long
def test_a_checkpoint_is_found_by_workdir_by_folder_and_by_step(demo):
    workdir, _ = demo
    folder = workdir / "checkpoints"
    found = {
        "workdir": load.load(str(workdir)),
        "folder": load.load(str(folder)),
        "number": load.load(str(workdir), str(SFT_END)),
        "path": load.load(str(folder / str(SFT_END))),
    }
    steps = {"workdir": END, "folder": END, "number": SFT_END, "path": SFT_END}
    for name, loaded in found.items():
        assert loaded.step == steps[name]
        assert loaded.workdir == str(workdir)
        saved = runs.read_state(workdir, loaded.step)["train"]["params"]
        assert_equal(loaded.params, saved)


@pytest.mark.long
def test_a_checkpoint_says_what_its_episodes_were_like(demo, data_root):
    loaded = load.load(str(demo[0]))
    train_split = build.load_dataset(loaded.parts.config, str(data_root)).split("train")
    shape = encoding.fit_shape(train_split, loaded.parts.tokenizer)
    assert loaded.trained_shape == shape
    assert (shape.facts, shape.questions) == (3, QUESTIONS)


@pytest.mark.long
def test_the_best_step_is_that_of_the_highest_validation_em(demo, tmp_path):
    workdir, _ = demo
    with (
        Checkpointer(workdir / "checkpoints", best_metric="em", read_only=True) as source,
        Checkpointer(tmp_path / "checkpoints", best_metric="em") as copy,
    ):
        for step, em in ((SFT_END, 0.9), (END, 0.1)):
            copy.save(
                step,
                runs.read_state(workdir, step),
                config=source.restore_config(step),
                tokenizer=source.restore_tokenizer(step),
                data_state=0,
                progress={},
                metrics={"em": em},
            )
    best, last = load.load(str(tmp_path), "best"), load.load(str(tmp_path), "last")
    assert (best.step, last.step) == (SFT_END, END)
    assert_equal(best.params, runs.read_state(workdir, SFT_END)["train"]["params"])


def read_params(workdir: pathlib.Path, step: int = runs.RL_STEPS) -> dict:
    return runs.read_state(workdir, step)["train"]["params"]


def assert_equal(params, saved) -> None:
    assert jax.tree.structure(params) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), saved)


@pytest.mark.long
def test_checkpoints_that_are_not_there_are_explained(demo, tmp_path):
    workdir, _ = demo
    with pytest.raises(ConfigError, match=f"no complete checkpoint in .*{tmp_path.name}.*empty"):
        load.load(str(tmp_path))
    with pytest.raises(ConfigError, match="does not exist"):
        load.load(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=f"step=3: .* holds steps {SFT_END}, .*{END}"):
        load.load(str(workdir), "3")
    with pytest.raises(ConfigError, match="--step=first: allowed are last, best or a number"):
        load.load(str(workdir), "first")
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_an_unknown_split_ends_with_status_2_and_lists_the_splits(demo, data_root):
    workdir, _ = demo
    printed = runs.run(
        "evaluate.py",
        f"--checkpoint={workdir}",
        f"--data_root={data_root}",
        "--split=test_3x",
        status=2,
    )
    assert "--split=test_3x" in printed
    assert "test_2x" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("script", ["validity.py", "benchmark.py", "compile_report.py"])
def test_a_file_of_results_is_tried_before_they_are_measured(script):
    told = forks.refuse(script, "--json=/proc/self/x/a.json")
    assert f"{script}: --json=/proc/self/x/a.json: cannot be written to (No such file" in told


@pytest.mark.long
def test_outputs_are_tried_before_data_is_prepared(demo, tmp_path):
    printed = runs.run(
        "evaluate.py",
        f"--checkpoint={demo[0]}",
        f"--data_root={tmp_path / 'data'}",
        "--out=/proc/self/x",
        status=2,
    )
    assert "--out=/proc/self/x: cannot be written to (No such file" in printed
    assert not (tmp_path / "data").exists()


def test_a_missing_checkpoint_flag_ends_with_status_2():
    assert "--checkpoint is missing" in forks.refuse("evaluate.py")


# ---------------------------------------------------------------------------------------------
# validity.py


def test_the_validity_table_tells_memory_from_none(data_root):
    config = runs.make_config(mesh__data=1, task__scales=(1,))
    dataset = build.load_dataset(config, str(data_root))
    rows = validity.list_rows(config)
    rows = {name: rows[name] for name in ("clean", "no_memory")}
    table = validity.measure(config, dataset, rows, episodes=8)
    assert [list(row) for row in table.values()] == [["test_1x"], ["test_1x"]]
    assert table["clean"]["test_1x"]["em"] == 1.0
    assert table["no_memory"]["test_1x"]["em"] < 0.2
    assert table["clean"]["test_1x"]["episodes"] == 8
    header, first, second, footer, verdict = validity.render(table, rows).splitlines()
    assert first.startswith("clean ")
    assert "1.000" in first
    assert second.startswith("no_memory ")
    assert header.index("test_1x") + len("test_1x") == first.index("1.000") + len("1.000")
    assert footer.endswith("episodes a cell: 8")
    assert verdict == "the task holds what it promises"


@pytest.mark.parametrize(
    ("role", "scores", "passes", "verdict"),
    [
        ("clean", [1.0, 1.0], True, "solves"),
        ("clean", [1.0, 0.99], False, "not solvable"),
        ("teacher", [0.9, 0.9], True, "imitated"),
        ("ablated", [0.5, 0.75], True, "falls short"),
        ("ablated", [0.5, 0.76], False, "does not need it"),
        ("workflow", [0.6, 0.5], True, "falls short"),
        ("workflow", [0.61, 0.5], False, "does not press"),
        ("workflow", [0.5, 0.5], False, "not with scale"),
        ("workflow", [0.1, 0.1], True, "falls short"),
        ("workflow", [0.5], True, "falls short"),
    ],
)
def test_a_row_is_judged_by_what_the_task_promises(role, scores, passes, verdict):
    passed, said = validity.judge(role, scores)
    assert passed == passes
    assert verdict in said


def test_a_row_that_fails_is_named():
    cells = {"clean": 1.0, "no_update": 0.9}
    table = {name: {"test_1x": {"em": em, "episodes": 8}} for name, em in cells.items()}
    rows = {
        "clean": validity.Row("clean", (validity.Script(),)),
        "no_update": validity.Row("ablated", (validity.Script(),) * 3),
    }
    printed = validity.render(table, rows).splitlines()
    assert printed[2].endswith("the task does not need it (best of 3)")
    assert printed[-1].endswith("from a script: no_update")


def test_validity_ends_with_status_1_where_the_task_does_not_press(data_root):
    # Ten slots hold all of a short document.
    printed = runs.run(
        "validity.py",
        "--config=experiments/configs/synthetic.py",
        *runs.make_flags(mesh__data=1, task__scales=(1,), memory__slots=10),
        "--episodes=4",
        f"--data_root={data_root}",
        status=1,
    )
    assert "the task does not tell a learned memory from a script" in printed


# ---------------------------------------------------------------------------------------------
# All


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("train.py", ["--config", "--workdir", "--data_root"]),
        ("evaluate.py", ["--checkpoint", "--step", "--split", "--temperature", "--data_root"]),
        ("collect.py", ["--config", "--base_url", "--model", "--out", "--split", "--data_root"]),
        ("demo.py", ["--config", "--workdir", "--baselines", "--data_root"]),
        (
            "benchmark.py",
            ["--suite", "--json", "--runs", "--checkpoint", "--config", "--data_root"],
        ),
        ("report.py", ["--workdir", "--compare", "--split", "--step", "--out", "--data_root"]),
        ("sweep.py", ["--config", "--workdir", "--jobs", "--only", "--data_root"]),
        ("convert.py", ["--source", "--target", "--to", "--dtype", "--tokenizer", "--config"]),
        ("validity.py", ["--config", "--episodes", "--json", "--data_root"]),
        ("answer.py", ["--checkpoint", "--document", "--question", "--save_memory", "--set"]),
    ],
)
def test_help_lists_the_flags(script, names):
    done = forks.run(script, "--help")
    assert done.status == 1  # as absl ends it
    printed = done.stdout
    assert f"python experiments/{script}" in printed
    for name in names:
        assert re.search(rf"^  {name}:", printed, re.MULTILINE), name
