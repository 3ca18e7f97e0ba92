"""A person's documents: text files, split into the parts that an agent reads one by one.

Any text will do: prose, Markdown, what is extracted from a PDF. Nothing of it is lost or
moved: the words of all parts, in order, are the words of the text.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence

from atommem_jax import text_files
from atommem_jax.config import check
from atommem_jax.language import sentences

Measure = Callable[[str], int]
"""Tokens of a text, wherever in a part it stands."""

_LONGEST_TOKEN = 16  # characters, about: what is longer is not measured before it is cut


@dataclasses.dataclass(frozen=True)
class Part:
    """What is read in one turn."""

    sentences: tuple[str, ...]  # as a data set's chunk is made of facts
    cut: int = 0  # how many pieces it has of sentences that are longer than a part may be


def read(path: str) -> str:
    """The text of a file, with `\\n` for line ends and page breaks.

    Raises ConfigError where there is none, see `text_files.read_text`.
    """
    flag = f"--document={path}"
    check(
        not os.path.isdir(path),
        f"{flag}: is a folder; pass a text file, one flag for each of several",
    )
    data = text_files.read_bytes(path, flag)
    text = text_files.decode(data, flag)
    check(
        bool(text.strip()),
        f"{flag}: holds no text, but {len(data)} bytes of white space; pass a file with some",
    )
    return re.sub(r"\r\n?|\f", "\n", text)


def split(
    text: str,
    measure: Measure,
    *,
    limit: int,
    most: int | None = None,
    keep_space: bool = True,
) -> list[Part]:
    """The parts of a text: as many whole sentences each as there is room for.

    A sentence of more than `limit` tokens is cut, between words where it can be.

    Args:
      text: of a document.
      measure: how many tokens a text takes. What takes none is left out.
      limit: tokens that a part may have.
      most: sentences a part; their white space becomes single spaces. None for any number, as one
        text.
      keep_space: keeps the white space of such a text as it is; else it becomes single spaces.

    Raises ValueError where a single character takes more than `limit`.
    """
    tidy = str.strip if most is None and keep_space else _collapse
    weigh = measure if keep_space else lambda raw: measure(_collapse(raw))
    pieces: list[tuple[str, bool]] = []
    for sentence in sentences.split(text):
        cut = list(_cut(sentence, lambda raw: measure(tidy(raw)) <= limit, limit))
        pieces += [(raw, len(cut) > 1) for raw in cut if measure(tidy(raw))]
    parts, first = [], 0
    while first < len(pieces):
        rest = [raw for raw, _ in pieces[first : first + (most or limit)]]
        raws = _take(rest, measure, limit) if most else _take_whole(rest, weigh, limit)
        last = first + len(raws)
        texts = (tidy("".join(raws)),) if most is None else tuple(map(tidy, raws))
        parts.append(Part(texts, sum(is_cut for _, is_cut in pieces[first:last])))
        first = last
    return parts


def _collapse(text: str) -> str:
    return " ".join(text.split())


def _take(raws: Sequence[str], measure: Measure, limit: int) -> Sequence[str]:
    """The first of some pieces that fit one by one; never none."""
    totals = itertools.accumulate(measure(_collapse(raw)) for raw in raws)
    count = sum(1 for _ in itertools.takewhile(lambda total: total <= limit, totals))
    return raws[: max(count, 1)]


def _take_whole(raws: Sequence[str], measure: Measure, limit: int) -> Sequence[str]:
    """The first of some pieces that fit as one text; never none."""
    count, total = 1, measure(raws[0])
    while count < len(raws) and total + measure(raws[count]) <= limit:
        total += measure(raws[count])
        count += 1
    while count > 1 and measure("".join(raws[:count]).strip()) > limit:
        count -= 1  # together they may take a token more than one by one
    return raws[:count]


def _cut(sentence: str, fits: Callable[[str], bool], limit: int) -> Iterator[str]:
    """Pieces that fit, each as long as can be; joined, they are the sentence again."""
    longest = _LONGEST_TOKEN * limit
    if len(sentence) < longest and fits(sentence):
        yield sentence
        return
    # Of words, and of pieces of those that are too long to be measured again and again.
    words = re.finditer(rf"\S{{1,{longest}}}\s*", sentence)
    ends = [match.end() for match in words] or [len(sentence)]
    start = word = 0
    while start < len(sentence):
        count = _count_fitting(sentence, start, ends, word, fits)
        if count:
            word += count
            stop = ends[word - 1]
        else:  # not even a word
            letters = range(start + 1, ends[word] + 1)
            stop = start + _count_fitting(sentence, start, letters, 0, fits)
        if stop == start:
            raise ValueError(f"limit={limit}: the character {sentence[start]!r} takes more tokens")
        yield sentence[start:stop]
        start = stop


def _count_fitting(
    text: str, start: int, ends: Sequence[int], first: int, fits: Callable[[str], bool]
) -> int:
    """How many of `ends`, from `first` on, the longest piece that fits goes past; 0 for none.

    Tries few before many: what is measured is never much longer than what fits.
    """

    def holds(count: int) -> bool:
        return fits(text[start : ends[first + count - 1]])

    most = len(ends) - first
    good, bad, step = 0, most + 1, 1
    while good < most and bad > most:
        tried = min(good + step, most)
        good, bad = (tried, bad) if holds(tried) else (good, tried)
        step *= 2
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good
