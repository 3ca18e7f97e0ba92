"""The stages of a run, each cut into the phases of its curriculum (`agent.phases`).

A phase is a stage with a config, data and programs of its own; parameters, optimiser and its
schedule go on. The config itself is what is validated, evaluated and kept.
"""

from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from atommem_jax.agent import build, load, phases, validate
from atommem_jax.config import Experiment
from atommem_jax.runs import agreement, stages
from atommem_jax.tasks import datasets, encoding

Kind = type[stages.Sft] | type[stages.Rl]


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

    Raises ConfigError, naming the phase, where one cannot be built or does not fit its data.
    """
    plan: list[stages.Sft | stages.Rl] = []
    kinds: tuple[Kind, ...] = (stages.Sft, stages.Rl)
    for kind in kinds:
        for steps, config in phases.find(parts.config, kind.name):
            if config == parts.config:
                plan.append(kind(parts, mesh, examples, shape, steps))
                continue
            with phases.naming(kind.name, steps[0]):
                plan.append(_make_phase(kind, steps, config, parts, mesh, examples, load_data))
    return plan


def _make_phase(
    kind: Kind,
    steps: phases.Steps,
    config: Experiment,
    parts: build.Parts,
    mesh,
    examples,
    load_data,
) -> stages.Sft | stages.Rl:
    if config.task != parts.config.task:
        examples = load.find_split(load_data(config), "train", "the split")
        if config.debug.overfit:
            examples = examples[: config.debug.overfit]
    shape = encoding.fit_shape(examples, parts.tokenizer)
    agreement.check_same_data(parts.tokenizer, examples, shape)
    changed = build.build(config, parts.tokenizer)
    validate.validate_shape(config, changed, shape, examples)
    return kind(changed, mesh, examples, shape, steps)
