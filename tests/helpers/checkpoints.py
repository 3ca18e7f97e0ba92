"""Checkpoints of the smallest agents there can be, and a document for them."""

import dataclasses
import pathlib

import jax

from atommem_jax.agent import build
from atommem_jax.config import Experiment
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.model import transformer as model_lib
from atommem_jax.weights.checkpoint import Checkpointer
from tests.helpers import tiny
from tests.language import chat_test

EXAMPLE = 3  # of the tiny examples: the document


def save(
    folder: pathlib.Path, config: Experiment, tokenizer: Tokenizer, params, progress: dict
) -> str:
    """Writes step 7 of a workdir; returns the workdir."""
    with Checkpointer(folder / "checkpoints", best_metric="em") as checkpointer:
        checkpointer.save(
            7,
            {"train": {"params": params}},
            config=config.to_dict(),
            tokenizer=tokenizer.to_bytes(),
            data_state=b"",
            progress=progress,
        )
    return str(folder)


def save_trained(folder: pathlib.Path, **sizes: int) -> str:
    """Of a model that read one sentence a part, as `train.py` leaves it.

    sizes: of the episodes that it was trained on, where they are others than the tiny ones.
    """
    shape = dataclasses.replace(tiny.make_shape(), **sizes)
    return save(
        folder,
        tiny.make_config(),
        tiny.make_tokenizer(),
        tiny.make_params(scale=0.3),
        {"stage": "rl", "stage_step": 1, "shape": dataclasses.asdict(shape)},
    )


def save_chat(folder: pathlib.Path) -> str:
    """Of a chat model, as `convert.py` leaves it."""
    config = tiny.make_config().replace(
        {"prompt": "chat", "protocol.name": "atommem", "model.match_features": False}
    )
    tokenizer = chat_test.make_tokenizer()
    model = build.build(config, tokenizer).agent.model
    params = tiny.disturb(model_lib.init_params(model, jax.random.key(0)), 0.3)
    return save(folder, config, tokenizer, params, {})


def make_facts() -> list[str]:
    """The sentences of the document."""
    return [fact["text"] for chunk in tiny.make_examples()[EXAMPLE]["chunks"] for fact in chunk]


def make_document() -> str:
    """The facts as a person might have them: wrapped, with a page break."""
    facts = make_facts()
    middle = len(facts) // 2
    return "\n".join(facts[:middle]) + "\n\f" + "  ".join(facts[middle:]) + "\n"


def make_questions() -> list[str]:
    """Three: two of the document, and one of another."""
    examples = tiny.make_examples()
    asked = [question["text"] for example in examples for question in example["questions"]]
    return list(dict.fromkeys(asked))[:3]
