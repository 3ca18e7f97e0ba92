"""Published files of multi-hop questions are read, cut into sentences and split, or refused."""

import json

import pytest

from atommem_jax.tasks import multihop_files, multihop_qa
from atommem_jax.tasks.multihop_files import MultihopQaConfig
from tests.helpers.multihop import MUSIQUE, PUBLISHED, make_record, titles, write


def test_musique_needs_the_sentence_that_answers_each_step(tmp_path):
    filler = MUSIQUE | {"id": "2hop__1", "question": "What rings?"}
    unanswerable = MUSIQUE | {"id": "2hop__2", "answerable": False}
    unanswerable["question_decomposition"] = [
        {"question": "?", "answer": "Bob", "paragraph_support_idx": None}
    ]
    records = [MUSIQUE, unanswerable, filler]
    config = write(tmp_path, records, "musique", documents=4)
    corpus = multihop_files.read(config)
    assert corpus.left_out == {"it is marked as not answerable": 1}
    question = corpus.splits["train"][0]
    found = [question.documents[d].sentences[s] for d, s in question.support]
    # "Bob likes tea." holds the answer too, but nothing else of "Who founded Firm?".
    assert found == ["She joined FIRM in 1990.", "Firm was founded by Bob."]
    assert question.aliases == ("Bob", "Robert")


def test_musique_needs_a_whole_paragraph_where_no_sentence_holds_the_answer(tmp_path):
    steps = [MUSIQUE["question_decomposition"][0] | {"answer": "Cook"}]
    config = write(tmp_path, [MUSIQUE | {"question_decomposition": steps}], "musique")
    [question] = multihop_files.read(config).splits["train"]
    assert [question.documents[d].sentences[s] for d, s in question.support] == [
        "Ann cooks.",
        "She joined FIRM in 1990.",
    ]


def test_musique_is_cut_into_sentences_that_lose_white_space_only():
    text = "  Mr. Dee was  born c. 1900\nin Rome.The city is old. "
    assert multihop_files.split_sentences(text) == [
        "Mr. Dee was born c. 1900 in Rome.",
        "The city is old.",
    ]
    assert multihop_files.split_sentences(" \n ") == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"supporting_facts": [["Person 0", 2], ["Firm 0", 0]]}, "names no sentence"),
        ({"supporting_facts": [["Person 0", -1]]}, "names no sentence"),
        ({"supporting_facts": [["Nobody", 0]]}, "names no sentence"),
        ({"supporting_facts": []}, "names no sentence"),
        ({"answer": " "}, "no text, or no answer"),
        ({"question": "one two three four five six seven eight?"}, "max_question_words=7 words"),
        ({"answer": "one two three"}, "max_answer_words=2 words"),
    ],
)
def test_questions_are_left_out_and_counted(tmp_path, fields, reason):
    records = [make_record(0, **fields), make_record(1)]
    config = write(tmp_path, records, max_question_words=7, max_answer_words=2)
    corpus = multihop_files.read(config)
    assert [question.id for question in corpus.splits["train"]] == ["id1"]
    [(found, count)] = corpus.left_out.items()
    assert reason in found
    assert count == 1


def test_splits_share_no_question_and_no_supporting_document(tmp_path):
    # Question i needs a document of its own and one that it shares with three others; its
    # distractors support its neighbours.
    records = []
    for i in range(200):
        record = make_record(i, distractors=1)
        record["context"][-1] = [f"Shared {i // 4}", ["It is in Town."]]
        record["context"].append(make_record((i + 4) % 200)["context"][-2])
        record["supporting_facts"] = [[f"Person {i}", 0], [f"Shared {i // 4}", 0]]
        records.append(record)
    config = write(tmp_path, records, test_every=5, validation_every=5, documents=6)
    corpus = multihop_files.read(config)
    ids = {split: {q.id for q in questions} for split, questions in corpus.splits.items()}
    assert sum(map(len, ids.values())) == len(set.union(*ids.values()))
    assert sum(map(len, ids.values())) + sum(corpus.left_out.values()) == 200
    assert all("supporting document" in reason for reason in corpus.left_out)
    assert 20 <= len(ids["test"]) <= 60
    assert all(len(found) > 5 for found in ids.values())
    support = {
        split: {doc for question in questions for doc in question.supporting()}
        for split, questions in corpus.splits.items()
    }
    for split in corpus.splits:
        seen = {title for e in multihop_qa.generate(config, corpus, split) for title in titles(e)}
        assert seen >= {doc.title for doc in support[split]}
        for other in corpus.splits:
            if other != split:
                assert seen.isdisjoint(doc.title for doc in support[other])
    # The split is the question's own: neither the seed nor the order of the file moves it.
    again = write(tmp_path, records[::-1], test_every=5, validation_every=5, documents=6, seed=3)
    splits = multihop_files.read(again).splits
    assert {split: {q.id for q in questions} for split, questions in splits.items()} == ids


