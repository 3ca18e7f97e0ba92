"""The prompt of a pretrained chat model: its own chat format around what a turn shows.

`template` renders the model's published chat template once, around a placeholder, and cuts it
there: what stands before is the prefix of every prompt, what stands behind ends it. In between
`prompt.assemble` puts the segments of the turn, as it does for every model. So ids differ from
those of a rendered text only where BPE would have merged across a seam.

The system message explains the memory and shows each action as the protocol writes it.

A teacher behind a chat endpoint has no token ids in common with the agent: it gets the same turn as
text (`messages`), and what it replies is spelled in the agent's tokens (`encode_reply`).
"""

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
from jaxtyping import Array, Int

from atommem_jax.language.prompt import Template
from atommem_jax.language.protocol import Protocol, Tag, spell
from atommem_jax.language.tokenizer import HuggingFaceTokenizer, Tokenizer
from atommem_jax.types import ActionKind, Observation, Phase

_PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}turn\N{OBJECT REPLACEMENT CHARACTER}"

_INTRODUCTION = """\
You read a long document part by part and answer questions about it at the end. A part is gone \
once you have seen it: what may help to answer the questions, write to your memory. Of the memory \
you see the entries nearest to your last query, numbered, and your scratchpad. You act by writing, \
for example:
"""
# An untrained model copies what it is shown: three dots would come back as three dots.
_EXAMPLES = {
    ActionKind.CREATE: "Mount Aso is a volcano in Japan",
    ActionKind.READ: "Mount Aso",
    ActionKind.UPDATE: "Mount Aso last erupted in 2021",
    ActionKind.DELETE: "",
    ActionKind.SCRATCHPAD: "still to find: its height",
    ActionKind.ANSWER: "Japan",
}
_MEANINGS = {
    ActionKind.CREATE: "adds an entry to the memory",
    ActionKind.READ: "makes this your query: from the next turn on, the entries nearest to it show",
    ActionKind.UPDATE: "replaces what is shown as Memory 1",
    ActionKind.DELETE: "removes what is shown as Memory 1",
    ActionKind.SCRATCHPAD: "replaces your scratchpad",
    ActionKind.ANSWER: "answers the question that is put, in as few words as possible",
}
_TASKS = {
    Phase.READING: "Write the actions for this part of the document.",
    Phase.ANSWERING: "The document is over. Answer the question, or read your memory first.",
    Phase.FINAL: "The document is over. Answer the question now.",
}


def system_message(protocol: Protocol, guide: str = "") -> str:
    """What the agent is told of its task, with a line for each kind of action.

    guide: how it is to proceed, last.
    """
    lines = [f"{_show(protocol, tag.kind)} {_MEANINGS[tag.kind]}." for tag in protocol.tags]
    return _INTRODUCTION + "\n".join([*lines, *filter(None, [guide])])


def _show(protocol: Protocol, kind: ActionKind) -> str:
    tag = protocol.find_tag(kind)
    target = protocol.write_targets(kind)[0] if tag.target else ""
    text = _EXAMPLES[kind]
    separator = " " if target and text else ""
    return f"{tag.open}{target}{separator}{text}{tag.close}"


def task_message(phase: Phase) -> str:
    """The last line of a turn's message."""
    return _TASKS[phase]


def _head(name: str) -> str:
    return f"\n\n{name}:\n"


def _list_messages(
    protocol: Protocol, body: str, phase: Phase, guide: str = ""
) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": system_message(protocol, guide)},
        {"role": "user", "content": f"{body}\n\n{task_message(phase)}"},
    ]


