"""An agent reads documents part by part, and answers questions from what it remembers.

Quiet: whoever iterates over the turns of a `Reading` sees each one as it happens, and decides what
is shown of it. Errors name the arguments of `Reader`.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from atommem_jax.agent import load
from atommem_jax.agent import play as play_lib
from atommem_jax.config import ConfigError, check, paths
from atommem_jax.documents import memory_file, session, transcript
from atommem_jax.documents import split as split_lib
from atommem_jax.documents.memory_file import Memory
from atommem_jax.learning import environment
from atommem_jax.memory import embedding
from atommem_jax.report import trace
from atommem_jax.tasks import encoding, schema
from atommem_jax.types import EMPTY, Phase, Response, View

CHUNK_TOKENS, QUESTION_TOKENS = 512, 64  # where a checkpoint does not say what it was trained on
WINDOW = 64
"""Parts that are held at a time; what has more is read in windows, in the memory of one."""

OLD_TOKENS = 16  # of parts and of questions, for a small checkpoint that does not say it

Named = tuple[str, split_lib.Part]
"""(name of a document, a part of it)."""


class Limits(NamedTuple):
    """How large what is read and asked may be."""

    chunk: int  # tokens a part
    sentences: int | None  # a part; None for any number
    question: int  # tokens
    questions: int  # known at a time, as it was trained
    guessed: bool = False  # a small checkpoint that does not say what it was trained on
    keep_space: bool = True  # of a part; False where it was trained on text without line ends


def choose_limits(
    loaded: load.Loaded, chunk_tokens: int | None = None, question_tokens: int | None = None
) -> Limits:
    """As in training, as far as that is known and the arguments do not say otherwise."""
    trained, config = loaded.trained_shape, loaded.parts.config
    if trained and config.task.get("chunk_tokens"):
        # Its parts were as many whole sentences as have room.
        sizes = trained.chunk_length, None, trained.question_length, trained.questions
        limits = Limits(*sizes, keep_space=config.prompt == "chat")
    elif trained:
        limits = Limits(
            trained.chunk_length, trained.facts, trained.question_length, trained.questions
        )
    elif config.prompt == "chat":
        limits = Limits(CHUNK_TOKENS, None, QUESTION_TOKENS, 1)
    else:
        sentences = config.task.get("facts_per_chunk", 1)
        limits = Limits(OLD_TOKENS, sentences, OLD_TOKENS, 1, guessed=True)
    return limits._replace(
        chunk=chunk_tokens or limits.chunk, question=question_tokens or limits.question
    )


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a question."""

    question: str
    text: str  # '' where none was given
    log_prob: float  # of all tokens of the turn that answered
    shown: tuple[trace.Data, ...]  # what that turn saw: `number`, `text` and `cosine`, best first

    @property
    def entries(self) -> list[str]:
        """The texts of the entries that the answer was given from, best first."""
        return [entry["text"] for entry in self.shown]


