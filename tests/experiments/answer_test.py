"""`answer.py`, with the smallest checkpoints there can be."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from atommem_jax.agent import load, settings
from atommem_jax.config import ConfigError
from atommem_jax.documents import transcript
from tests.conftest import COMPILATION_CACHE, ROOT
from tests.helpers import checkpoints, runs, tiny
from tests.helpers.checkpoints import make_facts, make_questions
from tests.language import chat_test
from tests.report import page_test


@pytest.fixture(autouse=True)
def _cache(monkeypatch):
    """What is loaded in this process keeps its own compilation cache."""
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.save_trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory):
    return checkpoints.save_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text(checkpoints.make_document(), encoding="utf-8")
    return str(file)


def read_episodes(folder) -> list[dict]:
    return json.loads(page_test.Page(folder / "index.html").scripts["data"])["episodes"]


def fold(episode) -> dict[int, str]:
    """The table after the last turn, from what the page is given."""
    table = {entry["slot"]: entry["text"] for entry in episode["start"]}
    for turn in episode["turns"]:
        for change in turn["changes"]:
            table.pop(change["slot"], None)
            if change["after"] is not None:
                table[change["slot"]] = change["after"]
    return table


def test_the_script_reads_answers_and_is_asked_more(checkpoint, document, tmp_path):
    first, second, third = make_questions()
    command = [
        sys.executable,
        str(ROOT / "experiments" / "answer.py"),
        f"--checkpoint={checkpoint}",
        f"--document={document}",
        f"--question={first}",
        f"--question={second}",
        "--interactive",
        f"--out={tmp_path / 'trace'}",
        f"--save_memory={tmp_path / 'kept.npz'}",
        "--temperature=1",
    ]
    far = "far " * 30
    done = subprocess.run(
        command,
        input=f"{far}\n{third}\n\n{first}\n",  # after the empty line nothing is read
        env=runs.make_environment() | {"COLUMNS": "72"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed, facts = done.stdout, make_facts()

    # Each part is announced before what the turn did with it.
    heads = re.findall(r"^\[ *[\d.]+ s\] part (\d+)/(\d+) of notes.txt( again)?$", printed, re.M)
    assert [int(i) for i, _, again in heads if not again] == list(range(1, len(facts) + 1))
    assert {count for _, count, _ in heads} == {str(len(facts))}
    for fact in facts:
        assert re.search(rf"^  text +{re.escape(fact)}$", printed, re.M)
    assert re.search(r"^  create .* \[applied", printed, re.M)
    assert f"question={far.strip()}: has" in printed.replace("\n", " ")
    for question in (first, second, third):
        assert re.search(rf"^  question  {re.escape(question)}\n  answer ", printed, re.M)
    assert "\x1b" not in printed

    page = page_test.Page(tmp_path / "trace" / "index.html")
    assert f"trace: {tmp_path / 'trace' / 'index.html'}" in printed
    assert "notes.txt" in "".join(page.text)
    read, asked = read_episodes(tmp_path / "trace")
    assert read["chunks"] == facts
    assert [q["text"] for q in read["questions"]] == [first, second]
    assert [q["text"] for q in asked["questions"]] == [third]
    assert (read["em"], asked["em"], asked["chunks"], read["start"]) == (None, None, [], [])
    assert {e["slot"]: e["text"] for e in asked["start"]} == fold(read) != {}
    assert len(heads) == sum(turn["phase"] == "reading" for turn in read["turns"])
    with np.load(tmp_path / "kept.npz") as kept:
        assert kept["valid"].sum() == len(fold(asked))


# The script several times in one process, which compiles once: [{arguments, lines, broken}] comes
# in, and [{printed, error, status}] goes out. What is `broken` cannot be written.
_SEVERAL = """
import contextlib, io, json, sys
from unittest import mock
from absl import flags
from atommem_jax.config import ConfigError
from atommem_jax.documents import transcript
from experiments import answer

written = {"page": (answer.page_lib, "write"), "memory": (answer.Memory, "save")}
results = []
for call in json.load(sys.stdin):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["answer.py", *call["arguments"]])
    sys.stdin, printed, error, status = io.StringIO(call["lines"]), io.StringIO(), "", 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        if call["broken"]:
            fault = OSError(30, "Read-only file system")
            stack.enter_context(mock.patch.object(*written[call["broken"]], side_effect=fault))
        try:
            answer.main(["answer.py"])
        except ConfigError as caught:
            error = str(caught)
        except SystemExit as ended:
            status = ended.code
    results.append({"printed": printed.getvalue(), "error": error, "status": status})
