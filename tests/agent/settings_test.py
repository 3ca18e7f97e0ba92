"""A checkpoint says how an agent was trained, not what it may be asked."""

import json
import re

import pytest

from atommem_jax.agent import settings
from atommem_jax.config import ConfigError, parse
from tests.helpers import checkpoints, runs, tiny
from tests.helpers.multihop import make_record


def test_fields_of_the_task_are_set_as_its_family_has_them():
    config = tiny.make_config()
    changed = settings.override(
        config, ["task.scales=1,2", "task.questions=(1, 1)", "task.two_hop=1", "task.seed=4"]
    )
    assert dict(changed.task.fields) == dict(config.task.fields) | {
        "scales": (1, 2), "questions": (1, 1), "two_hop": 1.0, "seed": 4
    }  # fmt: skip
    assert type(changed.task.get("two_hop")) is float
    assert config.task.get("scales") == (1,), "nothing of the checkpoint's own"


def test_a_checkpoint_of_before_a_field_can_be_asked_for_it():
    plain = tiny.make_config().to_dict()
    plain["task"] = {"name": "multihop_qa", "data_file": "/old.json", "documents": 20}
    asked = ["task.test_documents=200", "task.test_file=/dev.json", "task.corpus_file="]
    changed = settings.override(parse(plain), asked)
    assert dict(changed.task.fields) == {
        "data_file": "/old.json", "documents": 20,
        "test_documents": (200,), "test_file": "/dev.json", "corpus_file": "",
    }  # fmt: skip


def test_another_family_begins_with_its_own_defaults():
    changed = settings.override(
        tiny.make_config(), ["task.name=multihop_qa", "task.documents=7", "task.test_every=1"]
    )
    assert changed.task.to_dict() == {"name": "multihop_qa", "documents": 7, "test_every": 1}
    same = settings.override(tiny.make_config(), ["task.name=facts", "task.seed=1"])
    assert same.task.get("base_facts") == 6


def test_longer_texts_and_another_workflow_may_be_asked_for():
    asked = ["workflow=full_context", "model.rope_type=yarn", "model.rope_factor=4"]
    changed = settings.override(tiny.make_config(), asked)
    assert changed.workflow == "full_context"
    assert (changed.model.rope_type, changed.model.rope_factor) == ("yarn", 4.0)
    assert changed.model.width == tiny.make_config().model.width
    with pytest.raises(ConfigError, match="workflow='rag': allowed are learned"):
        settings.override(tiny.make_config(), ["workflow=rag"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "task.base_fact=9",
            "unknown config field 'task.base_fact'; did you mean 'task.base_facts",
        ),
        ("task.documents=9", "unknown config field 'task.documents'"),
        ("task=9", "task is a section; name one of its fields"),
        ("task.seed", "--set=task.seed: allowed is FIELD=VALUE"),
        ("task.base_facts=x", "--set=task.base_facts=x: 'x' is no int; it was 6"),
        ("task.scales=1,x", "--set=task.scales=1,x: 'x' is no int"),
        ("task.name=squad", "--set=task.name=squad: config.task.name is 'squad'; allowed: "),
        ("task.questions=(3,2)", "questions"),
        ("model.width=8", "allowed is FIELD=VALUE, of a field of task, memory, rollout, eval"),
    ],
)
def test_what_cannot_be_set_is_named(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings.override(tiny.make_config(), [setting])


def test_names_of_files_tell_settings_apart():
    def spell(*texts: str) -> str:
        return settings.spell_name(texts)

    assert spell("eval.batch_size=4", "memory.slots=9") == "eval.batch_size=4_memory.slots=9"
    assert spell("task.test_documents=200,400") == "task.test_documents=200,400"
    ours, theirs = (spell(f"task.test_file=/{where}/dev 1.json") for where in "ab")
    assert re.fullmatch(r"task.test_file=dev-1.json-[0-9a-f]{8}", ours)
    assert ours != theirs
    many = [f"task.test_file=/data/{i}/{'x' * 60}.json" for i in range(5)]
    assert len(spell(*many)) < 140
    assert spell(*many) != spell(*many[:4], "task.seed=1")
    # Not read once for each "=": that would take hours.
    assert spell("task.test_file=/" + "=" * 2_000_000 + "/a/b=c").startswith("task.test_file=b=c-")
    assert spell("task.test_file=" + "=" * 2_000_000).startswith("task.test_file===")


def test_an_agent_of_one_task_is_tried_on_another_with_files_of_its_own(tmp_path):
    """From the command line, with flags that name the fields."""
    checkpoint = checkpoints.save_trained(tmp_path / "run")
    (tmp_path / "dev.json").write_text(json.dumps([make_record(i) for i in range(4)]))
    pool = {f"Pool {i}": ["It hums.", " It is old."] for i in range(8)}
    (tmp_path / "pool.json").write_text(json.dumps(pool))
    flags = [
        "--task.name=multihop_qa", f"--task.test_file={tmp_path / 'dev.json'}",
        f"--task.corpus_file={tmp_path / 'pool.json'}", "--task.test_documents=3,20",
        "--task.test_every", "1", "--eval.batch_size=4", "--rollout.answer_length=4",
    ]  # fmt: skip
    root = f"--data_root={tmp_path / 'data'}"
    printed = runs.run("evaluate.py", f"--checkpoint={checkpoint}", root, "--cpu_devices=1", *flags)
    for split in ("test_3", "test_20"):
        assert re.search(rf"^{split} .* 4 +4$", printed, re.MULTILINE), printed
        [path] = (tmp_path / "run" / "eval").glob(f"{split}_t0_step7_task.name=multihop_qa_*.json")
        summary = json.loads(path.read_text())
        assert "task.test_documents=3,20" in summary["settings"]
        assert summary["questions"] == 4
        records = path.with_suffix(".jsonl").read_text().splitlines()
        assert {json.loads(line)["aliases"][0] for line in records} == {
            f"Town {i}" for i in range(4)
        }


@pytest.mark.long
def test_a_model_that_no_device_holds_is_played_by_several(tmp_path):
    """As one device plays it; with the parameters shared out, and the products too."""
    checkpoint = checkpoints.save_trained(tmp_path / "run")
    words = ["evaluate.py", f"--checkpoint={checkpoint}", f"--data_root={tmp_path / 'data'}"]
    words += ["--episodes=4", "--eval.batch_size=4", "--cpu_devices=2"]
    found = {}
    for name, flags in (("whole", []), ("shared", ["--fsdp=2", "--rollout_tensor=2"])):
        runs.run(*words, *flags, f"--out={tmp_path / name}")
        [path] = (tmp_path / name).glob("*.jsonl")
        found[name] = [json.loads(line) for line in path.read_text().splitlines()]
    told = {name: [record.pop("log_prob") for record in found[name]] for name in found}
    assert found["whole"] == found["shared"]
    assert told["whole"] == pytest.approx(told["shared"], abs=1e-4)
    said = runs.run(*words, "--fsdp=2", "--eval.batch_size=3", status=2)
    assert "eval.batch_size=3 does not divide over 2 devices; pass --eval.batch_size" in said
    assert "--fsdp=3" in runs.run(*words, "--fsdp=3", status=2)
