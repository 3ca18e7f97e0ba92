"""What the config of a sweep may add, the commands of its runs, and the committed sweeps."""

import sys

import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from atommem_jax.agent import build, validate
from atommem_jax.config import ConfigError, Experiment, differences, flatten, parse
from atommem_jax.sweeps import plan as plan_lib
from atommem_jax.tasks import encoding, workflows
from tests.conftest import ROOT
from tests.helpers import runs, sweeps
from tests.helpers.sweeps import COMMITTED, load_committed


@pytest.fixture
def make_sweep(tmp_path):
    """Writes and loads a config that adds these runs to the tiny config."""
    return sweeps.make_maker(tmp_path)


# ---------------------------------------------------------------------------------------------
# What a config may add


def test_a_run_has_its_overrides_after_those_of_the_command_line(make_sweep):
    plan = make_sweep(
        [("a/seed0", {}), ("a/seed2", {"seed": 2}), ("b", {"memory.slots": 7, "seed": 3})],
        **{"memory.slots": 6},
    )
    found = [(run.name, run.config.seed, run.config.memory.slots, run.group) for run in plan.runs]
    assert found == [("a/seed0", 0, 6, "a"), ("a/seed2", 2, 6, "a"), ("b", 3, 7, "b")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"memory.slot": 3}, "unknown config field 'memory.slot'; did you mean 'memory.slots'"),
        ({"sed": 3}, "did you mean 'seed'"),
        ({"memory": {"slots": 3}}, "memory is a section; override its fields one by one"),
        ({"memory.slots": "three"}, "memory.slots='three': a str, where a int such as 5"),
        ({"memory.eviction": 3}, "memory.eviction=3: a int, where a str such as 'lru'"),
        ({"memory.slots": 3}, "memory.shown=4 is more than memory.slots=3"),
        ({"rl.ppo.minibatches": 3}, "rl.ppo.minibatches=3"),
        ({"rl.ppo.estimator": "grpo"}, "rl.ppo.estimator='grpo'"),
    ],
)
def test_bad_overrides_are_refused_by_run_and_field(make_sweep, overrides, message):
    with pytest.raises(ConfigError) as caught:
        make_sweep([("fine", {}), ("odd", overrides)])
    assert str(caught.value).startswith("sweep: run 'odd': ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "added no run"),
        (["a", "a"], "'a' is added twice"),
        (["../a"], "'../a' cannot be a folder"),
        (["a b"], "'a b' cannot be a folder"),
        (["a/"], "'a/' cannot be a folder"),
        (["/a"], "'/a' cannot be a folder"),
        ([""], "'' cannot be a folder"),
        (["a/b", "a"], "'a/b' would lie inside the folder of run 'a'"),
        (["a", "a/b"], "'a/b' would lie inside the folder of run 'a'"),
    ],
)
def test_names_that_are_no_folders_are_refused(make_sweep, names, message):
    with pytest.raises(ConfigError, match=message):
        make_sweep([(name, {}) for name in names])


def test_names_that_begin_alike_are_no_clash(make_sweep):
    assert len(make_sweep([("a", {}), ("ab", {"seed": 1}), ("a.b/c", {"seed": 2})]).runs) == 3


def test_seeds_of_one_name_differ_in_the_seed_only(make_sweep):
    with pytest.raises(ConfigError, match=r"'a/seed0' and 'a/seed1' differ in more than the seed"):
        make_sweep([("a/seed0", {"seed": 0}), ("a/seed1", {"seed": 1, "memory.slots": 6})])


def test_a_config_without_a_sweep_is_told_apart():
    with pytest.raises(ConfigError, match=r"does not define sweep\(add\).*train.py"):
        load_committed("synthetic")


