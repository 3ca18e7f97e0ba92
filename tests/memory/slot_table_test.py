"""The slot table against its plain-Python definition, and the defects it must not have."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from atommem_jax.memory import embedding, slot_table
from atommem_jax.types import EMPTY, NUM_KINDS, ActionKind, Actions
from tests.helpers import memory_reference as reference

PAD = 0
SLOTS, ENTRY, SCRATCHPAD, QUERY, SHOWN, ACTIONS = 4, 3, 4, 2, 3, 5
READING = set(reference.KINDS) - {reference.ANSWER}
ANSWERING = {reference.READ, reference.ANSWER}
EVERYTHING = set(reference.KINDS)


def _make_coarse_keys():
    """Unit vectors with four entries of ±0.5: their dot products are exact, and often tie."""
    rng = np.random.default_rng(0)
    table = np.zeros((13, 8), np.float32)
    for row in table:
        row[rng.choice(8, 4, replace=False)] = rng.choice([-0.5, 0.5], 4)
    return table


COARSE = _make_coarse_keys()


def coarse_embed(tokens, length):
    position = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
    written = position < length[..., None]
    code = jnp.where(written, tokens * (position + 1), 0).sum(axis=-1) % len(COARSE)
    return jnp.where((length > 0)[..., None], jnp.asarray(COARSE)[code], 0.0)


def coarse_key(text):
    if not text:
        return np.zeros(COARSE.shape[1], np.float32)
    return COARSE[sum(token * (i + 1) for i, token in enumerate(text)) % len(COARSE)]


def coarse_similarity(a, b):
    return sum(float(x) * float(y) for x, y in zip(coarse_key(a), coarse_key(b), strict=True))


def _init(**changes):
    sizes = {
        "slots": SLOTS,
        "entry_length": ENTRY,
        "scratchpad_length": SCRATCHPAD,
        "query_length": QUERY,
        "shown": SHOWN,
        "key_dim": COARSE.shape[1],
    }
    return slot_table.init(**{**sizes, **changes}, pad_id=PAD)


_retrieve = jax.jit(slot_table.retrieve, static_argnums=1)
_set_query = jax.jit(functools.partial(slot_table.set_query, pad_id=PAD))
_transition = jax.jit(slot_table.transition, static_argnames=("eviction", "embed", "pad_id"))


def _pack(actions, width, rows=ACTIONS, junk=9):
    """Reference actions as arrays; what lies beyond a text is junk that must not matter."""
    kind, target, length = np.zeros((3, rows), np.int32)
    text = np.full((rows, width), junk, np.int32)
    well_formed = np.ones(rows, bool)
    for i, action in enumerate(actions):
        kind[i] = ActionKind[action.kind.upper()]
        target[i], length[i], well_formed[i] = action.target, len(action.text), action.well_formed
        text[i, : length[i]] = action.text[:width]
    return Actions(
        kind=kind,
        target=target,
        text=text,
        length=length,
        well_formed=well_formed,
        count=np.int32(len(actions)),
    )


def _permit(kinds):
    return np.array([kind.name.lower() in kinds for kind in ActionKind])


def _turn(state, *actions, permitted=EVERYTHING, eviction="lru", width=5):
    """Applies actions; returns the state and the counts that are not zero."""
    state, report = _transition(
        state,
        _pack(actions, width),
        permitted=_permit(permitted),
        eviction=eviction,
        embed=coarse_embed,
        pad_id=PAD,
    )
    return state, {key: count for key, count in _unpack_report(report).items() if count}


def _unpack_report(report):
    report = jax.device_get(report)
    counts = {}
    for outcome in reference.OUTCOMES:
        column = getattr(report, outcome)
        assert column.shape == (NUM_KINDS,)
        assert column.dtype == np.int32
        assert column[ActionKind.NONE] == 0
        for kind in reference.KINDS:
            counts[outcome, kind] = int(column[ActionKind[kind.upper()]])
    return counts


def _expected_arrays(model):
    """The reference memory, laid out as the fields of MemoryState."""

    def row(text, width):
        return list(text) + [PAD] * (width - len(text))

    blank = reference.Entry([], 0, 0)
    entries = [entry or blank for entry in model.slots]
    return {
        "entries": [row(entry.text, ENTRY) for entry in entries],
        "lengths": [len(entry.text) for entry in entries],
        "keys": [coarse_key(entry.text) for entry in entries],
        "valid": [entry is not None for entry in model.slots],
        "created": [entry.created for entry in entries],
        "touched": [entry.touched for entry in entries],
        "clock": model.clock,
        "scratchpad": row(model.scratchpad, SCRATCHPAD),
        "scratchpad_length": len(model.scratchpad),
        "query": row(model.query, QUERY),
        "query_length": len(model.query),
        "shown": [EMPTY if slot is None else slot for slot in model.shown],
    }


# --- the state machine

TOKENS = st.integers(1, 6)
ACTION = st.builds(
    reference.Action,
    kind=st.sampled_from(
        [reference.CREATE] * 3 + [reference.UPDATE] * 3 + [reference.DELETE] * 2
        + [reference.READ] * 2 + [reference.SCRATCHPAD, reference.ANSWER]
    ),
    target=st.integers(-2, SHOWN + 1),
    text=st.lists(TOKENS, max_size=7),
    well_formed=st.sampled_from([True] * 6 + [False]),
)  # fmt: skip


class Machine(stateful.RuleBasedStateMachine):
    """Drives both memories with the same turns and compares everything after each."""

    def __init__(self, eviction, width):
        super().__init__()
        self.eviction, self.width = eviction, width
        self.state = _init()
        caps = reference.Caps(ENTRY, SCRATCHPAD, QUERY, answer=width, shown=SHOWN)
        # The arrays cannot keep what lies beyond their width, so that is a cap too.
        caps.entry, caps.scratchpad, caps.query = (
            min(cap, width) for cap in (ENTRY, SCRATCHPAD, QUERY)
        )
        self.model = reference.Memory(SLOTS, caps)

    @stateful.rule(
        actions=st.lists(ACTION, max_size=ACTIONS),
        permitted=st.sampled_from([EVERYTHING, READING, READING, ANSWERING]),
        junk=st.integers(0, 9),
    )
    def turn(self, actions, permitted, junk):
        self.state, report = _transition(
            self.state,
            _pack(actions, self.width, junk=junk),
            permitted=_permit(permitted),
            eviction=self.eviction,
            embed=coarse_embed,
            pad_id=PAD,
        )
        assert _unpack_report(report) == self.model.transition(actions, permitted, self.eviction)

    @stateful.rule()
    def retrieve(self):
        self.state, scores = _retrieve(self.state, coarse_embed)
        assert list(np.asarray(scores)) == self.model.retrieve(coarse_similarity)

    @stateful.rule(text=st.lists(TOKENS, max_size=4))
    def set_query(self, text):
        row = np.array(text + [9] * (4 - len(text)), np.int32)
        self.state = _set_query(self.state, row, np.int32(len(text)))
        self.model.query = text[:QUERY]

    @stateful.invariant()
    def agrees(self):
        state = jax.device_get(self.state)
        for field, want in _expected_arrays(self.model).items():
            np.testing.assert_array_equal(getattr(state, field), want, err_msg=field)


@pytest.mark.parametrize(
    ("eviction", "width"), [("lru", 5), ("oldest", 5), ("reject", 5), ("lru", 1)]
)
def test_the_table_agrees_with_its_definition(eviction, width):
    """Width 5 exceeds every cap, width 1 falls short of every one."""
    stateful.run_state_machine_as_test(
        functools.partial(Machine, eviction, width),
        settings=hypothesis.settings(deadline=None, max_examples=40, stateful_step_count=16),
    )


# --- single rules, by hand

create, read, update, delete, scratchpad, answer = (
    functools.partial(reference.Action, kind) for kind in reference.KINDS
)


def _stocked(*texts, query=(1,), **sizes):
    """A memory with these entries in slots 0, 1, ..., of which the first K are shown."""
    state = _init(**sizes)
    for text in texts:
        state, _ = _turn(state, create(text=list(text)))
    row = np.array(list(query) + [PAD] * (4 - len(query)), np.int32)
    return _retrieve(_set_query(state, row, np.int32(len(query))), coarse_embed)[0]


def _texts(state):
    """Entry texts by slot, None where free."""
    state = jax.device_get(state)
    return [
        state.entries[i, : state.lengths[i]].tolist() if state.valid[i] else None
        for i in range(len(state.valid))
    ]


def _number_of(state, slot):
    """Under which number a slot is shown."""
    return np.asarray(state.shown).tolist().index(slot) + 1


def test_memory_starts_empty():
    state = _init()
    assert int(slot_table.occupancy(state)) == 0
    entries, lengths = slot_table.observe(state)
    np.testing.assert_array_equal(entries, np.full((SHOWN, ENTRY), PAD))
    np.testing.assert_array_equal(lengths, [0] * SHOWN)


def test_observe_shows_the_entries_best_first():
    state = _stocked([5], [1], [2, 2])
    entries, lengths = slot_table.observe(state, pad_id=PAD)
    assert int(slot_table.occupancy(state)) == 3
    for number, slot in enumerate(np.asarray(state.shown)):
        np.testing.assert_array_equal(entries[number], state.entries[slot])
        assert lengths[number] == state.lengths[slot]
    np.testing.assert_array_equal(entries[0], [1, PAD, PAD])  # equal to the query


def test_observe_pads_what_is_not_shown():
    entries, lengths = slot_table.observe(_stocked([1]), pad_id=7)
    np.testing.assert_array_equal(entries, [[1, PAD, PAD], [7] * ENTRY, [7] * ENTRY])
    np.testing.assert_array_equal(lengths, [1, 0, 0])


def test_an_entry_deleted_then_updated_in_the_same_turn_stays_deleted():
    state = _stocked([1], [2])
    number = _number_of(state, 1)
    state, report = _turn(state, delete(number), update(number, [5]), delete(number))
    assert _texts(state) == [[1], None, None, None]
    assert report == {
        ("attempted", "delete"): 2,
        ("applied", "delete"): 1,
        ("invalid", "delete"): 1,
        ("attempted", "update"): 1,
        ("invalid", "update"): 1,
    }


def test_the_number_of_a_deleted_entry_does_not_reach_its_successor():
    state = _stocked([1], [2])
    number = _number_of(state, 0)
    state, report = _turn(state, delete(number), create(text=[6]), update(number, [5]))
    assert _texts(state) == [[6], [2], None, None]
    assert report["invalid", "update"] == 1


def test_the_number_of_an_evicted_entry_does_not_reach_its_successor():
    # Full; all shown are touched at once, so slot 3, not shown, is the stalest; then slot 0.
    state = _stocked([1], [1], [1], [2])
    np.testing.assert_array_equal(state.shown, [0, 1, 2])
    state, report = _turn(state, create(text=[5]), create(text=[6]), update(1, [3]), update(2, [4]))
    assert _texts(state) == [[6], [4], [1], [5]]
    np.testing.assert_array_equal(state.shown, [EMPTY, 1, 2])
    assert report == {
        ("attempted", "create"): 2,
        ("applied", "create"): 2,
        ("evicted", "create"): 2,
        ("attempted", "update"): 2,
        ("applied", "update"): 1,
        ("invalid", "update"): 1,
    }


def test_eviction_policies_differ_on_an_updated_entry():
    kept = {}
    for eviction in slot_table.EVICTION_POLICIES:
        state = _stocked([1], [1], [1], [2])  # slot 3 is not shown
        state, report = _turn(
            state, delete(3), create(text=[3]), create(text=[4]), eviction=eviction
        )
        kept[eviction] = _texts(state), report.get(("rejected", "create"), 0)
    assert kept == {
        "lru": ([[1], [1], [3], [4]], 0),  # slot 3 was never shown
        "oldest": ([[4], [1], [3], [2]], 0),  # slot 0 came first
        "reject": ([[1], [1], [3], [2]], 1),
    }


def test_update_keeps_the_slot_and_its_creation_time():
    before = _stocked([1], [2])
    state, _ = _turn(before, update(_number_of(before, 0), [5, 5]))
    assert _texts(state)[0] == [5, 5]
    np.testing.assert_array_equal(state.created, before.created)
    assert int(state.touched[0]) == int(state.clock) == int(before.clock) + 1
    np.testing.assert_array_equal(state.keys[0], coarse_key([5, 5]))


def test_the_clock_counts_showings_and_applied_actions():
    state = _init()
    state, _ = _retrieve(state, coarse_embed)
    assert int(state.clock) == 0  # no query
    state, _ = _turn(state, read(text=[1]))
    state, _ = _retrieve(state, coarse_embed)
    assert int(state.clock) == 1  # nothing to show
    state, _ = _turn(state, create(text=[1]), create(), answer(text=[1]), update(3, [1]))
    assert int(state.clock) == 2  # one of the four changed memory
    state, _ = _retrieve(state, coarse_embed)
    assert int(state.clock) == int(state.touched[0]) == 3
    state, _ = _turn(state)
    assert int(state.clock) == 3


def test_what_a_read_finds_is_seen_on_the_next_turn():
    state = _stocked([1], [2], query=())
    state, _ = _turn(state, read(text=[1]), read(text=[2]), update(1, [4]))
    np.testing.assert_array_equal(state.shown, [EMPTY] * SHOWN)  # and the update was invalid
    assert _texts(state)[:2] == [[1], [2]]
    state, scores = _retrieve(state, coarse_embed)
    assert int(state.shown[0]) == 1  # the last read of the turn counts
    assert float(scores[0]) == 1.0


def test_an_answer_counts_but_changes_nothing():
    before = _stocked([1], [2])
    after, report = _turn(before, answer(text=[3, 4]), permitted=ANSWERING)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert report == {("attempted", "answer"): 1, ("applied", "answer"): 1}
    after, report = _turn(before, answer(), permitted=ANSWERING)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert report == {("attempted", "answer"): 1, ("invalid", "answer"): 1}


# --- retrieval in numbers

HASHED = embedding.HashedBagOfTokens(vocab_size=60, dim=100)


def _fill_at_random(rng, slots, entry_length=6, shown=5):
    """A full-grown state with HASHED keys, some slots free."""
    state = _init(
        slots=slots, entry_length=entry_length, query_length=6, shown=shown, key_dim=HASHED.dim
    )
    entries = rng.integers(1, 60, (slots, entry_length)).astype(np.int32)
    lengths = rng.integers(1, entry_length + 1, slots).astype(np.int32)
    valid = rng.random(slots) < 0.8
    entries[(np.arange(entry_length) >= lengths[:, None]) | ~valid[:, None]] = PAD
    keys = np.where(valid[:, None], HASHED(jnp.array(entries), jnp.array(lengths)), 0)
    return state.replace(
        entries=jnp.array(entries),
        lengths=jnp.array(np.where(valid, lengths, 0)),
        keys=_round(keys),
        valid=jnp.array(valid),
        query=jnp.array(rng.integers(1, 60, 6), jnp.int32),
        query_length=jnp.int32(rng.integers(1, 7)),
    )


def _round(keys):
    """Keys as the table holds them: to the nearest multiple of 2**-11, halves to even."""
    return jnp.array(np.rint(np.asarray(keys, np.float64) * 2048) / 2048, jnp.float32)


@pytest.mark.parametrize("seed", range(4))
def test_retrieval_finds_the_highest_cosines(seed):
    """Bit for bit those of the rounded keys in float64, and close to the true cosines."""
    state = _fill_at_random(np.random.default_rng(seed), slots=40)
    after, scores = _retrieve(state, HASHED)
    key = np.asarray(HASHED(state.query, state.query_length), np.float64)
    rounded = np.asarray(_round(key), np.float64)
    cosines = np.where(state.valid, np.asarray(state.keys, np.float64) @ rounded, -np.inf)
    shown = np.asarray(after.shown)
    np.testing.assert_array_equal(np.asarray(scores, np.float64), cosines[shown])
    np.testing.assert_array_equal(np.sort(cosines)[::-1][:5], cosines[shown])
    true = np.asarray(HASHED(state.entries, state.lengths), np.float64) @ key
    np.testing.assert_allclose(scores, true[shown], atol=HASHED.dim**0.5 / 2048, rtol=0)
    assert len(set(shown.tolist())) == 5
    assert (np.diff(scores) <= 0).all()


def test_equal_entries_tie_to_the_lower_slot():
    """Sums in different order would rank some of 37 equal rows above others."""
    state = _fill_at_random(np.random.default_rng(0), slots=37)
    key = HASHED(jnp.array([3, 5, 7], jnp.int32), jnp.int32(3))
    state = state.replace(keys=jnp.tile(_round(key), (37, 1)), valid=jnp.arange(37) % 3 > 0)
    after, scores = _retrieve(state, HASHED)
    np.testing.assert_array_equal(after.shown, [1, 2, 4, 5, 7])
    assert len(set(np.asarray(scores).tolist())) == 1


def test_a_batch_equals_its_single_trajectories_bit_for_bit():
    batch, slots = 5, 37  # no multiple of a vector register
    rng = np.random.default_rng(5)
    singles = [_fill_at_random(rng, slots) for _ in range(batch)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *singles)

    def turn(state, actions):
        state, scores = slot_table.retrieve(state, HASHED)
        state, report = slot_table.transition(
            state,
            actions,
            permitted=jnp.array(_permit(READING)),
            eviction="lru",
            embed=HASHED,
            pad_id=PAD,
        )
        return state, scores, report

    one, many = jax.jit(turn), jax.jit(jax.vmap(turn))
    for _ in range(3):
        actions = [_pack(_draw_actions(rng), width=8) for _ in range(batch)]
        together, *results = many(together, jax.tree.map(lambda *x: np.stack(x), *actions))
        for i in range(batch):
            singles[i], *result = one(singles[i], actions[i])
            jax.tree.map(
                lambda all_, own, i=i: np.testing.assert_array_equal(all_[i], own),
                (together, results),
                (singles[i], result),
            )


def _draw_actions(rng):
    return [
        reference.Action(
            str(rng.choice(reference.KINDS)),
            int(rng.integers(0, 7)),
            rng.integers(1, 60, rng.integers(0, 10)).tolist(),
        )
        for _ in range(rng.integers(0, ACTIONS + 1))
    ]


# --- defects of the public code (design notes, "paper")


def test_defect_1_siblings_keep_their_equal_entries():
    """Two trajectories hold the same text; one deletes it, the other updates nothing."""
    state = _stocked([1], [2])
    pair = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    actions = [_pack([delete(1), update(2, [6])], 5), _pack([], 5)]
    step = jax.vmap(
        functools.partial(
            slot_table.transition,
            permitted=jnp.array(_permit(READING)),
            eviction="lru",
            embed=coarse_embed,
            pad_id=PAD,
        )
    )
    after, _ = jax.jit(step)(pair, jax.tree.map(lambda *x: np.stack(x), *actions))
    first, second = (jax.tree.map(lambda x, i=i: x[i], after) for i in range(2))
    assert [1] not in _texts(first)
    assert [6] in _texts(first)
    jax.tree.map(np.testing.assert_array_equal, second, state)


@pytest.mark.parametrize("target", [-1, 0, 2, SHOWN, SHOWN + 1, 1000])
def test_defect_2_an_edit_of_what_is_not_shown_does_nothing_and_counts_as_invalid(target):
    before = _stocked([1])  # one entry, shown as Memory 1
    after, report = _turn(before, update(target, [5]), delete(target))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert report == {
        ("attempted", "update"): 1,
        ("invalid", "update"): 1,
        ("attempted", "delete"): 1,
        ("invalid", "delete"): 1,
    }


def test_defect_3_a_bad_action_does_not_stop_the_ones_after_it():
    state, report = _turn(
        _init(),
        create(text=[1], well_formed=False),
        create(),
        update(1, [2]),
        create(text=[3]),
        scratchpad(text=[4]),
    )
    assert _texts(state) == [[3], None, None, None]
    np.testing.assert_array_equal(state.scratchpad, [4, PAD, PAD, PAD])
    assert report["invalid", "create"] == 2
    assert report["invalid", "update"] == 1
    assert report["applied", "create"] == report["applied", "scratchpad"] == 1


def test_defect_4_a_large_batch_takes_no_places_from_a_trajectory():
    """Sixteen siblings match the query perfectly; the one that does not still sees its own."""
    good = _stocked([1], [1], [1])
    poor = _stocked([2], [3], [4])
    batch = jax.tree.map(lambda a, b: jnp.stack([a] * 16 + [b]), good, poor)
    after, _ = jax.jit(jax.vmap(lambda state: slot_table.retrieve(state, coarse_embed)))(batch)
    assert sorted(np.asarray(after.shown[-1]).tolist()) == [0, 1, 2]


def test_defect_9_a_new_question_replaces_the_query_of_the_last():
    state, _ = _turn(_stocked([1], [2]), read(text=[6, 5]))
    state = _set_query(state, np.array([2, 9, 9, 9], np.int32), np.int32(1))
    np.testing.assert_array_equal(state.query, [2, PAD])
    state, _ = _retrieve(state, coarse_embed)
    assert int(state.shown[0]) == 1
    clock = int(state.clock)
    state = _set_query(state, np.full(4, 9, np.int32), np.int32(0))
    state, _ = _retrieve(state, coarse_embed)
    np.testing.assert_array_equal(state.shown, [EMPTY] * SHOWN)
    assert int(state.clock) == clock


def test_defect_10_every_text_has_a_cap():
    state, report = _turn(
        _init(),
        scratchpad(text=[1, 2, 3, 4, 5, 6]),
        create(text=[1, 2, 3, 4, 5, 6]),
        read(text=[1, 2, 3, 4, 5, 6]),
    )
    np.testing.assert_array_equal(state.scratchpad, [1, 2, 3, 4])
    assert _texts(state)[0] == [1, 2, 3]
    np.testing.assert_array_equal(state.query, [1, 2])
    for kind in ("scratchpad", "create", "read"):
        assert report["truncated", kind] == report["applied", kind] == 1
    state, _ = _turn(state, scratchpad())
    np.testing.assert_array_equal(state.scratchpad, [PAD] * SCRATCHPAD)
    assert int(state.scratchpad_length) == 0


def test_defect_10_no_answer_while_reading():
    _, report = _turn(_init(), answer(text=[1]), permitted=READING)
    assert report == {("attempted", "answer"): 1, ("invalid", "answer"): 1}


# --- errors


def test_init_names_the_size_that_is_wrong():
    with pytest.raises(ValueError, match="query_length=0: must be at least 1"):
        _init(query_length=0)
    with pytest.raises(ValueError, match="shown=5: must be at most slots=4"):
        _init(shown=5)


def test_transition_names_the_eviction_policies():
    with pytest.raises(ValueError, match=r"eviction='fifo': must be one of \('lru', 'oldest'"):
        _turn(_init(), eviction="fifo")


def test_a_batch_axis_that_was_not_mapped_is_refused():
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), _init())
    with pytest.raises(AssertionError, match="rank"):
        slot_table.retrieve(batch, coarse_embed)


def test_linked_entries_are_near_to_those_found_and_not_to_the_query():
    """By hand: cosines to the query (1, 0) are .8, .75, .5, -1; of the first and third .92."""
    table = jnp.asarray([[0.0, 0.0], [0.8, 0.6], [0.75, -0.66], [0.5, 0.866], [-1.0, 0.0], [1, 0]])

    def embed(tokens, length):
        return jnp.where(length > 0, table[tokens[0]], 0.0)

    state = slot_table.init(
        slots=5, entry_length=1, scratchpad_length=1, query_length=1, shown=2, key_dim=2, pad_id=0
    )
    lengths = jnp.asarray([1, 1, 1, 1, 0])
    state = slot_table.fill(state, jnp.asarray([[1], [2], [3], [4], [4]]), lengths, embed, 0)
    assert state.created.tolist() == [1, 2, 3, 4, 0]
    assert int(state.clock) == 4
    state = slot_table.set_query(state, jnp.asarray([5]), jnp.int32(1), 0)
    near, scores = slot_table.retrieve(state, embed)
    assert near.shown.tolist() == [0, 1]
    linked, scores = slot_table.retrieve(state, embed, linked=1)
    assert linked.shown.tolist() == [0, 2]
    np.testing.assert_allclose(scores, [0.8, 0.5], atol=1e-3)
    one = dataclasses.replace(state, valid=state.valid.at[1:].set(False))
    assert slot_table.retrieve(one, embed, linked=1)[0].shown.tolist() == [0, EMPTY]
