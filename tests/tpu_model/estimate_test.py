"""FLOPs against an independent count, times against arithmetic by hand, and what is printed."""

import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from atommem_jax.config import ConfigError, LoraConfig
from atommem_jax.model import lora, sampling
from atommem_jax.model.kv_cache import Prefix
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import Transformer, init_params
from atommem_jax.tpu_model import flops, hardware, hlo, loops, presentation, roofline
from atommem_jax.tpu_model.flops import Flops, Rows
from atommem_jax.tpu_model.roofline import Assumptions, Part, Placement, Sent
from tests.helpers import tiny

CONFIG = ModelConfig(
    vocab_size=300,
    width=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_width=16,
    mlp_width=160,
    token_shift=1,
    num_features=2,
)
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


# ------------------------------------------------------------------ FLOPs


def count_products(jaxpr, while_trips=1):
    """FLOPs of all dot_generals of a traced program; loops as often as they turn."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        times = {"scan": equation.params.get("length"), "while": while_trips}.get(name, 1)
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        total += times * sum(count_products(j, while_trips) for j in inner if hasattr(j, "eqns"))
    return total


def log_prob_of(config, rows, length, logits):
    """A loss on the last `logits` of `length` columns, and its abstract arguments."""
    model = Transformer(config)

    def loss(params, tokens, start, features, targets):
        hidden, _ = model.apply({"params": params}, tokens, start, features=features)
        out = model.apply({"params": params}, hidden[:, -logits:], method="logits")
        return jnp.take_along_axis(jax.nn.log_softmax(out), targets[..., None], axis=-1).sum()

    shape = jax.ShapeDtypeStruct
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    tokens, start = shape((rows, length), jnp.int32), shape((rows,), jnp.int32)
    features = shape((rows, length, config.num_features), bool)
    return loss, (params, tokens, start, features, shape((rows, logits), jnp.int32))


@pytest.mark.parametrize("targets", [(), (".*",), ("query", "up")])
@pytest.mark.parametrize(("train", "remat"), [(False, False), (True, False), (True, True)])
def test_scoring_executes_exactly_these_flops(train, remat, targets):
    adapters = LoraConfig(rank=3, targets=targets) if targets else LoraConfig()
    # What is looked up before the first column, for token_shift, is left out of the count.
    shift = 0 if targets else CONFIG.token_shift
    config = dataclasses.replace(CONFIG, remat=remat, lora=adapters, token_shift=shift)
    loss, (params, *arguments) = log_prob_of(config, rows=2, length=48, logits=5)
    trainable, frozen = lora.partition(params, adapters)

    def loss_of(trainable, frozen, *arguments):
        return loss(lora.join(trainable, frozen), *arguments)

    function = jax.grad(loss_of) if train else loss_of
    traced = jax.make_jaxpr(function)(trainable, frozen, *arguments)
    counted = flops.score(config, [Rows(2, prompt=44, response=5)], train=train)
    assert counted.hardware == count_products(traced.jaxpr)
    assert flops.count_trained(config) == sum(x.size for x in jax.tree.leaves(trainable))
    padded = [Rows(2, prompt=20, response=3, width=48, limit=5)]
    assert flops.score(config, padded, train=train).hardware == counted.hardware


def test_xla_counts_the_same_but_for_what_is_left_out():
    """A loop of one layer is none: XLA's count of a loop's body is then that of the program."""
    config = dataclasses.replace(CONFIG, num_layers=1, width=128, mlp_width=512)
    loss, arguments = log_prob_of(config, rows=2, length=48, logits=5)
    rows = [Rows(2, prompt=44, response=5)]
    for train, function in ((False, loss), (True, jax.grad(loss))):
        compiled = jax.jit(function).lower(*arguments).compile()
        ours = flops.score(config, rows, train=train).hardware
        assert 0 <= compiled.cost_analysis()["flops"] / ours - 1 < 0.05


def test_model_flops_are_the_least_that_must_be_done():
    """By hand: 2 heads of 4, one key/value head, width 8, MLP of 16, vocabulary of 10."""
    config = ModelConfig(10, 8, 1, 2, 1, 4, 16)
    matrices = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    pairs = 1 + 2 + 3 + 4
    forward = 4 * 2 * matrices + pairs * 2 * (2 * 4 * 2) + 2 * (2 * 8 * 10)
    counted = flops.score(config, [Rows(3, prompt=3, response=2)], train=False)
    assert counted.model == 3 * forward
    assert flops.score(config, [Rows(3, 3, 2)], train=True).model == 9 * forward


def test_decoding_costs_as_much_as_scoring_by_the_model():
    """Each token once, each pair once, whichever way it is computed."""
    rows = [Rows(4, prompt=9, response=6), Rows(2, prompt=3, response=1)]
    decoded = flops.prefill(CONFIG, rows) + flops.decode(CONFIG, rows)
    assert decoded.model == flops.score(CONFIG, rows, train=False).model


@pytest.mark.parametrize(
    ("draft", "width", "before"), [(0, 40, 0), (2, 40, 0), (0, 300, 0), (1, 140, 24)]
)
def test_generation_executes_exactly_these_flops(draft, width, before):
    agent = tiny.make_parts().agent
    agent = agent.replace(sampler=dataclasses.replace(agent.sampler, draft=draft))
    config, limit = agent.model.config, agent.sampler.response_length
    batch, passes, full = 3, 6, width + before
    shape = jax.ShapeDtypeStruct
    params = jax.eval_shape(lambda key: init_params(agent.model, key), jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))

    def generate(params, prompt, lengths, keys, skip, prefix):
        phase = jnp.zeros((batch,), jnp.int32)
        temperature = jnp.ones((), jnp.float32)
        decoder = sampling.make_decoder(agent, params, temperature)
        return sampling.generate(decoder, prompt, lengths, phase, keys, skip, width, prefix)

    lengths, skip = shape((batch,), jnp.int32), shape((batch,), bool)
    prompt = shape((batch, full), jnp.int32)
    room = (config.num_layers, batch, config.num_kv_heads, before, config.head_width)
    prefix = Prefix(shape(room, jnp.float32), shape(room, jnp.float32), lengths)
    traced = jax.make_jaxpr(generate)(
        params, prompt, lengths, keys, skip, prefix if before else None
    )
    rows = [
        Rows(
            batch,
            prompt=30,
            response=5,
            prompt_width=width,
            limit=limit,
            prefix=min(before, 20),
            prefix_width=before,
        )
    ]
    ours = flops.prefill(config, rows) + flops.decode(config, rows, passes=passes, draft=draft)
    # Left out of the count: the value head, and the flags of tokens that occur in the prompt.
    value_head = batch * 2 * config.width
    columns = width + passes * (draft + 1)
    flags = batch * 2 * columns * full * config.num_features
    executed = count_products(traced.jaxpr, while_trips=passes)
    assert ours.hardware + value_head + flags == executed


def test_a_prefix_is_read_once():
    """By the model: the prompt's tokens and pairs, whether read at once or in two parts."""
    whole = flops.prefill(CONFIG, [Rows(2, prompt=50, response=1)])
    first = flops.prefill(CONFIG, [Rows(2, prompt=20, response=0)])
    rest = flops.prefill(CONFIG, [Rows(2, prompt=50, response=1, prefix=20)])
    assert (first + rest).model == whole.model
    with pytest.raises(ValueError, match=r"Rows.prompt_width=29 is less than the 30 that prompt"):
        Rows(2, prompt=50, response=1, prefix=20, prompt_width=29)


