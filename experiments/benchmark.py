"""Measures speed against what one would use instead; ratios above 1 mean that ours is faster.

    python experiments/benchmark.py --suite=memory,rollout,train,task --json=runs/benchmark.json
    python experiments/benchmark.py --checkpoint=runs/demo --suite=rollout,train
    python experiments/benchmark.py --suite=growth --plot=runs/growth.png
    python experiments/benchmark.py --suite=decode --pretrained=SmolLM2-135M-Instruct.Q4_1.gguf

| suite | ours | peers |
|---|---|---|
| memory | retrieval and operations of a turn, jitted | FAISS a trajectory, NumPy |
| rollout | the jitted episode | the same agent driven from the host; PyTorch with FAISS |
| train | one PPO update | PyTorch, eager and compiled |
| task | the validity table | |
| decode | prefill and decoding of a published model | transformers, llama.cpp |
| convert | memory of the host beside a published model that is loaded | |
| embedding | a turn of the memory, by what makes its keys | |
| growth | a turn against slots, trajectories, entry length; an episode against turns | |

Peers do the same work, and tests hold that they get the same results. Contestants take turns in
every round; figures are medians, with the extremes of the rounds beside them. Both sides may use
all cores; where threads hurt a peer it gets the setting that was fastest in a trial. Nothing is
loaded from the compilation cache, so that the compile times are real. Without --checkpoint the
parameters are fresh: turns are valid, thanks to the grammar, but random. The libraries of the
peers are the extra `bench`: pip install -e '.[bench]'.
"""

from collections.abc import Sequence

import jax
from absl import flags as absl_flags

from atommem_jax.agent import validate
from atommem_jax.config import check, parse, paths
from experiments import flags
from experiments.benchmarks import decode_suite, memory_suite, suites

CONFIG = flags.define_config("experiments/configs/synthetic.py")
EPISODES = absl_flags.DEFINE_integer(
    "episodes", 0, "Episodes of each split in suite task; 0 for all."
)
JSON = flags.define_path("json", None, "File for the results; none is written without.", local=True)
SUITE = absl_flags.DEFINE_list(
    "suite", list(suites.DEFAULT_SUITES), f"Suites to run, of {', '.join(suites.SUITES)}."
)
CHECKPOINT = flags.define_path(
    "checkpoint",
    None,
    "A workdir of train.py, whose agent and config take the place of a new agent.",
)
STEP = absl_flags.DEFINE_string(
    "step", "last", "Which step of --checkpoint: 'last', 'best' or a number."
)
RUNS = absl_flags.DEFINE_integer("runs", 5, "Rounds that are timed.", lower_bound=1)
PLOT = flags.define_path(
    "plot", None, "File (PNG, PDF) for the curves of suite growth or convert.", local=True
)
SAMPLED = absl_flags.DEFINE_bool(
    "sampled",
    False,
    "Sample rollouts at rl.temperature. Without it they are greedy, and the same for all peers.",
)
TRAJECTORIES = absl_flags.DEFINE_integer(
    "trajectories",
    0,
    "Trajectories at once; 0 for 256 in suite memory and a training batch in the others.",
    lower_bound=0,
)
_LOAD = memory_suite.Load()
TORCH_COMPILE = absl_flags.DEFINE_bool(
    "torch_compile", True, "Also measure torch.compile; compiling takes minutes on two cores."
)
PRETRAINED = flags.define_path(
    "pretrained",
    None,
    "Weights of suite decode: a .gguf file or a Hugging Face directory.",
    local=True,
)
PAD_TOKEN = absl_flags.DEFINE_string(
    "pretrained_pad_token", "<|endoftext|>", "Name of the padding token in suite decode."
)
DATA_FILE = flags.define_path(
    "data_file",
    None,
    "HotpotQA's JSON, whose documents the turns of suite decode show; no turns without.",
    local=True,
)
BATCHES = absl_flags.DEFINE_list(
    "batches", list(map(str, decode_suite.BATCHES)), "Rows that suite decode decodes at a time."
)
SLOTS = absl_flags.DEFINE_integer(
    "slots", _LOAD.slots, "Slots of a table in suite memory.", lower_bound=1
)
ENTRY_LENGTH = absl_flags.DEFINE_integer(
    "entry_length", _LOAD.entry_length, "Tokens of an entry in suite memory.", lower_bound=1
)
KEY_DIM = absl_flags.DEFINE_integer(
    "key_dim", _LOAD.key_dim, "Width of a key in suite memory.", lower_bound=1
)
SHOWN = absl_flags.DEFINE_integer(
    "shown", _LOAD.shown, "Entries retrieved a turn in suite memory.", lower_bound=1
)


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    check_suites(SUITE.value)
    options = read_options()
    config = parse(CONFIG.value)
    validate.validate(config)
    for flag, path in (("json", JSON.value), ("plot", PLOT.value)):
        paths.make_place(path, f"--{flag}={path}")
    # Compile times are part of the result: nothing may come from an earlier run.
    jax.config.update("jax_enable_compilation_cache", False)
    bench = suites.Benchmark(
        config, flags.DATA_ROOT.value, options, checkpoint=CHECKPOINT.value, step=STEP.value
    )
    for name in SUITE.value:
        print(f"suite {name}", flush=True)
        bench.run(name)
        if JSON.value:
            suites.write(bench.results, JSON.value)
    print(suites.render(bench.results, bench.config))
    if JSON.value:
        print(f"results: {JSON.value}")


def check_suites(names: Sequence[str]) -> None:
    """Raises ConfigError for a suite that does not exist, or none."""
    unknown = [name for name in names if name not in suites.SUITES]
    check(
        bool(names) and not unknown,
        f"--suite={','.join(names)}: allowed are {', '.join(suites.SUITES)}, separated by commas",
    )


def read_batches(given: Sequence[str]) -> tuple[int, ...]:
    """The sizes that --batches names. Raises ConfigError for what is none."""
    check(
        bool(given) and all(size.isdecimal() and int(size) for size in given),
        f"--batches={','.join(given)}: allowed are numbers above 0, separated by commas",
    )
    return tuple(map(int, given))


def read_options() -> suites.Options:
    """What the flags say. Raises ConfigError where two disagree."""
    check(
        SHOWN.value <= SLOTS.value,
        f"--shown={SHOWN.value} is more than --slots={SLOTS.value}; show at most what there is",
    )
    drawn = [name for name in SUITE.value if name in ("growth", "convert")]
    check(
        not PLOT.value or len(drawn) < 2,
        f"--plot={PLOT.value}: suites {' and '.join(drawn)} would both be drawn there; run them "
        "one after the other",
    )
    check(
        not PLOT.value or PLOT.value.endswith((".png", ".pdf")),
        f"--plot={PLOT.value}: allowed endings are .png and .pdf",
    )
    load = memory_suite.Load(
        trajectories=TRAJECTORIES.value or _LOAD.trajectories,
        slots=SLOTS.value,
        entry_length=ENTRY_LENGTH.value,
        key_dim=KEY_DIM.value,
        shown=SHOWN.value,
    )
    return suites.Options(
        runs=RUNS.value,
        load=load,
        trajectories=TRAJECTORIES.value,
        sampled=SAMPLED.value,
        episodes=EPISODES.value,
        plot=PLOT.value,
        torch_compile=TORCH_COMPILE.value,
        pretrained=PRETRAINED.value,
        pad_token=PAD_TOKEN.value,
        data_file=DATA_FILE.value,
        batches=read_batches(BATCHES.value),
    )


if __name__ == "__main__":
    flags.run(main)