@pytest.mark.parametrize(
    ("evaluations", "message"),
    [
        ("[{'split': ['test_1x']}]", r"EVALUATIONS\[0\] has the field 'split'; allowed: .*splits"),
        ("[{}, {'step': 'first'}]", r"EVALUATIONS\[1\] has step 'first'; allowed: 'last', 'sft'"),
        (
            "[{'runs': '^c'}]",
            r"EVALUATIONS\[0\] has runs '\^c', which fits no run; there are: a, b",
        ),
        ("[{'step': 13}]", r"run 'a': EVALUATIONS asks for step 13, .* the run has 1 to 12"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(make_sweep, evaluations, message):
    with pytest.raises(ConfigError, match=message):
        make_sweep([("a", {}), ("b", {"seed": 1})], evaluations)


def test_the_end_of_sft_must_exist(make_sweep):
    with pytest.raises(ConfigError, match=r"run 'b': EVALUATIONS asks for step 'sft', .* step 0"):
        make_sweep([("a", {}), ("b", {"sft.steps": 0})], "[{'step': 'sft'}]")


def test_a_run_may_start_from_one_before_it(make_sweep):
    reader = {"sft.steps": 0, "init_from": "@a/seed{seed}:sft"}
    plan = make_sweep(
        [
            ("a/seed1", {"seed": 1}),
            ("b/seed1", {"seed": 1, **reader}),
            ("a/seed2", {"seed": 2}),
            ("b/seed2", {"seed": 2, **reader}),
            ("c", {"sft.steps": 0, "init_from": "@b/seed2:last"}),
            ("d", {"sft.steps": 0, "init_from": "@a/seed1:3"}),
            ("e", {"sft.steps": 0, "init_from": "elsewhere/checkpoints/7"}),
        ]
    )
    sft, rl = runs.SFT_STEPS, runs.RL_STEPS
    assert {run.name: run.start for run in plan.runs} == {
        "a/seed1": None,
        "b/seed1": ("a/seed1", sft),
        "a/seed2": None,
        "b/seed2": ("a/seed2", sft),
        "c": ("b/seed2", rl),
        "d": ("a/seed1", 3),
        "e": None,
    }
    assert [run.group for run in plan.runs] == ["a", "b", "a", "b", "c", "d", "e"]


@pytest.mark.parametrize("where", ["@b:sft", "@later:sft", "@a", "@a:best"])
def test_a_run_cannot_start_from_what_is_not_there_yet(make_sweep, where):
    added = [("a", {}), ("b", {"sft.steps": 0, "init_from": where}), ("later", {"seed": 1})]
    with pytest.raises(ConfigError, match=rf"run 'b': init_from='{where}': allowed is @RUN:STEP"):
        make_sweep(added)


# ---------------------------------------------------------------------------------------------
# Commands


quiet = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections


@pytest.fixture
def parse_command(monkeypatch):
    """The config that a train command's flags make."""

    def parse_command(command: list[str]) -> Experiment:
        monkeypatch.setattr(sys, "argv", command[1:])  # where ml_collections looks for overrides
        return parse_flags(command[1:])

    return parse_command


def parse_flags(argv: list[str]) -> Experiment:
    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    for name in ("workdir", "data_root"):
        absl_flags.DEFINE_string(name, None, "", flag_values=values)
    values(argv)
    return parse(values["config"].value)


@quiet
@pytest.mark.parametrize("name", COMMITTED)
def test_the_command_line_makes_the_config_that_was_checked(name, parse_command):
    plan = load_committed(name, **{"task.scales": (1, 2), "task.test_examples": 24})
    for run in plan.runs:
        commands = plan_lib.make_commands(plan, run, ROOT / "w", ROOT / "d", cpu_devices=1)
        parsed = parse_command(commands["train"])
        assert parsed.mesh.cpu_devices == 1
        changes = {"mesh.cpu_devices": run.config.mesh.cpu_devices}
        if run.start is not None:
            folder, step = ROOT / "w" / run.start[0] / "checkpoints", run.start[1]
            assert parsed.init_from == str(folder / str(step))
            changes["init_from"] = run.config.init_from
        parsed = parsed.replace(changes)
        assert differences(parsed, run.config) == []


@quiet
def test_values_of_every_kind_survive_the_command_line(make_sweep, parse_command):
    overrides = {
        "task.scales": [3],
        "task.questions": (1, 2),
        "init_from": "",
        "eval.split": "two words=1",
        "rl.ppo.divide_by_std": False,
        "rl.optimizer.learning_rate": 1e-7,
        "rl.temperature": 2,
    }
    plan = make_sweep([("a", overrides)])
    (run,) = plan.runs
    assert run.overrides["task.scales"] == (3,)
    parsed = parse_command(plan_lib.make_commands(plan, run, ROOT, ROOT, cpu_devices=2)["train"])
    for path, value in overrides.items():
        assert flatten(parsed)[path] == (tuple(value) if isinstance(value, list) else value), path
    assert differences(parsed, run.config) == []


def test_an_evaluation_names_its_checkpoint_and_cells(make_sweep):
    plan = make_sweep(
        [("a", {}), ("b", {"sft.steps": 4, "seed": 1})],
        "[{'splits': ['test_2x', 'test_1x'], 'temperatures': [0, 0.5], 'episodes': 9},"
        " {'runs': '^b', 'step': 'sft'}]",
    )
    first, second = (
        list(plan_lib.make_commands(plan, run, ROOT, ROOT, cpu_devices=1).values())
        for run in plan.runs
    )
    assert (len(first), len(second)) == (2, 3)
    wanted = {"--step=12", "--split=test_2x", "--split=test_1x", "--temperature=0"}
    assert wanted | {"--temperature=0.5", "--episodes=9", "--skip_existing"} <= set(first[1])
    assert {"--step=10"} <= set(second[1])
    assert {"--step=4", "--temperature=1", "--episodes=0"} <= set(second[2])
    assert not any(word.startswith("--split") for word in second[2])


def test_devices_are_the_cores_of_a_share_that_divide_the_batches(make_sweep):
    free = {"mesh.data": 0, "sft.episodes": 12, "rl.episodes": 24, "eval.batch_size": 6}
    plan = make_sweep(
        [
            ("free", free),
            ("fixed", {**free, "mesh.data": 3, "mesh.cpu_devices": 3}),
            ("asked", {**free, "mesh.cpu_devices": 5}),
        ]
    )
    found = {
        run.name: [plan_lib.choose_devices(plan, run, cores) for cores in (1, 2, 4, 5, 7)]
        for run in plan.runs
    }
    assert found == {"free": [1, 2, 3, 3, 6], "fixed": [3] * 5, "asked": [5] * 5}


# ---------------------------------------------------------------------------------------------
# The committed sweeps


@pytest.mark.parametrize("name", COMMITTED)
def test_every_run_fits_its_data(name, data_root):
    plan = load_committed(name, **{"task.train_examples": 512, "task.test_examples": 24})
    fitted: dict[str, list[encoding.EpisodeShape]] = {}
    checked = set()
    for run in plan.runs:
        config = run.config
        for devices in (1, 2):
            validate.validate_devices(config, devices)
        sections = (config.task, config.tokenizer, config.memory, config.rollout, config.model)
        task, *others = map(repr, sections)
        if (key := (config.workflow, task, *others)) in checked:
            continue
        checked.add(key)
        dataset = build.load_dataset(config, str(data_root))
        tokenizer = build.fit_tokenizer(config, dataset)
        if task not in fitted:
            fitted[task] = [
                encoding.fit_shape(dataset.split(split), tokenizer) for split in dataset.splits
            ]
        asked = {split for e in run.evaluations for split in e.splits}
        assert asked <= set(dataset.splits)
        parts = build.build(config, tokenizer)
        for shape in fitted[task]:
            validate.validate_shape(config, parts, shape, dataset.split("train"))
            assert shape.query_length <= config.memory.query_length
            parts.setting(shape)


@pytest.mark.parametrize("name", COMMITTED)
def test_no_run_is_another_under_a_second_name(name):
    configs = [repr(run.config) for run in load_committed(name).runs]
    assert len(set(configs)) == len(configs)


ABLATIONS = {"no_update", "no_delete", "no_scratchpad", "no_read", "no_store"}


@pytest.mark.parametrize(
    ("table", "missing"), [("main_table", ABLATIONS), ("village_table", set())]
)
def test_a_table_has_every_method_with_every_seed(table, missing):
    plan = load_committed(table)
    found = {(run.config.workflow, run.config.seed) for run in plan.runs}
    trained = {name for name, found in workflows.WORKFLOWS.items() if not found.is_untrained}
    methods = trained - missing
    assert found == {(method, seed) for method in methods for seed in (0, 1, 2)}
    for run in plan.runs:
        learned = f"learned/seed{run.config.seed}"
        is_program = workflows.find(run.config.workflow).program is not None
        assert run.start == ((learned, 900) if is_program else None)
        steps = [evaluation.step for evaluation in run.evaluations]
        assert steps == (["last", "sft"] if run.config.workflow == "learned" else ["last"])


def test_all_choices_of_algorithm_play_as_many_trajectories():
    for run in load_committed("algorithms").runs:
        assert run.config.rl.episodes * run.config.rl.ppo.group_size == 256
