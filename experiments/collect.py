"""Collects trajectories of a teacher behind a chat endpoint, as data for SFT.

    python experiments/collect.py --config=experiments/configs/synthetic.py \\
        --base_url=http://localhost:8000/v1 --model=teacher --episodes=100 --out=runs/teacher
    python experiments/train.py --config=experiments/configs/synthetic.py \\
        --config.sft.data=runs/teacher --workdir=runs/mine

Any server that speaks OpenAI's protocol serves. The teacher sees as text what the agent would see
as tokens, and what it replies is parsed and applied as a reply of the agent is. Thoughts before the
reply are kept beside it and not learned, unless the protocol has free text. Nor is a reply learned
that is not whole: the summary counts them by what ended them. An episode whose prompt the server
refuses is counted and left, and tried again by the next call. Killed at any
moment, the same command goes on; with more --episodes or --samples_per_episode it adds to what
there is. The key of the API is read from an environment variable and written nowhere.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from atommem_jax.agent import build, load, validate
from atommem_jax.collection import store
from atommem_jax.collection.endpoint import UNFINISHED_THOUGHTS, Endpoint, Patience, parse_prices
from atommem_jax.collection.player import LONGER_THAN_A_RESPONSE, Player, Tally, collect
from atommem_jax.config import check, flatten, parse, paths
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.tasks import datasets, schema
from experiments import flags

CONFIG = flags.define_config("experiments/configs/synthetic.py")
BASE_URL = absl_flags.DEFINE_string(
    "base_url",
    None,
    "Address of the server up to /chat/completions: http://localhost:8000/v1. A query, such as "
    "?api-version=2024-10-21, goes with every request.",
)
MODEL = absl_flags.DEFINE_string("model", None, "Name of the teacher on that server.")
API_KEY_ENV = absl_flags.DEFINE_string(
    "api_key_env",
    "OPENAI_API_KEY",
    "Environment variable that holds the key; none is sent where it is not set.",
)
OUT = flags.define_path("out", None, "Folder that the trajectories are written to.", local=True)
SPLIT = absl_flags.DEFINE_string(
    "split", "train", "Split of the task's data whose episodes are played."
)
EPISODES = absl_flags.DEFINE_integer(
    "episodes", 100, "How many episodes to play, the first of the split; 0 for all.", lower_bound=0
)
SAMPLES = absl_flags.DEFINE_integer(
    "samples_per_episode", 1, "Trajectories to collect of each episode.", lower_bound=1
)
CONCURRENCY = absl_flags.DEFINE_integer(
    "concurrency", 8, "Episodes played at once; each has one request under way.", lower_bound=1
)
TEMPERATURE = absl_flags.DEFINE_float(
    "temperature", 0.7, "Temperature of sampling; below 0 it is left to the server."
)
MAX_TOKENS = absl_flags.DEFINE_integer(
    "max_tokens", 1024, "Most tokens of a reply; 0 leaves it to the server.", lower_bound=0
)
EXTRA_BODY = absl_flags.DEFINE_string(
    "extra_body", "{}", "Further fields of every request, in JSON: '{\"top_p\": 0.9}'."
)
MIN_REWARD = absl_flags.DEFINE_float(
    "min_reward",
    0.5,
    "The summary counts a trajectory as kept from this reward on; training has sft.min_reward.",
    lower_bound=0.0,
    upper_bound=1.0,
)
PRICE = absl_flags.DEFINE_list(
    "price_per_million",
    [],
    "IN,OUT: price of a million prompt tokens and of a million completion tokens.",
)
TIMEOUT = absl_flags.DEFINE_float(
    "timeout",
    Patience.timeout,
    "Seconds in which the whole answer to a request must have come.",
    lower_bound=1e-3,
)
RETRIES = absl_flags.DEFINE_integer(
    "retries",
    Patience.retries,
    "Times a request is repeated that failed for a passing reason.",
    lower_bound=0,
)
BACKOFF = absl_flags.DEFINE_float(
    "backoff", Patience.backoff, "Seconds before the first retry; doubled each time.", lower_bound=0
)
LONGEST_WAIT = absl_flags.DEFINE_float(
    "longest_wait", Patience.longest_wait, "Most seconds between two attempts.", lower_bound=0
)
MAX_FAILURES = absl_flags.DEFINE_integer(
    "max_failures",
    10,
    "Failed episodes in a row after which to stop, those included that the server refused for the "
    "first time.",
    lower_bound=1,
)

_ADVICE_ON_ENDS = {
    "length": "raise --max_tokens",
    UNFINISHED_THOUGHTS: "raise --max_tokens, or start the server without a reasoning parser",
    LONGER_THAN_A_RESPONSE: "raise --config.rollout.response_length",
    "content_filter": "the server withheld the rest",
    "tool_calls": "leave tools out of --extra_body",
    "no finish_reason": "the server does not say whether the reply is whole",
}


def main(argv) -> None:
    """See the module docstring."""
    # ------------------------------------------------------------------ flags
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: flags start with --; see --help")
    base_url, model, out = (
        flags.require(flag, "pass it; see --help") for flag in (BASE_URL, MODEL, OUT)
    )
    paths.try_folder(out, f"--out={out}")
    prices = parse_prices(PRICE.value, PRICE.name)
    options = _read_options()
    endpoint = Endpoint(
        base_url,
        model,
        api_key=_read_key(API_KEY_ENV),
        options=options,
        patience=Patience(TIMEOUT.value, RETRIES.value, BACKOFF.value, LONGEST_WAIT.value),
    )
    # ------------------------------------------------------------------ config, data
    config = parse(CONFIG.value)
    validate.validate(config)
    check(config.shape is None, "this config names no data (config.shape); pass one with a task")
    mesh_lib.prepare_devices(1)
    dataset = build.load_dataset(config, flags.DATA_ROOT.value)
    examples = _choose(dataset, SPLIT.value, EPISODES.value)
    parts = build.build(config, load.choose_tokenizer(config, dataset))
    check(
        parts.workflow.program is None,
        f"workflow={config.workflow!r}: a program writes its reading turns, so that no teacher is "
        "needed; collect with workflow='learned' or one of its ablations",
    )
    check(
        not parts.workflow.is_untrained,
        f"workflow={config.workflow!r} is there to be compared with, not to be taught; collect "
        "with workflow='learned' or one of its ablations",
    )
    player = Player(parts, examples, endpoint)
    # ------------------------------------------------------------------ loop
    source = {
        "split": SPLIT.value,
        "model": model,
        **options,
        **flatten(config.task.to_dict(), "task."),
    }
    with store.Writer(pathlib.Path(out), store.describe_setting(parts), source) as writer:
        tally = Tally(MIN_REWARD.value, prices)
        for name in (store.EPISODES, store.FAILURES):
            for record in writer.read(name):
                tally.add(record)
        try:
            collect(
                player,
                writer,
                tally,
                samples=SAMPLES.value,
                concurrency=CONCURRENCY.value,
                max_failures=MAX_FAILURES.value,
            )
        except KeyboardInterrupt:
            # Nothing is lost, and waiting for replies to come is of no use.
            _finish(writer, tally)
            os._exit(130)
        except BaseException:
            _finish(writer, tally)
            raise
        _finish(writer, tally)


def _finish(writer: store.Writer, tally: Tally) -> None:
    """Writes and prints the summary."""
    summary = tally.summarise()
    store.write_json(writer.folder / store.SUMMARY, summary)
    actions = ", ".join(
        f"{kind} {counts['applied']} ({counts['invalid']})"
        for kind, counts in summary["actions"].items()
    )
    cost = "" if summary["cost"] is None else f", cost {summary['cost']:.2f}"
    print(
        f"{summary['trajectories']} trajectories, {summary['kept']} kept (reward of "
        f"{summary['min_reward']:g} or more), {summary['failures']} failed"
        f"{_describe_refusals(summary['refused'], writer.folder)}\n"
        f"EM {summary['em']:.3f}, F1 {summary['f1']:.3f} over {summary['questions']} questions\n"
        f"{summary['turns']} turns: {summary['turns_cut']} cut, "
        f"{summary['turns_outside_grammar']} outside of the grammar, "
        f"{summary['turns_empty']} without a word\n"
        f"{_describe_ends(summary)}"
        f"actions applied (invalid): {actions}\n"
        f"{summary['requests']} requests, {summary['prompt_tokens']:,} prompt tokens, "
        f"{summary['completion_tokens']:,} completion tokens{cost}\n"
        f"written to {writer.folder}",
        flush=True,
    )


def _describe_refusals(count: int, folder: pathlib.Path) -> str:
    return f" ({count} refused by the server: {folder / store.FAILURES} says why)" if count else ""


def _describe_ends(summary: Mapping[str, Any]) -> str:
    """Lines about turns that are not learned because the teacher's reply was not whole."""
    lines = [
        f"not learned: {count} turns whose reply was not whole ({name})"
        + (f": {_ADVICE_ON_ENDS[name]}" if name in _ADVICE_ON_ENDS else "")
        for name, count in summary["turns_cut_by"].items()
    ]
    if summary["turns"] and summary["turns_empty"] == summary["turns"]:
        lines.append(
            "every reply was empty: ask the server for one by hand, and see whether "
            "choices[0].message.content holds it"
        )
    return "".join(f"{line}\n" for line in lines)


