"""Each stage by hand-made records; scripts that lack an operation break where they must."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from atommem_jax.config import TeacherConfig
from atommem_jax.learning import life_cycle, rollout
from atommem_jax.learning.life_cycle import Stage
from atommem_jax.learning.table_history import SCRATCHPAD
from atommem_jax.tasks import keeper, teacher
from tests.helpers import tiny
from tests.helpers.hand_made import SLOTS, WORDS, asks, fact, make_episode, reads, record
from tests.tasks import keeper_test

WORKS = fact("Ann works at Foo.", "Ann")
MOVED = fact("Ann now works at Bar.", "Ann", supersedes=0)
LIES = fact("Bar is in Rome.", "Bar", supersedes=1)
OTHER = fact("Bob works at Qux.", "Bob")


def follow(episode, turns, right=False, eviction="lru", slots=SLOTS):
    """The paths of all questions, answered all right or all wrong."""
    answered = [right] * int(episode.num_questions)
    trajectory = record(turns, eviction, slots)
    return life_cycle.follow(trajectory, episode, answered, decode=WORDS.decode, eviction=eviction)


def find_stage(episode, turns, **options):
    return follow(episode, turns, **options)[0].stage


ONE = make_episode([[WORKS], [OTHER]], ("Ann works where?", "Foo", [0]))
KEPT = ("create", "Ann works at Foo.")

BROKEN = {
    Stage.UNSEEN: [],
    Stage.NOT_WRITTEN: [reads(0, ("create", "Bob works at Qux.")), reads(1), asks(shown=[0])],
    Stage.MISWRITTEN: [reads(0, ("create", "Ann works at Fox.")), reads(1), asks(shown=[0])],
    Stage.CORRUPTED: [
        reads(0, KEPT), reads(1, ("update", 1, "Ann works at Qux."), shown=[0]), asks(shown=[0]),
    ],
    Stage.OVERWRITTEN: [
        reads(0, KEPT), reads(1, ("update", 1, "Bob sells Qux."), shown=[0]), asks(shown=[0]),
    ],
    Stage.DELETED: [reads(0, KEPT), reads(1, ("delete", 1), shown=[0]), asks()],
    Stage.EVICTED: [
        reads(0, KEPT), reads(1, *[("create", f"junk {i}") for i in range(3)]), asks(shown=[1]),
    ],
    Stage.NOT_SHOWN: [reads(0, KEPT), reads(1, ("create", "Bob at Qux")), asks(shown=[1])],
    Stage.NOT_USED: [reads(0, KEPT), reads(1), asks(shown=[0])],
}  # fmt: skip


@pytest.mark.parametrize("stage", BROKEN)
def test_a_chain_breaks_where_it_was_broken(stage):
    assert find_stage(ONE, BROKEN[stage]) is stage


def test_the_break_is_the_last_event_of_a_fact():
    broken = {s: turns for s, turns in BROKEN.items() if s not in (Stage.UNSEEN, Stage.NOT_USED)}
    for stage, turns in broken.items():
        (found,) = follow(ONE, turns)[0].facts
        assert found.events[-1] == (found.broke, stage.value)
        row = {Stage.NOT_WRITTEN: 0, Stage.MISWRITTEN: 0, Stage.NOT_SHOWN: 2}.get(stage, 1)
        assert (found.stage, found.broke) == (stage, row)


@pytest.mark.parametrize("stage", BROKEN)
def test_a_right_answer_has_no_stage(stage):
    assert find_stage(ONE, BROKEN[stage], right=True) is None


def test_a_text_that_the_memory_refuses_is_not_blamed_on_the_writer():
    full = [reads(0, ("create", "junk 1"), ("create", "junk 2"), ("create", "junk 3"))]
    late = make_episode([[OTHER], [WORKS]], ("Ann works where?", "Foo", [1]))
    turns = [*full, reads(1, KEPT), asks(shown=[0])]
    assert find_stage(late, turns, eviction="reject") is Stage.REFUSED
    aimless = [*full, reads(1, ("update", 2, "Ann works at Foo."), shown=[0]), asks(shown=[0])]
    assert find_stage(late, aimless, eviction="reject") is Stage.REFUSED


def test_a_fact_that_nobody_named_is_not_judged():
    assert find_stage(make_episode([[WORKS]], ("Why?", "Foo", [])), [reads(0), asks()]) is (
        Stage.UNKNOWN
    )


def test_turns_without_a_trace_may_be_missing():
    """A part that was read and left alone is not taken for one that was never read."""
    assert find_stage(ONE, [asks(shown=[])]) is Stage.NOT_WRITTEN
    assert find_stage(ONE, [reads(1, ("create", "Bob"))]) is Stage.NOT_WRITTEN
    whole = BROKEN[Stage.NOT_SHOWN]
    assert find_stage(ONE, [*whole[:1], *whole[2:-1], asks()]) is Stage.NOT_SHOWN


# ---------------------------------------------------------------------------------------------
# Other words


@pytest.mark.parametrize(
    "text", ["Ann works at Foo.", "ann: foo", "Foo employs Ann", "Ann Foo Bob Qux"]
)
def test_an_entry_may_say_it_in_other_words(text):
    turns = [reads(0, ("create", text)), reads(1), asks(shown=[0])]
    assert find_stage(ONE, turns) is Stage.NOT_USED


@pytest.mark.parametrize("text", ["Foo", "Ann works at", "Bob works at Foo.", "Ann"])
def test_an_entry_that_lacks_subject_or_object_does_not_hold_it(text):
    assert find_stage(ONE, [reads(0, ("create", text)), reads(1), asks(shown=[0])]) is (
        Stage.MISWRITTEN
    )


def test_of_a_note_only_what_the_question_hangs_on_is_asked_for():
    noted = fact("John went there.", "milk", note="milk John garden office")
    episode = make_episode([[noted]], ("Where was the milk?", "office", [0]))
    for text, stage in [
        ("milk John garden office", Stage.NOT_USED),
        ("milk office", Stage.NOT_USED),
        ("milk John garden", Stage.MISWRITTEN),
    ]:
        assert find_stage(episode, [reads(0, ("create", text)), asks(shown=[0])]) is stage


def test_facts_that_do_not_contain_the_answer_are_held_by_most_of_their_words():
    facts = [
        fact("Rome: founded in 753 BC", "Rome", note="Rome: founded in 753 BC"),
        fact("Paris: older than Lyon", "Paris", note="Paris: older than Lyon"),
    ]
    episode = make_episode([[facts[0]], [facts[1]]], ("Is Rome older?", "yes", [0, 1]))
    second = reads(1, ("create", "Paris is older than Lyon"))
    for text, stage in [("Rome founded 753", Stage.NOT_USED), ("Rome", Stage.MISWRITTEN)]:
        turns = [reads(0, ("create", text)), second, asks(shown=[0, 1])]
        assert find_stage(episode, turns) is stage


def test_the_scratchpad_holds_facts_too():
    note = ("scratchpad", "Ann Foo")
    assert find_stage(ONE, [reads(0, note), reads(1), asks()]) is Stage.NOT_USED
    lost = [reads(0, note), reads(1, ("scratchpad", "Bob Qux")), asks()]
    assert find_stage(ONE, lost) is Stage.OVERWRITTEN
    [path] = follow(ONE, lost)
    assert path.facts[0].holders == ((0, (SCRATCHPAD,)), (1, ()))


# ---------------------------------------------------------------------------------------------
# Several facts


HOPS = make_episode([[WORKS], [MOVED], [LIES]], ("Ann's city?", "Rome", [1, 2]))
FIRST = [reads(0, KEPT), reads(1, ("update", 1, "Ann Bar"), shown=[0])]


def test_an_entry_may_carry_on_what_another_fact_completes():
    merged = [*FIRST, reads(2, ("update", 1, "Ann Rome"), shown=[0]), asks(shown=[0])]
    [path] = follow(HOPS, merged)
    assert path.stage is Stage.NOT_USED
    assert [f.stage for f in path.facts] == [None, None]
    apart = [*FIRST, reads(2, ("create", "Bar Rome")), asks(shown=[0, 1])]
    assert find_stage(HOPS, apart) is Stage.NOT_USED
    hidden = [*FIRST, reads(2, ("create", "Bar Rome")), asks(shown=[1])]
    assert find_stage(HOPS, hidden) is Stage.NOT_SHOWN


def test_a_city_of_nobody_does_not_excuse_the_loss_of_the_firm():
    turns = [*FIRST, reads(2, ("update", 1, "Bar Rome"), shown=[0]), asks(shown=[0])]
    assert find_stage(HOPS, turns) is Stage.CORRUPTED


def test_the_first_break_counts():
    never = [reads(0, KEPT), reads(1), reads(2, ("update", 1, "Ann Milan"), shown=[0])]
    [path] = follow(HOPS, [*never, asks(shown=[0])])
    assert path.stage is Stage.NOT_WRITTEN
    assert [(f.stage, f.broke) for f in path.facts] == [
        (Stage.NOT_WRITTEN, 1),
        (Stage.MISWRITTEN, 2),
    ]
    # In one turn the firm is lost and the city miswritten: the earlier stage says what happened.
    wrong = [*FIRST, reads(2, ("update", 1, "Ann Milan"), shown=[0]), asks(shown=[0])]
    assert find_stage(HOPS, wrong) is Stage.MISWRITTEN
    early = [*FIRST, reads(1, ("delete", 1), shown=[0]), reads(2), asks()]
    assert find_stage(HOPS, early) is Stage.DELETED


def test_what_is_lost_and_found_again_is_no_break():
    again = [reads(0, KEPT), reads(0, ("delete", 1), KEPT, shown=[0]), reads(1), asks(shown=[0])]
    [path] = follow(ONE, again)
    assert path.stage is Stage.NOT_USED
    twice = [reads(0, KEPT), reads(0, ("delete", 1), shown=[0]), reads(0, KEPT), reads(1)]
    [path] = follow(ONE, [*twice, asks(shown=[0])])
    assert path.stage is Stage.NOT_USED
    assert [tuple(event) for event in path.facts[0].events] == [
        (0, "seen"), (0, "stored"), (1, "seen"), (1, "deleted"), (2, "seen"), (2, "stored"),
        (4, "shown"),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Counting

BELL, BELLS = fact("A bell sounds."), [0, 1, 2]
RUNG = make_episode([[BELL], [BELL], [OTHER], [BELL]], ("How many bells?", "three", [0, 1, 3]))


def count(*numbers):
    """Reading turns that write these numbers in the scratchpad, one a chunk; None writes none."""
    return [
        reads(c, *([("scratchpad", number)] if number else [])) for c, number in enumerate(numbers)
    ]


@pytest.mark.parametrize(
    ("numbers", "stage", "broke"),
    [
        (("one", "two", None, "three"), Stage.NOT_USED, None),
        ((None, "one", None, "two"), Stage.NOT_WRITTEN, 0),  # the missed one, not the last
        (("one", None, None, "two"), Stage.NOT_WRITTEN, 1),
        (("one", "three", None, "four"), Stage.MISWRITTEN, 1),
        (("one", "two", "three", "four"), Stage.CORRUPTED, 2),  # counted what is no bell
        (("one", "two", "Bob", "three"), Stage.NOT_USED, None),
        (("one", "two", None, None), Stage.NOT_WRITTEN, 3),
        (("one", "two", "Bob", "one"), Stage.OVERWRITTEN, 2),  # and begun anew
        (("bells: one", "2 bells", "two bells sounds", "many: 3"), Stage.NOT_USED, None),
        (("bells one", "two bells", "Ann has two", "one"), Stage.CORRUPTED, 2),
    ],
)
def test_counted_facts_are_held_by_the_number_so_far(numbers, stage, broke):
    [path] = follow(RUNG, [*count(*numbers), asks()])
    assert path.stage is stage
    breaks = [f.broke for f in path.facts if f.stage is stage]
    assert (min(breaks) if breaks else None) == broke


def test_a_bell_whose_turn_left_no_trace_is_missed_there():
    turns = [turn for turn in count("one", None, None, "two") if turn.actions]
    [path] = follow(RUNG, [*turns, asks()])
    assert path.stage is Stage.NOT_WRITTEN
    assert [f.stage for f in path.facts] == [None, Stage.NOT_WRITTEN, Stage.MISWRITTEN]


# ---------------------------------------------------------------------------------------------
# Drift and counts


def test_drift_is_what_is_left_after_the_updates_of_the_entry():
    noted = fact("x.", "milk", note="milk John garden office")
    episode = make_episode([[noted], [OTHER]], ("Where is the milk?", "office", [0]))
    turns = [
        reads(0, ("create", "milk John garden office")),
        reads(1, ("update", 1, "milk John kitchen office"), shown=[0]),
        reads(1, ("update", 1, "milk kitchen office"), shown=[0]),
        asks(shown=[0]),
    ]
    (found,) = follow(episode, turns)[0].facts
    assert (found.updates, found.survived, found.stage) == (2, 0.5, None)  # milk, office
    turns[2] = reads(1, ("update", 1, "John office"), shown=[0])
    (found,) = follow(episode, turns)[0].facts
    assert (found.updates, found.survived, found.stage) == (2, 0.5, Stage.CORRUPTED)
    # What another fact has completed is no loss, and later writing is not counted.
    merged = [*FIRST, reads(2, ("update", 1, "Ann Rome"), shown=[0]), asks(shown=[0])]
    assert [(f.updates, f.survived) for f in follow(HOPS, merged)[0].facts] == [(0, 1), (0, 1)]


def test_counts_and_tables_by_hand():
    records = [
        {"stage": "not_shown", "drift": [[0, 1.0], [1, 0.5]]},
        {"stage": None, "drift": [[1, 1.0], [4, 0.25]]},
        {"stage": "refused", "drift": []},
        {"stage": "not_shown"},
    ]
    counts = life_cycle.count_stages(records)
    assert list(counts.items()) == [("refused", 1), ("not_shown", 2)]
    shares = life_cycle.share_stages(records)
    assert shares["stage/not_shown"] == 0.5
    assert set(shares) == {f"stage/{stage}" for stage in life_cycle.STAGES}
    assert life_cycle.average_drift(records) == {
        "0": {"facts": 1, "share": 1.0},
        "1": {"facts": 2, "share": 0.75},
        "3+": {"facts": 1, "share": 0.25},
    }
    head, row, none = life_cycle.render({"1x": counts, "2x": {}}, {"1x": 4, "2x": 9}).split("\n")
    assert head.split() == [
        "wrong,",
        "by",
        "first",
        "break",
        "questions",
        "wrong",
        "refused",
        "not",
        "shown",
    ]
    assert row.split() == ["1x", "4", "3", "1", "2"]
    assert none.split() == ["2x", "9", "0", "0", "0"]
    assert life_cycle.render({"1x": {}}, {"1x": 4}).startswith("no wrong answer")
    # Where a workflow searches the document itself no fact goes through a memory.
    assert life_cycle.render({"1x": {}}, {"1x": 4}, right=False).startswith("wrong answers are not")


# ---------------------------------------------------------------------------------------------
# Scripts on real episodes: the negative controls


@functools.partial(jax.jit, static_argnames="scratchpad_only")
def _play(setting, rates, episodes, ids, scratchpad_only=False):
    policy = teacher.policy(TeacherConfig(**rates), tiny.make_parts().script)
    return rollout.run(setting, policy, episodes, ids, jax.random.key(0))


def judge_facts(**rates):
    """(share right, count by stage) of the scripted teacher on the tiny task of single facts."""
    episodes, aliases = tiny.make_episodes(range(tiny.EXAMPLES))
    setting = tiny.make_parts().setting(tiny.make_shape())
    slots = rates.pop("slots", None)
    if slots:
        memory = dataclasses.replace(setting.limits.memory, slots=slots)
        setting = setting.replace(limits=dataclasses.replace(setting.limits, memory=memory))
    clean = dataclasses.asdict(TeacherConfig())
    del clean["scratchpad_only"]
    rates = {name: np.float32(rates.get(name, value)) for name, value in clean.items()}
    ids = np.arange(tiny.EXAMPLES, dtype=np.int32)
    played = jax.device_get(_play(setting, rates, episodes, ids))
    return judge(
        played, jax.device_get(episodes), aliases, tiny.make_tokenizer(), setting.limits.memory
    )


def judge(played, episodes, aliases, tokenizer, memory):
    right = np.zeros(played.answer_lengths.shape, bool)
    for b, accepted in enumerate(aliases):
        for q, names in enumerate(accepted):
            ids = played.answers[b, q, : played.answer_lengths[b, q]].tolist()
            right[b, q] = tokenizer.decode(ids) in names
    paths = life_cycle.follow_batch(
        played, episodes, right, decode=tokenizer.decode, eviction=memory.eviction
    )
    asked = sum(map(len, aliases))
    return right.sum() / asked, paths


def count_paths(paths):
    return life_cycle.count_stages(path.describe() for row in paths for path in row)


def test_without_mistakes_no_chain_breaks():
    score, paths = judge_facts()
    assert score == 1.0
    assert count_paths(paths) == {}
    assert all(fact.stage is None for row in paths for path in row for fact in path.facts)


@pytest.mark.parametrize(
    ("rates", "stage"),
    [
        ({"store_support": 0.0}, "not_written"),
        ({"slots": 4, "store_distractor": 1.0, "update_shown": 0.0, "set_query": 0.0}, "evicted"),
        ({"answer_known": 0.0}, "not_used"),
    ],
)
def test_a_teacher_breaks_where_its_one_mistake_is(rates, stage):
    score, paths = judge_facts(**rates)
    counts = count_paths(paths)
    assert score < 1.0
    assert counts[stage] >= 0.9 * sum(counts.values()), counts


def judge_village(habits=None, **rates):
    """(share right, paths) of the village's script."""
    examples = keeper_test.make_examples()
    episodes = keeper_test.make_episodes(examples)
    played = keeper_test.run(examples, TeacherConfig(**rates), habits)
    aliases = [[question["aliases"] for question in one["questions"]] for one in examples]
    memory = keeper_test.make_config().memory
    return judge(played, jax.device_get(episodes), aliases, keeper_test.make_tokenizer(), memory)


def test_the_village_script_keeps_every_chain_whole():
    score, paths = judge_village()
    assert score == 1.0
    assert all(fact.stage is None for row in paths for path in row for fact in path.facts)


@pytest.mark.parametrize(
    ("habits", "rates", "stages"),
    [
        ("no_update", {}, {"not_written", "refused", "deleted"}),
        ("no_delete", {}, {"refused", "not_written"}),
        ("no_store", {}, {"not_written"}),
        ("no_scratchpad", {}, {"not_written"}),
        (None, {"count": 0.5}, {"not_written"}),
        # Lost things fill the table; and what is not read for leaves the bell to be missed.
        (None, {"forget": 0.0}, {"refused", "not_written"}),
    ],
)
def test_a_village_script_that_lacks_something_breaks_for_the_want_of_it(habits, rates, stages):
    score, paths = judge_village(keeper.BEST_ABLATED[habits] if habits else None, **rates)
    counts = count_paths(paths)
    assert score < 0.95
    assert sum(counts.get(stage, 0) for stage in stages) >= 0.9 * sum(counts.values()), counts
