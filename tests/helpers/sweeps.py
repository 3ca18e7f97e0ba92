"""Sweeps to test with: those committed, and tiny ones."""

import pathlib

from atommem_jax.config import load_config
from atommem_jax.sweeps import plan
from tests.conftest import ROOT
from tests.helpers import runs

COMMITTED = ("main_table", "ablations", "algorithms")

# As the version before the one that knows of slots wrote it.
OLD_STATUS = """{
  "state": "failed",
  "finished": [
    "train"
  ],
  "failed": "evaluate {\\"step\\": \\"last\\"}: was killed by SIGKILL",
  "attempts": 2,
  "seconds": 61.25,
  "cpu_seconds": 118.5,
  "commit": "8c6116f+",
  "log": "log.txt",
  "about": {
    "cpu_devices": 2,
    "overrides": {
      "seed": 1
    },
    "config": {
      "seed": 1,
      "task.scales": [
        1,
        2
      ]
    }
  }
}
"""


def load(path: pathlib.Path, **common) -> plan.Sweep:
    """A sweep as the command line would load it."""
    base = load_config(str(path))
    base.update_from_flattened_dict(common)
    return plan.load(str(path), base.lock(), common)


def load_committed(name: str, **common) -> plan.Sweep:
    return load(ROOT / "experiments" / "configs" / f"{name}.py", **common)


def make_maker(folder: pathlib.Path):
    """A function that writes and loads a config in `folder` that adds runs to the tiny config."""

    def make(added: list[tuple], evaluations: str = "[{}]", **common) -> plan.Sweep:
        path = write_config(folder / "few.py", added, evaluations)
        return load(path, **common)

    return make


def write_config(path: pathlib.Path, added: list[tuple], evaluations: str) -> pathlib.Path:
    path.write_text(
        "from experiments.configs import synthetic\n\n"
        f"EVALUATIONS = {evaluations}\n\n"
        "def get_config():\n"
        "    config = synthetic.get_config()\n"
        f"    config.update_from_flattened_dict({runs.OVERRIDES!r})\n"
        "    return config\n\n"
        "def sweep(add):\n"
        f"    for name, overrides in {added!r}:\n"
        "        add(name, overrides)\n"
    )
    return path
