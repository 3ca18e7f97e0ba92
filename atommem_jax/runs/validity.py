"""The validity table of a task: what scripted policies reach at each scale, and what it shows."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import tqdm

from atommem_jax.agent import build, load, validate
from atommem_jax.agent import play as play_lib
from atommem_jax.config import Experiment, TeacherConfig
from atommem_jax.learning import evaluation
from atommem_jax.parallel import host_batches, rules
from atommem_jax.tasks import batches as batches_lib
from atommem_jax.tasks import datasets, encoding, keeper, teacher, workflows

FLOOR = 1.0  # of the script that makes no mistake, at every scale
CEILING = 0.75  # of the best script without one operation, at every scale
WORKFLOW_CEILING = 0.60  # of a fixed workflow, at the first scale
CHANCE = 0.10  # a row below it has nothing that it could lose with scale


class Script(NamedTuple):
    """A scripted policy within a workflow."""

    rates: TeacherConfig = TeacherConfig()
    habits: keeper.Habits | None = None
    workflow: str = "learned"


@dataclasses.dataclass(frozen=True)
class Row:
    """Scripts of which the best counts, and what they stand for.

    role: 'clean' makes no mistake; 'teacher' is imitated, with its mistakes; 'ablated' lacks an
      operation; 'workflow' decides by rule.
    """

    role: str
    scripts: tuple[Script, ...]


Table = dict[str, dict[str, dict[str, Any]]]
"""row -> split -> summary with em, ci_low, ci_high, episodes, and the `script` that was best."""


def list_rows(config: Experiment) -> dict[str, Row]:
    """The rows for the task of a config, by name."""
    if config.task.name != "village":
        roles = {"clean": "clean", "noisy_teacher": "teacher"} | dict.fromkeys(
            ("create_for_update", "create_only", "scratchpad_only"), "ablated"
        )
        return {
            name: Row(roles.get(name, "workflow"), (Script(rates),))
            for name, rates in teacher.SCRIPTED.items()
        }
    ablated = {
        name: Row("ablated", tuple(Script(habits=habits) for habits in scripts))
        for name, scripts in keeper.ABLATED.items()
    }
    fixed = {
        name: Row("workflow", (Script(workflow=name),))
        for name, workflow in workflows.WORKFLOWS.items()
        if workflow.program is not None
    }
    return {
        "clean": Row("clean", (Script(),)),
        "teacher": Row("teacher", (Script(config.teacher),)),
        **ablated,
        "scratchpad_only": Row("ablated", (Script(workflow="scratchpad_only"),)),
        **fixed,
    }


def measure(
    config: Experiment,
    dataset: datasets.Dataset,
    rows: Mapping[str, Row],
    *,
    episodes: int = 0,
) -> Table:
    """Plays every script on every test split.

    Args:
      config: memory, budgets and task of the experiment.
      dataset: its data.
      rows: what is played, see `list_rows`.
      episodes: how many of each split; 0 for all.

    Texts are in tokens of the model that `init_from` names, where that is a published one.

    Raises ConfigError for budgets that the data does not fit, and an `init_from` that is none.
    """
    mesh = build.make_mesh(config)
    validate.validate_devices(config, mesh.shape[rules.DATA], mesh.shape[rules.FSDP])
    tokenizer = load.choose_tokenizer(config, dataset)
    stage = _Stage(config, tokenizer, mesh)
    splits = [name for name in dataset.splits if name.startswith("test")]
    table: Table = {name: {} for name in rows}
    samples = {name: dataset.split(name) for name in splits}
    if episodes:
        samples = {name: split[:episodes] for name, split in samples.items()}
    # One shape for all splits: the script of a row is compiled once. A shorter document ends
    # earlier, whatever room there is.
    shape = functools.reduce(
        encoding.EpisodeShape.join,
        [encoding.fit_shape(examples, tokenizer) for examples in samples.values()],
    )
    count = sum(len(row.scripts) for row in rows.values())
    with tqdm.tqdm(total=count * len(splits), mininterval=1.0) as bar:
        for split, examples in samples.items():
            validate.validate_shape(config, stage.parts("learned"), shape, examples)
            batches = list(
                batches_lib.iterate_split(
                    examples, tokenizer, shape, batch_size=config.eval.batch_size
                )
            )
            for name, row in rows.items():
                bar.set_description(f"{split} {name}")
                table[name][split] = stage.find_best(row, shape, batches, bar.update)
    return table


class _Stage:
    """Plays scripts; programs are compiled once for all scripts that can share one."""

    def __init__(self, config: Experiment, tokenizer: Any, mesh: Any):
        self._config, self._tokenizer, self._mesh = config, tokenizer, mesh
        self._seed = host_batches.replicate(jax.random.key(config.seed), mesh)
        self._parts: dict[str, build.Parts] = {}
        self._programs: dict[tuple[str, bool], Any] = {}

    def parts(self, workflow: str) -> build.Parts:
        if workflow not in self._parts:
            config = self._config.replace({"workflow": workflow})
            self._parts[workflow] = build.build(config, self._tokenizer)
        return self._parts[workflow]

    def find_best(
        self,
        row: Row,
        shape: encoding.EpisodeShape,
        batches: Sequence[tuple[batches_lib.EpisodeBatch, int]],
        note_played: Callable[[], Any],
    ) -> dict[str, Any]:
        """The summary of the script of highest EM, ties to the first."""
        scores = []
        for script in row.scripts:
            play = self._bind(script, shape)
            scores.append(self._score(play, batches) if len(row.scripts) > 1 else 0.0)
            note_played()
        script = row.scripts[scores.index(max(scores))]
        best = self._bind(script, shape)
        records, _ = evaluation.evaluate(
            lambda episodes, ids: best(episodes, ids, self._seed),
            batches,
            self._tokenizer.decode,
            mesh=self._mesh,
        )
        habits = None if script.habits is None else script.habits._asdict()
        return {**evaluation.summarise(records), "script": habits}

    def _bind(self, script: Script, shape: encoding.EpisodeShape):
        parts = self.parts(script.workflow)
        scratchpad_only = parts.workflow.restrict(script.rates).scratchpad_only
        key = script.workflow, scratchpad_only
        if key not in self._programs:
            self._programs[key] = play_lib.make_scripted_program(
                parts, self._mesh, scratchpad_only=scratchpad_only
            )
        play = self._programs[key]
        return play_lib.bind_script(play, parts, shape, script.rates, self._mesh, script.habits)

    def _score(self, play, batches) -> float:
        """EM, without intervals."""
        questions = sum(len(one) for batch, real in batches for one in batch.aliases[:real])
        return sum(self._scores(play, batches)) / questions

    def _scores(self, play, batches) -> Iterator[float]:
        first = 0
        for batch, real in batches:
            rows = host_batches.process_rows(
                self._mesh, host_batches.whole_size(self._mesh, len(batch.aliases))
            )
            ids = (first + rows).astype("int32")
            shared = host_batches.shard((batch.episodes, ids), self._mesh)
            played = play(*shared, self._seed)
            answers, lengths = host_batches.fetch((played.answers, played.answer_lengths))
            texts = evaluation.decode_answers(answers, lengths, self._tokenizer.decode)
            scores = evaluation.score_answers(texts, batch.aliases)
            yield float(scores[:real].sum())
            first += real


def judge(role: str, scores: Sequence[float]) -> tuple[bool, str]:
    """Whether a row is as the property asks, and what it shows; EM by scale, the smallest first."""
    if role == "clean":
        if min(scores) < FLOOR:
            return False, f"below {FLOOR:g}: not solvable as configured"
        return True, "solves the task"
    if role == "teacher":
        return True, "what is imitated"
    if role == "ablated":
        if max(scores) > CEILING:
            return False, f"above {CEILING:g}: the task does not need it"
        return True, "falls short"
    if scores[0] > WORKFLOW_CEILING:
        return False, f"above {WORKFLOW_CEILING:g} at the first scale: the task does not press"
    if len(scores) > 1 and scores[-1] >= scores[0] > CHANCE:
        return False, "falls short, but not with scale"
    return True, "falls short"


def judge_table(table: Table, rows: Mapping[str, Row]) -> dict[str, tuple[bool, str]]:
    """`judge` of each row."""
    return {
        name: judge(rows[name].role, [cell["em"] for cell in row.values()])
        for name, row in table.items()
    }


def render(table: Table, rows: Mapping[str, Row]) -> str:
    """The table of EM, aligned, with the episodes that each cell stands for, and the verdict."""
    verdicts = judge_table(table, rows)
    splits = list(next(iter(table.values())))
    width = max(map(len, [*table, "policy"]))
    lines = [f"{'policy':{width}}" + "".join(f"{split:>10}" for split in splits)]
    for name, row in table.items():
        cells = "".join(f"{row[split]['em']:10.3f}" for split in splits)
        scripts = len(rows[name].scripts)
        of = f" (best of {scripts})" if scripts > 1 else ""
        lines.append(f"{name:{width}}{cells}  {verdicts[name][1]}{of}")
    counts = sorted({int(row[split]["episodes"]) for row in table.values() for split in splits})
    lines.append(f"exact match; episodes a cell: {', '.join(map(str, counts))}")
    failed = [name for name, (passed, _) in verdicts.items() if not passed]
    lines.append(
        f"the task does not tell a learned memory from a script: {', '.join(failed)}"
        if failed
        else "the task holds what it promises"
    )
    return "\n".join(lines)
