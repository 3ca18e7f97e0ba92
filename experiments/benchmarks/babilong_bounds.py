"""Prints what fixed workflows can know of BABILong at most, by length of the document.

    python -m experiments.benchmarks.babilong_bounds --checkpoint=runs/babilong1 \
        --length=4k --length=1m --documents=32 --output=runs/babilong1/results.json

A workflow that stores every part of a document as it is, and shows some of them with the question,
can answer if the sentences that the answer follows from are among those: whatever reads them, it
cannot do better. Counted are `retrieval`, the K parts nearest to the question by the agent's own
hashed embedding with weights by rarity, and `window`, the last K parts. The tokenizer, the size of
a part and K (`memory.shown`) are those of the checkpoint. With `--output` they are written to a
`results.json`, beside what stands there: the report of a run draws what its folder has.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags as absl_flags
from jaxtyping import Float, Int

from atommem_jax import text_files
from atommem_jax.agent import build
from atommem_jax.agent.load import Loaded, find_split, load
from atommem_jax.config import check, paths
from atommem_jax.language.tokenizer import weigh_by_rarity
from atommem_jax.learning.evaluation import summarise
from atommem_jax.memory.embedding import HashedBagOfTokens, most_times
from atommem_jax.tasks import encoding, schema
from atommem_jax.tasks.background import Chunk
from experiments import flags

_AT_ONCE = 256


def define() -> None:
    """Defines the flags: of the script alone, for other scripts have some of the same names."""
    flags.define_path("checkpoint", None, "A workdir of train.py.")
    absl_flags.DEFINE_multi_string("length", ["4k"], "Of documents; repeat for several.")
    absl_flags.DEFINE_integer("documents", 32, "Of each length.", lower_bound=1)
    absl_flags.DEFINE_integer("key_dim", 1024, "Width of a key.", lower_bound=1)
    flags.define_path("output", None, "A results.json to add the bounds to.")


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    given = absl_flags.FLAGS
    check(given.checkpoint is not None, "--checkpoint is missing: pass the workdir of a run")
    loaded = load(given.checkpoint, cpu_devices=1)
    config = loaded.parts.config
    check(config.task.name == "babilong", f"task.name={config.task.name!r}: allowed is 'babilong'")
    dataset = build.load_dataset(config, flags.DATA_ROOT.value)
    output = paths.locate(given.output) if given.output else None
    results = read_results(output) if output else {"methods": {}}
    print(f"{'length':12}{'retrieval':>12}{'window':>12}{'parts':>12}")
    for length in given.length:
        examples = find_split(dataset, f"test_{length}")[: given.documents]
        found = np.array([find_bounds(loaded, example, given.key_dim) for example in examples])
        retrieval, window, parts = found.mean(axis=0)
        print(f"{length:12}{retrieval:12.3f}{window:12.3f}{parts:12.0f}", flush=True)
        for name, column in (("retrieval at most", 0), ("window at most", 1)):
            results["methods"].setdefault(name, {})[length] = make_cell(found[:, column])
        if output:
            output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def read_results(path: pathlib.Path) -> dict[str, Any]:
    """What a `results.json` says so far. Raises ConfigError where it is another file."""
    if not path.exists():
        check(path.parent.is_dir(), f"--output={path}: there is no folder {path.parent}")
        return {"methods": {}}
    content = text_files.read_json(
        path,
        "results.json",
        lambda found: isinstance(found, dict) and isinstance(found.get("methods"), dict),
    )
    check(content is not None, f"--output={path}: is no results.json, with 'methods'; name another")
    return content


def make_cell(scores: Float[np.ndarray, " D"]) -> dict[str, float]:
    """Mean of the documents' scores with its 95% interval, as of an evaluation."""
    records = [
        {"episode": i, "em": float(score), "f1": float(score)} for i, score in enumerate(scores)
    ]
    summary = summarise(records)
    return {key: summary[key] for key in ("em", "ci_low", "ci_high", "episodes")}


def find_bounds(loaded: Loaded, example: schema.Example, dim: int) -> tuple[float, float, int]:
    """Share of the questions that each workflow can know the answer to, and the number of parts."""
    tokenizer, shown = loaded.parts.tokenizer, loaded.parts.config.memory.shown
    size = example["background"]["chunk_tokens"]
    weights = weigh_by_rarity(tokenizer, most_times(dim, size))
    embed = HashedBagOfTokens(tokenizer.vocab_size, dim=dim, weights=weights)
    queries = [tokenizer.encode(question["text"]) for question in example["questions"]]
    asked = embed_all(embed, iter(queries), size)
    holds: dict[int, int] = {}  # number of a fact -> that of its part
    parts: list[int] = []

    def read() -> Iterator[list[int]]:
        for chunk in encoding.lay_out(example, encoding.TextEncoder(tokenizer)):
            holds.update(dict.fromkeys(chunk.places, len(parts)))
            parts.append(chunk.length)
            yield join(chunk)

    keys = embed_all(embed, read(), size)
    last = set(range(max(0, len(parts) - shown), len(parts)))
    retrieved = windowed = 0
    for query, question in zip(asked, example["questions"], strict=True):
        needed = {holds[number] for number in question["needs"]}
        nearest = np.argsort(-(keys @ query), kind="stable")[:shown]
        retrieved += needed <= set(nearest.tolist())
        windowed += needed <= last
    count = len(example["questions"])
    return retrieved / count, windowed / count, len(parts)


def join(chunk: Chunk) -> list[int]:
    """The tokens of a part."""
    return [token for piece in chunk.pieces for token in piece.ids]


def embed_all(
    embed: HashedBagOfTokens, texts: Iterator[list[int]], width: int
) -> Float[np.ndarray, "N D"]:
    """Keys of texts of at most `width` tokens, of which a few are held at a time."""
    rows: list[Float[np.ndarray, "n D"]] = []
    held: list[list[int]] = []

    def flush() -> None:
        tokens = np.zeros((_AT_ONCE, width), np.int32)
        lengths: Int[np.ndarray, " n"] = np.zeros(_AT_ONCE, np.int32)
        for row, text in enumerate(held):
            tokens[row, : len(text)], lengths[row] = text, len(text)
        rows.append(
            np.asarray(_embed(embed, jnp.asarray(tokens), jnp.asarray(lengths)))[: len(held)]
        )
        held.clear()

    for text in tqdm.tqdm(texts, desc="parts", leave=False, delay=5):
        held.append(text)
        if len(held) == _AT_ONCE:
            flush()
    if held:
        flush()
    return np.concatenate(rows)


@jax.jit
def _embed(embed: HashedBagOfTokens, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return embed(tokens, lengths)


if __name__ == "__main__":
    define()
    flags.run(main)
