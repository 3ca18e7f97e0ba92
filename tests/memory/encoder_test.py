"""Text vectors: pooled where the text ends, of unit length, deaf to padding."""

import jax
import numpy as np
import pytest

from atommem_jax.memory import encoder
from atommem_jax.model import transformer as model_lib
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import Transformer
from tests.helpers import tiny

MODEL = Transformer(ModelConfig(260, width=16, num_layers=1, mlp_width=24, qk_norm=True, pad_id=7))


@pytest.fixture(scope="module")
def params():
    return tiny.disturb(model_lib.init_params(MODEL, jax.random.key(0)), 0.2)


def test_a_vector_is_the_hidden_state_of_the_last_token(params):
    tokens = np.array([[5, 9, 7, 7, 7], [5, 9, 3, 4, 7]], np.int32)
    lengths = np.array([3, 5], np.int32)
    found = encoder.embed(MODEL, params, tokens, lengths)
    hidden, _ = MODEL.apply({"params": params}, tokens[:1, :3], np.zeros(1, np.int32))
    expected = np.asarray(hidden)[0, 2]
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    short = encoder.embed(MODEL, params, tokens[:1, :3], lengths[:1])
    np.testing.assert_allclose(found[:1], short, atol=1e-6)


def test_fewer_components_are_normalised_again(params):
    tokens, lengths = np.array([[5, 9, 7]], np.int32), np.array([3], np.int32)
    whole = np.asarray(encoder.embed(MODEL, params, tokens, lengths))[0, :4]
    found = encoder.embed(MODEL, params, tokens, lengths, dim=4)
    np.testing.assert_allclose(found[0], whole / np.linalg.norm(whole), atol=1e-6)
    with pytest.raises(ValueError, match=r"dim=17: allowed is 1 to model\.width=16"):
        encoder.embed(MODEL, params, tokens, lengths, dim=17)


def test_no_tokens_give_zero(params):
    found = encoder.embed(MODEL, params, np.full((1, 4), 7, np.int32), np.zeros(1, np.int32))
    np.testing.assert_array_equal(found, np.zeros((1, 16), np.float32))


def test_texts_end_with_the_closing_token():
    tokenizer = tiny.make_tokenizer()
    ids = tokenizer.encode("who moved to the garden")
    tokens, lengths = encoder.encode(tokenizer, ["who moved to the garden", ""], len(ids) + 2)
    pad = tokenizer.pad_id
    assert tokens.tolist() == [[*ids, pad, pad], [pad] * (len(ids) + 2)]
    assert lengths.tolist() == [len(ids) + 1, 1]
    cut, lengths = encoder.encode(tokenizer, ["who moved to the garden"], 2, end_id=5)
    assert (cut.tolist(), lengths.tolist()) == ([[ids[0], 5]], [2])
    with pytest.raises(ValueError, match=r"max_length=0: must be at least 1"):
        encoder.encode(tokenizer, [""], 0)


def test_a_query_has_its_instruction_in_front():
    assert encoder.instruct("Find it.", "where?") == "Instruct: Find it.\nQuery:where?"


# ---------------------------------------------------------------------------------------------
# Keys of a memory


class Letters:
    """A tokenizer of letters, of which each id may stand for several."""

    def __init__(self, pieces, pad_id):
        self.token_bytes = tuple(
            piece if isinstance(piece, bytes) else piece.encode() for piece in pieces
        )
        self.vocab_size, self.pad_id, self.eos_id = len(pieces), pad_id, pad_id
        self.reserved = {}

    def encode(self, text):
        return [self.token_bytes.index(letter.encode()) for letter in text]


ENCODER = Letters(["a", "b", "c", "d", ""], pad_id=4)
POLICY = Letters(["a", "c", "bad", b"\xc3", "", "da"], pad_id=4)


def test_tokens_of_the_policy_stand_for_those_of_the_encoder():
    table = encoder.translate(POLICY, ENCODER)
    assert table.tolist() == [
        [0, -1, -1],  # the same in both
        [2, -1, -1],
        [1, 0, 3],
        [-1, -1, -1],  # half a letter
        [-1, -1, -1],  # padding
        [3, 0, -1],
    ]
    assert encoder.translate(ENCODER, ENCODER)[:, 0].tolist() == [0, 1, 2, 3, -1]


def make_keys(params, dim=16):
    return encoder.EncoderEmbedding(
        model=MODEL,
        dim=dim,
        end_id=ENCODER.pad_id,
        params=params,
        pieces=encoder.translate(POLICY, ENCODER),
        instruction=np.array([2, 2, 1], np.int32),
    )


def test_keys_are_the_vectors_of_the_translated_texts(params):
    keys = make_keys(params)
    tokens = np.array([[2, 0, 9, 9], [1, 5, 3, 0], [0, 0, 0, 0]], np.int32) % 6
    tokens[0, 2:] = POLICY.pad_id
    lengths = np.array([2, 4, 0], np.int32)
    for ask, before in ((False, []), (True, [2, 2, 1])):
        found = (keys.ask if ask else keys)(tokens, lengths)
        for row, ids in enumerate(([1, 0, 3, 0], [2, 3, 0, 0])):
            text = np.array([[*before, *ids, ENCODER.pad_id]], np.int32)
            expected = encoder.embed(MODEL, params, text, np.array([text.size], np.int32))[0]
            np.testing.assert_allclose(found[row], expected, atol=1e-5)
        assert not np.asarray(found[2]).any()


def test_a_batch_is_computed_a_few_texts_at_a_time(params, monkeypatch):
    """Mapped over trajectories and actions, with gaps: as each text by itself, and no more."""
    encoder._embed_rows.cache_clear()
    monkeypatch.setattr(encoder, "_AT_ONCE", 30)  # three rows at a time
    keys = make_keys(params, dim=5)
    rng = np.random.default_rng(0)
    tokens = rng.choice([0, 1, 2, 5], (6, 3, 4)).astype(np.int32)
    lengths = rng.integers(0, 5, (6, 3)).astype(np.int32)
    assert (lengths == 0).any()
    found = jax.jit(jax.vmap(lambda keys, *text: keys(*text), (None, 0, 0)))(keys, tokens, lengths)
    assert found.shape == (6, 3, 5)
    for place in np.ndindex(6, 3):
        alone = keys(tokens[place], lengths[place])
        np.testing.assert_allclose(found[place], alone, atol=1e-5)
    encoder._embed_rows.cache_clear()


def test_a_text_too_long_is_cut_before_the_closing_token(params):
    keys = make_keys(params)
    tokens = np.full((1, 4), 2, np.int32)  # four times "bad", of which eight letters have room
    found = keys(tokens, np.array([4], np.int32))
    ids = [*([1, 0, 3] * 4)[:8], ENCODER.pad_id]
    text = np.array([ids], np.int32)
    expected = encoder.embed(MODEL, params, text, np.array([9], np.int32))
    np.testing.assert_allclose(found, expected, atol=1e-5)
