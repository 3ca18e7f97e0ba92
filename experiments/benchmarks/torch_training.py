"""One PPO update in PyTorch: the same rows, loss, clipping and AdamW as `trainer.update_step`.

Rows without an advantage cost nothing, rows are sorted by length, and micro-batches are cropped to
their longest prompt and response: the courtesies that our trainer allows itself. Supports what
the embedded configs use: AdamW, estimator 'group', no entropy bonus, no KL.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import torch

from atommem_jax.config import OptimizerConfig, PPOConfig
from atommem_jax.model.sampling import Agent
from atommem_jax.types import Batch
from experiments.benchmarks.torch_model import Matcher, TorchTransformer
from experiments.benchmarks.torch_sampling import TorchGrammar

_MASKED = -1e30
_LARGEST_LOG_RATIO = 20.0


def check_supported(ppo: PPOConfig, optimizer: OptimizerConfig) -> None:
    """Raises ValueError, naming the field, for a config that this update does not implement."""
    needed = {
        "rl.ppo.estimator": (ppo.estimator, "group"),
        "rl.ppo.entropy_coef": (ppo.entropy_coef, 0.0),
        "rl.ppo.kl_coef": (ppo.kl_coef, 0.0),
        "rl.ppo.reward_kl_coef": (ppo.reward_kl_coef, 0.0),
        "rl.ppo.importance_cap": (ppo.importance_cap, 0.0),
        "rl.ppo.weighting": (ppo.weighting, "token_mean"),
        "rl.optimizer.name": (optimizer.name, "adamw"),
    }
    for field, (found, allowed) in needed.items():
        if found != allowed:
            raise ValueError(f"{field}={found!r}: the PyTorch update supports {allowed!r} only")


@dataclasses.dataclass
class Rows:
    """Turns as tensors, and the same for any part of them."""

    prompt: torch.Tensor  # [M, P], left-padded
    prompt_lengths: torch.Tensor
    response: torch.Tensor  # [M, R], right-padded
    response_lengths: torch.Tensor
    phase: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, batch: Batch) -> "Rows":
        """From a `Batch`, on the host or on a device."""

        def tensor(x):
            return torch.from_numpy(np.array(jax.device_get(x)))

        columns = {f.name: tensor(getattr(batch, f.name)) for f in dataclasses.fields(cls)}
        for name in ("prompt", "prompt_lengths", "response", "response_lengths", "phase"):
            columns[name] = columns[name].long()
        return cls(**columns)

    def __getitem__(self, index) -> "Rows":
        return Rows(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))

    def crop(self, multiple: int = 1) -> "Rows":
        """Without the columns that are padding in every row, up to a multiple."""

        def round_up(length, limit):
            return min(-(-int(length) // multiple) * multiple, limit)

        width = round_up(self.prompt_lengths.max(), self.prompt.shape[1])
        limit = round_up(self.response_lengths.max(), self.response.shape[1])
        return dataclasses.replace(
            self,
            prompt=self.prompt[:, self.prompt.shape[1] - width :],
            response=self.response[:, :limit],
            old_log_probs=self.old_log_probs[:, :limit],
            advantages=self.advantages[:, :limit],
            weights=self.weights[:, :limit],
        )


class TorchUpdate:
    """The update, with its model and optimiser."""

    def __init__(
        self,
        agent: Agent,
        model: TorchTransformer,
        ppo: PPOConfig,
        optimizer: OptimizerConfig,
        *,
        temperature: float,
        microbatch: int = 64,
        compiled: bool = False,
    ):
        """microbatch: rows of a micro-batch; compiled: through `torch.compile`."""
        check_supported(ppo, optimizer)
        self.model, self._ppo, self._microbatch = model, ppo, microbatch
        self._agent, self._temperature, self._clip = agent, temperature, optimizer.clip_norm
        self._grammar, self._matcher = TorchGrammar(agent.grammar), Matcher(agent.template)
        self._compiled = compiled
        # A few fixed widths, so that compiled code is not made anew for every length.
        self._multiple = 16 if compiled else 1
        self._score: Callable = self._score_rows
        if compiled:
            self._score = torch.compile(self._score_rows, dynamic=True)
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.b1, optimizer.b2),
            weight_decay=optimizer.weight_decay,
        )

    def __call__(self, rows: Rows, minibatches: list[torch.Tensor]) -> dict[str, float]:
        """An optimiser step on the rows of each mini-batch; metrics are means over the steps."""
        metrics: dict[str, float] = {}
        for chosen in minibatches:
            for name, value in self.step(rows[chosen]).items():
                metrics[name] = metrics.get(name, 0.0) + value / len(minibatches)
        return metrics

    def step(self, rows: Rows) -> dict[str, float]:
        """One optimiser step."""
        self._optimizer.zero_grad(set_to_none=True)
        metrics = self.accumulate(rows)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        return metrics | {"gradient_norm": float(norm)}

    def accumulate(self, rows: Rows) -> dict[str, float]:
        """Gradients of the whole mini-batch, micro-batch by micro-batch."""
        denominator = rows.weights.sum().clamp(min=1.0)
        rows = rows[(rows.weights * rows.advantages != 0).any(dim=1)]
        order = (rows.prompt_lengths + rows.response_lengths).argsort(descending=True)
        totals = torch.zeros(5)
        for part in order.split(self._microbatch):
            loss, sums = self._loss(rows[part].crop(self._multiple), denominator)
            loss.backward()
            totals += sums
        names = ("ratio", "clip_fraction", "approx_kl", "entropy", "loss")
        return dict(zip(names, totals.tolist(), strict=True))

    def _loss(self, rows: Rows, denominator) -> tuple[torch.Tensor, torch.Tensor]:
        limit = self._agent.sampler.response_length
        if self._agent.sampler.constrained:
            mask = self._grammar.masks(rows.phase, rows.response, limit)
        else:
            mask = torch.arange(self._agent.model.config.vocab_size) != self._grammar.pad
            mask = mask.expand(*rows.response.shape, -1)
        tokens = torch.cat([rows.prompt, rows.response[:, :-1]], dim=1)
        features = None
        if self._agent.model.config.num_features:
            features = Matcher.look_up(self._matcher.table(rows.prompt), tokens)
        start = rows.prompt.shape[1] - rows.prompt_lengths
        log_probs, entropy = self._score(tokens, start, features, rows.response, mask)
        return self._objective(log_probs, entropy, rows, denominator)

    def _score_rows(self, tokens, start, features, response, mask):
        """Log-probs and entropies [M, R'] of the responses."""
        hidden = self.model(tokens, start, features)
        logits = self.model.logits(hidden[:, -response.shape[1] :])
        logits = (logits / self._temperature).masked_fill(~mask, _MASKED)
        log_probs = logits.log_softmax(dim=-1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        return log_probs.gather(-1, response[..., None])[..., 0], entropy

    def _objective(self, log_probs, entropy, rows: Rows, denominator):
        """The clipped surrogate of `loss.ppo_loss` and the sums of the metrics."""
        ppo, on = self._ppo, rows.weights != 0
        log_ratio = torch.where(on, log_probs - rows.old_log_probs, 0.0)
        log_ratio = log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
        ratio = log_ratio.exp()
        plain = ratio * rows.advantages
        clipped = ratio.clamp(1 - ppo.clip_low, 1 + ppo.clip_high) * rows.advantages
        objective = torch.minimum(plain, clipped)
        if ppo.dual_clip:
            floor = ppo.dual_clip * rows.advantages
            objective = torch.where(rows.advantages < 0, objective.maximum(floor), objective)
        scale = rows.weights / denominator
        loss = -(objective * scale).sum()
        with torch.no_grad():
            values = (
                ratio,
                (clipped < plain).float(),
                log_ratio.expm1() - log_ratio,
                torch.where(on, entropy, 0.0),
            )
            sums = torch.stack([(value * scale).sum() for value in values] + [loss])
        return loss, sums


def deal(size: int, turns: int, minibatches: int, seed: int = 0) -> list[torch.Tensor]:
    """Rows of each mini-batch of whole trajectories, dealt at random."""
    order = np.random.default_rng(seed).permutation(size).reshape(minibatches, -1)
    rows = order[..., None] * turns + np.arange(turns)
    return [torch.from_numpy(part.reshape(-1)) for part in rows]
