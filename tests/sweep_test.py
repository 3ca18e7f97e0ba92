"""Sweeps: what a config may add, the commands of its runs, the table, and one sweep for real."""

import csv
import io
import json
import os
import pathlib
import sys

import jax
import pytest
from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from atommem_jax import workflows
from atommem_jax.config import ConfigError
from atommem_jax.tasks import episodes as episodes_lib
from experiments import flags, jobs, sweep, sweep_plan, sweep_table, validation, wiring
from tests import runs
from tests.conftest import ROOT

MAIN = "--config=experiments/configs/main_table.py"
COMMITTED = ("main_table", "ablations", "algorithms")


def load(path: pathlib.Path, **common) -> sweep_plan.Sweep:
    """A sweep as the command line would load it."""
    base = flags.load_config(str(path))
    base.update_from_flattened_dict(common)
    return sweep_plan.load(str(path), base.lock(), common)


def load_committed(name: str, **common) -> sweep_plan.Sweep:
    return load(ROOT / "experiments" / "configs" / f"{name}.py", **common)


@pytest.fixture
def make_sweep(tmp_path):
    """Writes and loads a config that adds these runs to the tiny config."""

    def make(added: list[tuple], evaluations: str = "[{}]", **common) -> sweep_plan.Sweep:
        path = write_config(tmp_path / "few.py", added, evaluations)
        return load(path, **common)

    return make


def write_config(path: pathlib.Path, added: list[tuple], evaluations: str) -> pathlib.Path:
    path.write_text(
        "from experiments.configs import synthetic\n\n"
        f"EVALUATIONS = {evaluations}\n\n"
        "def get_config():\n"
        "    config = synthetic.get_config()\n"
        f"    config.update_from_flattened_dict({runs.OVERRIDES!r})\n"
        "    return config\n\n"
        "def sweep(add):\n"
        f"    for name, overrides in {added!r}:\n"
        "        add(name, overrides)\n"
    )
    return path


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
def parse(monkeypatch):
    """The config that a train command's flags make."""

    def parse(command: list[str]) -> ConfigDict:
        monkeypatch.setattr(sys, "argv", command[1:])  # where ml_collections looks for overrides
        return parse_flags(command[1:])

    return parse


def parse_flags(argv: list[str]) -> ConfigDict:
    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    for name in ("workdir", "data_root"):
        absl_flags.DEFINE_string(name, None, "", flag_values=values)
    values(argv)
    return values["config"].value


@quiet
@pytest.mark.parametrize("name", COMMITTED)
def test_the_command_line_makes_the_config_that_was_checked(name, parse):
    plan = load_committed(name, **{"task.scales": (1, 2), "task.test_examples": 24})
    for run in plan.runs:
        commands = sweep_plan.make_commands(plan, run, ROOT / "w", ROOT / "d", cpu_devices=1)
        parsed = parse(commands["train"])
        assert parsed.mesh.cpu_devices == 1
        with parsed.unlocked():
            parsed.mesh.cpu_devices = run.config.mesh.cpu_devices
            if run.start is not None:
                folder, step = ROOT / "w" / run.start[0] / "checkpoints", run.start[1]
                assert parsed.init_from == str(folder / str(step))
                parsed.init_from = run.config.init_from
        assert validation.differences(parsed, run.config) == []


@quiet
def test_values_of_every_kind_survive_the_command_line(make_sweep, parse):
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
    parsed = parse(sweep_plan.make_commands(plan, run, ROOT, ROOT, cpu_devices=2)["train"])
    for path, value in overrides.items():
        found = parsed
        for part in path.split("."):
            found = found[part]
        assert found == (tuple(value) if isinstance(value, list) else value), path
    assert validation.differences(parsed, run.config) == []


def test_an_evaluation_names_its_checkpoint_and_cells(make_sweep):
    plan = make_sweep(
        [("a", {}), ("b", {"sft.steps": 4, "seed": 1})],
        "[{'splits': ['test_2x', 'test_1x'], 'temperatures': [0, 0.5], 'episodes': 9},"
        " {'runs': '^b', 'step': 'sft'}]",
    )
    first, second = (
        list(sweep_plan.make_commands(plan, run, ROOT, ROOT, cpu_devices=1).values())
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
        run.name: [sweep_plan.choose_devices(plan, run, cores) for cores in (1, 2, 4, 5, 7)]
        for run in plan.runs
    }
    assert found == {"free": [1, 2, 3, 3, 6], "fixed": [3] * 5, "asked": [5] * 5}


