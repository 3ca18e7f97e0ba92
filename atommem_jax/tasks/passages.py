"""Passages: documents of a title and sentences, and files that hold a pool of them.

A pool is a file of JSON in one of three forms: a list of objects with `title` and `text`, such
objects one a line, or one object whose fields are titles, each with its sentences. A text is a
string or a list of sentences.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from atommem_jax import text_files
from atommem_jax.language import sentences as sentences_lib


class Document(NamedTuple):
    """A paragraph; two of the same title and text are the same."""

    title: str
    sentences: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Equal for the same passage in two files, wherever white space and sentences end."""
        return "\n".join(["".join(self.title.split()), "".join("".join(self.sentences).split())])


def clean(text: str) -> str:
    """The text with single spaces."""
    return " ".join(text.split())


def split_sentences(text: str) -> list[str]:
    """Sentences of a paragraph, in order; only white space is lost."""
    return [sentence.strip() for sentence in sentences_lib.split(clean(text), glued=True)]


def cut(sentence: str, most_words: int) -> list[str]:
    """A sentence in pieces of at most so many words; 0 is no limit. Nothing, where it is empty."""
    words = sentence.split()
    size = most_words or max(1, len(words))
    return [" ".join(words[i : i + size]) for i in range(0, len(words), size)]


def read_passages(path: str | os.PathLike[str], name: str, most_words: int = 0) -> list[Document]:
    """The passages of a pool in the order of the file, each once; empty ones are left out.

    Args:
      path: of the file.
      name: of the field that holds it, for errors.
      most_words: of a sentence; a longer one is cut.

    Raises ConfigError where it is no JSON, and ValueError, naming the record, where that is no
    passage.
    """
    found: dict[str, Document] = {}
    for title, text in _read_texts(path, name):
        parts = split_sentences(text) if isinstance(text, str) else text
        pieces = tuple(piece for part in parts for piece in cut(part, most_words))
        document = Document(clean(title), pieces)
        if pieces:
            found.setdefault(document.identity, document)
    if not found:
        raise ValueError(f"{name}={os.fspath(path)!r} holds no passage; {_FORMS}.")
    return list(found.values())


_FORMS = (
    "allowed are a list of {title, text}, such objects one a line, or one object {title: [sentence"
    ", ...]}"
)


def _read_texts(path: str | os.PathLike[str], name: str) -> Iterator[tuple[str, str | Sequence]]:
    """(title, text or sentences) of every passage as it stands."""
    for number, record in enumerate(text_files.read_records(path), start=1):
        where = f"{name}={os.fspath(path)!r}, record {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where} is a JSON {type(record).__name__}; {_FORMS}.")
        if isinstance(record.get("title"), str):
            items: list[tuple[str, Any]] = [(record["title"], record.get("text"))]
        else:
            items = list(record.items())
        for title, text in items:
            if not _is_text(text):
                raise ValueError(f"{where} has no text for {title!r}; {_FORMS}.")
            yield title, text


def _is_text(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, str) for part in value)
    return isinstance(value, str)
