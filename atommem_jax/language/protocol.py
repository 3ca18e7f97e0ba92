"""The action protocol: which literals open, aim and close each kind of action.

A `Protocol` is data, and knows of no tokens; `spell` writes its literals in those of a tokenizer.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping

from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.types import ActionKind

_TARGETED = (ActionKind.UPDATE, ActionKind.DELETE)


@dataclasses.dataclass(frozen=True)
class Tag:
    """How one kind of action is written: `open`, the target if any, the text, `close`.

    Attributes:
      kind: what the action is.
      open: literal that starts the action.
      close: literal that ends it; several kinds may share one.
      target: the literal of a target with `{}` for its number, such as "<{}>" or "Memory {}:";
        None for kinds without a target.
    """

    kind: ActionKind
    open: str
    close: str
    target: str | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The action language.

    Attributes:
      name: for messages and reports.
      tags: one a kind; kinds without a tag do not exist in this protocol.
      max_target: largest number a target can have (K of the memory).
      free_text: whether masks admit text between actions. Parsing always skips it.

    Raises ValueError on construction for a tag that repeats or contains another, a kind given
    twice, no answer tag, or a target that is missing, out of place or without its braces.
    """

    name: str
    tags: tuple[Tag, ...]
    max_target: int
    free_text: bool = False

    def __post_init__(self) -> None:
        if self.max_target < 1:
            raise ValueError(
                f"max_target: found {self.max_target}; allowed are 1 and more. Use the number of "
                "entries that the memory shows."
            )
        kinds = [tag.kind for tag in self.tags]
        if len(set(kinds)) < len(kinds) or ActionKind.ANSWER not in kinds or 0 in kinds:
            raise ValueError(
                f"tags: found the kinds {[kind.name for kind in kinds]}; allowed are distinct "
                "kinds other than NONE, with ANSWER among them. Give each kind one Tag."
            )
        for tag in self.tags:
            self._check_target(tag)
        opens = [tag.open for tag in self.tags]
        literals = [*opens, *{tag.close: None for tag in self.tags}]
        for i, one in enumerate(literals):
            for other in literals[:i] + literals[i + 1 :]:
                if one in other:
                    raise ValueError(
                        f"tags: found {one!r} within {other!r}; allowed are literals none of "
                        "which is empty, repeats or contains another (close tags may be shared). "
                        "Rename one of them."
                    )

    def _check_target(self, tag: Tag) -> None:
        if (tag.target is not None) != (tag.kind in _TARGETED):
            raise ValueError(
                f"target: found {tag.target!r} in the tag of {tag.kind.name}; allowed is a target "
                "for UPDATE and DELETE, and None for the others. Correct the Tag."
            )
        if tag.target is None:
            return
        before, braces, after = tag.target.partition("{}")
        if not braces or "{" in before + after or "}" in before + after:
            raise ValueError(
                f"target: found {tag.target!r}; allowed is a text with one '{{}}' where the "
                "number stands, such as 'Memory {}:'. Add the braces."
            )
        if (after or tag.close)[0].isdigit():
            raise ValueError(
                f"target: found {tag.target!r} before {tag.close!r}, with a digit right after the "
                "number; allowed is any other character there. Add one to the target."
            )
        tags = [literal for other in self.tags for literal in (other.open, other.close)]
        for literal in self.write_targets(tag.kind):
            if any(literal in other or other in literal for other in tags):
                raise ValueError(
                    f"target: found {literal!r}, which contains a tag or is part of one; allowed "
                    "are other texts. Rename the target or the tag."
                )

    def find_tag(self, kind: ActionKind) -> Tag:
        """The tag of `kind`. Raises KeyError if the protocol has none."""
        for tag in self.tags:
            if tag.kind == kind:
                return tag
        raise KeyError(f"protocol {self.name!r} has no tag for {ActionKind(kind).name}")

    def write_targets(self, kind: ActionKind) -> tuple[str, ...]:
        """The literals of targets 1..max_target; empty for kinds without a target."""
        target = self.find_tag(kind).target
        if target is None:
            return ()
        return tuple(target.replace("{}", str(i)) for i in range(1, self.max_target + 1))

    def restrict(self, kinds: Collection[ActionKind]) -> "Protocol":
        """The same with the tags of `kinds` alone; other actions cannot be written or parsed."""
        return dataclasses.replace(self, tags=tuple(tag for tag in self.tags if tag.kind in kinds))

    def reserved_names(self) -> tuple[str, ...]:
        """All literals once each: what to reserve in a tokenizer trained for this protocol."""
        literals = [literal for tag in self.tags for literal in (tag.open, tag.close)]
        literals += [literal for tag in self.tags for literal in self.write_targets(tag.kind)]
        return tuple(dict.fromkeys(literals))


