"""Converts between published weights and our checkpoints.

    python experiments/convert.py --source=Qwen3-8B --target=runs/qwen3 --to=checkpoint
    python experiments/convert.py --source=runs/mine/checkpoints/300 --target=export
    python experiments/convert.py --source=model.gguf --target=model --dtype=bfloat16

The source is a Hugging Face directory, a .gguf file, a run, or one checkpoint of a run. What is
written is a Hugging Face directory (config.json, safetensors, the tokenizer, and our value head in
a file of its own), or, with --to=checkpoint, step 0 of a run: its config is --config with the sizes
of the model, and its tokenizer the published one with the names that the protocol reserves.

    python experiments/convert.py --source=runs/adapted --target=export   # adapters merged
    python experiments/convert.py --source=runs/adapted --target=adapter --to=adapters \
        --base=Qwen3-8B

The adapters of a run with `lora.rank` are merged into their base, or with --to=adapters written
alone, in the layout of PEFT.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags as absl_flags
from jax.sharding import Mesh

from atommem_jax import folder_lock
from atommem_jax.agent import build, load, validate
from atommem_jax.config import ConfigError, Experiment, check, parse
from atommem_jax.language.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from atommem_jax.model import transformer as model_lib
from atommem_jax.model.model_config import ModelConfig
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.weights import (
    gguf,
    gguf_file,
    hf_config,
    hf_export,
    hf_tokenizer,
    huggingface,
)
from atommem_jax.weights.checkpoint import Checkpointer, CheckpointError
from experiments import flags

CONFIG = flags.define_config("experiments/configs/synthetic.py")
SOURCE = flags.define_path(
    "source", None, "What to read: a directory, a .gguf file, a run or a checkpoint."
)
TARGET = flags.define_path("target", None, "Directory to write.", local=True)
TO = absl_flags.DEFINE_enum(
    "to", "huggingface", ["huggingface", "checkpoint", "adapters"], "What to write."
)
BASE = flags.define_path(
    "base",
    "",
    "The model that the adapters of a run were trained on, where its init_from is no longer right; "
    "with --to=adapters the name that is written for that model.",
)
DTYPE = absl_flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type of the tensors in a Hugging Face directory."
)
TOKENIZER = flags.define_path(
    "tokenizer", None, "Directory that has tokenizer.json; the source by default.", local=True
)
VOCAB_SIZE = absl_flags.DEFINE_integer(
    "vocab_size",
    0,
    "Widens the vocabulary of a model that becomes a checkpoint, where it has no room for names "
    "that the protocol reserves; 0 for the model's own.",
    lower_bound=0,
)
PAD_TOKEN = absl_flags.DEFINE_string(
    "pad_token", None, "Name of the padding token, where tokenizer_config.json has none."
)


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    source, target = (flags.require(flag, "see --help") for flag in (SOURCE, TARGET))
    try:
        with folder_lock.hold(target, f"--target={target}"):
            convert(source, target)
    except (hf_config.PublishedError, CheckpointError) as error:
        raise ConfigError(str(error)) from error


def convert(source: str, target: str) -> None:
    """Writes what --to asks for."""
    if TO.value == "checkpoint":
        config = parse(CONFIG.value)
        mesh_lib.prepare_devices(config.mesh.cpu_devices)
        write_checkpoint(source, target, config, vocab_size=VOCAB_SIZE.value)
    elif TO.value == "adapters":
        write_adapters(source, target, base=BASE.value, dtype=DTYPE.value)
    else:
        write_huggingface(source, target, dtype=DTYPE.value)


def write_huggingface(source: str, target: str, *, dtype: str = "float32") -> None:
    """Writes a Hugging Face directory of anything that can be read.

    Raises ConfigError or PublishedError for what cannot be.
    """
    config, params, tokenizer = read(source)
    published_one = tokenizer if isinstance(tokenizer, HuggingFaceTokenizer) else None
    rest = list_rest(source) if tokenizer is None else None
    hf_export.save(target, params, config, tokenizer=published_one, dtype=dtype, rest=rest)
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(target)
    _say(target, params, config)
    _say_what_is_left_out(source, target)


def write_adapters(source: str, target: str, *, base: str = "", dtype: str = "float32") -> None:
    """Writes the adapters of a run in the layout of PEFT.

    base: name of the published model that they belong to; the run's `init_from` by default.

    Raises ConfigError for a run without adapters, PublishedError for those that PEFT cannot apply.
    """
    loaded = load.load_adapters(source)
    config = loaded.parts.agent.model.config
    base = base or loaded.parts.config.init_from
    hf_export.save_adapters(target, loaded.params, config, base=base, dtype=dtype)
    count = model_lib.count_params(loaded.params)
    print(
        f"{target}: adapters of rank {config.lora.rank}, {count:,} parameters, value head included"
    )


def write_checkpoint(source: str, target: str, config: Experiment, *, vocab_size: int = 0) -> None:
    """Writes step 0 of a run that has the model, and otherwise the settings of `config`.

    vocab_size: ids of the model that is written; 0 for those that it was published with.

    Raises ConfigError or PublishedError for what cannot be read, for a tokenizer without room for
    the protocol's names, and where `target` has checkpoints already.
    """
    check(
        is_published(source),
        f"--source={source}: --to=checkpoint needs a Hugging Face directory or a .gguf file; a "
        "checkpoint is one already",
    )
    found, weights = huggingface.open_weights(source)
    huggingface.check(weights, found)  # before anything is as large as the config says
    check(
        vocab_size == 0 or vocab_size >= found.vocab_size,
        f"--vocab_size={vocab_size}: must be at least the model's own {found.vocab_size}, or 0",
    )
    model = dataclasses.replace(found, vocab_size=vocab_size or found.vocab_size)
    tokenizer = read_tokenizer(source, model, build.reserved_names(config))
    if tokenizer is None:
        raise ConfigError(f"--tokenizer is missing: {source} has no tokenizer.json")
    config = describe_run(config, model)
    validate.validate(config)
    parts = build.build(config, tokenizer)
    params = huggingface.place(weights, found, make_mesh(found))
    _, params = huggingface.widen(params, found, model.vocab_size)
    with Checkpointer(pathlib.Path(target) / "checkpoints", best_metric="em") as checkpointer:
        checkpointer.save(
            0,
            {"train": {"params": params}},
            config=config.to_dict(),
            tokenizer=parts.tokenizer.to_bytes(),
            data_state=b"",
            progress={},
        )
        checkpointer.wait()
    _say(target, params, model)


def describe_run(config: Experiment, model: ModelConfig) -> Experiment:
    """`config` with the sizes of a model, and without what published ones do not have."""
    sizes = config.model.sizes()
    changes = {
        f"model.{name}": getattr(model, name) for name in sizes if name not in build.HOW_TO_COMPUTE
    }
    changes |= {"model.match_features": False, "tokenizer.vocab_size": model.vocab_size}
    return config.replace(changes | {"init_from": "", "lora.rank": 0})  # others start from it


def read(source: str) -> tuple[ModelConfig, Any, Tokenizer | None]:
    """Model config, parameters and tokenizer (if there is one) of anything that can be read."""
    if is_published(source):
        config, weights = huggingface.open_weights(source)
        huggingface.check(weights, config)  # before anything is as large as the config says
        tokenizer = read_tokenizer(source, config)
        return config, huggingface.place(weights, config, make_mesh(config)), tokenizer
    loaded = load.load(source, base=BASE.value, merge=True)
    return loaded.parts.agent.model.config, loaded.params, loaded.parts.tokenizer


def is_published(source: str) -> bool:
    """Whether it is a Hugging Face directory or a .gguf file, and not a run or a checkpoint."""
    path = pathlib.Path(source)
    return gguf_file.is_gguf(path) or (path / hf_config.CONFIG_FILE).is_file()


def read_tokenizer(
    source: str, config: ModelConfig, reserved: Sequence[str] = ()
) -> HuggingFaceTokenizer | None:
    """The tokenizer of --tokenizer, or of the source; None where there is none."""
    if gguf_file.is_gguf(source) and not TOKENIZER.value:
        return gguf.open_model(source).read_tokenizer(
            config.vocab_size, reserved=reserved, pad_token=PAD_TOKEN.value
        )
    folder = pathlib.Path(TOKENIZER.value or source)
    if not (folder / hf_tokenizer.TOKENIZER_FILE).is_file() and not TOKENIZER.value:
        return None
    return hf_tokenizer.read_tokenizer(
        folder,
        config.vocab_size,
        reserved=reserved,
        pad_token=PAD_TOKEN.value,
        rest=list_rest(source),
    )


def list_rest(source: str) -> dict[str, dict[str, Any]]:
    """What was published with a model and is not ours; see `hf_config.list_rest`."""
    if gguf_file.is_gguf(source):
        return gguf.open_model(source).list_rest()
    return hf_config.list_rest(source)


def make_mesh(config: ModelConfig) -> Mesh:
    """All devices that the width divides over share the parameters."""
    return mesh_lib.make_mesh(1, fsdp=math.gcd(jax.device_count(), config.width))


def _say(target: str, params: Any, config: ModelConfig) -> None:
    kind, count = hf_config.find_kind(config), model_lib.count_params(params)
    print(f"{target}: {kind}, {count:,} parameters, value head included")


def _say_what_is_left_out(source: str, target: str) -> None:
    """Names the files of a published directory that are not in what was made of it."""
    if not (pathlib.Path(source) / hf_config.CONFIG_FILE).is_file():
        return
    made = [path.name for path in pathlib.Path(target).iterdir()]
    left = sorted(
        path.name
        for path in pathlib.Path(source).iterdir()
        if path.is_file()
        and path.name not in (*made, hf_tokenizer.TEMPLATE_FILE)
        and ".safetensors" not in path.suffixes
    )
    if left:
        print(f"{target}: without {', '.join(left)} of {source}; copy what you need of them")


if __name__ == "__main__":
    flags.run(main)
