"""Collectives read from compiled programs: real ones for CPU, snippets of real ones for TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from atommem_jax.tpu_model import hlo, hlo_text, loops
from atommem_jax.tpu_model.device_groups import UNKNOWN_AXIS
from atommem_jax.tpu_model.hlo import Total

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 3)


def compile_text(mesh, function, **shapes):
    """HLO of `function`; shapes: name -> (shape, mesh axes of its dimensions, dtype)."""
    arguments = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for name, (shape, axes, dtype) in shapes.items()
    }
    return jax.jit(function).lower(**arguments).compile().as_text()


# ------------------------------------------------------------------ whole programs, on CPU


@pytest.fixture(scope="module")
def decode_text(mesh):
    """A loop over data-dependent steps, around a scan over three layers of fsdp-sharded weights."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())

    def run(w, x, steps):
        def layer(x, matrix):
            matrix = jax.lax.with_sharding_constraint(matrix, whole)
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ matrix), rows), None

        def body(carry):
            step, x = carry
            return step + 1, jax.lax.scan(layer, x, w)[0]

        with jax.named_scope("decode"):
            _, x = jax.lax.while_loop(lambda carry: carry[0] < steps, body, (0, x))
        return x.sum()

    return compile_text(
        mesh,
        run,
        w=((3, 64, 64), (None, "fsdp"), jnp.float32),
        x=((256, 64), (("data", "fsdp"),), jnp.float32),
        steps=((), (), jnp.int32),
    )


def test_loops_multiply(decode_text):
    traffic = hlo.read(decode_text, MESH, {"decode": 5})
    assert [(loop.trips, loop.source) for loop in traffic.loops] == [(5, "given"), (3, "known")]
    assert traffic.loops[0].name == "decode"
    (gathered,) = [each for each in traffic.collectives if each.kind == "all-gather"]
    matrix = 64 * 64 * 4
    assert (gathered.payload, gathered.result) == (matrix // 2, matrix)
    assert (gathered.axes, gathered.group_size, gathered.times) == (("fsdp",), 2, 15)
    assert gathered.weight == "w"
    assert traffic.totals()["all-gather"] == Total(15, 15 * matrix / 2)
    assert traffic.bytes_over(["fsdp"]) >= 15 * matrix / 2
    assert traffic.unknown_loops == ()


def test_loop_without_count_counts_once_and_is_reported(decode_text):
    traffic = hlo.read(decode_text, MESH)
    (unknown,) = traffic.unknown_loops
    assert (unknown.name, unknown.trips, unknown.source) == ("decode", None, "unknown")
    assert traffic.totals()["all-gather"].count == 3


def test_weights_gathered_while_decoding_are_found(decode_text):
    traffic = hlo.read(decode_text, MESH)
    (found,) = traffic.inside("decode", "all-gather", weights_only=True)
    assert found.weight == "w"
    assert traffic.inside("decode", more_than=64 * 64 * 4) == []
    assert traffic.inside("decode", "all-to-all") == []
    with pytest.raises(hlo_text.HloError, match=r"no loop stands in the scope 'turns'.*decode"):
        traffic.inside("turns")


def test_replicated_weights_are_not_gathered(mesh):
    def run(w, x):
        def body(_, x):
            return jnp.tanh(x @ w)

        with jax.named_scope("decode"):
            return jax.lax.fori_loop(0, x.shape[0], body, x)

    text = compile_text(
        mesh,
        run,
        w=((32, 32), (), jnp.float32),
        x=((64, 32), (("data", "fsdp"),), jnp.float32),
    )
    traffic = hlo.read(text, MESH)
    assert traffic.inside("decode") == []
    assert [loop.trips for loop in traffic.loops] == [64]


def test_every_kind_its_groups_and_bytes(mesh):
    def local(x):  # float32 [8, 16]: 512 bytes
        gathered = jax.lax.all_gather(x, ("data", "fsdp"), tiled=True)
        scattered = jax.lax.psum_scatter(gathered, "tensor", tiled=True)
        turned = jax.lax.all_to_all(gathered, "tensor", 0, 1, tiled=True)
        passed = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        summed = jax.lax.psum(x, ("data", "tensor"))
        return sum(part.sum() for part in (scattered, turned, passed, summed))

    def run(x):
        specs = PartitionSpec(("data", "fsdp"))
        share = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
        return share(x)

    traffic = hlo.read(compile_text(mesh, run, x=((32, 16), (), jnp.float32)), MESH)
    found = {each.kind: (each.axes, each.group_size, each.moved) for each in traffic.collectives}
    assert found == {
        "all-gather": (("data", "fsdp"), 4, 3 * 512),
        "reduce-scatter": (("tensor",), 2, 2048 / 2),
        "all-to-all": (("tensor",), 2, 2048 / 2),
        "collective-permute": (("data",), 2, 512),
        "all-reduce": (("data", "tensor"), 4, 2 * 3 / 4 * 512),
    }
    assert traffic.by_axes()["tensor"] == Total(2, 2048)


def test_of_branches_the_costliest_counts(mesh):
    def local(x):
        def small(x):
            return jax.lax.psum(x, "data").sum()

        def large(x):
            return jax.lax.psum(jnp.tile(x, (4, 1)), "data").sum()

        return jax.lax.cond(x.sum() > 0, small, large, x)

    def run(x):
        share = jax.shard_map(
            local, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
        return share(x)

    traffic = hlo.read(compile_text(mesh, run, x=((8, 16), (), jnp.float32)), MESH)
    sizes = {each.payload: each.taken for each in traffic.collectives}
    assert sizes == {512: False, 2048: True}
    assert traffic.totals() == {"all-reduce": Total(1, 2048)}


def test_weights_are_followed_into_branches(mesh):
    whole = NamedSharding(mesh, PartitionSpec())

    def run(params, x):
        def once(x):
            matrix = jax.lax.with_sharding_constraint(params["w"], whole)
            return jnp.tanh(x @ matrix)

        return jax.lax.cond(x.sum() > 0, once, lambda x: once(once(x)), x)

    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(("data",)))
    params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)}
    x = jax.ShapeDtypeStruct((256, 64), jnp.float32, sharding=rows)
    traffic = hlo.read(jax.jit(run).lower(params, x).compile().as_text(), MESH)
    gathered = [each for each in traffic.collectives if each.kind == "all-gather"]
    assert {each.weight for each in gathered} == {"params['w']"}
    assert {each.taken for each in gathered} == {True, False}