def _choose(dataset: datasets.Dataset, split: str, count: int) -> Sequence[schema.Example]:
    check(
        split in dataset.splits,
        f"--split={split}: allowed are {', '.join(dataset.splits)}; pass one of them",
    )
    examples = dataset.split(split)
    check(
        count <= len(examples),
        f"--episodes={count}: the split {split} has {len(examples)}; pass at most that many, or 0 "
        "for all",
    )
    return examples[:count] if count else examples


def _read_key(flag: absl_flags.FlagHolder) -> str | None:
    key = os.environ.get(flag.value)
    check(
        bool(key) or not absl_flags.FLAGS[flag.name].present,
        f"--api_key_env={flag.value}: this environment variable is not set; export the key in it, "
        "or leave the flag out for a server that asks for none",
    )
    return key


def _read_options() -> dict[str, Any]:
    """The fields of a request besides model and messages."""
    options: dict[str, Any] = {}
    if TEMPERATURE.value >= 0:
        options["temperature"] = TEMPERATURE.value
    if MAX_TOKENS.value:
        options["max_tokens"] = MAX_TOKENS.value
    try:
        extra = json.loads(EXTRA_BODY.value)
    except ValueError:
        extra = None
    check(
        isinstance(extra, dict) and not extra.keys() & {"model", "messages", "stream", "n"},
        f"--extra_body={EXTRA_BODY.value}: allowed is a JSON object without model, messages, "
        "stream and n; quote it for the shell",
    )
    return options | extra


if __name__ == "__main__":
    flags.run(main)
