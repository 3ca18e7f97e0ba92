"""Rollouts over a split -> per-question records -> EM and F1 with bootstrap intervals.

Every sample of the split is scored, and the count is part of the summary. Intervals resample
*episodes*, because the questions of one episode share a memory and are not independent.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from atommem_jax.learning import life_cycle, reward
from atommem_jax.parallel import host_batches, processes
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.tasks.batches import EpisodeBatch
from atommem_jax.types import ActionKind, Episode, Phase, Trajectory

Record = dict[str, Any]

_COUNTED = [kind for kind in ActionKind if kind != ActionKind.NONE]
_DRAWN_AT_ONCE = 1 << 20  # episodes, for intervals; bounds their memory
_FATES = ("attempted", "applied", "invalid")


def decode_answers(
    answers: Int[np.ndarray, "B Q X"],
    lengths: Int[np.ndarray, "B Q"],
    decode: Callable[[Sequence[int]], str],
) -> list[list[str]]:
    """Answers as text; '' where none was given. Each distinct answer is decoded once."""
    known: dict[tuple[int, ...], str] = {(): ""}
    texts: list[list[str]] = []
    for rows, sizes in zip(answers.tolist(), lengths.tolist(), strict=True):
        texts.append([])
        for row, size in zip(rows, sizes, strict=True):
            ids = tuple(row[:size])
            if ids not in known:
                known[ids] = decode(ids)
            texts[-1].append(known[ids])
    return texts


def score_answers(
    texts: Sequence[Sequence[str]],
    aliases: Sequence[Sequence[Sequence[str]]],
    metric: reward.Metric = reward.exact_match,
) -> Float[np.ndarray, "B Q"]:
    """The answer to question i against the aliases of question i; 0 past the last question."""
    scores = np.zeros((len(texts), max(map(len, texts), default=0)), np.float32)
    for b, accepted in enumerate(aliases):
        row = reward.score_answers(texts[b][: len(accepted)], accepted, metric)
        scores[b, : len(accepted)] = row
    return scores


@jax.jit
def statistics(trajectories: Trajectory) -> dict[str, Float[Array, ""]]:
    """Means over a batch of trajectories, as float32 scalars.

    Frequencies of operations are per episode; `occupancy` is valid entries at the start of a
    turn; `sampled_nll` estimates the policy's entropy in nats a token. Tokens are those that the
    policy wrote, not those of a fixed program; `tokens_per_pass` is 1 where none is guessed.
    `well_formed` is a share of the actions begun, and `ended` of the turns: those that were shorter
    than they might have been.
    """
    turns = trajectories.turns
    live = turns.live.astype(jnp.float32)
    episodes = float(live.shape[0])
    turn_count = jnp.maximum(live.sum(), 1.0)
    written = jnp.where(turns.scripted, 0, turns.response_lengths).astype(jnp.float32)
    tokens = jnp.maximum(written.sum(), 1.0)
    passes = turns.passes.sum().astype(jnp.float32)
    responses = jnp.maximum((turns.live & ~turns.scripted).astype(jnp.float32).sum(), 1.0)
    reading = turns.live & (turns.phase == Phase.READING)
    places = jnp.arange(turns.actions.kind.shape[2], dtype=jnp.int32)[None, None]
    begun = turns.live[..., None] & (places < turns.actions.count[..., None])
    ended = turns.live & ~turns.scripted & (turns.response_lengths < turns.response.shape[2])
    answered = trajectories.answer_lengths > 0
    # Rows past an episode's last question are padding: only what was put can go unanswered.
    number = jnp.arange(answered.shape[1], dtype=jnp.int32)[None, None]
    put = jnp.any(turns.live[..., None] & (turns.question[..., None] == number), axis=1)
    result = {
        "turns": live.sum() / episodes,
        "response_tokens": tokens / responses,
        "prompt_tokens": turns.prompt_lengths.sum().astype(jnp.float32) / turn_count,
        "tokens": tokens,
        "occupancy": jnp.where(turns.live, turns.occupancy, 0).sum().astype(jnp.float32)
        / turn_count,
        # Of what decoding computed: rows that have ended, and lanes without a row, are the rest.
        "lane_utilisation": passes / jnp.maximum(turns.lanes.sum().astype(jnp.float32), 1.0),
        "tokens_per_pass": tokens / jnp.maximum(passes, 1.0),
        "sampled_nll": -turns.log_probs.sum() / tokens,
        "unanswered": jnp.sum(put & ~answered).astype(jnp.float32)
        / jnp.maximum(put.sum().astype(jnp.float32), 1.0),
        "reading_turns": reading.sum().astype(jnp.float32) / episodes,
        "well_formed": (begun & turns.actions.well_formed).sum().astype(jnp.float32)
        / jnp.maximum(begun.sum().astype(jnp.float32), 1.0),
        "ended": ended.sum().astype(jnp.float32) / responses,
    }
    for fate in ("attempted", "applied", "invalid", "rejected", "truncated", "evicted"):
        counts = getattr(turns.report, fate).sum(axis=(0, 1)).astype(jnp.float32) / episodes
        for kind in _COUNTED:
            if fate in _FATES or kind == ActionKind.CREATE:
                result[f"{fate}/{kind.name.lower()}"] = counts[kind]
    return result


def _handling(trajectories: Trajectory, episodes: Episode) -> Iterator[list[tuple[int, str]]]:
    """Per episode: (category, what its turn did) of every fact that was read."""
    turns = host_batches.fetch(trajectories.turns)
    category = np.asarray(episodes.annotations.category)
    names = {ActionKind.CREATE: "create", ActionKind.UPDATE: "update"}
    for b in range(category.shape[0]):
        done: dict[int, str] = {}
        for t in np.flatnonzero(turns.live[b] & (turns.phase[b] == Phase.READING)):
            chunk = int(turns.chunk[b, t])
            done.setdefault(chunk, "none")
            for kind, name in names.items():
                if turns.report.applied[b, t, kind]:
                    done[chunk] = name
        yield [(int(c), what) for chunk, what in done.items() for c in category[b, chunk] if c >= 0]


def evaluate(
    play: Callable[[Episode, Int[Array, " B"]], Trajectory],
    batches: Iterable[tuple[EpisodeBatch, int]],
    decode: Callable[[Sequence[int]], str],
    *,
    first_id: int = 0,
    mesh: Mesh | None = None,
    metric: reward.Metric = reward.exact_match,
    eviction: str = "",
) -> tuple[list[Record], dict[str, float]]:
    """Plays every sample once; with several processes each decodes and scores its own rows.

    Args:
      play: (episodes [B], trajectory ids [B]) -> trajectories; jitted.
      batches: from `tasks.batches.iterate_split`, with the rows of this process: the last batch
        is filled up, and only the first `real` rows of the whole batch count.
      decode: token ids -> text.
      first_id: trajectory id of the split's first sample; the others follow in order.
      mesh: what the batches are sharded over; None is the first device alone.
      metric: the reward of the task; one of its own is recorded beside EM and F1.
      eviction: of the memory that is played with: then records say where each wrong answer broke
        (`life_cycle`); '' leaves that out.

    Returns:
      One record a question, and statistics weighted by episodes; those of all processes, on each.
    """
    mesh = mesh or mesh_lib.single()
    records: list[Record] = []
    totals: dict[str, float] = {}
    seen = 0
    for batch, real in batches:
        rows = host_batches.process_rows(mesh, host_batches.whole_size(mesh, len(batch.aliases)))
        ids = (first_id + seen + rows).astype(np.int32)
        trajectories = play(*host_batches.shard((batch.episodes, ids), mesh))
        answers, lengths, log_probs = host_batches.fetch(
            (trajectories.answers, trajectories.answer_lengths, trajectories.answer_log_prob)
        )
        turn_counts = np.asarray(host_batches.fetch(trajectories.turns.live)).sum(axis=1)
        texts = decode_answers(answers, lengths, decode)
        em = score_answers(texts, batch.aliases)
        f1 = score_answers(texts, batch.aliases, reward.f1)
        own = {}
        if metric is not reward.exact_match:
            own["reward"] = score_answers(texts, batch.aliases, metric)
        handled = list(_handling(trajectories, batch.episodes))
        chains = []
        if eviction:
            local = host_batches.fetch(life_cycle.shrink(trajectories))
            chains = life_cycle.follow_batch(
                local, batch.episodes, em == 1.0, decode=decode, eviction=eviction
            )
        for b in np.flatnonzero(rows < real):
            for q, accepted in enumerate(batch.aliases[b]):
                question = batch.episodes.questions[b, q]
                length = int(batch.episodes.question_lengths[b, q])
                records.append(
                    {
                        "episode": int(batch.ids[b]),
                        "trajectory": int(ids[b]),
                        "question": q,
                        "text": decode(question[:length].tolist()),
                        "answer": texts[b][q],
                        "aliases": accepted,
                        "em": float(em[b, q]),
                        "f1": float(f1[b, q]),
                        **{name: float(scores[b, q]) for name, scores in own.items()},
                        **(chains[b][q].describe() if chains else {}),
                        "log_prob": float(log_probs[b, q]),
                        "turns": int(turn_counts[b]),
                        "handled": handled[b] if q == 0 else [],
                    }
                )
        kept = host_batches.first_rows(trajectories, real)
        for name, value in jax.device_get(statistics(kept)).items():
            totals[name] = totals.get(name, 0.0) + float(value) * real
        seen += real
    means = {name: value / max(seen, 1) for name, value in totals.items()}
    return _merge(processes.gather(records)), means


def _merge(parts: Sequence[list[Record]]) -> list[Record]:
    """The records of all processes in the order of one; rows that several hold count once."""
    if len(parts) == 1:
        return parts[0]
    rows = {(r["trajectory"], r["question"]): r for part in parts for r in part}
    return [rows[place] for place in sorted(rows)]


def summarise(
    records: Sequence[Record], *, resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Mean EM, F1 and reward over questions, with 95% bootstrap intervals over episodes.

    The intervals are percentiles; there is a reward where the task has one of its own.

    Raises ValueError where there are no records.
    """
    if not records:
        raise ValueError("records is empty: nothing was evaluated; check the split")
    episodes, rows = np.unique([record["episode"] for record in records], return_inverse=True)
    counts = np.bincount(rows).astype(np.float64)
    scores = [name for name in ("em", "f1", "reward") if name in records[0]]
    sums = np.stack([np.bincount(rows, weights=[r[name] for r in records]) for name in scores])
    means = _mean(sums, counts)
    low, high = _find_interval(sums, counts, resamples, seed)
    summary: dict[str, float] = {"episodes": len(episodes), "questions": len(records)}
    for i, name in enumerate(scores):
        prefix = "" if name == "em" else f"{name}_"
        summary[name] = float(means[i])
        summary[f"{prefix}ci_low"], summary[f"{prefix}ci_high"] = float(low[i]), float(high[i])
    return summary


