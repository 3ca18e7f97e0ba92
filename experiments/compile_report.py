"""Compiles the programs of a training run for a TPU topology, on a machine without one.

    python experiments/compile_report.py --config=experiments/configs/published.py:qwen3_8b \
        --topology=v5e:8x8 --config.mesh.fsdp=16 --config.mesh.tensor=4 --json=report.json

For each phase (SFT step, rollout, PPO update) it tells whether the program fits, what the memory
of a chip goes to, exact FLOPs, what the compiled program sends between chips, and how long a step
would take by a roofline model, whose assumptions it prints. It ends with status 1 where one does
not fit. `--search` tries mesh shapes and micro-batches. The compiler is the real one
(`pip install -e '.[tpu]'`); step times are modelled, not measured.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

# Without a TPU JAX would look for one for a minute; the compiler for it needs none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from absl import flags as absl_flags

from atommem_jax.config import check, parse, paths
from atommem_jax.tpu_model import compilation, hardware, lowering, presentation, workload
from experiments import flags

CONFIG = flags.define_config("experiments/configs/published.py:qwen3_8b")
TOPOLOGY = absl_flags.DEFINE_string(
    "topology", "v5e:8x8", "TPU generation and topology, such as v5p:2x2x4."
)
SLICES = absl_flags.DEFINE_integer("slices", 1, "Slices that the data-centre network joins.")
PHASES = absl_flags.DEFINE_list("phase", list(lowering.PHASES), "Programs to compile.")
JSON = flags.define_path("json", None, "File for the figures; none is written without.", local=True)
SEARCH = absl_flags.DEFINE_bool(
    "search", False, "Try mesh shapes and micro-batch sizes, and print what fits."
)
TURNS = absl_flags.DEFINE_integer("turns", 11, "Turns of a trajectory (paper: 10.9 calls a task).")
PROMPT = absl_flags.DEFINE_integer(
    "prompt_tokens", 0, "Tokens of a mean prompt; 0 for 3/4 of the longest."
)
RESPONSE = absl_flags.DEFINE_integer(
    "response_tokens", 0, "Tokens of a mean response; 0 for 1/4 of the longest."
)
LONGEST = absl_flags.DEFINE_integer(
    "longest_response", 0, "Tokens decoded a turn; 0 for half of the longest."
)
TOKENS = absl_flags.DEFINE_float(
    "tokens_a_pass", 1.0, "Tokens that a pass of decoding adds to a row, with rollout.draft."
)
QUICK = absl_flags.DEFINE_bool("quick", False, "Compile with least effort, as for a fit check.")


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: flags start with --; see --help")
    for phase in PHASES.value:
        check(
            phase in lowering.PHASES,
            f"--phase={phase}: the phases are {', '.join(lowering.PHASES)}",
        )
    topology = hardware.parse_topology(TOPOLOGY.value, SLICES.value)
    config = parse(CONFIG.value)
    paths.make_place(JSON.value, f"--json={JSON.value}")
    target = compilation.Target(
        topology,
        hardware.get_topology(topology),
        workload.Lengths(TURNS.value, PROMPT.value, RESPONSE.value, LONGEST.value, TOKENS.value),
        QUICK.value,
        flags.DATA_ROOT.value,
    )
    fits = True
    if SEARCH.value:
        candidates, reports = compilation.search(config, target, PHASES.value)
        print(presentation.render_search(candidates))
        report: dict[str, Any] = {"candidates": reports}
    else:
        phases, mesh = compilation.compile_phases(config, target, PHASES.value)
        print(presentation.render(phases, topology, dict(mesh.shape)))
        report = compilation.describe(config, target, mesh, phases)
        fits = all(phase.fits for phase in phases)
    if JSON.value:
        paths.write_text(JSON.value, json.dumps(report, indent=1))
        print(f"figures: {JSON.value}")
    if not fits:
        sys.exit(1)


if __name__ == "__main__":
    flags.run(main)
