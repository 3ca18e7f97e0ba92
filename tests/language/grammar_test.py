"""Tests of atommem_jax.language.grammar, and through it of automaton and token_tables."""

import functools
import itertools
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from atommem_jax.language import grammar as grammar_lib
from atommem_jax.language import protocol as protocol_lib
from atommem_jax.language import tokenizer as tokenizer_lib
from atommem_jax.types import ActionKind, Phase
from tests.helpers import grammar_reference as reference

A, X, R = 3, 4, 32  # actions a turn, width of their text, width of a response
PHASES = (Phase.READING, Phase.ANSWERING, Phase.FINAL)
TEXTS = [
    "Anna works at Acme.",
    "Where does Bob live?",
    "a < b, and <b>bold</b> of Memory 3: it.",
]


class Case:
    """A protocol with its tokenizer, grammar and compiled functions."""

    def __init__(self, protocol, tokenizer):
        self.protocol, self.tokenizer = protocol, tokenizer
        self.grammar = grammar_lib.compile_grammar(protocol, tokenizer, max_actions=A, max_text=X)
        self.parse = jax.jit(self.grammar.parse)
        self.masks = jax.jit(self.grammar.masks)
        self.allowed = jax.jit(self.grammar.allowed)
        self.advance = jax.jit(self.grammar.advance)
        self.literals = [*protocol.reserved_names(), "Memory 0:", "Memory 99:", "Memory 2x", "<3>"]

    def spell(self, *parts: str) -> list[int]:
        """The ids of a turn given in parts: tags and targets by name, other parts as text."""
        known, ids = self.protocol.reserved_names(), []
        for part in parts:
            spelled = protocol_lib.spell(self.tokenizer, part)
            ids += spelled if part in known else self.tokenizer.encode(part)
        return ids

    def pad(self, ids, width: int = R) -> jax.Array:
        assert len(ids) <= width
        return jnp.asarray([*ids, *[self.tokenizer.pad_id] * (width - len(ids))], jnp.int32)

    def admits(self, phase: Phase, ids) -> bool:
        """Whether the masks let a turn of exactly these tokens through, in a budget of R."""
        response = self.pad(ids)
        return bool(self.masks(phase, response)[np.arange(R), np.asarray(response)].all())


@functools.cache
def compact_case(free_text: bool = False) -> Case:
    protocol = protocol_lib.compact(2, free_text=free_text)
    names = [*protocol.reserved_names(), "<unused>"]
    return Case(protocol, tokenizer_lib.SentencePieceTokenizer.train(TEXTS * 3, 400, names))


@functools.cache
def atommem_case(free_text: bool = False) -> Case:
    protocol = protocol_lib.atommem(12, free_text=free_text)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Without the usual splitting into words, merges cross tags, targets and texts alike.
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    turns = [
        "<create_memory>Anna.</create_memory><read_memory>Bob?</read_memory>",
        "<update_memory>Memory 12: Anna</update_memory><scratchpad>Bob</scratchpad>",
        "<delete_memory>Memory 3</delete_memory><delete_memory>Memory 1</delete_memory>",
        "<answer>Acme</answer>",
    ]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|pad|>", "<|other|>"],
        show_progress=False,
    )
    bpe.train_from_iterator([*turns, *TEXTS], trainer)
    tokenizer = tokenizer_lib.HuggingFaceTokenizer(bpe, eos_token="<|end|>", pad_token="<|pad|>")
    return Case(protocol, tokenizer)


CASES = pytest.mark.parametrize("case", [compact_case, atommem_case])
ALL_CASES = pytest.mark.parametrize(
    ("case", "free_text"), list(itertools.product([compact_case, atommem_case], [False, True]))
)


WORDS = ["Anna", " works", ".", "<", "</", ">", "<c", "<<", "</end>", " ", "7", "Memory 1", "_"]


