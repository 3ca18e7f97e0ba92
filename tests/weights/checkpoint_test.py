"""A checkpoint gives back what was saved, keeps the right steps, and survives a kill."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from atommem_jax.weights import fingerprint
from atommem_jax.weights.checkpoint import (
    Checkpointer,
    CheckpointError,
    CorruptCheckpointError,
)
from atommem_jax.weights.records import decode, encode

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHILD_ENV = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
CONFIG = ConfigDict(
    {"model": {"width": 64, "dtype": "bfloat16"}, "mesh": (1, 8), "lr": 1e-3, "cap": None}
)
EXTRAS = {"config": CONFIG, "tokenizer": b"\x00\xffpieces", "data_state": {"position": 7}}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array


def make_state(seed: int = 0, width: int = 8) -> State:
    """Values no dtype can hold by accident: random bits of every kind, infinities, a NaN."""
    bits = np.random.default_rng(seed).integers(0, 2**32, (width, 4), dtype=np.uint32)
    floats = bits.view(np.float32).copy()
    floats[0] = [np.nan, np.inf, -0.0, 1e-40]
    params = {
        "layer": {"kernel": jnp.asarray(floats), "scale": jnp.asarray(floats[0], jnp.bfloat16)}
    }
    opt_state = optax.adam(1e-3).init(params)
    return State(jnp.int32(seed), params, opt_state, jnp.asarray(bits[0]))


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(checkpointer, step, em=None, state=None):
    checkpointer.save(
        step,
        make_state(step) if state is None else state,
        **EXTRAS,
        progress={"step": step},
        metrics=None if em is None else {"em": em},
    )


def abstract(width: int = 8) -> State:
    return jax.eval_shape(lambda: make_state(0, width))


@pytest.fixture
def one_step(tmp_path):
    """Directory with the single step 3."""
    with Checkpointer(tmp_path / "run", best_metric="em") as checkpointer:
        save(checkpointer, 3, em=0.5)
    return tmp_path / "run"


def test_round_trip_is_bit_exact(tmp_path):
    state = make_state(3)
    expected = jax.tree.map(np.array, state)
    with Checkpointer(tmp_path, best_metric="em") as checkpointer:
        checkpointer.save(
            3, state, **EXTRAS, progress={"stage": "rl", "tokens": 2**40}, metrics={"em": 0.25}
        )
        # What a training loop does next: the buffers are donated while the save is under way.
        consume = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
        jax.block_until_ready(consume(state))
        restored = checkpointer.restore(abstract_state=jax.eval_shape(lambda: make_state(3)))
    assert_same_bits(restored.state, expected)
    assert restored.step == 3
    assert restored.config.to_dict() == CONFIG.to_dict()
    assert restored.tokenizer == b"\x00\xffpieces"
    assert restored.data_state == {"position": 7}
    assert restored.progress == {"stage": "rl", "tokens": 2**40}
    assert restored.metrics == {"em": 0.25}


def test_config_and_tokenizer_need_no_tree_and_config_is_locked(one_step):
    with Checkpointer(one_step, read_only=True) as checkpointer:
        config = checkpointer.restore_config()
        assert checkpointer.restore_tokenizer(3) == b"\x00\xffpieces"
    assert config.mesh == (1, 8)
    assert config.model.width == 64
    with pytest.raises(AttributeError, match='Did you mean "width"'):
        config.model.widht = 3


def test_bytes_can_be_the_data_position(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        extras = EXTRAS | {"data_state": b"\xfe{}"}
        checkpointer.save(1, {"w": jnp.ones(2)}, **extras, progress={})
        restored = checkpointer.restore(abstract_state={"w": jnp.zeros(2)})
    assert restored.data_state == b"\xfe{}"
    assert restored.metrics == {}


def test_last_and_best_steps_are_kept(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: float("nan"), 4: None, 5: 0.3, 6: 0.2}
    with Checkpointer(tmp_path, keep_last=2, keep_best=1, best_metric="em") as checkpointer:
        for step, em in scores.items():
            save(checkpointer, step, em)
        assert checkpointer.all_steps() == [2, 5, 6]
        assert checkpointer.latest_step() == 6
        assert checkpointer.best_step() == 2
        best = checkpointer.restore(2, abstract_state=abstract())
    assert_same_bits(best.state, make_state(2))
    with Checkpointer(tmp_path, keep_last=2, keep_best=1, best_metric="em") as reopened:
        assert reopened.best_step() == 2
        save(reopened, 7, em=0.95)
        save(reopened, 8, em=0.0)
        assert reopened.all_steps() == [7, 8]
        assert reopened.best_step() == 7


def test_without_a_score_no_step_is_best(tmp_path):
    with Checkpointer(tmp_path, best_metric="em") as checkpointer:
        assert checkpointer.latest_step() is None
        save(checkpointer, 1, em=float("nan"))
        save(checkpointer, 2)
        assert checkpointer.best_step() is None
        assert checkpointer.all_steps() == [1, 2]


def test_restores_onto_the_sharding_asked_for(tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    kernel = jnp.arange(64.0).reshape(8, 8)
    saved = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("data", "model")))
    other = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    target = NamedSharding(other, PartitionSpec(None, "rows"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"kernel": saved}, **EXTRAS, progress={})
        asked = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=target)}
        sharded = checkpointer.restore(abstract_state=asked).state["kernel"]
        whole = checkpointer.restore(
            abstract_state={"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
        ).state["kernel"]
    assert sharded.sharding == target
    assert [s.data.shape for s in sharded.addressable_shards] == [(8, 4), (8, 4)]
    np.testing.assert_array_equal(sharded, kernel)
    assert whole.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(whole, kernel)


def test_a_part_of_the_state_can_be_restored(one_step):
    with Checkpointer(one_step, read_only=True) as checkpointer:
        part = checkpointer.restore(abstract_state={"params": abstract().params}, partial=True)
        with pytest.raises(CheckpointError, match=r"differ: step int32\[\] has no place"):
            checkpointer.restore(abstract_state={"params": abstract().params})
    assert_same_bits(part.state, {"params": make_state(3).params})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: abstract(width=6),
            r"params/layer/kernel is float32\[8,4\], asked for float32\[6,4\]",
        ),
        (
            lambda s: s.replace(params=s.params | {"head": s.params["layer"]["scale"]}),
            r"differ: params/head bfloat16\[4\] was not saved",
        ),
        (
            lambda s: s.replace(key=jax.ShapeDtypeStruct((4,), jnp.int32)),
            r"key is uint32\[4\], asked for int32\[4\].*restore_config",
        ),
    ],
)
def test_another_architecture_is_refused_by_name(one_step, change, message):
    with (
        Checkpointer(one_step, read_only=True) as checkpointer,
        pytest.raises(CheckpointError, match=message),
    ):
        checkpointer.restore(abstract_state=change(abstract()))


def test_missing_checkpoints_are_explained(tmp_path, one_step):
    with Checkpointer(one_step) as checkpointer:
        with pytest.raises(CheckpointError, match=r"step=4: .* holds steps 3; choose"):
            checkpointer.restore(4, abstract_state=abstract())
        with pytest.raises(CheckpointError, match=r"step=3: .* already holds step 3"):
            save(checkpointer, 3)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "notes.txt").touch()
    with (
        Checkpointer(tmp_path / "wrong", read_only=True) as checkpointer,
        pytest.raises(CheckpointError, match=r"contains notes.txt; pass the directory"),
    ):
        checkpointer.restore_config()
    with Checkpointer(tmp_path / "typo", read_only=True) as checkpointer:
        with pytest.raises(CheckpointError, match=r"typo, which does not exist"):
            checkpointer.restore_config()
        with pytest.raises(CheckpointError, match="read_only=True"):
            save(checkpointer, 1)
    assert not (tmp_path / "typo").exists()


def test_what_cannot_be_saved_is_named(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        extras = EXTRAS | {"progress": {}}
        with pytest.raises(ValueError, match=r"config\.model\.dtype is a type"):
            checkpointer.save(1, make_state(), **(extras | {"config": {"model": {"dtype": float}}}))
        with pytest.raises(ValueError, match=r"leaf 'a/b' is 3, a int"):
            checkpointer.save(1, {"a": {"b": 3}}, **extras)
        with pytest.raises(ValueError, match=r"leaf 'key' is a typed PRNG key"):
            checkpointer.save(1, {"key": jax.random.key(0)}, **extras)
        assert checkpointer.all_steps() == []
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpointer(tmp_path, keep_last=0)


# ---------------------------------------------------------------------------------------------
# Damage


@pytest.fixture
def two_steps(tmp_path):
    """Directory with the steps 3 and 5."""
    with Checkpointer(tmp_path / "run", best_metric="em") as checkpointer:
        save(checkpointer, 3, em=0.5)
        save(checkpointer, 5, em=0.2)
    return tmp_path / "run"


def find_largest(folder: pathlib.Path) -> pathlib.Path:
    """The file that holds most of a step's arrays."""
    return max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)


