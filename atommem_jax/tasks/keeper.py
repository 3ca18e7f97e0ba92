"""The scripted teacher of the village task, and what is left of it without one operation.

The keeper acts on what the agent sees: the chunk, the questions, the entry shown, the standing
query and the scratchpad of a turn's observation. Of the annotations it uses only where each
sentence begins and what kind of sentence it is (`village.Relation`), as a reader of English would;
it is not told what is worth storing, what replaces what, or any answer.

What a turn does follows one rule. A chunk that changes an entry *wants* it shown: the person who
has a new employer, the thing that is lost, the firm whose city is told. Where the standing query
is another, the turn reads, and counts the bell that rings; the chunk comes again, and now the
entry is shown: the turn updates, deletes and creates. A chunk that wants nothing takes one turn.
The question puts its own first word as the standing query, which is the subject of the last hop: it
is read first, and the answer is the name in the entry shown, or the number in the scratchpad.

`TeacherConfig` holds the rates of mistakes. `Habits` holds what a script lacks and what it does
instead: `ABLATED` are the best scripts that were thought of without one operation each, which
`experiments/validity.py` compares with the whole.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from atommem_jax.config import TeacherConfig
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.tasks import village
from atommem_jax.tasks.teacher import Script, Turn, make_policy
from atommem_jax.tasks.village import Relation
from atommem_jax.types import (
    EDITS,
    EMPTY,
    NUM_KINDS,
    ActionKind,
    Episode,
    Phase,
    Policy,
    View,
)

ENTRY = 3
"""Tokens of an entry: whom it is about, and a name of two words."""

FEWEST_ACTIONS = 2
"""Of a turn: an employer is updated and a thing created, or a read is made and a bell counted."""

_WORKER, _HOLDER, _BELLS = range(3)
_RELATIONS = np.array([village.RELATIONS[c] for c in village.FactCategory], np.int32)


class Habits(NamedTuple):
    """What a script can do, and what it does in place of what it cannot.

    Leaves may be traced: all scripts of a task share one program.
    """

    kinds: tuple[bool, ...] = (True,) * NUM_KINDS  # by ActionKind: which it has
    order: tuple[int, ...] = (_HOLDER, _WORKER, _BELLS)  # what comes first where two disagree
    recycle: bool = False  # a lost thing becomes junk, which a later one is written over
    tally: bool = False  # bells are counted in an entry
    firm_note: bool = False  # the firm is noted in the scratchpad; bells are not counted
    firm_query: bool = False  # the firm is noted in the standing query, and has no entry
    all_cities: bool = False  # the city of every firm has an entry, and none is brought together
    keep_stale: bool = False  # a new employer is stored beside the old one
    reset: bool = False  # an edit with room beside it reads, so that the query finds no entry


def _without(*kinds: ActionKind) -> tuple[bool, ...]:
    return tuple(kind not in kinds for kind in ActionKind)


def _vary(kinds: Iterable[ActionKind], *choices: str) -> tuple[Habits, ...]:
    """All orders, with and without each of the habits named, of a script that lacks `kinds`."""
    orders = itertools.permutations(range(3))
    switches = itertools.product((False, True), repeat=len(choices))
    flags = [dict(zip(choices, on, strict=True)) for on in switches]
    return tuple(
        Habits(kinds=_without(*kinds), order=order, reset=True, **flag)
        for order in orders
        for flag in flags
    )


ABLATED: Mapping[str, tuple[Habits, ...]] = {
    "no_update": _vary([ActionKind.UPDATE], "firm_query", "keep_stale"),
    "no_delete": _vary([ActionKind.DELETE], "recycle", "firm_query", "all_cities"),
    "no_scratchpad": _vary([ActionKind.SCRATCHPAD], "tally", "firm_query"),
    "no_read": _vary([ActionKind.READ], "firm_note", "all_cities"),
    "no_store": _vary(EDITS, "firm_note"),
}
"""Scripts without one operation each (all that edits entries is one): the best of each counts."""

BEST_ABLATED: Mapping[str, Habits] = {
    "no_update": Habits(_without(ActionKind.UPDATE), (_WORKER, _HOLDER, _BELLS), reset=True),
    "no_delete": Habits(
        _without(ActionKind.DELETE), (_WORKER, _HOLDER, _BELLS), recycle=True, reset=True
    ),
    "no_scratchpad": Habits(
        _without(ActionKind.SCRATCHPAD), (_HOLDER, _WORKER, _BELLS), reset=True
    ),
    "no_read": Habits(_without(ActionKind.READ), (_HOLDER, _BELLS, _WORKER), reset=True),
    "no_store": Habits(_without(*EDITS), (_WORKER, _HOLDER, _BELLS), reset=True),
}
"""Workflow -> the one of `ABLATED` that had the most right answers at every scale, over 128 test
episodes each: what SFT imitates where the workflow lacks the operation."""


@dataclasses.dataclass(frozen=True)
class Words:
    """Ids of the words that the keeper knows."""

    bells: int  # first of the question about the bells
    numbers: tuple[int, ...]  # number words, from one on
    city: int  # of the question about the city, and of no other
    firms: tuple[int, ...]  # last words of the names of firms
    junk: int  # what an entry is overwritten with that can be used again

    @classmethod
    def compile(cls, tokenizer: Tokenizer) -> "Words":
        """Raises ValueError, naming the first word that is not one token."""
        return cls(
            bells=_find_word(tokenizer, village.BELLS),
            numbers=tuple(_find_word(tokenizer, word) for word in village.NUMBERS),
            city=_find_word(tokenizer, "city"),
            firms=tuple(
                sorted({_find_word(tokenizer, n.split()[-1]) for n in village.make_world().firms})
            ),
            junk=_find_word(tokenizer, "A"),
        )


def _find_word(tokenizer: Tokenizer, word: str) -> int:
    ids = tokenizer.encode(word)
    if len(ids) != 1:
        raise ValueError(
            f"tokenizer: {word!r} has {len(ids)} tokens; the scripted teacher of the village task "
            "needs 1. Raise tokenizer.vocab_size, or collect a teacher's turns with collect.py."
        )
    return ids[0]


class _Sight(NamedTuple):
    """What the keeper sees of a turn, by its first tokens; EMPTY where there is none."""

    questions: Int[Array, " Q"]  # first words: who, or what, is asked about
    worker: Int[Array, ""]  # whose city is asked for
    shown: Int[Array, " 3"]  # the entry
    query: Int[Array, ""]
    note: Int[Array, ""]  # the scratchpad

    @classmethod
    def of(cls, view: View, words: Words) -> "_Sight":
        o = view.observation
        asked = o.question_lengths > 0
        about_city = asked & jnp.any(o.questions == words.city, axis=1)
        entry = jnp.pad(o.shown[0], (0, ENTRY))[:ENTRY]
        return cls(
            questions=jnp.where(asked, o.questions[:, 0], EMPTY),
            worker=o.questions[jnp.argmax(about_city), 0],
            shown=jnp.where(jnp.arange(ENTRY) < o.shown_lengths[0], entry, EMPTY),
            query=jnp.where(o.query_length > 0, o.query[0], EMPTY),
            note=jnp.where(o.scratchpad_length > 0, o.scratchpad[0], EMPTY),
        )


class _Fact(NamedTuple):
    """A sentence of the chunk; with a leading U for all of them."""

    there: Bool[Array, ""]
    relation: Int[Array, ""]
    person: Int[Array, ""]  # the first word; of a firm, the first of its name
    firm: Int[Array, " 2"]  # the first two words
    object: Int[Array, " 2"]  # the last two words before the full stop
    about: Bool[Array, ""]  # it may matter: an asked person, any firm's city, any bell
    chance: Float[Array, " 5"]  # uniform draws: noticing it, and each operation
    stray: Float[Array, ""]  # and storing what is no one's

    @classmethod
    def read(cls, view: View, episode: Episode, sight: _Sight, key: PRNGKeyArray) -> "_Fact":
        """The U facts of the chunk: the first words and the last ones of each sentence."""
        text, a = view.observation.chunk, episode.annotations
        chunk = jnp.maximum(view.chunk - episode.first_chunk, 0)
        first, stop = a.start[chunk], a.start[chunk] + a.length[chunk] - 1  # the full stop

        def words(start):
            places = start[:, None] + jnp.arange(2)[None]
            return text[jnp.clip(places, 0, text.shape[0] - 1)]

        relation = jnp.asarray(_RELATIONS)[jnp.maximum(a.category[chunk], 0)]
        of_asked = jnp.any(words(first)[:, :1] == sight.questions[None], axis=1)
        return cls(
            there=a.length[chunk] > 0,
            relation=relation,
            person=words(first)[:, 0],
            firm=words(first),
            object=words(stop - 2),
            about=of_asked | (relation == Relation.IN) | (relation == Relation.BELL),
            chance=jax.random.uniform(key, (relation.shape[0], 5)),
            stray=jax.random.uniform(jax.random.fold_in(key, 0), relation.shape),
        )

    def says(self, *relations: Relation) -> Bool[Array, ""]:
        return self.there & jnp.isin(self.relation, jnp.asarray(relations))

    def owner(self) -> Int[Array, ""]:
        """The question that it serves."""
        thing = (self.relation == Relation.GETS) | (self.relation == Relation.LOSES)
        return jnp.where(self.relation == Relation.BELL, _BELLS, jnp.where(thing, _HOLDER, _WORKER))


@flax.struct.dataclass
class _Deed:
    """What is done about a fact: at most a Delete, and one text written."""

    delete: Bool[Array, ""]
    update: Bool[Array, ""]
    create: Bool[Array, ""]
    scratch: Bool[Array, ""]
    text: Int[Array, " 3"]
    length: Int[Array, ""]

    def count(self) -> Int[Array, ""]:
        """Number of actions."""
        kinds = (self.delete, self.update, self.create, self.scratch)
        return sum((kind.astype(jnp.int32) for kind in kinds), jnp.zeros((), jnp.int32))


@dataclasses.dataclass(frozen=True)
class _Keeper:
    """A script: its rates, its habits and its words."""

    rates: TeacherConfig
    habits: Habits
    words: Words

    def has(self, kind: ActionKind) -> Bool[Array, ""]:
        return jnp.asarray(self.habits.kinds)[kind]

    def stores(self) -> Bool[Array, ""]:
        return self.has(ActionKind.CREATE) & (not self.rates.scratchpad_only)

    def want(self, fact: _Fact) -> tuple[Bool[Array, ""], Int[Array, ""], Bool[Array, ""]]:
        """(could want an entry shown, the word that finds it, does so with the luck it has)."""
        c, h = self.rates, self.habits
        own = self.stores() & ~jnp.asarray(h.firm_query)
        now = fact.says(Relation.NOW) & own & ~jnp.asarray(h.keep_stale)
        city = fact.says(Relation.IN) & own & ~jnp.asarray(h.all_cities | h.firm_note)
        # Read for even by a script that cannot delete it: then the query that stands in the next
        # chunk is another than the one that will be read for there.
        lost = fact.says(Relation.LOSES) & own
        got = fact.says(Relation.GETS) & own & h.recycle
        rung = fact.says(Relation.BELL) & own & h.tally
        noted = fact.says(Relation.WORKS, Relation.NOW) & h.firm_query
        word = jnp.select(
            [city, lost | noted, got, rung],
            [fact.firm[1], fact.object[1], self.words.junk, self.words.bells],
            fact.person,
        )
        rate = jnp.select([now | city, lost], [c.update_shown, c.forget], 1.0)
        could = (now | city | lost | got | rung | noted) & self.has(ActionKind.READ)
        return could, word, could & (fact.chance[0] < rate) & self.notices(fact)

    def notices(self, fact: _Fact) -> Bool[Array, ""]:
        """Takes it for relevant: where it errs, the teacher's noise."""
        rate = jnp.where(fact.about, self.rates.store_support, self.rates.store_distractor)
        sound = fact.says(Relation.HORN, Relation.NUMBER)
        return fact.there & ~sound & (fact.chance[1] < rate)

    def act(self, sight: _Sight, fact: _Fact, counts: Bool[Array, ""]) -> _Deed:
        """What it does about a fact that it takes for relevant; `counts`: also about a bell."""
        c, h, words = self.rates, self.habits, self.words
        about_shown = sight.shown[0] == fact.person
        update, delete = self.has(ActionKind.UPDATE), self.has(ActionKind.DELETE)

        # A new employer, and the city of the employer: both replace the entry shown.
        hired = fact.says(Relation.WORKS, Relation.NOW) & ~jnp.asarray(h.firm_query | h.firm_note)
        stale = fact.says(Relation.NOW) & about_shown & ~jnp.asarray(h.keep_stale)
        known = (sight.shown[0] == sight.worker) & jnp.all(sight.shown[1:] == fact.firm)
        noted = (h.firm_note & (sight.note == fact.firm[1])) | (
            h.firm_query & (sight.query == fact.firm[1])
        )
        stray = h.all_cities | (fact.stray < c.store_distractor)
        city = fact.says(Relation.IN) & (known | noted | stray)
        rewrite = (hired & stale) | (city & known)
        by_update = rewrite & update & (fact.chance[2] < c.update_shown)
        by_delete = rewrite & ~by_update & delete & ((fact.chance[3] < c.delete) | ~update)

        # Things: a lost one goes, or becomes junk that the next one is written over.
        held = about_shown & jnp.all(sight.shown[1:] == fact.object)
        gone = fact.says(Relation.LOSES) & held & (fact.chance[4] < c.forget)
        waste = gone & ~delete & update & h.recycle
        got = fact.says(Relation.GETS)
        over = got & h.recycle & (sight.shown[0] == words.junk) & update

        # Bells: in the scratchpad, which may serve for the firm instead, or in an entry.
        rung = fact.says(Relation.BELL) & (fact.chance[4] < c.count)
        tally = rung & h.tally
        tallied = tally & (sight.shown[0] == words.bells) & update
        note_firm = fact.says(Relation.WORKS, Relation.NOW) & h.firm_note
        scratch = (rung & counts & ~jnp.asarray(h.tally | h.firm_note)) | note_firm

        whose = jnp.where(city, jnp.where(known | noted, sight.worker, fact.firm[1]), fact.person)
        entry = jnp.concatenate([whose[None], fact.object])
        after = jnp.where(tally, sight.shown[1], sight.note)
        number = _next_number(words, jnp.where(tally & ~tallied, EMPTY, after))
        text = jnp.select(
            [waste, tally, rung, note_firm],
            [
                jnp.full(ENTRY, words.junk),
                jnp.stack([jnp.asarray(words.bells), number, number]),
                jnp.stack([number] * ENTRY),
                jnp.stack([fact.object[1]] * ENTRY),
            ],
            entry,
        )
        rewritten = (by_update | waste | over | tallied) & self.stores()
        return _Deed(
            delete=(by_delete | (gone & delete)) & self.stores(),
            update=rewritten,
            create=(hired | city | got | tally) & ~rewritten & self.stores(),
            scratch=scratch & self.has(ActionKind.SCRATCHPAD),
            text=text.astype(jnp.int32),
            length=jnp.select([tally, scratch], [2, 1], ENTRY),
        )


