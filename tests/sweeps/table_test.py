"""The table of a sweep, from what its runs have left."""

import csv
import io
import json
import pathlib

import pytest

from atommem_jax.sweeps import scheduler, table
from tests.helpers import sweeps


@pytest.fixture
def make_sweep(tmp_path):
    """Writes and loads a config that adds these runs to the tiny config."""
    return sweeps.make_maker(tmp_path)


def leave_status(folder: pathlib.Path, state: str, **fields) -> None:
    scheduler.Status(state=state, seconds=1800.0, cpu_seconds=3600.0, commit="abc", **fields).write(
        folder
    )


def leave_cell(folder: pathlib.Path, split: str, temperature: float, step: int, em: float) -> None:
    summary = {
        "split": split,
        "temperature": temperature,
        "step": step,
        "em": em,
        "ci_low": em - 0.1,
        "ci_high": em + 0.1,
        "f1": em + 0.05,
        "episodes": 8,
        "questions": 16,
    }
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    path = folder / "eval" / f"{split}_t{temperature:g}_step{step}.json"
    path.write_text(json.dumps(summary))


@pytest.fixture
def results(make_sweep, tmp_path):
    """Of two seeds, one setting less good and half done, one failed and one not begun."""
    plan = make_sweep(
        [
            ("small", {"memory.slots": 4}),
            ("base/seed0", {"seed": 0}),
            ("base/seed1", {"seed": 1}),
            ("broken", {"memory.slots": 6}),
            ("later", {"memory.slots": 7}),
        ],
        "[{'splits': ['test_4x', 'test_1x']}, {'runs': 'seed0', 'step': 'sft', 'splits': ['test_1x'"
        "]}]",
    )
    for name, shift in (("base/seed0", 0.0), ("base/seed1", 0.25)):
        leave_status(tmp_path / name, scheduler.DONE)
        for number, (split, temperature) in enumerate(
            [("test_4x", 0.0), ("test_1x", 0.0), ("test_4x", 1.0), ("test_1x", 1.0)]
        ):
            leave_cell(tmp_path / name, split, temperature, 12, 0.25 + shift + number / 16)
    leave_cell(tmp_path / "base/seed0", "test_1x", 0.0, 6, 0.125)
    leave_cell(tmp_path / "base/seed0", "test_1x", 0.0, 9, 0.9)  # nobody asked for step 9
    leave_cell(tmp_path / "base/seed0", "validation", 0.0, 12, 0.9)  # nor for this split
    (tmp_path / "base/seed0" / "eval" / "notes.json").write_text('{"other": 1}')
    leave_status(tmp_path / "small", scheduler.STARTED)
    leave_cell(tmp_path / "small", "test_4x", 0.0, 12, 0.125)
    leave_status(tmp_path / "broken", scheduler.FAILED, failed="train: ended with status 1")
    return table.collect(plan.runs, tmp_path)


def test_the_csv_has_a_line_a_measurement(results):
    lines = list(csv.DictReader(io.StringIO(table.render_csv(results))))
    cells = [
        (line["run"], line["seed"], line["step"], line["split"], line["temperature"], line["em"])
        for line in lines
    ]
    assert len(cells) == len(set(cells)) == 1 + 5 + 4 + 1 + 1
    assert ("base/seed1", "1", "last", "test_1x", "1", "0.6875") in cells
    assert ("base/seed0", "0", "sft", "test_1x", "0", "0.125") in cells
    assert ("broken", "0", "", "", "", "") in cells
    assert not any(line["em"] == "0.9" for line in lines)
    states = {line["run"]: (line["state"], line["memory.slots"], line["commit"]) for line in lines}
    assert states == {
        "small": ("started", "4", "abc"),
        "base/seed0": ("done", "5", "abc"),  # as the run has it, though it overrides nothing
        "base/seed1": ("done", "5", "abc"),
        "broken": ("failed", "6", "abc"),
        "later": ("pending", "7", ""),
    }
    (line,) = [line for line in lines if line["run"] == "small"]
    expected = {"ci_low": "0.025", "ci_high": "0.225", "f1": "0.175", "episodes": "8"}
    expected |= {"questions": "16", "seconds": "1800.0", "cpu_seconds": "3600.0"}
    assert {name: line[name] for name in expected} == expected