def truncate(folder: pathlib.Path) -> None:
    path = find_largest(folder / "state")
    os.truncate(path, path.stat().st_size // 2)


def remove_arrays(folder: pathlib.Path) -> None:
    for path in [path for path in (folder / "state").rglob("*") if path.is_file()]:
        if path.parent.name == "d":
            path.unlink()


def remove_item(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "state")


def garble_json(folder: pathlib.Path) -> None:
    path = folder / "config" / "metadata"
    path.write_text(path.read_text()[:-5])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, "state cannot be read"),
        (remove_arrays, "state cannot be read"),
        (remove_item, "state cannot be read"),
        (garble_json, "config.* cannot be read"),
    ],
)
def test_a_damaged_step_is_refused_and_the_ones_before_are_named(two_steps, damage, why):
    damage(two_steps / "5")
    with Checkpointer(two_steps, best_metric="em") as checkpointer:
        with pytest.raises(CorruptCheckpointError) as caught:
            checkpointer.restore(abstract_state=abstract())
        message = str(caught.value)
        assert re.search(f"step 5 of {two_steps} is corrupt: .*{why}", message)
        assert message.endswith("Complete steps before it: 3")
        assert (caught.value.step, caught.value.earlier) == (5, (3,))
        before = checkpointer.restore(3, abstract_state=abstract())
    assert_same_bits(before.state, make_state(3))


