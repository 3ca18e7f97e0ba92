"""A training run from the outside: refused, logged, kept; and odd settings of RL."""

import contextlib
import os
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax import folder_lock
from atommem_jax.agent import build, validate
from atommem_jax.config import ConfigError, load_config, parse
from atommem_jax.metrics import read_metrics
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.runs import recorder, stages
from atommem_jax.tasks.encoding import EpisodeShape
from experiments import train
from tests.conftest import COMPILATION_CACHE
from tests.helpers import forks, processes, runs, tiny

SFT_END = runs.SFT_STEPS
END = runs.SFT_STEPS + runs.RL_STEPS


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Workdir of a run that nothing disturbed."""
    return processes.share_run(tmp_path_factory, "one").workdir


@pytest.fixture
def run_here(data_root, monkeypatch):
    """Trains in this process, which keeps its own compilation cache."""
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))
    return lambda config, workdir: train.train(config, str(workdir), str(data_root))


def differ(a, b) -> bool:
    return any((x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# ---------------------------------------------------------------------------------------------
# The run itself; killed and resumed it is in tests/runs/resume_test.py


@pytest.mark.long
def test_a_run_that_is_compiled_as_users_do_comes_to_the_same(tmp_path, data_root, reference):
    last = SFT_END - 1
    arguments = [
        f"--workdir={tmp_path}",
        f"--data_root={data_root}",
        *runs.make_flags(
            mesh__data=processes.DEVICES,
            mesh__cpu_devices=processes.DEVICES,
            sft__eval_every=SFT_END,  # before it SFT is the only program
        ),
    ]
    reached = runs.has_logged(tmp_path, last, "sft")
    process = runs.start("train.py", *arguments, as_users=True)
    while process.poll() is None and not reached():
        time.sleep(0.002)
    process.kill()
    output = b"".join(process.communicate()).decode()
    assert process.returncode == -signal.SIGKILL, f"ended by itself:\n{output[-3000:]}"
    ours, theirs = (
        [r for r in runs.read_repeatable(folder) if r["stage"] == "sft" and r["step"] <= last]
        for folder in (tmp_path, reference)
    )
    gap, place = runs.find_largest_difference(ours, theirs)
    print(f"largest difference {gap:.1e}: {place}")
    assert gap < 1e-5, place
    assert len(ours) == last


def test_the_steps_that_were_compared_learned_something(reference):
    before, after = (runs.read_state(reference, step)["train"] for step in (SFT_END, END))
    assert differ(before["params"], after["params"])
    for record in read_metrics(reference):
        if record["stage"] != "eval":
            assert record["gradient_norm"] > 0
            assert record["skipped"] == 0


# ---------------------------------------------------------------------------------------------
# What is logged and kept


def test_every_promised_metric_is_logged(reference):
    kinds = ("create", "read", "update", "delete", "scratchpad", "answer")
    expected = {
        *("reward", "em", "entropy", "clip_fraction", "approx_kl", "log_prob_gap"),
        *("gradient_norm", "explained_variance", "response_tokens", "prompt_tokens", "turns"),
        *("occupancy", "tokens_per_second", "trajectories_per_second", "reference_kl"),
        *(f"{fate}/{kind}" for fate in ("attempted", "applied", "invalid") for kind in kinds),
    }
    records = [r for r in read_metrics(reference) if r["stage"] == "rl"]
    assert [record["step"] for record in records] == list(range(SFT_END + 1, END + 1))
    for record in records:
        assert expected <= record.keys()
        assert all(np.isfinite(value) for name, value in record.items() if name != "stage")
        assert record["log_prob_gap"] < record["log_prob_bound"] < 1e-3
        assert record["entropy"] > 0
        for kind in kinds:
            assert 0 <= record[f"applied/{kind}"] <= record[f"attempted/{kind}"]
    assert list((reference / "tensorboard").glob("events*"))


def test_the_kl_is_to_the_policy_that_rl_started_from(reference):
    sft, rl = (runs.read_state(reference, step) for step in (SFT_END, END))
    assert "reference" not in sft
    runs.assert_same(rl["reference"], sft["train"]["params"])
    kl = [r["reference_kl"] for r in read_metrics(reference) if r["stage"] == "rl"]
    # k3 is never negative, and grows as the policy moves away.
    assert all(value > 0 for value in kl)
    assert kl[-1] > kl[0]


@pytest.mark.relaxed_promotion  # Optax raises a float to a counter
def test_gae_trains_the_value_head(tmp_path, run_here):
    config = make_rl_only_config()
    run_here(config, tmp_path)
    records = [r for r in read_metrics(tmp_path) if r["stage"] == "rl"]
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert np.isfinite(record["value_loss"])
        assert np.isfinite(record["explained_variance"])
        assert record["gradient_norm"] > 0
    assert "reference" not in runs.read_state(tmp_path, 2)


@pytest.mark.long
@pytest.mark.relaxed_promotion
def test_both_stages_learn_a_few_samples_by_heart(tmp_path, run_here):
    """With `debug.overfit` what does not reach 1 is a fault of the loop, and not of the data."""
    config = runs.make_config(
        **{"debug__overfit": 2, "model__width": 32, "model__num_layers": 2},
        **{
            "teacher__store_support": 1.0,
            "teacher__update_shown": 1.0,
            "teacher__answer_known": 1.0,
        },
        **{"sft__steps": 150, "sft__eval_every": 150, "sft__save_every": 150},
        **{"rl__steps": 100, "rl__eval_every": 100, "rl__save_every": 100, "rl__ppo__kl_coef": 0.0},
        **{"rl__ppo__entropy_coef": 0.0, "rl__ppo__group_size": 8},
        **{"rl__optimizer__learning_rate": 5e-4},
    )
    run_here(config, tmp_path)
    before, after = (r for r in read_metrics(tmp_path) if r["stage"] == "eval")
    assert (before["episodes"], after["episodes"]) == (2, 2)
    assert 0.5 <= before["em"] < after["em"] == 1.0
    rewards = [r["reward"] for r in read_metrics(tmp_path) if r["stage"] == "rl"]
    print(rewards)
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1


@pytest.mark.relaxed_promotion
def test_gradients_that_are_not_finite_end_the_run(tmp_path, run_here, monkeypatch):
    def score(self, trajectories, aliases):
        return np.full((len(aliases), 2), np.nan, np.float32)

    monkeypatch.setattr(stages.Rl, "score", score)
    with pytest.raises(
        recorder.TrainingError,
        match=r"rl step 2: the gradient was not finite 4 times.*learning_rate",
    ):
        run_here(make_rl_only_config(), tmp_path)
    (record,) = read_metrics(tmp_path)
    assert record["skipped"] == 2  # mini-batches
    # What is saved are the parameters from before.
    saved = runs.read_state(tmp_path, 1)["train"]
    assert saved["skipped_in_a_row"] == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved["params"]))


@pytest.mark.relaxed_promotion
def test_a_policy_that_cannot_be_sampled_ends_the_run(tmp_path, run_here, monkeypatch):
    def init_broken(model, key):
        return jax.tree.map(lambda x: x * jnp.nan, init_params(model, key))

    init_params = stages.init_params
    monkeypatch.setattr(stages, "init_params", init_broken)
    with pytest.raises(recorder.TrainingError, match=r"rl step 1: .*log-probs that are not finite"):
        run_here(make_rl_only_config(), tmp_path)
    assert not any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


def make_rl_only_config():
    return runs.make_config(
        mesh__data=1,
        sft__steps=0,
        rl__steps=2,
        rl__ppo__estimator="gae",
        rl__ppo__kl_coef=0.0,
        rl__max_skipped_in_a_row=3,
    )


# ---------------------------------------------------------------------------------------------
# What is refused


def test_another_config_is_refused_by_the_name_of_the_field(reference, run_here):
    before = snapshot(reference)
    config = runs.make_config(rl__temperature=0.5, memory__slots=6)
    with pytest.raises(ConfigError) as caught:
        run_here(config, reference)
    message = str(caught.value)
    assert "memory.slots=6 (checkpoint: 5)" in message
    assert "rl.temperature=0.5 (checkpoint: 1.0)" in message
    assert str(reference) in message
    assert "another --workdir" in message
    assert snapshot(reference) == before


def test_a_finished_run_says_so_and_stays_as_it_is(reference, run_here, capsys):
    before = snapshot(reference)
    run_here(runs.make_config(), reference)
    assert f"is finished: it holds step {END} of {END}" in capsys.readouterr().out
    assert snapshot(reference) == before


@pytest.mark.long
def test_a_corrupt_checkpoint_is_refused_and_the_one_before_offered(
    tmp_path, reference, data_root, run_here
):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(checkpoints / str(END))  # the run is not finished
    *_, sound, broken = sorted(int(path.name) for path in checkpoints.iterdir())
    files = [path for path in (checkpoints / str(broken) / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)

    before = snapshot(checkpoints)
    with pytest.raises(ConfigError) as caught:
        run_here(runs.make_config(), tmp_path)
    message = str(caught.value)
    assert f"step {broken} of {checkpoints} is corrupt: state cannot be read" in message
    assert (
        f"--fall_back, which renames it to {broken}.corrupt, to go on from step {sound}" in message
    )
    assert snapshot(checkpoints) == before

    fall_back = ["--fall_back"]
    with processes.start_training(tmp_path, data_root, each=lambda index: fall_back) as group:
        output = group.finish()
    assert f"it is now called {broken}.corrupt" in output
    assert f"resuming {tmp_path} at step {sound} of {END}" in output
    runs.assert_same(runs.read_state(tmp_path, END), runs.read_state(reference, END))
    assert {path.name for path in checkpoints.iterdir()} >= {f"{broken}.corrupt", str(broken)}


@pytest.mark.relaxed_promotion  # Optax raises a float to a counter
def test_a_broken_line_of_metrics_does_not_keep_a_run_from_going_on(
    tmp_path, reference, run_here, caplog
):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / str(END))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = '{"step": 1, "sta'
    path.write_text("\n".join([*lines, "", ""]))
    whole = len(runs.read_repeatable(reference))
    run_here(runs.make_config(), tmp_path)
    assert f"{path}, line 2: is no record of a run and is left out" in caplog.text
    assert END in runs.list_steps(tmp_path)
    assert len(runs.read_repeatable(tmp_path)) == whole - 1


def test_a_second_run_in_a_workdir_is_refused_and_the_first_goes_on(tmp_path, data_root, reference):
    arguments = [f"--data_root={data_root}", *runs.make_flags(sft__steps=2, rl__steps=0)]
    shutil.copytree(reference, tmp_path / "run")
    with folder_lock.hold(tmp_path / "run", "--workdir=run"):
        before = snapshot(tmp_path / "run")
        output = runs.run("train.py", f"--workdir={tmp_path / 'run'}", *arguments, status=2)
        after = snapshot(tmp_path / "run")
        # The holder gives signs of life in its lock, whatever others do.
        assert before.pop(".lock").split(b"\n")[0] == after.pop(".lock").split(b"\n")[0]
        assert after == before
    assert f"--workdir={tmp_path / 'run'} is in use by process {os.getpid()} on " in output
    assert "Traceback" not in output


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_parameter_that_is_not_finite_is_never_saved(tmp_path, run_here, monkeypatch, kind):
    """One number of one leaf, of the step that would be saved first."""
    update = stages.Sft.update

    def break_one(self, state, *arguments):
        state, metrics = update(self, state, *arguments)
        params = state["train"].params
        leaves, tree = jax.tree.flatten(params)
        # Of another leaf than the trainer looks at.
        leaves[-1] = jax.device_put(
            np.where(np.arange(leaves[-1].size) == 0, float(kind), np.asarray(leaves[-1]).ravel())
            .reshape(leaves[-1].shape)
            .astype(leaves[-1].dtype),
            leaves[-1].sharding,
        )
        train_state = state["train"].replace(params=jax.tree.unflatten(tree, leaves))
        return state | {"train": train_state}, metrics

    monkeypatch.setattr(stages.Sft, "update", break_one)
    monkeypatch.setattr(train.jax, "transfer_guard", lambda level: contextlib.nullcontext())
    config = runs.make_config(sft__steps=2, sft__save_every=1, sft__eval_every=2, rl__steps=0)
    with pytest.raises(
        recorder.TrainingError,
        match=r"sft step 1: a parameter is not finite, and no checkpoint is written of it",
    ):
        run_here(config, tmp_path)
    assert runs.list_steps(tmp_path) == []


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.sft.step=3", "--workdir=unused"], "did you mean 'sft.steps'?"),
        (["--config.memory.shown=9", "--workdir=unused"], "memory.slots=5"),
        ([], "--workdir is missing"),
        (["--workdir=setup.py"], "--workdir=setup.py: is a file; pass a folder"),
        (["--workdir=/proc/self/x"], "--workdir=/proc/self/x: cannot be written to (No such file"),
        (["--workdir=~nobody-here/x"], "there is no home folder of ~nobody-here"),
        (
            ["--config=experiments/configs/babi.py:4", "--workdir=unused"],
            "allowed is babi.py:1, :2",
        ),
    ],
)
def test_a_mistake_ends_with_status_2_before_anything_is_computed(arguments, message):
    assert message in forks.refuse("train.py", *arguments)
    assert not pathlib.Path(runs.ROOT, "unused").exists()


@pytest.mark.parametrize("size", [8, 280])
def test_a_vocabulary_too_small_for_the_texts_is_named(tmp_path, run_here, size):
    told = rf"^tokenizer\.vocab_size: found {size}, with \d+ reserved names .*\. Raise vocab_size"
    with pytest.raises(ConfigError, match=told):
        run_here(runs.make_config(tokenizer__vocab_size=size), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_split_that_there_is_not_is_named_before_anything_is_computed(tmp_path, run_here):
    with pytest.raises(ConfigError, match=r"eval\.split=nope: split is 'nope'; .* has: .*test_1x"):
        run_here(runs.make_config(eval__split="nope"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"memory__shown": 6}, ["memory.shown=6", "memory.slots=5"]),
        ({"memory__eviction": "newest"}, ["memory.eviction='newest'", "lru", "oldest", "reject"]),
        ({"memory__query_length": 0}, ["memory.query_length=0", "at least 1"]),
        ({"rl__ppo__minibatches": 3}, ["rl.ppo.minibatches=3", "rl.episodes", "group_size", "16"]),
        ({"rl__ppo__group_size": 1}, ["rl.ppo.group_size", "found 1", "gae"]),
        ({"rl__ppo__estimator": "grpo"}, ["rl.ppo.estimator='grpo'", "group", "gae"]),
        ({"rl__ppo__value_warmup": 2}, ["rl.ppo.value_warmup=2", "'group'", "'gae'"]),
        ({"rl__ppo__kl_kind": "k4"}, ["rl.ppo.kl_kind='k4'", "k3"]),
        ({"rl__temperature": 0.0}, ["rl.temperature=0.0", "above 0"]),
        ({"rl__optimizer__schedule": "linear"}, ["rl.optimizer.schedule='linear'", "cosine"]),
        ({"sft__optimizer__name": "sgd"}, ["sft.optimizer.name='sgd'", "adamw", "muon"]),
        ({"sft__optimizer__learning_rate": 0.0}, ["sft.optimizer.learning_rate=0.0"]),
        ({"sft__min_reward": 1.5}, ["sft.min_reward=1.5", "0 to 1"]),
        ({"sft__save_every": 0}, ["sft.save_every=0", "at least 1"]),
        ({"rl__steps": -1}, ["rl.steps=-1", "0 or more"]),
        ({"rollout__top_p": 1.5}, ["top_p=1.5"]),
        ({"debug__overfit": 2, "sft__data": "/d"}, ["debug.overfit=2", "sft.data=/d"]),
        ({"rollout__cache_dtype": "int4"}, ["rollout.cache_dtype='int4'", "'', 'int8'"]),
        (
            {"rollout__cache_dtype": "int8"},
            ["rollout.cache_dtype='int8'", "rl.ppo.importance_cap=0.0", "above 0"],
        ),
        (
            {"rollout__param_dtype": "int8"},
            ["rollout.param_dtype='int8'", "rl.ppo.importance_cap=0.0", "rl.steps=0"],
        ),
        ({"teacher__update_shown": -0.1}, ["teacher.update_shown=-0.1", "0.0 to 1.0"]),
        ({"model__num_kv_heads": 3}, ["num_kv_heads=3", "num_heads=2"]),
    ],
)
def test_fields_that_cannot_be_are_named(changed, named):
    validate.validate(runs.make_config())
    with pytest.raises(ConfigError) as caught:
        validate.validate(runs.make_config(**changed))
    for words in named:
        assert words in str(caught.value)


def test_int8_may_sample_what_is_corrected_for_or_not_learned_from():
    int8 = {"rollout__cache_dtype": "int8", "rollout__param_dtype": "int8"}
    validate.validate(runs.make_config(**int8, rl__ppo__importance_cap=2.0))
    validate.validate(runs.make_config(**int8, rl__steps=0))


@pytest.mark.parametrize(
    ("changed", "devices", "named"),
    [
        ({"sft__episodes": 9}, 2, ["sft.episodes=9", "mesh.data=2"]),
        ({"rl__episodes": 6}, 4, ["rl.episodes=6", "mesh.data=4"]),
        ({"eval__batch_size": 5}, 2, ["eval.batch_size=5", "mesh.data=2"]),
    ],
)
def test_batches_that_do_not_divide_over_devices_are_named(changed, devices, named):
    validate.validate_devices(runs.make_config(), devices)
    with pytest.raises(ConfigError) as caught:
        validate.validate_devices(runs.make_config(**changed), devices)
    for words in named:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("mesh", "named"),
    [
        ({"fsdp": 3}, ["model.width=16", "mesh.fsdp=3", "a divisor of 16"]),
        ({"tensor": 4}, ["the vocabulary=454", "mesh.tensor=4", "a divisor of 454"]),
        ({"fsdp": 4, "rollout": 4}, ["mesh.rollout_tensor=4", "a divisor of 454 for mesh.rollout"]),
        ({"fsdp": 4, "rollout": 3}, ["mesh.rollout_tensor=3", "mesh.fsdp x mesh.tensor = 4"]),
    ],
)
def test_parameters_that_do_not_divide_over_devices_are_named(mesh, named):
    rollout = dict(mesh).pop("rollout", 0)
    mesh = {name: size for name, size in mesh.items() if name != "rollout"}
    config = runs.make_config(mesh__rollout_tensor=rollout)
    parts = build.build(config, tiny.make_tokenizer())
    if not rollout:
        validate.validate_parameters(parts, mesh_lib.make_mesh(1, 2, 2))
    with pytest.raises(ConfigError) as caught:
        validate.validate_parameters(parts, mesh_lib.make_mesh(1, **mesh))
    for words in named:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"rollout__response_length": 14}, ["rollout.response_length=14", "may take 15 tokens"]),
        ({"rollout__max_actions": 1}, ["rollout.max_actions=1", "up to 2"]),
        ({"rollout__answer_length": 1}, ["rollout.answer_length=1", "has 2 tokens"]),
    ],
)
def test_budgets_too_small_for_the_data_are_named(changed, named):
    shape = EpisodeShape(
        chunks=8,
        chunk_length=7,
        facts=1,
        questions=2,
        question_length=7,
        needs=2,
        answer_length=2,
        query_length=2,
    )

    def check(**overrides):
        config = runs.make_config(**overrides)
        parts = build.build(config, tiny.make_tokenizer())
        validate.validate_shape(config, parts, shape, [])

    check()
    with pytest.raises(ConfigError) as caught:
        check(**changed)
    for words in named:
        assert words in str(caught.value)


def test_a_config_without_data_is_refused(tmp_path):
    config = parse(load_config("experiments/configs/published.py:smollm2_135m"))
    with pytest.raises(ConfigError, match=r"config\.shape.*compile_report\.py.*synthetic\.py"):
        train.train(config, str(tmp_path / "run"), str(tmp_path / "data"))
    assert not (tmp_path / "run").exists()
