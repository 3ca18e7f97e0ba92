"""Published weights: names, orientation, meshes, memory, round trips, and what is refused.

Files are written here with NumPy and literal names; `parity_test.py` compares with transformers.
"""

import dataclasses
import gc
import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec

from atommem_jax.model import transformer as model_lib
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import Transformer
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import rules
from atommem_jax.weights import hf_export, huggingface
from atommem_jax.weights.hf_config import PublishedError
from tests.helpers import processes, tiny

QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
LLAMA = {
    **QWEN,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": True,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def make_tensors(fields, dtype="float32", seed=0):
    """Random tensors under published names, in published orientation."""
    width, mlp, depth = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    heads, shared = fields["num_attention_heads"] * depth, fields["num_key_value_heads"] * depth
    shapes = {"model.embed_tokens.weight": (fields["vocab_size"], width)}
    for i in range(fields["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (width,),
                "self_attn.q_proj": (heads, width),
                "self_attn.k_proj": (shared, width),
                "self_attn.v_proj": (shared, width),
                "self_attn.o_proj": (width, heads),
                "post_attention_layernorm": (width,),
                "mlp.gate_proj": (mlp, width),
                "mlp.up_proj": (mlp, width),
                "mlp.down_proj": (width, mlp),
            }.items()
        }
        if fields["model_type"] == "qwen3":
            shapes |= {
                f"model.layers.{i}.self_attn.{name}.weight": (depth,)
                for name in ("q_norm", "k_norm")
            }
        if fields["model_type"] == "qwen2":
            shapes |= {
                f"model.layers.{i}.self_attn.{name}_proj.bias": (size,)
                for name, size in (("q", heads), ("k", shared), ("v", shared))
            }
    shapes["model.norm.weight"] = (width,)
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (fields["vocab_size"], width)
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.3, s).astype(DTYPES[dtype]) for n, s in shapes.items()}


def write(folder, fields, tensors, files=1):
    """A Hugging Face directory; tensors are dealt out over the files in turn."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if files == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    places = {name: f"model-{i % files + 1}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        held = {name: tensors[name] for name, place in places.items() if place == file}
        safetensors.numpy.save_file(held, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def read_all(folder):
    """Every published tensor in a directory."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= safetensors.numpy.load_file(path)
    return found


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


# ---------------------------------------------------------------------------------------------
# Names and orientation


@pytest.mark.parametrize("files", [1, 3])
def test_every_tensor_comes_to_its_place(tmp_path, files):
    tensors = make_tensors(QWEN)
    config, params = huggingface.load(write(tmp_path, QWEN, tensors, files))
    assert config == ModelConfig(
        vocab_size=40,
        width=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_width=8,
        mlp_width=24,
        rope_theta=1e6,
        qk_norm=True,
        tie_embeddings=False,
    )
    places = {
        ("attention_norm", "scale"): "input_layernorm",
        ("query", "kernel"): "self_attn.q_proj",
        ("key", "kernel"): "self_attn.k_proj",
        ("value", "kernel"): "self_attn.v_proj",
        ("query_norm", "scale"): "self_attn.q_norm",
        ("key_norm", "scale"): "self_attn.k_norm",
        ("out", "kernel"): "self_attn.o_proj",
        ("mlp_norm", "scale"): "post_attention_layernorm",
        ("gate", "kernel"): "mlp.gate_proj",
        ("up", "kernel"): "mlp.up_proj",
        ("down", "kernel"): "mlp.down_proj",
    }
    expected = {
        "embedder": {"embedding": tensors["model.embed_tokens.weight"]},
        "final_norm": {"scale": tensors["model.norm.weight"]},
        "head": tensors["lm_head.weight"].T,
        "layers": {},
        "value_head": {
            "kernel": np.zeros((16, 1), np.float32),
            "bias": np.zeros(1, np.float32),
        },
    }
    for (module, leaf), name in places.items():
        stack = np.stack([tensors[f"model.layers.{i}.{name}.weight"].T for i in range(2)])
        expected["layers"][module] = {leaf: stack}
    assert_same_bits(params, expected)
    shapes = jax.eval_shape(lambda: model_lib.init_params(Transformer(config), jax.random.key(0)))
    assert jax.tree.structure(shapes) == jax.tree.structure(params)


