"""The transformer against a NumPy forward pass in float64, and against itself in other forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.model import transformer as model_lib
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import Transformer
from tests.helpers import tiny

ROWS, LENGTH, FEATURES = 3, 7, 3
LENGTHS = np.array([7, 4, 1])

PLAIN = ModelConfig(
    vocab_size=23, width=16, num_layers=2, num_heads=2, num_kv_heads=2, head_width=8, mlp_width=24
)
RICH = dataclasses.replace(
    PLAIN,
    num_heads=4,
    qk_norm=True,
    rope_fraction=0.5,
    tie_embeddings=False,
    token_shift=2,
    num_features=FEATURES,
    remat=True,
)
# Turns over 12 positions: 1.91, 0.29, 0.044, 0.0066; the first is kept, the second between.
STRETCHED = dataclasses.replace(
    PLAIN,
    rope_theta=300.0,
    rope_factor=4.0,
    rope_low_frequency_factor=0.1,
    rope_high_frequency_factor=1.0,
    rope_original_length=12,
)
BIASED = dataclasses.replace(RICH, qk_norm=False, qkv_bias=True)
CONFIGS = {"plain": PLAIN, "rich": RICH, "stretched": STRETCHED, "biased": BIASED}


@functools.cache
def make(name: str, **changes):
    """(config, parameters none of which is at its initial value)."""
    config = dataclasses.replace(CONFIGS[name], **changes)
    params = model_lib.init_params(Transformer(config), jax.random.key(1))
    return config, tiny.disturb(params, 0.2)


def make_rows(config, seed=0):
    """Left-padded tokens and features, their first slots, and where a token stands."""
    rng = np.random.default_rng(seed)
    real = np.arange(LENGTH)[None] >= LENGTH - LENGTHS[:, None]
    tokens = np.where(real, rng.integers(1, config.vocab_size, (ROWS, LENGTH)), config.pad_id)
    features = rng.random((ROWS, LENGTH, FEATURES)) < 0.5 if config.num_features else None
    return tokens.astype(np.int32), features, (LENGTH - LENGTHS).astype(np.int32), real


@functools.partial(jax.jit, static_argnames="config")
def forward(config, params, tokens, start, features):
    hidden, _ = Transformer(config).apply({"params": params}, tokens, start, features=features)
    return read_out(config, params, hidden)


@functools.partial(jax.jit, static_argnames="config")
def read(config, params, tokens, start, features):
    """Of the last token, with a cache of all."""
    hidden, cache = Transformer(config).apply(
        {"params": params}, tokens, start, features=features, method="read"
    )
    return (*read_out(config, params, hidden), cache)


@functools.partial(jax.jit, static_argnames="config")
def decode(config, params, token, start, features, cache, index):
    hidden, cache = Transformer(config).apply(
        {"params": params}, token, start, features=features, cache=cache, index=index
    )
    return (*read_out(config, params, hidden), cache)


def read_out(config, params, hidden):
    apply = functools.partial(Transformer(config).apply, {"params": params}, hidden)
    return apply(method="logits"), apply(method="value")


def oracle(config, params, tokens, features):
    """Logits [T V] and values [T] of one row without padding, in float64, head by head."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    length = len(tokens)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def rope(x):  # [T depth]; channel pairs as complex numbers that turn with the position
        half = int(config.head_width * config.rope_fraction) // 2
        speed = config.rope_theta ** (-np.arange(half) / half)
        for i, f in enumerate(speed if config.rope_factor > 1 else []):
            wavelength = 2 * np.pi / f
            longest = config.rope_original_length / config.rope_low_frequency_factor
            shortest = config.rope_original_length / config.rope_high_frequency_factor
            if wavelength > longest:
                speed[i] = f / config.rope_factor
            elif wavelength > shortest:
                smooth = (config.rope_original_length / wavelength) - (
                    config.rope_low_frequency_factor
                )
                smooth /= config.rope_high_frequency_factor - config.rope_low_frequency_factor
                speed[i] = (1 - smooth) * f / config.rope_factor + smooth * f
        turn = np.exp(1j * np.arange(length)[:, None] * speed[None])
        z = (x[:, :half] + 1j * x[:, half : 2 * half]) * turn
        return np.concatenate([z.real, z.imag, x[:, 2 * half :]], axis=1)

    embedded = p["embedder"]["embedding"][tokens]
    x = embedded.copy()
    for back in range(1, config.token_shift + 1):
        x[back:] += p["shift"][back - 1] * embedded[:-back]
    if features is not None:
        x += features @ p["features"]["kernel"]

    for layer in range(config.num_layers):
        w = jax.tree.map(lambda leaf, i=layer: leaf[i], p["layers"])
        h = norm(x, w["attention_norm"]["scale"])
        heads = []
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)

            def project(name, index, h=h, w=w):
                columns = slice(index * config.head_width, (index + 1) * config.head_width)
                bias = w[name]["bias"][columns] if config.qkv_bias else 0.0
                return h @ w[name]["kernel"][:, columns] + bias

            q, k, v = project("query", head), project("key", shared), project("value", shared)
            if config.qk_norm:
                q, k = norm(q, w["query_norm"]["scale"]), norm(k, w["key_norm"]["scale"])
            scores = rope(q) @ rope(k).T / np.sqrt(config.head_width)
            scores[np.triu_indices(length, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(heads, axis=1) @ w["out"]["kernel"]
        h = norm(x, w["mlp_norm"]["scale"])
        gate = h @ w["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"]["kernel"])) @ w["down"]["kernel"]

    x = norm(x, p["final_norm"]["scale"])
    head = p["embedder"]["embedding"].T if config.tie_embeddings else p["head"]
    return x @ head, (x @ p["value_head"]["kernel"] + p["value_head"]["bias"])[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_numpy_row_by_row(name):
    config, params = make(name)
    tokens, features, start, real = make_rows(config)
    logits, values = forward(config, params, tokens, start, features)

    assert (logits.dtype, values.dtype) == (jnp.float32, jnp.float32)
    for b in range(ROWS):
        row = None if features is None else features[b, real[b]]
        expected_logits, expected_values = oracle(config, params, tokens[b, real[b]], row)
        np.testing.assert_allclose(logits[b, real[b]], expected_logits, atol=1e-4)
        np.testing.assert_allclose(values[b, real[b]], expected_values, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype", "atol"),
    [
        ("plain", "float32", 1e-5),
        ("rich", "float32", 1e-5),
        ("biased", "float32", 1e-5),
        # Flax's RMSNorm mixes bfloat16 and float32.
        pytest.param("rich", "bfloat16", 0.1, marks=pytest.mark.relaxed_promotion),
    ],
)
def test_incremental_decode_equals_full_forward(name, dtype, atol):
    config, params = make(name, dtype=dtype)
    tokens, features, start, real = make_rows(config)
    full, values = forward(config, params, tokens, start, features)

    # Every row has its last token at the end, so a prefix up to slot 6 leaves one row empty.
    def part(x, *where):
        return None if x is None else x[:, slice(*where)]

    prefill = LENGTH - 3
    logits, first_values, cache = read(
        config, params, tokens[:, :prefill], start, part(features, prefill)
    )
    steps, step_values = [logits], [first_values]
    cache = cache.extend(3)
    assert cache.keys.dtype == cache.values.dtype == dtype
    for slot in range(prefill, LENGTH):
        logits, value, cache = decode(
            config,
            params,
            tokens[:, slot : slot + 1],
            start,
            part(features, slot, slot + 1),
            cache,
            jnp.int32(slot),
        )
        steps.append(logits)
        step_values.append(value)

    full, values, real = (x[:, prefill - 1 :] for x in (full, values, real))
    np.testing.assert_allclose(np.concatenate(steps, 1)[real], full[real], atol=atol)
    np.testing.assert_allclose(np.concatenate(step_values, 1)[real], values[real], atol=atol)


@pytest.mark.relaxed_promotion
def test_bfloat16_stays_near_float32_and_reads_out_in_float32():
    config, params = make("rich")
    tokens, features, start, real = make_rows(config)
    exact, _ = forward(config, params, tokens, start, features)
    half = dataclasses.replace(config, dtype="bfloat16")
    logits, values = forward(half, params, tokens, start, features)

    assert (logits.dtype, values.dtype) == (jnp.float32, jnp.float32)
    gap = np.abs(logits - exact)[real]
    assert gap.max() > 1e-4, "bfloat16 was not used"
    assert gap.max() < 0.05 * np.abs(exact[real]).max()


def test_the_id_of_padding_is_a_token_like_any_other_without_token_shift():
    """Published models give it a meaning: Qwen3-Embedding reads its vector there."""
    config, params = make("plain")
    tokens = np.array([[5, config.pad_id, 9, config.pad_id]], np.int32)
    logits, _ = forward(config, params, tokens, np.zeros(1, np.int32), None)
    expected, _ = oracle(config, params, tokens[0], None)
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)