@pytest.mark.parametrize("leaf", ["kernel", "scale", "key", "step"])
def test_a_single_other_bit_is_noticed(tmp_path, monkeypatch, leaf):
    def flip(state):
        """What a disk might do that has no checksums."""

        def change(path, x):
            if leaf not in jax.tree_util.keystr(path) or "opt_state" in jax.tree_util.keystr(path):
                return x
            content = bytearray(np.asarray(x).tobytes())
            content[-1] ^= 0x10
            return jnp.asarray(np.frombuffer(bytes(content), x.dtype).reshape(x.shape))

        return jax.tree_util.tree_map_with_path(change, state)

    with Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as patch:
            honest = fingerprint.fingerprints
            patch.setattr(
                fingerprint,
                "fingerprints",
                lambda leaves: honest(jax.tree.leaves(flip(jax.tree.unflatten(tree, leaves)))),
            )
            tree = jax.tree.structure(make_state(1))
            save(checkpointer, 1)
        with pytest.raises(
            CorruptCheckpointError, match=rf"step 1 .* other bits .* in 1: .*{leaf}"
        ):
            checkpointer.restore(abstract_state=abstract())


def test_fingerprints_do_not_depend_on_the_sharding_but_on_values_and_places():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (8, 4), dtype=np.uint32)
    for values in (words, words.view(np.float32), words > 2**31, words.view(np.uint16)):
        spread = jax.device_put(values, NamedSharding(mesh, PartitionSpec("data", "model")))
        (whole,) = fingerprint.fingerprints([values])
        assert fingerprint.fingerprints([spread, jnp.asarray(values)]) == [whole, whole]
        swapped = values.copy()
        swapped[[0, 1]] = swapped[[1, 0]]
        assert fingerprint.fingerprints([swapped]) != [whole]
    zeros = [np.zeros(size, np.float32) for size in (3, 4)]
    assert len(set(fingerprint.fingerprints(zeros))) == 2


def test_a_checkpoint_from_before_there_were_fingerprints_is_read(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, "describe_exactly", fingerprint.describe)
            save(checkpointer, 1)
        restored = checkpointer.restore(abstract_state=abstract())
    assert_same_bits(restored.state, make_state(1))


def test_a_step_set_aside_makes_room_for_another_of_its_number(two_steps):
    with Checkpointer(two_steps, best_metric="em") as checkpointer:
        assert checkpointer.set_aside(5) == "5.corrupt"
        assert checkpointer.all_steps() == [3]
        save(checkpointer, 5, em=0.9)
        assert checkpointer.set_aside(5) == "5.corrupt.1"
        assert checkpointer.latest_step() == 3
        with pytest.raises(CheckpointError, match=r"step=5: .* holds steps 3"):
            checkpointer.set_aside(5)
    assert {path.name for path in two_steps.iterdir()} == {"3", "5.corrupt", "5.corrupt.1"}
    with (
        Checkpointer(two_steps, read_only=True) as reader,
        pytest.raises(CheckpointError, match="read_only=True"),
    ):
        reader.set_aside(3)


