"""Agents that learn to manage their own memory, in JAX.

    import atommem_jax as am
    agent = am.load("runs/demo")
    memory = agent.read(open("notes.txt").read())
    agent.answer(memory, "Which city does Saltan work in?").text

docs/api.md says more. To read the code, start at `learning.rollout`, `learning.environment` and
`memory.slot_table`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atommem_jax.api import Agent, load
    from atommem_jax.config import ConfigError, Experiment, load_config, parse
    from atommem_jax.documents.memory_file import Memory
    from atommem_jax.documents.reader import Answer, Turn
    from atommem_jax.learning.reward import exact_match, f1
    from atommem_jax.tasks.custom import Sample
    from atommem_jax.tasks.schema import Example
    from atommem_jax.types import Episode, Trajectory

# Where each name lies. Nothing is imported before it is used: a program that only reads a config,
# or has its own devices to set up first, waits for nothing and starts no backend.
_PLACES = {
    "Agent": "api",
    "Answer": "documents.reader",
    "ConfigError": "config",
    "Episode": "types",
    "Example": "tasks.schema",
    "Experiment": "config",
    "Memory": "documents.memory_file",
    "Sample": "tasks.custom",
    "Trajectory": "types",
    "Turn": "documents.reader",
    "exact_match": "learning.reward",
    "f1": "learning.reward",
    "load": "api",
    "load_config": "config",
    "parse": "config",
}

__all__ = [
    "Agent",
    "Answer",
    "ConfigError",
    "Episode",
    "Example",
    "Experiment",
    "Memory",
    "Sample",
    "Trajectory",
    "Turn",
    "exact_match",
    "f1",
    "load",
    "load_config",
    "parse",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
