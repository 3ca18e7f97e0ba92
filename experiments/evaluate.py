"""Plays the episodes of a split with a checkpoint: exact match and F1, with 95% intervals.

    python experiments/evaluate.py --checkpoint=runs/demo --split=test_1x --split=test_4x
    python experiments/evaluate.py --checkpoint=runs/demo/checkpoints/950 --temperature=1
    python experiments/evaluate.py --checkpoint=runs/demo --set=rollout.constrained=false
    python experiments/evaluate.py --checkpoint=runs/hotpotqa --task.test_file=dev.json \\
        --task.corpus_file=passages.json --task.test_documents=200,400,800
    python experiments/evaluate.py --checkpoint=runs/demo --crossed=900 --split=test_1x
    python experiments/evaluate.py --checkpoint=runs/demo --against=runs/other
    python experiments/evaluate.py --checkpoint=runs/smollm2 --split=test_200 --workflow=learned \\
        --workflow=rag_documents --workflow=full_context --against=rag_documents
    python experiments/evaluate.py --checkpoint=runs/demo --skip_existing \\
        --judge=http://localhost:8000/v1 --judge_model=NAME

`--checkpoint` is a workdir of train.py, its checkpoints folder, or one numbered step in it. Writes
per-question records (JSON lines) and a summary (JSON) for each split and temperature, and prints
two tables for each temperature: the scores, and at which stage wrong answers broke (`life_cycle`).
`--workflow` plays the same parameters in other workflows, each of which `tasks/workflows.py` tells,
and prints a table of them: scores, and what an episode costs.
`--against` adds the difference from other records of the same episodes, and `--judge` what a model
behind an endpoint says of the answers (the extra `collect`), which goes into the folder judge
beside the records.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from atommem_jax import folder_lock
from atommem_jax.agent import build, crossed, results
from atommem_jax.agent.load import Loaded, find_split, load
from atommem_jax.agent.score import UnwrittenError, evaluate_split, read_summary
from atommem_jax.collection import judge as judge_lib
from atommem_jax.collection.endpoint import (
    Endpoint,
    EndpointError,
    OutOfRetriesError,
    parse_prices,
)
from atommem_jax.config import ConfigError, check, paths
from atommem_jax.learning import comparison, life_cycle
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import rules
from atommem_jax.tasks import datasets, workflows
from experiments import flags

CHECKPOINT = flags.define_path(
    "checkpoint", None, "A workdir of train.py, its checkpoints folder, or one step in it."
)
STEP = absl_flags.DEFINE_string(
    "step", "last", "Which step of a workdir: 'last', 'best' (validation EM), or a number."
)
SPLITS = absl_flags.DEFINE_multi_string(
    "split", None, "Split to evaluate; repeat the flag for several. Default: all test splits."
)
TEMPERATURES = absl_flags.DEFINE_multi_float(
    "temperature",
    [0.0],
    "Temperature of sampling; 0 is greedy; repeat the flag for several.",
    lower_bound=0.0,
)
EPISODES = absl_flags.DEFINE_integer("episodes", 0, "Episodes to play; 0 for the whole split.")
SEED = absl_flags.DEFINE_integer("seed", 0, "Seed of sampling; greedy decoding does not use it.")
CPU_DEVICES = absl_flags.DEFINE_integer(
    "cpu_devices", 2, "Devices into which a host without an accelerator is split.", lower_bound=1
)
FSDP = absl_flags.DEFINE_integer(
    "fsdp",
    1,
    "Devices that share the parameters of a copy, where one cannot hold them in float32: 8 for 8B "
    "parameters on a v6e-8.",
    lower_bound=1,
)
ROLLOUT_TENSOR = absl_flags.DEFINE_integer(
    "rollout_tensor",
    0,
    "With --fsdp: devices of a copy that share every matrix product, see mesh.rollout_tensor.",
    lower_bound=0,
)
OUT = flags.define_path("out", None, "Folder of the results. Default: <workdir>/eval.")
BASE = flags.define_path(
    "base",
    "",
    "The model that the adapters of a run were trained on, where its init_from is no longer right.",
)
SET = flags.define_settings(
    "sets a field of task, memory, rollout or eval to another value than the checkpoint's, such as "
    "task.test_documents=200,400 or eval.batch_size=4; repeat the flag for several. A checkpoint "
    "says how an agent was trained, not what it may be asked. It becomes part of the files' names."
)
WORKFLOWS = absl_flags.DEFINE_multi_string(
    "workflow",
    None,
    "Plays in this workflow of atommem_jax/tasks/workflows.py in place of the checkpoint's own: "
    f"{', '.join(workflows.WORKFLOWS)}. Repeat the flag for several, and for a table of them.",
)
SKIP_EXISTING = absl_flags.DEFINE_bool(
    "skip_existing",
    False,
    "Do not play again what was played with the same split, temperature, step, seed, settings and "
    "number of episodes: print its results.",
)


AGAINST = absl_flags.DEFINE_string(
    "against",
    None,
    "Prints the difference of EM from other records of the same split and temperature, with its "
    "95% interval: the workdir of another run, a file of records, what the name of records in "
    "--out has behind split and temperature, such as step900, or a workflow that was played there.",
)
JUDGE = absl_flags.DEFINE_string(
    "judge",
    None,
    "Address of a server of OpenAI's protocol, whose model says of each answer whether it is "
    "right. Its replies are kept, and not asked for again.",
)
JUDGE_MODEL = absl_flags.DEFINE_string("judge_model", None, "Name of the judge on that server.")
JUDGE_KEY_ENV = absl_flags.DEFINE_string(
    "judge_key_env",
    "OPENAI_API_KEY",
    "Environment variable that holds the judge's key; none is sent where it is not set.",
)
JUDGE_PRICE = absl_flags.DEFINE_list(
    "judge_price_per_million",
    [],
    "IN,OUT: price of a million prompt tokens and of a million completion tokens of the judge.",
)
JUDGE_CONTROLS = absl_flags.DEFINE_integer(
    "judge_controls",
    200,
    "Questions of which wrong, vague and right answers are made up, to measure how the judge errs; "
    "0 for none.",
    lower_bound=0,
)
JUDGE_CONCURRENCY = absl_flags.DEFINE_integer(
    "judge_concurrency", 8, "Requests to the judge under way at a time.", lower_bound=1
)

CROSSED = absl_flags.DEFINE_string(
    "crossed",
    None,
    "Another step of the run, such as the end of SFT: prints EM of each of the two, of the run's "
    "teacher and of one without mistakes reading while each answers, on the first split.",
)


def main(argv) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    checkpoint = flags.require(CHECKPOINT, "pass the workdir of a training run")
    loaded = load_agent(checkpoint)
    agents = [loaded.play_as(name) for name in dict.fromkeys(WORKFLOWS.value or ())] or [loaded]
    out = paths.locate(OUT.value or os.path.join(loaded.workdir, "eval"))
    prices = parse_prices(JUDGE_PRICE.value, JUDGE_PRICE.name)
    endpoint = make_endpoint(JUDGE.value) if JUDGE.value else None
    # Before the data is prepared, which may take long; what is only printed needs no folder.
    holds = contextlib.nullcontext() if CROSSED.value else folder_lock.hold(out, f"--out={out}")
    with holds:
        dataset = build.load_dataset(loaded.parts.config, flags.DATA_ROOT.value)
        splits = SPLITS.value or [name for name in dataset.splits if name.startswith("test")]
        for split in splits:
            find_split(dataset, split)  # all of them, before any is played
        others = find_others(AGAINST.value, splits, out, agents) if AGAINST.value else {}
        if CROSSED.value:
            print_crossed(loaded, CROSSED.value, dataset, splits[0])
            return
        for agent in agents:
            evaluate(agent, dataset, splits, out)
        for agent, temperature, split in itertools.product(agents, TEMPERATURES.value, splits):
            name = results.name_files(split, temperature, agent.step, agent.settings)
            own, other = out / f"{name}.jsonl", others.get((split, temperature))
            if other is not None and not (WORKFLOWS.value and other == own):
                print_difference(split, results.read(own), other)
            if endpoint is not None:
                records = results.read(own)
                judge(endpoint, name, records, out / "judge", prices)
        if WORKFLOWS.value:
            print_table(agents, splits, out, others)
    if endpoint is not None:
        endpoint.close()


def find_others(
    chosen: str, splits: Sequence[str], out: pathlib.Path, agents: Sequence[Loaded]
) -> dict[tuple[str, float], pathlib.Path]:
    """What each split and temperature is compared with; none may be missing.

    Of a workflow, what is to be played now or was played before with the same settings.
    """
    cells = itertools.product(splits, TEMPERATURES.value)
    if chosen not in workflows.WORKFLOWS:
        return {cell: results.find(chosen, out, *cell) for cell in cells}
    agent = agents[0]
    kept = [setting for setting in agent.settings if not setting.startswith("workflow=")]
    settings = [*kept, f"workflow={chosen}"]
    found = {}
    for split, temperature in cells:
        path = out / f"{results.name_files(split, temperature, agent.step, settings)}.jsonl"
        check(
            chosen in (WORKFLOWS.value or ()) or path.is_file(),
            f"--against={chosen}: {out} has no {path.name}; pass --workflow={chosen} too",
        )
        found[split, temperature] = path
    return found


def print_table(
    agents: Sequence[Loaded],
    splits: Sequence[str],
    out: pathlib.Path,
    others: Mapping[tuple[str, float], pathlib.Path],
) -> None:
    """Scores and costs of every workflow, also written to `out` as workflows.md."""
    parts = []
    for temperature, split in itertools.product(TEMPERATURES.value, splits):
        other = others.get((split, temperature))
        rows = []
        for agent in agents:
            name = results.name_files(split, temperature, agent.step, agent.settings)
            summary = read_summary(out / f"{name}.json") or {}
            records = results.read(out / f"{name}.jsonl")
            found = comparison.compare(records, results.read(other)) if other else {}
            rows.append(summary | found)
        title = f"{split}, temperature {temperature:g}, step {agents[0].step}"
        title += f", against {AGAINST.value}" if other else ""
        parts.append(f"{title}\n\n{comparison.render(rows)}\n")
    text = "\n".join(parts)
    print(text, flush=True)
    paths.write_text(out / "workflows.md", text)


def print_difference(split: str, records: Sequence[Any], other: pathlib.Path) -> None:
    """EM and F1 less those of other records, by a paired bootstrap over episodes."""
    for score in ("em", "f1"):
        try:
            found = comparison.compare(records, results.read(other), score=score)
        except ValueError as error:
            raise ConfigError(f"--against={AGAINST.value}: {other}: {error}") from error
        print(
            f"{split:12} {score.upper()} {found['difference']:+.3f} against {other}: "
            f"{found['ours']:.3f} less {found['theirs']:.3f}, 95% interval {found['low']:+.3f} .. "
            f"{found['high']:+.3f}, {found['episodes']} episodes, {found['questions']} questions",
            flush=True,
        )


def make_endpoint(address: str) -> Endpoint:
    """The judge's endpoint; greedy, with room for the thoughts of a model that thinks."""
    return Endpoint(
        address,
        flags.require(JUDGE_MODEL, "pass the name of the judge's model"),
        api_key=os.environ.get(JUDGE_KEY_ENV.value),
        options={"temperature": 0.0},
    )