# ---------------------------------------------------------------------------------------------
# Two files


def write_two(folder, train, test, **fields) -> MultihopQaConfig:
    (folder / "train").write_text(json.dumps(train))
    (folder / "test").write_text(json.dumps(test))
    files = {"train_file": str(folder / "train"), "test_file": str(folder / "test")}
    return MultihopQaConfig(**(files | {"documents": 4, "validation_every": 4} | fields))


def test_a_file_to_train_on_and_one_to_test_on(tmp_path):
    shared = make_record(3, _id="again")  # asks about the documents of a question of train
    test = [make_record(i) for i in range(100, 110)] + [shared]
    config = write_two(tmp_path, [make_record(i) for i in range(40)], test)
    corpus = multihop_files.read(config)
    ids = {split: {q.id for q in questions} for split, questions in corpus.splits.items()}
    assert ids["test"] == {record["_id"] for record in test}, "all, whatever test_every is"
    assert ids["train"] | ids["validation"] == {f"id{i}" for i in range(40)} - {"id3"}
    assert 3 < len(ids["validation"]) < 20
    assert list(corpus.left_out.values()) == [1]
    # Training sees nothing that test asks about; what test is made of is the test file's alone.
    seen = {title for e in multihop_qa.generate(config, corpus, "train") for title in titles(e)}
    assert seen.isdisjoint({"Person 3", "Firm 3", "Noise 100.0"})
    tests = list(multihop_qa.generate(config, corpus, "test"))
    other = write_two(tmp_path, [make_record(i) for i in range(50, 90)], test)
    lone = MultihopQaConfig(**(vars(config) | {"train_file": "", "test_every": 1}))
    for another in (other, lone):
        assert tests == list(multihop_qa.generate(another, multihop_files.read(another), "test"))


@pytest.mark.parametrize("field", ["train_file", "test_file"])
def test_a_lone_file_is_split_as_ever(tmp_path, field):
    records = [make_record(i) for i in range(60)]
    old = write(tmp_path, records, test_every=4, validation_every=4)
    fields = {"data_file": "", field: old.data_file}
    alone = MultihopQaConfig(**(vars(old) | fields))
    assert multihop_files.read(alone).splits == multihop_files.read(old).splits
    every = MultihopQaConfig(**(vars(alone) | {"test_every": 1}))
    assert len(multihop_files.read(every).splits["test"]) == 60
    assert list(every.sizes) == ["test"]


# ---------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "squad"}, "task.dataset is 'squad'; allowed: 'hotpotqa', '2wiki"),
        ({"questions": (0, 2)}, r"task.questions is \(0, 2\); allowed: \(fewest, most\)"),
        ({"questions": (3, 2)}, r"task.questions is \(3, 2\)"),
        ({"questions": (1, 6)}, "task.documents is 10; allowed: at least 12: up to 2 documents"),
        ({"dataset": "musique", "documents": 3}, "task.documents is 3; allowed: at least 4"),
        ({"chunk_words": -1}, "task.chunk_words is -1; allowed: 1 or more, or 0 for no limit"),
        ({"documents_per_chunk": 0}, "documents_per_chunk is 0; allowed: 1 or more, unless"),
        ({"test_every": 0}, "task.test_every is 0; allowed: 2 or more, or 1 for all"),
        ({"validation_every": 0}, "task.validation_every is 0"),
        ({"test_documents": (8, 1)}, r"task.test_documents\[1\] is 1; allowed: at least 2"),
        ({"test_documents": (8, 8)}, r"task.test_documents is \(8, 8\); allowed: each number once"),
        (
            {"train_file": "/a", "data_file": "/b"},
            "data_file is '/b'; allowed: '' beside task.train",
        ),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MultihopQaConfig(**fields)


