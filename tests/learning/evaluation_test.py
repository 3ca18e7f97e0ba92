"""Every sample is scored once, against its own questions; intervals and rates by hand."""

import functools

import jax
import numpy as np
import pytest

from atommem_jax.learning import evaluation as evaluation_lib
from atommem_jax.learning import reward, rollout
from atommem_jax.tasks import batches as batches_lib
from atommem_jax.tasks import synthetic, teacher
from atommem_jax.types import ActionKind, Phase
from tests.helpers import tiny

BATCH = 5  # does not divide the 24 samples: the last batch is filled up


@jax.jit
def play_teacher(setting, episodes, ids):
    policy = teacher.policy(teacher.TeacherConfig(), tiny.make_parts().script)
    return rollout.run(setting, policy, episodes, ids, jax.random.key(0))


@functools.cache
def evaluation():
    """(records, statistics, ids played, trajectories of each batch) of the clean teacher."""
    played = []

    def play(episodes, ids):
        setting = tiny.make_parts().setting(tiny.make_shape())
        trajectories = play_teacher(setting, episodes, ids)
        played.append((np.asarray(ids), jax.device_get(trajectories)))
        return trajectories

    batches = batches_lib.iterate_split(
        tiny.make_examples(), tiny.make_tokenizer(), tiny.make_shape(), batch_size=BATCH
    )
    records, totals = evaluation_lib.evaluate(
        play, batches, tiny.make_tokenizer().decode, first_id=100
    )
    return records, totals, played