def make_actions(case: Case, texts: list[str]) -> st.SearchStrategy[list[int]]:
    """Actions that are mostly right; targets may be out of range, and texts empty."""
    numbers = st.integers(0, case.protocol.max_target + 1) | st.just(1)
    strings = st.lists(st.sampled_from(texts), max_size=3).map("".join)

    def write(tag, number, text, whole):
        target = [tag.target.replace("{}", str(number))] if tag.target else []
        body = [] if tag.kind == ActionKind.DELETE else [text]
        parts = [tag.open, *target, *body, tag.close]
        # As a model that thinks in tags would cut it, or as the tokenizer cuts the whole.
        return case.tokenizer.encode("".join(parts)) if whole else case.spell(*parts)

    whole = st.just(False) if "<end>" in case.tokenizer.reserved else st.booleans()
    return st.builds(write, st.sampled_from(case.protocol.tags), numbers, strings, whole)


def make_streams(case: Case) -> st.SearchStrategy[list[int]]:
    """Token streams rich in tags, whole and in part, and in tokens that straddle tags."""
    strings = st.lists(st.sampled_from([*case.literals, *WORDS]), max_size=6).map("".join)
    pieces = st.one_of(
        make_actions(case, [*case.literals, *WORDS]),
        make_actions(case, WORDS),
        st.sampled_from(case.literals).map(lambda literal: case.spell(literal)),
        strings.map(case.tokenizer.encode),
        st.lists(st.integers(0, case.tokenizer.vocab_size - 1), max_size=3),
        st.sampled_from([[], [], [case.tokenizer.eos_id]]),
    )
    return st.lists(pieces, max_size=7).map(lambda parts: list(itertools.chain(*parts))[:R])


def make_turns(case: Case) -> st.SearchStrategy[list[int]]:
    """Whole turns, half of them with one token added, lost or exchanged."""

    def change(parts, at, token, how):
        ids = list(itertools.chain(*parts))[: R - 1]
        at %= len(ids) + 1
        ids = ids[:at] + [token] * (how != "lose") + ids[at + (how != "add") :]
        return [*ids[: R - 1], case.tokenizer.eos_id]

    parts = st.lists(make_actions(case, WORDS), max_size=A + 1)
    parts = parts | make_actions(case, WORDS).map(lambda action: [action])
    whole = parts.map(lambda p: [*list(itertools.chain(*p))[: R - 1], case.tokenizer.eos_id])
    tokens = st.integers(0, case.tokenizer.vocab_size - 1)
    tokens |= st.sampled_from([case.spell(literal)[0] for literal in case.literals])
    how = st.sampled_from(["add", "lose", "exchange"])
    return whole | st.builds(change, parts, st.integers(0, R), tokens, how)


def assert_parses_as(case: Case, ids, length: int) -> None:
    actions = jax.device_get(case.parse(case.pad(ids), length))
    expected = reference.parse(case.protocol, case.tokenizer, ids, length)[:A]
    assert actions.count == len(expected)
    for i, row in enumerate(expected):
        assert actions.kind[i] == row.kind
        assert actions.target[i] == row.target
        assert actions.length[i] == len(row.text)
        cut = row.text[:X]
        assert actions.text[i].tolist() == cut + [case.tokenizer.pad_id] * (X - len(cut))
        assert actions.well_formed[i] == row.well_formed
    for field in (actions.kind, actions.target, actions.length, actions.well_formed):
        assert not field[len(expected) :].any()
    assert (actions.text[len(expected) :] == case.tokenizer.pad_id).all()


@CASES
@hypothesis.settings(deadline=None, max_examples=250)
@hypothesis.given(data=st.data())
def test_parse_agrees_with_the_reference(case, data):
    case = case()
    ids = data.draw(make_streams(case))
    assert_parses_as(case, ids, data.draw(st.integers(max(0, len(ids) - 3), R)))


