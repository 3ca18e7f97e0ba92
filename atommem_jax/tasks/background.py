"""Facts scattered in the sentences of books: documents of any length, laid out as they are read.

BABILong (Kuratov et al., arXiv 2406.10149, section 3) hides the sentences of a short story, in
their order and at random places, among the sentences of books. An example that is to be hidden
holds its facts and a recipe (`schema.Background`); the document itself is never written down. It is
laid out from the recipe, chunk by chunk, once there is a tokenizer, so that its length is counted
in the tokens that the model reads, and ten million of them take no more memory than ten.

What is worth storing of a chunk is what holds at its end: a fact that another fact of the same
chunk replaces is not stored.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from atommem_jax import text_files
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.tasks.schema import Background, Fact
from atommem_jax.types import EMPTY

NOT_A_FACT = EMPTY
"""`Piece.number` of text in which there is no fact that is worth storing."""

_APART = 4  # tokens at least between a name and what a piece of a fact begins with

_NO_FACT = Fact(text="", subject="", support=False, supersedes=EMPTY, category=EMPTY)


class Piece(NamedTuple):
    """A stretch of a chunk, up to the end of the fact that is worth storing of it."""

    ids: list[int]  # tokens
    fact: Fact  # whose `supersedes` is the fact that an earlier chunk left
    number: int  # of the fact within its example, or NOT_A_FACT


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What is read at once."""

    pieces: list[Piece]  # at least one; together they are the chunk
    places: dict[int, int]  # number of a fact that the chunk holds -> the piece that it is part of

    @property
    def length(self) -> int:
        """Tokens."""
        return sum(len(piece.ids) for piece in self.pieces)


@dataclasses.dataclass(frozen=True)
class Sentences:
    """The sentences of books as one row of tokens, none longer than a chunk."""

    tokens: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " s_plus_1"]  # of each sentence; the last is the end of all
    is_name: Bool[np.ndarray, " n"]  # tokens that are words with a capital, within a sentence

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def total(self) -> int:
        """Tokens of all of them."""
        return int(self.starts[-1])


@functools.lru_cache(maxsize=8)
def read_sentences(path: str, tokenizer: Tokenizer, longest: int) -> Sentences:
    """Reads a file of one sentence a line; those of more than `longest` tokens are cut.

    Raises ConfigError, naming the file, where it cannot be read, and ValueError where it holds no
    sentence.
    """
    rows = [tokenizer.encode(line) for line in text_files.read_text(path).split("\n")]
    cut = [row[at : at + longest] for row in rows for at in range(0, len(row), longest)]
    if not cut:
        raise ValueError(f"{path}: holds no sentence; prepare the data set again.")
    starts = np.concatenate([[0], np.cumsum([len(row) for row in cut])])
    tokens = np.concatenate([np.asarray(row, np.int32) for row in cut])
    kinds = np.unique(tokens)
    texts = [tokenizer.decode([int(kind)]) for kind in kinds]
    capital = np.isin(tokens, kinds[[text.istitle() and text.isalpha() for text in texts]])
    capital[starts[:-1]] = False
    return Sentences(tokens, starts, capital)


@dataclasses.dataclass(frozen=True)
class Decoys:
    """What is put into books so that they look like facts and are none.

    A reader that looks for names alone, or for what facts say of them alone, is led astray: both
    are in books that it has not seen.
    """

    names: Sequence[int] = ()  # tokens, in the place of names of the books
    name_share: float = 0.0  # of the books' names
    phrases: Sequence[Sequence[int]] = ()  # tokens of facts without their names
    phrase_share: float = 0.0  # of the books' sentences

    def put(
        self,
        tokens: Int[np.ndarray, " n"],
        is_name: Bool[np.ndarray, " n"],
        count: int,
        rng: np.random.Generator,
    ) -> Int[np.ndarray, " n"]:
        """The tokens of `count` sentences, as many as before, with decoys among them."""
        if self.name_share and len(self.names):
            chosen = is_name & (rng.random(len(tokens)) < self.name_share)
            tokens = np.where(chosen, rng.choice(self.names, size=len(tokens)), tokens)
        if self.phrase_share and len(self.phrases):
            tokens = tokens.copy()
            for _ in range(rng.binomial(count, self.phrase_share)):
                self._put_phrase(tokens, rng)
        return tokens

    def _put_phrase(self, tokens: Int[np.ndarray, " n"], rng: np.random.Generator) -> None:
        """Writes the end of a fact over some tokens, all of it or less, unless a name is near."""
        phrase = self.phrases[int(rng.integers(len(self.phrases)))]
        if rng.random() < 0.5:
            phrase = phrase[int(rng.integers(len(phrase))) :]
        if len(phrase) > len(tokens):
            return
        at = int(rng.integers(len(tokens) - len(phrase) + 1))
        if not np.isin(tokens[max(0, at - _APART) : at], self.names).any():
            tokens[at : at + len(phrase)] = phrase


_NO_DECOYS = Decoys()