print(json.dumps(results))
"""


def call(*calls: list[str], lines: str = "", broken: str = "") -> list[dict]:
    """What each call printed, and the mistake that it ended with; `lines` is typed in the first."""
    told = [
        {"arguments": arguments, "lines": "" if i else lines, "broken": broken}
        for i, arguments in enumerate(calls)
    ]
    done = subprocess.run(
        [sys.executable, "-c", _SEVERAL],
        input=json.dumps(told),
        env=runs.make_environment() | {"COLUMNS": "72", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_memory_that_was_kept_goes_on_as_if_it_had_never_ended(checkpoint, document, tmp_path):
    first, second, third = make_questions()
    always = [f"--checkpoint={checkpoint}", "--temperature=1", "--seed=5"]
    reads = [*always, f"--document={document}", f"--question={first}"]
    kept = str(tmp_path / "kept.npz")
    goes_on = [*always, f"--load_memory={kept}"]
    outs = {name: tmp_path / name for name in ("whole", "one", "two", "three", "four")}
    results = call(
        [*reads, "--interactive", f"--out={outs['whole']}"],
        [*reads, f"--save_memory={kept}", f"--out={outs['one']}"],
        [*goes_on, f"--question={second}", f"--save_memory={kept}", f"--out={outs['two']}"],
        [*goes_on, f"--question={third}", f"--out={outs['three']}"],
        [*goes_on, f"--question={third}", "--set=memory.slots=9", f"--out={outs['four']}"],
        lines=f"{second}\n{third}\n",
    )
    assert [bool(result["error"]) for result in results] == [False] * 4 + [True]
    whole = read_episodes(outs["whole"])
    assert whole == [
        episode for name in ("one", "two", "three") for episode in read_episodes(outs[name])
    ]
    assert [e["episode"] for e in whole] == [0, 1, 2]
    assert f"{kept}: {len(fold(whole[0]))} entries, of notes.txt" in results[2]["printed"]
    assert re.search(
        r"--load_memory=.*memory\.slots=6 \(here: 9\); pass --set=memory\.slots=6",
        results[4]["error"],
    )
    # An answer comes with what its own turn was shown.
    answers = [e["questions"][0]["answer"] for e in whole]
    told = results[0]["printed"].split("\n  question  ")[1:]
    assert len(told) == 3
    for text, answer, episode in zip(told, answers, whole, strict=True):
        shown = episode["turns"][-1]["shown"]
        lines = text.split("\n\n")[0]
        assert f"\n  answer    {transcript.clean(answer) or '(none)'}\n" in lines
        cosines = [float(c) for c in re.findall(r" \d+ \((-?\d\.\d\d)\) ", lines)]
        assert cosines == sorted(cosines, reverse=True)
        assert cosines == [pytest.approx(e["cosine"], abs=0.006) for e in shown]


def test_a_chat_model_reads_parts_of_many_sentences(chat_checkpoint, document, tmp_path):
    asked = [
        "memory.entry_length=24", "memory.query_length=24", "memory.shown=2",
        "rollout.response_length=80", "rollout.max_actions=2",
    ]  # fmt: skip
    (result,) = call(
        [
            f"--checkpoint={chat_checkpoint}", f"--document={document}", f"--document={document}",
            f"--question={make_questions()[0]}", *(f"--set={text}" for text in asked),
            "--chunk_tokens=30", f"--out={tmp_path / 'out'}",
        ]
    )  # fmt: skip
    assert not result["error"]
    assert "entries of up to 24 tokens, 2 shown" in " ".join(result["printed"].split())
    (episode,) = read_episodes(tmp_path / "out")
    # No part is of two documents, and each holds several sentences with the breaks between them.
    half = len(episode["chunks"]) // 2
    assert 1 < half < len(make_facts())
    assert episode["chunks"][:half] == episode["chunks"][half:]
    assert "".join("".join(episode["chunks"][:half]).split()) == "".join(
        "".join(make_facts()).split()
    )
    assert any("\n" in chunk for chunk in episode["chunks"])
    texts = [entry["text"] for entry in episode["turns"][-1]["shown"]]
    encode = chat_test.make_tokenizer().encode
    assert all(len(encode(text)) <= 24 for text in texts)
    assert len(texts) <= 2


def test_longer_sentences_are_cut_with_a_note_and_questions_can_be_left_out(
    checkpoint, document, tmp_path
):
    file = tmp_path / "prose.md"
    file.write_text("# Report\n\nThe committee, which met on Tuesday, approved it.\n")
    always = [f"--checkpoint={checkpoint}"]
    cut, unasked = call(
        [
            *always, f"--document={file}", f"--question={make_questions()[0]}",
            f"--out={tmp_path / 'cut'}",
        ],
        [*always, f"--document={document}", "--interactive", f"--out={tmp_path / 'unasked'}"],
    )  # fmt: skip
    (episode,) = read_episodes(tmp_path / "cut")
    limit, encode = tiny.make_shape().chunk_length, tiny.make_tokenizer().encode
    assert all(len(encode(chunk)) <= limit for chunk in episode["chunks"])
    assert "".join("".join(episode["chunks"]).split()) == "".join(file.read_text().split())
    assert re.search(r"note: \d+ of its pieces are cut from sentences", cut["printed"])
    # A document without questions.
    assert "note: no question is known while reading" in unasked["printed"]
    (episode,) = read_episodes(tmp_path / "unasked")
    assert (episode["questions"], episode["em"]) == ([], None)
    assert {turn["phase"] for turn in episode["turns"]} == {"reading"}


@pytest.mark.long
def test_a_page_that_cannot_be_written_costs_no_memory(checkpoint, document, tmp_path):
    """And the reverse; both are said, and the status is 1."""
    kept, out = tmp_path / "kept.npz", tmp_path / "out"
    arguments = [
        f"--checkpoint={checkpoint}", f"--document={document}", f"--out={out}",
        f"--question={make_questions()[0]}", f"--save_memory={kept}",
    ]  # fmt: skip
    for broken, there in (("page", kept), ("memory", out / "index.html")):
        there.unlink(missing_ok=True)
        (done,) = call(arguments, broken=broken)
        assert done["status"] == 1
        assert there.is_file()


def test_what_cannot_be_is_refused_before_anything_is_played(checkpoint, document, tmp_path):
    given = {
        "checkpoint": [checkpoint], "document": [document], "question": [make_questions()[0]],
        "out": [str(tmp_path / "out")],
    }  # fmt: skip
    cases: list[tuple[str, dict]] = [
        (r"--document is missing: .* --load_memory", {"document": []}),
        (r"--question is missing: .* --interactive", {"question": []}),
        (r"--out=.*notes.txt: is a file; pass a folder", {"out": [document]}),
        (r"--out=/proc/self/x: cannot be written to \(No such file", {"out": ["/proc/self/x"]}),
        (
            r"--save_memory=/proc/self/m.npz: cannot be written \(",
            {"save_memory": ["/proc/self/m.npz"]},
        ),
        (r"--document=.*: is a folder", {"document": [str(tmp_path)]}),
        (r"--save_memory=.*: is a folder", {"save_memory": [str(tmp_path)]}),
        (
            r"--save_memory=.*: there is no folder",
            {"save_memory": [str(tmp_path / "a" / "b.npz")]},
        ),
        (r"--load_memory=.*nowhere: No such file", {"load_memory": [str(tmp_path / "nowhere")]}),
        (r"--question: is empty", {"question": [" "]}),
        (
            rf"--question=.*: has \d+ tokens, and up to {tiny.make_shape().question_length} are "
            r"read; .*pass --question_tokens=\d+",
            {"question": ["why " * 40]},
        ),
        (r"--chunk_tokens=1: too few for notes.txt .*raise it", {"chunk_tokens": ["1"]}),
        (r"--set=model.width=8: allowed is FIELD=VALUE", {"set": ["model.width=8"]}),
    ]
    results = call(
        *(
            [f"--{name}={value}" for name, values in (given | changes).items() for value in values]
            for _, changes in cases
        )
    )
    for (message, _), result in zip(cases, results, strict=True):
        assert re.search(message, result["error"]), (message, result)
    assert not (tmp_path / "out").exists()


def test_sizes_of_a_checkpoint_can_be_set():
    config = tiny.make_config()
    changed = settings.override(
        config, ["memory.slots=9", "rollout.constrained=false", "rollout.top_p=0.5"]
    )
    assert (changed.memory.slots, changed.rollout.constrained, changed.rollout.top_p) == (
        9,
        False,
        0.5,
    )
    assert config.memory.slots == 6
    assert settings.override(config, []) is config
    for setting, message in [
        ("memory.slots", "--set=memory.slots: allowed is FIELD=VALUE"),
        ("memory=3", "memory is a section"),
        ("memory.slot=9", "did you mean 'memory.slots'"),
        ("memory.slots=many", "--set=memory.slots=many: 'many' is no int; it was 6"),
        ("memory.slots=2", "memory.shown=4 is more than memory.slots=2"),
        ("rollout.constrained=1", "allowed is true or false"),
        ("rollout.top_p=2", "top_p=2.0: allowed is above 0.0"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            settings.override(config, [setting])


def test_a_checkpoint_knows_the_shape_that_it_was_trained_on(checkpoint, chat_checkpoint):
    assert load.load(checkpoint).trained_shape == tiny.make_shape()
    assert load.load(chat_checkpoint).trained_shape is None