@ALL_CASES
@hypothesis.settings(deadline=None, max_examples=120)
@hypothesis.given(data=st.data())
def test_masks_admit_exactly_the_turns_of_the_reference(case, free_text, data):
    case = case(free_text)
    ids = data.draw(make_turns(case))
    for phase in PHASES:
        expected = reference.is_turn(case.protocol, case.tokenizer, phase, ids, A)
        assert case.admits(phase, ids) == expected, phase.name


TINY_TAGS = (
    protocol_lib.Tag(ActionKind.CREATE, "<c>", "</c>"),
    protocol_lib.Tag(ActionKind.DELETE, "<d>", "</d>", "{}"),
    protocol_lib.Tag(ActionKind.ANSWER, "<a>", "</a>"),
)


@pytest.mark.parametrize(
    "pieces",
    [
        (b"<c>", b"</c>", b"<d>", b"</d>", b"1", b"x", b"<", b"c>"),
        (b"<a>", b"</a>", b"x</", b"a>", b">x", b"<a", b"<", b"/"),
        (b"<d>1", b"</d>", b"1<", b"/d>", b"<c>x", b"x", b"</c><", b"d>2"),
    ],
)
def test_masks_admit_exactly_the_turns_of_the_reference_exhaustively(pieces):
    width, tokens = 5, (b"", b"", *pieces)
    tokenizer = types.SimpleNamespace(
        vocab_size=len(tokens), pad_id=0, eos_id=1, reserved={}, token_bytes=tokens
    )
    letters = tuple(bytes([byte]) for byte in b"</>acd1")  # some turn must exist in every phase
    tokenizer.token_bytes += letters
    tokenizer.vocab_size += len(letters)
    protocol = protocol_lib.Protocol("tiny", TINY_TAGS, max_target=1)
    grammar = grammar_lib.compile_grammar(protocol, tokenizer, max_actions=2, max_text=2)
    every = np.array(list(itertools.product(range(len(tokens)), repeat=width)), np.int32)

    @jax.jit
    def admit(phase, responses):
        masks = jax.vmap(grammar.masks, (None, 0))(phase, responses)
        whole = jax.vmap(grammar.admits, (None, 0, None))(phase, responses, width)
        begun = jax.vmap(grammar.admits, (None, 0, None))(phase, responses, 2)
        return jnp.take_along_axis(masks, responses[:, :, None], 2)[..., 0], whole, begun

    phases = [phase for phase in PHASES if grammar.min_tokens(phase) <= width]
    admitted = {}
    for phase in phases:
        taken, whole, begun = map(np.asarray, admit(phase, every))
        admitted[phase] = taken.all(1)
        np.testing.assert_array_equal(whole, admitted[phase])
        np.testing.assert_array_equal(begun, taken[:, :2].all(1))
    assert sum(map(np.sum, admitted.values())) > 1  # more than the empty turn
    ends = (every == tokenizer.eos_id).any(1) & (every[:, -1] <= tokenizer.eos_id)
    for phase in phases:
        assert not admitted[phase][~ends].any()
        for i in {*np.flatnonzero(ends)[::3], *np.flatnonzero(admitted[phase])}:
            expected = reference.is_turn(protocol, tokenizer, phase, every[i].tolist(), 2)
            assert admitted[phase][i] == expected, (phase.name, every[i])


@functools.cache
def make_walk(case):
    """Jitted: 48 random turns under the masks, classes of tokens equally likely."""
    grammar = case().grammar
    sizes = jnp.bincount(grammar.classes, length=grammar.step.shape[1])
    weights = -jnp.log(sizes.astype(jnp.float32))[grammar.classes]

    def walk(key, phase, budget):
        def step(state, inputs):
            key, remaining = inputs
            mask = grammar.allowed(state, remaining)
            token = jax.random.categorical(key, jnp.where(mask, weights, -jnp.inf))
            return grammar.advance(state, token.astype(jnp.int32)), token

        remaining = budget - jnp.arange(R, dtype=jnp.int32)
        return jax.lax.scan(step, grammar.start(phase), (jax.random.split(key, R), remaining))[1]

    return jax.jit(jax.vmap(walk, (0, None, None)))


