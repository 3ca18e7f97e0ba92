"""`experiments/collect.py` from the outside: killed and resumed, and training on what it wrote."""

import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Callable

import numpy as np
import pytest

from atommem_jax.collection import store
from atommem_jax.config import ConfigError
from atommem_jax.metrics import read_metrics
from experiments import train
from tests.conftest import COMPILATION_CACHE
from tests.helpers import forks, runs
from tests.helpers.stub_endpoint import Answer, Stub, teach

SECRET = "sk-very-secret"


EPISODES = 12


def fail_at_times():
    """Answers of the rule-based teacher, with a failure of each kind among the first."""
    failures = [
        Answer(status=500),
        Answer(status=429, headers={"Retry-After": "0.02"}),
        Answer(body=b"{"),
        Answer(stalls=True),
    ]
    lock = threading.Lock()

    def answer(request):
        with lock:
            failed = failures.pop() if failures else None
        return failed or Answer(teach(request["messages"]))

    return answer


def make_command(stub, folder, data_root, *more):
    return [
        f"--base_url={stub.url}",
        "--model=stub",
        f"--episodes={EPISODES}",
        f"--out={folder}",
        f"--data_root={data_root}",
        "--timeout=2",
        "--backoff=0.001",
        "--price_per_million=1,10",
        *runs.make_flags(),
        *more,
    ]


def read_lines(folder) -> list[dict]:
    lines = (folder / store.EPISODES).read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda r: (r["example"], r["sample"]))


@pytest.fixture(scope="module")
def collection(tmp_path_factory, data_root):
    """(folder, what the last run printed, requests of all runs) of a run that was killed once."""
    folder = tmp_path_factory.mktemp("teacher")
    reached = threading.Event()
    usual = fail_at_times()

    def answer(request):
        lines = folder / store.EPISODES
        if not reached.is_set() and lines.exists() and lines.read_bytes().count(b"\n") >= 3:
            reached.set()
        return usual(request)

    os.environ["STUB_KEY"] = SECRET
    try:
        with Stub(answer) as stub:
            command = make_command(stub, folder, data_root, "--api_key_env=STUB_KEY")
            process = runs.start("collect.py", *command)
            while process.poll() is None and not reached.wait(0.01):
                pass
            process.send_signal(signal.SIGKILL)
            output = b"".join(process.communicate()).decode()
            assert process.returncode == -signal.SIGKILL, f"ended by itself:\n{output[-3000:]}"
            before = (folder / store.EPISODES).read_bytes()
            with (folder / store.EPISODES).open("ab") as file:
                file.write(before[:100])
            printed = runs.run("collect.py", *command)
            assert (folder / store.EPISODES).read_bytes().startswith(before)
            assert set(stub.keys) == {f"Bearer {SECRET}"}
    finally:
        del os.environ["STUB_KEY"]
    return folder, output + printed, stub.requests


def test_a_killed_run_goes_on_to_the_same_trajectories(collection):
    folder, printed, requests = collection
    records = read_lines(folder)
    assert [(r["example"], r["sample"]) for r in records] == [(e, 0) for e in range(EPISODES)]
    assert f"{EPISODES} trajectories" in printed
    about = json.loads((folder / store.ABOUT).read_text())
    assert {r["fingerprint"] for r in records} == {store.digest(about["setting"])}
    # A teacher that draws nothing says the same to the same, whatever failed before.
    for record in records[:3]:
        for turn in record["turns"]:
            assert any(teach(r["messages"]) == turn["reply"] for r in requests)
    fields = [set(request) for request in requests]
    assert all(f == {"model", "messages", "temperature", "max_tokens"} for f in fields)


def test_the_summary_adds_up(collection):
    folder, _, _ = collection
    records = read_lines(folder)
    summary = json.loads((folder / store.SUMMARY).read_text())
    turns = sum(len(record["turns"]) for record in records)
    rewards = [np.mean(record["em"]) for record in records]
    assert summary["trajectories"] == EPISODES
    assert summary["kept"] == sum(reward >= 0.5 for reward in rewards)
    assert summary["em"] == pytest.approx(np.mean([*itertools.chain(*(r["em"] for r in records))]))
    assert summary["em"] > 0.5, "the stub is a good teacher"
    assert (summary["turns"], summary["requests"], summary["failures"]) == (turns, turns, 0)
    assert summary["prompt_tokens"] == 100 * turns
    assert summary["cost"] == pytest.approx(turns * (100 + 10 * 10) / 1e6)
    assert summary["actions"]["answer"]["applied"] == summary["questions"]


def test_the_key_is_written_nowhere(collection):
    folder, printed, _ = collection
    assert SECRET not in printed
    for path in folder.iterdir():
        assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.relaxed_promotion  # optax's schedules
def test_sft_learns_from_what_was_collected(collection, data_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))
    folder, _, _ = collection
    steps = 12
    config = runs.make_config(
        sft__data=str(folder),
        sft__steps=steps,
        sft__min_reward=0.5,
        sft__eval_every=steps,
        sft__save_every=steps,
        sft__optimizer__name="adamw",
        sft__optimizer__warmup_steps=0,
        rl__steps=0,
    )
    train.train(config, str(tmp_path), str(data_root))
    records = read_lines(folder)
    kept = [r for r in records if r["reward"] >= 0.5]
    assert f"sft.data: {len(kept)} of {EPISODES} trajectories of {folder} kept" in (
        capsys.readouterr().out
    )
    metrics = [r for r in read_metrics(tmp_path) if r["stage"] == "sft"]
    assert len(metrics) == steps
    assert all(record["kept"] == 1.0 for record in metrics)
    assert all(np.isfinite(record["loss"]) for record in metrics)
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    # Every token of every turn that can be learned, and no other.
    learned = {
        r["example"]: sum(len(t["response"]) for t in r["turns"] if t["admitted"] and not t["cut"])
        for r in kept
    }
    batch = config.sft.episodes
    assert min(learned.values()) * batch <= metrics[0]["tokens"] <= max(learned.values()) * batch
    total = sum(record["tokens"] for record in metrics)
    epochs, rest = divmod(steps * batch, len(kept))
    assert epochs * sum(learned.values()) <= total
    assert total <= (epochs + bool(rest)) * sum(learned.values())

    wider = runs.make_config(sft__data=str(folder), memory__entry_length=9)
    with pytest.raises(ConfigError, match=r"memory\.entry_length=9 \(collected with 8\)"):
        train.train(wider, str(tmp_path / "other"), str(data_root))


