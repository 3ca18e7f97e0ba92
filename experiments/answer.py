"""Lets an agent read a person's own documents, and answers questions from what it remembers.

    python experiments/answer.py --checkpoint=runs/demo --document=notes.txt \\
        --question='Which city does Saltan work in?' --interactive

    python experiments/answer.py --checkpoint=runs/smollm2 --document=report.txt \\
        --set=memory.entry_length=64 --set=memory.slots=32 --set=rollout.response_length=160 \\
        --question='Who wrote it?' --save_memory=report.npz

A document is text of any length, in UTF-8 or UTF-16: prose, Markdown, what `pdftotext` writes. It
is read part by part; each turn is printed as it happens, then the answers with the entries they
came from, and a page with the memory trace is written to --out. Questions given by --question are
known while the documents are read; those of --interactive come later, one a line, and are answered
from the same memory. --load_memory goes on with what was kept by --save_memory.

Of a document of more than 1,000 parts only the turns that write something are printed and kept
(--records), beside a progress bar: it takes no more memory than its text, whatever its length.

A checkpoint trained here reads as it was trained: whole sentences, as many a part as it knows.
"""

import contextlib
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import tqdm
from absl import flags as absl_flags

from atommem_jax import folder_lock
from atommem_jax.agent import load
from atommem_jax.config import ConfigError, check, paths
from atommem_jax.documents import reader as reader_lib
from atommem_jax.documents import split, transcript
from atommem_jax.documents.memory_file import Memory
from atommem_jax.documents.reader import Heading, Named, Reader
from atommem_jax.report import page as page_lib
from atommem_jax.report import trace
from experiments import flags

LONG = 1000  # parts

_multi = absl_flags.DEFINE_multi_string
_string = absl_flags.DEFINE_string
CHECKPOINT = flags.define_path(
    "checkpoint", None, "A workdir of train.py, its checkpoints folder, or one step in it."
)
STEP = _string("step", "last", "Which step of a workdir: 'last', 'best' or a number.")
BASE = flags.define_path(
    "base",
    "",
    "The model that the adapters of a run were trained on, where its init_from is no longer right.",
)
DOCUMENT = flags.define_paths(
    "document", "Text file to read; repeat the flag for several, in order.", local=True
)
QUESTION = _multi("question", [], "Question to answer; repeat the flag for several.")
INTERACTIVE = absl_flags.DEFINE_bool(
    "interactive", False, "Go on with questions that are typed, one a line, up to an empty line."
)
SET = flags.define_settings(
    "sets a field of memory or rollout to another value than the checkpoint's, such as "
    "memory.entry_length=64; repeat the flag for several."
)
LOAD_MEMORY = flags.define_path(
    "load_memory", None, "Start with the memory in this file.", local=True
)
SAVE_MEMORY = flags.define_path(
    "save_memory", None, "Keep the memory in this file (.npz).", local=True
)
OUT = flags.define_path("out", "runs/answer", "Folder of the page with the memory trace.")
RECORDS = absl_flags.DEFINE_enum(
    "records",
    None,
    ["full", "changes"],
    "Which turns are printed, and kept for the page: all, or those that write something or answer. "
    f"Default: all of a document of up to {LONG} parts, else changes.",
)
TEMPERATURE = absl_flags.DEFINE_float(
    "temperature", 0.0, "Temperature of sampling; 0 is greedy.", lower_bound=0.0
)
SEED = absl_flags.DEFINE_integer("seed", 0, "Seed of sampling; greedy decoding does not use it.")
CHUNK = absl_flags.DEFINE_integer(
    "chunk_tokens",
    None,
    f"Most tokens of a part of a document. Default: as trained, or {reader_lib.CHUNK_TOKENS}.",
    lower_bound=1,
)
QUESTION_LIMIT = absl_flags.DEFINE_integer(
    "question_tokens",
    None,
    f"Most tokens of a question. Default: as trained, or {reader_lib.QUESTION_TOKENS}.",
    lower_bound=1,
)


