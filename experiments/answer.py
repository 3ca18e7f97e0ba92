"""Lets an agent read a person's own documents, and answers questions from what it remembers.

    python experiments/answer.py --checkpoint=runs/demo --document=notes.txt \\
        --question='Which city does Saltan work in?' --interactive

    python experiments/answer.py --checkpoint=runs/smollm2 --document=report.txt \\
        --set=memory.entry_length=64 --set=memory.slots=32 --set=rollout.response_length=160 \\
        --question='Who wrote it?' --save_memory=report.npz

A document is UTF-8 text of any length: prose, Markdown, what `pdftotext` writes. It is read part by
part; each turn is printed as it happens, then the answers with the entries they came from, and a
page with the memory trace is written to --out. Questions given by --question are known while the
documents are read; those of --interactive come later, one a line, and are answered from the same
memory. --load_memory goes on with what was kept by --save_memory.

A checkpoint trained here reads as it was trained: whole sentences, as many a part as it knows.
"""

import sys
from collections.abc import Iterator

from absl import flags as absl_flags

from atommem_jax.config import check
from atommem_jax.documents import conversation
from experiments import flags

_multi = absl_flags.DEFINE_multi_string
_string = absl_flags.DEFINE_string
CHECKPOINT = _string(
    "checkpoint", None, "A workdir of train.py, its checkpoints folder, or one step in it."
)
STEP = _string("step", "last", "Which step of a workdir: 'last', 'best' or a number.")
BASE = _string(
    "base",
    "",
    "The model that the adapters of a run were trained on, where its init_from is no longer right.",
)
DOCUMENT = _multi("document", [], "Text file to read; repeat the flag for several, in order.")
QUESTION = _multi("question", [], "Question to answer; repeat the flag for several.")
INTERACTIVE = absl_flags.DEFINE_bool(
    "interactive", False, "Go on with questions that are typed, one a line, up to an empty line."
)
SET = _multi(
    "set",
    [],
    "FIELD=VALUE sets a field of memory or rollout to another value than the checkpoint's, such as "
    "memory.entry_length=64; repeat the flag for several.",
)
LOAD_MEMORY = _string("load_memory", None, "Start with the memory in this file.")
SAVE_MEMORY = _string("save_memory", None, "Keep the memory in this file (.npz).")
OUT = _string("out", "runs/answer", "Folder of the page with the memory trace.")
TEMPERATURE = absl_flags.DEFINE_float(
    "temperature", 0.0, "Temperature of sampling; 0 is greedy.", lower_bound=0.0
)
SEED = absl_flags.DEFINE_integer("seed", 0, "Seed of sampling; greedy decoding does not use it.")
CHUNK = absl_flags.DEFINE_integer(
    "chunk_tokens",
    None,
    f"Most tokens of a part of a document. Default: as trained, or {conversation.CHUNK_TOKENS}.",
    lower_bound=1,
)
QUESTION_LIMIT = absl_flags.DEFINE_integer(
    "question_tokens",
    None,
    f"Most tokens of a question. Default: as trained, or {conversation.QUESTION_TOKENS}.",
    lower_bound=1,
)


def main(argv) -> None:
    """See the module docstring."""
    check(len(argv) == 1, f"unexpected arguments {list(argv[1:])}: see --help")
    check(bool(CHECKPOINT.value), "--checkpoint is missing: pass the workdir of a training run")
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    options = conversation.Options(
        checkpoint=CHECKPOINT.value,
        step=STEP.value,
        base=BASE.value,
        documents=DOCUMENT.value,
        questions=QUESTION.value,
        interactive=INTERACTIVE.value,
        settings=SET.value,
        load_memory=LOAD_MEMORY.value,
        save_memory=SAVE_MEMORY.value,
        out=OUT.value,
        temperature=TEMPERATURE.value,
        seed=SEED.value,
        chunk_tokens=CHUNK.value,
        question_tokens=QUESTION_LIMIT.value,
    )
    conversation.run(options, read_lines())


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
