"""A judge: a model behind an endpoint that says whether answers are right, and how far to trust it.

Exact match takes "the 2nd of May" for wrong where "May 2" is meant. A judge sees question, accepted
answers and the answer, and says one word. But judges err, and kindly: so each judgement of records
comes with a control set made from the same data, answers that are wrong or vague by construction,
and with the share of them that the judge accepted. A score by a judge is worth what that is.

Verdicts are kept in a file, so that nothing is asked, or paid for, twice.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from atommem_jax import text_files
from atommem_jax.collection.endpoint import Endpoint, RefusedError
from atommem_jax.config import check
from atommem_jax.learning import reward
from atommem_jax.learning.evaluation import Record

PROMPT = """\
You judge whether an answer to a question is right.

Question: {question}
Right answers, each of which is accepted: {gold}
Answer to judge: {answer}

The answer is right if it means the same as one of the right answers, however it is put, and \
commits itself to it. It is wrong if it names something else, names several things of which not \
all are right, is vague enough to fit other answers too, or says that it does not know.
Reply with one word: CORRECT or INCORRECT."""

VAGUE = (
    "It is mentioned in the text.",
    "Someone well known.",
    "A place that is named in one of the documents.",
    "There are several possibilities.",
    "It depends on how one looks at it.",
    "The one that the question asks about.",
)
"""Answers that fit any question and answer none."""

CACHE_FILE = "verdicts.jsonl"
_SAID = re.compile(r"\b(in)?correct\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Claim:
    """An answer that is to be judged."""

    question: str
    gold: tuple[str, ...]
    answer: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge said of a claim."""

    correct: bool
    clear: bool  # whether it said so in the words that it was asked for; otherwise it is wrong
    prompt_tokens: int
    completion_tokens: int


class Judge:
    """Asks an endpoint about claims, several at a time, and keeps what it said in a folder.

    Args:
      endpoint: of the judge; temperature 0 suits it.
      model: its name, part of what verdicts are found again by.
      folder: of the verdicts; it must be there.
      concurrency: requests under way at a time.
    """

    def __init__(
        self, endpoint: Endpoint, model: str, folder: pathlib.Path, *, concurrency: int = 8
    ):
        self._endpoint, self._model, self._concurrency = endpoint, model, concurrency
        self._path, self._lock = folder / CACHE_FILE, threading.Lock()
        self._known: dict[str, Verdict] = {}
        self.asked = 0  # claims that were sent, and not found in the file
        self.prompt_tokens = self.completion_tokens = 0  # of those
        if self._path.is_file():
            for line in text_files.read_records(self._path):
                self._known[line["key"]] = Verdict(**line["verdict"])

    def judge(self, claims: Iterable[Claim]) -> list[Verdict]:
        """A verdict for each claim. An empty answer is wrong, and nobody is asked.

        A request that the endpoint refuses for what is in it counts as unclear. Raises
        EndpointError or OutOfRetriesError where it refuses all, or fails too often; what was
        judged until then is kept.
        """
        claims = list(claims)
        fresh = {
            self._key(claim): claim
            for claim in claims
            if claim.answer.strip() and self._key(claim) not in self._known
        }
        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
            waiting = [pool.submit(self._ask, *item) for item in fresh.items()]
            try:
                for done in concurrent.futures.as_completed(waiting):
                    done.result()
            except BaseException:
                for request in waiting:
                    request.cancel()
                raise
        nothing = Verdict(False, True, 0, 0)
        return [
            self._known[self._key(claim)] if claim.answer.strip() else nothing for claim in claims
        ]

    def _key(self, claim: Claim) -> str:
        told = [self._model, PROMPT, claim.question, claim.gold, claim.answer]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]

    def _ask(self, key: str, claim: Claim) -> None:
        gold = "; ".join(json.dumps(text, ensure_ascii=False) for text in claim.gold)
        words = PROMPT.format(question=claim.question, gold=gold, answer=claim.answer)
        try:
            reply = self._endpoint.chat([{"role": "user", "content": words}])
        except RefusedError:
            verdict = Verdict(False, False, 0, 0)
        else:
            verdict = Verdict(
                *read_verdict(reply.text), reply.prompt_tokens, reply.completion_tokens
            )
        with self._lock:
            self._known[key] = verdict
            self.asked += 1
            self.prompt_tokens += verdict.prompt_tokens
            self.completion_tokens += verdict.completion_tokens
            with self._path.open("a", encoding="utf-8") as file:
                line = {"key": key, "verdict": dataclasses.asdict(verdict)}
                file.write(json.dumps(line) + "\n")


