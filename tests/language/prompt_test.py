"""Prompts against token lists written out by hand, and match flags against plain loops."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from atommem_jax.language import prompt as prompting
from atommem_jax.types import Observation, Phase
from tests.helpers import tiny

Q, LQ, S, Y, K, L, LC = 2, 3, 2, 3, 2, 4, 5
PHASES = [Phase.READING, Phase.ANSWERING, Phase.FINAL]


@functools.cache
def template():
    return prompting.compact(tiny.make_tokenizer(), K)


@functools.cache
def widest():
    return prompting.width(
        template(),
        questions=Q,
        question_length=LQ,
        scratchpad_length=S,
        query_length=Y,
        entry_length=L,
        chunk_length=LC,
    )


def reserved(*names):
    return [tiny.make_tokenizer().reserved[name] for name in names]


def text_ids(count=6):
    """A few ids of real text, pad excluded."""
    pieces = tiny.make_tokenizer().token_bytes
    return [i for i, piece in enumerate(pieces) if piece][40 : 40 + count]


def pad(rows, width):
    """Padded rows and their lengths; what stands past a length is noise on purpose."""
    noise = text_ids()[-1]
    tokens = np.array([[*row, *[noise] * (width - len(row))] for row in rows], np.int32)
    return tokens, np.array([len(row) for row in rows], np.int32)


def observe(phase, questions=(), scratchpad=(), query=(), shown=(), chunk=()):
    """An Observation of lists; missing questions and entries are empty."""
    questions = [*questions, *[[]] * (Q - len(questions))]
    shown = [*shown, *[[]] * (K - len(shown))]
    fields = {}
    for name, rows, width in [("questions", questions, LQ), ("shown", shown, L)]:
        fields[name], lengths = pad(rows, width)
        fields["question_lengths" if name == "questions" else "shown_lengths"] = lengths
    for name, row, width in [
        ("scratchpad", scratchpad, S),
        ("query", query, Y),
        ("chunk", chunk, LC),
    ]:
        tokens, lengths = pad([row], width)
        fields[name], fields[f"{name}_length"] = tokens[0], lengths[0]
    return Observation(phase=np.int32(phase), **fields)


@functools.partial(jax.jit, static_argnames="width")
def assemble(template, observation, width):
    return prompting.assemble(template, observation, prompt_width=width)


match = jax.jit(prompting.match)


def check(observation, expected):
    row, length = assemble(template(), observation, widest())
    assert (row.shape, row.dtype, length.dtype) == ((widest(),), jnp.int32, jnp.int32)
    assert int(length) == len(expected)
    padding = [template().pad_id] * (widest() - len(expected))
    assert row.tolist() == padding + expected


def test_reading_shows_everything_in_order():
    a, b, c, d, e, f = text_ids()
    question, notes, query, one, two, chunk, reading = reserved(
        "<question>", "<notes>", "<query>", "<1>", "<2>", "<chunk>", "<reading>"
    )
    observation = observe(
        Phase.READING,
        questions=[[a, b], [c]],
        scratchpad=[d],
        query=[e, f],
        shown=[[a, a, b], [c, d]],
        chunk=[f, e, d],
    )
    expected = [question, a, b, question, c, notes, d, query, e, f]
    expected += [one, a, a, b, two, c, d, chunk, f, e, d, reading]
    check(observation, expected)


def test_empty_segments_have_no_header():
    a, b, c, *_ = text_ids()
    question, query, two, chunk = reserved("<question>", "<query>", "<2>", "<chunk>")
    reading, answering, final = reserved("<reading>", "<answering>", "<final>")

    check(observe(Phase.READING, chunk=[a]), [chunk, a, reading])
    # Only the second question is put, and only Memory 2 is there: both keep their own header.
    check(
        observe(Phase.ANSWERING, questions=[[], [a, b]], query=[a, b], shown=[[], [c]]),
        [question, a, b, query, a, b, two, c, answering],
    )
    check(observe(Phase.FINAL, questions=[[c]]), [question, c, final])
    check(observe(Phase.FINAL), [final])
    check(observe(Phase.DONE), [final])  # never read, but it must not be out of range


def test_width_is_reached_exactly_by_the_longest_prompt():
    ids = text_ids()
    observation = observe(
        Phase.READING,
        questions=[ids[:LQ]] * Q,
        scratchpad=ids[:S],
        query=ids[:Y],
        shown=[ids[:L]] * K,
        chunk=ids[:LC],
    )
    row, length = assemble(template(), observation, widest())
    assert int(length) == widest() == Q * (1 + LQ) + (1 + S) + (1 + Y) + K * (1 + L) + 1 + LC + 1
    assert row[0] == reserved("<question>")[0]
    assert row[-1] == reserved("<reading>")[0]


def observations():
    ids = st.sampled_from(text_ids())

    def texts(width, count):
        return st.lists(st.lists(ids, max_size=width), min_size=count, max_size=count)

    return st.fixed_dictionaries(
        {
            "phase": st.sampled_from(PHASES),
            "questions": texts(LQ, Q),
            "scratchpad": st.lists(ids, max_size=S),
            "query": st.lists(ids, max_size=Y),
            "shown": texts(L, K),
            "chunk": st.lists(ids, max_size=LC),
        }
    )


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(observations())
def test_any_observation_is_the_concatenation_of_its_texts(parts):
    asked = [question for question in parts["questions"] if question]
    check(observe(**parts), tiny.spell_prompt(**{**parts, "questions": asked}))


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(observations(), st.lists(st.integers(0, 60), min_size=6, max_size=6))
def test_match_says_in_which_segments_a_text_token_occurs(parts, places):
    row, _ = assemble(template(), observe(**parts), widest())
    pieces = tiny.make_tokenizer().token_bytes
    # Tokens of every sort: of the prompt (headers, text and padding), and others.
    pool = [*row.tolist(), *text_ids(), *reserved("<end>", "<answer>", "<1>"), template().pad_id]
    tokens = [pool[place % len(pool)] for place in places]
    flags = match(template(), row, jnp.asarray(tokens, jnp.int32))

    segments = {
        prompting.Segment.QUESTION: list(itertools.chain(*parts["questions"])),
        prompting.Segment.SCRATCHPAD: parts["scratchpad"],
        prompting.Segment.QUERY: parts["query"],
        prompting.Segment.MEMORY: list(itertools.chain(*parts["shown"])),
        prompting.Segment.CHUNK: parts["chunk"],
    }
    for token, flag in zip(tokens, np.asarray(flags), strict=True):
        found = {s for s, text in segments.items() if pieces[token] and token in text}
        assert {s for s in prompting.Segment if flag[s]} == found


def test_match_sees_nothing_in_an_empty_prompt():
    prompt = jnp.full((4,), template().pad_id, jnp.int32)
    assert not match(template(), prompt, jnp.asarray([0, *text_ids()], jnp.int32)).any()


@pytest.mark.parametrize(
    ("left_pad", "width", "row", "length"),
    [
        (True, 5, [0, 0, 7, 9, 5], 3),
        (False, 5, [7, 9, 5, 0, 0], 3),
        (True, 3, [7, 9, 5], 3),
        (False, 2, [7, 9], 2),  # what does not fit is cut at the end
    ],
)
def test_join_closes_gaps(left_pad, width, row, length):
    tokens = jnp.asarray([7, 8, 9, 4, 5], jnp.int32)
    real = jnp.asarray([True, False, True, False, True])
    joined, found = prompting.join(tokens, real, width=width, pad_id=0, left_pad=left_pad)
    assert (joined.tolist(), int(found)) == (row, length)


def test_join_of_nothing_is_padding():
    tokens = jnp.asarray([7, 8], jnp.int32)
    nothing = jnp.zeros((2,), bool)
    joined, found = prompting.join(tokens, nothing, width=3, pad_id=6, left_pad=False)
    assert (joined.tolist(), int(found)) == ([6, 6, 6], 0)


def test_compact_names_the_reserved_tokens_it_lacks():
    with pytest.raises(KeyError, match=r"\['<5>'\].*prompt\.reserved_names"):
        prompting.compact(tiny.make_tokenizer(), 5)


def test_headers_are_no_text():
    is_text = np.asarray(template().is_text)
    tokenizer = tiny.make_tokenizer()
    assert not is_text[[*tokenizer.reserved.values(), tokenizer.pad_id, tokenizer.eos_id]].any()
    assert is_text[tokenizer.encode("Anna works.")].all()