def test_more_left_padding_changes_nothing():
    config, params = make("rich")
    tokens, features, start, real = make_rows(config)
    logits, values = forward(config, params, tokens, start, features)

    wider = np.pad(tokens, [(0, 0), (4, 0)], constant_values=config.pad_id)
    # Flags of padding are noise here: they must not matter.
    more = np.concatenate([np.ones((ROWS, 4, FEATURES), bool), features], axis=1)
    padded_logits, padded_values = forward(config, params, wider, start + 4, more)
    np.testing.assert_allclose(padded_logits[:, 4:][real], logits[real], atol=1e-5)
    np.testing.assert_allclose(padded_values[:, 4:][real], values[real], atol=1e-5)


def test_a_token_does_not_see_what_follows_or_other_rows():
    config, params = make("rich")
    tokens, features, start, _ = make_rows(config)
    logits, _ = forward(config, params, tokens, start, features)
    changed = tokens.copy()
    changed[0, -1] = changed[0, -1] % (config.vocab_size - 1) + 1
    changed[1:] = tokens[1:] % (config.vocab_size - 1) + 1
    other, _ = forward(config, params, changed, start, features)

    np.testing.assert_array_equal(logits[0, :-1], other[0, :-1])
    assert np.abs(logits[0, -1] - other[0, -1]).max() > 1e-3


