"""What an agent does, in lines for a terminal: turns as `trace` describes them.

Text of documents and models is shown on one line of printable characters each: nothing in it can
steer the terminal.
"""

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Data = Mapping[str, Any]

EXCERPT = 240
"""Characters of a long text that are shown."""


def clean(text: str, most: int | None = None) -> str:
    """One line of printable characters; of more than `most`, both ends."""
    line = " ".join(text.split())
    if most is not None and len(line) > most:
        half = (most - 5) // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def wrap(label: str, text: str, indent: int = 2) -> str:
    """A labelled paragraph, as wide as the terminal and at most 100 columns."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 40), 100)
    first = f"{' ' * indent}{label:9} " if label else " " * indent
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=" " * min(indent + 10, len(first)),
        break_on_hyphens=False,
    )


def tell_turn(turn: Data) -> str:
    """What the turn was shown of the memory, and what became of what it wrote."""
    lines = []
    if turn["query"]:
        lines.append(wrap("query", clean(turn["query"], EXCERPT)))
    lines += tell_shown("shown", turn["shown"])
    lines += [wrap(*_tell_action(action)) for action in turn["actions"]]
    if not turn["actions"]:
        lines.append(wrap("did", "nothing"))
    return "\n".join(lines)


def tell_shown(label: str, shown: Iterable[Data]) -> list[str]:
    """Entries with their number and similarity, one a line."""
    return [
        wrap(
            label if i == 0 else "",
            f"{entry['number']} ({entry['cosine']:.2f}) {clean(entry['text'], EXCERPT)}",
            indent=2 if i == 0 else 12,
        )
        for i, entry in enumerate(shown)
    ]


def _tell_action(action: Data) -> tuple[str, str]:
    """(label, what was written and what became of it)."""
    label = action["kind"] if action["target"] is None else f"{action['kind']} {action['target']}"
    label = {"scratchpad": "notes"}.get(label, label)
    notes = list(action["fates"]) or ["not done"]
    if "kept_tokens" in action:
        where = notes.index("truncated")
        notes[where] = f"truncated to {action['kept_tokens']} of {action['tokens']} tokens"
    if action["was"]:
        was = {"create": "evicted", "update": "was", "delete": "removed"}[action["kind"]]
        notes = [note for note in notes if note != was]
        notes.append(f"{was}: {clean(action['was'], EXCERPT)}")
    if "why" in action:
        notes.append(action["why"])
    text = clean(action.get("kept", action["text"]), EXCERPT)
    return label, f"{text} [{'; '.join(notes)}]".strip()


def tell_answer(question: str, answer: str, shown: Sequence[Data]) -> str:
    """A question, the answer to it, and the entries that its turn was shown."""
    lines = [wrap("question", clean(question)), wrap("answer", clean(answer) or "(none)")]
    lines += tell_shown("from", shown) or [wrap("from", "no entry: none was shown")]
    return "\n".join(lines)