def test_half_precision_becomes_float32_or_stays(tmp_path):
    tensors = make_tensors(LLAMA, "bfloat16")
    folder = write(tmp_path, LLAMA, tensors)
    _, wide = huggingface.load(folder)
    _, narrow = huggingface.load(folder, dtype="bfloat16")
    stored = tensors["model.embed_tokens.weight"]
    assert_same_bits(wide["embedder"]["embedding"], stored.astype(np.float32))
    assert_same_bits(narrow["embedder"]["embedding"], stored)
    assert {x.dtype for x in jax.tree.leaves(narrow["layers"])} == {jnp.dtype(jnp.bfloat16)}
    assert narrow["value_head"]["bias"].dtype == jnp.float32


@pytest.mark.parametrize("architecture", ["Qwen3Model", "Qwen3ForCausalLM"])
def test_a_bare_trunk_has_other_names_and_no_head(tmp_path, architecture):
    """As Qwen3-Embedding was published: no prefix, and a config that names a head."""
    fields = {**QWEN, "architectures": [architecture]}
    tensors = make_tensors(QWEN)
    del tensors["lm_head.weight"]
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    config, params = huggingface.load(write(tmp_path, fields, bare))
    assert config.tie_embeddings
    assert_same_bits(params["embedder"]["embedding"], tensors["model.embed_tokens.weight"])


def test_a_copy_of_tied_embeddings_is_not_read(tmp_path):
    tensors = make_tensors({**LLAMA, "tie_word_embeddings": False})
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    config, params = huggingface.load(write(tmp_path, LLAMA, tensors))
    assert config.tie_embeddings
    assert "head" not in params


# ---------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("fields", [QWEN, QWEN2, LLAMA], ids=["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_tensors_come_back_bit_for_bit(tmp_path, fields, dtype):
    tensors = make_tensors(fields, dtype)
    config, params = huggingface.load(write(tmp_path / "in", fields, tensors))
    out = tmp_path / "out"
    hf_export.save(out, params, config, dtype=dtype, max_file_bytes=2000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    again = read_all(out)
    assert_same_bits(again, tensors)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert huggingface.open_weights(out)[0] == config


@pytest.mark.parametrize("fields", [QWEN, QWEN2], ids=["qwen3", "qwen2"])
def test_our_parameters_come_back_bit_for_bit_from_and_to_a_mesh(tmp_path, fields):
    config = huggingface.open_weights(write(tmp_path / "in", fields, make_tensors(fields)))[0]
    fresh = model_lib.init_params(Transformer(config), jax.random.key(0))
    params = tiny.disturb(fresh, 0.1)  # the value head too
    mesh = mesh_lib.make_mesh(2, 2, 2)
    spread = jax.device_put(params, config.layout.shardings(params, mesh))
    hf_export.save(tmp_path / "out", spread, config)
    assert not list((tmp_path / "out").glob("model-*"))
    _, here = huggingface.load(tmp_path / "out")
    assert_same_bits(here, params)
    _, there = huggingface.load(tmp_path / "out", mesh)
    assert_same_bits(there, params)


def test_rope_scaling_is_written_and_read(tmp_path):
    config = ModelConfig(40, rope_theta=5e5, rope_factor=8.0, rope_original_length=64)
    params = model_lib.init_params(Transformer(config), jax.random.key(0))
    hf_export.save(tmp_path, params, config)
    assert huggingface.open_weights(tmp_path)[0] == config


def test_a_smaller_model_leaves_nothing_of_a_larger_one(tmp_path):
    config = huggingface.open_weights(write(tmp_path / "in", QWEN, make_tensors(QWEN)))[0]
    params = model_lib.init_params(Transformer(config), jax.random.key(0))
    hf_export.save(tmp_path / "out", params, config, max_file_bytes=2000)
    hf_export.save(tmp_path / "out", params, config)
    assert_same_bits(huggingface.load(tmp_path / "out")[1], params)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "value_head.safetensors", "config.json"}
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_a_model_is_not_made_narrower():
    with pytest.raises(ValueError, match=r"vocab_size=39: must be at least the model's own 40"):
        huggingface.widen({}, ModelConfig(40), 39)


# ---------------------------------------------------------------------------------------------
# Meshes and memory


