"""Encoding against arrays written by hand; batches against what a reader of the split expects."""

import collections
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers

from atommem_jax.language import tokenizer as tokenizer_lib
from atommem_jax.tasks import babi, batches, datasets, encoding, schema, synthetic
from atommem_jax.tasks.encoding import EpisodeShape

TASK = {"name": "synthetic", "train_examples": 50, "test_examples": 13, "scales": (1, 2)}


class Words:
    """Ids in the order in which words are first met, from 1; 0 is padding."""

    pad_id = 0

    def __init__(self):
        self.words = ["<pad>"]
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        words = text.replace(".", " .").replace("?", " ?").split()
        self.words += [word for word in dict.fromkeys(words) if word not in self.words]
        return [self.words.index(word) for word in words]

    def decode(self, ids) -> str:
        return " ".join(self.words[i] for i in ids)


def make_fact(text: str, subject: str = "", **fields) -> schema.Fact:
    defaults = {"support": False, "supersedes": -1, "category": 0}
    return {"text": text, "subject": subject, **defaults, **fields}


EXAMPLE: schema.Example = {
    "id": 5,
    "chunks": [
        [
            make_fact("Ann likes tea.", "Ann", category=4),
            make_fact("Bob runs.", "Bob", support=True),
        ],
        [make_fact("Mary Ann now rests.", "Mary Ann", support=True, supersedes=1, category=2)],
    ],
    "questions": [
        {"text": "Who rests?", "aliases": ["Mary Ann", "Mary"], "needs": [2]},
        {"text": "What does Bob do?", "aliases": ["rests"], "needs": [1, 2]},
    ],
    "focus": "Bob Ann",
}


@pytest.fixture(scope="module")
def dataset(data_root) -> datasets.Dataset:
    return datasets.prepare(TASK, data_root)


@pytest.fixture(scope="module")
def train(dataset):
    """(source, tokenizer, shape) as `batches` wants them."""
    words = Words()
    source = dataset.split("train")
    return source, words, encoding.fit_shape(source, words)


def test_example_becomes_the_arrays_worked_out_by_hand():
    words = Words()
    words.encode("Ann likes tea. Bob runs Mary now rests Who? What does do")
    shape = EpisodeShape(3, 8, 2, 3, 5, 2, 2, 3)
    episode = encoding.encode(EXAMPLE, words, shape)
    ann, likes, tea, dot, bob, runs, mary, now, rests, who, mark, what, does, do = range(1, 15)

    def same(found, expected):
        expected = np.asarray(expected)
        kind = np.bool_ if expected.dtype == np.bool_ else np.int32
        assert found.dtype == kind
        np.testing.assert_array_equal(found, expected)

    same(episode.id, 5)
    same(
        episode.chunks,
        [
            [ann, likes, tea, dot, bob, runs, dot, 0],
            [mary, ann, now, rests, dot, 0, 0, 0],
            [0] * 8,
        ],
    )
    same(episode.chunk_lengths, [7, 5, 0])
    same(episode.num_chunks, 2)
    same(episode.questions, [[who, rests, mark, 0, 0], [what, does, bob, do, mark], [0] * 5])
    same(episode.question_lengths, [3, 5, 0])
    same(episode.num_questions, 2)
    notes = episode.annotations
    assert notes.note.shape == (3, 2, 0), "no fact has a note"
    same(notes.note_length, [[0, 0], [0, 0], [0, 0]])
    same(notes.start, [[0, 4], [0, 0], [0, 0]])
    same(notes.length, [[4, 3], [5, 0], [0, 0]])
    same(notes.subject_length, [[1, 1], [2, 0], [0, 0]])
    same(notes.support, [[False, True], [True, False], [False, False]])
    # Fact 2 of the example is the first of chunk 1: flat index 1 * 2 + 0.
    same(notes.supersedes, [[-1, -1], [1, -1], [-1, -1]])
    same(notes.category, [[4, 0], [2, -1], [-1, -1]])
    same(notes.needs, [[2, -1], [1, 2], [-1, -1]])
    same(notes.gold, [[mary, ann], [rests, 0], [0, 0]])
    same(notes.gold_length, [2, 1, 0])
    same(notes.focus, [bob, ann, 0])
    same(notes.focus_length, 2)


