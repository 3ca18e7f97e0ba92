"""The door: what an experiment is parsed from, what is refused, and what older configs become."""

import dataclasses
import math
import re

import pytest
from ml_collections import ConfigDict

from atommem_jax.config import (
    ConfigError,
    Experiment,
    check_path,
    differences,
    flatten,
    load_config,
    parse,
    to_config_dict,
    upgrade,
)
from atommem_jax.tasks import datasets
from experiments.configs import babi, published, synthetic

CONFIGS = (
    "synthetic.py",
    "village.py",
    "village.py:1",
    "babi.py:1",
    "babi.py:3",
    "hotpotqa.py",
    "hotpotqa_smollm2.py",
    "ablations.py",
    "algorithms.py",
    "main_table.py",
    "scratchpads.py",
    *(f"published.py:{name}" for name in published.PRESETS),
)


def make_config(**changes) -> dict:
    return parse(synthetic.get_config()).replace(changes).to_dict()


@pytest.mark.parametrize("spec", CONFIGS)
def test_every_config_of_ours_passes_and_comes_back(spec):
    config = load_config(f"experiments/configs/{spec}")
    experiment = parse(config)
    assert parse(experiment.to_dict()) == experiment
    assert parse(to_config_dict(experiment)) == experiment
    assert flatten(config.to_dict()).items() <= flatten(experiment).items()


@pytest.mark.parametrize("spec", CONFIGS)
def test_every_field_can_be_a_flag(spec):
    """A flag finds a field by attribute, and a ConfigDict has attributes of its own."""
    paths = flatten(parse(load_config(f"experiments/configs/{spec}")))
    names = {name for path in paths for name in path.split(".")}
    assert "slots" in names
    assert not [name for name in names if hasattr(ConfigDict, name)]


def test_sections_are_frozen():
    experiment = parse(synthetic.get_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.rl.ppo.group_size = 3
    with pytest.raises(TypeError):
        experiment.task.fields["scales"] = (1,)


def test_replace_changes_by_path_and_leaves_the_other_as_it_was():
    experiment = parse(synthetic.get_config())
    changed = experiment.replace({"rl.ppo.group_size": 4, "task.scales": (1,), "seed": 3})
    assert (changed.rl.ppo.group_size, changed.task.get("scales"), changed.seed) == (4, (1,), 3)
    assert experiment.rl.ppo.group_size == 8
    assert differences(changed, experiment) == [
        "rl.ppo.group_size=4 (checkpoint: 8)",
        "seed=3 (checkpoint: 0)",
        "task.scales=(1,) (checkpoint: (1, 2, 4, 8))",
    ]
    with pytest.raises(ConfigError, match=r"'rl\.ppo\.groupsize'; did you mean 'rl\.ppo\.group_s"):
        experiment.replace({"rl.ppo.groupsize": 4})


def test_whole_numbers_are_numbers_and_lists_are_tuples():
    config = make_config()
    config["rl"]["temperature"], config["sft"]["length_buckets"] = 1, [4, 8]
    experiment = parse(config)
    assert isinstance(experiment.rl.temperature, float)
    assert experiment.sft.length_buckets == (4, 8)


def test_a_missing_field_and_an_unknown_one_are_named():
    config = make_config()
    del config["rl"]["episodes"]
    with pytest.raises(ConfigError, match=r"the config has no rl\.episodes; start from get_config"):
        parse(config)
    config = make_config()
    config["rl"]["epsiodes"] = 3
    with pytest.raises(ConfigError, match=r"'epsiodes'; did you mean 'episodes'\?"):
        parse(config)


# ---------------------------------------------------------------------------------------------
# Every field, with what it cannot hold


WRONG = (None, "x", "", -1, 0, math.nan, math.inf, -math.inf, 10**30, (), (1, "x"), {}, True, b"")


def parse_field(config: dict, path: str) -> tuple[object, str]:
    """(what a field holds after the door, '') or (None, why the config is refused)."""
    try:
        return flatten(parse(config))[path], ""
    except ConfigError as error:
        return None, str(error)


@pytest.mark.parametrize("spec", ["synthetic.py", "hotpotqa_smollm2.py"])
def test_whatever_a_field_holds_is_taken_or_refused_in_a_sentence(spec):
    """No value of any field ends in another exception, and what is refused names the field."""
    config = parse(load_config(f"experiments/configs/{spec}")).to_dict()
    tried = refused = 0
    for path in [path for path in flatten(config) if not path.startswith("task.")]:
        *parents, name = path.split(".")
        section = config
        for part in parents:
            section = section[part]
        kept = section[name]
        for value in WRONG:
            section[name] = value
            tried += 1
            found, message = parse_field(config, path)
            if message:
                refused += 1
                assert path.rpartition(".")[2] in message, (path, value, message)
            else:
                assert type(found) in (bool, int, float, str, tuple), (path, value)
                assert not isinstance(found, float) or math.isfinite(found), (path, value)
        section[name] = kept
    assert tried > 1000
    assert refused > 0.7 * tried


@pytest.mark.parametrize("name", [*WRONG, [1]])
def test_whatever_a_task_is_called_is_refused_in_a_sentence(name):
    config = make_config()
    config["task"] = {**config["task"], "name": name}
    try:
        message = explain_task(parse(config).task.to_dict())
    except ConfigError as error:
        message = str(error)
    assert re.match(r"(config\.)?task(\.name is .*; allowed: '|: allowed is a section)", message)


@pytest.mark.parametrize("spec", ["synthetic.py", "babi.py:2", "hotpotqa.py"])
def test_whatever_a_field_of_a_task_holds_is_taken_or_refused_in_a_sentence(spec):
    task = parse(load_config(f"experiments/configs/{spec}")).task.to_dict()
    whole, _ = datasets.parse_task(task)
    names = [field.name for field in dataclasses.fields(whole)]
    refused = 0
    for name in names:
        for value in (*WRONG, "nope:x", (1, math.nan), 0.5, (2, 1), ((1,),), [1], 2**31):
            message = explain_task(task | {name: value})
            refused += bool(message)
            assert not message or name in message, (name, value, message)
    assert refused > 8 * len(names)
    for value in WRONG:
        explain_task(task | {"reward": value})


def explain_task(task: dict) -> str:
    """Why a task is refused; '' where it is not."""
    try:
        datasets.parse_task(task)
    except ValueError as error:  # what `build.load_dataset` expects
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("rl.optimizer.learning_rate", math.nan, "rl.optimizer.learning_rate=nan: allowed are fin"),
        ("sft.log_every", 0, "sft.log_every=0: allowed is at least 1; set --config.sft.log_every"),
        ("checkpoint.keep_last", 0, "checkpoint.keep_last=0: allowed is at least 1"),
        ("tokenizer.vocab_size", 5, "tokenizer.vocab_size=5: allowed is at least 8"),
        ("seed", -1, "seed=-1: allowed is 0 or more"),
        ("seed", 10**30, "up to 2147483647"),
        ("mesh.cpu_devices", 100_000, "mesh.cpu_devices=100000: allowed is 1 to 1024"),
        ("rl.ppo.kl_kind", "k4", "rl.ppo.kl_kind='k4': allowed are 'k1', 'k2', 'k3'"),
        ("model.remat", 1, "model.remat=1 is a int: allowed is True or False"),
        ("lora.targets", (1,), "lora.targets[0]=1 is a int: allowed is a text"),
    ],
)
def test_a_mistake_reads_like_a_sentence(path, value, words):
    with pytest.raises(ConfigError) as caught:
        parse(synthetic.get_config()).replace({path: value})
    assert words in str(caught.value)


