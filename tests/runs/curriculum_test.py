"""A curriculum is read from the config, learned phase by phase, and goes on after a stop."""

import types

import pytest

from atommem_jax.agent import build, load, phases
from atommem_jax.config import ConfigError, curriculum
from atommem_jax.metrics import read_metrics
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import processes
from atommem_jax.runs import curriculum as curriculum_lib
from atommem_jax.runs import resume
from atommem_jax.tasks import encoding
from experiments import train
from tests.conftest import COMPILATION_CACHE
from tests.helpers import runs

TEXTS = ("2: task.facts_per_chunk=2 memory.slots=7", "4:")


def make_config(**changes):
    settings = {
        "sft__curriculum": TEXTS,
        "rl__steps": 0,
        "rollout__response_length": 24,  # of a part with two facts
        "sft__optimizer__name": "adamw",
        "sft__save_every": 1,
        "sft__eval_every": runs.SFT_STEPS,
    }
    return runs.make_config(**settings | changes)


def test_an_entry_holds_from_its_step_on():
    found = curriculum.read(TEXTS, 6, "sft.curriculum")
    assert [entry.step for entry in found] == [0, 2, 4]
    assert [entry.settings for entry in found] == [
        (),
        ("task.facts_per_chunk=2", "memory.slots=7"),
        (),
    ]
    assert curriculum.read((), 6, "sft.curriculum") == [(0, ())]
    assert curriculum.read(["0: task.scales='1, 2'"], 6, "f")[0].settings == ("task.scales=1, 2",)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("soon: task.facts_per_chunk=2",), r"has 'soon: .*'STEP: FIELD=VALUE"),
        (("2 task.facts_per_chunk=2",), "has '2 task"),
        (("2: task.facts_per_chunk",), "has '2: task.facts_per_chunk': allowed"),
        (("2: task.x='",), "No closing quotation"),
        (("3:", "3:"), r"begins at steps \[3, 3\]: each must come after"),
        (("6:",), "begins at step 6 of 6: it would never be learned"),
    ],
)
def test_a_curriculum_of_another_form_is_refused(texts, words):
    with pytest.raises(ConfigError, match=words):
        make_config(sft__curriculum=texts)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2: task.facts_a_chunk=2", "sft.curriculum at step 2: .*facts_per_chunk"),
        ("2: model.width=8", "at step 2: model.width=8: allowed are fields of task, memory, rollo"),
        ("2: eval.episodes=3", "at step 2: eval.episodes=3: allowed are fields of task"),
        ("2: workflow=no_memory", "at step 2: workflow=no_memory: allowed are fields of task"),
        ("2: memory.slots=0", "sft.curriculum at step 2: .*slots"),
    ],
)
def test_a_field_that_cannot_change_is_named(text, words):
    with pytest.raises(ConfigError, match=words):
        phases.find(make_config(sft__curriculum=(text,)), "sft")


def test_collected_trajectories_have_no_curriculum():
    with pytest.raises(ConfigError, match=r"sft.curriculum plays tasks .* sft.data=runs/taught"):
        make_config(sft__data="runs/taught")


def make_plan(config, data_root):
    dataset = build.load_dataset(config, str(data_root))
    examples = dataset.split("train")
    if config.debug.overfit:
        examples = examples[: config.debug.overfit]
    tokenizer = load.choose_tokenizer(config, dataset)
    parts = build.build(config, tokenizer)
    shape = encoding.fit_shape(examples, tokenizer)
    return curriculum_lib.make_plan(
        parts,
        mesh_lib.single(),
        examples,
        shape,
        lambda other: build.load_dataset(other, str(data_root)),
    )


