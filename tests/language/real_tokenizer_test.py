"""The action language in a published vocabulary, against the reading of the decoded string."""

import functools
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from atommem_jax.language import protocol
from atommem_jax.language.grammar import Grammar, compile_grammar
from atommem_jax.types import Phase
from atommem_jax.weights import gguf
from tests.helpers import grammar_reference as reference
from tests.helpers import smollm2

pytestmark = pytest.mark.peer

A, X, R, K = 4, 24, 64, 6
QWEN3_VOCABULARY = 151_936
PIECES = [
    *(
        "Anna",
        " works",
        " at",
        " Acme",
        ".",
        "\n",
        " ",
        "<",
        "</",
        ">",
        "><",
        "_",
        "memory",
        "\u00e9",
    ),
    *(
        "Memory 1",
        "Memory 12:",
        "Memory 7: ",
        "1",
        "\\boxed{",
        "}",
        "}</",
        "I think that ",
        "\U0001f600",
    ),
]


@functools.cache
def tokenizer():
    return gguf.open_model(smollm2.find()).read_tokenizer(49_152, pad_token="<|endoftext|>")


@functools.cache
def case(name: str, free_text: bool):
    """(protocol, its grammar, jitted parse, jitted masks)."""
    chosen = protocol.find(name, K, free_text=free_text)
    grammar = compile_grammar(chosen, tokenizer(), max_actions=A, max_text=X)
    return chosen, grammar, jax.jit(Grammar.parse), jax.jit(Grammar.masks)


def make_turns(chosen):
    """Strings of actions, right and wrong, with text between them."""
    literals = chosen.reserved_names()
    noise = st.sampled_from([*PIECES, *literals])

    def write(tag, target, words):
        return tag.open + target + "".join(words) + tag.close

    actions = st.builds(
        write,
        st.sampled_from(chosen.tags),
        st.sampled_from(["", "Memory 1:", "Memory 6", "Memory 6:", "Memory 9:"]),
        st.lists(st.sampled_from(PIECES), max_size=3),
    )
    return st.lists(actions | noise, min_size=1, max_size=5).map("".join)


def pad(ids):
    filled = [*ids[:R], *[tokenizer().pad_id] * (R - len(ids))]
    return jnp.asarray(filled, jnp.int32)


@pytest.mark.parametrize("name", ["atommem", "public"])
@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(data=st.data())
def test_the_device_reads_what_the_string_says(name, data):
    chosen, grammar, parse, _ = case(name, True)
    text = data.draw(make_turns(chosen))
    ids = tokenizer().encode(text)  # tokens straddle tags as they will
    length = min(len(ids), R)
    found = parse(grammar, pad(ids), length)
    expected = reference.parse(chosen, tokenizer(), ids, length)
    assert int(found.count) == min(len(expected), A)
    for a, action in enumerate(expected[:A]):
        got = jax.tree.map(lambda x, a=a: np.asarray(x)[a], found.replace(count=found.kind))
        assert (int(got.kind), int(got.target)) == (action.kind, action.target)
        assert bool(got.well_formed) == action.well_formed
        assert int(got.length) == len(action.text)
        assert got.text[: min(len(action.text), X)].tolist() == action.text[:X]


@pytest.mark.parametrize("name", ["atommem", "public"])
@pytest.mark.parametrize("free_text", [False, True])
@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(data=st.data())
def test_masks_admit_whole_turns_and_nothing_else(name, free_text, data):
    chosen, grammar, _, masks = case(name, free_text)
    phase = data.draw(st.sampled_from([Phase.READING, Phase.ANSWERING, Phase.FINAL]))
    text = data.draw(make_turns(chosen))
    ids = [*tokenizer().encode(text)[: R - 1], tokenizer().eos_id]
    admitted = np.asarray(masks(grammar, phase, pad(ids)))[np.arange(len(ids)), ids].all()
    assert admitted == reference.is_turn(chosen, tokenizer(), phase, ids, A)


@pytest.mark.parametrize("name", ["compact", "atommem", "public"])
def test_a_vocabulary_of_qwen3s_size_compiles_into_a_few_megabytes(name):
    pieces = dict.fromkeys(piece for piece in tokenizer().token_bytes if piece)
    longer = (a + b for a in list(pieces) for b in (b" the", b"<", b"></", b"ing", b"1", b": "))
    for piece in longer:
        if len(pieces) == QWEN3_VOCABULARY - 40:
            break
        pieces.setdefault(piece)
    chosen = protocol.find(name, K, free_text=True)
    names = chosen.reserved_names() if name == "compact" else ()
    table = [*pieces, *[b""] * 40]
    assert len(table) == QWEN3_VOCABULARY
    whole = types.SimpleNamespace(
        vocab_size=QWEN3_VOCABULARY,
        token_bytes=tuple(table),
        eos_id=QWEN3_VOCABULARY - 1,
        pad_id=QWEN3_VOCABULARY - 2,
        reserved={literal: len(pieces) + i for i, literal in enumerate(names)},
        encode=tokenizer().encode,
    )
    grammar = compile_grammar(chosen, whole, max_actions=8, max_text=X)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(grammar))
    assert size < 8e6  # a table over states and tokens would take thousands of them