def _mean(
    sums: Float[np.ndarray, "*R E"], counts: Float[np.ndarray, "*R E"], axis: int = -1
) -> Float[np.ndarray, "*R"]:
    """Over questions, of which each episode has some."""
    return sums.sum(axis=axis) / counts.sum(axis=axis)


def _find_interval(
    sums: Float[np.ndarray, "M E"], counts: Float[np.ndarray, " E"], resamples: int, seed: int
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Bounds of the M means, for all of which the same episodes are drawn."""
    from scipy import stats  # most of a second that those who evaluate nothing can save

    if len(counts) == 1:  # there is one way to draw it, which SciPy refuses
        return _mean(sums, counts), _mean(sums, counts)
    found = stats.bootstrap(
        (sums, np.broadcast_to(counts, sums.shape)),
        _mean,
        paired=True,
        axis=-1,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _DRAWN_AT_ONCE // len(counts)),
        # BCa, SciPy's default, has no bounds for scores that are all the same.
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return found.confidence_interval


def category_rates(records: Sequence[Record], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Per category of fact: how many were read, and the shares created, updated and ignored."""
    table: dict[str, dict[str, float]] = {}
    for record in records:
        for category, what in record["handled"]:
            row = table.setdefault(
                names[category], {"facts": 0, "create": 0, "update": 0, "none": 0}
            )
            row["facts"] += 1
            row[what] += 1
    for row in table.values():
        for what in ("create", "update", "none"):
            row[what] /= row["facts"]
    return table