def judge(
    endpoint: Endpoint,
    name: str,
    records: Sequence[Any],
    folder: pathlib.Path,
    prices: tuple[float, float] | None,
) -> None:
    """Prints what a judge says of the records of an evaluation, and writes it to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = flags.require(JUDGE_MODEL, "pass the name of the judge's model")
    asked = judge_lib.Judge(endpoint, model, folder, concurrency=JUDGE_CONCURRENCY.value)
    try:
        summary, verdicts = judge_lib.judge_records(
            asked, records, controls=JUDGE_CONTROLS.value, prices=prices
        )
    except (EndpointError, OutOfRetriesError) as error:
        raise ConfigError(f"--judge={JUDGE.value}: {error}") from error
    lines = (
        json.dumps(
            {"episode": record["episode"], "question": record["question"]}
            | {"correct": verdict.correct, "clear": verdict.clear}
        )
        for record, verdict in zip(records, verdicts, strict=True)
    )
    paths.write_text(folder / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
    told = {"judge": model} | summary
    paths.write_text(folder / f"{name}.json", json.dumps(told, indent=2) + "\n")
    print(f"{name}: {judge_lib.render(summary)}", flush=True)


def load_agent(checkpoint: str) -> Loaded:
    """The agent, each copy of its parameters on as many devices as the flags say."""
    mesh = layout = None
    if FSDP.value > 1:
        mesh_lib.prepare_devices(CPU_DEVICES.value)
        try:
            mesh, layout = mesh_lib.make_mesh(0, FSDP.value), rules.TRAINING
            mesh_lib.reshape_for_rollouts(mesh, ROLLOUT_TENSOR.value)
        except ValueError as error:
            message = re.sub(r"mesh\.(fsdp|rollout_tensor)", r"--\1", str(error))
            raise ConfigError(message) from error
    loaded = load(
        checkpoint,
        STEP.value,
        CPU_DEVICES.value,
        mesh=mesh,
        rules=layout,
        base=BASE.value,
        settings=SET.value,
    )
    loaded.rollout_tensor = ROLLOUT_TENSOR.value
    size = loaded.parts.config.eval.batch_size
    check(
        mesh is None or size % mesh.size == 0,
        f"eval.batch_size={size} does not divide over {loaded.mesh.size} devices; pass "
        "--eval.batch_size, or another --fsdp",
    )
    return loaded


def print_crossed(loaded: Loaded, step: str, dataset: datasets.Dataset, split: str) -> None:
    """EM by who reads and who answers, at every temperature; `step` is that of another policy."""
    other = load(loaded.workdir, step, CPU_DEVICES.value, base=BASE.value)
    minds = {
        f"step {other.step}": other.params,
        f"step {loaded.step}": loaded.params,
        "teacher": loaded.parts.config.teacher,
        "clean": crossed.CLEAN,
    }
    examples = find_split(dataset, split)
    examples = examples[: EPISODES.value or None]
    for temperature in TEMPERATURES.value:
        table = crossed.measure(
            loaded.parts,
            loaded.mesh,
            minds,
            examples,
            loaded.shape(dataset, split),
            temperature=temperature,
            seed=SEED.value,
        )
        print(f"EM on {len(examples)} episodes of {split}, temperature {temperature:g}")
        print(crossed.render(table), flush=True)


def evaluate(
    loaded: Loaded, dataset: datasets.Dataset, splits: Sequence[str], out: pathlib.Path
) -> None:
    """Plays every split at every temperature, and prints a table for each."""
    unwritten = None
    for temperature in TEMPERATURES.value:
        played = loaded.parts.config.workflow
        print(f"step {loaded.step} of {loaded.workdir}, {played}, temperature {temperature:g}")
        print(_HEADER)
        summaries = {}
        for split in splits:
            try:
                summary = evaluate_split(
                    loaded,
                    dataset,
                    split,
                    temperature=temperature,
                    episodes=EPISODES.value,
                    seed=SEED.value,
                    out=out,
                    skip_existing=SKIP_EXISTING.value,
                )
            except UnwrittenError as error:  # what it cost minutes to find out is shown first
                summary, unwritten = error.summary, error
            print(_render(split, summary), flush=True)
            summaries[split] = summary
        print(render_stages(summaries), flush=True)
    if unwritten is not None:
        raise unwritten
    print(f"records and summaries: {out}")


def render_stages(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Where the wrong answers of each split broke; of summaries that say so."""
    told = {split: summary for split, summary in summaries.items() if "stages" in summary}
    counts = {split: summary["stages"] for split, summary in told.items()}
    questions = {split: summary["questions"] for split, summary in told.items()}
    right = all(summary["em"] == 1.0 for summary in told.values())
    return (
        life_cycle.render(counts, questions, right) if told else "older results: no stages recorded"
    )


_HEADER = f"{'split':12} {'EM':>6} {'95% interval':>16} {'F1':>6} {'episodes':>9} {'questions':>10}"


def _render(split: str, summary: dict[str, Any]) -> str:
    return (
        f"{split:12} {summary['em']:6.3f}   {summary['ci_low']:.3f} .. {summary['ci_high']:.3f}"
        f" {summary['f1']:6.3f} {summary['episodes']:9d} {summary['questions']:10d}"
    ) + (f"   reward {summary['reward']:.3f}" if "reward" in summary else "")


if __name__ == "__main__":
    flags.run(main)