class Heading(NamedTuple):
    """What a turn is about."""

    label: str  # such as "part 1/4 of notes.txt"
    text: str  # of the part, or of the question

    def __str__(self) -> str:
        text = transcript.clean(self.text, transcript.EXCERPT)
        return f"{transcript.clean(self.label)}\n{transcript.wrap('text', text)}"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn: what it was about, what it saw and what it did. `print` shows it in a few lines."""

    heading: Heading
    setting: environment.Setting = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(repr=False)
    played: session.Turn = dataclasses.field(repr=False)

    @functools.cached_property
    def data(self) -> trace.Data:
        """The turn in plain values, as the memory trace has it."""
        return trace.describe_turn(
            self.setting,
            self.tokenizer,
            self.played.before,
            self.played.after,
            self.played.record,
        )

    @property
    def part(self) -> int:
        """Number of the part that was read, or EMPTY while answering."""
        return int(self.played.record.chunk)

    @property
    def question(self) -> int:
        """Number of the question that was put, or EMPTY while parts are read."""
        return int(self.played.record.question)

    @property
    def tells(self) -> bool:
        """Whether something was written in it, or a question put."""
        return self.question != EMPTY or int(self.played.record.actions.count) > 0

    @property
    def query(self) -> str:
        """The standing query that chose what is shown; '' for none."""
        return self.data["query"]

    @property
    def shown(self) -> list[str]:
        """The texts of the entries that it saw, best first."""
        return [entry["text"] for entry in self.data["shown"]]

    @property
    def actions(self) -> list[trace.Data]:
        """What it wrote: `kind`, `target` and `text` of each, and what became of it (`fates`)."""
        return self.data["actions"]

    def __str__(self) -> str:
        return f"{self.heading}\n{transcript.tell_turn(self.data)}"


class _Told(NamedTuple):
    """What is kept of a turn where a `Turn` would be too much."""

    question: int
    data: trace.Data


class Reader:
    """An agent that is given text.

    Args:
      loaded: the agent.
      chunk_tokens: of a part, at the most; by default as it was trained.
      question_tokens: of a question, at the most; by default as it was trained.

    Raises ConfigError for an agent of a workflow that cannot read text.
    """

    def __init__(
        self,
        loaded: load.Loaded,
        *,
        chunk_tokens: int | None = None,
        question_tokens: int | None = None,
    ):
        check(
            loaded.parts.workflow.program is None,
            f"{loaded.workdir}: of workflow={loaded.parts.config.workflow}, whose reading turns a "
            "program writes that knows only data sets; take a run of another workflow",
        )
        check(
            not loaded.parts.workflow.is_untrained,
            f"workflow={loaded.parts.config.workflow} plays episodes of data sets alone; read with "
            "the workflow that the agent was trained in",
        )
        self._loaded, self.tokenizer = loaded, loaded.parts.tokenizer
        self.limits = choose_limits(loaded, chunk_tokens, question_tokens)
        self._chunks, self._questions = 1, self.limits.questions
        self.sizes = loaded.parts.setting(self._shape()).limits.memory
        self._embed = embedding.bind(loaded.parts.embed, loaded.params)
        if jax.tree.leaves(self._embed):  # beside the parameters of the policy
            self._embed = jax.device_put(self._embed, loaded.mesh.local_devices[0])
        self._encode = encoding.TextEncoder(self.tokenizer)
        self.identity = memory_file.identify(self.sizes, self._embed, self.tokenizer)

    def split(self, name: str, text: str) -> list[split_lib.Part]:
        """The parts of a document. Raises ConfigError where nothing of it can be read."""

        def measure(text: str) -> int:
            return max(len(self._encode(text, first)) for first in (True, False)) if text else 0

        check(bool(text.strip()), f"document={name}: holds no text; pass one with some")
        limits, text = self.limits, re.sub(r"\r\n?|\f", "\n", text)
        try:
            parts = split_lib.split(
                text,
                measure,
                limit=limits.chunk,
                most=limits.sentences,
                keep_space=limits.keep_space,
            )
        except ValueError as error:
            raise ConfigError(
                f"chunk_tokens={limits.chunk}: too few for {name} ({error}); raise it"
            ) from error
        check(bool(parts), f"document={name}: no character of it is known to the tokenizer")
        return parts

    def check_question(self, question: str) -> None:
        """Raises ConfigError for a question that is empty, or longer than there is room for."""
        try:
            tokens = len(self.tokenizer.encode(question)) if question.strip() else 0
        except ValueError as error:
            raise ConfigError(f"question={question!a}: is not UTF-8 text") from error
        check(tokens > 0, "question: is empty; pass one with some text")
        check(
            tokens <= self.limits.question,
            f"question={question}: has {tokens} tokens, and up to {self.limits.question} are read; "
            f"shorten it, or load the agent with question_tokens={tokens}",
        )

    def load_memory(self, path: str | pathlib.Path) -> Memory:
        """What `Memory.save` wrote. Raises ConfigError for a memory of another kind of agent."""
        setting = self._setting(self._shape())
        return memory_file.load(paths.locate(path), setting, self.tokenizer)

    def begin(
        self,
        parts: Sequence[Named],
        questions: Sequence[str],
        memory: Memory | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        announce: Callable[[Heading], None] | None = None,
        full: bool = True,
    ) -> "Reading":
        """An episode over the parts and then the questions, of which no turn is played yet.

        Args:
          parts: with the names of their documents; there may be none.
          questions: known while the parts are read; there may be none.
          memory: to go on from; it stays as it is. None for an empty one.
          temperature: 0 is greedy.
          seed: of sampling.
          announce: is told what a turn is about before the model is asked.
          full: keeps every turn; else those alone that wrote something or put a question, so that
            a document of any length takes no more memory than its text.

        Raises ConfigError for a question that is too long, and for a memory of another kind of
        agent.
        """
        for question in questions:
            self.check_question(question)
        if memory is not None:
            memory_file.check_same("memory", memory.identity, self.identity)
        # Sizes only grow, chunks to powers of two: what was compiled for a document serves the
        # questions after it, and documents of about the same length.
        held = min(len(parts), WINDOW)
        self._chunks = max(self._chunks, 1 << max(held - 1, 0).bit_length())
        self._questions = max(self._questions, len(questions))
        shape = self._shape()
        return Reading(
            self._setting(shape),
            session.model_responder(self._loaded.parts.agent, self._params, temperature),
            shape,
            self.tokenizer,
            self.identity,
            parts=parts,
            questions=questions,
            start=memory,
            seed=seed,
            announce=announce or (lambda heading: None),
            full=full,
        )

    def _setting(self, shape: encoding.EpisodeShape) -> environment.Setting:
        return dataclasses.replace(self._loaded.parts.setting(shape), embed=self._embed)

    def _shape(self) -> encoding.EpisodeShape:
        return encoding.EpisodeShape(
            chunks=self._chunks,
            chunk_length=self.limits.chunk,
            facts=self.limits.sentences or 1,
            questions=self._questions,
            question_length=self.limits.question,
            needs=0,
            answer_length=0,
            query_length=0,
        )

    @functools.cached_property
    def _params(self) -> Any:
        """The parameters as a rollout has them, on one device: one trajectory is played."""
        params, dtype = self._loaded.params, self._loaded.parts.config.rollout.param_dtype
        if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
            params = jax.device_put(params, self._loaded.mesh.local_devices[0])
        if dtype != "float32":
            params = jax.jit(play_lib.cast_matrices, static_argnums=1)(params, dtype)
        return params


class Reading:
    """One episode of a `Reader`: iterate over `turns`; memory and answers are those up to there."""

    def __init__(
        self,
        setting: environment.Setting,
        respond: session.Respond,
        shape: encoding.EpisodeShape,
        tokenizer: Any,
        identity: dict[str, Any],
        *,
        parts: Sequence[Named],
        questions: Sequence[str],
        start: Memory | None,
        seed: int,
        announce: Callable[[Heading], None],
        full: bool,
    ):
        self._setting, self._tokenizer, self._identity = setting, tokenizer, identity
        self._parts, self._questions, self._start = parts, questions, start
        self._number = start.episodes if start else 0
        example = make_example(self._number, [part for _, part in parts], questions)
        self._stream = encoding.EpisodeStream(example, encoding.TextEncoder(tokenizer), shape)
        self._heading, self._last_chunk = Heading("", ""), EMPTY
        self._full, self._begun = full, False
        self._turns: list[Turn | _Told] = []

        def respond_announced(view: View, keys: jax.Array) -> Response:
            self._heading = self._head(int(view.chunk[0]), int(view.question[0]))
            announce(self._heading)
            return respond(view, keys)

        self._session = session.Session(
            setting,
            respond_announced,
            self._stream.window(0),
            window=self._stream.window,
            max_turns=setting.limits.turn_bound(len(parts), len(questions)),
            keep=False,
            table=start.state if start else None,
            trajectory_id=self._number,
            seed=seed,
        )

    def turns(self, until: Phase = Phase.DONE) -> Iterator[Turn]:
        """Plays the turns that are left, each when it is asked for.

        until: `Phase.ANSWERING` stops before the first question is put.
        """
        for played in self._session.turns(until):
            turn = Turn(self._heading, self._setting, self._tokenizer, played)
            self._begun = True
            if self._full or turn.tells:
                chunk = int(played.record.chunk)
                self._stream.mark([chunk] if chunk != EMPTY else [])
                self._turns.append(turn if self._full else _Told(turn.question, turn.data))
            yield turn

    @property
    def tokens_read(self) -> int:
        """Tokens of the parts before the window that is read now."""
        return self._stream.tokens_read

    @property
    def memory(self) -> Memory:
        """What is remembered now."""
        read = dict.fromkeys(name for name, _ in self._parts)
        before = self._start.documents if self._start else ()
        return Memory(
            jax.device_get(self._session.memory),
            self._number + self._begun,
            (*before, *read),
            self._identity,
            self._tokenizer,
        )

    def answers(self) -> list[Answer]:
        """One of each question; with text '' where none was given, or it was not put yet."""
        if not self._begun or not self._questions:
            return []
        given = self._session.answers()
        last = {turn.question: turn for turn in self._turns}
        return [
            Answer(
                question,
                self._tokenizer.decode(given[q][0]),
                given[q][1],
                tuple(last[q].data["shown"]) if q in last else (),
            )
            for q, question in enumerate(self._questions)
        ]

    def describe(self) -> trace.Data | None:
        """The episode in plain values, for a page; None before its first turn.

        It has the turns that were kept, and the parts that they read, which say their numbers
        where others are missing.
        """
        if not self._begun:
            return None
        turns = [turn.data for turn in self._turns]
        numbers = sorted({turn["chunk"] for turn in turns if turn["chunk"] is not None})
        places = {number: place for place, number in enumerate(numbers)}
        told = trace.describe_episode(
            self._setting,
            self._stream.digest(),
            self._tokenizer,
            trajectory=self._number,
            answers=[answer.text for answer in self.answers()],
            aliases=[[]] * len(self._questions),
            turns=[
                turn if turn["chunk"] is None else {**turn, "chunk": places[turn["chunk"]]}
                for turn in turns
            ],
            start=self._start.state if self._start else None,
        )
        if len(numbers) < len(self._parts) and not self._full:
            pairs = zip(numbers, told["chunks"], strict=True)
            told["chunks"] = [f"[part {number + 1}] {text}" for number, text in pairs]
        return told

    def _head(self, chunk: int, question: int) -> Heading:
        if chunk == EMPTY:
            label = f"question {question + 1}/{len(self._questions)}"
            return Heading(label, self._questions[question])
        name, part = self._parts[chunk]
        again = " again" if chunk == self._last_chunk else ""
        self._last_chunk = chunk
        label = f"part {chunk + 1}/{len(self._parts)} of {name}{again}"
        return Heading(label, " ".join(part.sentences))


def make_example(
    number: int, parts: Sequence[split_lib.Part], questions: Sequence[str]
) -> schema.Example:
    """Parts and questions as a data set has them, without what only a teacher would know."""

    def fact(text: str) -> schema.Fact:
        return {
            "text": text, "subject": "", "support": False, "supersedes": EMPTY, "category": EMPTY,
        }  # fmt: skip

    return {
        "id": number,
        "chunks": [[fact(text) for text in part.sentences] for part in parts],
        "questions": [{"text": text, "aliases": [""], "needs": []} for text in questions],
        "focus": "",
    }
