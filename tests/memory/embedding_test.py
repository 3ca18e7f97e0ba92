"""Keys: exact properties, and what a hashed projection promises about cosines."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.memory import embedding
from atommem_jax.memory.embedding import HashedBagOfTokens, PooledTokens

EMBED = embedding.HashedBagOfTokens(vocab_size=50, dim=100, seed=3)
_embed = jax.jit(EMBED)


def _key(tokens, width=6, pad=0):
    row = jnp.array(list(tokens) + [pad] * (width - len(tokens)), jnp.int32)
    return np.asarray(_embed(row, jnp.int32(len(tokens))))


def test_keys_are_float32_unit_vectors():
    for tokens in ([7], [7, 7], [1, 2, 3, 4, 5, 6]):
        key = _key(tokens)
        assert key.shape == (100,)
        assert key.dtype == np.float32
        assert np.linalg.norm(key.astype(np.float64)) == pytest.approx(1.0, abs=1e-6)


def test_one_token_has_a_key_of_equal_magnitudes():
    np.testing.assert_allclose(np.abs(_key([7])), 0.1, rtol=1e-6)


def test_the_empty_text_has_the_zero_key():
    np.testing.assert_array_equal(_key([]), np.zeros(100))


def test_padding_and_order_change_no_bit():
    want = _key([5, 9, 11])
    np.testing.assert_array_equal(_key([5, 9, 11], pad=49), want)
    np.testing.assert_array_equal(_key([5, 9, 11], width=17), want)
    np.testing.assert_array_equal(_key([11, 5, 9]), want)


def test_only_proportions_of_tokens_count():
    np.testing.assert_allclose(_key([5, 9, 5, 9]), _key([9, 5]), rtol=1e-6)


def test_any_batch_dims_give_the_same_bits_as_single_texts():
    rng = np.random.default_rng(0)
    tokens = jnp.array(rng.integers(0, 50, (3, 5, 6)), jnp.int32)
    lengths = jnp.array(rng.integers(0, 7, (3, 5)), jnp.int32)
    batched = np.asarray(_embed(tokens, lengths))
    mapped = jax.jit(jax.vmap(jax.vmap(EMBED)))(tokens, lengths)
    np.testing.assert_array_equal(mapped, batched)
    for i in range(3):
        for j in range(5):
            single = _key(np.asarray(tokens[i, j, : int(lengths[i, j])]))
            np.testing.assert_array_equal(batched[i, j], single)


def test_a_cosine_approximates_the_cosine_of_token_counts():
    """Noise of a projection on 4,096 signs: five deviations of 1/64 each."""
    embed = embedding.HashedBagOfTokens(vocab_size=200, dim=4096)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 12, (8, 20))  # few ids, so that texts share many
    counts = np.stack([np.bincount(row, minlength=12) for row in tokens]).astype(float)
    counts /= np.linalg.norm(counts, axis=1, keepdims=True)
    keys = np.asarray(embed(jnp.array(tokens, jnp.int32), jnp.full(8, 20, jnp.int32)))
    np.testing.assert_allclose(keys @ keys.T, counts @ counts.T, atol=5 / 64)


def test_rows_do_not_depend_on_the_vocabulary_size():
    larger = embedding.HashedBagOfTokens(vocab_size=500, dim=100, seed=3)
    tokens, length = jnp.array([49, 0, 3], jnp.int32), jnp.int32(3)
    np.testing.assert_array_equal(larger(tokens, length), EMBED(tokens, length))


def test_the_seed_changes_the_rows():
    other = embedding.HashedBagOfTokens(vocab_size=50, dim=100, seed=4)
    tokens, length = jnp.array([7], jnp.int32), jnp.int32(1)
    assert abs(float(jnp.dot(other(tokens, length), EMBED(tokens, length)))) < 0.5


def test_signs_are_the_published_splitmix64_stream():
    """The first output of SplitMix64 from state 0 is public: keys are portable."""
    assert int(embedding._scramble(np.array([0], np.uint64))[0]) == 0xE220A8397B1DCDAF


def test_equal_fields_are_one_static_argument():
    same = embedding.HashedBagOfTokens(vocab_size=50, dim=100, seed=3)
    assert same == EMBED
    assert hash(same) == hash(EMBED)
    assert embedding.HashedBagOfTokens(vocab_size=51, dim=100, seed=3) != EMBED


@pytest.mark.parametrize("field", ["vocab_size", "dim"])
def test_sizes_must_be_positive(field):
    with pytest.raises(ValueError, match=f"HashedBagOfTokens.{field}=0: must be at least 1"):
        embedding.HashedBagOfTokens(**{"vocab_size": 5, "dim": 5, field: 0})


@pytest.mark.parametrize("times", [1, 200])
def test_texts_too_long_for_exact_norms_are_refused(times):
    """A repeated token adds up to the largest sums there can be: its key is that of one of it."""
    weights = b"" if times == 1 else bytes([times] * 5)
    embed = embedding.HashedBagOfTokens(vocab_size=5, dim=1024, weights=weights)
    most = 32767 // times  # 32,768² x 1,024 is 2**40
    with pytest.raises(ValueError, match=f"texts of {most + 1} tokens in dim=1024"):
        embed(jnp.zeros(most + 1, jnp.int32), jnp.int32(1))
    longest = embed(jnp.zeros(most, jnp.int32), jnp.int32(most))
    np.testing.assert_array_equal(longest, embed(jnp.zeros(1, jnp.int32), jnp.int32(1)))


@pytest.mark.parametrize("weighted", [False, True])
def test_keys_are_those_of_python_integers(weighted):
    """Whose squares need more than 32 bits."""
    rng = np.random.default_rng(5)
    weights = bytes(rng.integers(1, 256, 40).tolist())
    embed = embedding.HashedBagOfTokens(40, dim=256, weights=weights if weighted else b"")
    tokens = rng.integers(0, 40, (4, 250))
    tokens[0] = 7
    lengths = np.array([250, 250, 31, 0], np.int32)
    keys = np.asarray(jax.jit(embed)(jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths)))
    for row, length, key in zip(tokens.tolist(), lengths.tolist(), keys, strict=True):
        sums = [0] * 256
        for token in row[:length]:
            times = weights[token] if weighted else 1
            sums = [s + times * int(x) for s, x in zip(sums, embed._signs[token], strict=True)]
        square = sum(s * s for s in sums)
        found = jax.jit(embedding._sum_squares)(jnp.asarray(sums, jnp.int32))
        np.testing.assert_array_equal(found, np.float32([square]))
        # A compiled quotient may be a product with the reciprocal.
        wanted = np.array(sums) / math.sqrt(max(square, 1))
        np.testing.assert_allclose(key, wanted, rtol=3e-7)


def test_weights_must_be_an_octet_for_each_token():
    for weights in (bytes(4), bytes([1] * 3)):
        with pytest.raises(ValueError, match=r"HashedBagOfTokens\.weights.*vocab_size=4 octets"):
            embedding.HashedBagOfTokens(vocab_size=4, weights=weights)


def test_the_largest_weights_that_texts_leave_room_for():
    most = embedding.most_times(1024, 128)
    embed = embedding.HashedBagOfTokens(3, dim=1024, weights=bytes([most] * 3))
    embed(jnp.zeros(128, jnp.int32), jnp.int32(128))
    assert (128 * (most + 1)) ** 2 * 1024 >= 1 << 40


def test_one_length_per_text():
    with pytest.raises(ValueError, match=r"length.shape=\(\): must be tokens.shape"):
        EMBED(jnp.zeros((2, 3), jnp.int32), jnp.int32(1))


# ---------------------------------------------------------------------------------------------
# The policy's own embeddings


def pool(dim=16, weights=b"", seed=0):
    """(unbound, bound) with the rows of a random policy, and these."""
    rows = np.random.default_rng(seed).normal(size=(50, dim)).astype(np.float32)
    unbound = PooledTokens(HashedBagOfTokens(50, dim), weights)
    return unbound, unbound.bind({"embedder": {"embedding": jnp.asarray(rows)}}), rows


@pytest.mark.parametrize("weighted", [False, True])
def test_pooled_rows_are_those_of_the_policy(weighted):
    times = np.random.default_rng(1).integers(1, 256, 50)
    _, embed, rows = pool(weights=times.astype(np.uint8).tobytes() if weighted else b"")
    tokens = np.random.default_rng(2).integers(0, 50, (4, 9)).astype(np.int32)
    length = np.array([9, 5, 1, 0], np.int32)
    found = np.asarray(jax.jit(lambda embed, *text: embed(*text))(embed, tokens, length))
    for key, row, n in zip(found, tokens, length, strict=True):
        scale = times[row[:n], None] if weighted else 1.0
        total = (rows[row[:n]].astype(np.float64) * scale).sum(axis=0)
        expected = total / max(np.linalg.norm(total), 1e-9)
        np.testing.assert_allclose(key, expected, atol=2e-3)
    assert not found[3].any(), "an empty text"


def test_a_pooled_key_depends_on_its_text_alone():
    """To the last bit: on no padding, order, batch or splitting of what it is computed from."""
    _, embed, _ = pool(dim=24, weights=bytes([255] * 50))
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50, 40).astype(np.int32)
    alone = np.asarray(embed(jnp.asarray(text), jnp.int32(40)))
    padded = jnp.asarray(np.concatenate([text, rng.integers(0, 50, 200).astype(np.int32)]))
    np.testing.assert_array_equal(embed(padded, jnp.int32(40)), alone)
    shuffled = jnp.asarray(rng.permutation(text))
    batch = jnp.stack([shuffled, jnp.asarray(text), jnp.zeros_like(shuffled)])
    found = jax.jit(jax.vmap(embed.__call__))(batch, jnp.array([40, 40, 3]))
    np.testing.assert_array_equal(found[0], alone)
    np.testing.assert_array_equal(found[1], alone)


def test_without_a_policy_pooled_keys_are_hashed_ones():
    unbound, bound, _ = pool()
    text = jnp.array([3, 4, 5]), jnp.int32(3)
    np.testing.assert_array_equal(unbound(*text), HashedBagOfTokens(50, 16)(*text))
    assert np.abs(bound(*text) - unbound(*text)).max() > 0.1


def test_pooled_texts_too_long_for_their_sums_are_refused():
    _, bound, _ = pool(weights=bytes([255] * 50))
    with pytest.raises(ValueError, match=r"texts of 5000 tokens, a token counting up to 255 times"):
        jax.eval_shape(bound, jnp.zeros(5000, jnp.int32), jnp.int32(1))