def messages(
    observation: Observation, protocol: Protocol, tokenizer: Tokenizer
) -> list[dict[str, str]]:
    """What a turn shows as the messages of a chat, each with `role` and `content`.

    With a chat template they are what the prompt's ids stand for. Other templates head the segments
    with tokens of their own; here they have the same headers in words.

    Args:
      observation: of one turn, on the host; no leading axis.
      protocol: the actions that the system message explains.
      tokenizer: of the observation's ids.
    """
    o = observation
    segments = [
        *(("Question", *row) for row in zip(o.questions, o.question_lengths, strict=True)),
        ("Scratchpad", o.scratchpad, o.scratchpad_length),
        ("Query", o.query, o.query_length),
        *(
            (f"Memory {number}", *row)
            for number, row in enumerate(zip(o.shown, o.shown_lengths, strict=True), start=1)
        ),
        ("Part of the document", o.chunk, o.chunk_length),
    ]
    body = "".join(
        _head(name) + tokenizer.decode(np.asarray(ids)[: int(length)].tolist())
        for name, ids, length in segments
        if length > 0
    )
    return _list_messages(protocol, body, Phase(min(int(o.phase), Phase.FINAL)))


def encode_reply(reply: str, protocol: Protocol, tokenizer: Tokenizer) -> list[int]:
    """The ids of an assistant's text; its tags, and nothing else, may become reserved tokens.

    Tags and targets are spelled as the protocol spells them for this tokenizer, and the text
    between them is encoded apart, without the white space at its ends. Any other name of a reserved
    token stays text, and so does a tag that has no place where it stands: a target elsewhere than
    at the head of its action, a close tag of another action. Nothing is repaired: what was left
    open, or aims at nothing, is just that when the ids are parsed.

    What stands outside of actions is left out, as are thoughts in <think> at the beginning, unless
    the protocol admits free text.

    Raises ValueError for a lone surrogate in the text of an action.
    """
    if not protocol.free_text:
        reply = re.sub(r"\A\s*<think>.*?(</think>|\Z)", "", reply, flags=re.DOTALL)
    tags = {tag.open: tag for tag in protocol.tags}
    begin = "|".join(re.escape(literal) for literal in tags)
    ids: list[int] = []
    place = 0
    while found := re.compile(begin).search(reply, place):
        ids += _encode_between(reply[place : found.start()], protocol, tokenizer)
        tag = tags[found[0]]
        # Another action may begin before this one is closed.
        end = re.compile(f"{re.escape(tag.close)}|{begin}").search(reply, found.end())
        text = reply[found.end() : end.start() if end else len(reply)]
        ids += [*spell(tokenizer, tag.open), *_encode_inside(text, tag, protocol, tokenizer)]
        place = end.start() if end else len(reply)
        if end and end[0] == tag.close:
            ids += spell(tokenizer, tag.close)
            place = end.end()
    return ids + _encode_between(reply[place:], protocol, tokenizer)


def _encode_between(text: str, protocol: Protocol, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text) if protocol.free_text else []