def test_blocks_of_the_kernel_behind_a_prefix():
    assert flops.computed_pairs(1024, blocked=True, before=512) == 5 * 512 * 512
    assert flops.computed_pairs(1024, blocked=True, before=128) == (8 * 9 // 2 + 8) * 128 * 128


def test_pieces_of_plain_attention():
    """By hand: blocks of 128 queries, with all keys up to their end."""
    assert flops.computed_pairs(300, blocked=False) == 128 * 128 + 128 * 256 + 44 * 300


def test_phases_add_up():
    rows = [Rows(2, 10, 4)]
    once = flops.update(CONFIG, rows)
    assert once == flops.sft(CONFIG, rows)
    assert flops.update(CONFIG, rows, epochs=2) == 2 * once
    scored = flops.score(CONFIG, rows, train=False)
    assert flops.update(CONFIG, rows, scorings=1) == once + scored
    turn = flops.prefill(CONFIG, rows) + flops.decode(CONFIG, rows)
    assert flops.rollout(CONFIG, [rows, rows, []]) == turn + turn


def test_what_is_computed_again():
    rows = [Rows(1, 1021, 4)]
    remat = dataclasses.replace(CONFIG, remat=True)

    def hardware(config, **options):
        return flops.score(config, rows, train=True, **options).hardware

    logits = 4 * 2 * CONFIG.width * CONFIG.vocab_size
    assert hardware(CONFIG, chunked=True) - hardware(CONFIG) == logits
    pairs = flops.computed_pairs(1024, blocked=True)
    assert pairs == 3 * 512 * 512  # of the four blocks, one is masked
    products = 4 * CONFIG.num_layers * CONFIG.num_heads * CONFIG.head_width
    square = flops.computed_pairs(1024, blocked=False)
    plain = hardware(CONFIG) - 3 * (square - pairs) * products
    assert hardware(CONFIG, blocked=True) - plain == 1.5 * pairs * products
    assert hardware(remat) > hardware(CONFIG)


def test_rows_that_do_not_fit_their_columns():
    with pytest.raises(ValueError, match=r"Rows.width=12 is less than the 13 that prompt=10"):
        Rows(1, prompt=10, response=4, width=12)


# ------------------------------------------------------------------ hardware


def test_topologies():
    pod = hardware.parse_topology("V5e:8x8", slices=2)
    assert (pod.name, pod.chips, pod.devices) == ("v5e:8x8", 128, 128)
    assert pod.generation.hbm_limit_gib == 15.75
    halves = hardware.parse_topology("tpu7x:4x4x4")
    assert (halves.chips, halves.devices) == (64, 128)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v9:2x2", 1, r"no TPU generation 'v9'; the valid topologies are v4:2x2x1, .*v6e:16x16"),
        ("v5e:3x3", 1, r"v5e has no slice '3x3' here; the valid ones are v5e:1x1, .*v5e:16x32"),
        ("v5e", 1, r"has no slice ''"),
        ("v5e:8x8", 0, r"--slices=0: must be at least 1"),
    ],
)
def test_topologies_that_do_not_exist(text, slices, message):
    with pytest.raises(ConfigError, match=message):
        hardware.parse_topology(text, slices)


