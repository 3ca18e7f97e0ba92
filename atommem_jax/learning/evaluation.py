"""Rollouts over a split -> per-question records -> EM and F1 with bootstrap intervals.

Every sample of the split is scored, and the count is part of the summary. Intervals resample
*episodes*, because the questions of one episode share a memory and are not independent.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from atommem_jax.types import EMPTY, ActionKind, Episode, Phase, Trajectory, Turns

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
    """Means over a batch of trajectories, as float32 scalars: see `describe`."""
    turns, answered = trajectories.turns, trajectories.answer_lengths > 0
    # Rows past an episode's last question are padding: only what was put can go unanswered.
    number = jnp.arange(answered.shape[1], dtype=jnp.int32)[None, None]
    put = jnp.any(turns.live[..., None] & (turns.question[..., None] == number), axis=1)
    missing = jnp.sum(put & ~answered).astype(jnp.float32)
    means = describe(tally(turns), float(turns.live.shape[0]))
    return means | {"unanswered": missing / _at_least_one(put.sum())}


@jax.jit
def tally(turns: Turns) -> dict[str, Float[Array, ""]]:
    """Sums over the turns [B T] of a batch, from which `describe` makes means.

    Those of the segments of a rollout add up to those of the whole.
    """
    model = turns.live & ~turns.scripted
    places = jnp.arange(turns.actions.kind.shape[2], dtype=jnp.int32)[None, None]
    begun = turns.live[..., None] & (places < turns.actions.count[..., None])
    sums = {
        "turns": turns.live.sum(),
        "responses": model.sum(),
        "tokens": jnp.where(turns.scripted, 0, turns.response_lengths).sum(),
        "prompt_tokens": turns.prompt_lengths.sum(),
        "model_prompt_tokens": jnp.where(model, turns.prompt_lengths, 0).sum(),
        "retrievals": (turns.live & jnp.any(turns.shown != EMPTY, axis=2)).sum(),
        "occupancy": jnp.where(turns.live, turns.occupancy, 0).sum(),
        "passes": turns.passes.sum(),
        "lanes": turns.lanes.sum(),
        "log_probs": turns.log_probs.sum(),
        "reading_turns": (turns.live & (turns.phase == Phase.READING)).sum(),
        "begun": begun.sum(),
        "well_formed": (begun & turns.actions.well_formed).sum(),
        "ended": (model & (turns.response_lengths < turns.response.shape[2])).sum(),
    }
    for fate in ("attempted", "applied", "invalid", "rejected", "truncated", "evicted"):
        counts = getattr(turns.report, fate).sum(axis=(0, 1))
        for kind in _COUNTED:
            if fate in _FATES or kind == ActionKind.CREATE:
                sums[f"{fate}/{kind.name.lower()}"] = counts[kind]
    return {name: value.astype(jnp.float32) for name, value in sums.items()}


def describe(sums: Mapping[str, Any], episodes: float) -> dict[str, Any]:
    """Means of what `tally` summed over so many episodes.

    Frequencies of operations are per episode; `occupancy` is valid entries at the start of a
    turn; `tokens_read` and `tokens_written` are those of the policy in an episode, `retrievals` the
    turns that were shown entries; `sampled_nll` estimates its entropy in nats a token. Tokens are
    those that the policy wrote, not those of a program; `tokens_per_pass` is 1 where none is
    guessed.
    `well_formed` is a share of the actions begun, and `ended` of the turns: those that were shorter
    than they might have been.
    """
    turns, tokens = _at_least_one(sums["turns"]), _at_least_one(sums["tokens"])
    responses = _at_least_one(sums["responses"])
    return {
        "turns": sums["turns"] / episodes,
        "response_tokens": tokens / responses,
        "prompt_tokens": sums["prompt_tokens"] / turns,
        "tokens": tokens,
        "tokens_read": sums["model_prompt_tokens"] / episodes,
        "tokens_written": sums["tokens"] / episodes,
        "retrievals": sums["retrievals"] / episodes,
        "occupancy": sums["occupancy"] / turns,
        # Of what decoding computed: rows that have ended, and lanes without a row, are the rest.
        "lane_utilisation": sums["passes"] / _at_least_one(sums["lanes"]),
        "tokens_per_pass": tokens / _at_least_one(sums["passes"]),
        "sampled_nll": -sums["log_probs"] / tokens,
        "reading_turns": sums["reading_turns"] / episodes,
        "well_formed": sums["well_formed"] / _at_least_one(sums["begun"]),
        "ended": sums["ended"] / responses,
    } | {name: value / episodes for name, value in sums.items() if "/" in name}


def _at_least_one(count: Any) -> Any:
    if isinstance(count, jax.Array):
        return jnp.maximum(count.astype(jnp.float32), 1.0)
    return max(count, 1.0)


Handled = list[tuple[int, list[int], str]]
"""(chunk, categories of its facts, what was done in its turns) of each chunk that has facts."""


def find_handling(
    turns: Turns, category: Int[np.ndarray, "B C U"], first_chunk: Int[np.ndarray, " B"]
) -> list[Handled]:
    """What these turns [B T] did, in each episode, with the facts that they showed.

    `category` is that of the chunks from `first_chunk` on.
    """
    names = {ActionKind.CREATE: "create", ActionKind.UPDATE: "update"}
    found: list[Handled] = []
    for b in range(category.shape[0]):
        done: dict[int, str] = {}
        for t in np.flatnonzero(turns.live[b] & (turns.phase[b] == Phase.READING)):
            chunk = int(turns.chunk[b, t])
            done.setdefault(chunk, "none")
            for kind, name in names.items():
                if turns.report.applied[b, t, kind]:
                    done[chunk] = name
        found.append([])
        for chunk, what in done.items():
            row = category[b, chunk - first_chunk[b]]
            if (row >= 0).any():
                found[b].append((chunk, row[row >= 0].tolist(), what))
    return found


def join_handling(before: Handled, after: Handled) -> Handled:
    """What two segments did, of which the second may go on with the last chunk of the first."""
    if not before or not after or before[-1][0] != after[0][0]:
        return before + after
    chunk, categories, what = after[0]
    what = before[-1][2] if what == "none" else what
    return [*before[:-1], (chunk, categories, what), *after[1:]]


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
        handled = find_handling(
            host_batches.fetch(trajectories.turns),
            np.asarray(batch.episodes.annotations.category),
            np.asarray(batch.episodes.first_chunk),
        )
        e = batch.episodes
        questions = decode_answers(np.asarray(e.questions), np.asarray(e.question_lengths), decode)
        given = Given(answers, lengths, log_probs, turn_counts, handled)
        found = make_records(given, questions, batch.aliases, batch.ids, ids, decode, metric)
        if eviction:
            local = host_batches.fetch(life_cycle.shrink(trajectories))
            tell_paths(found, local, batch.episodes, decode, eviction)
        records += [record for b in np.flatnonzero(rows < real) for record in found[b]]
        kept = host_batches.first_rows(trajectories, real)
        for name, value in jax.device_get(statistics(kept)).items():
            totals[name] = totals.get(name, 0.0) + float(value) * real
        seen += real
    means = {name: value / max(seen, 1) for name, value in totals.items()}
    return merge(processes.gather(records)), means


@dataclasses.dataclass(frozen=True)
class Given:
    """What a batch of trajectories came to, on the host."""

    answers: Int[np.ndarray, "B Q X"]
    lengths: Int[np.ndarray, "B Q"]  # of the answers, in tokens
    log_probs: Float[np.ndarray, "B Q"]  # of the turns that answered
    turns: Int[np.ndarray, " B"]  # that were played
    handled: Sequence[Handled]  # see `find_handling`


def make_records(
    given: Given,
    questions: Sequence[Sequence[str]],
    aliases: Sequence[Sequence[Sequence[str]]],
    episodes: Int[np.ndarray, " B"],
    trajectories: Int[np.ndarray, " B"],
    decode: Callable[[Sequence[int]], str],
    metric: reward.Metric,
) -> list[list[Record]]:
    """One record a question of each trajectory."""
    texts = decode_answers(given.answers, given.lengths, decode)
    scores = {
        "em": score_answers(texts, aliases),
        "f1": score_answers(texts, aliases, reward.f1),
    }
    if metric is not reward.exact_match:
        scores["reward"] = score_answers(texts, aliases, metric)
    return [
        [
            {
                "episode": int(episodes[b]),
                "trajectory": int(trajectories[b]),
                "question": q,
                "text": questions[b][q],
                "answer": texts[b][q],
                "aliases": list(expected),
                **{name: float(score[b, q]) for name, score in scores.items()},
                "log_prob": float(given.log_probs[b, q]),
                "turns": int(given.turns[b]),
                "handled": list(_by_fact(given.handled[b])) if q == 0 else [],
            }
            for q, expected in enumerate(accepted)
        ]
        for b, accepted in enumerate(aliases)
    ]


def tell_paths(
    records: Sequence[Sequence[Record]],
    trajectories: Trajectory,
    episodes: Episode,
    decode: Callable[[Sequence[int]], str],
    eviction: str,
) -> None:
    """Adds to the records of each trajectory where its wrong answers broke (`life_cycle`)."""
    right = np.zeros(trajectories.answer_lengths.shape, bool)
    for b, row in enumerate(records):
        right[b, : len(row)] = [record["em"] == 1.0 for record in row]
    chains = life_cycle.follow_batch(
        trajectories, episodes, right, decode=decode, eviction=eviction
    )
    for row, paths in zip(records, chains, strict=True):
        for record, path in zip(row, paths, strict=True):
            record |= path.describe()


def _by_fact(handled: Handled) -> Iterator[tuple[int, str]]:
    for _, categories, what in handled:
        for category in categories:
            yield category, what


def merge(parts: Sequence[list[Record]]) -> list[Record]:
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
