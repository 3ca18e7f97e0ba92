"""The stages of a run, each cut into the phases of its curriculum.

`sft.curriculum` and `rl.curriculum` say what is learned from which step on: other fields of the
task (facts a part, questions, the length of a document) or of the memory (its capacity). A phase
is a stage with a config, data and programs of its own; parameters, optimiser and its schedule go
on. The config itself is what is validated, evaluated and kept.
"""

from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from atommem_jax.agent import build, load, settings, validate
from atommem_jax.config import ConfigError, Experiment, curriculum
from atommem_jax.runs import agreement, stages
from atommem_jax.tasks import datasets, encoding


def find_phases(config: Experiment, section: str) -> list[tuple[stages.Phase, Experiment]]:
    """(steps, config) of each phase of a stage, which the steps 0 to the last fall into.

    Raises ConfigError, naming the entry, for a field that cannot be set or a value out of range.
    """
    chosen = getattr(config, section)
    entries = curriculum.read(chosen.curriculum, chosen.steps, f"{section}.curriculum")
    ends = [*(entry.step for entry in entries[1:]), chosen.steps]
    phases = []
    for entry, end in zip(entries, ends, strict=True):
        try:
            changed = settings.override(config, entry.settings)
            validate.validate(changed)
        except ConfigError as error:
            raise ConfigError(f"{section}.curriculum at step {entry.step}: {error}") from error
        phases.append(((entry.step, end), changed))
    return phases


def make_plan(
    parts: build.Parts,
    mesh: Mesh,
    examples: Sequence,
    shape: encoding.EpisodeShape,
    load_data: Callable[[Experiment], datasets.Dataset],
) -> list[stages.Sft | stages.Rl]:
    """SFT and RL, each as one stage or as its phases, in order.

    Args:
      parts: of the config itself.
      mesh: of all stages.
      examples: that are learned from where no curriculum says otherwise.
      shape: of those.
      load_data: prepares the data of another config.

    Raises ConfigError as `find_phases` does, and where a phase does not fit its data.
    """
    plan: list[stages.Sft | stages.Rl] = []
    kinds: tuple[type[stages.Sft] | type[stages.Rl], ...] = (stages.Sft, stages.Rl)
    for make in kinds:
        for steps, config in find_phases(parts.config, make.name):
            if config == parts.config:
                plan.append(make(parts, mesh, examples, shape, steps))
                continue
            here, fitted = examples, shape
            if config.task != parts.config.task:
                here = load.find_split(load_data(config), "train", "the split")
                here = here[: config.debug.overfit or None]
                fitted = encoding.fit_shape(here, parts.tokenizer)
                agreement.check_same_data(parts.tokenizer, here, fitted)
            changed = build.build(config, parts.tokenizer)
            validate.validate_shape(config, changed, fitted, here)
            plan.append(make(changed, mesh, here, fitted, steps))
    return plan
