"""A session plays what the jitted rollout plays."""

import jax
import numpy as np
import pytest

from atommem_jax.documents import session
from atommem_jax.report import trace
from tests.helpers import tiny


def test_a_session_is_the_rollout_of_its_trajectory():
    params = tiny.make_params(scale=0.3)
    episodes, _ = tiny.make_episodes([0, 3])
    expected = tiny.play(params, episodes, [5, 9], seed=4)
    setting = tiny.make_parts().setting(tiny.make_shape())
    respond = session.model_responder(tiny.make_parts().agent, params, 1.0)
    played = session.Session(
        setting,
        respond,
        jax.tree.map(lambda x: x[1], episodes),
        trajectory_id=9,
        seed=4,
    )
    turns = list(played.turns())
    count = int(expected.turns.live[1].sum())
    assert len(turns) == count
    one = played.trajectory()
    # Alone it is a group of its own, read at a width of its own.
    grouped = jax.tree.map(lambda x: x[1:, :count], expected.turns)
    alone = one.turns.replace(width=grouped.width, lanes=grouped.lanes)
    one = one.replace(turns=alone)

    def check(whole, found):
        whole, found = np.asarray(whole)[1], np.asarray(found)[0]
        if np.issubdtype(whole.dtype, np.floating):
            np.testing.assert_allclose(found, whole, atol=1e-5)
        else:
            np.testing.assert_array_equal(found, whole)

    jax.tree.map(
        check, expected.replace(turns=jax.tree.map(lambda x: x[:, :count], expected.turns)), one
    )
    np.testing.assert_array_equal(turns[-1].after.entries, one.memory.entries[0])
    # The rollout's prompts have their full width, those of the session hardly any padding.
    agent, width = tiny.make_parts().agent, setting.limits.prompt_width
    lengths = one.turns.prompt_lengths[0]
    widths = {session.choose_width(agent, width, int(length)) for length in lengths}
    assert len(widths) > 1
    assert max(widths) <= width


@pytest.mark.parametrize(
    ("length", "width"), [(0, 13), (13, 13), (14, 25), (25, 25), (37, 37), (38, 49), (49, 49)]
)
def test_the_least_of_four_widths_holds_a_prompt(length, width):
    assert session.choose_width(tiny.make_parts().agent, 49, length) == width


def test_widths_are_multiples_of_what_the_kernel_needs(monkeypatch):
    monkeypatch.setattr(session.attention, "row_multiple", lambda *_: 128)
    found = [session.choose_width(tiny.make_parts().agent, 640, n) for n in (1, 257, 400, 600)]
    assert found == [256, 384, 512, 640]


def test_a_session_goes_on_with_a_memory():
    params = tiny.make_params(scale=0.3)
    episodes, aliases = tiny.make_episodes([1, 2])
    first, second = (jax.tree.map(lambda x, i=i: x[i], episodes) for i in range(2))
    setting = tiny.make_parts().setting(tiny.make_shape())
    respond = session.model_responder(tiny.make_parts().agent, params, 0.0)
    one = session.Session(setting, respond, first)
    with pytest.raises(ValueError, match="no turn was kept"):
        one.trajectory()
    *_, last = one.turns()
    two = session.Session(setting, respond, second, table=last.after)
    np.testing.assert_array_equal(two.memory.entries, last.after.entries)
    turns = list(two.turns())
    assert int(turns[0].before.clock) >= int(last.after.clock)

    # Described turn by turn it is what its replay finds, from the memory that it started with.
    tokenizer, start = tiny.make_tokenizer(), jax.tree.map(lambda x: x[None], last.after)
    played = (setting, two.trajectory(), two.episode, tokenizer, [aliases[1]])
    (whole,) = trace.describe(*played, start=start)
    told = [
        trace.describe_turn(setting, tokenizer, turn.before, turn.after, turn.record)
        for turn in turns
    ]
    assert whole["turns"] == told
    valid = np.flatnonzero(last.after.valid)
    assert [entry["slot"] for entry in whole["start"]] == valid.tolist()
    table = {entry["slot"]: entry["text"] for entry in whole["start"]}
    assert table
    for turn in told:
        assert all(table[entry["slot"]] == entry["text"] for entry in turn["shown"])
        for change in turn["changes"]:
            assert change["before"] == table.pop(change["slot"], None)
            if change["after"] is not None:
                table[change["slot"]] = change["after"]
    left = trace.describe_table(two.memory, tokenizer)
    assert table == {entry["slot"]: entry["text"] for entry in left}
    with pytest.raises(ValueError, match="the memory that it started from"):
        trace.describe(*played, start=jax.tree.map(lambda x: x[None], turns[-1].after))


def test_without_gold_nothing_is_scored():
    params = tiny.make_params(scale=0.3)
    episodes, aliases = tiny.make_episodes([1])
    setting = tiny.make_parts().setting(tiny.make_shape())
    respond = session.model_responder(tiny.make_parts().agent, params, 0.0)
    played = session.Session(setting, respond, jax.tree.map(lambda x: x[0], episodes))
    for _ in played.turns():
        pass
    rest = (setting, played.trajectory(), played.episode, tiny.make_tokenizer())
    (scored,) = trace.describe(*rest, aliases)
    (unscored,) = trace.describe(*rest, [[[] for _ in aliases[0]]])
    assert scored["em"] in (0.0, 0.5, 1.0)
    assert unscored["em"] is None
    assert all(q["em"] is None and q["gold"] == [] for q in unscored["questions"])
    assert unscored["turns"] == scored["turns"]
