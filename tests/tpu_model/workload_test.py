"""How much a rollout has to do: passes, groups, widths and the mesh that it runs on."""

import pytest

from atommem_jax.config import ConfigError, parse
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.tasks.encoding import EpisodeShape
from atommem_jax.tpu_model import flops, lowering
from atommem_jax.tpu_model.hlo import Traffic
from atommem_jax.tpu_model.workload import Lengths, Workload
from experiments.configs import published

ROWS = 64
CHANGES = {"model.attention": "splash", "rollout.microbatch": 4, "rollout.prompt_buckets": (4, 8)}


def make_workload(lengths=None, shape=(1, 8, 1), **changes):
    """Of Qwen3-0.6B at the setting of the paper."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    config = parse(published.get_config("qwen3_0_6b")).replace({**CHANGES, **named})
    parts, mesh = lowering.make_parts(config), mesh_lib.make_mesh(*shape)
    lengths = lengths or Lengths(turns=2, prompt=9000, response=64, longest=101)
    return Workload(config, parts, EpisodeShape(**config.shape), mesh, ROWS, lengths)


def test_groups_and_passes():
    alone = make_workload()
    assert alone.axes("rollout") == alone.axes("update") == {"data": 1, "fsdp": 8, "tensor": 1}
    assert (alone.groups, alone.read_parts, alone.passes) == (2, 2, 100)
    assert alone.trips("rollout") == {"turns": 2, "groups": 2, "decode": 100}
    together = make_workload(mesh__rollout_tensor=4, rollout__read_rows=3)
    assert together.axes("rollout") == {"data": 1, "fsdp": 2, "tensor": 4}
    assert together.axes("update") == {"data": 1, "fsdp": 8, "tensor": 1}
    # Each of two shares has 32 rows: eight groups of four, read three and three at a time.
    assert (together.groups, together.read_parts) == (8, 16)


def test_a_mesh_of_its_own_reads_fewer_weights():
    def decoded(**changes):
        return make_workload(**changes).parts("rollout", Traffic((), ()), flops.Flops())[2]

    alone = decoded(rollout__microbatch=0)
    together = decoded(rollout__microbatch=0, mesh__rollout_tensor=8)
    assert together.hbm_bytes < alone.hbm_bytes
    assert together.flops == alone.flops


def test_an_int8_cache_is_read_as_one():
    """By hand: a slot of a head has a byte a number and a scale, not two a number."""
    plain, int8 = make_workload(), make_workload(rollout__cache_dtype="int8")
    model = plain.model
    heads = 2 * model.num_layers * model.num_kv_heads * ROWS // 8
    saved = heads * (2 * model.head_width - (model.head_width + 4))

    ours, theirs = (w.parts("rollout", Traffic((), ()), flops.Flops()) for w in (int8, plain))
    limit = plain.config.rollout.response_length
    # A share answers its rows in two groups: each pass of either has half of the cache.
    read = plain.turns * plain.passes * (plain.slots + 1) * saved
    assert theirs[2].hbm_bytes - ours[2].hbm_bytes == pytest.approx(read)
    written = plain.turns * (plain.slots - limit) * saved
    assert theirs[1].hbm_bytes - ours[1].hbm_bytes == pytest.approx(written)

    nothing = lowering.Program(None, (), {}, (), None, ROWS)
    kept, whole = (w.split("rollout", nothing)["KV cache"] for w in (int8, plain))
    assert kept / whole == pytest.approx((model.head_width + 4) / (2 * model.head_width))


def test_drafts_feed_more_and_take_fewer_passes():
    lengths = Lengths(turns=2, prompt=9000, response=64, longest=101, tokens_a_pass=2.0)
    drafted = make_workload(lengths, rollout__draft=2)
    assert drafted.passes == 50
    assert drafted.slots == make_workload().slots + 2
    # Half of the passes, of three tokens each.
    ours, theirs = drafted.flops("rollout"), make_workload().flops("rollout")
    assert ours.model == theirs.model
    assert ours.hardware > theirs.hardware
    with pytest.raises(ConfigError, match=r"--tokens_a_pass=2.0: with rollout.draft=0 .* 1 to 1"):
        make_workload(lengths)


def test_prompts_are_read_at_a_bucket_behind_what_is_kept():
    whole = make_workload().slots
    short = make_workload(Lengths(turns=2, prompt=6000, response=64, longest=101)).slots
    assert whole - short == 13_056 - 6_528
    kept = make_workload(rollout__cache_prefix=True)
    assert kept.slots > whole  # the questions' columns stand beside those of the bucket
    assert kept.flops("rollout").model < make_workload().flops("rollout").model