def main(argv) -> None:
    """See the module docstring."""
    started = time.perf_counter()
    check_flags(argv)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    # ------------------------------------------------------------------ agent, documents
    texts = [(pathlib.Path(path).name, split.read(path)) for path in DOCUMENT.value]
    loaded = load.load(CHECKPOINT.value or "", STEP.value, 1, base=BASE.value, settings=SET.value)
    with in_flags():
        reader = Reader(loaded, chunk_tokens=CHUNK.value, question_tokens=QUESTION_LIMIT.value)
        parts = [(name, part) for name, text in texts for part in tell_split(reader, name, text)]
        for question in QUESTION.value:
            reader.check_question(question)
    tell_agent(loaded, reader)
    memory = read_memory(reader)
    tell_notes(loaded, reader, parts)

    with folder_lock.hold(OUT.value, f"--out={OUT.value}"):
        talk(
            Conversation(reader, memory, started), parts, f"step {loaded.step} of {loaded.workdir}"
        )


def talk(conversation: "Conversation", parts: Sequence[Named], name: str) -> None:
    """Reads the parts, answers the questions and writes what came of it; `name` of the agent."""
    # ------------------------------------------------------------------ reading, answering
    try:
        if parts or QUESTION.value:
            conversation.play(parts, QUESTION.value)
        for line in read_lines() if INTERACTIVE.value else ():
            try:
                with in_flags():
                    conversation.reader.check_question(line)
            except ConfigError as error:
                print(error)
                continue
            conversation.play([], [line])
    except KeyboardInterrupt:
        print("\nstopped; what is written below is up to here")

    # ------------------------------------------------------------------ page, memory
    if conversation.memory is None or not conversation.episodes:
        print("nothing was played: no page and no memory are written")
        return
    # What cannot be made again first, and one that fails does not cost the other.
    memory, episodes = conversation.memory, conversation.episodes
    print()
    saved = not SAVE_MEMORY.value or keep(
        "memory", SAVE_MEMORY.value, lambda: memory.save(SAVE_MEMORY.value)
    )
    if not (keep("trace", OUT.value, lambda: write_page(memory, episodes, name)) and saved):
        sys.exit(1)


def keep(what: str, where: str, write: Callable[[], pathlib.Path | None]) -> bool:
    """Writes an outcome and prints where it is; returns False, and says why, where it cannot."""
    try:
        print(f"{what}: {write() or where}", flush=True)
    except (OSError, ConfigError) as error:
        why = getattr(error, "strerror", None) or error
        print(f"answer.py: the {what} could not be written to {where} ({why})", file=sys.stderr)
        return False
    return True


# ---------------------------------------------------------------------------------------------
# What is asked for


