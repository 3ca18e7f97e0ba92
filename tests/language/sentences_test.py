"""Cutting loses nothing, ends where sentences do, and takes long texts of any kind."""

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atommem_jax.language import sentences

ALPHABET = st.sampled_from([*"aB1é界😀", ".", "!", "?", "。", '"', "-", "#", "|", *"    \n\t\f\0"])
TEXTS = st.text(ALPHABET, max_size=160) | st.text(max_size=60)


@given(TEXTS, st.booleans())
@example(
    "Dr. A. Smith paid $3.50. He left.\n\n# Title\nText.\n1. One\n2. Two\n| a | b |\n| 1 | 2 |",
    False,
)
def test_sentences_are_the_text(text, glued):
    found = sentences.split(text, glued=glued)
    assert "".join(found) == text
    assert all(found)


@given(st.text(alphabet="aB .!?\"')(5", max_size=60))
def test_no_sentence_is_white_space(text):
    found = sentences.split(" ".join(text.split()), glued=True)
    assert all(sentence.strip() for sentence in found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One is. Two is! Three?", ["One is. ", "Two is! ", "Three?"]),
        ("He came. She left!  Who? 3 men.", ["He came. ", "She left!  ", "Who? ", "3 men."]),
        ("Dr. Smith and J. R. Doe of the U.S. Army met, e.g. on Monday. Yes.", 2),
        ("Mr. J. R. Smith of St. Louis, U.S. Army.", 1),
        ("It was he\u2014Mr. Bingley. Yes", 2),
        ("It is 3.5 m. tall. Now.", ["It is 3.5 m. tall. ", "Now."]),
        ("See p. 3, Op. 94 No. 2, Sept. 11. No. It was my uncle's. She left.", 4),
        ("He came at 5 p.m. She left.", 2),
        ("Loving v. Virginia, a.k.a. Roe vs. Wade.", 1),
        ('"Stop!" he said. "Why?" She went.', ['"Stop!" he said. ', '"Why?" ', "She went."]),
        ('"Yes." (He nodded.) It\'s over.', ['"Yes." ', "(He nodded.) ", "It's over."]),
        ("A word. (so it goes on) . . . and on. , too. ''", 1),
        ("Version 2.5 of node.js won. iPods sold", 1),
        ("Wait ... what? \u00c9lan!", ["Wait ... what? ", "\u00c9lan!"]),
        ("wrapped over\ntwo lines. Next", ["wrapped over\ntwo lines. ", "Next"]),
        ("no stop\n\nnext paragraph", ["no stop\n\n", "next paragraph"]),
        ("a stop.\n\nnext paragraph", ["a stop.\n\n", "next paragraph"]),
        ("# Title\nText goes\non", ["# Title\n", "Text goes\non"]),
        ("List:\n- one\n- two\n1. three", ["List:\n", "- one\n", "- two\n", "1. three"]),
        ("| a | b |\n| 1 | 2 |\nEnd", ["| a | b |\n", "| 1 | 2 |\n", "End"]),
        ("他走了。她来了。", ["他走了。", "她来了。"]),
        (" \n ", [" \n "]),
        ("", []),
    ],
)
def test_where_sentences_end(text, found):
    got = sentences.split(text)
    assert (len(got) if isinstance(found, int) else got) == found


def test_a_stop_that_lacks_its_white_space_counts_where_it_is_asked_for():
    text = "Born c. 1900 in Rome.The city is old."
    assert sentences.split(text) == [text]
    assert sentences.split(text, glued=True) == ["Born c. 1900 in Rome.", "The city is old."]


def test_long_texts_are_cut_in_a_time_that_grows_with_them():
    """Were it the square of their length, this would take hours."""
    pieces = [*" .!?\n\"'a#(|-1", "1. ", "A.", "A. ", "e.g. ", "\u3002", "```"]
    texts = ["." * 60_000, *(character * 1_000_000 for character in " .!?\n\"'a")]
    texts += [(a + b) * 10_000 for a, b in itertools.permutations(pieces, 2)]
    for text in texts:
        assert "".join(sentences.split(text, glued=True)) == text, text[:8]


@pytest.mark.parametrize(
    ("name", "least"), [("hotpotqa/dev_100.json", 0.985), ("2wikimultihopqa/dev_82.json", 0.96)]
)
def test_published_sentences_are_found(shared_data, name, least):
    """F1 of the ends of sentences within paragraphs, against those that the authors publish."""
    path = shared_data / name
    if not path.is_file():
        pytest.skip(f"no file {path}")
    right = wrong = missed = 0
    for record in json.loads(path.read_text(encoding="utf-8")):
        for _, published in record["context"]:
            text = " ".join(" ".join(published).split())
            found, expected = find_ends(sentences.split(text)), find_ends(published)
            right += len(found & expected)
            wrong += len(found - expected)
            missed += len(expected - found)
    assert 2 * right / (2 * right + wrong + missed) > least


def find_ends(texts) -> set[int]:
    """Of all but the last, in characters that are no white space."""
    sizes = [len("".join(text.split())) for text in texts if text.strip()]
    return set(itertools.accumulate(sizes[:-1]))