@CASES
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("extra", [0, 1, 5, None])
def test_masked_turns_end_well_within_their_budget(case, phase, extra):
    walk, case = make_walk(case), case()
    least = case.grammar.min_tokens(phase)
    budget = R if extra is None else least + extra
    turns = np.asarray(walk(jax.random.split(jax.random.key(7), 48), jnp.int32(phase), budget))
    lengths = (turns == case.tokenizer.eos_id).argmax(1) + 1
    assert least <= lengths.min()
    assert lengths.max() <= budget
    for turn, length in zip(turns.tolist(), lengths.tolist(), strict=True):
        assert reference.is_turn(case.protocol, case.tokenizer, phase, turn, A)
        actions = jax.device_get(case.parse(case.pad(turn), length))
        assert actions.well_formed[: actions.count].all()
        expected = reference.parse(case.protocol, case.tokenizer, turn, length)
        assert actions.kind[: actions.count].tolist() == [row.kind for row in expected]
    if phase == Phase.READING and extra is None:  # the walks do go everywhere
        kinds = {
            row.kind for t in turns for row in reference.parse(case.protocol, case.tokenizer, t, R)
        }
        assert kinds == set(ActionKind) - {ActionKind.NONE, ActionKind.ANSWER}


def test_shortest_turns_are_counted_in_tokens():
    grammar = compact_case().grammar
    # eos; open, one token of text, end, eos.
    assert [grammar.min_tokens(phase) for phase in Phase] == [1, 4, 4, 0]


@CASES
def test_states_and_masks_are_those_of_single_steps(case):
    case = case()
    grammar = case.grammar
    tags = case.protocol.reserved_names()
    turn = [*case.spell(tags[0], "Anna", tags[1]), case.tokenizer.eos_id]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, case.tokenizer.vocab_size, R).tolist()
    for phase, ids in [(Phase.READING, turn), (Phase.ANSWERING, noise), (Phase.DONE, [])]:
        response = case.pad(ids)
        states = jax.jit(grammar.states)(phase, response)
        masks = case.masks(phase, response)
        state = grammar.start(phase)
        for r in range(R):
            assert states[r] == state
            np.testing.assert_array_equal(masks[r], case.allowed(state, R - r))
            assert masks[r].any()
            state = case.advance(state, response[r])


@CASES
def test_batches_equal_single_trajectories(case):
    case = case()
    rng = np.random.default_rng(1)
    tags = [case.spell(literal) for literal in case.literals]
    rows = []
    for _ in range(8):
        noise = rng.integers(0, 300, (9, 2)).tolist()
        parts = [tags[rng.integers(len(tags))] + tokens for tokens in noise]
        rows.append(case.pad(list(itertools.chain(*parts))[:R]))
    responses, lengths = jnp.stack(rows), jnp.arange(8, dtype=jnp.int32) * 4 + 3
    phases = jnp.arange(8, dtype=jnp.int32) % 4
    batch = jax.jit(jax.vmap(case.grammar.parse))(responses, lengths)
    masks = jax.jit(jax.vmap(case.grammar.masks))(phases, responses)
    for i in range(8):
        single = case.parse(responses[i], lengths[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), batch, single)
        np.testing.assert_array_equal(masks[i], case.masks(phases[i], responses[i]))


def test_only_pad_follows_eos_and_only_eos_a_broken_turn():
    case = compact_case()
    eos, pad = case.tokenizer.eos_id, case.tokenizer.pad_id
    response = case.pad([*case.spell("Anna"), eos])  # free text is not admitted
    masks = np.asarray(case.masks(Phase.READING, response))
    assert np.flatnonzero(masks[1]).tolist() == [eos]
    assert np.flatnonzero(masks[-1]).tolist() == [pad]
    assert np.flatnonzero(case.masks(Phase.DONE, response)[0]).tolist() == [pad]


