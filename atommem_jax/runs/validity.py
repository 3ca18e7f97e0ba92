"""The validity table of a task: what scripted policies reach at each scale, and what it shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tqdm

from atommem_jax.agent import build, validate
from atommem_jax.agent import play as play_lib
from atommem_jax.config import Experiment
from atommem_jax.learning import evaluation
from atommem_jax.parallel import host_batches, rules
from atommem_jax.tasks import batches as batches_lib
from atommem_jax.tasks import datasets, encoding, teacher

FLOOR = 0.95  # of the policy that makes no mistake, at every scale
CEILING = 0.75  # of a fixed workflow, at the first scale

# Not judged as fixed workflows: the one makes no mistake, the other only random ones.
_CLEAN, _NOISY = "clean", "noisy_teacher"

Table = dict[str, dict[str, dict[str, float]]]


def measure(
    config: Experiment,
    dataset: datasets.Dataset,
    policies: Mapping[str, teacher.TeacherConfig],
    *,
    episodes: int = 0,
) -> Table:
    """Plays every policy on every test split.

    Args:
      config: memory, budgets and task of the experiment.
      dataset: its data.
      policies: scripted policies by name.
      episodes: how many of each split; 0 for all.

    Returns:
      {policy: {split: summary with em, ci_low, ci_high, episodes, ...}}.

    Raises ConfigError for budgets that the data does not fit.
    """
    mesh = build.make_mesh(config)
    validate.validate_devices(config, mesh.shape[rules.DATA], mesh.shape[rules.FSDP])
    parts = build.build(config, build.fit_tokenizer(config, dataset))
    seed = host_batches.replicate(jax.random.key(config.seed), mesh)
    splits = [name for name in dataset.splits if name.startswith("test")]
    table: Table = {name: {} for name in policies}
    with tqdm.tqdm(total=len(policies) * len(splits), mininterval=1.0) as bar:
        for split in splits:
            examples = dataset.split(split)
            examples = examples[:episodes] if episodes else examples
            shape = encoding.fit_shape(examples, parts.tokenizer)
            validate.validate_shape(config, parts, shape, examples)
            for name, rates in policies.items():
                bar.set_description(f"{split} {name}")
                table[name][split] = _play(parts, mesh, examples, shape, rates, seed)
                bar.update()
    return table


def _play(parts: build.Parts, mesh, examples, shape, rates, seed) -> dict[str, Any]:
    play = play_lib.make_scripted_player(parts, shape, rates, mesh)
    batches = batches_lib.iterate_split(
        examples, parts.tokenizer, shape, batch_size=parts.config.eval.batch_size
    )
    records, _ = evaluation.evaluate(
        lambda episodes, ids: play(episodes, ids, seed),
        batches,
        parts.tokenizer.decode,
        mesh=mesh,
    )
    return evaluation.summarise(records)


def judge(name: str, scores: Sequence[float]) -> str:
    """Says what a row shows, given its EM by scale, the smallest first."""
    if name == _CLEAN:
        short = min(scores) < FLOOR
        return f"below {FLOOR:g}: not solvable as configured" if short else "solves the task"
    if name == _NOISY:
        return "where RL starts"
    if scores[0] > CEILING:
        return f"above {CEILING:g} at the first scale: the task does not press"
    if len(scores) > 1 and scores[-1] >= scores[0]:
        return "falls short, but not with scale"
    return "falls short"


def render(table: Table) -> str:
    """The table of EM, aligned, with the episodes that each cell stands for."""
    splits = list(next(iter(table.values())))
    width = max(map(len, [*table, "policy"]))
    lines = [f"{'policy':{width}}" + "".join(f"{split:>10}" for split in splits)]
    for name, row in table.items():
        scores = [row[split]["em"] for split in splits]
        cells = "".join(f"{score:10.3f}" for score in scores)
        lines.append(f"{name:{width}}{cells}  {judge(name, scores)}")
    counts = sorted({int(row[split]["episodes"]) for row in table.values() for split in splits})
    lines.append(f"exact match; episodes a cell: {', '.join(map(str, counts))}")
    return "\n".join(lines)
