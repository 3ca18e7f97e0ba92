"""Batched generation in PyTorch: the masks of the grammar by table lookup, a KV cache, early stop.

The arrangement of the method's public code, whose server decodes all live trajectories of a
batch together; rows that have ended are dropped from the batch while it decodes.
"""

import numpy as np
import torch

from atommem_jax.language.grammar import Grammar
from atommem_jax.model.sampling import Agent
from atommem_jax.types import Phase
from experiments.benchmarks.host_agent import Reply, Text
from experiments.benchmarks.torch_model import Matcher, TorchTransformer

_DEAD = 0
_MASKED = -1e30


class TorchGrammar:
    """`Grammar.allowed` and `Grammar.advance` for a batch of states."""

    def __init__(self, grammar: Grammar):
        def table(x):
            return torch.from_numpy(np.array(x)).long()

        self.classes, self.step, self.need = map(
            table, (grammar.classes, grammar.step, grammar.need)
        )
        self.starts, self.num_states = table(grammar.starts), grammar.num_states
        self.max_actions, self.pad, self.eos = grammar.max_actions, grammar.pad_id, grammar.eos_id
        self._cut_off = torch.arange(self.step.shape[1]) == self.classes[self.eos]

    def advance(self, state: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """States after one token each, any shape."""
        base = state % self.num_states
        after = state - base + self.step[base, self.classes[token]]
        return torch.where(after < self.num_states * (self.max_actions + 1), after, _DEAD)

    def allowed(self, state: torch.Tensor, remaining: torch.Tensor | int) -> torch.Tensor:
        """Masks [..., V] of states [...]."""
        base, count = state % self.num_states, state // self.num_states
        room = (self.max_actions - count).clamp(max=2)
        if isinstance(remaining, torch.Tensor):
            remaining = remaining[..., None]
        admitted = self.need[room, base] <= remaining - 1
        admitted = torch.where(admitted.any(dim=-1, keepdim=True), admitted, self._cut_off)
        return admitted[..., self.classes]

    def masks(self, phase: torch.Tensor, response: torch.Tensor, budget: int) -> torch.Tensor:
        """Masks [M, R', V] under which responses [M, R'] were drawn with a budget of R."""
        state, states = self.starts[phase], []
        for column in response.T:
            states.append(state)
            state = self.advance(state, column)
        remaining = budget - torch.arange(response.shape[1])
        return self.allowed(torch.stack(states, dim=1), remaining.expand_as(response))


class TorchResponder:
    """A `host_agent.Respond`: prefill and decode for all prompts, `batch` of them at a time."""

    def __init__(
        self,
        agent: Agent,
        model: TorchTransformer,
        *,
        temperature: float,
        threads: int = 1,
        batch: int = 0,
    ):
        """threads: while the model runs; batch: prompts at a time, 0 for all."""
        self._threads = threads
        self._model, self._batch, self._temperature = model, batch, temperature
        self._grammar, self._matcher = TorchGrammar(agent.grammar), Matcher(agent.template)
        self._limit = agent.sampler.response_length
        self._constrained = agent.sampler.constrained

    def __call__(
        self, prompts: list[Text], phases: list[Phase], rows: list[int], turn: int
    ) -> list[Reply]:
        del rows, turn
        size = self._batch or len(prompts)
        replies: list[Reply] = []
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            for first in range(0, len(prompts), size):
                part = slice(first, first + size)
                replies += self._generate(prompts[part], phases[part])
        # FAISS may share the thread pool, and its single queries are slower with more than one.
        torch.set_num_threads(1)
        return replies

    def _generate(self, prompts: list[Text], phases: list[Phase]) -> list[Reply]:
        model, grammar, limit, pad = self._model, self._grammar, self._limit, self._grammar.pad
        width, count = max(map(len, prompts)), len(prompts)
        prompt = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
        start = torch.tensor([width - len(ids) for ids in prompts])
        table = self._matcher.table(prompt) if model.config.num_features else None
        caches = model.new_caches(count, width + limit)
        shift = model.config.token_shift
        hidden = model(prompt, start, self._flags(table, prompt), caches)[:, -1]
        recent = torch.cat([prompt.new_full((count, shift), pad), prompt], dim=1)
        recent = recent[:, recent.shape[1] - shift :]

        state = grammar.starts[torch.tensor(phases)]
        rows = torch.arange(count)
        tokens, scores = torch.full((count, limit), pad), torch.zeros(count, limit)
        for position in range(limit):
            log_probs = self._log_probs(model.logits(hidden), state, position)
            token = self._draw(log_probs)
            tokens[rows, position] = token
            scores[rows, position] = log_probs.gather(1, token[:, None])[:, 0]
            alive = token != grammar.eos
            if position + 1 == limit or not alive.any():
                break
            state = grammar.advance(state, token)
            if alive.sum() <= 0.75 * len(rows):  # else moving the cache costs more than it saves
                rows, token, state, start = rows[alive], token[alive], state[alive], start[alive]
                recent = recent[alive]
                table = None if table is None else table[alive]
                caches = [(keys[alive], values[alive]) for keys, values in caches]
            new = token[:, None]
            hidden = model(new, start, self._flags(table, new), caches, width + position, recent)
            hidden = hidden[:, 0]
            recent = torch.cat([recent, new], dim=1)[:, 1:] if shift else recent
        return self._cut(tokens.tolist(), scores.tolist())

    def _flags(self, table, tokens):
        return None if table is None else Matcher.look_up(table, tokens)

    def _log_probs(self, logits, state, position):
        if self._constrained:
            mask = self._grammar.allowed(state, self._limit - position)
        else:
            mask = torch.arange(logits.shape[-1]) != self._grammar.pad
        logits = logits / (self._temperature or 1.0)
        return logits.masked_fill(~mask, _MASKED).log_softmax(dim=-1)

    def _draw(self, log_probs):
        if self._temperature > 0:
            return torch.multinomial(log_probs.exp(), 1)[:, 0]
        return log_probs.argmax(dim=-1)

    def _cut(self, tokens: list[Text], scores: list[list[float]]) -> list[Reply]:
        """Rows up to their end of sequence; one that had ended may have gone on meanwhile."""
        replies = []
        for ids, values in zip(tokens, scores, strict=True):
            end = ids.index(self._grammar.eos) + 1 if self._grammar.eos in ids else len(ids)
            replies.append(Reply(ids[:end], values[:end]))
        return replies