def test_parse_of_a_turn_worked_by_hand():
    case = compact_case()
    [anna] = case.spell("Anna")
    ids = case.spell(
        "<update>", "<2>", "Anna", "<end>", "noise", "<end>", "<delete>", "<1>", "<end>"
    )
    ids += [*case.spell("<create>", "Anna"), case.tokenizer.eos_id, *case.spell("<read>")]
    actions = case.parse(case.pad(ids), len(ids))
    assert actions.kind.tolist() == [ActionKind.UPDATE, ActionKind.DELETE, ActionKind.CREATE]
    assert actions.target.tolist() == [2, 1, 0]
    assert actions.text.tolist() == [[anna, 0, 0, 0], [0, 0, 0, 0], [anna, 0, 0, 0]]
    assert actions.length.tolist() == [1, 0, 1]
    assert actions.well_formed.tolist() == [True, True, False]
    assert actions.count == 3


@pytest.mark.parametrize(
    ("turn", "kind", "target", "text", "well_formed"),
    [
        ("<update_memory>Memory 7: x y</update_memory>", "UPDATE", 7, " x y", True),
        ("<update_memory>Memory 99: x</update_memory>", "UPDATE", 0, " x", True),
        ("<update_memory>Memory 0: x</update_memory>", "UPDATE", 0, " x", True),
        ("<update_memory>Memory x: y</update_memory>", "UPDATE", 0, "Memory x: y", False),
        ("<update_memory>y</update_memory>", "UPDATE", 0, "y", False),
        ("<update_memory></update_memory>", "UPDATE", 0, "", False),
        ("<delete_memory>Memory 12</delete_memory>", "DELETE", 12, "", True),
        ("<delete_memory>Memory 3 now</delete_memory>", "DELETE", 3, " now", False),
        ("<delete_memory>Memory 3", "DELETE", 3, "", False),
        ("<create_memory></create_memory>", "CREATE", 0, "", True),
        ("<create_memory>x</answer>y</create_memory>", "CREATE", 0, "x</answer>y", True),
        ("x</create_memory> <answer>a < b</answer> y", "ANSWER", 0, "a < b", True),
    ],
)
def test_parse_of_the_paper_tags_byte_by_byte(turn, kind, target, text, well_formed):
    case = atommem_case()
    of_byte = {piece: i for i, piece in enumerate(case.tokenizer.token_bytes) if len(piece) == 1}
    ids = [of_byte[bytes([byte])] for byte in turn.encode()]
    actions = parse_wide(case, ids)
    assert actions.count == 1
    assert actions.kind[0] == ActionKind[kind]
    assert actions.target[0] == target
    assert actions.length[0] == len(text)
    assert case.tokenizer.decode(actions.text[0].tolist()) == text[:X]
    assert actions.well_formed[0] == well_formed


def parse_wide(case, ids):
    width = 64
    return _PARSE_WIDE(case.grammar, case.pad(ids, width), len(ids))


_PARSE_WIDE = jax.jit(grammar_lib.Grammar.parse)


def test_a_token_that_straddles_a_tag_is_no_text():
    tokens = (b"", b"", b"<a>", b">x", b"<a", b"y", b"z</", b"a>", b"</a>")
    tokens += tuple(bytes([byte]) for byte in b"</>acd1")
    tokenizer = types.SimpleNamespace(
        vocab_size=len(tokens), pad_id=0, eos_id=1, reserved={}, token_bytes=tokens
    )
    protocol = protocol_lib.Protocol("tiny", TINY_TAGS, max_target=1)
    grammar = grammar_lib.compile_grammar(protocol, tokenizer, max_actions=1, max_text=3)
    ids = [tokens.index(piece) for piece in (b"<a", b">x", b"y", b"z</", b"a>")]
    actions = grammar.parse(jnp.asarray(ids, jnp.int32), 5)
    assert actions.text.tolist() == [[tokens.index(b"y"), 0, 0]]
    assert actions.well_formed.tolist() == [True]