# ------------------------------------------------------------------ what XLA:TPU writes

LOOPS = """
HloModule jit_f, is_scheduled=true, num_partitions=4

%sum (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %add.9 = bf16[] add(%x, %y)
}

%slice_of (p0: bf16[4,256,1024], p1: s32[]) -> bf16[1,256,1024] {
  %p0 = bf16[4,256,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %ds = bf16[1,256,1024]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p0, %p1, %zero.1, %zero.1), \
dynamic_slice_sizes={1,256,1024}
}

%layers_body (s: (s32[], bf16[4,256,1024], s32[])) -> (s32[], bf16[4,256,1024], s32[]) {
  %one = s32[]{:T(128)} constant(1)
  %s = (s32[]{:T(128)}, bf16[4,256,1024]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %w = bf16[4,256,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %n = s32[]{:T(128)} get-tuple-element(%s), index=2
  %part = bf16[1,256,1024]{2,1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%slice_of
  %all-gather.20 = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%part), channel_id=10, \
replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}, use_global_device_ids=true, \
metadata={op_name="jit(f)/decode/while/body/while/body/closed_call/btd,df->btf/dot_general"}
  %all-reduce.4 = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} all-reduce(%all-gather.20), channel_id=8, \
replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2] {'axis_2'}, to_apply=%sum
  %next = s32[]{:T(128)} add(%i, %one)
  %w.start = (bf16[4,256,1024]{2,1,0}, bf16[4,256,1024]{2,1,0}, u32[]{:S(2)}) copy-start(%w)
  %w.done = bf16[4,256,1024]{2,1,0} copy-done(%w.start)
  ROOT %t = (s32[]{:T(128)}, bf16[4,256,1024]{2,1,0}, s32[]{:T(128)}) tuple(%next, %w.done, %n)
}

%layers_cond (s.1: (s32[], bf16[4,256,1024], s32[])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, bf16[4,256,1024]{2,1,0}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %n.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=2
  ROOT %lt.6 = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT, \
metadata={op_name="jit(f)/decode/while/body/while/cond/lt"}
}

%decode_body (d: (s32[], s32[], /*index=2*/bf16[4,256,1024])) -> \
(s32[], s32[], bf16[4,256,1024]) {
  %zero = s32[]{:T(128)} constant(0)
  %four = s32[]{:T(128)} constant(4)
  %one.2 = s32[]{:T(128)} constant(1)
  %d = (s32[]{:T(128)}, s32[]{:T(128)}, /*index=2*/bf16[4,256,1024]{2,1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%d), index=0
  %steps = s32[]{:T(128)} get-tuple-element(%d), index=1
  %w.2 = bf16[4,256,1024]{2,1,0} get-tuple-element(%d), index=2
  %copy.15 = s32[]{:T(128)} copy(%zero)
  %tuple.28 = (s32[]{:T(128)}, bf16[4,256,1024]{2,1,0}, s32[]{:T(128)}) \
tuple(%copy.15, %w.2, %four)
  %while.21 = (s32[]{:T(128)}, bf16[4,256,1024]{2,1,0}, s32[]{:T(128)}) while(%tuple.28), \
condition=%layers_cond, body=%layers_body
  %w.3 = bf16[4,256,1024]{2,1,0} get-tuple-element(%while.21), index=1
  %add.17 = s32[]{:T(128)} add(%j, %one.2)
  ROOT %t.2 = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[4,256,1024]{2,1,0}) tuple(%add.17, %steps, %w.3)
}

%decode_cond (d.1: (s32[], s32[], bf16[4,256,1024])) -> pred[] {
  %d.1 = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[4,256,1024]{2,1,0}) parameter(0)
  %j.1 = s32[]{:T(128)} get-tuple-element(%d.1), index=0
  %steps.1 = s32[]{:T(128)} get-tuple-element(%d.1), index=1
  ROOT %lt.7 = pred[]{:T(512)} compare(%j.1, %steps.1), direction=LT
}

ENTRY %main (w1: bf16[4,256,1024], n1: s32[]) -> s32[] {
  %w1 = bf16[4,256,1024]{2,1,0} parameter(0), metadata={op_name="params[\\'w\\']"}
  %n1 = s32[]{:T(128)} parameter(1), metadata={op_name="n"}
  %start = s32[]{:T(128)} constant(0)
  %tuple.34 = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[4,256,1024]{2,1,0}) tuple(%start, %n1, %w1)
  %while.20 = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[4,256,1024]{2,1,0}) while(%tuple.34), \
condition=%decode_cond, body=%decode_body, metadata={op_name="jit(f)/decode/while"}
  ROOT %out = s32[]{:T(128)} get-tuple-element(%while.20), index=0
}
"""