def test_jobs_share_the_cores_evenly(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 4, 6, 7}, raising=False)
    monkeypatch.setattr(sweep, "has_accelerator", lambda: False)
    assert sweep.plan_slots(1, runs=9) == [[]]
    assert sweep.plan_slots(0, runs=9) == sweep.plan_slots(2, runs=9) == [[0, 2], [4, 6, 7]]
    assert sweep.plan_slots(8, runs=3) == [[0], [2, 4], [6, 7]]
    assert sweep.plan_slots(7, runs=9) == [[0], [2], [4], [6], [7], [0], [2]]
    monkeypatch.setattr(sweep, "has_accelerator", lambda: True)
    assert sweep.plan_slots(0, runs=9) == [[]]
    assert sweep.plan_slots(2, runs=9) == [[], []]


def test_there_is_no_accelerator_here():
    assert not sweep.has_accelerator()


def test_scripts_share_a_cache_that_jax_locks(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    monkeypatch.setenv("ATOMMEM_CACHE", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        wiring.prepare_devices(1)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        assert jax.config.jax_compilation_cache_max_size > 0
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# ---------------------------------------------------------------------------------------------
# The committed sweeps


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("name", COMMITTED)
def test_every_run_fits_its_data(name, data_root):
    plan = load_committed(name, **{"task.train_examples": 512, "task.test_examples": 24})
    fitted: dict[str, list[episodes_lib.EpisodeShape]] = {}
    checked = set()
    for run in plan.runs:
        config = run.config
        for devices in (1, 2):
            validation.validate_devices(config, devices)
        sections = (config.task, config.tokenizer, config.memory, config.rollout, config.model)
        task, *others = (section.to_json() for section in sections)
        if (key := (config.workflow, task, *others)) in checked:
            continue
        checked.add(key)
        dataset = wiring.load_dataset(config, str(data_root))
        tokenizer = wiring.load_tokenizer(config, dataset)
        if task not in fitted:
            fitted[task] = [
                episodes_lib.fit_shape(dataset.split(split), tokenizer) for split in dataset.splits
            ]
        asked = {split for e in run.evaluations for split in e.splits}
        assert asked <= set(dataset.splits)
        parts = wiring.build(config, tokenizer)
        for shape in fitted[task]:
            validation.validate_shape(config, parts, shape, dataset.split("train"))
            assert shape.query_length <= config.memory.query_length
            parts.setting(shape)


@pytest.mark.parametrize("name", COMMITTED)
def test_no_run_is_another_under_a_second_name(name):
    configs = [run.config.to_json() for run in load_committed(name).runs]
    assert len(set(configs)) == len(configs)


def test_the_main_table_has_every_method_with_every_seed():
    plan = load_committed("main_table")
    ablations = {"no_update", "no_delete", "no_scratchpad", "no_store"}
    found = {(run.config.workflow, run.config.seed) for run in plan.runs}
    methods = set(workflows.WORKFLOWS) - ablations
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


# ---------------------------------------------------------------------------------------------
# The table


def leave_status(folder: pathlib.Path, state: str, **fields) -> None:
    jobs.Status(state=state, seconds=1800.0, cpu_seconds=3600.0, commit="abc", **fields).write(
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
        leave_status(tmp_path / name, jobs.DONE)
        for number, (split, temperature) in enumerate(
            [("test_4x", 0.0), ("test_1x", 0.0), ("test_4x", 1.0), ("test_1x", 1.0)]
        ):
            leave_cell(tmp_path / name, split, temperature, 12, 0.25 + shift + number / 16)
    leave_cell(tmp_path / "base/seed0", "test_1x", 0.0, 6, 0.125)
    leave_cell(tmp_path / "base/seed0", "test_1x", 0.0, 9, 0.9)  # nobody asked for step 9
    leave_cell(tmp_path / "base/seed0", "validation", 0.0, 12, 0.9)  # nor for this split
    (tmp_path / "base/seed0" / "eval" / "notes.json").write_text('{"other": 1}')
    leave_status(tmp_path / "small", jobs.STARTED)
    leave_cell(tmp_path / "small", "test_4x", 0.0, 12, 0.125)
    leave_status(tmp_path / "broken", jobs.FAILED, failed="train: ended with status 1")
    return sweep_table.collect(plan.runs, tmp_path)


def test_the_csv_has_a_line_a_measurement(results):
    lines = list(csv.DictReader(io.StringIO(sweep_table.render_csv(results))))
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
    lines = sweep_table.render_markdown(results, "few").splitlines()
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


def test_a_run_is_told_by_its_first_column(results):
    told = {result.run.name: sweep_table.headline(result) for result in results}
    assert told["base/seed1"] == "EM 0.500 (test_4x t0)"
    assert told["later"] == "not evaluated"


def test_a_sweep_without_any_measurement_has_a_table(make_sweep, tmp_path):
    plan = make_sweep([("a", {}), ("b", {"seed": 1})])
    text = sweep_table.render_markdown(sweep_table.collect(plan.runs, tmp_path), "few")
    assert "0 of 2 runs done" in text
    assert text.endswith("Not started: a, b.\n")


# ---------------------------------------------------------------------------------------------
# Runs that are there already


def make_job(plan: sweep_plan.Sweep, folder: pathlib.Path, slots=([],)) -> jobs.Job:
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS([sys.argv[0]])
    return sweep.make_job(plan, plan.runs[0], folder, slots)


def test_a_run_that_was_started_with_another_config_is_refused(make_sweep, tmp_path):
    job = make_job(make_sweep([("a", {"memory.slots": 6})]), tmp_path)
    jobs.Status(state=jobs.DONE, about=dict(job.about)).write(job.folder)
    make_job(make_sweep([("a", {"memory.slots": 6})]), tmp_path)
    with pytest.raises(ConfigError) as caught:
        make_job(make_sweep([("a", {"memory.slots": 7})]), tmp_path)
    message = str(caught.value)
    assert "run 'a' was started with another config: memory.slots=7 (was 6)." in message
    assert "another --workdir" in message
    assert f"delete {tmp_path / 'a'}" in message


def test_a_run_goes_on_with_the_devices_that_it_began_with(make_sweep, tmp_path):
    plan = make_sweep([("a", {"mesh.data": 0})])
    job = make_job(plan, tmp_path, slots=([0], [1]))
    assert "--config.mesh.cpu_devices=1" in job.commands["train"]
    jobs.Status(about=dict(job.about)).write(job.folder)
    again = make_job(plan, tmp_path)
    assert again.commands == job.commands
    assert "--config.mesh.cpu_devices=2" in make_job(plan, tmp_path / "other").commands["train"]


def test_further_evaluations_of_a_finished_run_are_made(make_sweep, tmp_path):
    job = make_job(make_sweep([("a", {})], "[{'episodes': 8}]"), tmp_path)
    status = jobs.Status(state=jobs.DONE, finished=list(job.commands), about=dict(job.about))
    more = make_job(make_sweep([("a", {})], "[{'episodes': 8}, {'step': 'sft'}]"), tmp_path)
    assert not jobs.is_due(job, status, retry_failed=False)
    assert jobs.is_due(more, status, retry_failed=False)
    assert [key for key in more.commands if key not in status.finished] == [
        key for key in more.commands if '"sft"' in key
    ]


# ---------------------------------------------------------------------------------------------
# For real


def test_a_sweep_of_a_good_and_a_bad_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    config = write_config(
        folder / "pair.py",
        [("good/seed1", {"seed": 1}), ("bad", {"rollout.response_length": 14})],
        "[{'splits': ['test_1x'], 'episodes': 8}]",
    )
    workdir = folder / "runs"
    arguments = [f"--config={config}", f"--workdir={workdir}", f"--data_root={folder / 'data'}"]

    printed = runs.run("sweep.py", *arguments, "--jobs=2", "--dry_run")
    assert "good/seed1: pending" in printed
    assert "train.py" in printed
    assert not workdir.exists()

    printed = runs.run("sweep.py", *arguments, "--jobs=2", status=1)
    assert "FAILED  bad  train: ended with status 2" in printed
    assert "rollout.response_length=14: the teacher sets" in printed  # the end of its log
    assert "sweep.py: failed: bad; look at" in printed
    summary = json.loads((workdir / "good/seed1/eval/test_1x_t1_step12.json").read_text())
    lines = list(csv.DictReader((workdir / "table.csv").open()))
    assert [(line["run"], line["state"], line["temperature"]) for line in lines] == [
        ("good/seed1", "done", "0"),
        ("good/seed1", "done", "1"),
        ("bad", "failed", ""),
    ]
    assert float(lines[1]["f1"]) == summary["f1"]
    assert lines[1]["episodes"] == "8"
    assert float(lines[1]["cpu_seconds"]) > 1
    assert "1 of 2 runs done" in (workdir / "table.md").read_text()

    # Nothing is left to do, and what there is stays.
    before = (workdir / "good/seed1/status.json").read_bytes()
    printed = runs.run("sweep.py", *arguments, "--jobs=1", status=1)
    assert "0 of 2 runs to do" in printed
    assert (workdir / "good/seed1/status.json").read_bytes() == before
    assert jobs.read_status(workdir / "bad").attempts == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=w"], "synthetic.py does not define sweep(add); pass a config that does"),
        ([MAIN, "--workdir=w", "--only=none"], "--only=none fits no run; there are: learned/seed0"),
        ([MAIN, "--workdir=w", "--only=("], "--only=(: missing )"),
        ([MAIN, "--workdir=w/none", "--table_only"], "does not exist: nothing was run there"),
        (
            [MAIN, "--workdir=w", "--config.memory.shown=6"],
            "run 'learned/seed0': memory.shown=6 is more",
        ),
        ([MAIN, "--workdir=w", "--config.memory.show=6"], "did you mean 'memory.shown'"),
    ],
)
def test_a_mistake_ends_with_status_2(arguments, message):
    printed = runs.run("sweep.py", *arguments, status=2)
    assert message in printed
    assert "Traceback" not in printed
