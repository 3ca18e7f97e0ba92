"""Tests of atommem_jax.language.tokenizer."""

import itertools

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st

from atommem_jax.language import tokenizer as tokenizer_lib

RESERVED = ("<create>", "<read>", "<end>", "<1>", "<2>")
SYLLABLES = ("ka", "lo", "mi", "ren", "tas", "vor", "el", "ni", "dra", "os", "bel", "ul", "ge")
NAMES = ["".join(pair).capitalize() for pair in itertools.product(SYLLABLES, repeat=2)][:150]
FACTS = [f"{a} works at {b}." for a, b in zip(NAMES, NAMES[7:] + NAMES[:7], strict=True)]
QUESTIONS = [f"Where does {name} live?" for name in NAMES]
TEXTS = (FACTS + QUESTIONS) * 4

SPELLINGS = [
    *RESERVED,
    *("<pad>", "</s>", "<unk>", "<s>", "<|end|>", "<|pad|>", "<tool>", "<0x0A>", "Ġ"),
    *("\u2581", "\u2585", "\0", "\n", "\r\n", "\t", " ", "  ", "\u3000", "\ufeff", "e\u0301"),
    *("Kalo", "works", "tool", ".", "?", "1", "12"),
]
ANY_TEXT = st.lists(st.one_of(st.sampled_from(SPELLINGS), st.text(max_size=6)), max_size=8).map(
    "".join
)


def _train_bpe() -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|pad|>", "<create>"],
        show_progress=False,
    )
    bpe.train_from_iterator([*TEXTS, *["(tool)(toolbox)"] * 99], trainer)
    bpe.add_tokens(
        ["<tool>", "works", "tool"]
    )  # added, though not special: matched in text by default
    return bpe


@pytest.fixture(scope="module")
def pieces() -> tokenizer_lib.SentencePieceTokenizer:
    return tokenizer_lib.SentencePieceTokenizer.train(TEXTS, 700, RESERVED)


@pytest.fixture(scope="module")
def bpe() -> tokenizer_lib.HuggingFaceTokenizer:
    return tokenizer_lib.HuggingFaceTokenizer(
        _train_bpe(), eos_token="<|end|>", pad_token="<|pad|>"
    )


def _assert_lossless(tokenizer: tokenizer_lib.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.pad_id, tokenizer.eos_id, *tokenizer.reserved.values()}
    assert all(tokenizer.token_bytes[i] for i in ids)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(text=ANY_TEXT)
def test_every_text_round_trips_without_reserved_ids(pieces, bpe, text):
    _assert_lossless(pieces, text)
    _assert_lossless(bpe, text)


@pytest.mark.parametrize("text", ["", " ", "  a  b ", "".join(SPELLINGS), " ".join(SPELLINGS)])
def test_awkward_texts_round_trip(pieces, bpe, text):
    _assert_lossless(pieces, text)
    _assert_lossless(bpe, text)


def test_empty_text_has_no_ids(pieces, bpe):
    assert pieces.encode("") == []
    assert bpe.encode("") == []


def test_frequent_words_are_one_piece_each(pieces):
    for word in [*NAMES, "works", "at", "does", "live", "Where"]:
        assert len(pieces.encode(word)) == 1, word


def test_a_word_keeps_its_token_beside_punctuation_and_within_a_sentence(pieces):
    [name] = pieces.encode(NAMES[3])
    assert pieces.encode(f"{NAMES[3]}.")[0] == name
    assert pieces.encode(f"{NAMES[3]}?")[0] == name
    assert name in pieces.encode(f"Where does {NAMES[3]} live?")
    assert len(pieces.encode(FACTS[0])) == 5
    assert len(pieces.encode(QUESTIONS[0])) == 5


def test_training_twice_gives_the_same_model(pieces):
    again = tokenizer_lib.SentencePieceTokenizer.train(iter(TEXTS), 700, RESERVED)
    assert again.to_bytes() == pieces.to_bytes()