def test_tpu_trip_counts_come_from_the_condition():
    """XLA:TPU writes no known_trip_count; the bound may be a constant that loops carry along."""
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    traffic = hlo.read(LOOPS, mesh, {"decode": 10})
    assert [(loop.trips, loop.source) for loop in traffic.loops] == [(10, "given"), (4, "known")]
    gather, reduce = traffic.collectives
    assert (gather.axes, gather.times, gather.moved) == (("fsdp",), 40, 512 * 1024)
    assert (reduce.axes, reduce.times, reduce.moved) == (("tensor",), 40, 1024 * 1024)
    assert (gather.weight, reduce.weight) == ("params['w']", "params['w']")
    (found,) = traffic.inside("decode", "all-gather", weights_only=True)
    assert found is gather


OVERLAPPED = """
%start (a: bf16[1,4096,512]) -> (bf16[1,4096,512], bf16[1,4096,2048], u32[]) {
  %a = bf16[1,4096,512]{2,1,0} parameter(0)
  %all-gather.28 = bf16[1,4096,2048]{2,1,0} all-gather(%a), channel_id=16, \
replica_groups=[4,4]<=[8,2]T(1,0), dimensions={2}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.4 = (bf16[1,4096,512]{2,1,0}, bf16[1,4096,2048]{2,1,0}, u32[]{:S(2)}) \
custom-call(%all-gather.28), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.77 (b: bf16[1,4096,512]) -> bf16[1,4096,2048] {
  %b = bf16[1,4096,512]{2,1,0} parameter(0)
  ROOT %all-gather.30 = bf16[1,4096,2048]{2,1,0} all-gather(%b), channel_id=16, \
replica_groups=[4,4]<=[8,2]T(1,0), dimensions={2}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%sum (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %add.9 = bf16[] add(%x, %y)
}

%all-reduce-scatter.1.clone.1 (input.4: bf16[4096,2048]) -> bf16[4096,512] {
  %input.4 = bf16[4096,2048]{1,0} parameter(0)
  %all-reduce.18 = bf16[4096,2048]{1,0} all-reduce(%input.4), channel_id=12, \
replica_groups={{0,2,4,6},{8,10,12,14},{1,3,5,7},{9,11,13,15}}, to_apply=%sum
  %c = s32[] constant(0)
  ROOT %ds.1 = bf16[4096,512]{1,0} dynamic-slice(%all-reduce.18, %c, %c), \
dynamic_slice_sizes={4096,512}
}

ENTRY %main (w: bf16[1,4096,512]) -> bf16[4096,512] {
  %w = bf16[1,4096,512]{2,1,0} parameter(0), metadata={op_name="w[1]"}
  %async-collective-start = (bf16[1,4096,512]{2,1,0}, bf16[1,4096,2048]{2,1,0}, u32[]{:S(2)}) \
fusion(%w), kind=kCustom, calls=%start
  %fusion.77 = bf16[1,4096,2048]{2,1,0} fusion(%w), kind=kOutput, calls=%async_collective_fusion.77
  %flat = bf16[4096,2048]{1,0} bitcast(%fusion.77)
  %slice.2 = bf16[24,4096]{1,0} slice(%flat), slice={[0:24], [0:4096]}
  %collective-permute-start = (bf16[24,4096]{1,0}, bf16[24,4096]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%slice.2), channel_id=1, source_target_pairs={{0,2},{2,4},{4,6},{8,10}}
  %collective-permute-done = bf16[24,4096]{1,0} collective-permute-done(%collective-permute-start)
  ROOT %fusion.75 = bf16[4096,512]{1,0} fusion(%flat), kind=kCustom, \
calls=%all-reduce-scatter.1.clone.1, \
metadata={op_name="jit(f)/transpose(jvp(microbatches))/dot_general"}
}
"""


