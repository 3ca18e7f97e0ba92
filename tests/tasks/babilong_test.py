"""BABILong is made of stories and books written here by hand, and read as a policy would."""

import dataclasses

import pytest

from atommem_jax.language.tokenizer import SentencePieceTokenizer
from atommem_jax.tasks import babilong, datasets, encoding
from atommem_jax.tasks.babilong import BabilongConfig
from tests.tasks import babi_test

BOOKS = {
    "a_train": "It was a fine day. The sea was calm. Nobody spoke for a while.",
    "b_train": "Chapter 1\n\nThe horse was brown. It ate hay.",
    "c_test": "A storm came up. The ship went down.",
}


def make_config(folder, **fields) -> BabilongConfig:
    stories = {1: babi_test.TASK1, 2: 2 * babi_test.TASK2}[fields.get("task", 1)]
    for part in ("train", "test"):
        babi_test.write(folder, fields.get("task", 1), stories, part)
    books = folder / "books"
    books.mkdir(exist_ok=True)
    for name, text in BOOKS.items():
        (books / f"{name}.txt").write_text(text)
    return BabilongConfig(
        data_dir=str(folder),
        books=str(books),
        **{
            "test_books": 1,
            "chunk_tokens": 40,
            "train_tokens": (90, 160),
            "lengths": ("0k", "1k"),
            "validation_every": 2,
            **fields,
        },
    )


def prepare(config, folder):
    task = {**dataclasses.asdict(config), "name": "babilong"}
    dataset = datasets.prepare(task, folder / "data")
    tokenizer = SentencePieceTokenizer.train(datasets.tokenizer_texts(dataset), 400)
    return dataset, tokenizer


def read_text(example, tokenizer):
    """The chunks of an example, as text."""
    shape = encoding.fit_shape([example], tokenizer)
    episode = encoding.encode(example, tokenizer, shape)
    rows = zip(episode.chunks, episode.chunk_lengths, strict=True)
    return [tokenizer.decode(row[:length].tolist()) for row, length in rows]


def test_the_story_of_a_split_is_hidden_in_the_books_of_its_part(tmp_path):
    dataset, tokenizer = prepare(make_config(tmp_path), tmp_path)
    for split, own, other in (("train", "sea was calm", "storm"), ("test_1k", "storm", "calm")):
        text = " ".join(read_text(dataset.split(split)[0], tokenizer))
        assert "Mary moved to the bathroom. " in text
        assert "John went to the hallway." in text
        assert own in text
        assert other not in text
        assert text.index("Mary moved") < text.index("John went")


def test_training_books_hold_what_stories_say_of_others(tmp_path):
    config = make_config(tmp_path, decoys=0.0, decoy_phrases=0.6)
    dataset, tokenizer = prepare(config, tmp_path)
    for split, told in (("train", True), ("validation", False), ("test_1k", False)):
        example = dataset.split(split)[0]
        facts = [fact["text"] for fact in example["chunks"][0]]
        text = " ".join(read_text(example, tokenizer))
        assert all(fact in text for fact in facts)
        places = [fact.rstrip(".").split()[-1] for fact in facts]
        of_others = [text.count(place) - " ".join(facts).count(place) for place in places]
        assert any(of_others) is told, split


def test_every_length_asks_the_same_and_has_as_many_tokens_as_it_says(tmp_path):
    dataset, tokenizer = prepare(make_config(tmp_path), tmp_path)
    nothing, thousand = dataset.split("test_0k"), dataset.split("test_1k")
    assert len(nothing) == len(thousand) == 3
    for short, long in zip(nothing, thousand, strict=True):
        assert short["questions"] == long["questions"]
        facts = [fact["text"] for fact in short["chunks"][0]]
        assert " ".join(read_text(short, tokenizer)) == " ".join(facts)
        count = sum(len(tokenizer.encode(text)) for text in read_text(long, tokenizer))
        assert 1000 - 40 < count <= 1000


