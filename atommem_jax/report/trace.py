"""The memory trace of an episode: what was shown, written and kept, turn by turn, as plain data.

`replay` gives back what the record of a trajectory leaves out; `describe` makes dictionaries of
both that JSON can hold.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.learning import environment, evaluation, life_cycle, reward
from atommem_jax.learning.table_history import SCRATCHPAD
from atommem_jax.report.replay import Replay, recover, replay
from atommem_jax.types import (
    EMPTY,
    ActionKind,
    Episode,
    MemoryState,
    Phase,
    Trajectory,
    Turns,
)

Data = dict[str, Any]

_FATES = ("applied", "invalid", "rejected", "truncated", "evicted")
_NEEDS_TEXT = (ActionKind.CREATE, ActionKind.READ, ActionKind.UPDATE, ActionKind.ANSWER)
_TARGETED = (ActionKind.UPDATE, ActionKind.DELETE)
_EVENTS = {
    ActionKind.CREATE: "added",
    ActionKind.UPDATE: "updated",
    ActionKind.DELETE: "deleted",
}


# ---------------------------------------------------------------------------------------------
# Describing


def describe(
    setting: environment.Setting,
    trajectories: Trajectory,
    episodes: Episode,
    tokenizer: Tokenizer,
    aliases: Sequence[Sequence[Sequence[str]]],
    start: MemoryState | None = None,
) -> list[Data]:
    """One dictionary an episode, of nothing but what JSON knows.

    Args:
      setting: the one that the trajectories were played in.
      trajectories: with fields [B, ...].
      episodes: theirs, in the same order.
      tokenizer: of the run.
      aliases: [b][q] -> accepted answers; none where it is not known which are right.
      start: what was remembered before the first turn, with fields [B, ...]; None for nothing.

    Returns:
      Per episode `episode`, `trajectory` (their ids), `em`, `chunks`, `slots`, `start`, `questions`
      (text, gold, answer, em; stage and facts, see `describe_path`) and `turns`. A turn holds
      `phase`, `chunk` and `question` (numbers or None), `scripted`, `query`, `shown`, `response` as
      generated, `actions` with what became of each, `changes` of the table and of the
      `scratchpad`, and `entries`, their number before and after. `start` lists the entries before
      the first turn (slot, text): applying the changes of all turns up to one gives the table
      there. An `em` is None where nothing is known to be right.

    Raises ValueError as `replay` does.
    """
    trajectories, episodes, start = jax.device_get((trajectories, episodes, start))
    played = replay(setting, trajectories, episodes, start)
    answers, lengths = np.asarray(trajectories.answers), np.asarray(trajectories.answer_lengths)
    texts = evaluation.decode_answers(answers, lengths, tokenizer.decode)
    described = []
    for b, accepted in enumerate(aliases):
        trajectory, episode, lacked, table = jax.tree.map(
            lambda x, b=b: x[b], (trajectories, episodes, played, start)
        )
        live = np.flatnonzero(trajectory.turns.live)
        paths = []
        if accepted and all(accepted):
            scores = [reward.exact_match(texts[b][q], gold) for q, gold in enumerate(accepted)]
            paths = life_cycle.follow(
                trajectory,
                episode,
                [score == 1 for score in scores],
                decode=tokenizer.decode,
                eviction=setting.limits.memory.eviction,
                start=table,
            )
        turns = [jax.tree.map(lambda x, t=t: x[t], (trajectory.turns, lacked)) for t in live]
        described.append(
            describe_episode(
                setting,
                episode,
                tokenizer,
                trajectory=int(trajectory.id),
                answers=texts[b],
                aliases=accepted,
                turns=[_Describer(setting, tokenizer, *turn).describe() for turn in turns],
                start=table,
                paths=[describe_path(path, episode, tokenizer, live) for path in paths],
            )
        )
    return described


def describe_turn(
    setting: environment.Setting,
    tokenizer: Tokenizer,
    before: MemoryState,
    after: MemoryState,
    turn: Turns,
) -> Data:
    """One turn as `describe` gives it, while its episode goes on.

    Args:
      setting: the one that it was played in.
      tokenizer: of the run.
      before: memory as the turn saw it, after retrieval.
      after: memory after its actions.
      turn: its record; like both memories without leading axes.
    """
    turn, lacked = jax.device_get((turn, _recover_jit(setting, before, after, turn)))
    return _Describer(setting, tokenizer, turn, lacked).describe()


_recover_jit = jax.jit(recover)


def describe_episode(
    setting: environment.Setting,
    episode: Episode,
    tokenizer: Tokenizer,
    *,
    trajectory: int,
    answers: Sequence[str],
    aliases: Sequence[Sequence[str]],
    turns: list[Data],
    start: MemoryState | None = None,
    paths: Sequence[Data] = (),
) -> Data:
    """The dictionary of one episode; see `describe`.

    Args:
      setting: the one that it was played in.
      episode: without a leading axis, on the host.
      tokenizer: of the run.
      trajectory: its id.
      answers: one a question; '' where none was given.
      aliases: [q] -> accepted answers.
      turns: of `describe_turn`.
      start: memory before the first turn, without a leading axis; None for nothing.
      paths: one a question, of `describe_path`; none where no facts are known.
    """
    questions = _describe_questions(episode, answers, aliases, tokenizer)
    for question, path in zip(questions, paths, strict=False):
        question |= path
    scores = [question["em"] for question in questions if question["em"] is not None]
    return {
        "episode": int(episode.id),
        "trajectory": trajectory,
        "em": float(np.mean(scores)) if scores else None,
        "slots": setting.limits.memory.slots,
        "start": [] if start is None else describe_table(start, tokenizer),
        "chunks": [
            tokenizer.decode(episode.chunks[c, : episode.chunk_lengths[c]].tolist())
            for c in range(int(episode.num_chunks))
        ],
        "questions": questions,
        "turns": turns,
    }


def describe_table(state: MemoryState, tokenizer: Tokenizer) -> list[Data]:
    """The entries of a memory without a leading axis: `slot` and `text`, by slot."""
    entries, lengths, valid = jax.device_get((state.entries, state.lengths, state.valid))
    return [
        {"slot": int(slot), "text": tokenizer.decode(entries[slot, : lengths[slot]].tolist())}
        for slot in np.flatnonzero(valid)
    ]


def _describe_questions(
    episode: Episode, answers: Sequence[str], accepted: Sequence[Sequence[str]], tokenizer
) -> list[Data]:
    return [
        {
            "text": tokenizer.decode(
                episode.questions[q, : int(episode.question_lengths[q])].tolist()
            ),
            "gold": list(gold),
            "answer": answers[q],
            "em": float(reward.exact_match(answers[q], gold)) if gold else None,
        }
        for q, gold in enumerate(accepted)
    ]


def describe_path(
    path: life_cycle.QuestionPath, episode: Episode, tokenizer: Tokenizer, live: np.ndarray
) -> Data:
    """What became of the facts that a question needs: `stage` and `facts`.

    A fact has its `text`, the `note` to be stored of it ('' for the text itself), its `chunk`, its
    `stage` (None where it was there when needed), `events` as (turn, what), and `holders` as
    (turn, slots that hold it after the turn, 'scratchpad' among them), where they change.

    live: rows of the record that took place, which are the turns of the page.
    """
    turns = {int(row): t for t, row in enumerate(live)}
    a = episode.annotations
    facts = []
    for fact in path.facts:
        c, u = divmod(fact.fact, a.start.shape[1])
        first, note = int(a.start[c, u]), a.note[c, u, : int(a.note_length[c, u])].tolist()
        sentence = episode.chunks[c, first : first + int(a.length[c, u])].tolist()
        facts.append(
            {
                "text": tokenizer.decode(sentence).strip(),
                "note": tokenizer.decode(note),
                "chunk": fact.chunk,
                "stage": fact.stage and fact.stage.value,
                "events": [[turns[event.row], event.what] for event in fact.events],
                "holders": [
                    [turns[row], ["scratchpad" if slot == SCRATCHPAD else slot for slot in slots]]
                    for row, slots in fact.holders
                ],
                "updates": fact.updates,
                "survived": round(fact.survived, 3),
            }
        )
    return {"stage": path.stage and path.stage.value, "facts": facts}


class _Describer:
    """One turn in words."""

    def __init__(
        self, setting: environment.Setting, tokenizer: Tokenizer, turn: Turns, lacked: Replay
    ):
        self.setting, self.tokenizer, self.turn, self.lacked = setting, tokenizer, turn, lacked

    def describe(self) -> Data:
        """The dictionary of the turn."""
        turn, before, after = self.turn, self.lacked.before, self.lacked.after
        actions = [self._describe_action(a) for a in range(int(turn.actions.count))]
        response = turn.response[: int(turn.response_lengths)].tolist()
        return {
            "phase": Phase(int(turn.phase)).name.lower(),
            "chunk": _number(turn.chunk),
            "question": _number(turn.question),
            "scripted": bool(turn.scripted),
            "query": self._text(before.query, before.query_length),
            "shown": self._describe_shown(),
            "response": spell(self.tokenizer, response),
            "actions": actions,
            "changes": self._describe_changes(actions),
            "entries": [int(before.valid.sum()), int(after.valid.sum())],
            "scratchpad": diff(
                self._text(before.scratchpad, before.scratchpad_length),
                self._text(after.scratchpad, after.scratchpad_length),
            ),
        }

    def _text(self, tokens, length) -> str:
        return self.tokenizer.decode(tokens[: int(length)].tolist())

    def _describe_shown(self) -> list[Data]:
        before = self.lacked.before
        return [
            {
                "number": k + 1,
                "slot": int(slot),
                "text": self._text(before.entries[slot], before.lengths[slot]),
                "cosine": round(float(self.turn.shown_scores[k]), 4),
            }
            for k, slot in enumerate(self.turn.shown)
            if slot != EMPTY
        ]

    def _describe_action(self, a: int) -> Data:
        actions = self.turn.actions
        kind, length = ActionKind(int(actions.kind[a])), int(actions.length[a])
        fates = [name for name in _FATES if getattr(self.lacked.fates, name)[a].any()]
        kept = min(length, self._cap(kind))
        action = {
            "kind": kind.name.lower(),
            "target": int(actions.target[a]) if kind in _TARGETED else None,
            "text": self._text(self.lacked.written[a], length),
            "fates": fates,
            "slot": _number(self.lacked.slots[a]),
            "was": self._text(self.lacked.ousted[a], self.lacked.ousted_lengths[a]),
            "tokens": length,
        }
        if "truncated" in fates:
            action |= {"kept": self._text(actions.text[a], kept), "kept_tokens": kept}
        if "invalid" in fates:
            action["why"] = self._explain(kind, a)
        return action

    def _cap(self, kind: ActionKind) -> int:
        sizes = self.setting.limits.memory
        caps = {
            ActionKind.CREATE: sizes.entry_length,
            ActionKind.UPDATE: sizes.entry_length,
            ActionKind.READ: sizes.query_length,
            ActionKind.SCRATCHPAD: sizes.scratchpad_length,
        }
        width = self.setting.grammar.max_text
        return min(caps.get(kind, width), width)

    def _explain(self, kind: ActionKind, a: int) -> str:
        """Why an invalid action was one."""
        actions, phase = self.turn.actions, Phase(int(self.turn.phase)).name.lower()
        if not actions.well_formed[a]:
            return "malformed: not closed, or its target cannot be read"
        if not self.lacked.permitted[kind]:
            doing = "on the last turn of a question" if phase == "final" else f"while {phase}"
            return f"not allowed {doing}"
        if kind in _NEEDS_TEXT and not actions.length[a]:
            return "it has no text"
        target, shown = int(actions.target[a]), self.turn.shown
        if not 1 <= target <= len(shown) or shown[target - 1] == EMPTY:
            return f"nothing is shown as Memory {target}" if target else "no such number is shown"
        return f"Memory {target} was deleted or evicted earlier in this turn"

    def _describe_changes(self, actions: Iterable[Data]) -> list[Data]:
        """Slots that the turn wrote to, with the entries before and after it."""
        before, after = self.lacked.before, self.lacked.after
        events: dict[int, list[str]] = {}
        for action in actions:
            event = _EVENTS.get(ActionKind[action["kind"].upper()])
            if event is None or action["slot"] is None:
                continue
            told = events.setdefault(action["slot"], [])
            told += ["evicted", event] if "evicted" in action["fates"] else [event]
        return [
            {
                "slot": slot,
                "events": told,
                "before": self._entry(before, slot),
                "after": self._entry(after, slot),
            }
            for slot, told in sorted(events.items())
        ]

    def _entry(self, state: MemoryState, slot: int) -> str | None:
        if not state.valid[slot]:
            return None
        return self._text(state.entries[slot], state.lengths[slot])


def _number(index) -> int | None:
    return None if index == EMPTY else int(index)


def spell(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of a response with the names of its reserved tokens; pad and eos are left out."""
    names = {token: name for name, token in tokenizer.reserved.items()}
    pieces: list[str] = []
    run: list[int] = []
    for token in [*ids, tokenizer.eos_id]:
        if token in names or token == tokenizer.eos_id:
            pieces += [tokenizer.decode(run), names.get(token, "")]
            run = []
        else:
            run.append(token)
    return "".join(pieces)


def diff(before: str, after: str) -> list[list[str]]:
    """Runs of words as pairs ('same', 'removed' or 'added'; text) that lead from one to the other.

    What is not removed spells `after`, what is not added spells `before`.
    """
    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (before, after))
    runs = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            runs.append(["same", "".join(old[i:j])])
            continue
        runs += [["removed", "".join(old[i:j])], ["added", "".join(new[k:m])]]
    return [run for run in runs if run[1]]


# ---------------------------------------------------------------------------------------------
# Choosing


def choose(em: Sequence[float], count: int) -> list[int]:
    """Rows worth looking at: half of them wrong somewhere and half right, as far as there are.

    Args:
      em: share of right answers of each row.
      count: how many rows at the most.

    Returns:
      Rows in their own order; the first ones of either sort.
    """
    wrong = [row for row, score in enumerate(em) if score < 1.0]
    right = [row for row, score in enumerate(em) if score >= 1.0]
    taken = max((count + 1) // 2, count - len(right))
    some = wrong[:taken]
    return sorted([*some, *right[: count - len(some)]])
