"""The prompt of a pretrained chat model: its own chat format around what a turn shows.

`template` renders the model's published chat template once, around a placeholder, and cuts it
there: what stands before is the prefix of every prompt, what stands behind ends it. In between
`prompt.assemble` puts the segments of the turn, as it does for every model. So ids differ from
those of a rendered text only where BPE would have merged across a seam.

The system message explains the memory and shows each action as the protocol writes it.
"""

from typing import Any

import jax.numpy as jnp
import jinja2
import jinja2.sandbox
import numpy as np
from jaxtyping import Array, Int

from atommem_jax.prompt import Template
from atommem_jax.protocol import Protocol
from atommem_jax.tokenizer import HuggingFaceTokenizer, Tokenizer
from atommem_jax.types import ActionKind, Phase

_PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}turn\N{OBJECT REPLACEMENT CHARACTER}"

_INTRODUCTION = """\
You read a long document part by part and answer questions about it at the end. A part is gone \
once you have seen it: what may help to answer the questions, write to your memory. Of the memory \
you see the entries nearest to your last query, numbered, and your scratchpad. You act by writing:
"""
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


def system_message(protocol: Protocol) -> str:
    """What the agent is told of its task, with a line for each kind of action."""
    lines = [f"{_show(protocol, tag.kind)} {_MEANINGS[tag.kind]}." for tag in protocol.tags]
    return _INTRODUCTION + "\n".join(lines)


def _show(protocol: Protocol, kind: ActionKind) -> str:
    tag = protocol.find_tag(kind)
    target = protocol.write_targets(kind)[0] if tag.target else ""
    separator = " " if target else ""
    text = "" if kind == ActionKind.DELETE else f"{separator}..."
    return f"{tag.open}{target}{text}{tag.close}"


def task_message(phase: Phase) -> str:
    """The last line of a turn's message."""
    return _TASKS[phase]


def render(
    chat_template: str, messages: list[dict[str, str]], *, names: dict[str, Any], thinking: bool
) -> str:
    """The text of a conversation up to where the assistant begins to write.

    Args:
      chat_template: Jinja, as published in tokenizer_config.json.
      messages: with `role` and `content`.
      names: `bos_token` and `eos_token`, which a template may write.
      thinking: for templates that have a switch for thoughts before the reply.

    Raises ValueError where the template is none, or refuses these messages.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(chat_template).render(
            messages=messages, add_generation_prompt=True, enable_thinking=thinking, **names
        )
    except jinja2.TemplateError as error:
        raise ValueError(
            f"chat_template: found one that cannot be rendered ({error}); allowed is a template "
            "that takes a system and a user message. Take the one that the model was published "
            "with."
        ) from error


def template(tokenizer: Tokenizer, protocol: Protocol, *, thinking: bool = False) -> Template:
    """The pieces of a prompt in the chat format of `tokenizer`.

    Memory i is headed "Memory i:", which is how an action names it.

    Args:
      tokenizer: of a chat model.
      protocol: the actions that the system message explains.
      thinking: see `render`.

    Raises ValueError for a tokenizer without a chat template, and for one that changes what stands
    before the user's message with that message.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer) or not tokenizer.chat_template:
        raise ValueError(
            "prompt: found 'chat', and a tokenizer without a chat template; allowed are those of "
            "pretrained chat models. Use prompt='compact', or another model."
        )
    names = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token}
    prefixes, suffixes = set(), []
    for phase in _TASKS:
        messages = [
            {"role": "system", "content": system_message(protocol)},
            {"role": "user", "content": f"{_PLACEHOLDER}\n\n{task_message(phase)}"},
        ]
        text = render(tokenizer.chat_template, messages, names=names, thinking=thinking)
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
        return tokenizer.encode(f"\n\n{name}:\n")

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
