"""Players: who asks for the same gets the same program."""

import logging

import jax
import numpy as np

from atommem_jax.agent import crossed, play
from atommem_jax.parallel import host_batches
from atommem_jax.parallel import mesh as mesh_lib
from tests.helpers import tiny


def test_rollouts_and_validation_of_equal_sizes_are_compiled_once(caplog):
    mesh, params = mesh_lib.single(), tiny.make_params()

    def count_compiled(parts, count: int, temperature: float) -> int:
        """Programs compiled while a player of its own plays `count` episodes."""
        episodes, _ = tiny.make_episodes(range(count))
        ids = np.arange(count, dtype=np.int32)
        rows = host_batches.shard((jax.device_get(episodes), ids), mesh)
        key, heat = host_batches.replicate((jax.random.key(0), np.float32(temperature)), mesh)
        player = play.make_player(parts, tiny.make_shape(), mesh)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            player(params, *rows, key, heat)
        return sum("Compiling jit(play)" in record.getMessage() for record in caplog.records)

    parts = tiny.make_parts()
    assert count_compiled(parts, 2, 1.0) == 1  # as RL plays
    assert count_compiled(parts, 2, 0.0) == 0  # as validation does
    assert count_compiled(parts, 3, 0.0) == 1
    # The words of a teacher beside the student's are another program.
    alone, beside = (play.make_program(parts, mesh, teacher=t) for t in (None, crossed.CLEAN))
    assert alone is not beside
