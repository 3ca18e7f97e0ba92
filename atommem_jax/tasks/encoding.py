"""From an example, which is text, to the arrays of an `Episode`.

`fit_shape` finds the static sizes of a split; `encode` makes one example an Episode of that shape,
and `EpisodeStream` a document of any length, a window of chunks after the other.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.tasks import background, packing
from atommem_jax.tasks.schema import Background, Example, Fact
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

    pieces: list[list[background.Piece]]  # chunk -> fact
    places: dict[int, tuple[int, int]]  # number of a fact -> where it is: chunk, piece
    questions: list[list[int]]
    answers: list[list[int]]
    focus: list[int]
    notes: list[list[list[int]]]  # chunk -> fact -> ids; none where the fact has no note

    def shape(self, example: Example) -> EpisodeShape:
        return EpisodeShape(
            chunks=len(self.pieces),
            chunk_length=max((sum(len(p.ids) for p in chunk) for chunk in self.pieces), default=0),
            facts=max(map(len, self.pieces), default=0),
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
        self.tokenizer = tokenizer
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
    pieces, places = _read_chunks(example, encode_text)
    return _join_tokens(example, encode_text, pieces, places, partial)


def _join_tokens(
    example: Example,
    encode_text: TextEncoder,
    pieces: list[list[background.Piece]],
    places: dict[int, tuple[int, int]],
    partial: bool = False,
) -> _Tokens:
    questions = [encode_text(question["text"]) for question in example["questions"]]
    read = [piece.ids for chunk in pieces for piece in chunk]
    for name, texts in [("chunks", read), ("questions", questions)]:
        if not (texts or partial) or not all(texts):
            raise ValueError(
                f"example {example['id']}: {name} has no text, or one without any token; allowed: "
                "one or more texts, none empty. Correct the data set's builder."
            )
    answers = [encode_text(question["aliases"][0]) for question in example["questions"]]
    notes = [
        [encode_text(piece.fact["note"]) if piece.fact.get("note") else [] for piece in chunk]
        for chunk in pieces
    ]
    return _Tokens(pieces, places, questions, answers, encode_text(example["focus"]), notes)


def _read_chunks(
    example: Example, encode_text: TextEncoder
) -> tuple[list[list[background.Piece]], dict[int, tuple[int, int]]]:
    """What is read, and where each of the example's facts is in it."""
    pieces: list[list[background.Piece]] = []
    places: dict[int, tuple[int, int]] = {}
    for c, chunk in enumerate(_iterate_chunks(example, encode_text)):
        pieces.append(chunk.pieces)
        places |= {number: (c, place) for number, place in chunk.places.items()}
    return pieces, places


def _iterate_chunks(example: Example, encode_text: TextEncoder) -> Iterable[background.Chunk]:
    if "background" in example:
        yield from lay_out(example, encode_text)
        return
    if "packing" in example:
        for packed in packing.lay_out(example, encode_text, **example["packing"]):
            new = {piece.number: u for u, piece in enumerate(packed) if not piece.repeats}
            yield background.Chunk([background.Piece(*piece[:3]) for piece in packed], new)
        return
    number = 0
    for chunk in example["chunks"]:
        texts = [encode_text(fact["text"], first=u == 0) for u, fact in enumerate(chunk)]
        numbered = zip(texts, chunk, itertools.count(number), strict=False)
        pieces = [background.Piece(*piece) for piece in numbered]
        yield background.Chunk(pieces, {piece.number: u for u, piece in enumerate(pieces)})
        number += len(chunk)


def lay_out(example: Example, encode_text: TextEncoder) -> background.Layout:
    """The document of an example that is a recipe; nothing of it is made yet but its plan."""
    recipe = example["background"]
    facts = _concatenate(example["chunks"])
    sentences = background.read_sentences(
        recipe["file"], encode_text.tokenizer, recipe["chunk_tokens"]
    )
    ids = [encode_text(fact["text"], False) for fact in facts]
    return background.Layout(
        facts, ids, recipe, sentences, _make_decoys(recipe, facts, encode_text)
    )


