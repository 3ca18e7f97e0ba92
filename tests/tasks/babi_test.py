"""bAbI is read from small files written here by hand, and from the published ones where present."""

import gzip
import pathlib

import pytest

from atommem_jax.tasks import babi
from atommem_jax.tasks.babi import BabiConfig, FactCategory

STEMS = {
    1: "qa1_single-supporting-fact",
    2: "qa2_two-supporting-facts",
    3: "qa3_three-supporting-facts",
}
TASK1 = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary went back to the garden.
5 John travelled to the office.
6 Where is Mary? \tgarden\t4
1 Sandra journeyed to the kitchen.
2 Where is Sandra? \tkitchen\t1
"""
TASK2 = """\
1 Mary went to the garden.
2 Mary picked up the milk there.
3 John grabbed the apple there.
4 Mary moved to the office.
5 Mary put down the milk there.
6 Mary moved to the hallway.
7 Mary moved to the kitchen.
8 Where is the milk? \toffice\t5 4
9 John went to the office.
10 John took the milk.
11 John went to the garden.
12 Where is the milk? \tgarden\t10 11
"""
TASK3 = """\
1 Mary went to the garden.
2 Mary got the milk there.
3 Mary moved to the office.
4 Mary moved to the hallway.
5 Mary discarded the milk.
6 Mary moved to the kitchen.
7 Mary moved to the bedroom.
8 Where was the milk before the hallway? \toffice\t5 4 3
"""


def write(folder, task: int, text: str, part: str = "train") -> BabiConfig:
    for each in ("train", "test"):
        path = folder / f"{STEMS[task]}_{each}.txt"
        if each == part or not path.exists():
            path.write_text(text)
    return BabiConfig(task=task, data_dir=str(folder), validation_every=1000)


def flatten(example: dict) -> list[dict]:
    return [fact for chunk in example["chunks"] for fact in chunk]


def column(example: dict, name: str) -> list:
    return [fact[name] for fact in flatten(example)]


def test_task_1_makes_an_example_per_question_over_its_story_so_far(tmp_path):
    first, second, third = babi.generate(write(tmp_path, 1, TASK1), "train")
    assert column(first, "text") == ["Mary moved to the bathroom.", "John went to the hallway."]
    assert first["questions"] == [{"text": "Where is Mary?", "aliases": ["bathroom"], "needs": [0]}]
    assert first["focus"] == "Mary"
    assert column(second, "text") == [
        "Mary moved to the bathroom.",
        "John went to the hallway.",
        "Mary went back to the garden.",
        "John travelled to the office.",
    ]
    # Line 4 of the story is its third sentence: questions have line numbers but are no facts.
    assert second["questions"][0]["needs"] == [2]
    assert column(second, "support") == [True, False, True, False]
    assert column(second, "supersedes") == [-1, -1, 0, -1]
    assert column(second, "subject") == ["Mary", "John", "Mary", "John"]
    moves = [FactCategory.MOVE, FactCategory.OTHER_MOVE]
    assert column(second, "category") == moves * 2
    assert column(third, "text") == ["Sandra journeyed to the kitchen."]
    assert [example["id"] for example in (first, second, third)] == [0, 1, 2]


def test_task_2_notes_where_the_object_is(tmp_path):
    at_office, at_garden = babi.generate(write(tmp_path, 2, TASK2), "train")
    assert at_office["focus"] == "milk"
    notes = [
        "Mary garden",
        "milk Mary garden",  # what is known of Mary tells where she takes it
        None,  # the apple is not asked for
        "milk Mary office",
        "milk office",
        None,  # Mary no longer has it, and where it is, is known
        None,
    ]
    assert [fact.get("note") for fact in flatten(at_office)] == notes
    assert column(at_office, "support") == [note is not None for note in notes]
    # What is said of the milk replaces what was said of the milk; Mary's own entry stays.
    assert column(at_office, "supersedes") == [-1, -1, -1, 1, 3, -1, -1]
    assert column(at_office, "subject") == ["Mary", "milk", "John", "milk", "milk", "Mary", "Mary"]
    assert at_office["questions"][0]["needs"] == [4]
    assert column(at_office, "category") == [
        FactCategory.MOVE,
        FactCategory.TAKE,
        FactCategory.OTHER_TAKE,
        FactCategory.MOVE,
        FactCategory.DROP,
        FactCategory.OTHER_MOVE,
        FactCategory.OTHER_MOVE,
    ]
    later = flatten(at_garden)[7:]
    assert [fact.get("note") for fact in later] == [None, "milk John office", "milk John garden"]
    assert column(at_garden, "supersedes")[7:] == [-1, 4, 8]
    assert at_garden["questions"][0]["needs"] == [9]


def test_people_matter_until_the_object_is_seen_somewhere(tmp_path):
    text = """\