def test_each_phase_has_its_own_task_and_memory(data_root):
    plan = make_plan(make_config(rl__curriculum=("3: memory.slots=6",), rl__steps=5), data_root)
    assert [(s.name, s.first, s.last) for s in plan] == [
        *(("sft", 0, 2), ("sft", 2, 4), ("sft", 4, 6)),
        *(("rl", 0, 3), ("rl", 3, 5)),
    ]
    sizes = [max(len(chunk) for e in s.examples[:20] for chunk in e["chunks"]) for s in plan]
    assert sizes == [1, 2, 1, 1, 1]
    slots = [stage.parts.config.memory.slots for stage in plan]
    assert slots == [slots[0], 7, slots[0], slots[0], 6]
    assert slots[0] not in (6, 7)


@pytest.mark.long
@pytest.mark.relaxed_promotion  # Optax raises a float to a counter
def test_a_run_that_is_stopped_within_a_phase_or_between_two_goes_on(
    tmp_path, data_root, monkeypatch
):
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))
    config = make_config(mesh__data=1)

    def run(name, stops=()):
        monkeypatch.setattr(processes, "preempted", lambda step: step in stops)
        train.train(config, str(tmp_path / name), str(data_root))
        records = [r for r in read_metrics(tmp_path / name) if r["stage"] == "sft"]
        return runs.read_state(tmp_path / name, records[-1]["step"])["train"], records

    whole, records = run("whole")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for stop in (2, 3):
        _, logged = run("stopped", stops=(stop,))
        assert logged[-1]["step"] == stop
    resumed, again = run("stopped")
    runs.assert_same(resumed, whole)
    # One optimiser goes on through all phases, and its warm-up with it.
    assert int(whole["step"]) == 6
    assert [r["loss"] for r in again] == [r["loss"] for r in records]
    config = make_config(mesh__data=1, sft__curriculum=())
    _, plain = run("plain")
    same = [a["loss"] == b["loss"] for a, b in zip(plain, records, strict=True)]
    assert same == [True, True, False, False, False, False]


def test_a_step_is_found_in_its_phase():
    def plan(*lengths):
        return [types.SimpleNamespace(name=n, first=a, last=b) for n, a, b in lengths]

    both = plan(("sft", 0, 2), ("sft", 2, 4), ("rl", 0, 3), ("rl", 3, 5))
    found = [resume.locate(both, step) for step in range(10)]
    # At an end the checkpoint is that of the phase that ends there.
    assert found == [
        *((0, 0), (0, 1), (0, 2), (1, 3), (1, 4)),
        *((2, 1), (2, 2), (2, 3), (3, 4), (3, 5)),
    ]
    alone = plan(("sft", 0, 0), ("rl", 0, 3), ("rl", 3, 5))
    assert [resume.locate(alone, step) for step in (0, 3, 4)] == [(1, 0), (1, 3), (2, 4)]


def test_a_stage_without_steps_has_no_phases():
    config = make_config(sft__steps=0, rl__steps=4, rl__curriculum=("2: memory.slots=6",))
    [(steps, same)] = phases.find(config, "sft")
    assert steps == (0, 0)
    assert same == config
    assert [steps for steps, _ in phases.find(config, "rl")] == [(0, 2), (2, 4)]


def test_what_a_phase_cannot_hold_is_refused_in_its_name(data_root):
    config = make_config(sft__curriculum=("1: task.facts_per_chunk=3",))
    with pytest.raises(ConfigError, match=r"sft.curriculum at step 1: rollout.response_length=24"):
        make_plan(config, data_root)


def test_samples_to_overfit_are_as_few_in_every_phase(data_root):
    config = make_config(debug__overfit=3)
    assert [len(stage.examples) for stage in make_plan(config, data_root)[:3]] == [3, 3, 3]


def test_each_phase_deals_in_an_order_of_its_own(data_root):
    config = make_config(sft__curriculum=("2: memory.slots=7", "4:"))
    first, second, third, _ = make_plan(config, data_root)
    assert first.examples is second.examples is third.examples
    dealt = [tuple(next(stage.batches()).ids) for stage in (first, second, third)]
    assert len(set(dealt)) == 3
