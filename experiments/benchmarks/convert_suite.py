"""Suite `convert`: what the host holds while a published model is loaded, beside the model.

Models of growing depth are written as Hugging Face directories and each is loaded in a process of
its own, whose resident memory the kernel records. On a CPU the parameters lie in the same memory:
what is left after their bytes and what the process held before is what loading needs.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib
import tqdm

from atommem_jax.model.model_config import ModelConfig
from atommem_jax.model.transformer import Transformer, init_params
from atommem_jax.weights import hf_export

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LAYERS = (4, 16, 32, 64)
MODEL = ModelConfig(
    vocab_size=8192,
    width=512,
    num_heads=8,
    num_kv_heads=8,
    head_width=64,
    mlp_width=2048,
    tie_embeddings=True,
)
_MIB = 1 << 20
_LOADER = """
import json, re, sys
import jax
from atommem_jax.weights import huggingface
def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
jax.block_until_ready(jax.numpy.zeros(1) + 1)
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
_, params = huggingface.load(sys.argv[1])
jax.block_until_ready(params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"model": size, "beside": resident("VmHWM") - before - size}))
"""


def run(layers: Sequence[int] = LAYERS, config: ModelConfig = MODEL) -> list[dict[str, Any]]:
    """Points of {"layers", "model_mib", "beside_mib"}, float32, with files of 64 MiB.

    Raises OSError where the kernel does not tell memory as Linux does.
    """
    points = []
    for count in tqdm.tqdm(layers, desc="convert", leave=False):
        sized = dataclasses.replace(config, num_layers=count)
        with tempfile.TemporaryDirectory() as folder:
            params = init_params(Transformer(sized), jax.random.key(0))
            hf_export.save(folder, params, sized, max_file_bytes=64 * _MIB)
            del params
            found = _load_apart(folder)
        points.append(
            {
                "layers": count,
                "model_mib": found["model"] / _MIB,
                "beside_mib": found["beside"] / _MIB,
            }
        )
    return points


def _load_apart(folder: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", _LOADER, folder],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[2],
    )
    return json.loads(done.stdout)


def plot(points: list[dict[str, Any]], path: str | pathlib.Path) -> None:
    """Draws memory beside the model against the model; the ending of `path` chooses the format."""
    figure, panel = plt.subplots(figsize=(5, 3.6), layout="constrained")
    sizes = [point["model_mib"] for point in points]
    panel.plot(sizes, [point["beside_mib"] for point in points], marker="o", label="loading")
    panel.plot(sizes, sizes, color="grey", linestyle="--", label="the model once more")
    panel.set(
        xlabel="parameters, MiB", ylabel="host memory beside them, MiB", title="Loading weights"
    )
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