def test_long_sums_are_exact_where_that_is_asked_for():
    config, params = make("plain", width=300, mlp_width=2050)
    tokens, features, start, real = make_rows(config)

    def compute(params):
        return forward(config, params, tokens, start, features)[0]

    def gradient():
        return jax.grad(lambda p: jnp.where(real[..., None], compute(p), 0.0).std())(params)

    plain, slope = compute(params), gradient()
    with jax.default_matmul_precision("highest"):
        exact, exact_slope = compute(params), gradient()
    for b in range(ROWS):
        expected, _ = oracle(config, params, tokens[b, real[b]], None)
        scale = np.abs(expected).max()
        error, default = (np.abs(x[b, real[b]] - expected).max() / scale for x in (exact, plain))
        print(f"relative errors: {error:.1e}, by default {default:.1e}")
        assert error < 3e-6
    for ours, theirs in zip(jax.tree.leaves(exact_slope), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_rematerialised_gradients_are_the_same():
    config, params = make("rich")
    tokens, features, start, real = make_rows(config)

    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(params, remat):
        def total(params):
            c = dataclasses.replace(config, remat=remat)
            logits, values = forward(c, params, tokens, start, features)
            return jnp.where(real, jnp.square(logits).sum(-1) + values, 0.0).sum()

        return jax.grad(total)(params)

    with_remat, without = gradient(params, True), gradient(params, False)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(with_remat), jax.tree.leaves(without), strict=True
    ):
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-4, atol=1e-3, err_msg=jax.tree_util.keystr(path)
        )
        assert np.abs(ours).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.relaxed_promotion  # Flax multiplies a bfloat16 norm by its float32 scale
def test_parameters_are_float32_and_counted():
    config, params = make("rich", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    c = config
    attention = c.width * c.head_width * (2 * c.num_heads + 2 * c.num_kv_heads) + 2 * c.head_width
    layer = attention + 3 * c.width * c.mlp_width + 2 * c.width
    ends = 2 * c.vocab_size * c.width + c.token_shift * c.width + FEATURES * c.width
    total = c.num_layers * layer + ends + c.width + c.width + 1
    assert model_lib.count_params(params) == total


def test_an_extended_cache_keeps_what_was_written():
    config, params = make("plain")
    tokens, features, start, _ = make_rows(config)
    _, _, cache = read(config, params, tokens, start, features)
    assert cache.keys.shape == cache.values.shape == (2, ROWS, 2, LENGTH, 8)
    assert cache.slots == LENGTH
    longer = cache.extend(3)
    assert longer.slots == LENGTH + 3
    token, flags = tokens[:, -1:], None if features is None else features[:, -1:]
    _, _, written = decode(config, params, token, start, flags, longer, LENGTH)
    again = written.extend(1)
    assert again.slots == LENGTH + 4
    for name in ("keys", "values"):
        np.testing.assert_array_equal(getattr(again, name), getattr(cache, name))
        later = getattr(again, f"later_{name}")
        assert later[..., 0, :].any()
        assert not later[..., 1:, :].any()


def test_missing_features_are_refused():
    config, params = make("rich")
    tokens, _, start, _ = make_rows(config)
    with pytest.raises(ValueError, match=r"model\.num_features=3, but no features"):
        Transformer(config).apply({"params": params}, tokens, start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, r"model\.num_heads=3 is not a multiple of model\.num_kv_heads=2"),
        ({"rope_fraction": 1.5}, r"model\.rope_fraction=1\.5: allowed is 0\.0 to 1\.0"),
        ({"rope_fraction": 0.4}, r"model\.rope_fraction=0\.4 of model\.head_width=8 gives 3"),
        ({"dtype": "float16"}, r"model\.dtype='float16': allowed are 'float32' and 'bfloat16'"),
        ({"width": 0}, r"model\.width=0: must be at least 1"),
        ({"num_layers": 0}, r"model\.num_layers=0: must be at least 1"),
        ({"num_kv_heads": 0}, r"model\.num_kv_heads=0: must be at least 1"),
        ({"num_heads": 0}, r"model\.num_heads=0: must be at least 1"),
        ({"rope_factor": 0.5}, r"model\.rope_factor=0\.5: must be at least 1\.0"),
        ({"rope_type": "ntk"}, r"model\.rope_type='ntk': allowed are llama3, linear, yarn"),
        ({"rope_beta_slow": 40.0}, r"rope_beta_slow=40\.0 must lie between 0 and .*beta_fast=32"),
        ({"rope_attention_factor": -1.0}, r"model\.rope_attention_factor=-1\.0: must be above"),
        (
            {"rope_low_frequency_factor": 4.0},
            r"rope_low_frequency_factor=4\.0 must lie between 0 and .*_high_frequency_factor=4\.0",
        ),
        ({"rope_original_length": 0}, r"model\.rope_original_length=0: must be at least 1"),
        ({"head_width": 0}, r"model\.head_width=0: must be at least 1"),
    ],
)
def test_validate_names_the_fields(change, message):
    PLAIN.validate()
    RICH.validate()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **change).validate()