def test_actions_past_the_last_row_are_dropped_by_parse_and_not_admitted():
    case = compact_case()
    ids = case.spell(*(["<create>", "Anna", "<end>"] * A))
    assert case.admits(Phase.READING, [*ids, case.tokenizer.eos_id])
    ids += case.spell("<delete>", "<1>", "<end>")
    actions = case.parse(case.pad(ids), len(ids))
    assert actions.count == A
    assert actions.kind.tolist() == [ActionKind.CREATE] * A
    assert actions.well_formed.all()
    assert not case.admits(Phase.READING, [*ids, case.tokenizer.eos_id])


def test_a_protocol_may_leave_out_kinds():
    full = protocol_lib.compact(2)
    some = tuple(tag for tag in full.tags if tag.kind in (ActionKind.CREATE, ActionKind.ANSWER))
    tokenizer = compact_case().tokenizer
    grammar = grammar_lib.compile_grammar(
        protocol_lib.Protocol("some", some, 2), tokenizer, max_actions=A, max_text=X
    )
    for phase, names in [(Phase.READING, {"<create>"}), (Phase.ANSWERING, {"<answer>"})]:
        mask = grammar.allowed(grammar.start(phase), R)
        assert {name for name, i in tokenizer.reserved.items() if mask[i]} == names


def test_compact_states_stay_few():
    protocol = protocol_lib.compact(12)
    names = protocol.reserved_names()
    tokenizer = tokenizer_lib.SentencePieceTokenizer.train(TEXTS * 3, 400, names)
    grammar = grammar_lib.compile_grammar(protocol, tokenizer, max_actions=8, max_text=X)
    assert grammar.num_states * 9 < 300
    assert grammar.step.shape[1] < 32


def test_unknown_phases_are_refused():
    grammar = compact_case().grammar
    with pytest.raises(ValueError, match="phase: found 4; allowed are READING=0"):
        grammar.start(4)
    with pytest.raises(ValueError, match="phase: found -1"):
        grammar.min_tokens(-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_id": None}, "eos_id: found None"),
        ({"eos_id": -1}, "eos_id: found -1"),
        ({"pad_id": 99}, "pad_id: found 99"),
        ({"eos_id": 2}, "eos_id: found 2"),
        ({"eos_id": 0}, "which is also eos_id"),
        ({"vocab_size": 4}, "token_bytes: found 3"),
        ({"reserved": {"<1>": 1}}, "reserves '<1>' and not '<2>'"),
        ({}, "no turn can be written"),
    ],
)
def test_bad_tokenizers_are_refused(changes, message):
    fields = {"vocab_size": 3, "pad_id": 0, "eos_id": 1, "reserved": {}}
    tokenizer = types.SimpleNamespace(**(fields | {"token_bytes": (b"", b"", b"a")} | changes))
    with pytest.raises(ValueError, match=message):
        grammar_lib.compile_grammar(protocol_lib.compact(2), tokenizer, max_actions=1, max_text=1)


def test_tokens_that_span_an_action_and_bad_sizes_are_refused():
    pieces = tuple(bytes([byte]) for byte in range(256))
    tokens = (b"", b"", *pieces, b"<a>x</a>")
    tokenizer = types.SimpleNamespace(
        vocab_size=len(tokens), pad_id=0, eos_id=1, reserved={}, token_bytes=tokens
    )
    protocol = protocol_lib.Protocol("tiny", TINY_TAGS, max_target=1)
    with pytest.raises(ValueError, match="the token b'<a>x</a>'"):
        grammar_lib.compile_grammar(protocol, tokenizer, max_actions=1, max_text=1)
    for sizes in ({"max_actions": 0, "max_text": 1}, {"max_actions": 1, "max_text": 0}):
        with pytest.raises(ValueError, match="found 0; allowed are 1 and more"):
            grammar_lib.compile_grammar(protocol, tokenizer, **sizes)