def test_json_keeps_tuples_bytes_and_numpy_scalars():
    value = {"a": (1, [2.5, (b"\x80",)], {"b": None}), "c": np.float32(0.5), "d": ()}
    decoded = decode(encode(value, "x"))
    assert decoded == {"a": (1, [2.5, (b"\x80",)], {"b": None}), "c": 0.5, "d": ()}
    assert type(decoded["c"]) is float
    with pytest.raises(ValueError, match=r"x\.y: key 3 is reserved or no string"):
        encode({"y": {3: 1}}, "x")


# The child stops inside the save of step 2, when every array is on disk and only the final rename
# is left: the latest moment at which a kill must still leave step 1 as the newest.
_CHILD = """
import sys, time
import jax.numpy as jnp
from orbax.checkpoint._src.path import atomicity
from atommem_jax.weights.checkpoint import Checkpointer

def save(step):
    checkpointer.save(step, {"w": jnp.full((256, 256), step, jnp.float32)}, config={"step": step},
                      tokenizer=b"t", data_state={"position": step}, progress={"step": step},
                      metrics={"em": float(step)})

checkpointer = Checkpointer(sys.argv[1], best_metric="em")
save(1)
checkpointer.wait()

async def hang(*unused_args, **unused_kwargs):
    print("in the middle", flush=True)
    time.sleep(1e6)

for name in ("AtomicRenameTemporaryPath", "CommitFileTemporaryPath"):
    getattr(atomicity, name).finalize = hang
save(2)
checkpointer.wait()
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_previous_step(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_CHILD), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=CHILD_ENV,
    )
    assert child.stdout.readline().strip() == "in the middle"
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    leavings = {path.name for path in tmp_path.iterdir()} - {"1"}
    assert any(name.startswith("2") for name in leavings)

    with Checkpointer(tmp_path, best_metric="em", read_only=True) as reader:
        assert reader.all_steps() == [1]
    # A reader neither removes nor adds anything: the run may still be writing.
    assert {path.name for path in tmp_path.iterdir()} == leavings | {"1"}

    state = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    with Checkpointer(tmp_path, best_metric="em") as checkpointer:
        assert (checkpointer.latest_step(), checkpointer.best_step()) == (1, 1)
        restored = checkpointer.restore(abstract_state=state)
        np.testing.assert_array_equal(restored.state["w"], np.full((256, 256), 1, np.float32))
        assert (restored.progress, restored.data_state) == ({"step": 1}, {"position": 1})
        checkpointer.save(2, {"w": jnp.zeros((256, 256))}, **EXTRAS, progress={"step": 2})
        assert checkpointer.all_steps() == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} - {"1", "2"} == set()


_PROCESS = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from atommem_jax.weights.checkpoint import Checkpointer

directory, address, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, 2, index)
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
rows = np.arange(8, dtype=np.float32).reshape(4, 2)
state = {"w": jax.make_array_from_callback((4, 2), sharding, lambda i: rows[i])}
with Checkpointer(directory, best_metric="em") as checkpointer:
    checkpointer.save(1, state, config={"seed": 0}, tokenizer=b"t", progress={"step": 1},
                      data_state={"process": index, "path": "x" * index}, metrics={"em": 0.5})
    restored = checkpointer.restore(abstract_state=state)
assert restored.data_state == {"process": index, "path": "x" * index}, restored.data_states
(shard,) = restored.state["w"].addressable_shards
np.testing.assert_array_equal(shard.data, rows[2 * index : 2 * index + 2])
assert checkpointer.best_step() == 1
"""


def test_two_processes_each_get_their_own_position_and_one_can_take_over(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(tmp_path), address, str(index)],
            stderr=subprocess.PIPE,
            text=True,
            env=CHILD_ENV,
        )
        for index in range(2)
    ]
    errors = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)

    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        restored = checkpointer.restore(abstract_state={"w": jnp.zeros((4, 2))})
    np.testing.assert_array_equal(restored.state["w"], np.arange(8.0).reshape(4, 2))
    assert [state["process"] for state in restored.data_states] == [0, 1]
    with pytest.raises(CheckpointError, match=r"saved by 2 processes .* this run has 1; start as"):
        _ = restored.data_state