def test_a_note_is_stored_instead_of_its_fact():
    chunks = [
        [
            make_fact("Ann sat."),
            make_fact("Mary Ann rests.", "Mary Ann", note="Mary Ann rests now"),
        ],
        [make_fact("Bob runs.", "runs", note="runs Bob"), make_fact("Ann ran.", "Ann", note="")],
    ]
    words = Words()
    words.encode("Ann sat. Mary rests now Bob runs ran")
    ann, sat, dot, mary, rests, now, bob, runs, ran = range(1, 10)
    example: schema.Example = {**EXAMPLE, "chunks": chunks}
    shape = encoding.fit_shape([example], words)
    assert shape.note_length == 4
    episode = encoding.encode(example, words, shape)
    notes = episode.annotations
    np.testing.assert_array_equal(
        episode.chunks, [[ann, sat, dot, mary, ann, rests, dot], [bob, runs, dot, ann, ran, dot, 0]]
    )
    np.testing.assert_array_equal(
        notes.note, [[[0] * 4, [mary, ann, rests, now]], [[runs, bob, 0, 0], [0] * 4]]
    )
    np.testing.assert_array_equal(notes.note_length, [[0, 4], [2, 0]])
    np.testing.assert_array_equal(notes.length, [[3, 4], [3, 3]])
    # Leading words of the note, or of the fact where there is none.
    np.testing.assert_array_equal(notes.subject_length, [[0, 2], [1, 1]])
    with pytest.raises(ValueError, match="note_length is 4, but the shape allows 3"):
        encoding.encode(example, words, dataclasses.replace(shape, note_length=3))


def test_a_tokenizer_learns_from_notes_too():
    chunks = [[make_fact("Ann sat.", note="Ann there"), make_fact("Bob ran.")]]
    train: list[schema.Example] = [{**EXAMPLE, "chunks": chunks}]
    dataset = datasets.Dataset("nowhere", {"train": train})
    assert list(datasets.tokenizer_texts(dataset))[:3] == ["Ann sat.", "Ann there", "Bob ran."]


def test_flat_fact_index_counts_the_places_of_half_filled_chunks():
    chunks = [
        [make_fact("a.")],
        [make_fact("b."), make_fact("c.")],
        [make_fact("d.", supersedes=2)],
    ]
    example = {**EXAMPLE, "chunks": chunks}
    example["questions"] = [{"text": "q?", "aliases": ["a"], "needs": [0, 1, 3]}]
    words = Words()
    notes = encoding.encode(example, words, encoding.fit_shape([example], words)).annotations
    np.testing.assert_array_equal(notes.needs, [[0, 2, 4]])
    np.testing.assert_array_equal(notes.supersedes, [[-1, -1], [-1, -1], [3, -1]])


def test_fitted_shape_is_exact_and_every_smaller_one_is_refused():
    words = Words()
    shape = encoding.fit_shape([EXAMPLE], words)
    assert shape == EpisodeShape(
        chunks=2,
        chunk_length=7,
        facts=2,
        questions=2,
        question_length=5,
        needs=2,
        answer_length=2,
        query_length=2,
        note_length=0,
    )
    encoding.encode(EXAMPLE, words, shape)
    for field, size in dataclasses.asdict(shape).items():
        if not size:
            continue
        smaller = dataclasses.replace(shape, **{field: size - 1})
        message = f"example 5: {field} is {size}, but the shape allows {size - 1}"
        with pytest.raises(ValueError, match=message):
            encoding.encode(EXAMPLE, words, smaller)


def test_joined_shape_holds_both():
    one, other = EpisodeShape(1, 9, 1, 5, 3, 2, 1, 4, 0), EpisodeShape(2, 3, 1, 1, 6, 2, 2, 1, 7)
    assert one.join(other) == other.join(one) == EpisodeShape(2, 9, 1, 5, 6, 2, 2, 4, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks": []}, "example 5: chunks has no text"),
        ({"chunks": [[make_fact("")]]}, "example 5: chunks has no text, or one without any token"),
        ({"questions": []}, "example 5: questions has no text"),
        ({"chunks": [[make_fact("a.", supersedes=3)]]}, "`supersedes` is 3; allowed: .* 0 to 0"),
    ],
)
def test_broken_examples_are_refused(changes, message):
    questions = [{"text": "q?", "aliases": ["a"], "needs": [0]}]
    example = {**EXAMPLE, "questions": questions, **changes}
    with pytest.raises(ValueError, match=message):
        encoding.encode(example, Words(), EpisodeShape(9, 9, 9, 9, 9, 9, 9, 9))


