"""Prints the validity table of a task: what scripted policies reach at each scale.

    python experiments/validity.py --config=experiments/configs/synthetic.py --episodes=128

A task can tell a learned memory from a fixed workflow only if a policy without mistakes solves
it, and every fixed one falls short at 1x and further with scale. The last column says where that
does not hold. The policies are `tasks.teacher.SCRIPTED`; no parameters are involved.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags as absl_flags

from atommem_jax.agent import build, validate
from atommem_jax.config import check, parse
from atommem_jax.runs import validity
from atommem_jax.tasks import teacher
from experiments import flags

CONFIG = flags.define_config("experiments/configs/synthetic.py")
EPISODES = absl_flags.DEFINE_integer("episodes", 0, "Episodes of each split; 0 for all.")
JSON = flags.define_path(
    "json", None, "File for the summaries; none is written without.", local=True
)


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    config = parse(CONFIG.value)
    validate.validate(config)
    dataset = build.load_dataset(config, flags.DATA_ROOT.value)
    table = validity.measure(config, dataset, teacher.SCRIPTED, episodes=EPISODES.value)
    print(validity.render(table))
    if JSON.value:
        path = pathlib.Path(JSON.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        print(f"summaries: {path}")


if __name__ == "__main__":
    flags.run(main)