def _encode_inside(text: str, tag: Tag, protocol: Protocol, tokenizer: Tokenizer) -> list[int]:
    text = text.strip()
    for target in protocol.write_targets(tag.kind):
        rest = text.removeprefix(target)
        # "Memory 12" does not aim at 1.
        if rest != text and not (target[-1].isdigit() and rest[:1].isdigit()):
            return [*spell(tokenizer, target), *tokenizer.encode(rest.strip())]
    return tokenizer.encode(text)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, which marks what an assistant wrote for trainers, is but a scope here."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _write_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`. Jinja's own is for web pages and escapes what a prompt should show."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def render(
    chat_template: str,
    messages: list[dict[str, str]],
    *,
    names: Mapping[str, str],
    thinking: bool,
    now: datetime.datetime | None = None,
) -> str:
    """The text of a conversation up to where the assistant begins to write.

    Templates are written for `transformers`: they find the same names, filters and functions here
    as there, and no tools and no documents.

    Args:
      chat_template: Jinja, as published in tokenizer_config.json.
      messages: with `role` and `content`.
      names: `bos_token`, `eos_token` and the like, which a template may write.
      thinking: for templates that have a switch for thoughts before the reply.
      now: for templates that write the date; by default the time of the call.

    Raises ValueError where the template is none, or refuses these messages.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    environment.filters["tojson"] = _write_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = (now or datetime.datetime.now()).strftime
    try:
        return environment.from_string(chat_template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            enable_thinking=thinking,
            **names,
        )
    except Exception as error:  # a template is a program, and may fail in any way
        said = str(error) or type(error).__name__
        raise ValueError(
            f"chat_template: found one that cannot be rendered ({said}); allowed is a template "
            "that takes a system and a user message. Take the one that the model was published "
            "with, or use prompt='compact'."
        ) from error


def find_chat_template(tokenizer: Tokenizer) -> str:
    """The chat template of a tokenizer; of several the one named 'default', as `transformers` does.

    Raises ValueError where there is none.
    """
    found = tokenizer.chat_template if isinstance(tokenizer, HuggingFaceTokenizer) else None
    if isinstance(found, Mapping) and "default" not in found:
        raise ValueError(
            f"chat_template: found several, named {', '.join(sorted(found))}; allowed is one, or "
            "several of which one is named 'default'. Name one so in tokenizer_config.json."
        )
    chosen = found["default"] if isinstance(found, Mapping) else found
    if not chosen:
        raise ValueError(
            "prompt: found 'chat', and a tokenizer without a chat template; allowed are those of "
            "pretrained chat models. Use prompt='compact', or another model."
        )
    return chosen


def template(
    tokenizer: Tokenizer, protocol: Protocol, *, thinking: bool = False, guide: str = ""
) -> Template:
    """The pieces of a prompt in the chat format of `tokenizer`.

    Memory i is headed "Memory i:", which is how an action names it.

    Args:
      tokenizer: of a chat model.
      protocol: the actions that the system message explains.
      thinking: see `render`.
      guide: see `system_message`.

    Raises ValueError for a tokenizer without a chat template, and for one that changes what stands
    before the user's message with that message.
    """
    chat_template = find_chat_template(tokenizer)
    assert isinstance(tokenizer, HuggingFaceTokenizer)  # others have no chat template
    now = datetime.datetime.now()  # one date for all phases
    prefixes, suffixes = set(), []
    for phase in _TASKS:
        said = _list_messages(protocol, _PLACEHOLDER, phase, guide)
        text = render(
            chat_template, said, names=tokenizer.special_tokens, thinking=thinking, now=now
        )
        before, found, after = text.partition(_PLACEHOLDER)
        if not found:
            raise ValueError(
                "chat_template: found one that does not write the user's message; allowed is one "
                "that does. Take the one that the model was published with."
            )
        prefixes.add(before)
        suffixes.append(tokenizer.encode_control(after))
    if len(prefixes) > 1:
        raise ValueError(
            "chat_template: found one that begins differently with another message of the user; "
            "allowed is a fixed beginning, since prompts share it. Use prompt='compact'."
        )
    (prefix,) = prefixes

    def row(ids: list[int]) -> Int[Array, " h"]:
        return jnp.asarray(ids, jnp.int32)

    def rows(lists: list[list[int]]) -> Int[Array, "n h"]:
        width = max(map(len, lists))
        return jnp.asarray(
            [[*ids, *[tokenizer.pad_id] * (width - len(ids))] for ids in lists], jnp.int32
        )

    def header(name: str) -> list[int]:
        return tokenizer.encode(_head(name))

    is_text = np.array([bool(piece) for piece in tokenizer.token_bytes])
    return Template(
        prefix=row(tokenizer.encode_control(prefix)),
        question=row(header("Question")),
        scratchpad=row(header("Scratchpad")),
        query=row(header("Query")),
        memory=rows([header(f"Memory {i + 1}") for i in range(protocol.max_target)]),
        chunk=row(header("Part of the document")),
        suffix=rows(suffixes),
        is_text=jnp.asarray(is_text),
        pad_id=tokenizer.pad_id,
    )