def test_an_axis_that_fills_a_ring_has_two_links():
    link = hardware.GENERATIONS["v5e"].link_bandwidth
    assert hardware.parse_topology("v5e:8x8").axis_bandwidth(8) == link
    pod = hardware.parse_topology("v5e:16x16")
    assert [pod.axis_bandwidth(n) for n in (4, 16, 256)] == [link, 2 * link, 2 * link]
    cube = hardware.parse_topology("v5p:4x4x4")
    assert cube.axis_bandwidth(16) == 2 * cube.generation.link_bandwidth


def test_meshes_to_search():
    assert hardware.list_meshes(4, tensor=(1, 2)) == [
        (4, 1, 1),
        (2, 2, 1),
        (1, 4, 1),
        (2, 1, 2),
        (1, 2, 2),
    ]
    assert hardware.list_meshes(4, slices=2, tensor=(2,)) == [(2, 1, 2)]
    assert all(math.prod(shape) == 64 for shape in hardware.list_meshes(64))


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_the_compiler_the_extra_is_named():
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
        hardware.get_topology(hardware.parse_topology("v5e:2x2"))


@pytest.mark.libtpu
@pytest.mark.parametrize(("name", "slices"), [("v5e:1x1", 1), ("v5e:2x2", 2), ("v4:2x2x1", 1)])
def test_devices_of_a_topology(name, slices):
    topology = hardware.parse_topology(name, slices)
    assert len(hardware.get_topology(topology)) == topology.devices


@pytest.mark.libtpu
def test_a_program_compiled_for_tpu():
    """The limit in the table is the compiler's, and its program is read as for CPU."""
    topology = hardware.parse_topology("v5e:2x2")
    mesh = Mesh(hardware.get_topology(topology), ("tensor",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("tensor"))
    huge = jax.ShapeDtypeStruct((4 << 21, 1024), jnp.float32, sharding=rows)
    with pytest.raises(RuntimeError) as caught:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    overflow = presentation.parse_overflow(str(caught.value))
    assert overflow is not None
    assert overflow.available_gib == topology.generation.hbm_limit_gib
    assert overflow.required_gib == pytest.approx(16, abs=0.01)

    small = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=rows)
    text = jax.jit(lambda x: x.sum()).lower(small).compile().as_text()
    (reduction,) = hlo.read(text, {"tensor": 4}).collectives
    assert (reduction.kind, reduction.axes, reduction.moved) == ("all-reduce", ("tensor",), 6)


