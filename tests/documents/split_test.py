"""Splitting loses nothing and keeps the order, whatever the text; files are read or explained."""

import functools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atommem_jax.config import ConfigError
from atommem_jax.documents import split as split_lib
from tests.helpers import tiny
from tests.language import chat_test
from tests.language.sentences_test import TEXTS


def squeeze(texts) -> str:
    """All but white space."""
    return "".join("".join(texts).split())


def count_words(text: str) -> int:
    return len(text.split())


@functools.cache
def make_measures():
    """A tokenizer trained here, a byte-level one, and one with a token a word."""
    return tiny.make_tokenizer().encode, chat_test.make_tokenizer().encode


@given(TEXTS, st.integers(6, 40), st.sampled_from([None, 1, 3]), st.booleans(), st.integers(0, 1))
def test_parts_hold_the_whole_text_in_order_and_fit(text, limit, most, keep_space, tokenizer):
    encode = make_measures()[tokenizer]
    parts = split_lib.split(
        text, lambda t: len(encode(t)), limit=limit, most=most, keep_space=keep_space
    )
    assert squeeze(s for part in parts for s in part.sentences) == squeeze([text])
    for part in parts:
        assert 0 < sum(len(encode(sentence)) for sentence in part.sentences) <= limit
        assert len(part.sentences) <= (1 if most is None else most)
        assert all(sentence == sentence.strip() for sentence in part.sentences)


def test_as_many_whole_sentences_as_there_is_room_for():
    text = "aa bb cc. Dd ee. Ff gg hh ii. Jj.\n\nKk ll mm nn oo pp qq. Rr"
    split = functools.partial(split_lib.split, text, count_words)
    assert [part.sentences for part in split(limit=5)] == [
        ("aa bb cc. Dd ee.",),
        ("Ff gg hh ii. Jj.",),
        ("Kk ll mm nn oo",),
        ("pp qq. Rr",),
    ]
    assert [part.cut for part in split(limit=5)] == [0, 0, 1, 1]
    assert [part.sentences for part in split(limit=9, most=2)] == [
        ("aa bb cc.", "Dd ee."),
        ("Ff gg hh ii.", "Jj."),
        ("Kk ll mm nn oo pp qq.", "Rr"),
    ]
    assert [part.sentences for part in split(limit=4, most=2)] == [
        ("aa bb cc.",),
        ("Dd ee.",),
        ("Ff gg hh ii.",),
        ("Jj.",),
        ("Kk ll mm nn",),
        ("oo pp qq.", "Rr"),
    ]


def test_white_space_is_kept_within_a_text_and_single_within_sentences():
    text = "| a |\n\n\nTwo\n lines."
    assert split_lib.split(text, count_words, limit=9)[0].sentences == ("| a |\n\n\nTwo\n lines.",)
    assert split_lib.split(text, count_words, limit=9, most=9)[0].sentences == (
        "| a |",
        "Two lines.",
    )
    one = split_lib.split(text, count_words, limit=9, keep_space=False)
    assert one[0].sentences == ("| a | Two lines.",)


def test_a_long_word_is_cut_between_characters():
    parts = split_lib.split("ab " + "x" * 10, len, limit=4)
    assert [part.sentences[0] for part in parts] == ["ab", "xxxx", "xxxx", "xx"]
    with pytest.raises(ValueError, match=r"limit=1: the character 'é'"):
        split_lib.split("é", lambda text: len(text.encode()), limit=1)


@pytest.mark.parametrize("unit", ["word ", "x", "\u3000 "])
def test_a_text_without_any_stop_is_measured_in_pieces(unit):
    """What is measured at a time does not grow with the text."""
    longest = 0

    def measure(text: str) -> int:
        nonlocal longest
        longest = max(longest, len(text))
        return len(text.split()) if " " in text else -(-len(text) // 5)

    parts = split_lib.split(unit * 4000, measure, limit=8)
    # A word of thousands of letters is cut at every 16 times the limit, too.
    assert len(parts) in {"word ": [500], "x": range(100, 126), "\u3000 ": [0]}[unit]
    assert longest <= 16 * 8 * 3


# ---------------------------------------------------------------------------------------------
# Files


def test_a_file_is_read_as_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfOne.\r\nTwo.\rThree.\fFour. \xc3\xa9")
    assert split_lib.read(str(file)) == "One.\nTwo.\nThree.\nFour. é"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no text, but 0 bytes"),
        (b" \n\f\n", "holds no text, but 4 bytes of white space"),
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3 is not UTF-8"),
        (b"\xef\xbb\xbfcaf\xe9 au", "byte 0xe9 at offset 6 is not UTF-8"),
        (b"%PDF-1.7\xff", "is a PDF; .*pdftotext"),
    ],
)
def test_what_is_no_text_is_explained(tmp_path, data, message):
    file = tmp_path / "a.txt"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=f"--document={re.escape(str(file))}: {message}"):
        split_lib.read(str(file))


def test_what_is_no_file_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"--document=.*: is a folder; pass a text file"):
        split_lib.read(str(tmp_path))
    with pytest.raises(ConfigError, match=r"--document=.*nowhere: No such file"):
        split_lib.read(str(tmp_path / "nowhere"))
