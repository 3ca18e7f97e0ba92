"""evaluate.py --against and --judge, on the records of an agent that has learned nothing."""

import json
import shutil

import pytest

from tests.helpers import checkpoints, forks, runs
from tests.helpers.stub_endpoint import Answer, Stub

STEM = "test_1x_t0_step7"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(workdir, flags) of an agent whose first episodes have been played."""
    folder = tmp_path_factory.mktemp("evaluate")
    workdir = checkpoints.save_trained(folder / "run")
    flags = (
        f"--checkpoint={workdir}",
        f"--data_root={folder / 'data'}",
        *("--split=test_1x", "--episodes=5", "--cpu_devices=1", "--skip_existing"),
    )
    runs.run("evaluate.py", *flags)
    return folder / "run", flags


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_another_run_is_compared_by_episodes(evaluated, tmp_path):
    workdir, flags = evaluated
    records = read_lines(workdir / "eval" / f"{STEM}.jsonl")
    other = tmp_path / "other"
    shutil.copytree(workdir / "eval", other / "eval")
    better = [record | {"em": 1.0} for record in records]
    path = other / "eval" / f"{STEM}.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in better))
    printed = runs.run("evaluate.py", *flags, f"--against={other}")
    em = sum(record["em"] for record in records) / len(records)
    assert f"EM {em - 1:+.3f} against {path}: {em:.3f} less 1.000, 95% interval" in printed
    assert f"5 episodes, {len(records)} questions" in printed
    assert "F1 +0.000 against" in runs.run("evaluate.py", *flags, "--against=step7")
    refused = forks.refuse("evaluate.py", *flags, "--against=step8")
    assert "--against=step8: is neither a file of records nor a run" in refused


def test_a_judge_sees_the_answers(evaluated):
    pytest.importorskip("openai")
    workdir, flags = evaluated
    records = read_lines(workdir / "eval" / f"{STEM}.jsonl")
    with Stub(lambda request: Answer(text="CORRECT")) as stub:  # it takes whatever it is told
        ask = (
            *flags,
            f"--judge={stub.url}",
            *("--judge_model=kind", "--judge_controls=4", "--judge_price_per_million=1,10"),
        )
        printed = runs.run("evaluate.py", *ask)
        asked = len(stub.requests)
        again = runs.run("evaluate.py", *ask)
        assert len(stub.requests) == asked
    answered = sum(bool(record["answer"].strip()) for record in records)
    assert f"judge accepts {answered / len(records):.3f} of {len(records)} answers" in printed
    assert "it accepts 1.000 of 4 wrong, 1.000 of 4 vague, 1.000 of 4 right" in printed
    assert f"{asked} requests" in printed
    assert "0 requests, 0 prompt tokens" in again
    folder = workdir / "eval" / "judge"
    summary = json.loads((folder / f"{STEM}.json").read_text())
    assert (summary["judge"], summary["cost"]) == ("kind", 0.0), "of the second time"
    verdicts = read_lines(folder / f"{STEM}.jsonl")
    assert [v["correct"] for v in verdicts] == [bool(r["answer"].strip()) for r in records]
    refused = forks.refuse("evaluate.py", *flags, f"--judge={stub.url}")
    assert "--judge_model is missing" in refused


def test_what_was_played_is_printed_where_it_cannot_be_written(evaluated, tmp_path):
    _, flags = evaluated
    (tmp_path / f"{STEM}.json").mkdir()  # the folder can be written to, this file cannot
    printed = runs.run("evaluate.py", *flags, f"--out={tmp_path}", status=2)
    assert "test_1x " in printed
    assert f"--out={tmp_path}: the results could not be written (" in printed
    assert "Traceback" not in printed
