"""Suite `convert` of the benchmark, with small models."""

import dataclasses
import pathlib

import jax
import pytest

from atommem_jax.model.transformer import Transformer, count_params, init_params
from experiments.benchmarks import convert_suite

MIB = 1 << 20


@pytest.mark.long
@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs /proc, as Linux has it"
)
def test_the_host_holds_less_than_the_model_once_more(tmp_path):
    config = dataclasses.replace(convert_suite.MODEL, vocab_size=512)
    points = convert_suite.run((8, 24), config)
    for point, layers in zip(points, (8, 24), strict=True):
        model = Transformer(dataclasses.replace(config, num_layers=layers))
        shapes = jax.eval_shape(lambda m=model: init_params(m, jax.random.key(0)))
        assert point["layers"] == layers
        assert point["model_mib"] * MIB == 4 * count_params(shapes)
    assert points[1]["beside_mib"] < 0.5 * points[1]["model_mib"]
    convert_suite.plot(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