def test_no_examples_have_no_shape():
    with pytest.raises(ValueError, match="examples is empty"):
        encoding.fit_shape([], Words())


def test_a_document_without_questions_and_questions_without_one():
    words = Words()
    shape = encoding.fit_shape([EXAMPLE], words)
    question = {**EXAMPLE["questions"][0], "needs": []}
    whole = encoding.encode(EXAMPLE, words, shape)
    read, asked, empty = (
        {**EXAMPLE, **changes}
        for changes in (
            {"questions": []},
            {"chunks": [], "questions": [question]},
            {"chunks": [], "questions": [{**question, "text": ""}]},
        )
    )
    read, asked = (encoding.encode(e, words, shape, partial=True) for e in (read, asked))
    assert (int(read.num_chunks), int(read.num_questions)) == (int(whole.num_chunks), 0)
    assert (int(asked.num_chunks), int(asked.num_questions)) == (0, 1)
    np.testing.assert_array_equal(read.chunks, whole.chunks)
    np.testing.assert_array_equal(read.question_lengths, 0)
    np.testing.assert_array_equal(asked.chunk_lengths, 0)
    np.testing.assert_array_equal(asked.questions[0], whole.questions[0])
    with pytest.raises(ValueError, match="questions has no text, or one without any token"):
        encoding.encode(empty, words, shape, partial=True)


def _train_bpe(texts: list[str]) -> tokenizer_lib.HuggingFaceTokenizer:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return tokenizer_lib.HuggingFaceTokenizer(bpe, eos_token="<|end|>", pad_token="<|pad|>")


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level BPE"])
def test_tokens_of_a_chunk_read_as_its_text_and_spans_as_its_facts(dataset, kind):
    texts = list(datasets.tokenizer_texts(dataset))
    if kind == "sentencepiece":
        tokenizer = tokenizer_lib.SentencePieceTokenizer.train(texts, 600)
    else:
        tokenizer = _train_bpe(texts)
    config = synthetic.SyntheticConfig(facts_per_chunk=5)
    examples = [synthetic.generate(config, "test_1x", i) for i in range(10)]
    shape = encoding.fit_shape(examples, tokenizer)
    for example in examples:
        episode = encoding.encode(example, tokenizer, shape)
        notes = episode.annotations
        for c, chunk in enumerate(example["chunks"]):
            row = episode.chunks[c, : episode.chunk_lengths[c]].tolist()
            assert tokenizer.decode(row) == " ".join(fact["text"] for fact in chunk)
            assert not (episode.chunks[c, len(row) :] != tokenizer.pad_id).any()
            for u, fact in enumerate(chunk):
                span = row[notes.start[c, u] :][: notes.length[c, u]]
                assert tokenizer.decode(span).strip() == fact["text"]
                subject = tokenizer.decode(span[: notes.subject_length[c, u]]).strip()
                assert subject == fact["subject"]
        for q, question in enumerate(example["questions"]):
            row = episode.questions[q, : episode.question_lengths[q]].tolist()
            assert tokenizer.decode(row) == question["text"]
            gold = notes.gold[q, : notes.gold_length[q]].tolist()
            assert tokenizer.decode(gold) == question["aliases"][0]


def test_prepared_examples_are_those_of_the_generator_in_order(dataset):
    config = synthetic.SyntheticConfig(train_examples=50, test_examples=13, scales=(1, 2))
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 50,
        "validation_1x": 13,
        "test_1x": 13,
        "test_2x": 13,
    }
    for name, split in dataset.splits.items():
        expected = [synthetic.generate(config, name, i) for i in range(len(split))]
        assert list(split) == expected
        assert [split[i] for i in range(len(split))] == expected
        assert split[-1] == expected[-1]
        assert split[2:9:3] == expected[2:9:3]
        with pytest.raises(IndexError):
            split[len(split)]


def test_second_preparation_writes_nothing_and_other_settings_their_own(
    dataset, data_root, monkeypatch
):
    other = datasets.prepare({**TASK, "seed": 1}, data_root)
    assert other.directory != dataset.directory
    assert other.split("train")[0] != dataset.split("train")[0]

    def refuse(*arguments):
        raise AssertionError("generated again")

    monkeypatch.setattr(synthetic, "generate", refuse)
    again = datasets.prepare(TASK, data_root)
    assert again.directory == dataset.directory
    assert list(again.split("test_1x")) == list(dataset.split("test_1x"))


