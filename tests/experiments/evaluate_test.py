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


COMPARED = (
    *("learned", "scratchpad_only", "store_all", "store_all_update", "sliding_window", "no_memory"),
    *("full_context", "recent_context", "rag_chunks", "rag_documents", "store_everything"),
    *("store_everything_update", "extract_reconcile", "linked_notes"),
)


def read_table(path) -> dict[str, list[str]]:
    """Cells of a Markdown table by the first of their row."""
    rows = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if "|" in line]
    return {row[0]: row for row in rows[2:]}


@pytest.mark.long
def test_every_workflow_plays_the_same_episodes(evaluated, tmp_path):
    _, flags = evaluated
    # Room for the turns of programs.
    flags = (*flags, f"--out={tmp_path}", "--rollout.response_length=40")
    names = [f"--workflow={name}" for name in COMPARED]
    printed = runs.run("evaluate.py", *flags, *names, "--against=no_memory")
    table = read_table(tmp_path / "workflows.md")
    assert list(table) == list(COMPARED)
    assert (tmp_path / "workflows.md").read_text() in printed
    summaries = {
        name: json.loads(next(tmp_path.glob(f"*workflow={name}.json")).read_text())
        for name in COMPARED
    }
    asked = {
        tuple((r["episode"], r["question"]) for r in read_lines(path))
        for path in tmp_path.glob("*.jsonl")
    }
    assert len(asked) == 1
    questions = summaries["learned"]["questions"] / 5
    for name, summary in summaries.items():
        told = summary["statistics"]
        assert summary["workflow"] == name
        assert summary["seconds"] > 0
        assert table[name][3].startswith("+0.000" if name == "no_memory" else ("+", "-"))
        if name in ("full_context", "recent_context", "rag_chunks", "rag_documents"):
            assert told["turns"] == pytest.approx(questions), "nothing is read turn by turn"
        if name == "no_memory":  # turns of a program cost the model nothing
            answering = told["turns"] - told["reading_turns"]
            assert told["tokens_written"] == pytest.approx(answering * told["response_tokens"])
        assert (told["retrievals"] > 0) == (
            name not in ("scratchpad_only", "no_memory", "full_context", "recent_context")
        )


def test_a_workflow_is_compared_with_what_was_played_before(evaluated, tmp_path):
    _, flags = evaluated
    flags = (*flags, f"--out={tmp_path}")
    refused = forks.refuse("evaluate.py", *flags, "--workflow=rag_chunks", "--against=full_context")
    assert "pass --workflow=full_context too" in refused
    runs.run("evaluate.py", *flags, "--workflow=full_context", "--rollout.context_length=4")
    refused = forks.refuse("evaluate.py", *flags, "--workflow=rag")
    assert "workflow='rag': allowed are learned" in refused
    runs.run(
        "evaluate.py", *flags, "--workflow=rag_chunks", "--against=full_context",
        "--rollout.context_length=4",
    )  # fmt: skip
    assert list(read_table(tmp_path / "workflows.md")) == ["rag_chunks"]
