"""Episodes driven turn by turn from the host: prompts, parsing, phases and memory in Python.

The rules are those of `rollout`, `prompt` and `grammar` for protocols whose tags are single
tokens. What turns prompts into responses is handed in: JAX programs (`jax_responders`) or PyTorch
(`torch_sampling`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from atommem_jax.language import prompt as prompting
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.learning.environment import EpisodeLimits, Setting
from atommem_jax.model.sampling import Agent
from atommem_jax.types import EDITS, PERMITTED, ActionKind, Episode, Phase
from experiments.benchmarks.host_memory import (
    HostAction,
    HostEmbedding,
    HostMemory,
    Text,
    apply_all,
    retrieve_all,
)


@dataclasses.dataclass
class Reply:
    """What was said in one turn."""

    tokens: Text  # end-of-sequence included
    log_probs: list[float]


Respond = Callable[[list[Text], list[Phase], list[int], int], list[Reply]]
"""(prompts, phases, trajectories, turn) -> replies: one call for all live trajectories."""


@dataclasses.dataclass
class HostTurn:
    """The record of a turn, as training would need it."""

    trajectory: int
    phase: Phase
    prompt: Text
    reply: Reply
    actions: list[HostAction]


class HostParser:
    """The lenient reading of `Grammar.parse`, one token after the other."""

    def __init__(self, tokenizer: Tokenizer, agent: Agent):
        reserved, shown = tokenizer.reserved, agent.template.shown
        self._opens = {reserved[f"<{kind.name.lower()}>"]: kind for kind in list(ActionKind)[1:]}
        self._targets = {reserved[f"<{i}>"]: i for i in range(1, shown + 1)}
        self._end = reserved["<end>"]
        self._stops = {tokenizer.eos_id, tokenizer.pad_id}
        self._is_text = [bool(piece) for piece in tokenizer.token_bytes]
        self._max_actions, self._max_text = agent.grammar.max_actions, agent.grammar.max_text

    def __call__(self, tokens: Text) -> list[HostAction]:
        """All actions, whatever their phase; `well_formed` says whether each is as it should."""
        actions: list[HostAction] = []
        action, awaits_target = None, False
        for token in tokens:
            if token in self._stops:
                break
            if token in self._opens:
                kind = self._opens[token]
                action = HostAction(kind, well_formed=False)
                actions.append(action)
                awaits_target = kind in (ActionKind.UPDATE, ActionKind.DELETE)
                missing = awaits_target
            elif action is None:
                continue
            elif awaits_target and token in self._targets:
                action.target, awaits_target, missing = self._targets[token], False, False
            elif token == self._end:
                delete_with_text = action.kind == ActionKind.DELETE and action.text
                action.well_formed = not missing and not delete_with_text
                action = None
            elif not self._is_text[token]:
                action = None
            else:
                awaits_target = False
                action.text.append(token)
        for action in actions:
            action.text = action.text[: self._max_text]
        return actions[: self._max_actions]


class HostPrompter:
    """The prompt of `prompt.assemble`, as a list without padding."""

    def __init__(self, template: prompting.Template):
        def ids(header) -> Text:
            return [int(i) for i in np.asarray(header) if i != template.pad_id]

        self._question, self._notes = ids(template.question), ids(template.scratchpad)
        self._query, self._chunk = ids(template.query), ids(template.chunk)
        self._memory = [ids(row) for row in np.asarray(template.memory)]
        self._suffix = [ids(row) for row in np.asarray(template.suffix)]

    def __call__(
        self,
        phase: Phase,
        questions: Sequence[Text],
        scratchpad: Text,
        query: Text,
        shown: Sequence[Text],
        chunk: Text,
    ) -> Text:
        """Segments without text have no header either."""
        pieces = [(self._question, text) for text in questions]
        pieces += [(self._notes, scratchpad), (self._query, query)]
        pieces += [(self._memory[i], text) for i, text in enumerate(shown)]
        pieces.append((self._chunk, chunk))
        prompt: Text = []
        for header, text in pieces:
            if text:
                prompt += header
                prompt += text
        return prompt + self._suffix[phase]


class HostEpisode:
    """Where one trajectory stands."""

    def __init__(self, chunks: list[Text], questions: list[Text], memory: HostMemory):
        self.chunks, self.questions, self.memory = chunks, questions, memory
        self.phase, self.chunk, self.question, self.reads = Phase.READING, 0, 0, 0
        self.answers: list[Text] = [[] for _ in questions]

    def observe(self, prompter: HostPrompter, shown: list[Text]) -> Text:
        """The prompt of this turn."""
        reading = self.phase == Phase.READING
        return prompter(
            self.phase,
            self.questions if reading else [self.questions[self.question]],
            self.memory.scratchpad,
            self.memory.query,
            shown,
            self.chunks[self.chunk] if reading else [],
        )

    def advance(self, actions: list[HostAction], applied: list[bool], config: EpisodeLimits):
        """Moves on by the rule of `environment.end_turn`."""
        done = [action.kind for action, ok in zip(actions, applied, strict=True) if ok]
        has_read = ActionKind.READ in done
        if self.phase == Phase.READING:
            edited = any(kind in EDITS for kind in done)
            stay = has_read and not edited and self.reads < config.read_budget
            self.reads = self.reads + 1 if stay else 0
            self.chunk += not stay
            if self.chunk >= len(self.chunks):
                self._put_question(config)
            return
        if ActionKind.ANSWER in done:
            self.answers[self.question] = next(
                action.text
                for action, ok in zip(actions, applied, strict=True)
                if ok and action.kind == ActionKind.ANSWER
            )
        elif has_read:
            self.reads += 1
            if self.reads >= config.answer_read_budget:
                self.phase = Phase.FINAL
            return
        self.question += 1
        self._put_question(config)

    def _put_question(self, config: EpisodeLimits) -> None:
        self.reads = 0
        if self.question >= len(self.questions):
            self.phase = Phase.DONE
            return
        self.memory.set_query(self.questions[self.question])
        self.phase = Phase.ANSWERING if config.answer_read_budget > 0 else Phase.FINAL


class HostPlayer:
    """Plays batches of episodes with an index of a given kind."""

    def __init__(self, agent: Agent, setting: Setting, tokenizer: Tokenizer, index: Any):
        self._limits, self._index = setting.limits, index
        self._sizes = setting.limits.memory
        self._parse, self._prompter = HostParser(tokenizer, agent), HostPrompter(setting.template)
        self._embed = HostEmbedding(setting.embed)

    def __call__(self, episodes: Sequence[HostEpisode], respond: Respond) -> list[HostTurn]:
        """Plays all episodes to their end, one turn of all after the other."""
        turns: list[HostTurn] = []
        for turn in range(self._limits.max_turns):
            live = [i for i, episode in enumerate(episodes) if episode.phase != Phase.DONE]
            if not live:
                break
            playing = [episodes[i] for i in live]
            memories = [episode.memory for episode in playing]
            phases = [episode.phase for episode in playing]
            shown = retrieve_all(memories, self._embed)
            prompts = [
                episode.observe(self._prompter, texts)
                for episode, texts in zip(playing, shown, strict=True)
            ]
            replies = respond(prompts, phases, live, turn)
            actions = [self._parse(reply.tokens) for reply in replies]
            permitted = [PERMITTED[phase] for phase in phases]
            applied = apply_all(memories, actions, permitted, self._embed)
            for episode, written, done in zip(playing, actions, applied, strict=True):
                episode.advance(written, done, self._limits)
            turns += map(HostTurn, live, phases, prompts, replies, actions)
        return turns

    def start(self, episodes: Episode) -> list[HostEpisode]:
        """Episodes [B] as lists, each with an empty memory."""
        e = jax.device_get(episodes)

        def cut(rows, lengths, count):
            return [row[:n].tolist() for row, n in zip(rows[:count], lengths[:count], strict=True)]

        return [
            HostEpisode(
                cut(e.chunks[i], e.chunk_lengths[i], e.num_chunks[i]),
                cut(e.questions[i], e.question_lengths[i], e.num_questions[i]),
                HostMemory(self._sizes, self._index),
            )
            for i in range(len(e.id))
        ]