def check_flags(argv: Sequence[str]) -> None:
    """Raises ConfigError for flags that cannot be, before anything is read or played."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    check(bool(CHECKPOINT.value), "--checkpoint is missing: pass the workdir of a training run")
    check(
        bool(DOCUMENT.value or LOAD_MEMORY.value),
        "--document is missing: pass a text file to read, or --load_memory with what was read "
        "before",
    )
    check(
        bool(QUESTION.value or INTERACTIVE.value),
        "--question is missing: pass what to answer, or --interactive to ask when all is read",
    )
    paths.try_folder(OUT.value, f"--out={OUT.value}")
    if SAVE_MEMORY.value:
        paths.try_file(SAVE_MEMORY.value, f"--save_memory={SAVE_MEMORY.value}")


@contextlib.contextmanager
def in_flags(prefix: str = "") -> Iterator[None]:
    """The library's errors name its arguments; here they are flags.

    prefix: the flag that an error is about, where the library does not know.
    """
    try:
        yield
    except ConfigError as error:
        message = re.sub(r"^(?=(?:question|chunk_tokens|document)\b)", "--", f"{prefix}{error}")
        raise type(error)(
            re.sub(r"load the agent with ((?: ?[\w.]+=\w+)+)", _spell_arguments, message)
        ) from error


def _spell_arguments(match: re.Match[str]) -> str:
    """`pass` with the flags that set these arguments of a Reader, or settings of an agent."""
    arguments = match[1].split()
    return "pass " + " ".join(
        f"--{argument}" if argument.partition("=")[0] in absl_flags.FLAGS else f"--set={argument}"
        for argument in arguments
    )


def read_memory(reader: Reader) -> Memory | None:
    """The memory of --load_memory; says what it holds."""
    if not LOAD_MEMORY.value:
        return None
    with in_flags("--load_memory="):
        memory = reader.load_memory(LOAD_MEMORY.value)
    print(f"{LOAD_MEMORY.value}: {len(memory.entries)} entries, of {', '.join(memory.documents)}")
    return memory


# ---------------------------------------------------------------------------------------------
# What is told


def tell_split(reader: Reader, name: str, text: str) -> list[split.Part]:
    """The parts of a document; prints how many there are."""
    parts, limits = reader.split(name, text), reader.limits
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


def tell_agent(loaded: load.Loaded, reader: Reader) -> None:
    """Prints which agent it is, and the sizes of its memory."""
    sizes = reader.sizes
    print(
        f"step {loaded.step} of {loaded.workdir}, {describe_decoding()}; {sizes.slots} entries of "
        f"up to {sizes.entry_length} tokens, {sizes.shown} shown"
    )


def tell_notes(loaded: load.Loaded, reader: Reader, parts: Sequence[Named]) -> None:
    """Prints in what this reading differs from what the agent was trained on."""
    limits, asked = reader.limits, len(QUESTION.value)
    if limits.guessed:
        print(
            "note: this checkpoint does not say what it was trained on; parts and questions have "
            f"up to {reader_lib.OLD_TOKENS} tokens, or what --chunk_tokens and --question_tokens "
            "say"
        )
    if loaded.trained_shape and asked > limits.questions:
        print(
            f"note: trained with up to {limits.questions} questions at a time, not {asked}: ask "
            "the others with --interactive"
        )
    if parts and not asked:
        print("note: no question is known while reading; what matters, the agent must guess")


def describe_decoding() -> str:
    """How the agent chooses its tokens."""
    heat = TEMPERATURE.value
    return f"temperature {heat:g}, seed {SEED.value}" if heat else "greedy"


class Conversation:
    """A memory, what is read into it and the questions asked of it; prints all as it happens.

    Attributes:
      memory: as the last episode left it.
      episodes: traces of those that were played, for the page.
    """

    def __init__(self, reader: Reader, memory: Memory | None, started: float):
        self.reader, self.memory, self._started = reader, memory, started
        self.episodes: list[trace.Data] = []

    def play(self, parts: Sequence[Named], questions: Sequence[str]) -> None:
        """Reads the parts, then answers the questions; keeps what was done where it is stopped."""
        full = RECORDS.value == "full" or (RECORDS.value is None and len(parts) <= LONG)
        with in_flags():
            reading = self.reader.begin(
                parts,
                questions,
                self.memory,
                temperature=TEMPERATURE.value,
                seed=SEED.value,
                announce=self._tell_heading if full else None,
                full=full,
            )
        try:
            for turn in reading.turns() if full else self._watch(reading, len(parts)):
                if not full:
                    self._tell_heading(turn.heading)
                print(transcript.tell_turn(turn.data), flush=True)
        finally:
            told = reading.describe()
            if told is not None:
                self.episodes.append(told)
                self.memory = reading.memory
        for answer in reading.answers():
            print()
            print(transcript.tell_answer(answer.question, answer.text, answer.shown), flush=True)

    def _watch(self, reading: reader_lib.Reading, parts: int) -> Iterator[reader_lib.Turn]:
        """The turns that tell something; a progress bar counts the parts of all of them."""
        with tqdm.tqdm(total=parts, unit=" parts", mininterval=1.0, leave=False) as bar:
            for turn in reading.turns():
                bar.update(max(turn.part + 1 - bar.n, 0))
                bar.set_postfix_str(f"{reading.tokens_read:,} tokens", refresh=False)
                if turn.tells:
                    bar.clear()
                    yield turn

    def _tell_heading(self, heading: Heading) -> None:
        seconds = f"{time.perf_counter() - self._started:7.1f} s"
        print(f"\n[{seconds}] {heading}", flush=True)


def write_page(memory: Memory, episodes: list[trace.Data], checkpoint: str) -> pathlib.Path:
    """Writes the page of the memory trace to --out; returns where it is."""
    told = ", ".join(memory.documents) or "memory"
    return page_lib.write(
        OUT.value,
        [page_lib.Run(name=told, facts={"checkpoint": checkpoint})],
        page_lib.Traces(episodes, {"documents": told, "decoding": describe_decoding()}),
    )


def read_lines() -> Iterator[str]:
    """What a person types, up to an empty line or the end."""
    prompt = "\nquestion (an empty line ends): " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        yield line


if __name__ == "__main__":
    flags.run(main)