UNNAMED = """
HloModule jit_f, num_partitions=4

%body (s: (s32[], f32[8,16], f32[4,16])) -> (s32[], f32[8,16], f32[4,16]) {
  %s = (s32[], f32[8,16], f32[4,16]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = f32[8,16] get-tuple-element(%s), index=1
  %x = f32[4,16] get-tuple-element(%s), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %all-gather.1 = f32[16,16] all-gather(%w), channel_id=1, replica_groups=[2,2]<=[4], \
dimensions={0}, metadata={op_name="jit(f)"}
  %turned = f32[16,16] transpose(%all-gather.1), dimensions={1,0}, \
metadata={op_name="jit(f)/turns/while/body/prefill/layers/transpose"}
  %read = f32[4,16] dot(%x, READ), metadata={op_name="jit(f)/turns/while/body/prefill/layers/dot"}
  %also = f32[4,16] dot(%read, ALSO), metadata={op_name="jit(f)/turns/while/body/WHERE/dot"}
  ROOT %t = (s32[], f32[8,16], f32[4,16]) tuple(%next, %w, RESULT)
}

%cond (c: (s32[], f32[8,16], f32[4,16])) -> pred[] {
  %c = (s32[], f32[8,16], f32[4,16]) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %four = s32[] constant(4)
  ROOT %lt = pred[] compare(%j, %four), direction=LT
}

ENTRY %main (w1: f32[8,16], x1: f32[4,16]) -> f32[4,16] {
  %w1 = f32[8,16] parameter(0), metadata={op_name="w"}
  %x1 = f32[4,16] parameter(1), metadata={op_name="x"}
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,16], f32[4,16]) tuple(%zero, %w1, %x1)
  %while.1 = (s32[], f32[8,16], f32[4,16]) while(%start), condition=%cond, body=%body, \
metadata={op_name="jit(f)/turns/while"}
  ROOT %out = f32[4,16] get-tuple-element(%while.1), index=2
}
"""


