"""What collect.py does: plays episodes with a teacher's replies, and adds up what came of them."""

import bisect
import collections
import concurrent.futures
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from atommem_jax.agent import build
from atommem_jax.collection import store
from atommem_jax.collection.endpoint import (
    STOP,
    UNFINISHED_THOUGHTS,
    Endpoint,
    EndpointError,
    OutOfRetriesError,
    RefusedError,
    Reply,
)
from atommem_jax.config import ConfigError, PassingError, check
from atommem_jax.documents.session import Session
from atommem_jax.language import chat
from atommem_jax.language.protocol import Tag
from atommem_jax.learning import evaluation, reward
from atommem_jax.tasks import batches, encoding
from atommem_jax.tasks.schema import Example
from atommem_jax.types import ActionKind, Response, Turns, View

LONGER_THAN_A_RESPONSE = "longer than rollout.response_length"

_KINDS = [kind for kind in ActionKind if kind != ActionKind.NONE]

_FIRST_FEW = 3  # episodes, or all that are begun at once; see `_Row`

# How models mark their thoughts where no server takes them out.
_THOUGHTS = {
    **{f"<{n}>": f"</{n}>" for n in ("think", "thinking", "thought", "reasoning", "seed:think")},
    "[think]": "[/think]",
    "◁think▷": "◁/think▷",
    "<|start_thinking|>": "<|end_thinking|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
}
_MARKS = re.compile("|".join(map(re.escape, [*_THOUGHTS, *_THOUGHTS.values()])), re.IGNORECASE)