def test_a_mistake_in_a_task_reads_like_a_sentence():
    for task, words in [
        (
            {"name": "synthetic", "questions": (1, "x")},
            "task.questions[1]='x' is a str: allowed is a whole number; set --config.task.quest",
        ),
        (
            {"name": "synthetic", "two_hop": math.nan},
            "task.two_hop=nan: allowed are finite numbers",
        ),
        ({"name": "synthetic", "seed": 10**30}, "task.seed=10"),
        ({"name": "babi", "data_dir": 3}, "task.data_dir=3 is a int: allowed is a text"),
        (
            {"name": "multihop_qa", "documents": "ten"},
            "task.documents='ten' is a str: allowed is a",
        ),
        ({"name": "synthetic", "reward": 3}, "task.reward=3 is a int: allowed is a text"),
    ]:
        with pytest.raises(ConfigError) as caught:
            datasets.parse_task(task)
        assert words in str(caught.value)
        assert not str(caught.value).endswith("]")  # there is no flag for an item


@pytest.mark.parametrize("argument", ["4", "x", "", "1 "])
def test_a_task_of_babi_that_there_is_not_is_refused(argument):
    with pytest.raises(ConfigError, match=r"--config=babi\.py:.*: allowed is babi\.py:1, :2 or :3"):
        load_config(f"experiments/configs/babi.py:{argument}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(:\n", "line 1: SyntaxError: "),
        ("import nowhere_to_be_found\n", "line 1: ModuleNotFoundError: No module named"),
        ("def get_config():\n    return {}['a']\n", "line 2: KeyError: 'a'"),
    ],
)
def test_an_error_in_a_config_file_is_named_by_its_line(tmp_path, source, message):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        load_config(f"{tmp_path}/mine.py")
    assert str(caught.value).startswith(
        f"--config={tmp_path}/mine.py: {tmp_path}/mine.py, {message}"
    )


# ---------------------------------------------------------------------------------------------
# Older configs


def make_old() -> dict:
    """A config of the first release: older names, and fewer fields."""
    config = make_config()
    config["rollout"]["group"] = config["rollout"].pop("microbatch")
    config["rollout"]["unstack"] = config["rollout"].pop("cpu_decode")
    config["sft"]["eighths"] = config["sft"].pop("length_buckets")
    config["rl"]["ppo"]["eighths"] = config["rl"]["ppo"].pop("length_buckets")
    config["teacher"]["update"] = config["teacher"].pop("update_shown")
    config["task"]["name"] = "synthetic"
    return config


def test_older_names_and_absent_fields_come_to_the_same_experiment():
    old = make_old()
    assert parse(old) == parse(synthetic.get_config())
    for path in ("workflow", "profile", "init_from", "prompt", "protocol", "lora"):
        del old[path]
    for section, name in (("mesh", "fsdp"), ("rollout", "score_chunk"), ("sft", "data")):
        del old[section][name]
    del old["rollout"]["unstack"], old["model"]["attention"]
    del old["teacher"]["forget"], old["teacher"]["count"]
    assert parse(old) == parse(synthetic.get_config())


def test_an_older_name_in_a_file_of_a_user_counts():
    """Written on top of a config of ours, which has the newer name too."""
    config = babi.get_config()
    before = config.rollout.microbatch
    config.rollout.group = 7
    assert parse(config).rollout.microbatch == 7
    assert "group" not in upgrade(config)["rollout"]
    assert config.rollout.microbatch == before != 7, "the given config is as it was"


def test_an_older_name_on_the_command_line_is_told_its_newer_one():
    with pytest.raises(ConfigError, match=r"'rollout\.group' is now called 'rollout\.microbatch'"):
        check_path(synthetic.get_config(), "rollout.group")


def test_upgrade_changes_nothing_of_today():
    config = make_config()
    assert upgrade(config) == config
    assert isinstance(parse(config), Experiment)
