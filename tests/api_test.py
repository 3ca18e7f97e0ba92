"""The library from Python, as docs/api.md shows it."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import atommem_jax as am
from atommem_jax.types import Phase
from tests.conftest import COMPILATION_CACHE, ROOT
from tests.helpers import checkpoints, runs, tiny


@pytest.fixture(autouse=True)
def _cache(monkeypatch):
    """What is loaded in this process keeps its own compilation cache."""
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.save_trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def agent(checkpoint):
    return am.load(checkpoint)


# ---------------------------------------------------------------------------------------------
# docs/api.md


def read_blocks(language: str) -> list[str]:
    """The code of the page, in order."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def run(folder: pathlib.Path, *command: str) -> str:
    """What a command prints that is run outside of the checkout."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=runs.make_environment() | {"PYTHONPATH": str(ROOT), "COLUMNS": "72"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_lines_of_the_page_read_answer_and_watch_and_print_nothing_else(tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    # Room for the page's names, which the tiny tokenizer spells out.
    checkpoints.save_trained(tmp_path / "runs" / "demo", question_length=30, chunk_length=30)
    facts = checkpoints.make_facts()
    (tmp_path / "notes.txt").write_text(checkpoints.make_document(), encoding="utf-8")
    start, go_on, watch = read_blocks("python")[:3]
    mark = "print('=====')\n"
    quiet = "import os, sys; os.dup2(1, 2)\n"  # what a library says to stderr is seen here too
    printed = run(tmp_path, sys.executable, "-c", quiet + mark.join([start, go_on, watch]))
    answer, memory, turns = printed.split("=====\n")
    assert len(answer.splitlines()) == 1
    entries, told, shown = memory.splitlines()
    assert entries.startswith("[")
    assert float(told.split(" ")[-1]) <= 0.0
    assert shown.startswith("[")
    assert (tmp_path / "notes.npz").exists()
    heads = re.findall(r"^part (\d+)/(\d+) of text$", turns, re.MULTILINE)
    assert heads == [(str(i + 1), str(len(facts))) for i in range(len(facts))]
    assert re.search(r"^part \d+/\d+ of text create .* \['applied'", turns, re.MULTILINE)
    assert "question 1/1" not in turns  # reading answers nothing


@pytest.mark.long
def test_the_task_of_the_page_is_trained_evaluated_and_played(tmp_path):
    task, play = read_blocks("python")[3:]
    assert len([line for line in task.splitlines() if line.strip()]) <= 40
    (tmp_path / "pets.py").write_text(task.replace('"train": 2000', '"train": 200'))
    (commands,) = read_blocks("bash")
    train, evaluate = (
        command.replace("python experiments", f"{sys.executable} {ROOT / 'experiments'}").split()
        for command in commands.splitlines()
    )
    smaller = runs.OVERRIDES | {"sft.steps": 2, "rl.steps": 2, "rl.log_every": 1}
    smaller |= {"eval.episodes": 8, "eval.batch_size": 8}
    flags = [
        f"--config.{path}={value}" for path, value in smaller.items() if not path.startswith("task")
    ]
    run(tmp_path, *train, *flags)
    printed = run(tmp_path, *evaluate, "--episodes=8")
    assert re.search(r"^test +\d\.\d+ .* reward \d\.\d+$", printed, re.MULTILINE)
    records = [
        json.loads(line)
        for file in (tmp_path / "runs" / "pets" / "eval").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert len(records) == 8
    animals = ("cat", "dog", "hen", "pig", "cow", "fox", "owl", "ant")
    for record in records:
        partial = 0.1 * (record["answer"] in animals)
        assert record["reward"] == pytest.approx(record["em"] or partial)
    printed = run(tmp_path, sys.executable, "-c", f"import atommem_jax as am\n{play}")
    *lines, shape = printed.splitlines()
    assert [len(json.loads(line)) for line in lines] == [2] * 8
    assert shape.startswith("(8, ")


# ---------------------------------------------------------------------------------------------
# The agent


def test_importing_is_light_and_lists_what_there_is():
    script = (
        "import sys, atommem_jax as am\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules), 'heavy'\n"
        "assert set(am.__all__) <= set(dir(am))\n"
        "for name in am.__all__: assert getattr(am, name).__name__, name\n"
        "assert not hasattr(am, 'lod')\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_nothing_is_printed_and_a_memory_stays_as_it_is(agent, capfd):
    question, other = checkpoints.make_questions()[:2]
    memory = agent.read(checkpoints.make_document(), questions=[question])
    before = jax.tree.map(np.copy, memory.state)
    first = agent.answer(memory, question)
    assert agent.answer(memory, other).question == other
    assert agent.answer(memory, question) == first
    later = agent.read("Saltan likes tea.", memory=memory, name="more")
    assert (later.documents, later.episodes) == (("text", "more"), 2)
    jax.tree.map(np.testing.assert_array_equal, memory.state, before)
    assert capfd.readouterr() == ("", "")
    assert set(first.entries) <= set(memory.entries)
    assert len(first.entries) <= agent.config.memory.shown


def test_turns_are_watched_as_they_happen(agent):
    turns = []
    text, (question, *_) = checkpoints.make_document(), checkpoints.make_questions()
    memory = agent.read(text, questions=[question], on_turn=turns.append, temperature=1.0, seed=3)
    read = [turn.heading.text for turn in turns if not turn.heading.label.endswith("again")]
    assert read == checkpoints.make_facts()
    written = {
        action.get("kept", action["text"])
        for turn in turns
        for action in turn.actions
        if action["kind"] in ("create", "update") and "applied" in action["fates"]
    }
    assert set(memory.entries) <= written
    assert memory.entries
    # What was seen is what had been written.
    seen = {text for turn in turns for text in turn.shown}
    assert seen <= written
    assert {int(turn.played.record.phase) for turn in turns} == {Phase.READING}
    asked = []
    answer = agent.answer(memory, question, on_turn=asked.append)
    assert asked[-1].shown == answer.entries
    assert asked[-1].heading.label == "question 1/1"
    assert str(asked[-1]).startswith("question 1/1\n  text ")


def test_a_batch_is_played_as_its_episodes_one_by_one(agent):
    examples = tiny.make_examples()[:3]  # does not divide over the devices
    played = jax.device_get(agent.play(examples, seed=4, temperature=1.0, ids=[7, 2, 5]))
    assert played.id.tolist() == [7, 2, 5]
    alone = jax.device_get(
        agent.play(agent.encode(examples[1:2]), seed=4, temperature=1.0, ids=[2])
    )
    np.testing.assert_array_equal(played.turns.response[1], alone.turns.response[0])
    texts = agent.answers_of(played)
    assert [len(row) for row in texts] == [len(example["questions"]) for example in examples]
    assert texts[1:2] == agent.answers_of(alone)
    # The same as the tiny model plays by itself.
    episodes, _ = tiny.make_episodes([0, 1, 2])
    expected = tiny.play(tiny.make_params(scale=0.3), episodes, [7, 2, 5], seed=4)
    np.testing.assert_array_equal(played.turns.response, expected.turns.response)
    with pytest.raises(ValueError, match=r"ids have the shape \(2,\), and there are 3 episodes"):
        agent.play(examples, ids=[1, 2])


def test_mistakes_are_told_in_the_terms_of_the_library(agent, checkpoint, tmp_path):
    (question, *_), text = checkpoints.make_questions(), checkpoints.make_document()
    memory = agent.read(text)
    chat = am.load(checkpoints.save_chat(tmp_path / "chat"))
    larger = am.load(checkpoint, settings={"memory.slots": 9})
    (tmp_path / "some.npz").write_text("text")
    cases = [
        (lambda: am.load(tmp_path / "nowhere"), "nowhere"),
        (lambda: am.load(checkpoint, "first"), "^step=first: allowed are last, best or a number"),
        (lambda: am.load(checkpoint, settings={"model.width": 8}), "^settings: model.width=8: all"),
        (lambda: agent.read(" \n"), "holds no text"),
        (lambda: agent.read(text, questions=question), "is one text; pass a list"),
        (lambda: agent.read(text, questions=["why " * 40]), "load the agent with question_tokens="),
        (lambda: agent.answer(memory, ""), "^question: is empty"),
        (lambda: am.load(checkpoint, chunk_tokens=1).read(text), "^chunk_tokens=1: too few"),
        (lambda: chat.answer(memory, question), "^memory: was written with the tokenizer"),
        (lambda: larger.answer(memory, question), "load the agent with memory.slots=6"),
        (lambda: agent.load_memory(tmp_path / "some.npz"), "is no memory, or damaged"),
    ]
    for act, message in cases:
        with pytest.raises(am.ConfigError, match=message) as error:
            act()
        assert "--" not in str(error.value)