def _make_decoys(
    recipe: Background, facts: Sequence[Fact], encode_text: TextEncoder
) -> background.Decoys:
    """Of a recipe: its words that are one token, and what the facts say of them."""
    words = recipe.get("decoy_words", [])
    names = [ids[0] for ids in (encode_text(word, False) for word in words) if len(ids) == 1]
    said = {
        fact["text"].removeprefix(word).strip()
        for fact in facts
        for word in words
        if fact["text"].startswith(word)
    }
    return background.Decoys(
        names,
        recipe.get("decoys", 0.0),
        [encode_text(text, False) for text in sorted(said) if text],
        recipe.get("decoy_phrases", 0.0),
    )


def _concatenate(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def fit_shape(examples: Iterable[Example], tokenizer: Tokenizer, window: int = 0) -> EpisodeShape:
    """The smallest shape that holds all of `examples`; reads and tokenises each once.

    window: chunks that are held at a time of a document that is longer (`EpisodeStream`); 0 holds
      all of them. With it nothing is laid out that is longer.

    Raises ValueError where there are none, or where one has no facts or questions.
    """
    encode_text = TextEncoder(tokenizer)
    fitted = None
    for example in examples:
        if window:
            shape = _shape_of_windows(example, encode_text, window)
        else:
            shape = _tokenize(example, encode_text).shape(example)
        fitted = shape if fitted is None else fitted.join(shape)
    if fitted is None:
        raise ValueError("examples is empty; pass a split with at least one example.")
    return fitted


def _shape_of_windows(example: Example, encode_text: TextEncoder, window: int) -> EpisodeShape:
    """What holds any window of an example; of a recipe as it may be laid out at most."""
    if "background" not in example:
        shape = _tokenize(example, encode_text).shape(example)
        return dataclasses.replace(shape, chunks=window)
    facts = _concatenate(example["chunks"])
    pieces = [[background.Piece(encode_text(f["text"]), f, n) for n, f in enumerate(facts)]]
    return dataclasses.replace(
        _join_tokens(example, encode_text, pieces, {}).shape(example),
        chunks=window,
        chunk_length=example["background"]["chunk_tokens"],
        facts=max(1, background.count_chains(facts)),
    )


def count_tokens(example: Example, tokenizer: Tokenizer) -> int:
    """Tokens of its document; of a recipe those that it is laid out to at most."""
    encode_text = TextEncoder(tokenizer)
    facts = _concatenate(example["chunks"])
    length = sum(len(encode_text(fact["text"], False)) for fact in facts)
    return max(length, example["background"]["tokens"]) if "background" in example else length


def longest_support(
    examples: Iterable[Example], tokenizer: Tokenizer, *, cap: int
) -> tuple[int, int]:
    """(tokens, facts): the most that is worth storing of any one chunk.

    cap: tokens to which the text of each fact is cut.
    """
    encode_text = TextEncoder(tokenizer)
    tokens = facts = 0
    for example in examples:
        for chunk in _read_chunks(example, encode_text)[0]:
            facts_here = [piece.fact for piece in chunk if piece.fact["support"]]
            stored = [fact.get("note") or fact["text"] for fact in facts_here]
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
    tokens = _tokenize(example, encode_text, partial)
    return _to_episode(example, tokens, encode_text, shape, 0, len(tokens.pieces))


def _to_episode(
    example: Example,
    tokens: _Tokens,
    encode_text: TextEncoder,
    shape: EpisodeShape,
    first_chunk: int,
    num_chunks: int,
) -> Episode:
    """The arrays of what was tokenised: chunks from `first_chunk` on, of `num_chunks` in all."""
    pad_id = encode_text.pad_id
    _check_fits(example, tokens.shape(example), shape)
    chunks = [_concatenate(piece.ids for piece in chunk) for chunk in tokens.pieces]
    # Any: the leaves are NumPy's, Episode says JAX's; a batch goes to the devices later, as one.
    leaves: dict[str, Any] = {
        "id": np.int32(example["id"]),
        "chunks": _pad_rows(chunks, (shape.chunks, shape.chunk_length), pad_id),
        "chunk_lengths": _lengths(chunks, shape.chunks),
        "first_chunk": np.int32(first_chunk),
        "num_chunks": np.int32(num_chunks),
        "questions": _pad_rows(tokens.questions, (shape.questions, shape.question_length), pad_id),
        "question_lengths": _lengths(tokens.questions, shape.questions),
        "num_questions": np.int32(len(tokens.questions)),
    }
    return Episode(annotations=_annotate(example, tokens, encode_text, shape), **leaves)


class EpisodeStream:
    """A document of any length as windows of chunks, read once from its beginning to its end.

    It holds the chunks of one window and one beyond, and of those before only what is marked.
    """

    def __init__(self, example: Example, encode_text: TextEncoder, shape: EpisodeShape):
        """`shape.chunks` is the length of a window, see `fit_shape`."""
        self._example, self._encode_text, self._shape = example, encode_text, shape
        self._rest = iter(_iterate_chunks(example, encode_text))
        self._held: collections.deque[background.Chunk] = collections.deque()
        self._first = 0
        self._marked: set[int] = set()
        self._kept: dict[int, background.Chunk] = {}
        self.tokens_read = 0
        """Tokens before the last window."""

    def window(self, first: int) -> Episode:
        """The chunks from number `first` on, as an Episode with NumPy leaves.

        What it `supersedes` or `needs` of other windows is EMPTY. As long as more chunks follow
        than fit, `num_chunks` is only a number that none of the window reaches.

        Raises ValueError for a window that begins before the last one did.
        """
        if first < self._first:
            raise ValueError(
                f"first is {first}, but the document was read to chunk {self._first}; allowed: "
                "that one or a later one. Open it again."
            )
        while self._first < first and (self._held or self._fill()):
            chunk = self._held.popleft()
            self.tokens_read += chunk.length
            if self._first in self._marked:
                self._kept[self._first] = chunk
            self._first += 1
        while len(self._held) <= self._shape.chunks and self._fill():
            pass
        shown = list(itertools.islice(self._held, self._shape.chunks))
        return self._encode_chunks(shown, self._shape, first, self._first + len(self._held))

    def mark(self, numbers: Iterable[int]) -> None:
        """Keeps the chunks of these numbers, none of which was before the last window."""
        self._marked.update(numbers)

    def digest(self) -> Episode:
        """The marked chunks that were read, in their order, as an episode of nothing else.

        What happened in them is found in a record of the turns that showed them, in which chunks
        are numbered anew. Leaves are NumPy's; there is one row of chunks at least.
        """
        held = dict(enumerate(self._held, start=self._first))
        kept = self._kept | {n: chunk for n, chunk in held.items() if n in self._marked}
        chunks = [kept[number] for number in sorted(kept)]
        shape = dataclasses.replace(self._shape, chunks=max(len(chunks), 1))
        return self._encode_chunks(chunks, shape, 0, len(chunks))

    def _encode_chunks(
        self, chunks: Sequence[background.Chunk], shape: EpisodeShape, first: int, count: int
    ) -> Episode:
        places = {n: (c, u) for c, chunk in enumerate(chunks) for n, u in chunk.places.items()}
        tokens = _join_tokens(
            self._example, self._encode_text, [c.pieces for c in chunks], places, partial=True
        )
        return _to_episode(self._example, tokens, self._encode_text, shape, first, count)

    def _fill(self) -> bool:
        """Holds a further chunk; False where none is left."""
        found = next(self._rest, None)
        if found is not None:
            self._held.append(found)
        return found is not None


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
    last = sum(map(len, example["chunks"])) - 1

    def flat(number: int) -> int:
        if not 0 <= number <= last:
            raise ValueError(
                f"example {example['id']}: a `needs` or `supersedes` is {number}; allowed: its "
                f"facts, 0 to {last}. Correct the data set's builder."
            )
        if number not in tokens.places:  # in no chunk of the window
            return EMPTY
        c, u = tokens.places[number]
        return c * shape.facts + u

    for c, chunk in enumerate(tokens.pieces):
        position = 0
        for u, (ids, fact, _) in enumerate(chunk):
            noted = tokens.notes[c][u]
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
