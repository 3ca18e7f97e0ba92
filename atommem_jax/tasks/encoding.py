"""From an example, which is text, to the arrays of an `Episode`.

`fit_shape` finds the static sizes of a split; `encode` makes one example an Episode of that shape.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.tasks.schema import Example
from atommem_jax.types import EMPTY, Annotations, Episode


@dataclasses.dataclass(frozen=True)
class EpisodeShape:
    """The static sizes of an Episode, all in tokens or items."""

    chunks: int  # C
    chunk_length: int  # Lc
    facts: int  # U, a chunk
    questions: int  # Q
    question_length: int  # Lq
    needs: int  # M, a question
    answer_length: int  # G
    query_length: int  # Y
    note_length: int = 0  # W

    def join(self, other: "EpisodeShape") -> "EpisodeShape":
        """The smallest shape that holds what either holds."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return EpisodeShape(*map(max, mine, theirs))


class _Tokens(NamedTuple):
    """An example in token ids, not yet padded."""

    chunks: list[list[list[int]]]  # chunk -> fact -> ids
    questions: list[list[int]]
    answers: list[list[int]]
    focus: list[int]
    notes: list[list[list[int]]]  # chunk -> fact -> ids; none where the fact has no note

    def shape(self, example: Example) -> EpisodeShape:
        return EpisodeShape(
            chunks=len(self.chunks),
            chunk_length=max((sum(map(len, chunk)) for chunk in self.chunks), default=0),
            facts=max(map(len, self.chunks), default=0),
            questions=len(self.questions),
            question_length=max(map(len, self.questions), default=0),
            needs=max((len(question["needs"]) for question in example["questions"]), default=0),
            answer_length=max(map(len, self.answers), default=0),
            query_length=len(self.focus),
            note_length=max(map(len, _concatenate(self.notes)), default=0),
        )


class TextEncoder:
    """A tokenizer's `encode` as texts in a row need it; remembers, as sentences recur often."""

    def __init__(self, tokenizer: Tokenizer):
        self._encode = tokenizer.encode
        self._known: dict[str, list[int]] = {}
        self.pad_id = tokenizer.pad_id
        # SentencePiece puts a space before every text itself, a byte-level BPE does not.
        joined = tokenizer.decode(tokenizer.encode("a") + tokenizer.encode("b"))
        self.separator = "" if joined == "a b" else " "

    def __call__(self, text: str, first: bool = True) -> list[int]:
        """Token ids of `text`; with the space before it where it is not the first in a row."""
        text = text if first else self.separator + text
        if text not in self._known:
            if len(self._known) >= 1 << 16:
                self._known.clear()
            self._known[text] = list(self._encode(text))
        return self._known[text]


def _tokenize(example: Example, encode_text: TextEncoder, partial: bool = False) -> _Tokens:
    chunks = [
        [encode_text(fact["text"], first=u == 0) for u, fact in enumerate(chunk)]
        for chunk in example["chunks"]
    ]
    questions = [encode_text(question["text"]) for question in example["questions"]]
    for name, texts in [("chunks", _concatenate(chunks)), ("questions", questions)]:
        if not (texts or partial) or not all(texts):
            raise ValueError(
                f"example {example['id']}: {name} has no text, or one without any token; allowed: "
                "one or more texts, none empty. Correct the data set's builder."
            )
    answers = [encode_text(question["aliases"][0]) for question in example["questions"]]
    notes = [
        [encode_text(fact["note"]) if fact.get("note") else [] for fact in chunk]
        for chunk in example["chunks"]
    ]
    return _Tokens(chunks, questions, answers, encode_text(example["focus"]), notes)