@pytest.mark.parametrize(
    ("read", "also", "where", "result", "op_name"),
    [
        ("%turned", "%x", "decode", "%also", "jit(f)/turns/while/body/prefill/layers/dot"),
        ("%turned", "%turned", "prefill/norm", "%also", "jit(f)/turns/while/body/prefill"),
        ("%turned", "%turned", "decode", "%also", "jit(f)/turns/while/body"),
        ("%turned", "%all-gather.1", "decode", "%also", "jit(f)/turns/while/body"),
        ("%x", "%turned", "decode", "%also", "jit(f)/turns/while/body/decode/dot"),
        ("%turned", "%x", "decode", "%turned", "jit(f)"),
    ],
    ids=["one", "two in prefill", "behind a move", "and directly", "in decode", "unknown"],
)
def test_a_collective_without_a_name_is_where_all_its_readers_are(
    read, also, where, result, op_name
):
    text = UNNAMED.replace("READ", read).replace("ALSO", also)
    text = text.replace("WHERE", where).replace("RESULT", result)
    (found,) = hlo.read(text, {"fsdp": 2, "tensor": 2}).collectives
    assert (found.op_name, found.weight, found.times) == (op_name, "w", 4)
    assert found.is_in("turns")
    assert found.is_in("prefill") == ("/prefill" in op_name)


def test_tpu_overlapped_collectives_count_once_and_fused_reductions_are_scatters():
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    traffic = hlo.read(OVERLAPPED, mesh)
    found = [(each.kind, each.axes, each.moved) for each in traffic.collectives]
    whole = 4096 * 2048 * 2
    assert found == [
        ("all-gather", ("fsdp",), whole * 3 / 4),
        ("collective-permute", ("fsdp",), 24 * 4096 * 2),
        ("reduce-scatter", ("fsdp",), whole * 3 / 4),
    ]
    assert [each.overlapped for each in traffic.collectives] == [True, True, False]
    assert traffic.collectives[2].is_in("microbatches")  # by its fusion's name
    assert not traffic.collectives[0].is_in("microbatches")
    assert traffic.collectives[0].weight == "w[1]"
    assert traffic.collectives[2].result == whole // 4


BETWEEN_SLICES = """
ENTRY %main (g: f32[1024,8,128]) -> f32[1024,8,128] {
  %g = f32[1024,8,128]{2,1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[1024,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%g, %after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[1024,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (f32[1024,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1
  ROOT %out = f32[1024,8,128]{2,1,0:T(8,128)} get-tuple-element(%recv-done), index=0
}
"""


def test_tpu_transfers_between_slices_are_collectives():
    traffic = hlo.read(BETWEEN_SLICES, MESH, slices=2)
    assert traffic.by_kind_and_axes() == {("all-reduce", "dcn"): Total(1, 4 * 2**20)}


# ------------------------------------------------------------------ small pieces


def one_collective(line, mesh):
    text = f"ENTRY %m (p: f32[64]) -> f32[64] {{\n  %p = f32[64]{{0}} parameter(0)\n  {line}\n}}\n"
    (found,) = hlo.read(text, mesh).collectives
    return found


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",), 2),
        ("{}", ("data", "fsdp", "tensor"), 8),
        ("[2,4]<=[8]", ("fsdp", "tensor"), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[2,4]<=[2,2,2]T(1,2,0)", ("data", "tensor"), 4),
        ("mesh['a'=2,'b'=4] {'b'}", ("fsdp", "tensor"), 4),
        ("mesh['a'=8] {'a':(2)2}", ("fsdp",), 2),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ("data", "tensor"), 4),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "fsdp"), 4),
        ("surprise", (UNKNOWN_AXIS,), 1),
    ],
)
def test_groups_in_each_notation(groups, axes, size):
    line = f"ROOT %r = f32[64]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%sum"
    found = one_collective(line, MESH)
    assert (found.axes, found.group_size) == (axes, size)