def refuse_one() -> Callable[[dict], Answer]:
    """A teacher that thinks aloud, whose prompt opens its thoughts, behind a filter.

    The filter refuses the prompts with the question of the first request, and withholds whole what
    is said in the turns in which an answer must be given.
    """
    seen: list[str] = []

    def answer(request):
        user = request["messages"][1]["content"]
        question = re.search(r"Question:\n(.*)", user)[1]
        seen.append(question)
        if question == seen[0]:
            said = {"code": "content_filter", "message": "The response was filtered"}
            return Answer(status=400, body=json.dumps({"error": said}).encode())
        if "Answer the question now." in user:
            return Answer(teach(request["messages"]), finish_reason="content_filter")
        wrong = "The person moved, so <create>wrong note.<end> might do."
        return Answer(f"{wrong}\n</think>\n\n{teach(request['messages'])}")

    return answer


@pytest.mark.long  # each part in tests/collection
def test_a_refused_prompt_and_thoughts_and_a_filter(tmp_path, data_root):
    """The refused episode is counted, and by the same command tried again; the rest is played."""
    with Stub(refuse_one()) as stub:
        command = make_command(stub, tmp_path, data_root, "--concurrency=1", "--episodes=5")
        printed = [runs.run("collect.py", *command) for _ in range(2)]
    (failure, again) = map(json.loads, (tmp_path / store.FAILURES).read_text().splitlines())
    assert failure["example"] == again["example"] == 0
    assert 'status 400, \'{"error"' in failure["error"]
    assert "A content filter refuses this prompt" in failure["error"]
    records = read_lines(tmp_path)
    assert [record["example"] for record in records] == [1, 2, 3, 4]
    summary = json.loads((tmp_path / store.SUMMARY).read_text())
    assert (summary["failures"], summary["refused"], summary["trajectories"]) == (1, 1, 4)
    withheld = summary["turns_cut_by"].get("content_filter", 0)
    for output in printed:
        assert f"1 failed (1 refused by the server: {tmp_path / store.FAILURES} says why)" in output
        assert (f"not learned: {withheld} turns" in output) == bool(withheld)
    turns = [turn for record in records for turn in record["turns"]]
    assert all(("wrong note" in turn["thoughts"]) for turn in turns if not turn["cut"])
    assert not any("wrong note" in turn["reply"] for turn in turns)
    assert summary["em"] > 0.5, "the stub is a good teacher, where its thoughts are not played"


def test_a_refusal_of_everything_ends_in_a_sentence(tmp_path, data_root):
    said = b'{"error": {"message": "Unsupported parameter: max_tokens"}}'
    with Stub(lambda request: Answer(status=400, body=said)) as stub:
        command = make_command(stub, tmp_path, data_root, "--concurrency=1")
        printed = runs.run("collect.py", *command, status=2)
        assert len(stub.requests) == 3
    assert "the server refused the first 3 episodes, the last one with: " in printed
    assert "Unsupported parameter: max_tokens" in printed
    assert "Change what it names: --model, --temperature, --max_tokens" in printed


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(body=b'{"error": {"message": "CUDA out of memory"}}'), "CUDA out of memory"),
        (Answer(status=503), "status 503"),
    ],
)
def test_errors_alone_end_with_a_status_of_failure(tmp_path, data_root, answer, said):
    """Fewer episodes than --max_failures, and none is played: that is no success."""
    with Stub(lambda request: answer) as stub:
        command = make_command(stub, tmp_path, data_root, "--episodes=2", "--retries=1")
        printed = runs.run("collect.py", *command, status=1)
    sentence = printed[printed.index("collect.py: nothing was collected") :]
    assert "(episodes without an answer: 2, refused: 0); the last one failed with: " in sentence
    assert said in sentence
    assert sentence.rstrip().endswith("when it answers, the same command goes on")
    assert "0 trajectories, 0 kept" in printed
    assert "Traceback" not in printed


@pytest.mark.long
def test_empty_replies_are_said(tmp_path, data_root):
    answer = Answer(None, message={"reasoning_content": "<answer>Paris<end>"})
    with Stub(lambda request: answer) as stub:
        printed = runs.run("collect.py", *make_command(stub, tmp_path, data_root, "--episodes=1"))
        turns = len(stub.requests)
    assert (
        f"{turns} turns: {turns} cut, 0 outside of the grammar, {turns} without a word" in printed
    )
    assert (
        f"not learned: {turns} turns whose reply was not whole (thoughts without a reply): raise "
        "--max_tokens, or start the server without a reasoning parser"
    ) in printed
    assert "every reply was empty: ask the server for one by hand" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=m"], "collect.py: --base_url is missing: pass it"),
        (["--base_url=http://h/v1", "--model=m", "--out=x", "--price_per_million=1"], "IN,OUT"),
    ],
)
def test_a_mistake_ends_the_script_before_anything_is_read(arguments, message):
    assert message in forks.refuse("collect.py", *arguments)