1 Mary got the milk there.
2 John went to the garden.
3 Mary left the milk.
4 John travelled to the office.
5 Sandra moved to the den.
6 John took the milk there.
7 Sandra went to the hall.
8 Where is the milk?\toffice\t6 4
"""
    [example] = babi.generate(write(tmp_path, 2, text), "train")
    assert [fact.get("note") for fact in flatten(example)] == [
        "milk Mary",
        "John garden",
        "milk",
        "John office",
        "Sandra den",
        "milk John office",
        None,
    ]
    assert column(example, "supersedes") == [-1, -1, 0, 1, -1, 2, -1]
    assert example["questions"][0]["needs"] == [5]


def test_task_3_notes_where_the_object_was_before_the_place_asked_about(tmp_path):
    [example] = babi.generate(write(tmp_path, 3, TASK3), "train")
    assert example["focus"] == "milk"
    assert [fact.get("note") for fact in flatten(example)] == [
        "Mary garden",
        "milk Mary garden",
        "milk Mary office",
        "milk Mary hallway office",
        "milk hallway office",
        None,
        None,
    ]
    assert column(example, "supersedes") == [-1, -1, 1, 2, 3, -1, -1]
    assert example["questions"][0]["needs"] == [4]


def test_task_3_forgets_the_earlier_arrival_at_the_place_asked_about(tmp_path):
    text = """\