# A reply of gpt-oss: channels, of which the one named "final" is for the user; and what is left of
# them where a server drops control tokens. Nothing is given back (++): a name may be long.
_CHANNEL = re.compile(
    r"<\|channel\|>\s*+(?P<name>\w++)[^<]*+(?:<\|constrain\|>[^<]*+)?+<\|message\|>"
    r"(?P<text>.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)
_BARE_CHANNELS = re.compile(r"\A\s*(?:analysis|commentary)(.*)assistantfinal(.*)\Z", re.DOTALL)


class Said(NamedTuple):
    """A reply in two."""

    thoughts: str
    text: str
    over: bool  # False where the thoughts never end


def split_thoughts(reply: str, tags: Sequence[Tag]) -> Said:
    """Takes thoughts out of a reply, however they are marked.

    A mark that closes thoughts which no mark has opened makes thoughts of all that stands before
    it: the opening one was part of the prompt. A mark inside of an action, which the tags tell, is
    text of that action.
    """
    channels = list(_CHANNEL.finditer(reply))
    if channels:
        final = [channel["text"] for channel in channels if channel["name"] == "final"]
        others = [channel["text"] for channel in channels if channel["name"] != "final"]
        return Said("".join([reply[: channels[0].start()], *others]), "".join(final), bool(final))
    if bare := _BARE_CHANNELS.match(reply):
        return Said(bare[1], bare[2], True)
    return _split_at_marks(reply, tags)


def _split_at_marks(reply: str, tags: Sequence[Tag]) -> Said:
    thoughts: list[str] = []
    kept: list[str] = []
    place, awaited, opened = 0, "", False
    for mark in _find_marks(reply, tags):
        before, spelling = reply[place : mark.start()], mark[0].lower()
        if awaited:
            if spelling != awaited:
                continue
            thoughts.append(before)
            awaited = ""
        elif spelling in _THOUGHTS:
            kept.append(before)
            awaited, opened = _THOUGHTS[spelling], True
        elif opened:  # one too many
            kept.append(before)
        else:
            thoughts += [*kept, before]
            kept = []
        place = mark.end()
    (thoughts if awaited else kept).append(reply[place:])
    return Said("".join(thoughts), "".join(kept), not awaited)


def _find_marks(reply: str, tags: Sequence[Tag]) -> Iterator[re.Match[str]]:
    """Those outside of actions: the tags next to a mark, on both sides, are not those of one."""
    closes = {tag.open: tag.close for tag in tags}
    any_tag = re.compile("|".join(map(re.escape, {*closes, *closes.values()})))
    found = [(tag.start(), tag[0]) for tag in any_tag.finditer(reply)]
    for mark in _MARKS.finditer(reply):
        after = bisect.bisect(found, (mark.start(), ""))
        open_tag = found[after - 1][1] if after else ""
        close_tag = found[after][1] if after < len(found) else ""
        if not close_tag or closes.get(open_tag) != close_tag:
            yield mark


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
        """The record of one trajectory; of a failure where the server did not answer or refused.

        Raises EndpointError and ClosedError.
        """
        example, sample = self.name(key)
        usage: collections.Counter[str] = collections.Counter()
        record: store.Record = {"example": example, "sample": sample}
        try:
            with self._turn:
                record |= self._play(key[0], usage)
        except (OutOfRetriesError, RefusedError) as error:
            record["error"] = str(error)
            if isinstance(error, RefusedError):
                record["refused"] = True
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
            messages = chat.messages(observation, self._protocol, tokenizer)
            self._turn.release()
            try:
                reply = self.endpoint.chat(messages)
            finally:
                self._turn.acquire()
            usage.update(
                requests=1,
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
            )
            said, ended = self._split(reply)
            ids = chat.encode_reply(said.text, self._protocol, tokenizer)
            if ended == STOP and len(ids) >= width:
                ended = LONGER_THAN_A_RESPONSE
            ids = [*ids[: width - 1], tokenizer.eos_id]
            turn = {"reply": said.text, "cut": ended != STOP, "ended": ended}
            replies.append(turn | ({"thoughts": said.thoughts} if said.thoughts else {}))
            tokens = np.full((1, width), tokenizer.pad_id, np.int32)
            tokens[0, : len(ids)] = ids
            return Response.of_program(*jax.device_put((tokens, np.asarray([len(ids)], np.int32))))

        return respond

    def _split(self, reply: Reply) -> tuple[Said, str]:
        """(the reply without its thoughts, how it ended)."""
        if self._protocol.free_text:  # thoughts are part of the turn, and learned like the rest
            return Said(reply.thoughts, reply.text, True), reply.ended
        said = split_thoughts(reply.text, self._protocol.tags)
        unfinished = reply.ended == STOP and not said.over
        ended = UNFINISHED_THOUGHTS if unfinished else reply.ended
        return said._replace(thoughts=reply.thoughts + said.thoughts), ended


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
        self.refused: set[store.Key] = set()
        self.kept = 0
        self._ends: collections.Counter[str] = collections.Counter()
        self._sums: collections.Counter[str] = collections.Counter()
        self._usage: collections.Counter[str] = collections.Counter()
        self._actions: collections.Counter[tuple[str, str]] = collections.Counter()

    def add(self, record: store.Record) -> None:
        """Counts a line; the later success of what has failed takes the failure back."""
        key = record["example"], record["sample"]
        self._usage.update(record["usage"])
        if "error" in record:
            self.failed.add(key)
            (self.refused.add if record.get("refused") else self.refused.discard)(key)
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
            empty=sum(not turn["reply"].strip() for turn in turns),
        )
        # Lines of older versions do not say how a turn ended.
        self._ends.update(turn.get("ended", "unknown") for turn in turns if turn["cut"])
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
            "refused": len(self.refused - self.done),
            "questions": sums["questions"],
            "em": sums["em"] / questions,
            "f1": sums["f1"] / questions,
            "reward": sums["reward"] / trajectories,
            "turns": sums["turns"],
            "turns_cut": sums["cut"],
            "turns_cut_by": dict(self._ends.most_common()),
            "turns_empty": sums["empty"],
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

    What was refused before comes last, and is no news when it is refused again.

    Raises ConfigError where the server refuses everything, or the last of `max_failures` in a row;
    PassingError where it did not answer the last of them, or nothing was collected at all.
    """
    keys = [(number, sample) for sample in range(samples) for number in range(len(player))]
    todo = [key for key in keys if player.name(key) not in tally.done]
    again = {key for key in todo if player.name(key) in tally.refused}
    todo.sort(key=lambda key: key in again)
    few = 0 if tally.done else max(_FIRST_FEW, concurrency)
    row = _Row(len(todo) - len(again), max_failures, few)
    places = {player.name(key): place for place, key in enumerate(todo)}
    refusal = last = ""
    failed: collections.Counter[str] = collections.Counter()
    try:
        bar = tqdm.tqdm(
            _play_all(player, todo, concurrency),
            desc="collect",
            initial=len(keys) - len(todo),
            total=len(keys),
            mininterval=2.0,
        )
        for record in bar:
            writer.append(store.FAILURES if "error" in record else store.EPISODES, record)
            tally.add(record)
            last = record.get("error", last)
            failed["refused" if record.get("refused") else "failed"] += "error" in record
            bar.set_postfix(kept=tally.kept, failed=len(tally.failed), refresh=False)
            refusal = record["error"] if record.get("refused") else refusal
            row.add(places[record["example"], record["sample"]], record)
    except EndpointError as error:
        raise ConfigError(str(error)) from error
    check(
        not todo or bool(tally.done) or not {player.name(key) for key in todo} <= tally.refused,
        f"the server refused all episodes that there were to play ({len(todo)}), the last one "
        f"with: {refusal}",
    )
    if failed.total() and not tally.done:
        raise PassingError(
            f"nothing was collected (episodes without an answer: {failed['failed']}, refused: "
            f"{failed['refused']}); the last one failed with: {last}. Look at the server, whose "
            "answers --timeout and --retries wait for; when it answers, the same command goes on"
        )


class _Row:
    """Failures in a row, in the order in which episodes were begun.

    Not in the order in which they end: a refusal comes at once, while the episodes that the server
    does play take their time.

    Args:
      news: how many episodes are played for the first time, or again after no answer. They come
        first; of the others, which the server has refused before, another refusal does not count.
      max_failures: in a row.
      few: so many refusals at the very beginning mean that the server refuses everything; 0 where
        it is known to have played an episode.
    """

    def __init__(self, news: int, max_failures: int, few: int):
        self._news, self._max_failures, self._few = news, max_failures, few
        self._over: dict[int, tuple[str | None, bool]] = {}
        self._next = self._failed = 0

    def add(self, place: int, record: Mapping[str, Any]) -> None:
        """Raises ConfigError where this is one too many, PassingError where it was not refused."""
        error, refused = record.get("error"), record.get("refused", False)
        self._over[place] = error, refused
        if error is None:
            self._few = 0
        while self._next in self._over:
            error, refused = self._over.pop(self._next)
            self._next += 1
            if refused and self._next > self._news:
                continue
            self._failed = 0 if error is None else self._failed + 1
            self._few = self._few if refused else 0
            check(
                self._next != self._few,
                f"the server refused the first {self._next} episodes, the last one with: {error}. "
                "When it takes them, the same command goes on",
            )
            if self._failed >= self._max_failures:
                kind = ConfigError if refused else PassingError
                raise kind(
                    f"{self._failed} episodes in a row failed (--max_failures), the last one with: "
                    f"{error}. When the server answers again, the same command goes on"
                )


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