def test_reserved_names_are_distinct_tokens_without_bytes(pieces):
    assert set(pieces.reserved) == set(RESERVED)
    ids = [*pieces.reserved.values(), pieces.pad_id, pieces.eos_id]
    assert len(set(ids)) == len(RESERVED) + 2
    assert all(pieces.token_bytes[i] == b"" for i in ids)
    assert len(pieces.token_bytes) == pieces.vocab_size <= 700


def test_decode_drops_reserved_ids_and_the_leading_space(pieces):
    tags = pieces.reserved
    ids = [tags["<create>"], *pieces.encode("Kalo works"), tags["<end>"], pieces.eos_id]
    assert pieces.decode(ids) == "Kalo works"


def test_decode_replaces_broken_utf8_and_refuses_foreign_ids(pieces):
    assert pieces.decode(pieces.encode("\u3000")[:-1]) == "\ufffd"
    with pytest.raises(ValueError, match=r"ids: found -1; allowed are 0\.\."):
        pieces.decode([-1])
    with pytest.raises(ValueError, match="ids: found"):
        pieces.decode([pieces.vocab_size])


def test_lone_surrogates_are_refused(pieces, bpe):
    for tokenizer in (pieces, bpe):
        with pytest.raises(ValueError, match=r"lone surrogate .* position 2"):
            tokenizer.encode("ab\ud800")


def test_sentencepiece_storage_round_trips(pieces, tmp_path):
    pieces.save(tmp_path / "new" / "folder")
    for other in (
        tokenizer_lib.SentencePieceTokenizer.load(tmp_path / "new" / "folder"),
        tokenizer_lib.SentencePieceTokenizer.from_bytes(pieces.to_bytes()),
    ):
        assert other.reserved == pieces.reserved
        assert other.token_bytes == pieces.token_bytes
        assert other.encode(FACTS[0]) == pieces.encode(FACTS[0])


@pytest.mark.parametrize("names", [["<a>", "<a>"], ["<pad>"], ["</s>"], ["<0x41>"], [""], ["a b"]])
def test_bad_reserved_names_are_refused(names):
    with pytest.raises(ValueError, match="reserved: found"):
        tokenizer_lib.SentencePieceTokenizer.train(TEXTS, 700, names)


def test_training_needs_text_and_room():
    with pytest.raises(ValueError, match="texts: found no text"):
        tokenizer_lib.SentencePieceTokenizer.train([" \n"], 700)
    with pytest.raises(ValueError, match="vocab_size: found 100"):
        tokenizer_lib.SentencePieceTokenizer.train(TEXTS, 100)


def test_what_is_rare_counts_more_in_a_search(pieces, bpe):
    """ "works" stands in half of the texts, each name in two or three of 300."""
    for tokenizer in (pieces, bpe):
        weights = tokenizer_lib.weigh_by_rarity(tokenizer, 127)
        assert len(weights) == tokenizer.vocab_size
        assert min(weights) == 1
        assert max(weights) <= 127
    weights = tokenizer_lib.weigh_by_rarity(pieces, 127)
    (common,), (rare,) = pieces.encode("does"), pieces.encode(NAMES[3])
    assert weights[rare] > weights[common] + 8  # a nat and more
    # A byte is as rare as any piece: what has none is a rare character.
    assert weights[pieces.encode("\u3000")[-1]] == max(weights)


def test_less_room_leaves_smaller_weights_in_the_same_order(pieces):
    wide, narrow = (tokenizer_lib.weigh_by_rarity(pieces, most) for most in (127, 9))
    assert max(narrow) <= 9
    order = sorted(range(len(wide)), key=wide.__getitem__)
    assert all(narrow[a] <= narrow[b] for a, b in itertools.pairwise(order))


def test_bpe_text_never_becomes_an_added_token(bpe):
    assert set(bpe.reserved) == {"<create>", "<tool>", "works", "tool"}
    text = "<create> works tool(toolbox) <tool><|end|>"
    _assert_lossless(bpe, text)
    library = _train_bpe()
    assert {"tool", "toolbox"} <= library.get_vocab().keys()  # merged, and hidden by the name
    assert library.encode(text).ids != bpe.encode(text)


def test_bpe_agrees_with_the_library_on_plain_text(bpe):
    library = _train_bpe()
    for text in QUESTIONS:
        assert bpe.encode(text) == library.encode(text).ids


