"""Prints how well a memory finds what a question needs, without an agent: recall@K.

    python experiments/recall.py --config=experiments/configs/hotpotqa.py:2wikimultihopqa \
        --config.task.data_file=PATH/dev.json --slots=64,256

For every question its supporting documents are stored among random others of the file, one an
entry, until the memory is full; the question is the query. Recall@K is the share of the supporting
documents that are among the K nearest. Compared are the ways in which tokens may count
(`memory.weighting`), beside inverse document frequencies counted on the documents themselves. The
tokenizer is trained on the documents.

With `--policy=PATH` the tokenizer is that of a model, whose token embeddings are compared too
(`memory.embedding='policy'`), and with `--encoder=PATH` a text encoder is
(`memory.embedding='encoder'`).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags as absl_flags
from jaxtyping import Array, Float

from atommem_jax.agent import encoders
from atommem_jax.config import ConfigError, check, parse
from atommem_jax.language.tokenizer import SentencePieceTokenizer, Tokenizer, weigh_by_rarity
from atommem_jax.memory.embedding import HashedBagOfTokens, PooledTokens, most_times
from atommem_jax.tasks import datasets, multihop_files
from atommem_jax.types import Embed
from experiments import flags

CONFIG = flags.define_config("experiments/configs/hotpotqa.py")
SLOTS = absl_flags.DEFINE_list("slots", ["64", "256"], "Entries of the memory, several sizes.")
KEY_DIMS = absl_flags.DEFINE_list("key_dims", ["128", "1024"], "Widths of a key.")
POLICY = flags.define_path("policy", "", "A model: a checkpoint, or a Hugging Face directory.")
ENCODER = flags.define_path("encoder", "", "A text encoder, as of memory.encoder.")
SHOWN = absl_flags.DEFINE_integer("shown", 6, "K, how many are shown.", lower_bound=1)
_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Texts:
    """All documents and questions as tokens, and which documents support each question."""

    documents: list[list[int]]
    questions: list[list[int]]
    support: list[list[int]]

    def width(self) -> int:
        """Tokens of the longest."""
        return max(map(len, self.documents + self.questions))


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    config = parse(CONFIG.value)
    check(
        config.task.name == "multihop_qa",
        f"task.name={config.task.name!r}: allowed is 'multihop_qa', whose questions have documents",
    )
    sizes = [_read_number("slots", text) for text in SLOTS.value]
    dims = [_read_number("key_dims", text) for text in KEY_DIMS.value]
    try:
        task, _ = datasets.parse_task(config.task.to_dict())
        corpus = multihop_files.read(task)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    questions = [q for split in corpus.splits.values() for q in split]
    documents = list(dict.fromkeys(d for q in questions for d in q.documents))
    most = max(len(q.supporting()) for q in questions)
    for size in sizes:
        check(
            most <= size <= len(documents),
            f"--slots={size}: allowed are {most} to {len(documents)}, the documents of the file",
        )
    written = [f"{d.title}: {' '.join(d.sentences)}" for d in documents]
    policy = encoders.read(POLICY.value, "float32") if POLICY.value else None
    tokenizer: Tokenizer = (
        SentencePieceTokenizer.train(
            written, config.tokenizer.vocab_size, character_coverage=0.9995
        )
        if policy is None
        else policy[2]
    )
    number = {document: i for i, document in enumerate(documents)}
    texts = Texts(
        [tokenizer.encode(text) for text in written],
        [tokenizer.encode(q.text) for q in questions],
        [[number[d] for d in q.supporting()] for q in questions],
    )
    print(f"{len(questions)} questions, {len(documents)} documents, {tokenizer.vocab_size} tokens")
    print(f"{'recall@' + str(SHOWN.value):24}" + "".join(f"{size:>8} slots" for size in sizes))
    for dim in dims:
        room = most_times(dim, texts.width())
        ways = {
            "uniform": b"",
            "rarity": weigh_by_rarity(tokenizer, room),
            "document frequency": _weigh_by_documents(texts, tokenizer.vocab_size, room),
        }
        for name, weights in ways.items():
            embed = HashedBagOfTokens(tokenizer.vocab_size, dim=dim, weights=weights)
            _print_row(f"{name}, {dim}", embed, texts, sizes)
    if policy is not None:
        model, params, _ = policy
        width = model.config.width
        for name, weights in {"": b"", " by rarity": weigh_by_rarity(tokenizer, 255)}.items():
            unbound = PooledTokens(HashedBagOfTokens(tokenizer.vocab_size, dim=width), weights)
            _print_row(f"policy{name}, {width}", unbound.bind(params), texts, sizes)
    if ENCODER.value:
        width = encoders.read(ENCODER.value, "float32")[0].config.width
        encoder = encoders.read_embedding(ENCODER.value, tokenizer, width, "float32")
        _print_row(f"encoder, {width}", encoder, texts, sizes)


def _print_row(name: str, embed: Embed, texts: Texts, sizes: Sequence[int]) -> None:
    found = _measure(embed, texts, sizes, SHOWN.value)
    print(f"{name:24}" + "".join(f"{x:14.3f}" for x in found), flush=True)


def _read_number(name: str, text: str) -> int:
    check(text.isdigit() and int(text) > 0, f"--{name}={text}: allowed are numbers above 0")
    return int(text)


def _weigh_by_documents(texts: Texts, vocab_size: int, most: int) -> bytes:
    """8 times the logarithm of how many documents there are for each that has the token."""
    counts = np.zeros(vocab_size)
    for document in texts.documents:
        counts[list(set(document))] += 1
    times = 8 * np.log((len(texts.documents) + 1) / (counts + 1))
    return np.clip(np.rint(times), 1, min(most, 255)).astype(np.uint8).tobytes()


def _measure(embed: Embed, texts: Texts, sizes: Sequence[int], shown: int) -> list[float]:
    """Recall in memories of each size."""
    keys = _embed_all(embed, texts.documents, texts.width(), ask=False)
    queries = _embed_all(embed, texts.questions, max(map(len, texts.questions)), ask=True)
    recall = []
    for slots in sizes:
        rng, found = np.random.default_rng(0), 0
        for query, support in zip(queries, texts.support, strict=True):
            others = np.setdiff1d(np.arange(len(keys)), support)
            filled = rng.choice(others, slots - len(support), replace=False)
            stored = np.concatenate([support, filled])
            nearest = np.argsort(-(keys[stored] @ query), kind="stable")[:shown]
            found += (nearest < len(support)).sum()
        recall.append(found / sum(map(len, texts.support)))
    return recall


def _embed_all(
    embed: Embed, texts: Sequence[Sequence[int]], width: int, *, ask: bool
) -> Float[np.ndarray, "N D"]:
    """Keys of documents, or of questions where some are read otherwise."""
    tokens = np.zeros((-(-len(texts) // _AT_ONCE) * _AT_ONCE, width), np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], lengths[row] = text, len(text)

    @jax.jit
    def compiled(embed: Embed, tokens: Array, length: Array) -> Array:
        read = getattr(embed, "ask", embed) if ask else embed
        return read(tokens, length)

    starts = tqdm.trange(0, len(tokens), _AT_ONCE, desc="embed", leave=False, delay=5)
    rows = [
        compiled(
            embed, jnp.asarray(tokens[i : i + _AT_ONCE]), jnp.asarray(lengths[i : i + _AT_ONCE])
        )
        for i in starts
    ]
    return np.concatenate(rows)[: len(texts)]


if __name__ == "__main__":
    flags.run(main)