def test_the_markdown_has_a_row_a_setting_best_first(results):
    lines = table.render_markdown(results, "few").splitlines()
    assert lines[0] == "# few"
    start = lines.index("| run | test_4x t0 | test_1x t0 | test_4x t1 | test_1x t1 |")
    assert lines[start + 2 : start + 7] == [
        "| **base** | **0.375** 0.250..0.500 | **0.438** 0.312..0.562 | **0.500** 0.375..0.625 "
        "| **0.562** 0.438..0.688 |",
        "| seed 0 | 0.250 [0.150, 0.350] | 0.312 [0.212, 0.412] | 0.375 [0.275, 0.475] "
        "| 0.438 [0.338, 0.537] |",
        "| seed 1 | 0.500 [0.400, 0.600] | 0.562 [0.463, 0.662] | 0.625 [0.525, 0.725] "
        "| 0.688 [0.588, 0.787] |",
        "| **small** | 0.125 [0.025, 0.225] |  |  |  |",
        "| **base, step sft** |  | 0.125 [0.025, 0.225] |  |  |",
    ]
    assert lines[start + 8 :] == [
        "2 of 5 runs done; 4.00 CPU hours, 2.00 hours summed over runs; commit abc.",
        "",
        "Failed: broken (train).",
        "",
        "Under way or interrupted: small.",
        "",
        "Not started: later.",
    ]


def test_what_is_torn_or_stray_in_a_run_is_left_out_and_named(make_sweep, tmp_path, caplog):
    plan = make_sweep(
        [("a", {"seed": 1}), ("b", {"seed": 2}), ("c", {"seed": 3})], "[{'splits': ['test_1x']}]"
    )
    for name in "abc":
        leave_status(tmp_path / name, scheduler.DONE)
        leave_cell(tmp_path / name, "test_1x", 0.0, 12, 0.25)
    stray = {
        "empty": "", "blank": "\n\n", "torn": '{"split": "test_1x",\n"step": 1', "list": "[1]",
        "null": "null", "words": json.dumps({"split": 1, "step": "x", "em": []}),
    }  # fmt: skip
    for name, content in stray.items():
        (tmp_path / "a" / "eval" / f"{name}.json").write_text(content)
    (tmp_path / "a" / "eval" / "folder.json").mkdir()
    # Of an older version: without some of the measures.
    cell = tmp_path / "a" / "eval" / "test_1x_t0_step12.json"
    whole = json.loads(cell.read_text())
    cell.write_text(json.dumps({name: whole[name] for name in whole if name != "f1"}))
    (tmp_path / "b" / "status.json").write_text('{"state": "done",\n "fin')
    (tmp_path / "c" / "status.json").write_text('{"state": "done", "finished": 3, "mine": 1}')
    results, text = table.write(plan, tmp_path)
    assert [result.state for result in results] == ["done", "pending", "pending"]
    assert [cell.summary["em"] for result in results for cell in result.cells] == [0.25] * 3
    assert "1 of 3 runs done" in text
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(line["em"], line["f1"]) for line in lines] == [
        ("0.25", ""),
        ("0.25", "0.3"),
        ("0.25", "0.3"),
    ]
    for file in ("empty.json, line 1", "blank.json, line 3", "torn.json, line 2", "list.json",
                 "null.json", "words.json", "folder.json"):  # fmt: skip
        assert f"{tmp_path / 'a' / 'eval' / file}: is no summary of evaluate.py" in caplog.text
    assert f"{tmp_path / 'b' / 'status.json'}, line 2: is no status of a job" in caplog.text
    assert f"{tmp_path / 'c' / 'status.json'}: is no status of a job" in caplog.text


def test_a_run_is_told_by_its_first_column(results):
    told = {result.run.name: table.headline(result) for result in results}
    assert told["base/seed1"] == "EM 0.500 (test_4x t0)"
    assert told["later"] == "not evaluated"


def test_a_sweep_without_any_measurement_has_a_table(make_sweep, tmp_path):
    plan = make_sweep([("a", {}), ("b", {"seed": 1})])
    text = table.render_markdown(table.collect(plan.runs, tmp_path), "few")
    assert "0 of 2 runs done" in text
    assert text.endswith("Not started: a, b.\n")


def test_a_folder_of_an_older_version_has_a_table(make_sweep, tmp_path):
    plan = make_sweep([("a", {"seed": 1}), ("b", {"seed": 2})], "[{'splits': ['test_1x']}]")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "status.json").write_text(sweeps.OLD_STATUS)
    leave_cell(tmp_path / "a", "test_1x", 0.0, 12, 0.25)
    results, text = table.write(plan, tmp_path)
    assert [result.state for result in results] == [scheduler.FAILED, scheduler.PENDING]
    assert text == (tmp_path / "table.md").read_text()
    assert text.startswith("# few\n")
    assert "0.03 CPU hours, 0.02 hours summed over runs; commit 8c6116f+." in text
    assert "Failed: a (evaluate)." in text
    first = next(csv.DictReader((tmp_path / "table.csv").open()))
    assert (first["run"], first["state"], first["em"]) == ("a", "failed", "0.25")
    assert (first["seconds"], first["cpu_seconds"]) == ("61.2", "118.5")
