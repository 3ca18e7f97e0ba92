"""A session plays what the jitted rollout plays."""

import jax
import numpy as np
import pytest

from experiments import session
from tests import tiny


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


def test_a_session_goes_on_with_a_memory():
    params = tiny.make_params(scale=0.3)
    episodes, _ = tiny.make_episodes([1, 2])
    first, second = (jax.tree.map(lambda x, i=i: x[i], episodes) for i in range(2))
    setting = tiny.make_parts().setting(tiny.make_shape())
    respond = session.model_responder(tiny.make_parts().agent, params, 0.0)
    one = session.Session(setting, respond, first)
    with pytest.raises(ValueError, match="no turn has been played"):
        one.trajectory()
    *_, last = one.turns()
    two = session.Session(setting, respond, second, table=last.after)
    np.testing.assert_array_equal(two.memory.entries, last.after.entries)
    assert int(next(two.turns()).before.clock) >= int(last.after.clock)