def longest_turn(script: Script, actions: int) -> tuple[int, int]:
    """Tokens, and actions, of the longest reading turn: one update and creates, as many as go."""
    update, create = (
        script.tokens_around(kind) + ENTRY for kind in (ActionKind.UPDATE, ActionKind.CREATE)
    )
    return update + (actions - 1) * create + 1, FEWEST_ACTIONS


def _next_number(words: Words, token: Int[Array, ""]) -> Int[Array, ""]:
    """The number word after `token`; the first one after what is none, the last after itself."""
    numbers = jnp.asarray(words.numbers, jnp.int32)
    place = jnp.argmax(numbers == token)
    following = numbers[jnp.minimum(place + 1, len(words.numbers) - 1)]
    return jnp.where(jnp.any(numbers == token), following, numbers[0])


def _read_chunk(keeper: _Keeper, script: Script, actions: int, sight: _Sight, facts: _Fact):
    """Actions of a reading turn, at most `actions` of them."""
    could, word, wants = jax.vmap(keeper.want)(facts)
    # What was read for in the turn before is not forgotten in this one.
    pursued = could & (word == sight.query) & (facts.about | (facts.person == word))
    acts = jnp.any(pursued) | ~jnp.any(wants)
    order = jnp.asarray(keeper.habits.order)
    rank = jnp.argmax(order[None] == facts.owner()[:, None], axis=1)
    choice = jnp.argmin(jnp.where(wants, rank, len(keeper.habits.order)))
    read = script.action(ActionKind.READ, ~acts, word[choice][None], 1)

    luck = jnp.where(pursued[:, None], 0.0, facts.chance)
    facts = facts._replace(chance=luck)
    counts = ~jnp.any(pursued)  # else it was counted in the turn before
    deeds = jax.vmap(lambda fact: keeper.act(sight, fact, counts))(facts)
    done = jax.vmap(keeper.notices)(facts) & (acts | (facts.relation == Relation.BELL))
    room = jnp.where(acts, actions, actions - 1)
    places = jnp.argsort(rank, stable=True)
    spent = jnp.zeros((), jnp.int32)
    written, edited = [], []
    for i in range(places.shape[0]):
        deed = jax.tree.map(lambda leaf, at=places[i]: leaf[at], deeds)
        fits = done[places[i]] & (spent + deed.count() <= room)
        # A tally is an entry, which is not for a turn that only reads.
        fits &= acts | ~(deed.create | deed.update)
        spent += jnp.where(fits, deed.count(), 0)
        edited.append(fits & (deed.delete | deed.update | deed.create))
        target = jnp.asarray(1)
        written += [
            script.action(ActionKind.DELETE, fits & deed.delete, target=target),
            script.action(ActionKind.UPDATE, fits & deed.update, deed.text, deed.length, target),
            script.action(ActionKind.CREATE, fits & deed.create, deed.text, deed.length),
            script.action(ActionKind.SCRATCHPAD, fits & deed.scratch, deed.text[:1], 1),
        ]
    edits = functools.reduce(jnp.logical_or, edited)
    reset = (
        keeper.habits.reset
        & ~jnp.asarray(keeper.habits.firm_query)
        & acts
        & edits
        & (spent < actions)
        & keeper.has(ActionKind.READ)
    )
    return [
        read,
        *written,
        script.action(ActionKind.READ, reset, jnp.asarray([keeper.words.city]), 1),
    ]


