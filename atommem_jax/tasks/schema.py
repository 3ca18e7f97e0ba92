"""What an example is, as text: facts in chunks, questions with their answers.

Every family of tasks writes its samples in this schema, one JSON text a record; everything after
it (`datasets`, `encoding`, `batches`) knows of no family.
"""

from typing import NotRequired, TypedDict


class Fact(TypedDict):
    """One sentence of a document, and what is worth storing of it.

    That is the sentence itself, or a `note`: other words, which follow from the sentence and from
    what was stored before it. It has the form of an answer, without a full stop.
    """

    text: str
    note: NotRequired[str]  # stored instead of the text; without it, or where '', the text is
    subject: str  # leading words of what is stored that name what it is about; '' where unknown
    support: bool  # worth storing, as far as was known when it was read
    supersedes: int  # number of the fact whose entry it replaces, or -1
    category: int  # the family's own label, for statistics


class Question(TypedDict):
    """One question; `aliases` are the accepted answers, the canonical one first."""

    text: str
    aliases: list[str]
    needs: list[int]  # numbers of the facts that answer it, in the order in which they are used
    focus: NotRequired[str]


class Background(TypedDict):
    """A recipe: the facts of an example stand among sentences of books, see `background`."""

    file: str  # of the sentences, one a line; as it is stored, under the folder of all data sets
    tokens: int  # of the whole document, as the policy's tokenizer counts; at least its facts
    chunk_tokens: int  # a chunk has at most so many, and ends where a sentence does
    seed: int  # of where the books are opened, and where the facts are put
    # In place of so large a share of the books' names (words with a capital within a sentence)
    # stands one of these words, such as the persons of the story: none of it is a fact.
    decoys: NotRequired[float]
    decoy_words: NotRequired[list[str]]
    # Into so large a share of the books' sentences a piece of a fact is put that says nothing of
    # any of these words, such as "went to the kitchen".
    decoy_phrases: NotRequired[float]


class Packing(TypedDict):
    """A recipe: the documents of an example fill chunks of so many tokens, see `packing`."""

    chunk_tokens: int  # a chunk has at most so many, and ends where a sentence does
    overlap: int  # of them repeat the chunk before, at the most


class Example(TypedDict):
    """One sample. Its facts are numbered 0, 1, ... in reading order, over all chunks.

    With `background` the chunks here are not those that are read: all facts are in one. Nor with
    `packing`: each chunk here is a document.
    """

    id: int  # number of the sample within its split
    chunks: list[list[Fact]]
    questions: list[Question]
    focus: str  # a good standing query over all questions
    background: NotRequired[Background]
    packing: NotRequired[Packing]
