"""The compile report: what does not work is named; a small model compiles for a slice."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.helpers import forks

SCRIPT = str(ROOT / "experiments" / "compile_report.py")
SMALL = [
    "--config.model.num_layers=2",
    "--config.model.width=256",
    "--config.model.mlp_width=512",
    "--config.model.num_heads=4",
    "--config.model.num_kv_heads=2",
    "--config.model.head_width=128",
    "--config.tokenizer.vocab_size=2048",
    "--config.shape.chunk_length=1024",
    "--config.shape.chunks=2",
    "--config.shape.questions=2",
    "--config.memory.slots=8",
    "--config.memory.entry_length=64",
    "--config.memory.scratchpad_length=64",
    "--config.memory.key_dim=64",
    "--config.rollout.response_length=64",
    "--config.rollout.answer_length=8",
    "--config.rollout.score_chunk=32",
    "--config.rl.episodes=8",
    "--config.rl.ppo.group_size=2",
    # Each width of rows is compiled.
    "--config.sft.length_buckets=(4,8)",
    "--config.rl.ppo.length_buckets=(4,8)",
]


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5e:3x3"], ["v5e:3x3", "v5e:8x8"]),
        (["--topology=v9:2x2"], ["v9", "v5e"]),
        (["--phase=play"], ["--phase=play", "sft, rollout, update"]),
    ],
)
def test_what_there_is_not_is_answered_with_what_there_is(arguments, words):
    printed = forks.refuse("compile_report.py", *arguments)
    for word in words:
        assert word in printed


@pytest.mark.libtpu
def test_a_mesh_that_does_not_suit_is_answered_with_the_valid_ones():
    done = run("--topology=v5e:2x2", "--config.mesh.fsdp=3", *SMALL)
    assert done.returncode == 2
    assert "mesh.fsdp=3" in done.stderr or "uses 3 devices" in done.stderr
    assert "1x2x2" in done.stderr


@pytest.mark.libtpu
def test_the_phases_of_a_small_model_compile_for_a_slice(tmp_path):
    path = tmp_path / "report.json"
    done = run(
        "--topology=v5e:2x2",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        "--quick",
        "--turns=4",
        f"--json={path}",
        *SMALL,
    )
    assert done.returncode == 0, done.stderr
    phases = json.loads(path.read_text())["phases"]
    assert set(phases) == {"sft", "rollout", "update"}
    for phase in phases.values():
        assert phase["fits"]
        assert 0 < phase["hbm_gib"] < phase["hbm_limit_gib"]
        assert phase["flops"] > 0
        assert 0 < phase["mfu"] < 1
        assert phase["step_seconds"] > 0
        assert not phase["unknown_loops"]
    # Layers are gathered where they are used; a rollout gathers before its turns, or not at all.
    assert phases["update"]["collectives"]["all-gather"]["bytes"] > 0
    assert "assumptions" in done.stdout