def test_async_pairs_count_once():
    text = """
ENTRY %m (p: f32[64]) -> f32[128] {
  %p = f32[64]{0} parameter(0)
  %s = (f32[64]{0}, f32[128]{0}) all-gather-start(%p), replica_groups={{0,1}}, dimensions={0}
  ROOT %d = f32[128]{0} all-gather-done(%s)
}
"""
    (found,) = hlo.read(text, {"tensor": 2}).collectives
    assert (found.payload, found.result, found.moved) == (256, 512, 256)


def test_more_devices_than_the_mesh_has():
    line = "ROOT %r = f32[64]{0} all-reduce(%p), replica_groups={{0,9}}, to_apply=%sum"
    with pytest.raises(hlo_text.HloError, match=r"device 9 .* has 8 devices"):
        one_collective(line, MESH)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[1,512,1024]{2,1,0:T(8,128)(2,1)S(1)}", 1 << 20),
        ("(f32[4]{0}, s32[], pred[3], u32[]{:S(2)})", 16 + 4 + 3 + 4),
        ("s4[3]", 2),
        ("f8e4m3fn[7]", 7),
        ("c64[2]", 16),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert hlo_text.count_bytes(shape) == size
    # A name that looks like a type, however long it is, is read once.
    assert hlo_text.count_bytes(f"{'s1' * 500_000} {shape} s{'1' * 1_000_000}") == size


@pytest.mark.parametrize("n", [1, 2, 5])
def test_bytes_moved_on_a_ring(n):
    """Against the algorithm itself: each device passes on what it has, chunk by chunk."""
    payload = 60.0
    held = [{device} for device in range(n)]
    sent = 0.0
    for _ in range(n - 1):
        held = [held[k] | held[k - 1] for k in range(n)]
        sent += payload
    assert all(len(chunks) == n for chunks in held)
    assert hlo.bytes_moved("all-gather", payload, n) == sent
    scattered = hlo.bytes_moved("reduce-scatter", payload, n)
    gathered = hlo.bytes_moved("all-gather", payload / n, n)
    np.testing.assert_allclose(hlo.bytes_moved("all-reduce", payload, n), scattered + gathered)
    with pytest.raises(hlo_text.HloError, match=r"collective 'gossip' is not known"):
        hlo.bytes_moved("gossip", 1.0, n)


@pytest.mark.parametrize(
    ("op_name", "scopes"),
    [
        ("jit(f)/decode/while", ["decode"]),
        ("jit(f)/turns/while/body/prefill/layers/while", ["prefill", "layers"]),
        ("jit(f)/microbatches/while/body/transpose(jvp(score_chunks))/while", ["score_chunks"]),
        ("jit(f)/decode/while/body/while", []),
        ("jit(f)/decode/while/body/closed_call/while", []),
        ("jit(f)/decode/while/body/eval_jaxpr/while", []),
        ("jit(f)/decode/while/cond/lt", ["decode"]),
        ("", []),
    ],
)
def test_scopes_of_a_loop(op_name, scopes):
    assert loops.scope_names(op_name) == scopes


def test_text_that_is_no_program():
    with pytest.raises(hlo_text.HloError, match="no ENTRY computation"):
        hlo.read("module @jit_f {", MESH)


def test_an_instruction_over_several_lines_is_one():
    """Kernels carry metadata with line breaks, and a line of it may start with a brace."""
    text = """HloModule jit_f

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"a":{
"block_q": 256
}}, metadata={op_name="jit(f)/while/body/kernel"}
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %t = (s32[], f32[8]) tuple(%i, %kernel)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} parameter(0)
}
"""
    module = hlo_text.parse(text)
    body = module.computations["body"]
    assert body.root == "t"
    assert body.instructions["kernel"].op_name == "jit(f)/while/body/kernel"