# ------------------------------------------------------------------ time

PERFECT = Assumptions(compute=1.0, memory=1.0, network=1.0, hop=0.0)
V5E = hardware.parse_topology("v5e:2x2")
MESH = {"data": 1, "fsdp": 2, "tensor": 2}


def test_a_part_takes_as_long_as_its_slowest_resource_and_what_is_exposed():
    compute = Part("score", Flops(4 * 197e12, 2 * 4 * 197e12), hbm_bytes=819e9)
    memory = Part("decode", hbm_bytes=3 * 819e9, traffic={("fsdp", True): Sent(50e9)})
    network = Part("reduce", traffic={("tensor", False): Sent(100e9), ("fsdp", True): Sent(50e9)})
    found = roofline.estimate([compute, memory, network], V5E, MESH, PERFECT)
    assert [part.seconds for part in found.parts] == pytest.approx([2, 3, 2 + 1])
    assert [part.bottleneck for part in found.parts] == ["compute", "memory", "network"]
    assert found.seconds == pytest.approx(8)
    assert found.mfu == pytest.approx(1 / 8)
    assert found.bottleneck == "decode: memory"


def test_assumptions_slow_it_down_and_are_stated():
    part = Part("score", Flops(4 * 197e12, 4 * 197e12))
    found = roofline.estimate([part], V5E, MESH, Assumptions(compute=0.5))
    assert (found.seconds, found.mfu) == pytest.approx((2, 0.5))
    text = " ".join(found.assumptions)
    for words in (
        "not a measurement",
        "197 TFLOP/s",
        "50% of compute",
        "the others wait",
        "nothing rec",
    ):
        assert words in text
    with pytest.raises(ValueError, match=r"assumptions.memory=0: allowed is above 0 up to 1"):
        roofline.estimate([part], V5E, MESH, Assumptions(memory=0))
    with pytest.raises(ValueError, match=r"axis 'expert': the mesh has data, fsdp, tensor"):
        roofline.estimate([Part("x", traffic={("expert", True): Sent(1)})], V5E, MESH)


def test_bandwidth_of_axes():
    pod = hardware.parse_topology("v5e:16x16", slices=2)
    mesh = {"data": 2, "fsdp": 16, "tensor": 16}
    link = pod.generation.link_bandwidth
    assert roofline.axis_bandwidth("tensor", pod, mesh) == 2 * link
    assert roofline.axis_bandwidth("fsdp+tensor", pod, mesh) == 2 * link
    assert roofline.axis_bandwidth("?", pod, mesh) == link
    assert roofline.axis_bandwidth("dcn", pod, mesh) == pod.generation.dcn_bandwidth


def test_every_hop_takes_its_time():
    """1,000 sums over four devices, of 100 bytes: six hops each, whatever the bytes."""
    traffic = {("tensor", False): Sent(1e5, 6000)}
    found = roofline.estimate([Part("decode", traffic=traffic)], V5E, MESH, Assumptions(hop=2e-6))
    assert found.seconds == pytest.approx(0.012, rel=1e-3)
    assert "each hop takes 2.0 microseconds" in " ".join(found.assumptions)
    assert [roofline.count_hops(kind, 8) for kind in ("all-reduce", "all-gather")] == [14, 7]
    assert roofline.count_hops("collective-permute", 8) == 1
    with pytest.raises(ValueError, match=r"assumptions.hop=-1"):
        roofline.estimate([], V5E, MESH, Assumptions(hop=-1))


