"""What collect.py does: plays episodes with a teacher's replies, and adds up what came of them."""

import collections
import concurrent.futures
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from atommem_jax.agent import build
from atommem_jax.collection import store
from atommem_jax.collection.endpoint import Endpoint, EndpointError, OutOfRetriesError
from atommem_jax.config import ConfigError, check
from atommem_jax.documents.session import Session
from atommem_jax.language import chat
from atommem_jax.learning import evaluation, reward
from atommem_jax.tasks import batches, encoding
from atommem_jax.tasks.schema import Example
from atommem_jax.types import ActionKind, Response, Turns, View

_KINDS = [kind for kind in ActionKind if kind != ActionKind.NONE]


class Player:
    """Plays episodes with the teacher's replies; any number of threads may call `play`.

    They take turns at everything but waiting for the server: JAX compiles each program once, and
    small programs on a CPU would only get in each other's way.

    Args:
      parts: of the agent in whose place the teacher plays.
      examples: to play.
      endpoint: of the teacher.
    """

    def __init__(self, parts: build.Parts, examples: Sequence[Example], endpoint: Endpoint):
        shape = encoding.fit_shape(examples, parts.tokenizer)
        self.endpoint, self._parts = endpoint, parts
        self._setting = parts.setting(shape)
        self._protocol = build.find_protocol(parts.config).restrict(parts.workflow.kinds)
        self._samples = batches.EncodedDataset(examples, parts.tokenizer, shape, cache_bytes=0)
        self._ids = [example["id"] for example in examples]
        self._turn = threading.Lock()

    def __len__(self) -> int:
        return len(self._ids)

    def name(self, key: store.Key) -> store.Key:
        """(id of the example, sample) of (number of the example, sample)."""
        return self._ids[key[0]], key[1]

    def play(self, key: store.Key) -> store.Record:
        """The record of one trajectory; of a failure where the server did not answer.

        Raises EndpointError and ClosedError.
        """
        example, sample = self.name(key)
        usage: collections.Counter[str] = collections.Counter()
        record: store.Record = {"example": example, "sample": sample}
        try:
            with self._turn:
                record |= self._play(key[0], usage)
        except OutOfRetriesError as error:
            record["error"] = str(error)
        return {**record, "usage": dict(usage)}

    def _play(self, number: int, usage: collections.Counter[str]) -> store.Record:
        episode, aliases = self._samples[number]
        replies: list[dict[str, Any]] = []
        session = Session(self._setting, self._responder(replies, usage), episode)
        turns = [{**_describe(turn.record), **replies[-1]} for turn in session.turns()]
        trajectory = jax.device_get(session.trajectory())
        learnable = store.find_learnable(
            self._setting.grammar,
            True,
            turns,
            self._setting.limits.max_turns,
            self._parts.config.rollout.response_length,
        )
        for turn, admitted in zip(turns, learnable, strict=True):
            turn["admitted"] = bool(admitted)
        (answers,) = evaluation.decode_answers(
            trajectory.answers, trajectory.answer_lengths, self._parts.tokenizer.decode
        )
        answers = answers[: len(aliases)]
        em = reward.score_answers(answers, aliases)
        report = trajectory.turns.report
        return {
            "reward": float(em.mean()),
            "em": em.tolist(),
            "f1": reward.score_answers(answers, aliases, reward.f1).tolist(),
            "answers": answers,
            **{fate: _count(getattr(report, fate)[0]) for fate in ("applied", "invalid")},
            "turns": turns,
        }

    def _responder(
        self, replies: list[dict[str, Any]], usage: collections.Counter[str]
    ) -> Callable[[View, jax.Array], Response]:
        tokenizer, width = self._parts.tokenizer, self._parts.config.rollout.response_length

        def respond(view: View, key: jax.Array) -> Response:
            del key  # the server draws
            observation = jax.tree.map(lambda x: x[0], jax.device_get(view.observation))
            said = chat.messages(observation, self._protocol, tokenizer)
            self._turn.release()
            try:
                reply = self.endpoint.chat(said)
            finally:
                self._turn.acquire()
            usage.update(
                requests=1,
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
            )
            ids = chat.encode_reply(reply.text, self._protocol, tokenizer)
            cut = reply.cut or len(ids) >= width
            ids = [*ids[: width - 1], tokenizer.eos_id]
            replies.append({"reply": reply.text, "cut": cut})
            tokens = np.full((1, width), tokenizer.pad_id, np.int32)
            tokens[0, : len(ids)] = ids
            return Response(
                tokens=jnp.asarray(tokens),
                lengths=jnp.asarray([len(ids)], jnp.int32),
                log_probs=jnp.zeros(tokens.shape, jnp.float32),
                values=jnp.zeros((1,), jnp.float32),
                scripted=jnp.zeros((1,), bool),
            )

        return respond


