"""Static memory workflows: what the learned policy is compared with.

A workflow fixes who decides what. Its `kinds` are a mask: actions of other kinds can neither be
sampled nor parsed. Its `program`, where it has one, writes the reading turns itself, so that
only answering is left to learn, as in systems whose memory is managed by rule (RAG, Mem0). All of
them play on the same model, data, prompts and slot table as the learned policy, and train on the
same budget.

A third kind of them does not read at all: the question is put at once, with an `index` of the
document in place of a memory, or with as much of the document as the prompt holds (`context`).

`WORKFLOWS` is the one table of names, each with its mask or program and with what the prompt says
beyond the task (`guide`, in the chat format). These notes tell what each stands for:

* `learned`: the policy decides everything (AtomMem, paper section 3).
* `scratchpad_only`: one text, overwritten at will, no store (MemAgent).
* `store_all`: every fact becomes an entry, under a standing query given by the task; when
  answering, the model may read several times.
* `store_all_update`: the same, and a fact that corrects a shown entry updates it or replaces it.
  The program is told what corrects what, which no rule could know: the strongest of them.
* `store_all_one_read`: every fact becomes an entry; one retrieval by the question (RAG).
* `sliding_window`: the last K chunks are shown, whatever the question.
* `no_memory`: nothing is kept: what can be guessed.
* `full_context`: the document itself, its first `rollout.context_length` tokens. With rope scaling
  (`model.rope_type='yarn'`) a model reads more than it was trained on.
* `recent_context`: the same of its last tokens, a sliding window over the text.
* `rag_chunks`, `rag_documents`: an index of the parts, in pieces as long as an entry, or of the
  documents; one retrieval by the question (RAG).
* `store_everything`, `store_everything_update`: an index of all facts, without bound; the second
  without those that a later fact corrects. The model may read several times. They are `store_all`
  and `store_all_update` for parts of any length, since nothing has to be written token by token.
* `extract_reconcile`: in pairs of turns the model extracts a fact, and decides in view of the
  entries nearest to it whether to add it, to update or delete an entry, or to do nothing (Mem0).
* `linked_notes`: in pairs of turns the model writes a note, and in view of the entries nearest to
  it adds it and revises them. When answering, half of what is shown are the entries nearest to the
  other half (A-Mem, whose links the model chooses among the nearest; here they all count).
* `no_update`, `no_delete`, `no_scratchpad`, `no_store`: ablations of the learned policy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from atommem_jax.config import MemoryConfig, TeacherConfig
from atommem_jax.tasks import teacher
from atommem_jax.types import EDITS, ActionKind, Episode, Phase, Policy, Response, View

_ALL = tuple(kind for kind in ActionKind if kind != ActionKind.NONE)
_STORE_ALL = teacher.SCRIPTED["store_all"]


class Step(NamedTuple):
    """A turn of a pair."""

    kinds: tuple[ActionKind, ...]
    actions: int = 0  # at the most; 0: the config's


@dataclasses.dataclass(frozen=True)
class Workflow:
    """Which actions exist, and what a fixed program decides in the policy's place."""

    kinds: tuple[ActionKind, ...] = _ALL
    program: TeacherConfig | None = None  # writes the reading turns; None leaves them to the policy
    answer_reads: int | None = None  # reads that answering a question may take; None: the config's
    window: bool = False  # the table holds what is shown, oldest out first
    index: str = ""  # of a document that is not read: one of `document_index.KINDS`
    context: Literal["", "first", "last"] = ""  # which tokens of it the prompt of a question holds
    # Kinds, and most actions, of the two turns of a pair; () where turns are not paired.
    pair: tuple[Step, ...] = ()
    linked: bool = False  # half of what a question is shown is nearest to the other half
    guide: str = ""  # last words of the system message of a chat model

    @property
    def is_untrained(self) -> bool:
        """Whether it has nothing to learn from: no reading turn, or turns that come in pairs."""
        return bool(self.index or self.context or self.pair)

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

    @property
    def writes_nothing(self) -> bool:
        """Whether its program leaves the memory empty."""
        program = self.program
        return program is not None and program.store_support == program.store_distractor == 0

    def restrict(self, rates: TeacherConfig) -> TeacherConfig:
        """The teacher of these rates, kept to the kinds there are; without Update it creates."""
        without = set(_ALL).difference(self.kinds)
        gone = {
            ActionKind.READ: {"set_query": 0.0, "read_missing": 0.0},
            ActionKind.UPDATE: {"update_shown": 0.0},
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


_RECONCILE = """\
Take two turns for each fact. In the first, write one fact of the part that may help, as your \
query. In the second the entries nearest to it are shown: add the fact, update an entry that it \
changes, delete an entry that it contradicts, or write nothing where it is known already."""

_LINK = """\
Take two turns for each note. In the first, write a note of what may help, with its key words, as \
your query. In the second the entries nearest to it are shown: add the note, with key words and \
what it has to do with those entries, and update the entries that it sheds light on."""


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
    "full_context": Workflow(kinds=(ActionKind.ANSWER,), context="first", answer_reads=0),
    "recent_context": Workflow(kinds=(ActionKind.ANSWER,), context="last", answer_reads=0),
    "rag_chunks": Workflow(kinds=(ActionKind.ANSWER,), index="chunks", answer_reads=0),
    "rag_documents": Workflow(kinds=(ActionKind.ANSWER,), index="documents", answer_reads=0),
    "store_everything": Workflow(
        kinds=(ActionKind.READ, ActionKind.ANSWER), index="facts", answer_reads=3
    ),
    "store_everything_update": Workflow(
        kinds=(ActionKind.READ, ActionKind.ANSWER), index="current_facts", answer_reads=3
    ),
    "extract_reconcile": Workflow(
        kinds=(*EDITS, ActionKind.READ, ActionKind.ANSWER),
        pair=(Step((ActionKind.READ,), 1), Step(EDITS, 1)),
        guide=_RECONCILE,
    ),
    "linked_notes": Workflow(
        kinds=(ActionKind.CREATE, ActionKind.UPDATE, ActionKind.READ, ActionKind.ANSWER),
        pair=(Step((ActionKind.READ,), 1), Step((ActionKind.CREATE, ActionKind.UPDATE))),
        linked=True,
        guide=_LINK,
    ),
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