def _concatenate(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def fit_shape(examples: Iterable[Example], tokenizer: Tokenizer) -> EpisodeShape:
    """The smallest shape that holds all of `examples`; reads and tokenises each once.

    Raises ValueError where there are none, or where one has no facts or questions.
    """
    encode_text = TextEncoder(tokenizer)
    fitted = None
    for example in examples:
        shape = _tokenize(example, encode_text).shape(example)
        fitted = shape if fitted is None else fitted.join(shape)
    if fitted is None:
        raise ValueError("examples is empty; pass a split with at least one example.")
    return fitted


def longest_support(
    examples: Iterable[Example], tokenizer: Tokenizer, *, cap: int
) -> tuple[int, int]:
    """(tokens, facts): the most that is worth storing of any one chunk.

    cap: tokens to which the text of each fact is cut.
    """
    encode_text = TextEncoder(tokenizer)
    tokens = facts = 0
    for example in examples:
        for chunk in example["chunks"]:
            stored = [fact.get("note") or fact["text"] for fact in chunk if fact["support"]]
            sizes = [min(len(encode_text(text, first=False)), cap) for text in stored]
            tokens, facts = max(tokens, sum(sizes)), max(facts, len(sizes))
    return tokens, facts


def encode(
    example: Example, tokenizer: Tokenizer, shape: EpisodeShape, *, partial: bool = False
) -> Episode:
    """Makes one example an Episode with NumPy leaves (int32, bool), padded to `shape`.

    The tokens of a chunk are those of its facts, one after the other, so that each fact is an
    exact span; a fact that follows another one begins with the space between them. A note is
    encoded alone. Where there is no fact, category is EMPTY.

    partial: it may lack chunks, or questions: a document that is read before anyone asks, and a
      question about what was read before.

    Raises ValueError, naming the field and both sizes, where the example does not fit `shape`,
    and where a fact number is none of the example's.
    """
    return encode_with(example, TextEncoder(tokenizer), shape, partial)


def encode_with(
    example: Example, encode_text: TextEncoder, shape: EpisodeShape, partial: bool = False
) -> Episode:
    pad_id = encode_text.pad_id
    tokens = _tokenize(example, encode_text, partial)
    _check_fits(example, tokens.shape(example), shape)
    chunks = [_concatenate(chunk) for chunk in tokens.chunks]
    # Any: the leaves are NumPy's, Episode says JAX's; a batch goes to the devices later, as one.
    leaves: dict[str, Any] = {
        "id": np.int32(example["id"]),
        "chunks": _pad_rows(chunks, (shape.chunks, shape.chunk_length), pad_id),
        "chunk_lengths": _lengths(chunks, shape.chunks),
        "num_chunks": np.int32(len(chunks)),
        "questions": _pad_rows(tokens.questions, (shape.questions, shape.question_length), pad_id),
        "question_lengths": _lengths(tokens.questions, shape.questions),
        "num_questions": np.int32(len(tokens.questions)),
    }
    return Episode(annotations=_annotate(example, tokens, encode_text, shape), **leaves)


def _annotate(
    example: Example,
    tokens: _Tokens,
    encode_text: TextEncoder,
    shape: EpisodeShape,
) -> Annotations:
    pad_id = encode_text.pad_id
    grid = (shape.chunks, shape.facts)
    start, length, subject_length, note_length = (np.zeros(grid, np.int32) for _ in range(4))
    note = np.full((*grid, shape.note_length), pad_id, np.int32)
    support = np.zeros(grid, np.bool_)
    supersedes, category = (np.full(grid, EMPTY, np.int32) for _ in range(2))
    places = [
        c * shape.facts + u for c, chunk in enumerate(tokens.chunks) for u in range(len(chunk))
    ]

    def flat(number: int) -> int:
        if not 0 <= number < len(places):
            raise ValueError(
                f"example {example['id']}: a `needs` or `supersedes` is {number}; allowed: its "
                f"facts, 0 to {len(places) - 1}. Correct the data set's builder."
            )
        return places[number]

    for c, chunk in enumerate(example["chunks"]):
        position = 0
        for u, fact in enumerate(chunk):
            ids, noted = tokens.chunks[c][u], tokens.notes[c][u]
            subject = encode_text(fact["subject"], first=u == 0 or bool(noted))
            start[c, u], length[c, u] = position, len(ids)
            note[c, u, : len(noted)], note_length[c, u] = noted, len(noted)
            subject_length[c, u] = _common_prefix(noted or ids, subject)
            support[c, u] = fact["support"]
            if fact["supersedes"] != EMPTY:
                supersedes[c, u] = flat(fact["supersedes"])
            category[c, u] = fact["category"]
            position += len(ids)
    needs = [[flat(number) for number in question["needs"]] for question in example["questions"]]
    leaves: dict[str, Any] = {
        "start": start,
        "length": length,
        "note": note,
        "note_length": note_length,
        "subject_length": subject_length,
        "support": support,
        "supersedes": supersedes,
        "category": category,
        "needs": _pad_rows(needs, (shape.questions, shape.needs), EMPTY),
        "gold": _pad_rows(tokens.answers, (shape.questions, shape.answer_length), pad_id),
        "gold_length": _lengths(tokens.answers, shape.questions),
        "focus": _pad_rows([tokens.focus], (1, shape.query_length), pad_id)[0],
        "focus_length": np.int32(len(tokens.focus)),
    }
    return Annotations(**leaves)


def _common_prefix(ids: list[int], subject: list[int]) -> int:
    """Tokens of `ids` that name the subject, at least one where there is a subject.

    A tokenizer may merge the end of the subject with what follows it, hence the comparison.
    """
    same = 0
    while same < min(len(ids), len(subject)) and ids[same] == subject[same]:
        same += 1
    return max(same, min(1, len(subject)))


def _pad_rows(rows: list[list[int]], shape: tuple[int, int], fill: int) -> np.ndarray:
    padded = np.full(shape, fill, np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def _lengths(rows: list[list[int]], count: int) -> np.ndarray:
    lengths = np.zeros(count, np.int32)
    lengths[: len(rows)] = [len(row) for row in rows]
    return lengths


def _check_fits(example: Example, found: EpisodeShape, shape: EpisodeShape) -> None:
    for field in dataclasses.fields(EpisodeShape):
        size, cap = getattr(found, field.name), getattr(shape, field.name)
        if size > cap:
            raise ValueError(
                f"example {example['id']}: {field.name} is {size}, but the shape allows {cap}; "
                f"raise {field.name} or take the shape that fit_shape gives for this split."
            )