def read_verdict(text: str) -> tuple[bool, bool]:
    """(correct, clear): by the last time that either word is said; unclear where none is."""
    said = _SAID.findall(text)
    return (bool(said) and not said[-1], bool(said))


def make_claims(records: Sequence[Record]) -> list[Claim]:
    """What an agent answered."""
    return [Claim(r["text"], tuple(r["aliases"]), r["answer"]) for r in records]


def make_controls(
    records: Sequence[Record], count: int, *, seed: int = 0
) -> dict[str, list[Claim]]:
    """Claims that are wrong by construction, one of each kind for each of `count` questions.

    `wrong` has the right answer of another question, which exact match does not take for one of
    this; `vague` one of `VAGUE`; `right`, for the other side, an accepted answer. A question has no
    `wrong` one where all questions have the same answer.
    """
    rng = np.random.default_rng(seed)
    answers = sorted({record["aliases"][0] for record in records})
    controls: dict[str, list[Claim]] = {"wrong": [], "vague": [], "right": []}
    for record in (records[i] for i in rng.permutation(len(records))[:count]):
        gold = tuple(record["aliases"])
        others = [text for text in answers if not reward.exact_match(text, gold)]
        if others:
            text = others[int(rng.integers(len(others)))]
            controls["wrong"].append(Claim(record["text"], gold, text))
        vague = VAGUE[int(rng.integers(len(VAGUE)))]
        controls["vague"].append(Claim(record["text"], gold, vague))
        controls["right"].append(Claim(record["text"], gold, gold[int(rng.integers(len(gold)))]))
    return controls


def judge_records(
    judge: Judge,
    records: Sequence[Record],
    *,
    controls: int = 200,
    prices: tuple[float, float] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], list[Verdict]]:
    """A summary of what a judge says of records, and its verdicts.

    `accepted` is the share of answers that it took for right, `em` that of exact matches, and
    `agreement` the share of answers on which the two say the same; `judge_only` and `em_only` are
    the shares that one of them accepts. `controls` has the share accepted of each kind in
    `make_controls`, of as many questions as asked for. `cost` is of what was asked now, None where
    no prices are known; what was found in the file cost nothing again.

    Args:
      judge: who is asked.
      records: of an evaluation.
      controls: questions of the control set; 0 for none.
      prices: of a million prompt and completion tokens.
      seed: of the choice of controls.

    Raises ConfigError without records, and as `Judge.judge`.
    """
    check(bool(records), "--judge: there are no records to judge; check --split")
    before = judge.asked, judge.prompt_tokens, judge.completion_tokens
    verdicts = judge.judge(make_claims(records))
    said = np.array([verdict.correct for verdict in verdicts])
    exact = np.array([record["em"] > 0 for record in records])
    rates: dict[str, dict[str, float]] = {}
    for kind, claims in make_controls(records, controls, seed=seed).items():
        if claims:
            taken = [verdict.correct for verdict in judge.judge(claims)]
            rates[kind] = {"claims": len(claims), "accepted": float(np.mean(taken))}
    tokens = judge.prompt_tokens - before[1], judge.completion_tokens - before[2]
    cost = None
    if prices is not None:
        cost = sum(n * price for n, price in zip(tokens, prices, strict=True)) / 1e6
    summary = {
        "questions": len(records),
        "accepted": float(said.mean()),
        "em": float(exact.mean()),
        "agreement": float((said == exact).mean()),
        "judge_only": float((said & ~exact).mean()),
        "em_only": float((exact & ~said).mean()),
        "unclear": sum(not verdict.clear for verdict in verdicts),
        "controls": rates,
        "asked": judge.asked - before[0],
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "cost": cost,
    }
    return summary, verdicts


def render(summary: Mapping[str, Any]) -> str:
    """A summary in a few lines."""
    s = summary
    unclear = f", {s['unclear']} unclear replies count as wrong" if s["unclear"] else ""
    lines = [
        f"judge accepts {s['accepted']:.3f} of {s['questions']} answers (EM {s['em']:.3f}); the "
        f"two agree on {s['agreement']:.3f}: {s['judge_only']:.3f} the judge alone accepts, "
        f"{s['em_only']:.3f} exact match alone{unclear}"
    ]
    told = ", ".join(
        f"{rate['accepted']:.3f} of {rate['claims']} {kind}" for kind, rate in s["controls"].items()
    )
    if told:
        lines.append(f"of answers made up it accepts {told}")
    cost = "" if s["cost"] is None else f", cost {s['cost']:.2f}"
    lines.append(
        f"{s['asked']} requests, {s['prompt_tokens']:,} prompt tokens, "
        f"{s['completion_tokens']:,} completion tokens{cost}"
    )
    return "\n".join(lines)