def _answer(keeper: _Keeper, script: Script, view: View, sight: _Sight, key: PRNGKeyArray):
    """Actions of an answering turn: what the entry, or the scratchpad, holds of what is asked."""
    h, words = keeper.habits, keeper.words
    asked = view.observation.questions[jnp.maximum(view.question, 0), 0]
    knows = jax.random.uniform(key) < keeper.rates.answer_known
    count = jnp.where(jnp.asarray(h.tally), sight.shown[1], sight.note)
    usual = words.numbers[len(words.numbers) // 2]  # a guess
    is_number = jnp.any(jnp.asarray(words.numbers) == count)
    number = jnp.where(is_number & knows, count, usual)
    # An entry that names a firm is not the last hop's: that of the firm's city may be there.
    firm = jnp.any(jnp.asarray(words.firms) == sight.shown[2]) & (sight.shown[0] == asked)
    read = firm & (view.phase == Phase.ANSWERING) & keeper.has(ActionKind.READ)
    read &= jax.random.uniform(jax.random.fold_in(key, 0)) < keeper.rates.read_missing
    about_bells = asked == words.bells
    nothing = jnp.any(sight.shown == EMPTY) | ~knows
    name = jnp.where(nothing, asked, sight.shown[1:])
    text = jnp.where(about_bells, number, name)
    length = jnp.where(about_bells | nothing, 1, 2)
    return [
        script.action(ActionKind.READ, read & ~about_bells, sight.shown[2:], 1),
        script.action(ActionKind.ANSWER, ~read | about_bells, text, length),
    ]


def policy(
    config: TeacherConfig,
    script: Script,
    words: Words,
    *,
    actions: int,
    habits: Habits | None = None,
) -> Policy:
    """The keeper as a rollout policy; its log-probs and values are 0.

    Args:
      config: rates of its mistakes; may hold traced numbers.
      script: writes its actions.
      words: ids of the words that it knows.
      actions: most actions of a turn.
      habits: what it lacks, and does instead; None for what it should do. May be traced.
    """
    keeper = _Keeper(config, Habits() if habits is None else habits, words)

    def write(view: View, episode: Episode, key: PRNGKeyArray) -> tuple[Turn, Turn]:
        sight = _Sight.of(view, words)
        facts = _Fact.read(view, episode, sight, jax.random.fold_in(key, 0))
        reading = script.write(_read_chunk(keeper, script, actions, sight, facts))
        key = jax.random.fold_in(key, 1)
        return reading, script.write(_answer(keeper, script, view, sight, key))

    return make_policy(write)