class Spy:
    """Weights that note how much was read of which tensor."""

    def __init__(self, weights):
        self.weights, self.place, self.shapes = weights, weights.place, weights.shapes
        self.read_sizes = {}

    def read(self, name, index):
        part = self.weights.read(name, index)
        self.read_sizes.setdefault(name, []).append(part.size)
        return part


def test_each_device_gets_its_part_and_only_that_is_read(tmp_path):
    tensors = make_tensors(QWEN)
    config, weights = huggingface.open_weights(write(tmp_path, QWEN, tensors))
    expected = huggingface.place(weights, config)
    spy = Spy(weights)
    mesh = mesh_lib.make_mesh(2, 2, 2)
    params = huggingface.place(spy, config, mesh)
    assert_same_bits(params, expected)
    for name, leaf in jax.tree_util.tree_leaves_with_path(params):
        spec = config.layout.specs(params, mesh)
        for part in name:
            spec = spec[part.key]
        assert leaf.sharding.spec == spec
    assert params["layers"]["down"]["kernel"].sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    for name, tensor in tensors.items():
        parts = 4 if tensor.ndim == 2 else 1  # replicas over `data` are not read again
        assert spy.read_sizes[name] == [tensor.size // parts] * parts, name


def test_rollout_rules_are_followed(tmp_path):
    folder = write(tmp_path, QWEN, make_tensors(QWEN))
    mesh = mesh_lib.make_mesh(2, 2, 2)
    _, params = huggingface.load(folder, mesh, rules=rules.ROLLOUT, dtype="bfloat16")
    spec = params["layers"]["query"]["kernel"].sharding.spec
    assert spec == PartitionSpec(None, None, "tensor")


PROCESS = """
import sys
import jax
from atommem_jax.parallel.mesh import make_mesh
from atommem_jax.weights import hf_export, huggingface

address, index, source, target = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, 2, int(index))
config, params = huggingface.load(source, make_mesh(1, 2, 2))
assert not params["layers"]["query"]["kernel"].is_fully_addressable
hf_export.save(target, params, config, max_file_bytes=3000)
"""


@pytest.mark.processes
def test_processes_read_their_parts_and_one_writes(tmp_path):
    tensors = make_tensors(QWEN)
    source, target = write(tmp_path / "in", QWEN, tensors), tmp_path / "out"
    address = f"localhost:{processes.find_port()}"
    commands = [["-c", PROCESS, address, str(i), str(source), str(target)] for i in range(2)]
    with processes.Group(commands, tmp_path, "pretrained") as group:
        group.finish()
    assert_same_bits(read_all(target), tensors)


def test_the_host_holds_a_few_tensors_at_a_time(tmp_path):
    """Tracemalloc sees what NumPy and safetensors allocate, and not what lies on devices."""
    fields = {**LLAMA, "num_hidden_layers": 24, "hidden_size": 256, "intermediate_size": 1024}
    tensors = make_tensors(fields)
    largest, total = (f(x.nbytes for x in tensors.values()) for f in (max, sum))
    folder = write(tmp_path / "in", fields, tensors)
    del tensors
    config, params = huggingface.load(folder)  # compiles
    hf_export.save(tmp_path / "first", params, config, max_file_bytes=largest)  # so does it
    del params
    gc.collect()
    tracemalloc.start()
    config, params = huggingface.load(folder)
    loading = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    hf_export.save(tmp_path / "out", params, config, max_file_bytes=largest)
    saving = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 50 * largest
    assert loading < 2 * largest
    assert saving < 4 * largest


# ---------------------------------------------------------------------------------------------
# What is refused


def expect(folder, *words):
    with pytest.raises(PublishedError) as caught:
        huggingface.load(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_missing_tensor_is_named(tmp_path):
    tensors = make_tensors(QWEN)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    expect(
        write(tmp_path, QWEN, tensors),
        "model.layers.1.mlp.up_proj.weight [24, 16] is missing",
        "of 25 tensors",
    )


def test_an_unexpected_tensor_is_named(tmp_path):
    tensors = make_tensors(QWEN) | {
        "model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)
    }
    expect(write(tmp_path, QWEN, tensors), "model.layers.0.self_attn.q_proj.bias [32]")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("vocab_size", 48, ["model.embed_tokens.weight is [40, 16]", "[48, 16]", "vocab_size"]),
        ("intermediate_size", 32, ["layers.0.mlp.gate_proj.weight is [24, 16]", "[32, 16]"]),
        ("head_dim", 16, ["layers.0.self_attn.q_proj.weight", "num_attention_heads x head_dim"]),
        ("num_hidden_layers", 1, ["found model.layers.1.input_layernorm.weight"]),
        ("num_hidden_layers", 3, ["model.layers.2.", "is missing"]),
        ("num_hidden_layers", 2_000_000_000, ["2000000000 layers by config.json", "only 25"]),
        ("tie_word_embeddings", True, []),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, field, value, words):
    folder = write(tmp_path, {**QWEN, field: value}, make_tensors(QWEN))
    if words:
        expect(folder, *words)
    else:
        huggingface.load(folder)


@pytest.mark.parametrize("cut", [4, 3000, 40_000])
def test_a_truncated_file_is_named_with_the_tensor(tmp_path, cut):
    path = write(tmp_path, QWEN, make_tensors(QWEN)) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut] if cut < len(whole) else whole[:4])
    size = len(path.read_bytes())
    words = ["truncated", f"after {size} bytes of {len(whole)}", ".weight"]
    expect(tmp_path, "model.safetensors", *(words if size > 4 else ["within its header"]))


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    write(tmp_path, QWEN, make_tensors(QWEN))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops and more")
    expect(tmp_path, "model.safetensors", "copy the file again")


