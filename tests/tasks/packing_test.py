"""Documents are packed into chunks of tokens: full, cut at sentence ends, and nothing lost."""

import hypothesis
import pytest
from hypothesis import strategies as st

from atommem_jax.tasks import packing
from atommem_jax.tasks.packing import Place
from tests.helpers.multihop import flatten, generate, make_record, write

HEADING = 2  # tokens, in the tests of `pack`


def make_lengths(sizes: list[list[int]]):
    return lambda place, first: sizes[place.document][place.sentence] + HEADING * place.opens


def test_by_hand():
    # Two tokens of heading wherever a document opens; chunks of ten.
    sizes = [[3, 4], [5, 3, 1], [6]]
    chunks = packing.pack([2, 3, 1], make_lengths(sizes), 10)
    assert chunks == [
        [Place(0, 0, True, False), Place(0, 1, False, False)],  # 2 + 3 + 4
        [Place(1, 0, True, False), Place(1, 1, False, False)],  # 2 + 5 + 3
        [Place(1, 2, True, False)],  # 2 + 1, and 2 + 6 would be one too many
        [Place(2, 0, True, False)],
    ]
    # Of the last four tokens of a chunk at most, with the heading that they then stand under.
    overlapping = packing.pack([2, 3, 1], make_lengths(sizes), 10, overlap=4)
    assert overlapping[1] == chunks[1], "2 + 4 would be too many to repeat"
    assert overlapping[2] == [Place(1, 2, True, False)], "so would be 2 + 3"
    assert overlapping[3] == [Place(2, 0, True, False)], "2 + 1 + 2 + 6 would not fit"
    sizes = [[3, 4, 1, 2, 2, 4]]
    assert packing.pack([6], make_lengths(sizes), 10, overlap=4) == [
        [Place(0, 0, True, False), Place(0, 1, False, False), Place(0, 2, False, False)],
        [Place(0, 2, True, True), Place(0, 3, False, False), Place(0, 4, False, False)],
        [Place(0, 4, True, True), Place(0, 5, False, False)],
    ]


@hypothesis.given(
    sizes=st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=8),
    chunk_tokens=st.integers(11, 30),
    overlap=st.integers(0, 10),
)
@hypothesis.settings(deadline=None, max_examples=300)
def test_nothing_is_lost_and_no_chunk_is_too_long(sizes, chunk_tokens, overlap):
    lengths = make_lengths(sizes)
    chunks = packing.pack(list(map(len, sizes)), lengths, chunk_tokens, overlap)
    told = [
        (place.document, place.sentence)
        for chunk in chunks
        for place in chunk
        if not place.repeats
    ]  # fmt: skip
    assert told == [(d, s) for d, document in enumerate(sizes) for s in range(len(document))]
    for number, chunk in enumerate(chunks):
        used = [lengths(place, False) for place in chunk]
        assert sum(used) <= chunk_tokens
        assert not chunk[-1].repeats, "a chunk says something new"
        for before, place in zip([None, *chunk], chunk, strict=False):
            assert place.opens == (before is None or before.document != place.document)
        repeated = [place for place in chunk if place.repeats]
        assert chunk[: len(repeated)] == repeated
        assert sum(used[: len(repeated)]) <= overlap
        if repeated:
            previous = [(place.document, place.sentence) for place in chunks[number - 1]]
            again = [(place.document, place.sentence) for place in repeated]
            assert previous[-len(again) :] == again
        if number and not overlap:
            first = chunk[0]._replace(opens=chunks[number - 1][-1].document != chunk[0].document)
            full = sum(lengths(place, False) for place in chunks[number - 1])
            assert full + lengths(first, False) > chunk_tokens, "or it had not ended"


def test_what_cannot_be_packed_is_named():
    with pytest.raises(
        ValueError, match=r"sentence 1 of document 0 has 11 tokens .* a chunk has 10"
    ):
        packing.pack([2], make_lengths([[3, 9]]), 10)
    with pytest.raises(ValueError, match="overlap is 10; allowed: 0 to 9"):
        packing.pack([1], make_lengths([[3]]), 10, overlap=10)


def encode(text: str, first: bool) -> list[int]:
    """A token a word, and one for each line end; their lengths tell them apart well enough."""
    words = text.replace("\n", " \n ").split(" ")
    return [len(word) for word in words] if first else [0, *(len(word) for word in words)]


@pytest.mark.parametrize("overlap", [0, 12])
def test_an_example_of_documents_is_laid_out(tmp_path, overlap):
    records = [make_record(i) for i in range(12)]
    config = write(tmp_path, records, documents=24, questions=(2, 3))
    documents = generate(config)  # a document a chunk
    for example in documents:
        facts = flatten(example)
        chunks = list(packing.lay_out(example, encode, 40, overlap))
        assert len(chunks) < len(example["chunks"])
        new = [packed for chunk in chunks for packed in chunk if not packed.repeats]
        assert [packed.number for packed in new] == list(range(len(facts)))
        again = [packed for chunk in chunks for packed in chunk if packed.repeats]
        assert bool(again) == bool(overlap)
        for packed in new:
            fact = facts[packed.number]
            assert packed.fact == fact | {"text": packed.fact["text"]}
            assert packed.fact["text"].split("\n")[-1] == fact["text"].split("\n")[-1]
        assert not any(packed.fact["support"] for packed in again)
        for chunk in chunks:
            assert sum(len(packed.ids) for packed in chunk) <= 40
            for u, packed in enumerate(chunk):
                assert packed.ids == encode(packed.fact["text"], u == 0)
            # Each document of a chunk is headed once, where it begins in it.
            by_title: dict[str, list[str]] = {}
            for packed in chunk:
                by_title.setdefault(packed.fact["subject"], []).append(packed.fact["text"])
            for title, texts in by_title.items():
                headed = [text.startswith("Document ") for text in texts]
                assert headed == [True] + [False] * (len(texts) - 1)
                assert texts[0].split("\n")[0].endswith(f": {title}")