def test_decoding_reads_weights_and_cache_every_pass():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", tie_embeddings=False)
    slots, rows, passes = 50, 8, 3
    cache = 2 * 3 * slots * rows * 2 * 16 * 2
    assert roofline.cache_bytes(config, Placement(), rows, slots) == cache
    # Of the embeddings a row a token is read, but the readout is another matrix of that size.
    weights = (flops.count_params(config) - 300 * 64) * 4
    logits = rows * 2 * 300 * 4 * 3
    read = roofline.memory_of_decoding(config, Placement(), rows, slots, passes, fed=2)
    assert read == passes * (weights + cache * 52 / 50 + logits)
    split = Placement(rows=2, tensor=4)  # more devices than key/value heads: copies
    assert roofline.cache_bytes(config, split, rows, slots) == cache / 2 / 2
    # int8: a byte a number, and a float32 scale for each vector.
    small = roofline.cache_bytes(config, Placement(), rows, slots, cache_dtype="int8")
    vectors = 2 * config.num_layers * config.num_kv_heads * rows * slots
    assert small == vectors * (config.head_width + 4)


def test_traffic_of_memory_grows_with_what_is_done():
    rows = [Rows(16, 40, 8)]
    place = Placement(rows=2, tensor=2, fsdp=2)
    count = flops.count_params(CONFIG)
    assert roofline.memory_of_optimizer(CONFIG, place) == count / 4 * 4 * (2 + 2 + 2 + 2)
    half = roofline.memory_of_optimizer(CONFIG, place, moments=("bfloat16", "float32"))
    assert half == count / 4 * (4 * (2 + 2 + 2) + 4)

    def scoring(config=CONFIG, **options):
        return roofline.memory_of_scoring(config, place, rows, **options)

    once = scoring(microbatches=1, train=False)
    assert once < scoring(microbatches=2, train=False) < scoring(microbatches=2, train=True)
    remat = dataclasses.replace(CONFIG, remat=True)
    assert scoring(microbatches=1, train=True) < scoring(remat, microbatches=1, train=True)
    whole = roofline.memory_of_prefill(CONFIG, Placement(), rows)
    assert roofline.memory_of_prefill(CONFIG, Placement(tensor=2), rows) < whole


def make_traffic():
    loop = loops.Loop("decode", "jit(f)/decode/while", None, "unknown")
    gather = hlo.Collective(
        "all-gather",
        "g",
        "jit(f)/decode/while/body/g",
        1 << 20,
        2 << 20,
        2,
        ("fsdp",),
        2.0**20,
        (loop,),
        1,
        overlapped=True,
    )
    reduce = dataclasses.replace(
        gather,
        kind="all-reduce",
        op_name="jit(f)/optimizer/r",
        overlapped=False,
        axes=("data", "fsdp"),
        loops=(),
    )
    return hlo.Traffic((gather, reduce), (loop,))


def test_traffic_of_a_part_is_chosen_by_scope():
    traffic = make_traffic()
    assert roofline.traffic_of(traffic, inside=["decode"]) == {("fsdp", True): Sent(2.0**20, 1)}
    assert roofline.traffic_of(traffic, outside=["decode"]) == {
        ("data+fsdp", False): Sent(2.0**20, 2)
    }
    assert len(roofline.traffic_of(traffic)) == 2


# ------------------------------------------------------------------ the report

SHORT = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(62.70G) exceeds available HBM (31.25G)."
)
LONG = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space \
hbm. Used 63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G.

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(update_step)/microbatches/while/body/jvp()/bkgtd,bksd->bkgts"
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     Allocation type: HLO temp
     ==========================

  2. Size: 512.0M
     Operator: op_name="jit(update_step)/score_chunks/while/body/dot_general"
     Shape: f32[16,64,151936]{2,1,0:T(8,128)}
     Allocation type: HLO temp
     ==========================