@pytest.mark.parametrize(
    ("everyone", "expected"), [(False, ["Mary garden"]), (True, ["John office", "Mary garden"])]
)
def test_what_is_stored_are_notes(tmp_path, everyone, expected):
    config = make_config(tmp_path, everyone=everyone, chunk_tokens=120)
    dataset, tokenizer = prepare(config, tmp_path)
    example = next(e for e in dataset.split("test_0k") if e["questions"][0]["needs"] == [2])
    shape = encoding.fit_shape([example], tokenizer)
    episode = encoding.encode(example, tokenizer, shape)
    a = episode.annotations
    notes = [
        tokenizer.decode(a.note[c, u, : a.note_length[c, u]].tolist())
        for c in range(shape.chunks)
        for u in range(shape.facts)
        if a.support[c, u]
    ]
    assert sorted(notes) == expected
    place = int(a.needs[0, 0])
    assert tokenizer.decode(a.note.reshape(-1, shape.note_length)[place].tolist()) == "Mary garden"


def test_needs_and_supersedes_are_followed_in_the_second_task(tmp_path):
    dataset, tokenizer = prepare(make_config(tmp_path, task=2, chunk_tokens=60), tmp_path)
    for example in dataset.split("test_1k"):
        shape = encoding.fit_shape([example], tokenizer)
        a = encoding.encode(example, tokenizer, shape).annotations
        notes = a.note.reshape(-1, shape.note_length)
        lengths = a.note_length.reshape(-1)
        kept: dict[int, str] = {}
        for place in range(len(notes)):
            if a.support.reshape(-1)[place]:
                kept.pop(int(a.supersedes.reshape(-1)[place]), None)
                kept[place] = tokenizer.decode(notes[place, : lengths[place]].tolist())
        answer = example["questions"][0]["aliases"][0]
        assert kept[int(a.needs[0, 0])].split()[-1] == answer
        assert len({note.split()[0] for note in kept.values()}) == len(kept)


def test_the_benchmarks_own_score():
    assert babilong.occurs_in_answer("Kitchen", ["kitchen"]) == 1.0
    assert babilong.occurs_in_answer("She is in the kitchen. Not the garden.", ["kitchen"]) == 1.0
    assert babilong.occurs_in_answer("She left. In the kitchen.", ["kitchen"]) == 0.0
    assert babilong.occurs_in_answer("", ["kitchen"]) == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": ("1k", "1t")}, "lengths has '1t'.*'64k'"),
        ({"lengths": ()}, r"lengths is \(\)"),
        ({"chunk_tokens": 3}, "chunk_tokens is 3; allowed: 16 or more"),
        ({"train_tokens": (9, 3)}, r"train_tokens is \(9, 3\); allowed: \(least, most\)"),
        ({"train_tokens": (9,)}, r"train_tokens is \(9,\); allowed: \(least, most\)"),
        ({"test_examples": 0}, "test_examples is 0; allowed: 1 or more"),
        ({"task": 4}, "task is 4; allowed: 1, 2 or 3"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        BabilongConfig(**fields)


def test_too_few_books_are_counted(tmp_path):
    config = dataclasses.replace(make_config(tmp_path), test_books=3)
    with pytest.raises(FileNotFoundError, match=r"books is .*: 3 books are there.*test_books=3"):
        babilong.list_books(config)


def test_published_stories_hide_in_published_books(shared_data, tmp_path):
    config = BabilongConfig(
        data_dir=str(shared_data / "babi"),
        books=str(shared_data / "books"),
        train_examples=20,
        test_examples=5,
        lengths=("4k",),
    )
    books = babilong.list_books(config)
    assert len(books["test"]) == 4
    assert len(books["train"]) > 10
    examples = list(babilong.generate(config, "test_4k", "books"))
    assert len(examples) == 5
    assert all(example["background"]["tokens"] == 4000 for example in examples)