def count_chains(facts: Sequence[Fact]) -> int:
    """The most facts of an example that are worth storing of any one chunk.

    Of facts that replace one another a chunk leaves the last.
    """
    return sum(fact["support"] and fact["supersedes"] < 0 for fact in facts)


class Layout:
    """A document of a recipe: an iterable of its chunks, each time the same."""

    def __init__(
        self,
        facts: Sequence[Fact],
        fact_ids: Sequence[list[int]],
        recipe: Background,
        sentences: Sentences,
        decoys: Decoys = _NO_DECOYS,
    ):
        """`fact_ids` are the tokens of the facts; `sentences` are as long as a chunk at most.

        Raises ValueError for a fact that is longer than a chunk.
        """
        self._facts, self._ids, self._sentences = facts, fact_ids, sentences
        self._size = recipe["chunk_tokens"]
        longest = max(map(len, fact_ids), default=0)
        if longest > self._size:
            raise ValueError(
                f"config.task.chunk_tokens is {self._size}, but a fact has {longest} tokens; "
                f"allowed: {longest} or more."
            )
        room = max(0, recipe["tokens"] - sum(map(len, fact_ids)))
        rng = np.random.default_rng(recipe["seed"])
        self._first = int(rng.integers(len(sentences)))
        self._count = self._count_sentences(room)
        self._decoys, self._decoy_seed = decoys, [recipe["seed"], 1]
        # Before which of the sentences each fact stands.
        self._gaps = np.sort(rng.integers(0, self._count + 1, size=len(facts)))

    def _count_sentences(self, room: int) -> int:
        """How many sentences from `_first` on, around and around, have at most `room` tokens."""
        around, rest = divmod(room, self._sentences.total)
        starts = self._sentences.starts
        wanted = int(starts[self._first]) + rest
        wraps, wanted = divmod(wanted, self._sentences.total)
        last = int(np.searchsorted(starts, wanted, side="right")) - 1
        return around * len(self._sentences) + wraps * len(self._sentences) + last - self._first

    def __iter__(self) -> Iterator[Chunk]:
        held: list[tuple[Int[np.ndarray, " n"] | list[int], int]] = []
        room, sentence, fact = self._size, 0, 0
        rng = np.random.default_rng(self._decoy_seed)
        while sentence < self._count or fact < len(self._facts):
            if fact < len(self._facts) and self._gaps[fact] <= sentence:
                taken: Int[np.ndarray, " n"] | list[int] = self._ids[fact]
                number, count = fact, 1
            else:
                end = self._gaps[fact] if fact < len(self._facts) else self._count
                taken, count = self._take(sentence, int(end) - sentence, room, rng)
                number = NOT_A_FACT
            if count == 0 or len(taken) > room:
                yield self._close(held)
                held, room = [], self._size
                continue
            held.append((taken, number))
            room -= len(taken)
            if number == NOT_A_FACT:
                sentence += count
            else:
                fact += 1
        if held:
            yield self._close(held)

    def _take(
        self, sentence: int, most: int, room: int, rng: np.random.Generator
    ) -> tuple[Int[np.ndarray, " n"], int]:
        """The tokens of the next sentences, at most `most`, that have room; and their number."""
        starts = self._sentences.starts
        first = (self._first + sentence) % len(self._sentences)
        begin = int(starts[first])
        last = int(np.searchsorted(starts, begin + room, side="right")) - 1
        last = min(last, first + most)  # to the end of the books at most: the rest comes next
        span = slice(begin, starts[last])
        tokens, is_name = self._sentences.tokens[span], self._sentences.is_name[span]
        return self._decoys.put(tokens, is_name, last - first, rng), last - first

    def _close(self, held: Sequence[tuple]) -> Chunk:
        """The chunk of what was gathered."""
        numbers = [number for _, number in held if number != NOT_A_FACT]
        stored = [number for number in numbers if self._facts[number]["support"]]
        replaced = {self._facts[number]["supersedes"] for number in stored}
        earlier: dict[int, int] = {}  # fact -> what an earlier chunk left of it
        for number in stored:
            before = self._facts[number]["supersedes"]
            earlier[number] = earlier.get(before, before)
        kept = [number for number in stored if number not in replaced]
        pieces: list[Piece] = []
        places: dict[int, int] = {}
        waiting: list[int] = []
        for ids, number in held:
            waiting.extend(np.asarray(ids).tolist())
            if number != NOT_A_FACT:
                places[number] = len(pieces)
            if number in kept:
                fact = self._facts[number].copy()
                fact["supersedes"] = earlier[number]
                pieces.append(Piece(waiting, fact, number))
                waiting = []
        if not pieces:
            pieces.append(Piece(waiting, _NO_FACT, NOT_A_FACT))
        elif waiting:
            last = pieces[-1]
            pieces[-1] = last._replace(ids=last.ids + waiting)
        return Chunk(pieces, {n: min(place, len(pieces) - 1) for n, place in places.items()})
