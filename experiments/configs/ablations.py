"""Ablations of the learned policy: operations, capacity, K, eviction, scratchpad, task. One seed.

    python experiments/sweep.py --config=experiments/configs/ablations.py \
        --workdir=runs/ablations --jobs=2

`learned` is the reference: 5 slots of which 4 are shown, a scratchpad of one token, one fact a
chunk, two questions an episode. RL is half as long as in the demo, for all alike. What has
the reference's vocabulary and writes the same kinds of action starts RL from its SFT checkpoint.
"""

from ml_collections import ConfigDict

from experiments.configs import synthetic

EVALUATIONS = [
    {"splits": ["test_1x", "test_4x"], "temperatures": [0.0, 1.0], "episodes": 256},
]
SHARED_SFT = {"sft.steps": 0, "init_from": "@learned:sft"}


def get_config() -> ConfigDict:
    """The experiment of `make demo`, with less RL."""
    config = synthetic.get_config()
    config.rl.steps = 18
    return config


def sweep(add) -> None:
    """What is left out or changed is the name of the run."""
    add("learned", {})
    for workflow in ("no_update", "no_delete", "no_scratchpad"):
        add(workflow, {"workflow": workflow, **SHARED_SFT})
    add("no_store", {"workflow": "no_store"})

    # No more can be shown than there is; what is shown has tokens of its own in the vocabulary.
    add("slots_3", {"memory.slots": 3, "memory.shown": 3})
    for slots in (4, 8, 16):
        add(f"slots_{slots}", {"memory.slots": slots, **SHARED_SFT})
    for shown in (1, 2, 3, 5):
        add(f"shown_{shown}", {"memory.shown": shown})
    for eviction in ("oldest", "reject"):
        add(f"eviction_{eviction}", {"memory.eviction": eviction, **SHARED_SFT})

    for length in (2, 8):
        add(f"scratchpad_{length}", {"memory.scratchpad_length": length, **SHARED_SFT})

    for facts in (2, 3, 4):
        add(f"facts_a_chunk_{facts}", _facts_a_chunk(facts))
    for questions in (1, 3, 4):
        add(f"questions_{questions}", _questions(questions))


def _facts_a_chunk(facts: int) -> dict[str, object]:
    """A turn may set the query and store every fact of its chunk."""
    return {
        "task.facts_per_chunk": facts,
        "rollout.max_actions": 2 + facts,
        "rollout.response_length": 6 + 10 * facts,
    }


def _questions(questions: int) -> dict[str, object]:
    """A question needs an employer, its correction, a city and a decoy; the query a name each."""
    return {
        "task.questions": (questions, questions),
        "task.base_facts": max(12, 4 * questions),
        "rollout.response_length": 14 + max(2, questions),
    }
