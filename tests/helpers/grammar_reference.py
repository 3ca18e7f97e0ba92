"""The action protocol read by searching strings: the oracle of grammar_test.

Every token becomes characters: its bytes as U+0000..U+00FF, or one private character for a token
without bytes. Tags are then found with `str.find` and targets with regular expressions.
"""

import dataclasses
import re

from atommem_jax.types import ActionKind, Phase

PRIVATE = 0xF0000


@dataclasses.dataclass
class Action:
    """One action as it was written; `begin` and `end` are offsets of its characters."""

    kind: ActionKind
    target: int
    text: list[int]
    well_formed: bool
    begin: int
    end: int


def spell(tokenizer, literal: str) -> str:
    """The characters of a tag or target."""
    if literal in tokenizer.reserved:
        return chr(PRIVATE + tokenizer.reserved[literal])
    return literal.encode().decode("latin-1")


def spread(tokenizer, ids) -> tuple[str, list[int]]:
    """The characters of `ids`, and the offset of every token boundary (first 0)."""
    characters, offsets = "", [0]
    for i in ids:
        characters += tokenizer.token_bytes[i].decode("latin-1") or chr(PRIVATE + i)
        offsets.append(len(characters))
    return characters, offsets


def cut(tokenizer, ids, length: int) -> list[int]:
    """The tokens that count: up to `length`, eos or pad."""
    kept = []
    for i in list(ids)[:length]:
        if i in (tokenizer.eos_id, tokenizer.pad_id):
            break
        kept.append(i)
    return kept


def read_target(protocol, tokenizer, tag, characters: str, at: int) -> tuple[int, int] | None:
    """(number or 0 if out of range, offset behind it) of the target at `at`; None if unreadable."""
    literals = [tag.target.replace("{}", str(i + 1)) for i in range(protocol.max_target)]
    if literals[0] in tokenizer.reserved:
        for i, literal in enumerate(literals):
            if characters.startswith(spell(tokenizer, literal), at):
                return i + 1, at + 1
        return None
    before, after = (re.escape(part) for part in tag.target.split("{}"))
    match = re.compile(f"{before}([0-9]+){after}").match(characters, at)
    if match is None:
        return None
    in_range = match[1] in [str(i + 1) for i in range(protocol.max_target)]
    return (int(match[1]) if in_range else 0), match.end()


def parse(protocol, tokenizer, ids, length: int) -> list[Action]:
    """All actions in the first `length` tokens, however many."""
    ids = cut(tokenizer, ids, length)
    characters, offsets = spread(tokenizer, ids)
    opens = {spell(tokenizer, tag.open): tag for tag in protocol.tags}
    actions, at = [], 0
    while True:
        found = {characters.find(literal, at): literal for literal in opens}
        found.pop(-1, None)
        if not found:
            return actions
        begin = min(found)
        tag, body = opens[found[begin]], begin + len(found[begin])
        target, readable = 0, tag.target is None
        if tag.target is not None:
            result = read_target(protocol, tokenizer, tag, characters, body)
            if result is not None:
                readable, (target, body) = True, result

        close = spell(tokenizer, tag.close)
        stops = [characters.find(literal, body) for literal in (close, *opens)]
        stops += [i for i in range(body, len(characters)) if ord(characters[i]) >= PRIVATE][:1]
        stop = min((i for i in stops if i >= 0), default=len(characters))
        closed = characters.startswith(close, stop)
        at = stop + len(close) if closed else stop
        if not closed and not any(characters.startswith(literal, stop) for literal in opens):
            at = stop + 1

        first = next(i for i, offset in enumerate(offsets) if offset >= body)
        last = first
        for i in range(first + 1, len(offsets)):
            read = characters[body : offsets[i]]
            begun = (tag_text[:n] for tag_text in (close, *opens) for n in range(1, len(tag_text)))
            if offsets[i] <= stop and not any(read.endswith(part) for part in begun):
                last = i
        proper = closed and readable and (tag.kind != ActionKind.DELETE or stop == body)
        actions.append(Action(tag.kind, target, ids[first:last], proper, begin, at))


def is_turn(protocol, tokenizer, phase: Phase, ids, max_actions: int) -> bool:
    """Whether `ids` is a whole turn of `phase`: what the masks must admit, and nothing else."""
    ids = list(ids)
    if tokenizer.eos_id not in ids:
        return False
    end = ids.index(tokenizer.eos_id)
    if any(i != tokenizer.pad_id for i in ids[end + 1 :]) or tokenizer.pad_id in ids[:end]:
        return False
    actions = parse(protocol, tokenizer, ids, end)
    characters, _ = spread(tokenizer, ids[:end])
    outside, at = "", 0
    for action in actions:
        outside, at = outside + characters[at : action.begin], action.end
    outside += characters[at:]
    if any(ord(c) >= PRIVATE for c in outside) or (outside and not protocol.free_text):
        return False
    kinds = [action.kind for action in actions]
    if phase == Phase.READING:
        counted = len(kinds) <= max_actions and ActionKind.ANSWER not in kinds
    elif phase == Phase.ANSWERING:
        counted = kinds in ([ActionKind.READ], [ActionKind.ANSWER])
    else:
        counted = kinds == [ActionKind.ANSWER]
    optional = (ActionKind.SCRATCHPAD, ActionKind.DELETE)
    targeted = (ActionKind.UPDATE, ActionKind.DELETE)
    return counted and all(
        action.well_formed
        and (action.text or action.kind in optional)
        and (action.target > 0 or action.kind not in targeted)
        for action in actions
    )