def test_missing_files_are_named(tmp_path):
    expect(tmp_path, "config.json: no such file")
    folder = write(tmp_path, QWEN, make_tensors(QWEN), files=2)
    (folder / "model-2.safetensors").unlink()
    expect(folder, "model-2.safetensors: no such file")
    (folder / "model.safetensors.index.json").unlink()
    expect(folder, "holds neither model.safetensors nor model.safetensors.index.json")


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    folder = write(tmp_path, QWEN, make_tensors(QWEN), files=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-1.safetensors"
    path.write_text(json.dumps(index))
    expect(folder, "does not hold model.norm.weight")
    for places in (None, [], {"model.norm.weight": 1}):
        path.write_text(json.dumps({"weight_map": places}))
        expect(folder, "model.safetensors.index.json: weight_map must be an object")


def test_a_quantised_tensor_is_named(tmp_path):
    tensors = make_tensors(QWEN)
    tensors["model.layers.1.self_attn.v_proj.weight"] = np.ones((16, 16), np.int8)
    expect(write(tmp_path, QWEN, tensors), "model.layers.1.self_attn.v_proj.weight has dtype I8")


def test_a_value_head_of_another_width_is_refused(tmp_path):
    folder = write(tmp_path, QWEN, make_tensors(QWEN))
    head = {"value_head.weight": np.ones((1, 8), np.float32)}
    safetensors.numpy.save_file(head, folder / "value_head.safetensors")
    expect(folder, "value_head.weight is [1, 8], and must be [1, 16]")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"token_shift": 2}, r"model\.token_shift=2: no published architecture"),
        ({"num_features": 3}, r"model\.num_features=3"),
        ({"rope_fraction": 0.5}, r"model\.rope_fraction=0\.5"),
    ],
)
def test_a_model_that_nobody_else_has_is_not_written(tmp_path, change, word):
    config = dataclasses.replace(ModelConfig(40), **change)
    with pytest.raises(PublishedError, match=word):
        hf_export.save(tmp_path / "out", {}, config)
    assert not (tmp_path / "out").exists()


def test_parameters_of_another_config_are_not_written(tmp_path):
    config = ModelConfig(40)
    params = model_lib.init_params(Transformer(config), jax.random.key(0))
    for other, words in [
        (
            dataclasses.replace(config, mlp_width=96),
            r"layers/\w+/kernel is .*192.* it must be .*96",
        ),
        (dataclasses.replace(config, tie_embeddings=False), r"head is absent"),
    ]:
        with pytest.raises(ValueError, match=words):
            hf_export.save(tmp_path / "out", params, other)


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dtype='float16': allowed are float32, bfloat16"):
        huggingface.load(write(tmp_path, QWEN, make_tensors(QWEN)), dtype="float16")
