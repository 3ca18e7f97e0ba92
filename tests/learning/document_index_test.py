"""Indexes of documents and cuts of them, against the same in plain Python."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.language.tokenizer import SentencePieceTokenizer
from atommem_jax.learning import document_index
from atommem_jax.memory import slot_table
from atommem_jax.memory.embedding import HashedBagOfTokens
from atommem_jax.tasks import encoding
from atommem_jax.types import EMPTY
from tests.helpers import multihop, tiny

WIDTH = 24  # of an entry; every document here is shorter


@functools.cache
def published():
    """(examples, tokenizer, episodes) of questions over documents, of which two share a title."""
    records = [multihop.make_record(i) for i in range(4)]
    for record in records:  # the neighbour of a document may have its title
        record["context"].append([record["context"][0][0], ["Another of that name sleeps."]])
    return records


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    """An example of five documents a chunk, its tokenizer, and both as arrays."""
    folder = tmp_path_factory.mktemp("records")
    config = multihop.write(folder, published(), documents=20, documents_per_chunk=5)
    example = multihop.generate(config)[0]
    facts = multihop.flatten(example)
    texts = [text for fact in facts for text in (fact["text"], fact["note"])]
    tokenizer = SentencePieceTokenizer.train(texts * 3, 400, [])
    shape = encoding.fit_shape([example], tokenizer)
    return example, tokenizer, encoding.encode(example, tokenizer, shape)


def fill(kind, episode, tokenizer, width=WIDTH):
    table = slot_table.init(
        slots=document_index.count_pieces(kind, episode, width),
        entry_length=width,
        scratchpad_length=1,
        query_length=32,
        shown=3,
        key_dim=256,
        pad_id=tokenizer.pad_id,
    )
    embed = HashedBagOfTokens(tokenizer.vocab_size, dim=256)
    episode = jax.tree.map(jnp.asarray, episode)
    filled = jax.jit(lambda t, e: document_index.fill(t, kind, e, embed, tokenizer.pad_id))
    return filled(table, episode), embed


def read(table) -> list[list[int]]:
    """Its entries, in the order of their creation."""
    slots = sorted(np.flatnonzero(table.valid), key=lambda slot: table.created[slot])
    return [table.entries[slot, : table.lengths[slot]].tolist() for slot in slots]


def test_documents_are_found_by_their_headings(episode):
    example, tokenizer, arrays = episode
    table, _ = fill("documents", arrays, tokenizer)
    expected = []
    for fact in multihop.flatten(example):
        if fact["text"].startswith("Document "):
            expected.append([fact["text"]])
        else:
            expected[-1].append(fact["text"])
    assert len(expected) == 20
    found = [tokenizer.decode(entry) for entry in read(table)]
    assert [text.split() for text in found] == [" ".join(text).split() for text in expected]
    subjects = [fact["subject"] for fact in multihop.flatten(example)]
    titles = [title for title, _ in itertools.groupby(subjects)]
    assert len(set(titles)) < 20, "two documents share a title"


def test_chunks_are_cut_into_pieces_as_long_as_an_entry(episode):
    _, tokenizer, arrays = episode
    table, _ = fill("chunks", arrays, tokenizer, width=16)
    entries = read(table)
    lengths = [int(n) for n in arrays.chunk_lengths]
    expected = [
        row[i : min(i + 16, n)].tolist()
        for row, n in zip(arrays.chunks, lengths, strict=True)
        for i in range(0, n, 16)
    ]
    assert entries == expected
    assert {len(entry) for entry in entries} > {16}


def test_facts_are_what_a_teacher_stores(episode):
    example, tokenizer, arrays = episode
    table, _ = fill("facts", arrays, tokenizer, width=64)
    notes = [tokenizer.encode(fact["note"]) for fact in multihop.flatten(example)]
    assert read(table) == notes
    assert int(table.clock) == len(notes)


def test_what_was_corrected_is_not_current():
    tokenizer = tiny.make_tokenizer()
    several = tiny.make_episodes(range(tiny.EXAMPLES))[0]
    corrected = 0
    for b in range(4):
        one = jax.tree.map(lambda x, b=b: x[b], several)
        a = jax.device_get(one.annotations)
        gone = set(a.supersedes[a.supersedes != EMPTY].tolist())
        facts = [
            np.asarray(one.chunks)[c, : int(a.length[c, 0])].tolist()
            for c in np.flatnonzero(a.length[:, 0])
        ]
        assert read(fill("facts", one, tokenizer)[0]) == facts
        current = [fact for c, fact in enumerate(facts) if c not in gone]
        assert read(fill("current_facts", one, tokenizer)[0]) == current
        corrected += len(gone)
    assert corrected


def test_the_passage_that_answers_is_found(episode):
    example, tokenizer, arrays = episode
    table, embed = fill("documents", arrays, tokenizer)
    needed = [multihop.flatten(example)[n]["text"] for n in example["questions"][0]["needs"]]
    person = needed[0].split("\n")[-1].split(" is at")[0]
    query = jnp.asarray(tokenizer.encode(f"{person} is at Firm"), jnp.int32)
    table = slot_table.set_query(table, query, jnp.int32(query.shape[0]), tokenizer.pad_id)
    table, scores = slot_table.retrieve(table, embed)
    best = int(table.shown[0])
    text = tokenizer.decode(table.entries[best, : table.lengths[best]].tolist())
    assert f"{person} is at" in text
    keys, key = np.asarray(table.keys), np.asarray(embed(query, jnp.int32(query.shape[0])))
    np.testing.assert_allclose(np.sort(keys @ key)[::-1][:3], scores, atol=0.02)


@pytest.mark.parametrize("last", [False, True])
def test_a_cut_drops_what_it_says(episode, last):
    _, tokenizer, arrays = episode
    whole = [
        token
        for row, n in zip(arrays.chunks, arrays.chunk_lengths, strict=True)
        for token in row[:n].tolist()
    ]
    arrays = jax.tree.map(jnp.asarray, arrays)
    cut = functools.partial(document_index.cut, arrays, pad_id=tokenizer.pad_id, last=last)
    for width in (7, len(whole), len(whole) + 5):
        tokens, length = cut(width)
        kept = whole[-width:] if last else whole[:width]
        assert tokens[:length].tolist() == kept
        assert (tokens[length:] == tokenizer.pad_id).all()


def test_another_kind_is_refused(episode):
    _, tokenizer, arrays = episode
    with pytest.raises(ValueError, match="index='words': allowed are 'chunks'"):
        document_index.count_pieces("words", arrays, WIDTH)
    table, _ = fill("documents", arrays, tokenizer, width=WIDTH)
    small = jax.tree.map(lambda x: x[:2] if x.ndim and x.shape[0] > 3 else x, table)
    with pytest.raises(ValueError, match="table has 2 slots"):
        document_index.fill(small, "documents", arrays, None, tokenizer.pad_id)
