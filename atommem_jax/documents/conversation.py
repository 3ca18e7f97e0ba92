"""What `answer.py` does: an agent reads documents, and answers questions from what it remembers.

Without flags, so that any script can use it.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from atommem_jax.agent import load
from atommem_jax.agent import play as play_lib
from atommem_jax.config import ConfigError, check
from atommem_jax.documents import memory_file, transcript
from atommem_jax.documents import split as split_lib
from atommem_jax.documents.session import Session, model_responder
from atommem_jax.report import page as page_lib
from atommem_jax.report import trace
from atommem_jax.tasks import encoding, schema
from atommem_jax.types import EMPTY, MemoryState, Response, View

CHUNK_TOKENS, QUESTION_TOKENS = 512, 64  # where a checkpoint does not say what it was trained on
OLD_TOKENS = 16  # of parts and of questions, for a small checkpoint that does not say it


@dataclasses.dataclass(frozen=True)
class Options:
    """What is read, asked and kept: the flags of `answer.py`."""

    checkpoint: str
    step: str = "last"
    base: str = ""
    documents: Sequence[str] = ()
    questions: Sequence[str] = ()
    interactive: bool = False
    settings: Sequence[str] = ()
    load_memory: str | None = None
    save_memory: str | None = None
    out: str = "runs/answer"
    temperature: float = 0.0
    seed: int = 0
    chunk_tokens: int | None = None
    question_tokens: int | None = None


class Answer(NamedTuple):
    """What came of a question."""

    question: str
    text: str  # '' where none was given
    shown: list[trace.Data]  # the entries that its last turn saw, best first


def run(options: Options, lines: Iterable[str] = ()) -> list[Answer]:
    """Reads and answers as the options say; returns all answers.

    lines: the questions of `options.interactive`.

    Raises ConfigError before anything is read or played, for options that cannot be.
    """
    started = time.perf_counter()
    _check_options(options)
    texts = [split_lib.read(path) for path in options.documents]
    loaded = load.load(
        options.checkpoint, options.step, 1, base=options.base, settings=options.settings
    )
    check(
        loaded.parts.workflow.program is None,
        f"--checkpoint={options.checkpoint}: of workflow={loaded.parts.config.workflow}, "
        "whose reading turns a program writes that knows only data sets; pass a run of another "
        "workflow",
    )
    limits = choose_limits(loaded, options)
    names = [pathlib.Path(path).name for path in options.documents]
    parts = [
        (name, part)
        for name, text in zip(names, texts, strict=True)
        for part in split(loaded, name, text, limits)
    ]
    for question in options.questions:
        check_question(loaded, question, limits)
    conversation = Conversation(loaded, options, limits, len(parts), started)
    if limits.note:
        print(f"note: {limits.note}")
    if parts and not options.questions:
        print("note: no question is known while reading; what matters, the agent must guess")
    answers: list[Answer] = []
    try:
        if parts or options.questions:
            answers += conversation.play(parts, options.questions)
        for line in lines if options.interactive else ():
            try:
                check_question(loaded, line, limits)
            except ConfigError as error:
                print(error)
                continue
            answers += conversation.play([], [line])
    except KeyboardInterrupt:
        print("\nstopped; what is written below is up to here")
    conversation.write(names)
    return answers


# ---------------------------------------------------------------------------------------------
# What is asked for


def _check_options(options: Options) -> None:
    check(
        bool(options.documents or options.load_memory),
        "--document is missing: pass a text file to read, or --load_memory with what was read "
        "before",
    )
    check(
        bool(options.questions or options.interactive),
        "--question is missing: pass what to answer, or --interactive to ask when all is read",
    )
    out = pathlib.Path(options.out)
    check(not out.exists() or out.is_dir(), f"--out={out}: is a file; pass a folder")
    if options.save_memory:
        path = pathlib.Path(options.save_memory)
        check(not path.is_dir(), f"--save_memory={path}: is a folder; pass a file in it")
        check(
            path.parent.is_dir(),
            f"--save_memory={path}: there is no folder {path.parent}; make it first",
        )


class Limits(NamedTuple):
    """How large what is read and asked may be."""

    chunk: int  # tokens a part
    sentences: int | None  # a part; None for any number
    question: int  # tokens
    questions: int  # known at a time, as it was trained
    note: str = ""


def choose_limits(loaded: load.Loaded, options: Options) -> Limits:
    """As in training, as far as that is known and the flags do not say otherwise."""
    trained, config = loaded.trained_shape, loaded.parts.config
    if trained:
        note = ""
        if len(options.questions) > trained.questions:
            note = (
                f"trained with up to {trained.questions} questions at a time, not "
                f"{len(options.questions)}: ask the others with --interactive"
            )
        limits = Limits(
            trained.chunk_length, trained.facts, trained.question_length, trained.questions, note
        )
    elif config.prompt == "chat":
        limits = Limits(CHUNK_TOKENS, None, QUESTION_TOKENS, 1)
    else:
        note = (
            f"this checkpoint does not say what it was trained on; parts and questions have up to "
            f"{OLD_TOKENS} tokens, or what --chunk_tokens and --question_tokens say"
        )
        sentences = config.task.get("facts_per_chunk", 1)
        limits = Limits(OLD_TOKENS, sentences, OLD_TOKENS, 1, note)
    return limits._replace(
        chunk=options.chunk_tokens or limits.chunk,
        question=options.question_tokens or limits.question,
    )


def split(loaded: load.Loaded, name: str, text: str, limits: Limits) -> list[split_lib.Part]:
    """The parts of a document; prints how many there are."""
    encode_text = encoding.TextEncoder(loaded.parts.tokenizer)

    def measure(text: str) -> int:
        return max(len(encode_text(text, first)) for first in (True, False)) if text else 0

    try:
        parts = split_lib.split(text, measure, limit=limits.chunk, most=limits.sentences)
    except ValueError as error:
        raise ConfigError(
            f"--chunk_tokens={limits.chunk}: too few for {name} ({error}); raise it"
        ) from error
    check(bool(parts), f"--document={name}: no character of it is known to the tokenizer")
    whole = "any number of" if limits.sentences is None else f"up to {limits.sentences}"
    print(
        f"{name}: {len(text.split())} words in {len(parts)} parts of {whole} sentences, up to "
        f"{limits.chunk} tokens"
    )
    cut = sum(part.cut for part in parts)
    if cut:
        print(
            f"note: {cut} of its pieces are cut from sentences that are longer than a part; "
            "--chunk_tokens makes parts longer"
        )
    return parts


def check_question(loaded: load.Loaded, question: str, limits: Limits) -> None:
    """Raises ConfigError for a question that is empty, or longer than the setting holds."""
    try:
        tokens = len(loaded.parts.tokenizer.encode(question)) if question.strip() else 0
    except ValueError as error:
        raise ConfigError(f"--question={question!a}: is not UTF-8 text") from error
    check(tokens > 0, "--question: is empty; pass a question, or leave the flag out")
    check(
        tokens <= limits.question,
        f"--question={question}: has {tokens} tokens, and up to {limits.question} are read; "
        f"shorten it, or pass --question_tokens={tokens}",
    )


# ---------------------------------------------------------------------------------------------
# What happens


class Conversation:
    """A memory, what is read into it, and the questions asked of it; one episode after another."""

    def __init__(
        self,
        loaded: load.Loaded,
        options: Options,
        limits: Limits,
        parts: int,
        started: float,
    ):
        self._loaded, self._options, self._started = loaded, options, started
        self._tokenizer = loaded.parts.tokenizer
        # A power of two: documents of about the same length share compiled programs.
        self._shape = encoding.EpisodeShape(
            chunks=1 << max(parts - 1, 0).bit_length(),
            chunk_length=limits.chunk,
            facts=limits.sentences or 1,
            questions=max(len(options.questions), limits.questions),
            question_length=limits.question,
            needs=0,
            answer_length=0,
            query_length=0,
        )
        self._setting = loaded.parts.setting(self._shape)
        self._memory: MemoryState | None = None
        self._episodes, self._read = 0, ()
        self._described: list[trace.Data] = []
        dtype = loaded.parts.config.rollout.param_dtype
        params = loaded.params
        if dtype != "float32":
            params = jax.jit(play_lib.cast_matrices, static_argnums=1)(params, dtype)
        self._respond = model_responder(loaded.parts.agent, params, options.temperature)
        sizes = self._setting.config
        print(
            f"step {loaded.step} of {loaded.workdir}, {self._decoding()}; {sizes.slots} entries of "
            f"up to {sizes.entry_length} tokens, {sizes.shown} shown"
        )
        if options.load_memory:
            path = pathlib.Path(options.load_memory)
            saved = memory_file.load(path, self._setting, self._tokenizer)
            self._memory, self._episodes, self._read = saved
            entries = int(saved.state.valid.sum())
            print(f"{path}: {entries} entries, of {', '.join(saved.documents)}")

    def _decoding(self) -> str:
        heat = self._options.temperature
        return f"temperature {heat:g}, seed {self._options.seed}" if heat else "greedy"

    def play(
        self, parts: Sequence[tuple[str, split_lib.Part]], questions: Sequence[str]
    ) -> list[Answer]:
        """Reads the parts (with the names of their documents), then answers the questions."""
        number, start = self._episodes, self._memory
        example = make_example(number, [part for _, part in parts], questions)
        episode = encoding.encode(example, self._tokenizer, self._shape, partial=True)
        again = EMPTY  # the part that was shown last

        def respond(view: View, keys: jax.Array) -> Response:
            nonlocal again
            self._say_head(parts, questions, view, again)
            again = int(view.chunk[0])
            return self._respond(view, keys)

        session = Session(
            self._setting,
            respond,
            episode,
            table=start,
            trajectory_id=number,
            seed=self._options.seed,
        )
        turns: list[trace.Data] = []
        try:
            for turn in session.turns():
                told = trace.describe_turn(
                    self._setting, self._tokenizer, turn.before, turn.after, turn.record
                )
                turns.append(told)
                print(transcript.tell_turn(told), flush=True)
        finally:
            answers = self._end(session, episode, start, turns, questions)
        for answer in answers:
            print()
            print(transcript.tell_answer(*answer), flush=True)
        return answers

    def _end(
        self,
        session: Session,
        episode: Any,
        start: MemoryState | None,
        turns: list[trace.Data],
        questions: Sequence[str],
    ) -> list[Answer]:
        """Keeps the memory and the trace of an episode; returns its answers."""
        if not turns:
            return []
        trajectory = jax.device_get(session.trajectory())
        texts = [
            self._tokenizer.decode(row[:length].tolist())
            for row, length, _ in zip(
                trajectory.answers[0], trajectory.answer_lengths[0], questions, strict=False
            )
        ]
        self._described.append(
            trace.describe_episode(
                self._setting,
                episode,
                self._tokenizer,
                trajectory=self._episodes,
                answers=texts,
                aliases=[[]] * len(questions),
                turns=turns,
                start=start,
            )
        )
        self._memory, self._episodes = jax.device_get(session.memory), self._episodes + 1
        shown = {turn["question"]: turn["shown"] for turn in turns}
        return [
            Answer(question, text, shown.get(q, []))
            for q, (question, text) in enumerate(zip(questions, texts, strict=True))
        ]

    def _say_head(
        self,
        parts: Sequence[tuple[str, split_lib.Part]],
        questions: Sequence[str],
        view: View,
        again: int,
    ) -> None:
        """Prints what a turn is about, before the model is asked."""
        chunk, question = int(view.chunk[0]), int(view.question[0])
        seconds = f"{time.perf_counter() - self._started:7.1f} s"
        if chunk != EMPTY:
            name, part = parts[chunk]
            label, text = f"part {chunk + 1}/{len(parts)} of {name}", " ".join(part.sentences)
            label += " again" if chunk == again else ""
        else:
            label, text = f"question {question + 1}/{len(questions)}", questions[question]
        print(f"\n[{seconds}] {transcript.clean(label)}")
        print(transcript.wrap("text", transcript.clean(text, transcript.EXCERPT)), flush=True)

    def write(self, names: Sequence[str]) -> None:
        """Writes the page, and the memory where that is asked for."""
        if not self._described:
            print("nothing was played: no page and no memory are written")
            return
        options, read = self._options, (*self._read, *names)
        told = ", ".join(read) or "memory"
        page = page_lib.write(
            options.out,
            [
                page_lib.Run(
                    name=told,
                    facts={"checkpoint": f"step {self._loaded.step} of {self._loaded.workdir}"},
                )
            ],
            page_lib.Traces(self._described, {"documents": told, "decoding": self._decoding()}),
        )
        print(f"\ntrace: {page}")
        if options.save_memory:
            saved = memory_file.Saved(self._memory, self._episodes, read)
            memory_file.save(
                pathlib.Path(options.save_memory), saved, self._setting, self._tokenizer
            )
            print(f"memory: {options.save_memory}")


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
