"""Pools of passages are read in their three forms, each passage once, or refused."""

import json

import pytest

from atommem_jax.config import ConfigError
from atommem_jax.tasks import passages
from atommem_jax.tasks.passages import Document

BELLS = Document("Bells", ("Bells ring.", "They are old."))
TOWN = Document("Town", ("It is small.",))
FIELD = "config.task.corpus_file"


def write(folder, *records, lines: bool = False) -> str:
    path = folder / "pool.json"
    whole = records[0] if len(records) == 1 else list(records)
    text = "".join(json.dumps(record) + "\n" for record in records) if lines else json.dumps(whole)
    path.write_text(text)
    return str(path)


LISTED = [
    {"title": "Bells ", "text": "Bells  ring. They are old."},
    {"title": "Town", "text": ["It is", " small."]},
]


@pytest.mark.parametrize("lines", [False, True])
def test_titles_with_texts_are_read_from_a_list_and_from_lines(tmp_path, lines):
    found = passages.read_passages(write(tmp_path, *LISTED, lines=lines), FIELD)
    assert found == [BELLS, Document("Town", ("It is", "small."))]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_of_titles_is_read(tmp_path, indent):
    path = tmp_path / "pool.json"
    whole = {"Bells": [" Bells ring.", "They are old. "], "Town": ["It is small."], "Void": [" "]}
    path.write_text(json.dumps(whole, indent=indent))
    assert passages.read_passages(path, FIELD) == [BELLS, TOWN], "nothing of what is empty"


def test_the_same_passage_cut_otherwise_is_one(tmp_path):
    again = {"title": "Bells", "text": ["Bells ring. They", "are old."]}
    other = {"title": "Bells", "text": "Bells ring. They are new."}
    found = passages.read_passages(write(tmp_path, LISTED[0], again, other), FIELD)
    assert [document.sentences[-1] for document in found] == ["They are old.", "They are new."]


def test_long_sentences_are_cut(tmp_path):
    found = passages.read_passages(write(tmp_path, *LISTED), FIELD, most_words=2)
    assert found[0].sentences == ("Bells ring.", "They are", "old.")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"title": "A"}, LISTED[0]],
            r"pool.json', record 1 has no text for 'A'; allowed are a li",
        ),
        ([LISTED[0], {"T": [1]}], "record 2 has no text for 'T'"),
        ([LISTED[0], "Bells"], "record 2 is a JSON str"),
        ([{"title": "A", "text": " "}, {"T": []}], "holds no passage; allowed are"),
    ],
)
def test_what_is_no_passage_is_named(tmp_path, records, message):
    with pytest.raises(ValueError, match=message) as error:
        passages.read_passages(write(tmp_path, *records), FIELD)
    assert FIELD in str(error.value)


def test_what_is_no_json_is_named(tmp_path):
    path = tmp_path / "pool.json"
    path.write_text("Bells ring.")
    with pytest.raises(ConfigError, match=r"pool.json, line 1, column 1: is no JSON"):
        passages.read_passages(path, FIELD)


@pytest.mark.parametrize(
    ("name", "count"), [("hotpotqa", 994), ("2wikimultihopqa", 6_119), ("musique", 1_890)]
)
def test_published_pools_are_read_whole(shared_data, name, count):
    found = passages.read_passages(shared_data / "corpora" / f"{name}.json", FIELD)
    assert 0.99 * count <= len(found) <= count
    assert all(document.title and all(document.sentences) for document in found)