"""


def test_overflow_is_read_and_explained():
    overflow = presentation.parse_overflow(SHORT)
    assert overflow.excess_gib == pytest.approx(31.45)
    text = "\n".join(presentation.explain_overflow(overflow, {"parameters": 20.0, "optimiser": 1}))
    assert "31.45 GiB too much" in text
    assert text.index("activations") < text.index("parameters")  # the larger one first
    for field in ("mesh.fsdp", "rl.ppo.microbatch_rows", "model.remat"):
        assert field in text
    assert "moment_dtype" not in text  # the optimiser contributes next to nothing
    assert presentation.parse_overflow("INTERNAL: something else") is None


def test_a_long_message_is_read_once():
    """Not once for each of its lines, which would take hours."""
    blank = "\n \n" * 300_000
    assert presentation.parse_overflow(blank + LONG + blank) == presentation.parse_overflow(LONG)
    again = "required for " * 300_000
    assert presentation.parse_overflow(again + SHORT) == presentation.parse_overflow(SHORT)


def test_largest_allocations_are_listed():
    overflow = presentation.parse_overflow(LONG)
    assert (overflow.required_gib, overflow.available_gib) == (63.80, 30.75)
    assert [(a.gib, a.contributor) for a in overflow.allocations] == [
        (2.0, "activations"),
        (0.5, "logits"),
    ]
    assert overflow.allocations[1].shape.startswith("f32[16,64,151936]")
    assert "f32[32,4096,4096]" in "\n".join(presentation.explain_overflow(overflow))


def test_bytes_of_sharded_arguments():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    tree = {
        "w": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16, sharding=split),
        "b": jax.ShapeDtypeStruct((16,), jnp.float32),
    }
    assert presentation.device_bytes(tree) == 8 * 16 * 2 // 8 + 16 * 4


def make_phase(name="rollout", gib=10.0, seconds=2.0, **changes):
    part = Part("decode", Flops(197e12, 2 * 197e12), hbm_bytes=819e9 * seconds)
    phase = presentation.Phase(
        name=name,
        hbm_gib=gib,
        hbm_limit_gib=15.75,
        flops=Flops(197e12, 2 * 197e12),
        split={"parameters": 4.0, "KV cache": 2.5},
        traffic=make_traffic(),
        estimate=roofline.estimate([part], V5E, MESH, PERFECT),
    )
    return dataclasses.replace(phase, **changes)


def test_json_has_the_required_form():
    result = presentation.to_json([make_phase()])
    assert result == json.loads(json.dumps(result))
    phase = result["phases"]["rollout"]
    required = {"fits", "hbm_gib", "hbm_limit_gib", "flops", "step_seconds", "mfu", "collectives"}
    assert required <= set(phase)
    assert (phase["fits"], phase["flops"], phase["step_seconds"]) == (True, 197e12, 2.0)
    assert phase["mfu"] == pytest.approx(1 / 8)
    assert phase["hbm_split_gib"]["activations"] == 3.5
    assert phase["collectives"]["all-gather"]["axes"] == {"fsdp": {"count": 1, "bytes": 2.0**20}}
    assert phase["unknown_loops"] == ["jit(f)/decode/while"]


def test_report_says_what_matters():
    text = presentation.render([make_phase()], V5E, MESH)
    for words in (
        "v5e:2x2: 4 chips, mesh data 1 x fsdp 2 x tensor 2",
        "rollout: fits, 5.75 GiB to spare",
        "10.00 of 15.75 GiB",
        "all-gather",
        "1.00 MiB a chip over fsdp, 1 times",
        "2.00 s, MFU 12.5%",
        "bound by memory",
        "for want of a trip count: jit(f)/decode/while",
        "not a measurement",
    ):
        assert words in text
    lines = [line for line in text.splitlines() if line.startswith("  ") and "GiB" in line]
    assert len({line.index(line.split("  ")[-1].strip()) for line in lines}) == 1  # aligned


def test_report_of_a_phase_that_does_not_fit():
    over = make_phase(overflow=presentation.parse_overflow(SHORT))
    assert not over.fits
    text = presentation.render([over], V5E, MESH)
    assert "rollout: does not fit: needs 62.70 GiB" in text
    assert "rollout.param_dtype" in text
    close = presentation.render([make_phase(gib=16.0)], V5E, MESH)
    assert "rollout: 0.25 GiB too much" in close
    assert "KV cache: lower rollout.microbatch" in close


def test_search_lists_the_fastest_first():
    candidates = [
        ("data 4", [make_phase(seconds=3.0)]),
        ("fsdp 4", [make_phase(seconds=2.0)]),
        ("tensor 4", [make_phase(gib=20.0)]),
    ]
    first, second, last = presentation.render_search(candidates).splitlines()
    assert (first.split("  ")[0], second.split("  ")[0]) == ("fsdp 4", "data 4")
    assert last == "1 of 3 did not fit"
    assert presentation.render_search(candidates[2:]) == "none of them fits"
