"""Scripted teachers: policies that act by the annotations of an episode, with chosen mistakes.

A teacher is a rollout policy like the model, so its prompts, its memory and its budgets are
those of training; it is written for one trajectory and vectorised with `vmap`. It knows which
facts are worth storing, as which note, and which earlier fact a correction supersedes
(`Annotations`), but it edits only entries that it is *shown*, and answers only from entries that it
is shown.

`TeacherConfig` holds a rate per kind of mistake, so that RL can start from a middling policy
(paper, section 4: the policy before RL). `SCRIPTED` names the settings that the validity table
of a task compares: they bound what a fixed workflow can reach there.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from atommem_jax.config import TeacherConfig
from atommem_jax.language import prompt as prompting
from atommem_jax.language.protocol import Protocol, spell
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.types import (
    EMPTY,
    ActionKind,
    Annotations,
    Episode,
    Phase,
    Policy,
    Response,
    View,
)

NOISY = TeacherConfig(
    store_support=0.9,
    store_distractor=0.5,
    update_shown=0.45,
    set_query=0.75,
    answer_known=0.96,
)

SCRIPTED: dict[str, TeacherConfig] = {
    "clean": TeacherConfig(),
    "noisy_teacher": NOISY,
    "store_all": TeacherConfig(
        store_distractor=1.0, update_shown=0.0, set_query=0.0, forget=0.0, count=0.0
    ),
    "store_all_query": TeacherConfig(store_distractor=1.0, update_shown=0.0, forget=0.0, count=0.0),
    "store_all_update": TeacherConfig(
        store_distractor=1.0, update_shown=0.5, delete=1.0, count=0.0
    ),
    "create_for_update": TeacherConfig(update_shown=0.0),
    "create_only": TeacherConfig(update_shown=0.0, set_query=0.0),
    "scratchpad_only": TeacherConfig(scratchpad_only=True),
    "no_memory": TeacherConfig(
        store_support=0.0, set_query=0.0, read_missing=0.0, forget=0.0, count=0.0
    ),
}


Turn = tuple[Int[Array, " R"], Int[Array, ""]]
"""What a script writes: tokens, and how many they are."""


@dataclasses.dataclass(frozen=True)
class Script:
    """Writes actions as tokens: literals of a protocol under one tokenizer, and widths."""

    opens: tuple[tuple[int, ...], ...]  # per ActionKind
    closes: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[tuple[int, ...], ...], ...]  # per ActionKind: target 1..K, or none
    eos_id: int
    pad_id: int
    response_length: int  # R
    max_text: int  # X

    @classmethod
    def compile(
        cls, protocol: Protocol, tokenizer: Tokenizer, *, response_length: int, max_text: int
    ) -> "Script":
        """Raises ValueError when the targets of a tag differ in their number of tokens."""
        tags = {tag.kind: tag for tag in protocol.tags}
        opens = [spell(tokenizer, tags[k].open) if k in tags else () for k in ActionKind]
        closes = [spell(tokenizer, tags[k].close) if k in tags else () for k in ActionKind]
        targets = [
            tuple(spell(tokenizer, name) for name in protocol.write_targets(k)) if k in tags else ()
            for k in ActionKind
        ]
        for names in targets:
            if len({len(name) for name in names}) > 1:
                raise ValueError(
                    f"protocol {protocol.name!r}: targets take {[len(t) for t in names]} tokens; "
                    "scripted teachers need one width; lower memory.shown, or use a protocol with "
                    "reserved targets"
                )
        return cls(
            opens=tuple(opens),
            closes=tuple(closes),
            targets=tuple(targets),
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            response_length=response_length,
            max_text=max_text,
        )

    def tokens_around(self, kind: ActionKind) -> int:
        """Tokens of an action besides its text; 0 for a kind without a tag."""
        targets = self.targets[kind]
        return len(self.opens[kind]) + (len(targets[0]) if targets else 0) + len(self.closes[kind])

    def action(
        self,
        kind: ActionKind,
        when: Bool[Array, ""],
        text: Int[Array, " w"] | None = None,
        length: Int[Array, ""] | int = 0,
        target: Int[Array, ""] | None = None,
    ):
        """(tokens, real) of one action, written only `when`; none of a kind without a tag."""
        if not self.opens[kind]:
            return jnp.zeros((0,), jnp.int32), jnp.zeros((0,), bool)
        pieces = [jnp.asarray(self.opens[kind], jnp.int32)]
        if target is not None:
            names = jnp.asarray(self.targets[kind], jnp.int32)
            pieces.append(names[jnp.maximum(target - 1, 0)])
        real = [jnp.ones((p.shape[0],), bool) for p in pieces]
        if text is not None:
            pieces.append(text.astype(jnp.int32))
            real.append(jnp.arange(text.shape[0]) < length)
        pieces.append(jnp.asarray(self.closes[kind], jnp.int32))
        real.append(jnp.ones((pieces[-1].shape[0],), bool))
        return jnp.concatenate(pieces), jnp.concatenate(real) & when

    def write(self, actions) -> Turn:
        """The turn: its actions, then end-of-sequence."""
        end = (jnp.asarray([self.eos_id], jnp.int32), jnp.ones((1,), bool))
        tokens, real = zip(*actions, end, strict=True)
        return prompting.join(
            jnp.concatenate(tokens),
            jnp.concatenate(real),
            width=self.response_length,
            pad_id=self.pad_id,
            left_pad=False,
        )


def _fact(script: Script, episode: Episode, index: Int[Array, ""]):
    """Tokens and length of fact `index`; length 0 where there is none."""
    a = episode.annotations
    facts = a.start.shape[1]
    chunk, place = jnp.maximum(index, 0) // facts, jnp.maximum(index, 0) % facts
    offsets = jnp.arange(script.max_text)
    length = jnp.where(index == EMPTY, 0, a.length[chunk, place])
    at = jnp.minimum(a.start[chunk, place] + offsets, episode.chunks.shape[1] - 1)
    return jnp.where(offsets < length, episode.chunks[chunk][at], script.pad_id), length


def _entry(script: Script, episode: Episode, index: Int[Array, ""]):
    """Tokens and length of what is stored of fact `index`: its note, else the fact itself."""
    text, length = _fact(script, episode, index)
    a = episode.annotations
    facts, longest = a.note.shape[1:]
    if not longest:
        return text, length
    chunk, place = jnp.maximum(index, 0) // facts, jnp.maximum(index, 0) % facts
    room = max(0, script.max_text - longest)
    note = jnp.pad(a.note[chunk, place], (0, room), constant_values=script.pad_id)
    note_length = jnp.where(index == EMPTY, 0, a.note_length[chunk, place])
    noted = note_length > 0
    return jnp.where(noted, note[: script.max_text], text), jnp.where(noted, note_length, length)


def _full_stop(episode: Episode) -> int:
    """Tokens that end an entry and are no part of an answer: sentences have one, notes none."""
    return 0 if episode.annotations.note.shape[-1] else 1


def _where_shown(script: Script, view: View, tokens, length) -> tuple[Array, Array]:
    """Is this text shown, and as which Memory number (1..K)?"""
    shown, lengths = view.observation.shown, view.observation.shown_lengths
    cap = shown.shape[1]
    padded = jnp.pad(tokens, (0, max(0, cap - script.max_text)), constant_values=script.pad_id)
    same = jnp.all(shown == padded[None, :cap], axis=1)
    same &= (lengths == jnp.minimum(length, cap)) & (lengths > 0)
    return jnp.any(same), jnp.argmax(same).astype(jnp.int32) + 1


@flax.struct.dataclass
class _Pair:
    """What a fact says, in two tokens: the first of its subject, and the last of its object."""

    subject: Int[Array, ""]
    object: Int[Array, ""]

    @classmethod
    def of(cls, episode: Episode, text, length) -> "_Pair":
        return cls(text[0], text[jnp.maximum(length - _full_stop(episode) - 1, 0)])


@flax.struct.dataclass
class _Notes:
    """The scratchpad of a teacher that has no store, n facts long.

    With room for two tokens and more a fact is a pair, subject and object. A new one replaces that
    of the same subject, and where there is no room the oldest is dropped. With room for one token
    it is the object of the newest fact.
    """

    subjects: Int[Array, " n"]
    objects: Int[Array, " n"]
    count: Int[Array, ""]
    width: int = flax.struct.field(pytree_node=False)  # tokens of a fact, 1 or 2

    @property
    def holds_subjects(self) -> bool:
        return self.width == 2

    @classmethod
    def read(cls, view: View) -> "_Notes":
        pad, size = view.observation.scratchpad, view.observation.scratchpad_length
        width = min(pad.shape[0], 2)
        facts = pad[: pad.shape[0] // width * width].reshape(-1, width)
        return cls(facts[:, 0], facts[:, -1], jnp.minimum(size // width, len(facts)), width)

    def text(self) -> tuple[Int[Array, " w"], Int[Array, ""]]:
        """Tokens and their number."""
        facts = jnp.stack([self.subjects, self.objects], axis=1)[:, 2 - self.width :]
        return facts.reshape(-1), self.count * self.width

    def add(self, pair: _Pair) -> "_Notes":
        room = self.subjects.shape[0]
        places = jnp.arange(room)
        keep = places < self.count
        if self.holds_subjects:
            keep &= self.subjects != pair.subject
        kept = jnp.sum(keep)
        order = jnp.argsort(~keep, stable=True)
        start = jnp.maximum(kept + 1 - room, 0)

        def append(values, new):
            longer = jnp.append(values[order], new).at[kept].set(new)
            return jnp.roll(longer, -start)[:room]

        return dataclasses.replace(
            self,
            subjects=append(self.subjects, pair.subject),
            objects=append(self.objects, pair.object),
            count=jnp.minimum(kept + 1, room).astype(jnp.int32),
        )

    def holds(self, pair: _Pair) -> Bool[Array, ""]:
        same = self.objects == pair.object
        if self.holds_subjects:
            same &= self.subjects == pair.subject
        return jnp.any(same & (jnp.arange(same.shape[0]) < self.count))


def _read_chunk(c: TeacherConfig, script: Script, view: View, episode: Episode, key):
    """Actions of a reading turn."""
    a: Annotations = episode.annotations
    query_is_empty = view.observation.query_length == 0
    chance = jax.random.uniform(jax.random.fold_in(key, 0))
    ask = (view.chunk == 0) & query_is_empty & (chance < c.set_query)
    ask &= not c.scratchpad_only  # a read would retrieve nothing and keep the chunk
    query = script.action(ActionKind.READ, ask, a.focus, a.focus_length)
    chunk = jnp.maximum(view.chunk - episode.first_chunk, 0)  # in the window
    write = _rewrite_notes if c.scratchpad_only else _edit_entries
    return [query, *write(c, script, view, episode, key, chunk)]


def _draw_stored(c: TeacherConfig, script: Script, episode: Episode, key, chunk, place):
    """Of a fact of the chunk: what is stored of it, whether it is, and two further draws."""
    a = episode.annotations
    text, length = _entry(script, episode, chunk * a.start.shape[1] + place)
    u = jax.random.uniform(jax.random.fold_in(key, 1 + place), (3,))
    rate = jnp.where(a.support[chunk, place], c.store_support, c.store_distractor)
    return text, length, (length > 0) & (u[0] < rate), u[1:]


def _rewrite_notes(c: TeacherConfig, script: Script, view: View, episode: Episode, key, chunk):
    """The scratchpad with each fact that is stored, one action a fact."""
    notes, actions = _Notes.read(view), []
    for place in range(episode.annotations.start.shape[1]):
        text, length, store, _ = _draw_stored(c, script, episode, key, chunk, place)
        written = notes.add(_Pair.of(episode, text, length))
        notes = jax.tree.map(lambda new, old, on=store: jnp.where(on, new, old), written, notes)
        actions.append(script.action(ActionKind.SCRATCHPAD, store, *notes.text()))
    return actions


def _edit_entries(c: TeacherConfig, script: Script, view: View, episode: Episode, key, chunk):
    """Each fact that is stored becomes an entry, or replaces one, in the order of the chunk."""
    a = episode.annotations

    def edit(place):
        text, length, store, u = _draw_stored(c, script, episode, key, chunk, place)
        stale, number = _where_shown(
            script, view, *_entry(script, episode, a.supersedes[chunk, place])
        )
        stale &= a.supersedes[chunk, place] != EMPTY
        update = store & stale & (u[0] < c.update_shown)
        delete = store & stale & ~update & (u[1] < c.delete)
        actions = [
            script.action(ActionKind.UPDATE, update, text, length, target=number),
            script.action(ActionKind.DELETE, delete, target=number),
            script.action(ActionKind.CREATE, store & ~update, text, length),
        ]
        tokens, real = zip(*actions, strict=True)
        return jnp.concatenate(tokens), jnp.concatenate(real)

    # Mapped: a chunk of a hundred facts is compiled as fast as one.
    tokens, real = jax.vmap(edit)(jnp.arange(a.start.shape[1], dtype=jnp.int32))
    return [(tokens.reshape(-1), real.reshape(-1))]


def _guess(
    c: TeacherConfig, view: View, episode: Episode, width: int, length
) -> Int[Array, " width"]:
    """An extractive guess: the end of the best entry shown (or of the notes), full stop aside."""
    o = view.observation
    if c.scratchpad_only:
        source, size = o.scratchpad, o.scratchpad_length
    else:
        source, size = o.shown[0], o.shown_lengths[0] - _full_stop(episode)
    question = jnp.maximum(view.question, 0)
    none = size <= 0
    source = jnp.pad(source, (0, max(0, width - source.shape[0])))
    taken = jnp.roll(source, -jnp.maximum(size - length, 0))[:width]
    return jnp.where(none, o.questions[question][:1], taken)


def _name_needed(
    script: Script,
    episode: Episode,
    needs: Int[Array, " M"],
    shown: Bool[Array, " M"],
    missing: Int[Array, ""],
    width: int,
) -> tuple[Int[Array, " w"], Int[Array, ""]]:
    """A query for a missing fact that finds those that are shown again: the subjects of all.

    It shows other entries than the last one did. By the missing subject alone it would lose, in a
    memory of more entries than are shown, what was found before, and never see all of them at once.
    The missing one comes first; a subject that several facts share is named once.
    """
    a = episode.annotations
    facts = a.start.shape[1]

    def read_subject(index):
        text, _ = _entry(script, episode, index)
        place = jnp.maximum(index, 0)
        length = a.subject_length[place // facts, place % facts]
        return jnp.where(jnp.arange(text.shape[0]) < length, text, script.pad_id), length

    tokens, lengths = jax.vmap(read_subject)(jnp.append(missing, needs))
    told = jnp.append(missing != EMPTY, shown)
    same = jnp.all(tokens[:, None] == tokens[None], axis=2) & told[None]
    told &= ~jnp.any(jnp.tril(same, -1), axis=1)
    real = told[:, None] & (jnp.arange(tokens.shape[1])[None] < lengths[:, None])
    return prompting.join(
        tokens.reshape(-1), real.reshape(-1), width=width, pad_id=script.pad_id, left_pad=False
    )


def _answer(c: TeacherConfig, script: Script, view: View, episode: Episode, key):
    """Actions of an answering turn: an answer, or a read for the first missing fact."""
    a = episode.annotations
    q = jnp.maximum(view.question, 0)
    gold, gold_length = a.gold[q], a.gold_length[q]
    # Hop by hop: a later fact can be asked for only once the one before it is shown.
    known = jnp.ones((), bool)
    missing = jnp.full((), EMPTY, jnp.int32)
    shown = []
    for hop in range(a.needs.shape[1]):
        index = a.needs[q, hop]
        found, _ = _where_shown(script, view, *_entry(script, episode, index))
        needed = index != EMPTY
        missing = jnp.where(known & needed & ~found, index, missing)
        known &= found | ~needed
        shown.append(found & needed)
    if c.scratchpad_only:
        notes, known = _Notes.read(view), jnp.ones((), bool)
        last = jnp.sum(a.needs[q] != EMPTY) - 1
        for hop in range(a.needs.shape[1]):
            index = a.needs[q, hop]
            pair = _Pair.of(episode, *_entry(script, episode, index))
            # Room for objects alone is room for what the last hop gives.
            asked = (index != EMPTY) & (notes.holds_subjects | (hop == last))
            known &= notes.holds(pair) | ~asked
    u = jax.random.uniform(jax.random.fold_in(key, 0), (3,))
    read = (view.phase == Phase.ANSWERING) & ~known & (u[0] < c.read_missing)
    read &= not c.scratchpad_only
    question, question_length = episode.questions[q], episode.question_lengths[q]
    tail = jnp.roll(question, -jnp.maximum(question_length - 2, 0))
    query, query_length = _name_needed(
        script, episode, a.needs[q], jnp.stack(shown), missing, view.observation.query.shape[0]
    )
    width = max(query.shape[0], question.shape[0])
    tail, query = (jnp.pad(x, (0, width - x.shape[0])) for x in (tail, query))
    bad = u[1] < c.read_badly
    query = jnp.where(bad, tail, query)
    query_length = jnp.where(bad, jnp.minimum(question_length, 2), query_length)
    right = known & (u[2] < c.answer_known)
    guess = _guess(c, view, episode, gold.shape[0], gold_length)
    answer = jnp.where(right, gold, guess)
    return [
        script.action(ActionKind.READ, read, query, query_length),
        script.action(ActionKind.ANSWER, ~read, answer, gold_length),
    ]


def policy(config: TeacherConfig, script: Script) -> Policy:
    """The teacher as a rollout policy; its log-probs and values are 0."""

    def write(view: View, episode: Episode, key: PRNGKeyArray) -> tuple[Turn, Turn]:
        reading = script.write(_read_chunk(config, script, view, episode, key))
        return reading, script.write(_answer(config, script, view, episode, key))

    return make_policy(write)


def make_policy(write: Callable[[View, Episode, PRNGKeyArray], tuple[Turn, Turn]]) -> Policy:
    """The policy of a script that writes two turns of a trajectory: for reading, and for answering.

    The phase tells which of them is played.
    """

    def respond_one(view: View, episode: Episode, key: PRNGKeyArray) -> Turn:
        reading, answering = write(view, episode, key)
        return jax.tree.map(
            lambda r, a: jnp.where(view.phase == Phase.READING, r, a), reading, answering
        )

    def respond(views: View, episodes: Episode, keys: PRNGKeyArray) -> Response:
        tokens, lengths = jax.vmap(respond_one)(views, episodes, keys)
        return Response.of_program(tokens, lengths)

    return respond