def test_every_question_of_every_sample_is_scored_once():  # defect 6
    records, _, played = evaluation()
    expected = [
        (example["id"], q, question["text"], question["aliases"])
        for example in tiny.make_examples()
        for q, question in enumerate(example["questions"])
    ]
    found = [(r["episode"], r["question"], r["text"], r["aliases"]) for r in records]
    assert found == expected
    assert len(played) == -(-tiny.EXAMPLES // BATCH)
    # Samples are numbered on from `first_id`, so that each can be replayed alone.
    assert [r["trajectory"] for r in records] == [100 + e for e, _, _, _ in expected]
    assert played[1][0].tolist() == [105, 106, 107, 108, 109]
    summary = evaluation_lib.summarise(records, resamples=10)
    assert summary["episodes"] == tiny.EXAMPLES
    assert summary["questions"] == len(expected)


def test_the_clean_teacher_scores_one():
    records, totals, _ = evaluation()
    assert all(r["em"] == r["f1"] == 1.0 for r in records)
    assert all(r["answer"] == r["aliases"][0] for r in records)
    summary = evaluation_lib.summarise(records, resamples=50)
    assert summary["em"] == summary["ci_low"] == summary["ci_high"] == summary["f1"] == 1.0
    assert totals["applied/answer"] == pytest.approx(len(records) / tiny.EXAMPLES)


def test_statistics_count_real_samples_only():
    _, totals, played = evaluation()
    rows = []  # per sample: turns, creates, reading turns
    for _, trajectories in played:
        turns = trajectories.turns
        reading = turns.live & (turns.phase == Phase.READING)
        creates = turns.report.applied[..., ActionKind.CREATE].sum(axis=1)
        rows += zip(turns.live.sum(axis=1), creates, reading.sum(axis=1), strict=True)
    turns, creates, reading = np.array(rows[: tiny.EXAMPLES], float).mean(axis=0)
    assert totals["turns"] == pytest.approx(turns)
    assert totals["applied/create"] == pytest.approx(creates)
    assert totals["reading_turns"] == pytest.approx(reading)
    assert totals["invalid/update"] == totals["evicted/create"] == 0
    # Samples with one question have no second one to leave open.
    assert totals["unanswered"] == 0


def test_open_questions_are_those_put_and_not_answered():
    trajectories = evaluation()[2][0][1]
    questions = [len(example["questions"]) for example in tiny.make_examples()[:BATCH]]
    lengths = trajectories.answer_lengths.copy()
    lengths[1, 0] = 0
    found = evaluation_lib.statistics(trajectories.replace(answer_lengths=lengths))
    assert float(found["unanswered"]) == pytest.approx(1 / sum(questions))


def test_records_of_several_processes_become_those_of_one():
    records, _, _ = evaluation()
    # Rows dealt to three processes, of which two hold some of the same.
    parts = [[r for r in records if r["trajectory"] % 3 in kept] for kept in ((0,), (1, 2), (2, 0))]
    assert evaluation_lib.merge(parts) == records
    assert evaluation_lib.merge([records]) is records


def test_statistics_of_one_batch_by_hand():
    _, _, played = evaluation()
    trajectories = played[0][1]
    turns, found = trajectories.turns, jax.device_get(evaluation_lib.statistics(trajectories))
    live = turns.live
    assert found["tokens"] == turns.response_lengths[live].sum()
    assert found["response_tokens"] == pytest.approx(turns.response_lengths[live].mean())
    assert found["prompt_tokens"] == pytest.approx(turns.prompt_lengths[live].mean())
    assert found["occupancy"] == pytest.approx(turns.occupancy[live].mean())
    assert found["sampled_nll"] == 0  # a script has no log-probs
    attempted = turns.report.attempted[..., ActionKind.READ].sum() / BATCH
    assert found["attempted/read"] == pytest.approx(attempted)
    assert found["well_formed"] == 1


def test_actions_that_are_not_closed_and_turns_that_do_not_end_are_counted():
    trajectories = evaluation()[2][0][1]
    turns = trajectories.turns
    limit = turns.response.shape[2]
    b, t = next(zip(*np.nonzero(turns.live & (turns.actions.count > 1)), strict=True))
    well_formed, lengths = turns.actions.well_formed.copy(), turns.response_lengths.copy()
    well_formed[b, t, 0], lengths[b, t] = False, limit
    well_formed[b, t, turns.actions.count[b, t] :] = False  # where no action is
    turns = turns.replace(
        scripted=np.zeros_like(turns.scripted),
        response_lengths=lengths,
        actions=turns.actions.replace(well_formed=well_formed),
    )
    found = evaluation_lib.statistics(trajectories.replace(turns=turns))
    actions = int(turns.actions.count[turns.live].sum())
    assert float(found["well_formed"]) == pytest.approx(1 - 1 / actions)
    assert float(found["ended"]) == pytest.approx((lengths < limit)[turns.live].mean())
    assert (lengths == limit)[turns.live].any()


def test_what_was_done_with_each_fact_is_recorded():
    records, _, _ = evaluation()
    examples = {example["id"]: example for example in tiny.make_examples()}
    for record in records:
        if record["question"] > 0:
            assert record["handled"] == []  # once an episode
            continue
        facts = [fact for chunk in examples[record["episode"]]["chunks"] for fact in chunk]
        expected = []
        for fact in facts:
            stored = "update" if fact["supersedes"] >= 0 else "create"
            expected.append((fact["category"], stored if fact["support"] else "none"))
        assert record["handled"] == expected


def test_category_rates_by_hand():
    records = [
        {"handled": [(0, "create"), (4, "none"), (0, "none")]},
        {"handled": []},
        {"handled": [(0, "create"), (1, "update"), (0, "update")]},
    ]
    names = [category.name.lower() for category in synthetic.FactCategory]
    assert evaluation_lib.category_rates(records, names) == {
        "employer": {"facts": 4, "create": 0.5, "update": 0.25, "none": 0.25},
        "likes": {"facts": 1, "create": 0.0, "update": 0.0, "none": 1.0},
        "correction": {"facts": 1, "create": 0.0, "update": 1.0, "none": 0.0},
    }


def test_answers_are_scored_against_their_own_question():  # defect 5
    texts = [["Paris.", "Rome"], ["Rome", "Paris"], ["the Paris", "unasked"]]
    aliases = [[["Paris"], ["Rome"]], [["Paris"], ["Rome"]], [["Paris", "Lutetia"]]]
    np.testing.assert_array_equal(
        evaluation_lib.score_answers(texts, aliases), [[1, 1], [0, 0], [1, 0]]
    )
    f1 = evaluation_lib.score_answers([["New York City"]], [[["York City"]]], reward.f1)
    np.testing.assert_allclose(f1, [[0.8]], rtol=1e-6)


def test_answers_are_decoded_up_to_their_length():
    asked = []

    def decode(ids):
        asked.append(tuple(ids))
        return "-".join(map(str, ids))

    answers = np.array([[[5, 6, 0], [7, 8, 9]], [[5, 6, 9], [1, 2, 3]]], np.int32)
    lengths = np.array([[2, 0], [2, 3]], np.int32)
    assert evaluation_lib.decode_answers(answers, lengths, decode) == [
        ["5-6", ""],
        ["5-6", "1-2-3"],
    ]
    assert asked == [(5, 6), (1, 2, 3)]  # each distinct answer once


def make_records(scores):
    """One episode per row of scores."""
    return [
        {"episode": e, "question": q, "em": float(score), "f1": (1 + score) / 2}
        for e, row in enumerate(scores)
        for q, score in enumerate(row)
    ]


def test_means_are_over_questions_and_intervals_over_episodes():
    summary = evaluation_lib.summarise(make_records([[1, 1, 1], [0]]), resamples=4000)
    assert (summary["episodes"], summary["questions"]) == (2, 4)
    assert summary["em"] == 0.75
    assert summary["f1"] == 0.875
    # Two episodes: a resample has mean 0, 3/4 or 1, each extreme with probability 1/4.
    assert (summary["ci_low"], summary["ci_high"]) == (0.0, 1.0)
    assert (summary["f1_ci_low"], summary["f1_ci_high"]) == (0.5, 1.0)
    again = evaluation_lib.summarise(make_records([[1, 1, 1], [0]]), resamples=4000)
    assert again == summary


def test_intervals_contain_the_mean_and_shrink_with_the_sample():
    rng = np.random.default_rng(0)
    widths = []
    for episodes in (25, 400):
        summary = evaluation_lib.summarise(make_records(rng.integers(0, 2, (episodes, 1))))
        assert summary["ci_low"] < summary["em"] < summary["ci_high"]
        widths.append(summary["ci_high"] - summary["ci_low"])
        # The normal approximation of a proportion near one half.
        assert widths[-1] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(episodes), rel=0.25)
    assert widths[1] < widths[0] / 2


def test_questions_of_one_episode_are_not_independent():
    alike = evaluation_lib.summarise(make_records([[e % 2] * 8 for e in range(50)]))
    mixed = evaluation_lib.summarise(make_records([[0, 1] * 4 for _ in range(50)]))
    assert alike["em"] == mixed["em"] == 0.5
    assert alike["ci_high"] - alike["ci_low"] > 0.2
    assert mixed["ci_high"] == mixed["ci_low"] == 0.5


def test_nothing_to_summarise_is_an_error():
    with pytest.raises(ValueError, match="records is empty: nothing was evaluated"):
        evaluation_lib.summarise([])
