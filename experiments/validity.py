"""Prints the validity table of a task: what scripted policies reach at each scale.

    python experiments/validity.py --config=experiments/configs/village.py --episodes=128

A task can tell a learned memory from a script only if a script without mistakes solves it at every
scale, the best script without any one operation stays below .75, and every fixed workflow stays
below .60 at 1x and falls with scale. The last column says where that does not hold, and the exit
status is 1 if it does not. No parameters are involved; `runs.validity.list_rows` has the rows.
"""

import json
import sys
from collections.abc import Sequence

from absl import flags as absl_flags

from atommem_jax.agent import build, validate
from atommem_jax.config import check, parse, paths
from atommem_jax.runs import validity
from experiments import flags

CONFIG = flags.define_config("experiments/configs/village.py")
EPISODES = absl_flags.DEFINE_integer("episodes", 0, "Episodes of each split; 0 for all.")
ROWS = absl_flags.DEFINE_list("rows", [], "Names of the rows to play, as clean; by default all.")
JSON = flags.define_path(
    "json", None, "File for the summaries; none is written without.", local=True
)


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    config = parse(CONFIG.value)
    validate.validate(config)
    paths.make_place(JSON.value, f"--json={JSON.value}")
    dataset = build.load_dataset(config, flags.DATA_ROOT.value)
    rows = validity.list_rows(config)
    for name in ROWS.value:
        check(name in rows, f"--rows={name}: allowed are {', '.join(rows)}")
    rows = {name: row for name, row in rows.items() if name in ROWS.value or not ROWS.value}
    table = validity.measure(config, dataset, rows, episodes=EPISODES.value)
    print(validity.render(table, rows))
    if JSON.value:
        paths.write_text(JSON.value, json.dumps(table, indent=2) + "\n")
        print(f"summaries: {JSON.value}")
    if not all(passed for passed, _ in validity.judge_table(table, rows).values()):
        sys.exit(1)


if __name__ == "__main__":
    flags.run(main)
