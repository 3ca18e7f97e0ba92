"""Tests of atommem_jax.language.protocol."""

import types

import pytest

from atommem_jax.language import protocol as protocol_lib
from atommem_jax.language.protocol import Protocol, Tag
from atommem_jax.types import ActionKind


def test_reserved_names_of_the_protocols():
    assert protocol_lib.compact(2).reserved_names() == (
        *("<create>", "<end>", "<read>", "<update>", "<delete>", "<scratchpad>", "<answer>"),
        *("<1>", "<2>"),
    )
    names = protocol_lib.atommem(1).reserved_names()
    assert {"<read_memory>", "</answer>", "Memory 1:", "Memory 1"} <= set(names)
    assert len(names) == 14


ANSWER = Tag(ActionKind.ANSWER, "<answer>", "<end>")


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([Tag(ActionKind.UPDATE, "<u>", "</u>", "Memory")], "one '{}'"),
        ([Tag(ActionKind.UPDATE, "<u>", "</u>", "{}{}")], "one '{}'"),
        ([Tag(ActionKind.UPDATE, "<u>", "</u>")], "found None in the tag of UPDATE"),
        ([Tag(ActionKind.READ, "<r>", "</r>", "{}")], "in the tag of READ"),
        ([Tag(ActionKind.DELETE, "<d>", "2>", "{}")], "digit right after the number"),
        ([Tag(ActionKind.DELETE, "<d>", "</d>", "<answer>{}")], "contains a tag"),
        ([Tag(ActionKind.READ, "<answer>", "</r>")], "'<answer>' within '<answer>'"),
        ([Tag(ActionKind.READ, "<answer", "</r>")], "'<answer' within '<answer>'"),
        ([Tag(ActionKind.READ, "<end>", "</r>")], "'<end>' within '<end>'"),
        ([Tag(ActionKind.READ, "", "</r>")], "'' within"),
        ([ANSWER], "distinct kinds"),
        ([Tag(ActionKind.NONE, "<n>", "</n>")], "other than NONE"),
    ],
)
def test_bad_tags_are_refused(tags, message):
    with pytest.raises(ValueError, match=message):
        Protocol("bad", (ANSWER, *tags), max_target=2)


def test_protocols_need_an_answer_and_a_target():
    with pytest.raises(ValueError, match="ANSWER among them"):
        Protocol("bad", (), max_target=2)
    with pytest.raises(ValueError, match="max_target: found 0"):
        protocol_lib.compact(0)
    with pytest.raises(KeyError, match="no tag for READ"):
        Protocol("some", (ANSWER,), 2).find_tag(ActionKind.READ)


def test_literals_are_spelled_by_reserved_token_then_by_encoding_then_by_bytes():
    tokenizer = types.SimpleNamespace(
        reserved={"<a>": 0},
        token_bytes=(b"", b"<", b"b", b">", b"<b", b"x"),
        encode=lambda text: {"<b>": [4, 3], "b<": [2, 5]}[text],
    )
    assert protocol_lib.spell(tokenizer, "<a>") == (0,)
    assert protocol_lib.spell(tokenizer, "<b>") == (4, 3)
    # An encoding that does not say the literal, as of a normalising tokenizer, is of no use.
    assert protocol_lib.spell(tokenizer, "b<") == (2, 1)