def test_processes_that_prepare_at_once_all_read_the_result(tmp_path):
    program = (
        "import sys; from atommem_jax.tasks import datasets; "
        "task = {'name': 'synthetic', 'train_examples': 2000, 'test_examples': 5}; "
        "sys.stdout.write(f'found {len(datasets.prepare(task, sys.argv[1]).split(\"train\"))}')"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = pathlib.Path(__file__).resolve().parents[2]
    running = [
        subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in running:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "found 2000" in output
    assert len(list(tmp_path.glob("synthetic/*/*"))) == 1, "left-overs of an unfinished writer"


def test_babi_takes_the_same_road(tmp_path):
    story = "1 Mary moved to the bathroom.\n2 Where is Mary?\tbathroom\t1\n"
    for part in ("train", "test"):
        (tmp_path / f"qa1_single-supporting-fact_{part}.txt").write_text(story * 4)
    task = {"name": "babi", "task": 1, "data_dir": str(tmp_path), "validation_every": 2}
    found = datasets.prepare(task, tmp_path / "prepared")
    config = babi.BabiConfig(task=1, data_dir=str(tmp_path), validation_every=2)
    assert {name: len(split) for name, split in found.splits.items()} == {
        "train": 2,
        "validation": 2,
        "test": 4,
    }
    assert list(found.split("train")) == list(babi.generate(config, "train"))
    # Other files under the same path are another data set.
    (tmp_path / "qa1_single-supporting-fact_test.txt").write_text(story)
    changed = datasets.prepare(task, tmp_path / "prepared")
    assert len(changed.split("test")) == 1
    with pytest.raises(FileNotFoundError, match=r"task\.data_dir is not set"):
        datasets.prepare({"name": "babi"}, tmp_path / "prepared")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "squad"}, "task.name is 'squad'; allowed: 'village', 'facts', 'babi'"),
        ({}, "task.name is None"),
        ({"name": "synthetic", "facts": 3}, "task.facts is no field .* base_facts"),
        ({"name": "synthetic", "two_hop": 2}, "task.two_hop is 2"),
    ],
)
def test_bad_task_descriptions_are_refused(tmp_path, task, message):
    with pytest.raises(ValueError, match=message):
        datasets.prepare(task, tmp_path)


def test_unknown_split_names_those_that_exist(dataset):
    with pytest.raises(KeyError, match=r"split is 'dev'.*train.*test_2x"):
        dataset.split("dev")


def test_tokenizer_learns_from_the_train_split_alone(dataset):
    texts = list(datasets.tokenizer_texts(dataset))
    assert len(set(texts)) == len(texts)
    expected = set()
    for example in dataset.split("train"):
        expected |= {fact["text"] for chunk in example["chunks"] for fact in chunk}
        expected |= {question["text"] for question in example["questions"]}
        expected |= {alias for question in example["questions"] for alias in question["aliases"]}
        expected.add(example["focus"])
    assert set(texts) == expected


def test_batch_stacks_the_encoded_examples_with_their_aliases(train):
    source, words, shape = train
    batch = next(batches.batches(source, words, shape, batch_size=4, seed=0))
    assert batch.ids.shape == (4,)
    for row, index in enumerate(batch.ids):
        alone = encoding.encode(source[int(index)], words, shape)
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.tree.map(lambda x, r=row: x[r], batch.episodes),
            alone,
        )
        assert batch.aliases[row] == [q["aliases"] for q in source[int(index)]["questions"]]


def _ids(iterator) -> list[list[int]]:
    return [batch.ids.tolist() for batch in iterator]


def test_every_epoch_is_another_order_of_all_samples(train):
    found = _ids(batches.batches(*train, batch_size=10, seed=3, num_epochs=2))
    flat = list(itertools.chain.from_iterable(found))
    assert sorted(flat[:50]) == sorted(flat[50:]) == list(range(50))
    assert flat[:50] != flat[50:]
    assert _ids(batches.batches(*train, batch_size=10, seed=3, num_epochs=2)) == found
    assert _ids(batches.batches(*train, batch_size=10, seed=4, num_epochs=2)) != found
    ordered = _ids(batches.batches(*train, batch_size=10, seed=3, shuffle=False, num_epochs=1))
    assert ordered == np.arange(50).reshape(5, 10).tolist()


