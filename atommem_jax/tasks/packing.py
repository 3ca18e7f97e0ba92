"""Documents packed into chunks of so many tokens, once there is a tokenizer that counts them.

As in the paper (AtomMem, section 4) documents follow one another and a chunk is filled up: what
does not fit is continued in the next one, under its heading again. Chunks end where a sentence
does. `pack` decides which sentence stands where; `lay_out` does it to an example that holds a
document in each of its chunks.

With an overlap a chunk begins with the last sentences of the one before. They are shown again, and
count once: their facts are those that were read before.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from atommem_jax.tasks.schema import Example, Fact
from atommem_jax.types import EMPTY


class Place(NamedTuple):
    """A sentence as it stands in a chunk."""

    document: int
    sentence: int
    opens: bool  # under its document's heading: the first of it in the chunk
    repeats: bool  # it stood in the chunk before


Lengths = Callable[[Place, bool], int]
"""(place, whether it is the first in the chunk) -> tokens, heading included where it opens."""


def pack(
    documents: Sequence[int], lengths: Lengths, chunk_tokens: int, overlap: int = 0
) -> list[list[Place]]:
    """The sentences of each chunk, in reading order.

    Every sentence stands in one chunk, and where it repeats in one more. A chunk is ended by a
    sentence that does not fit.

    Args:
      documents: how many sentences each has.
      lengths: of a sentence at a place.
      chunk_tokens: the most of a chunk.
      overlap: the most tokens of a chunk that repeat the one before; less where a sentence needs
        the room.

    Raises ValueError for a sentence that alone is longer than a chunk, and for an overlap that
    leaves no room.
    """
    if not 0 <= overlap < chunk_tokens:
        raise ValueError(
            f"overlap is {overlap}; allowed: 0 to {chunk_tokens - 1}, less than chunk_tokens."
        )
    chunks: list[list[Place]] = []
    used = 0
    for document, count in enumerate(documents):
        for sentence in range(count):
            here = chunks[-1] if chunks else []
            place = _place(here, document, sentence)
            size = lengths(place, not here)
            if not here or used + size > chunk_tokens:
                here = _repeat(here, lengths, document, sentence, chunk_tokens, overlap)
                chunks.append(here)
                place = _place(here, document, sentence)
                size = lengths(place, not here)
                used = _measure(here, lengths)
            if used + size > chunk_tokens:
                raise ValueError(
                    f"sentence {sentence} of document {document} has {size} tokens with its "
                    f"heading; a chunk has {chunk_tokens}. Raise config.task.chunk_tokens, or cut "
                    "sentences with config.task.max_sentence_words."
                )
            here.append(place)
            used += size
    return chunks


def _place(chunk: Sequence[Place], document: int, sentence: int, repeats: bool = False) -> Place:
    """Where a sentence comes to stand at the end of a chunk."""
    opens = not chunk or chunk[-1].document != document
    return Place(document, sentence, opens, repeats)


def _measure(chunk: Sequence[Place], lengths: Lengths) -> int:
    return sum(lengths(place, number == 0) for number, place in enumerate(chunk))


def _repeat(
    before: Sequence[Place],
    lengths: Lengths,
    document: int,
    sentence: int,
    chunk_tokens: int,
    overlap: int,
) -> list[Place]:
    """The beginning of a chunk that goes on with a sentence: the most that may be repeated."""
    most: list[Place] = []
    for first in reversed(range(len(before))):
        repeated: list[Place] = []
        for place in before[first:]:
            repeated.append(_place(repeated, place.document, place.sentence, repeats=True))
        size = _measure(repeated, lengths)
        if size > overlap:
            break
        if size + lengths(_place(repeated, document, sentence), False) <= chunk_tokens:
            most = repeated
    return most


# ---------------------------------------------------------------------------------------------
# Examples


class PackedFact(NamedTuple):
    """A fact as it stands in a chunk."""

    ids: list[int]  # tokens
    fact: Fact
    number: int  # within the example
    repeats: bool  # it stood in the chunk before, and is nothing to store


def lay_out(
    example: Example,
    encode: Callable[[str, bool], list[int]],
    chunk_tokens: int,
    overlap: int = 0,
) -> Iterator[list[PackedFact]]:
    """The chunks of an example that holds a document in each of its own chunks.

    A document's heading is the first line of its first fact; where the document is continued in
    another chunk, it stands over that as well.

    Args:
      example: its facts keep their numbers.
      encode: (text, whether it is the first of its chunk) -> tokens.
      chunk_tokens: the most of a chunk.
      overlap: see `pack`.

    Raises ValueError as `pack` does.
    """
    documents = example["chunks"]
    headings = [facts[0]["text"].rpartition("\n") if facts else ("", "", "") for facts in documents]
    starts = [sum(map(len, documents[:d])) for d in range(len(documents))]

    def spell(place: Place) -> str:
        heading, line_end, rest = headings[place.document]
        text = documents[place.document][place.sentence]["text"]
        text = rest if place.sentence == 0 else text
        return f"{heading}{line_end}{text}" if place.opens else text

    def measure(place: Place, first: bool) -> int:
        return len(encode(spell(place), first))

    for chunk in pack(list(map(len, documents)), measure, chunk_tokens, overlap):
        laid = []
        for number, place in enumerate(chunk):
            text = spell(place)
            fact = Fact(**{**documents[place.document][place.sentence], "text": text})
            if place.repeats:
                fact["support"], fact["supersedes"] = False, EMPTY
            ids = encode(text, number == 0)
            numbered = starts[place.document] + place.sentence
            laid.append(PackedFact(ids, fact, numbered, place.repeats))
        yield laid