def compact(max_target: int, *, free_text: bool = False) -> Protocol:
    """One reserved token a tag and a target, for tokenizers trained here."""
    tags = tuple(
        Tag(kind, f"<{kind.name.lower()}>", "<end>", "<{}>" if kind in _TARGETED else None)
        for kind in ActionKind
        if kind
    )
    return Protocol("compact", tags, max_target, free_text)


def atommem(max_target: int, *, free_text: bool = False) -> Protocol:
    """The tags of the paper (arXiv 2601.08323), for pretrained tokenizers."""
    names = {
        ActionKind.CREATE: "create_memory",
        ActionKind.READ: "read_memory",
        ActionKind.UPDATE: "update_memory",
        ActionKind.DELETE: "delete_memory",
        ActionKind.SCRATCHPAD: "scratchpad",
        ActionKind.ANSWER: "answer",
    }
    return Protocol("atommem", _plain_tags(names), max_target, free_text)


def public(max_target: int, *, free_text: bool = False) -> Protocol:
    r"""The tags of the paper's public code; an answer is `\boxed{...}` and nothing else."""
    names = {
        ActionKind.CREATE: "add_memory",
        ActionKind.READ: "update_query",
        ActionKind.UPDATE: "modify_memory",
        ActionKind.DELETE: "delete_memory",
        ActionKind.SCRATCHPAD: "update_memory",
        ActionKind.ANSWER: "final_answer",
    }
    tags = tuple(
        dataclasses.replace(tag, open=f"{tag.open}\\boxed{{", close=f"}}{tag.close}")
        if tag.kind == ActionKind.ANSWER
        else tag
        for tag in _plain_tags(names)
    )
    return Protocol("public", tags, max_target, free_text)


def _plain_tags(names: Mapping[ActionKind, str]) -> tuple[Tag, ...]:
    targets = {ActionKind.UPDATE: "Memory {}:", ActionKind.DELETE: "Memory {}"}
    return tuple(Tag(k, f"<{n}>", f"</{n}>", targets.get(k)) for k, n in names.items())


PROTOCOLS: Mapping[str, Callable[..., Protocol]] = {
    "compact": compact,
    "atommem": atommem,
    "public": public,
}


def find(name: str, max_target: int, *, free_text: bool = False) -> Protocol:
    """The protocol of that name. Raises ValueError listing those there are."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol.name={name!r}: allowed are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name](max_target, free_text=free_text)


def spell(tokenizer: Tokenizer, literal: str) -> tuple[int, ...]:
    """The ids of a tag or target: its reserved token if there is one, else its bytes."""
    if literal in tokenizer.reserved:
        return (tokenizer.reserved[literal],)
    ids = tokenizer.encode(literal)
    if b"".join(tokenizer.token_bytes[i] for i in ids) == literal.encode():
        return tuple(ids)
    of_byte = {piece: i for i, piece in enumerate(tokenizer.token_bytes) if len(piece) == 1}
    return tuple(of_byte[bytes([byte])] for byte in literal.encode())
