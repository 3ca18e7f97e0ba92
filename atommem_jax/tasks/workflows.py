"""Static memory workflows: what the learned policy is compared with.

A workflow fixes who decides what. Its `kinds` are a mask: actions of other kinds can neither be
sampled nor parsed. Its `program`, where it has one, writes the reading turns itself, so that
only answering is left to learn, as in systems whose memory is managed by rule (RAG, Mem0). All of
them play on the same model, data, prompts and slot table as the learned policy, and train on the
same budget.

`WORKFLOWS` is the one table of names, with these notes on what each stands for:

* `learned`: the policy decides everything (AtomMem, paper section 3).
* `scratchpad_only`: one text, overwritten at will, no store (MemAgent).
* `store_all`: every fact becomes an entry, under a standing query given by the task; when
  answering, the model may read several times.
* `store_all_update`: the same, and a fact that corrects a shown entry updates it or replaces it.
  The program is told what corrects what, which no rule could know: the strongest of them.
* `store_all_one_read`: every fact becomes an entry; one retrieval by the question (RAG).
* `sliding_window`: the last K chunks are shown, whatever the question.
* `no_memory`: nothing is kept: what can be guessed.
* `no_update`, `no_delete`, `no_scratchpad`, `no_store`: ablations of the learned policy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from atommem_jax.config import MemoryConfig, TeacherConfig
from atommem_jax.tasks import teacher
from atommem_jax.types import EDITS, ActionKind, Episode, Phase, Policy, Response, View

_ALL = tuple(kind for kind in ActionKind if kind != ActionKind.NONE)
_STORE_ALL = teacher.SCRIPTED["store_all"]


@dataclasses.dataclass(frozen=True)
class Workflow:
    """Which actions exist, and what a fixed program decides in the policy's place."""

    kinds: tuple[ActionKind, ...] = _ALL
    program: TeacherConfig | None = None  # writes the reading turns; None leaves them to the policy
    answer_reads: int | None = None  # reads that answering a question may take; None: the config's
    window: bool = False  # the table holds what is shown, oldest out first

    def limit(self, memory: MemoryConfig) -> MemoryConfig:
        """The memory that it leaves: as configured, or a window on what was stored last.

        What stores everything evicts what was not touched for longest where the config would
        refuse: no such system keeps the first few facts of a document and none of the rest.
        """
        if self.window:
            return dataclasses.replace(memory, slots=memory.shown, eviction="oldest")
        if self.program is not None and memory.eviction == "reject":
            return dataclasses.replace(memory, eviction="lru")
        return memory

    def restrict(self, rates: TeacherConfig) -> TeacherConfig:
        """The teacher of these rates, kept to the kinds there are; without Update it creates."""
        without = set(_ALL).difference(self.kinds)
        gone = {
            ActionKind.READ: {"set_query": 0.0, "read_missing": 0.0},
            ActionKind.UPDATE: {"update": 0.0},
            ActionKind.DELETE: {"delete": 0.0, "forget": 0.0},
            ActionKind.SCRATCHPAD: {"count": 0.0},
        }
        changes: dict[str, Any] = {}
        for kind in without:
            changes |= gone.get(kind, {})
        if ActionKind.CREATE in without and ActionKind.SCRATCHPAD not in without:
            changes["scratchpad_only"] = True
        return dataclasses.replace(rates, **changes)

    def apply(self, policy: Policy, make_teacher: Callable[[TeacherConfig], Policy]) -> Policy:
        """`policy`, with its reading turns written by the program, if there is one.

        make_teacher: a scripted policy of the task, of given rates.

        Those turns come back with `scripted` set and log-probs of 0: there is nothing to learn in
        them. The policy is not even run where no trajectory of the batch is answering.
        """
        if self.program is None:
            return policy
        write = make_teacher(self.program)

        def respond(views: View, episodes: Episode, keys: PRNGKeyArray) -> Response:
            reading = views.phase == Phase.READING
            written = write(views, episodes, keys).replace(scripted=reading)
            idle = jnp.where(reading, int(Phase.DONE), views.phase)
            answered = jax.lax.cond(
                jnp.any(idle != Phase.DONE),
                lambda: policy(views.replace(phase=idle), episodes, keys),
                lambda: jax.tree.map(jnp.zeros_like, written),
            )

            def pick(ours, theirs):
                return jnp.where(reading.reshape((-1,) + (1,) * (ours.ndim - 1)), ours, theirs)

            return jax.tree.map(pick, written, answered)

        return respond


def _without(*kinds: ActionKind) -> Workflow:
    return Workflow(kinds=tuple(kind for kind in _ALL if kind not in kinds))


WORKFLOWS: dict[str, Workflow] = {
    "learned": Workflow(),
    "scratchpad_only": Workflow(kinds=(ActionKind.SCRATCHPAD, ActionKind.ANSWER)),
    "store_all": Workflow(
        kinds=(ActionKind.CREATE, ActionKind.READ, ActionKind.ANSWER),
        program=teacher.SCRIPTED["store_all_query"],
        answer_reads=3,
    ),
    "store_all_update": Workflow(
        kinds=(*EDITS, ActionKind.READ, ActionKind.ANSWER),
        program=teacher.SCRIPTED["store_all_update"],
        answer_reads=3,
    ),
    "store_all_one_read": Workflow(
        kinds=(ActionKind.CREATE, ActionKind.ANSWER), program=_STORE_ALL
    ),
    "sliding_window": Workflow(
        kinds=(ActionKind.CREATE, ActionKind.ANSWER), program=_STORE_ALL, window=True
    ),
    "no_memory": Workflow(kinds=(ActionKind.ANSWER,), program=teacher.SCRIPTED["no_memory"]),
    "no_update": _without(ActionKind.UPDATE),
    "no_delete": _without(ActionKind.DELETE),
    "no_scratchpad": _without(ActionKind.SCRATCHPAD),
    "no_read": _without(ActionKind.READ),
    "no_store": _without(*EDITS),
}


def find(name: str) -> Workflow:
    """The workflow of that name. Raises ValueError listing those there are."""
    if name not in WORKFLOWS:
        raise ValueError(f"workflow={name!r}: allowed are {', '.join(WORKFLOWS)}")
    return WORKFLOWS[name]