def test_bpe_storage_round_trips_and_reads_files(bpe, tmp_path):
    _train_bpe().save(str(tmp_path / "tokenizer.json"))
    wide = tokenizer_lib.HuggingFaceTokenizer(
        tmp_path / "tokenizer.json", eos_token="<|end|>", pad_token="<|pad|>", vocab_size=640
    )
    assert wide.vocab_size == len(wide.token_bytes) == 640
    assert wide.token_bytes[: bpe.vocab_size] == bpe.token_bytes
    assert not any(wide.token_bytes[bpe.vocab_size :])
    again = tokenizer_lib.HuggingFaceTokenizer.from_bytes(wide.to_bytes())
    assert again.vocab_size == 640
    assert again.reserved == wide.reserved
    assert again.encode(FACTS[1]) == bpe.encode(FACTS[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eos_token": "<no>", "pad_token": "<|pad|>"}, "eos_token: found '<no>'"),
        ({"eos_token": "<|end|>", "pad_token": "<no>"}, "pad_token: found '<no>'"),
        ({"eos_token": "<|end|>", "pad_token": "<|end|>"}, "also eos_token"),
        ({"eos_token": "<|end|>", "pad_token": "<|pad|>", "vocab_size": 9}, "vocab_size: found 9"),
    ],
)
def test_bad_bpe_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_lib.HuggingFaceTokenizer(_train_bpe(), **arguments)


def test_bpe_must_be_byte_level():
    words = {"<|end|>": 0, "<|pad|>": 1, "a": 2, "b": 3}
    partial = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    with pytest.raises(ValueError, match="each of the 256 bytes"):
        tokenizer_lib.HuggingFaceTokenizer(partial, eos_token="<|end|>", pad_token="<|pad|>")
    names = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
    lossy = tokenizer_lib.HuggingFaceTokenizer(partial, **names, lossless=False)
    assert lossy.decode(lossy.encode("ab\x04ba")) == "abba"
    assert tokenizer_lib.from_bytes(lossy.to_bytes()).to_bytes() == lossy.to_bytes()
    spaced = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words | {"a b": 4}, merges=[]))
    with pytest.raises(ValueError, match="found the piece 'a b'"):
        tokenizer_lib.HuggingFaceTokenizer(spaced, eos_token="<|end|>", pad_token="<|pad|>")


def test_bpe_is_named_as_what_is_allowed():
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<|end|>": 0, "<|pad|>": 1}, "<|end|>")
    )
    with pytest.raises(
        ValueError, match="holds a WordLevel tokenizer; allowed is a byte-level BPE"
    ):
        tokenizer_lib.HuggingFaceTokenizer(words, eos_token="<|end|>", pad_token="<|pad|>")


def test_bpe_cuts_nothing_and_leaves_the_given_tokenizer_alone():
    library = _train_bpe()
    library.enable_truncation(3)
    library.enable_padding(length=50)
    names = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
    ours = tokenizer_lib.HuggingFaceTokenizer(library, **names)
    plain = tokenizer_lib.HuggingFaceTokenizer(_train_bpe(), **names)
    assert ours.encode_control(FACTS[0]) == plain.encode_control(FACTS[0])
    assert ours.encode(FACTS[0]) == plain.encode(FACTS[0])
    assert library.truncation["max_length"] == 3
    again = tokenizer_lib.from_bytes(ours.to_bytes())
    assert again.to_bytes() == ours.to_bytes()
    assert again.encode_control(FACTS[0]) == plain.encode_control(FACTS[0])


def test_what_was_published_outlives_storing():
    names = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
    published = {"config.json": {"max_position_embeddings": 4096}}
    ours = tokenizer_lib.HuggingFaceTokenizer(_train_bpe(), **names, published=published)
    assert tokenizer_lib.from_bytes(ours.to_bytes()).published == published
    # As a checkpoint was stored before anything of this came along.
    older = tokenizer_lib.HuggingFaceTokenizer(_train_bpe(), **names)
    assert b"published" not in older.to_bytes()
    assert older.published == {}
