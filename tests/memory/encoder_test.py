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