@pytest.mark.parametrize("path", ["", "/nowhere.json"])
@pytest.mark.parametrize("dataset", PUBLISHED)
def test_a_missing_file_error_says_where_it_comes_from(dataset, path):
    with pytest.raises(FileNotFoundError) as error:
        multihop_files.read(MultihopQaConfig(dataset=dataset, data_file=path))
    source = {"hotpotqa": "hotpotqa.github.io", "2wikimultihopqa": "Alab-NII/2wikimultihop"}
    for part in (
        "config.task.data_file" if path else "config.task.train_file",
        path or "not set",
        source.get(dataset, "musique_v1.0"),
    ):
        assert part in str(error.value)


def test_every_file_that_is_named_must_be_there(tmp_path):
    config = write_two(tmp_path, [make_record(0)], [make_record(1)], corpus_file="/no.json")
    with pytest.raises(FileNotFoundError, match=r"task.corpus_file is '/no.json', which is no"):
        multihop_files.read(config)
    (tmp_path / "test").unlink()
    with pytest.raises(FileNotFoundError, match=r"task.test_file is '.*test', which is no file; d"):
        multihop_files.read(config)


def without(record: dict, field: str) -> dict:
    return {name: value for name, value in record.items() if name != field}


@pytest.mark.parametrize(
    ("dataset", "record", "message"),
    [
        *[
            ("hotpotqa", without(make_record(1), field), f"record 2 has no field '{field}'")
            for field in ("_id", "question", "answer", "supporting_facts", "context")
        ],
        ("hotpotqa", ["?"], "record 2 is a JSON list, no object"),
        ("hotpotqa", make_record(1, answer=None), "'answer' that is a NoneType; allowed: a str"),
        ("hotpotqa", make_record(1, context=[["T", "x"]]), "'context' that is not"),
        ("hotpotqa", make_record(1, context=[["T", [1]]]), "'context' that is not"),
        ("hotpotqa", make_record(1, supporting_facts=[["T"]]), "'supporting_facts' that are not"),
        *[
            ("musique", without(MUSIQUE, field), f"record 2 has no field '{field}'")
            for field in ("id", "question", "answer", "paragraphs", "question_decomposition")
        ],
        ("musique", MUSIQUE | {"paragraphs": [{"idx": 0}]}, "has no field 'title'"),
        ("musique", MUSIQUE | {"answer_aliases": [1]}, "'answer_aliases' that are not"),
    ],
)
def test_records_of_another_kind_are_refused(tmp_path, dataset, record, message):
    good = MUSIQUE if dataset == "musique" else make_record(0)
    with pytest.raises(ValueError, match=message) as error:
        multihop_files.read(write(tmp_path, [good, record], dataset))
    assert str(tmp_path / "published") in str(error.value)
    assert "published test files have no answers" in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "text", "message"),
    [
        ("hotpotqa", '{"data": []}', "record 1 has no field 'context'; allowed: a list"),
        ("hotpotqa", '[{"_id": 1},\n{"_id": 2\n', r"published, line 3, column 1: is no JSON"),
        ("hotpotqa", "[1, 2]", "record 1 is a JSON int, no object"),
        ("musique", json.dumps(MUSIQUE) + "\n<html>\n", "published, line 2, column 1: is no JSON"),
        ("musique", " \n", "published: is empty; allowed are records of JSON"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, dataset, text, message):
    config = write(tmp_path, [], dataset)
    (tmp_path / "published").write_text(text)
    with pytest.raises(ValueError, match=message):
        multihop_files.read(config)


@pytest.mark.parametrize("dataset", ["hotpotqa", "musique"])
def test_lists_and_lines_are_the_same_data(tmp_path, dataset):
    records = [make_record(0), make_record(1)] if dataset == "hotpotqa" else [MUSIQUE]
    config = write(tmp_path, records, dataset)
    plain = multihop_files.read(config)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    for text in (
        lines,
        lines + "\n",
        "\ufeff" + json.dumps(records),
        json.dumps(records, indent=1),
    ):
        (tmp_path / "published").write_text(text)
        assert multihop_files.read(config) == plain


def test_files_that_are_no_text_are_named(tmp_path):
    config = write(tmp_path, [], "hotpotqa")
    (tmp_path / "published").write_bytes(b"PAR1\x15\x04")
    with pytest.raises(ValueError, match="published: is a Parquet file; allowed is text"):
        multihop_files.read(config)
