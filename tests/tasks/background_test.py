"""Layouts are held against the sentences and facts that they are made of, read word by word."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from atommem_jax.tasks import background
from atommem_jax.types import EMPTY


class Words:
    """A tokenizer of whole words."""

    def __init__(self):
        self.known: dict[str, int] = {}

    def encode(self, text):
        return [self.known.setdefault(word, len(self.known)) for word in text.split()]

    def decode(self, ids):
        return " ".join(list(self.known)[i] for i in ids)


def write_books(folder, sizes):
    """A file of sentences of the given lengths; every word is another."""
    words = itertools.count()
    lines = [" ".join(f"w{next(words)}" for _ in range(size)) for size in sizes]
    path = folder / "books.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def make_facts(chains):
    """Facts of the given subjects; each replaces the one before about the same subject."""
    latest: dict[int, int] = {}
    facts = []
    for number, subject in enumerate(chains):
        facts.append(
            {
                "text": f"fact {number} about {subject}",
                "note": f"{subject} {number}",
                "subject": str(subject),
                "support": subject >= 0,
                "supersedes": latest.get(subject, EMPTY) if subject >= 0 else EMPTY,
                "category": 0,
            }
        )
        if subject >= 0:
            latest[subject] = number
    return facts


def lay_out(path, facts, tokens, chunk_tokens, seed=0):
    words = Words()
    sentences = background.read_sentences(path, words, chunk_tokens)
    recipe = {"file": path, "tokens": tokens, "chunk_tokens": chunk_tokens, "seed": seed}
    ids = [words.encode(fact["text"]) for fact in facts]
    return background.Layout(facts, ids, recipe, sentences), sentences, ids


@hypothesis.settings(
    max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    sizes=strategies.lists(strategies.integers(1, 9), min_size=1, max_size=12),
    chains=strategies.lists(strategies.integers(-1, 2), max_size=8),
    tokens=strategies.integers(0, 150),
    seed=strategies.integers(0, 5),
)
def test_a_document_is_its_facts_in_order_among_consecutive_sentences(
    tmp_path_factory, sizes, chains, tokens, seed
):
    path = write_books(tmp_path_factory.mktemp("books"), sizes)
    facts = make_facts(chains)
    layout, sentences, ids = lay_out(path, facts, tokens, 12, seed)
    chunks = list(layout)
    found = [i for chunk in chunks for piece in chunk.pieces for i in piece.ids]
    # Without its facts the document is whole sentences, one after the other, around the books.
    fact_words = {i for row in ids for i in row}
    rest = [i for i in found if i not in fact_words]
    assert [i for i in found if i in fact_words] == [i for row in ids for i in row]
    books = sentences.tokens.tolist()
    if rest:
        start = books.index(rest[0])
        assert start in sentences.starts
        assert rest == list(itertools.islice(itertools.cycle(books), start, start + len(rest)))
        assert (start + len(rest)) % len(books) in {s % len(books) for s in sentences.starts}
    # As many of them as have room.
    length, facts_length = len(found), sum(map(len, ids))
    assert length <= max(tokens, facts_length)
    assert length > tokens - max(sizes)
    assert all(0 < chunk.length <= 12 for chunk in chunks)


@hypothesis.settings(
    max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    chains=strategies.lists(strategies.integers(-1, 2), min_size=1, max_size=9),
    tokens=strategies.sampled_from([0, 40, 90]),
    seed=strategies.integers(0, 3),
)
def test_notes_after_a_chunk_are_those_of_all_facts_so_far(tmp_path_factory, chains, tokens, seed):
    path = write_books(tmp_path_factory.mktemp("books"), [3, 5, 4])
    facts = make_facts(chains)
    layout, _, ids = lay_out(path, facts, tokens, 12, seed)
    kept: dict[int, str] = {}  # number of a stored fact -> its note
    seen = 0
    for chunk in layout:
        for piece in chunk.pieces:
            if piece.number == background.NOT_A_FACT:
                assert not piece.fact["support"]
                continue
            before = piece.fact["supersedes"]
            if before != EMPTY:
                del kept[before]  # what it replaces was left by an earlier chunk
            kept[piece.number] = piece.fact["note"]
        seen += len(chunk.places)
        latest = {fact["subject"]: fact["note"] for fact in facts[:seen] if fact["support"]}
        assert sorted(kept.values()) == sorted(latest.values())
        # Every fact lies in the piece that it is said to be in.
        for number, place in chunk.places.items():
            text = chunk.pieces[place].ids
            assert any(text[i : i + 4] == ids[number] for i in range(len(text)))
    assert seen == len(facts)


def test_a_chunk_ends_where_a_sentence_does_and_is_full(tmp_path):
    path = write_books(tmp_path, [5, 5, 5, 5])
    layout, sentences, _ = lay_out(path, [], 20, 12)
    chunks = list(layout)
    assert [chunk.length for chunk in chunks] == [10, 10]
    assert [len(chunk.pieces) for chunk in chunks] == [1, 1]
    assert sentences.total == 20


def test_a_sentence_longer_than_a_chunk_is_cut(tmp_path):
    path = write_books(tmp_path, [30])
    layout, sentences, _ = lay_out(path, [], 60, 12)
    assert sorted(chunk.length for chunk in layout) == [6, 6, 12, 12, 12, 12]
    assert len(sentences) == 3


def test_the_same_recipe_is_the_same_document_and_another_seed_another(tmp_path):
    path = write_books(tmp_path, [3, 4, 5, 6, 7])
    facts = make_facts([0, 1, 0])

    def read(seed):
        layout, _, _ = lay_out(path, facts, 200, 16, seed)
        return [[piece.ids for piece in chunk.pieces] for chunk in layout]

    assert read(1) == read(1)
    assert read(1) != read(2)


def test_facts_are_spread_over_the_whole_document(tmp_path):
    path = write_books(tmp_path, [4] * 50)
    places = []
    for seed in range(200):
        layout, _, _ = lay_out(path, make_facts([0]), 2000, 16, seed)
        chunks = list(layout)
        found = [c for c, chunk in enumerate(chunks) if chunk.places]
        places.append(found[0] / len(chunks))
    # Uniform on (0, 1): the mean's standard deviation is .29 / sqrt(200).
    assert abs(np.mean(places) - 0.5) < 4 * 0.29 / np.sqrt(200)
    assert np.quantile(places, 0.1) < 0.2
    assert np.quantile(places, 0.9) > 0.8


def test_names_within_sentences_give_way_to_decoys_and_nothing_else_does(tmp_path):
    path = tmp_path / "books.txt"
    path.write_text("Once Arthur met Lucy there.\nThen Arthur left and 3 DOGS stayed.\n")
    words, names = Words(), ("John", "Mary")
    sentences = background.read_sentences(str(path), words, 12)
    ids = [words.encode(name)[0] for name in names]

    def read(share, seed):
        recipe = {"file": str(path), "tokens": 120, "chunk_tokens": 12, "seed": seed}
        decoys = background.Decoys(ids, share)
        layout = background.Layout([], [], recipe, sentences, decoys)
        return [word for c in layout for p in c.pieces for word in words.decode(p.ids).split()]

    plain, all_gone = read(0.0, 1), read(1.0, 1)
    assert not set(plain) & set(names)
    changed = [(old, new) for old, new in zip(plain, all_gone, strict=True) if old != new]
    assert {old for old, _ in changed} == {"Arthur", "Lucy"}
    assert {new for _, new in changed} == set(names)
    assert not {"Arthur", "Lucy"} & set(all_gone)
    half = [read(0.5, seed).count("Arthur") / plain.count("Arthur") for seed in range(60)]
    assert 0.4 < np.mean(half) < 0.6
    assert read(0.5, 3) == read(0.5, 3)


def test_ends_of_facts_stand_in_sentences_and_never_behind_a_name(tmp_path):
    words = Words()
    path = write_books(tmp_path, [9, 7, 12, 8])
    sentences = background.read_sentences(path, words, 12)
    john = words.encode("John")[0]
    sentences.tokens[::10] = john
    phrase = words.encode("went to the kitchen")
    recipe = {"file": path, "tokens": 300, "chunk_tokens": 12, "seed": 2}

    def read(share):
        decoys = background.Decoys([john], 0.0, [phrase], share)
        return [list(c.pieces[0].ids) for c in background.Layout([], [], recipe, sentences, decoys)]

    plain, filled = read(0.0), read(0.5)
    assert [len(chunk) for chunk in plain] == [len(chunk) for chunk in filled]
    assert not {i for chunk in plain for i in chunk} & set(phrase)
    found = []
    for before, after in zip(plain, filled, strict=True):
        put = [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        assert {after[at] for at in put} <= set(phrase)
        begins = [at for at in put if at - 1 not in put or after[at] <= after[at - 1]]
        assert all(john not in after[max(0, at - 4) : at] for at in begins)
        found += [words.decode(after[at] for at in put)] if len(begins) == 1 else []
    assert "went to the kitchen" in found
    assert {"kitchen", "the kitchen", "to the kitchen"} & set(found)
    assert read(0.5) == filled


def test_a_fact_that_no_chunk_holds_is_refused(tmp_path):
    path = write_books(tmp_path, [3])
    with pytest.raises(ValueError, match=r"chunk_tokens is 3.*fact has 4 tokens; allowed: 4"):
        lay_out(path, make_facts([0]), 10, 3)