def test_only_the_end_of_the_last_epoch_is_dropped(train):
    found = _ids(batches.batches(*train, batch_size=15, seed=0, num_epochs=2))
    assert [len(ids) for ids in found] == [15] * 6
    counts = collections.Counter(itertools.chain.from_iterable(found))
    assert set(counts) == set(range(50))
    assert max(counts.values()) == 2


def test_restored_iterator_goes_on_where_the_saved_one_was(train):
    iterator = batches.batches(*train, batch_size=8, seed=1)
    for _ in range(9):  # into the second epoch
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = _ids(itertools.islice(iterator, 12))
    fresh = batches.batches(*train, batch_size=8, seed=1)
    fresh.set_state(state)
    assert _ids(itertools.islice(fresh, 12)) == expected
    iterator.set_state(state)
    assert _ids(itertools.islice(iterator, 12)) == expected


def test_processes_share_each_batch_equally_and_their_number_may_change(train):
    whole = _ids(batches.batches(*train, batch_size=12, seed=1, num_epochs=3))
    shares = [
        batches.batches(*train, batch_size=12, seed=1, num_epochs=3, rows=rows)
        for rows in np.split(np.arange(12), 3)
    ]
    begun = [_ids(itertools.islice(share, 5)) for share in shares]
    states = [share.get_state() for share in shares]
    assert states[0] == states[1] == states[2]
    rest = []
    for rows in np.split(np.arange(12), 2):
        share = batches.batches(*train, batch_size=12, seed=1, num_epochs=3, rows=rows)
        share.set_state(states[0])
        rest.append(_ids(share))
    joined = [
        list(itertools.chain.from_iterable(parts))
        for parts in [*zip(*begun, strict=True), *zip(*rest, strict=True)]
    ]
    assert joined == whole
    assert {len(ids) for ids in begun[0]} == {4}
    assert {len(ids) for ids in rest[0]} == {6}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        (
            {"batch_size": 2, "rows": np.array([1, 2])},
            r"rows are \[1, 2\] of a batch of 2;.*0 to 1",
        ),
        ({"batch_size": 2, "rows": np.array([], int)}, r"rows are \[\] of a batch of 2"),
        ({"batch_size": 101, "num_epochs": 2}, "batch_size is 101, but 2 epochs of 50"),
    ],
)
def test_bad_batch_arguments_are_refused(train, arguments, message):
    with pytest.raises(ValueError, match=message):
        batches.batches(*train, seed=0, **arguments)


@pytest.mark.parametrize(("batch_size", "process_count"), [(5, 1), (13, 1), (20, 1), (8, 4)])
def test_evaluation_scores_every_sample_once(dataset, batch_size, process_count):
    words = Words()
    source = dataset.split("test_2x")
    shape = encoding.fit_shape(source, words)
    found, batches_seen = [], set()
    for rows in np.split(np.arange(batch_size), process_count):
        seen = list(batches.iterate_split(source, words, shape, batch_size=batch_size, rows=rows))
        batches_seen.add(len(seen))
        for number, (batch, real) in enumerate(seen):
            assert batch.ids.shape == (batch_size // process_count,)
            assert len(batch.aliases) == len(batch.ids)
            assert not (batch.ids[rows >= real] != 12).any(), "padding is the last sample"
            found += batch.ids[rows < real].tolist()
            assert real == min(batch_size, 13 - number * batch_size)
    assert sorted(found) == list(range(13))
    assert batches_seen == {-(-13 // batch_size)}, "processes disagree on the number of batches"


def test_each_example_is_tokenised_once_within_the_cache(train):
    source, _, shape = train
    words = Words()
    encoded = batches.EncodedDataset(source, words, shape)
    first = encoded.stack(range(50))
    calls = words.calls
    again = encoded.stack(range(50))
    assert words.calls == calls
    jax.tree.map(np.testing.assert_array_equal, first.episodes, again.episodes)
    assert encoded[3][0] is encoded[3][0]
    # Without room the samples are the same, but made each time.
    bare = batches.EncodedDataset(source, words, shape, cache_bytes=0)
    assert bare[3][0] is not bare[3][0]
    jax.tree.map(np.testing.assert_array_equal, bare.stack(range(50)).episodes, first.episodes)
    small = batches.EncodedDataset(
        source, words, shape, cache_bytes=sum(x.nbytes for x in jax.tree.leaves(encoded[0][0]))
    )
    assert small[0] is small[0]
    assert small[1] is not small[1]
