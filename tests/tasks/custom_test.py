"""A task of a user's own: samples from a function, a reward from another."""

import pytest

from atommem_jax.config import ConfigError, TaskConfig
from atommem_jax.learning import evaluation, reward
from atommem_jax.tasks import custom, datasets, user_functions

SOURCE = """
def samples(split):
    for i in range({"train": 3, "validation": 2, "test": 1}[split]):
        yield {
            "chunks": [[f"Ada is {i}.", {"text": "It rains.", "support": True}], ["Bo is 7."]],
            "questions": [{"text": "How old is Bo?", "aliases": ["7", "seven"]}],
        }


def half(answer, aliases):
    return 0.5 * (answer in aliases)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ages.py"
    path.write_text(SOURCE)
    return path


def prepare(file, tmp_path, **fields):
    task = {"name": "custom", "source": f"{file}:samples"} | fields
    return datasets.prepare(task, tmp_path / "data")


def test_samples_become_examples_with_what_they_leave_out(file, tmp_path):
    dataset = prepare(file, tmp_path)
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    assert sizes == {"train": 3, "validation": 2, "test": 1}
    plain = {"note": "", "subject": "", "support": False, "supersedes": -1, "category": -1}
    assert dataset.split("train")[2] == {
        "id": 2,
        "chunks": [
            [{**plain, "text": "Ada is 2."}, {**plain, "text": "It rains.", "support": True}],
            [{**plain, "text": "Bo is 7."}],
        ],
        "questions": [{"text": "How old is Bo?", "aliases": ["7", "seven"], "needs": []}],
        "focus": "How old is Bo?",
    }


def test_a_source_that_changed_is_prepared_again(file, tmp_path):
    first = prepare(file, tmp_path)
    assert prepare(file, tmp_path).directory == first.directory
    file.write_text(SOURCE.replace("Bo is 7", "Bo is 70"))
    second = prepare(file, tmp_path)
    assert second.directory != first.directory
    assert second.split("test")[0]["chunks"][1][0]["text"] == "Bo is 70."


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([], "sample 4 of train is a list: allowed is a dict"),
        ({"chunks": []}, "sample 4 of train has no questions; it has chunks"),
        ({"chunks": [[3]], "questions": []}, "a fact is 3; allowed is a text or a dict"),
        (
            {"chunks": [[{"text": "a", "suport": True}]], "questions": []},
            "a fact has an unknown field suport; allowed are text, note, subject, support",
        ),
        (
            {"chunks": [["a"]], "questions": [{"text": "b", "aliases": "c"}]},
            "aliases are 'c'; allowed is a list",
        ),
        ({"chunks": [["a"]], "questions": ["b"]}, "a question is 'b'; allowed is a dict"),
    ],
)
def test_what_is_no_sample_is_named(sample, message):
    with pytest.raises(ConfigError, match=message):
        custom.complete(sample, 4, "train")


def test_a_function_is_found_in_a_file_or_a_module(file):
    assert user_functions.find(f"{file}:half", "f")("7", ["7"]) == 0.5
    find = user_functions.find("atommem_jax.learning.reward:f1", "f")
    assert find is reward.f1
    for spec, message in [
        ("samples", r"config.x='samples': allowed is 'FILE.py:FUNCTION' or 'MODULE:FUNCTION'"),
        (f"{file}:sample", "has no function sample; it has: samples, half"),
        ("nowhere.py:samples", r"config.x: there is no file nowhere.py"),
        ("no_such_module:samples", "there is no module 'no_such_module'; put its folder on"),
    ]:
        with pytest.raises(ConfigError, match=message):
            user_functions.find(spec, "config.x")


def test_a_module_that_misses_another_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        user_functions.find("needs_more:samples", "config.x")


def test_a_task_may_have_a_reward_of_its_own(file, tmp_path):
    metric = reward.find(TaskConfig("synthetic", {"reward": f"{file}:half"}))
    scores = evaluation.score_answers([["7", "8"], ["9"]], [[["7"], ["7"]], [["9"]]], metric)
    assert scores.tolist() == [[0.5, 0.0], [0.5, 0.0]]
    assert reward.find(TaskConfig("synthetic", {})) is reward.exact_match
    with pytest.raises(ConfigError, match=r"config.task.reward=.*has no function other"):
        prepare(file, tmp_path, reward=f"{file}:other")


def test_a_reward_of_its_own_is_summarised_beside_exact_match():
    records = [{"episode": i, "em": float(i == 0), "f1": 0.0, "reward": 0.25 * i} for i in range(3)]
    summary = evaluation.summarise(records)
    assert (summary["em"], summary["reward"]) == (pytest.approx(1 / 3), 0.25)
    assert 0.0 <= summary["reward_ci_low"] <= 0.25 <= summary["reward_ci_high"] <= 0.5
    assert "reward" not in evaluation.summarise([{"episode": 0, "em": 1.0, "f1": 1.0}])