def _describe(record: Turns) -> dict[str, Any]:
    width, length = record.prompt.shape[0], int(record.prompt_lengths)
    return {
        "phase": int(record.phase),
        "chunk": int(record.chunk),
        "question": int(record.question),
        "prompt": record.prompt[width - length :].tolist(),
        "response": record.response[: int(record.response_lengths)].tolist(),
    }


def _count(report) -> dict[str, int]:
    """Actions of each kind over the turns [T kinds]."""
    return {kind.name.lower(): int(report[:, kind].sum()) for kind in _KINDS}


class Tally:
    """Adds up what the lines of a folder say.

    Args:
      min_reward: from which on a trajectory counts as kept.
      prices: of a million prompt and completion tokens; None where they are not known.
    """

    def __init__(self, min_reward: float, prices: tuple[float, float] | None):
        self.min_reward, self.prices = min_reward, prices
        self.done: set[store.Key] = set()
        self.failed: set[store.Key] = set()
        self.kept = 0
        self._sums: collections.Counter[str] = collections.Counter()
        self._usage: collections.Counter[str] = collections.Counter()
        self._actions: collections.Counter[tuple[str, str]] = collections.Counter()

    def add(self, record: store.Record) -> None:
        """Counts a line; the later success of what has failed takes the failure back."""
        key = record["example"], record["sample"]
        self._usage.update(record["usage"])
        if "error" in record:
            self.failed.add(key)
            return
        self.done.add(key)
        self.kept += record["reward"] >= self.min_reward
        turns = record["turns"]
        self._sums.update(
            questions=len(record["em"]),
            em=sum(record["em"]),
            f1=sum(record["f1"]),
            reward=record["reward"],
            turns=len(turns),
            cut=sum(turn["cut"] for turn in turns),
            outside=sum(not turn["cut"] and not turn["admitted"] for turn in turns),
        )
        for fate in ("applied", "invalid"):
            for kind, count in record[fate].items():
                self._actions[kind, fate] += count

    def summarise(self) -> dict[str, Any]:
        """What summary.json holds; means are 0 where nothing was collected."""
        sums, usage = self._sums, self._usage
        questions, trajectories = max(sums["questions"], 1), max(len(self.done), 1)
        tokens = usage["prompt_tokens"], usage["completion_tokens"]
        cost = sum(n * price for n, price in zip(tokens, self.prices or (), strict=False)) / 1e6
        return {
            "trajectories": len(self.done),
            "kept": self.kept,
            "min_reward": self.min_reward,
            "failures": len(self.failed - self.done),
            "questions": sums["questions"],
            "em": sums["em"] / questions,
            "f1": sums["f1"] / questions,
            "reward": sums["reward"] / trajectories,
            "turns": sums["turns"],
            "turns_cut": sums["cut"],
            "turns_outside_grammar": sums["outside"],
            "actions": {
                kind.name.lower(): {
                    fate: self._actions[kind.name.lower(), fate] for fate in ("applied", "invalid")
                }
                for kind in _KINDS
            },
            "requests": usage["requests"],
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
            "cost": cost if self.prices else None,
        }


def collect(
    player: Player,
    writer: store.Writer,
    tally: Tally,
    *,
    samples: int,
    concurrency: int,
    max_failures: int,
) -> None:
    """Plays what is not there yet, `concurrency` episodes at a time.

    Raises ConfigError where the server refuses a request, or `max_failures` in a row have failed.
    """
    keys = [(number, sample) for sample in range(samples) for number in range(len(player))]
    todo = [key for key in keys if player.name(key) not in tally.done]
    failed_in_a_row = 0
    try:
        bar = tqdm.tqdm(
            _play_all(player, todo, concurrency),
            desc="collect",
            initial=len(keys) - len(todo),
            total=len(keys),
            mininterval=2.0,
        )
        for record in bar:
            failed = "error" in record
            writer.append(store.FAILURES if failed else store.EPISODES, record)
            tally.add(record)
            bar.set_postfix(kept=tally.kept, failed=len(tally.failed), refresh=False)
            failed_in_a_row = failed_in_a_row + 1 if failed else 0
            check(
                failed_in_a_row < max_failures,
                f"{failed_in_a_row} episodes in a row failed (--max_failures), the last one with: "
                f"{record.get('error')}. When the server answers again, the same command goes on",
            )
    except EndpointError as error:
        raise ConfigError(str(error)) from error


def _play_all(
    player: Player, keys: Iterable[store.Key], concurrency: int
) -> Iterator[store.Record]:
    """Records as they are finished, of which no more than `concurrency` are held."""
    keys = iter(keys)
    pool = concurrent.futures.ThreadPoolExecutor(concurrency)
    pending = {pool.submit(player.play, key) for key in itertools.islice(keys, concurrency)}
    try:
        while pending:
            first = concurrent.futures.FIRST_COMPLETED
            done, pending = concurrent.futures.wait(pending, return_when=first)
            for future in done:
                yield future.result()
                pending |= {pool.submit(player.play, key) for key in itertools.islice(keys, 1)}
    finally:
        player.endpoint.close()
        pool.shutdown(wait=False)  # what is still under way is lost
