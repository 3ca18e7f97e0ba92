"""The phases of a curriculum: from which step on a stage learns from which config.

`sft.curriculum` and `rl.curriculum` change fields of task (facts a part, questions, the length of a
document), memory (its capacity) and rollout. Everything else is that of the config itself.
"""

import contextlib
from collections.abc import Iterator

from atommem_jax.agent import settings, validate
from atommem_jax.config import ConfigError, Experiment, curriculum
from atommem_jax.config import check as require

SECTIONS = ("task", "memory", "rollout")
"""What may change from phase to phase."""

Steps = tuple[int, int]  # from the first to before the last


def find(config: Experiment, stage: str) -> list[tuple[Steps, Experiment]]:
    """Steps and config of each phase of 'sft' or 'rl', in order; they cover the stage.

    Raises ConfigError, naming the phase, for a field that cannot change or a value out of range.
    """
    chosen = getattr(config, stage)
    if not chosen.steps:
        return [((0, 0), config)]
    entries = curriculum.read(chosen.curriculum, chosen.steps, f"{stage}.curriculum")
    ends = [*(entry.step for entry in entries[1:]), chosen.steps]
    phases = []
    for entry, end in zip(entries, ends, strict=True):
        with naming(stage, entry.step):
            for setting in entry.settings:
                section = setting.partition(".")[0]
                require(
                    section in SECTIONS,
                    f"{setting}: allowed are fields of {', '.join(SECTIONS)}, such as "
                    "task.facts_per_chunk=1",
                )
            changed = settings.override(config, entry.settings)
            validate.validate(changed)
        phases.append(((entry.step, end), changed))
    return phases


def check(config: Experiment) -> None:
    """Raises ConfigError as `find` does, of either stage; no data is needed."""
    for stage in ("sft", "rl"):
        find(config, stage)


@contextlib.contextmanager
def naming(stage: str, step: int) -> Iterator[None]:
    """Says of what is refused within it in which phase that was."""
    try:
        yield
    except (ConfigError, ValueError) as error:
        told = str(error).removeprefix("--set=")
        raise ConfigError(f"{stage}.curriculum at step {step}: {told}") from error