1 Mary got the milk.
2 Mary went to the den.
3 Mary went to the hall.
4 Mary went to the attic.
5 Mary went to the den.
6 Mary went to the hall.
7 Mary dropped the milk.
8 Where was the milk before the den?\tattic\t7 5 4
"""
    [example] = babi.generate(write(tmp_path, 3, text), "train")
    assert [fact["note"] for fact in flatten(example)] == [
        "milk Mary",
        "milk Mary den",  # from where, is not known
        "milk Mary hall",
        "milk Mary attic",
        "milk Mary den attic",
        "milk Mary hall attic",
        "milk hall attic",
    ]


def test_an_answer_that_the_notes_do_not_give_needs_what_was_published(tmp_path):
    text = TASK2.replace("\toffice\t5 4", "\tcellar\t5 4")
    first, _ = babi.generate(write(tmp_path, 2, text), "train")
    assert first["questions"][0]["needs"] == [4, 3]


def test_sentences_are_grouped_into_chunks(tmp_path):
    config = BabiConfig(1, write(tmp_path, 1, TASK1).data_dir, 3, 1000)
    second = list(babi.generate(config, "train"))[1]
    assert [len(chunk) for chunk in second["chunks"]] == [3, 1]


def test_bars_separate_fields_as_well_as_tabs(tmp_path):
    (tmp_path / "bars").mkdir()
    tabs = list(babi.generate(write(tmp_path, 2, TASK2), "train"))
    bars = list(
        babi.generate(
            write(tmp_path / "bars", 2, TASK2.replace(" \t", "\t").replace("\t", "|")), "train"
        )
    )
    assert bars == tabs


def test_validation_takes_whole_stories_out_of_the_training_file(tmp_path):
    rooms = ["hall", "den", "attic", "shed", "cellar", "porch"]
    stories = [f"1 Mary went to the {room}.\n2 Where is Mary?\t{room}\t1\n" for room in rooms]
    folder = write(tmp_path, 1, "".join(stories)).data_dir
    write(tmp_path, 1, TASK1, "test")
    config = BabiConfig(1, folder, validation_every=3)
    found = {
        split: [example["questions"][0]["aliases"][0] for example in babi.generate(config, split)]
        for split in ("train", "validation", "test")
    }
    assert found == {
        "train": ["hall", "den", "shed", "cellar"],
        "validation": ["attic", "porch"],
        "test": ["bathroom", "garden", "kitchen"],
    }
    with pytest.raises(ValueError, match="split is 'dev'; allowed: train, validation, test"):
        list(babi.generate(config, "dev"))


@pytest.mark.parametrize("folder", ["", "/nowhere"])
def test_missing_files_error_says_where_they_come_from(folder):
    with pytest.raises(FileNotFoundError) as error:
        list(babi.generate(BabiConfig(1, folder), "train"))
    for part in ("config.task.data_dir", folder or "not set", "fb.ai/babi", "en-10k"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 Mary moved to the den.\n2 Where is Mary?\n", "line 2: '2 Where is Mary.' is neither"),
        ("3 Mary moved to the den.\n", "line 1"),
        ("<html>", "line 1: '<html>' is neither"),
        ("1 Mary sang to the den.\n2 Where is Mary?\tden\t1\n", "'Mary sang to the den.' is none"),
        ("1 Mary moved to the den.\n2 Is Mary there?\tyes\t1\n", "'Is Mary there.' has not the"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        list(babi.generate(write(tmp_path, 1, text), "train"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": 4}, "task.task is 4; allowed: 1, 2 or 3"),
        ({"facts_per_chunk": 0}, "task.facts_per_chunk is 0"),
        ({"task": 2, "facts_per_chunk": 2}, "facts_per_chunk is 2, but in task 2 .* allowed: 1"),
        ({"validation_every": 1}, "task.validation_every is 1"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BabiConfig(**fields)


def interpret(entries: list[list[str]], text: str, question: str):
    """What a reader who sees only this much would store: (entry replaced or None, note) or None.

    Written from the entries, where the code under test goes through the story.
    """
    person, *words = text.rstrip(".").split()
    asked, *before = question.rstrip("?").split()[3::3]
    about = next((entry for entry in entries if entry[0] == asked), [])
    theirs = next((entry for entry in entries if entry[0] == person), [])
    holder = [word for word in about[1:] if word.istitle()]
    places = [word for word in about[1:] if word.islower()]
    if "to" in words:
        arrival = words[-1]
        if [person] == holder:
            earlier = places[:1] if [arrival] == before else places[1:]
            return about, [asked, person, arrival, *earlier]
        return None if places else (theirs, [person, arrival])
    if asked not in words:
        return None
    holder = [person] if words[0] in ("took", "got", "grabbed", "picked") else []
    return about, [asked, *holder, *(places or theirs[1:])]


def check_notes(example: dict) -> None:
    """Every note follows from what is stored by then, and the answer from the last of them."""
    [question] = example["questions"]
    entries: list[list[str]] = []
    facts = flatten(example)
    for fact in facts:
        stored = interpret(entries, fact["text"], question["text"])
        assert fact["support"] == (stored is not None)
        if stored is None:
            assert "note" not in fact
            assert fact["supersedes"] == -1
            continue
        replaced, note = stored
        assert fact["note"].split() == note
        assert fact["note"].startswith(fact["subject"])
        old = facts[fact["supersedes"]]["note"].split() if fact["supersedes"] >= 0 else []
        assert old == replaced
        entries = [entry for entry in entries if entry != replaced] + [note]
        assert len(entries) <= 5, "four people and the object"
        assert len(note) <= 4
    [needed] = question["needs"]
    [about] = [entry for entry in entries if entry[0] == example["focus"]]
    assert facts[needed]["note"].split() == about
    assert about[-1] == question["aliases"][0]


@pytest.mark.parametrize(("task", "text"), [(2, TASK2), (3, TASK3)])
def test_notes_follow_from_what_a_reader_sees(tmp_path, task, text):
    for example in babi.generate(write(tmp_path, task, text), "train"):
        check_notes(example)


@pytest.mark.parametrize("task", [1, 2, 3])
def test_published_files_can_be_answered_from_what_is_kept(shared_data, task):
    folder = shared_data / "babi"
    if not folder.is_dir():
        pytest.skip(f"no bAbI files at {folder}")
    config = BabiConfig(task, str(folder))
    counts = {}
    for split in ("train", "validation", "test"):
        examples = list(babi.generate(config, split))
        counts[split] = len(examples)
        for example in examples:
            if task > 1:
                check_notes(example)
                continue
            facts = flatten(example)
            [question] = example["questions"]
            [needed] = question["needs"]
            assert facts[needed]["support"]
            assert facts[needed]["text"].endswith(f" {question['aliases'][0]}.")
            about = [i for i, fact in enumerate(facts) if fact["subject"] == example["focus"]]
            assert [i for i, fact in enumerate(facts) if fact["support"]] == about
            assert [facts[i]["supersedes"] for i in about] == [-1, *about[:-1]]
            assert needed == about[-1]
    training = 10_000 if task < 3 else 1_000
    assert counts == {"train": training * 9 // 10, "validation": training // 10, "test": 1000}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\n",
        lambda data: data.replace(b"\n", b"\n \n"),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n") + b"\x1a",
        lambda data: data.decode().encode("utf-16"),
        gzip.compress,
    ],
    ids=["blank line at the end", "blank lines", "BOM", "DOS", "UTF-16", "gzip"],
)
def test_a_file_that_went_through_many_hands_is_read_as_it_was(tmp_path, change):
    config = write(tmp_path, 1, TASK1)
    path = pathlib.Path(babi.data_file(config, "train"))
    plain = babi.read_stories(str(path))
    path.write_bytes(change(path.read_bytes()))
    assert babi.read_stories(str(path)) == plain


def test_a_file_without_a_story_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.txt: holds no story"):
        babi.read_stories(str(path))
