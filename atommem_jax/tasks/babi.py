"""bAbI question answering, tasks 1 to 3, read from the published files.

Source: Weston et al., "Towards AI-Complete Question Answering", arXiv 1502.05698; the English
10k files of `tasks_1-20_v1-2`. One example is made per question: the sentences of its story up to
it, and that question.

What a teacher is told (`support`, `note`, `supersedes`) follows from the question's text and from
what has been read so far, never from the answer:

Task 1, "Where is Mary?". Each sentence about the asked person is worth storing, and replaces the
one before it. The published supporting sentences become `needs`.

Tasks 2 and 3, "Where is the milk?", "Where was the milk before the garden?". A sentence alone does
not say where the milk is, so what is stored is a note, made from the sentence and from the notes
before it. There are two kinds:

- "milk John office": the asked object, who holds it, and where it is; "milk office" once John has
  put it down. In task 3 a last word says where it was before its latest arrival at the asked
  place: "milk John garden office". The place is left out as long as nothing has told it.
- "Mary hallway": where a person is. Only whoever takes the object makes it known where it is, so
  that people's places are worth storing until then, and nobody's but the holder's afterwards.

Each note replaces the last one about the same object or person, and the answer is the last word
of the object's. So `needs` is that note alone; where it does not end with the published answer,
`needs` are the published supporting sentences.
"""

import dataclasses
import enum
import functools
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from atommem_jax import text_files
from atommem_jax.config import paths
from atommem_jax.tasks import babi_simulator, builders
from atommem_jax.tasks.babi_simulator import Line

_STEMS = {
    1: "qa1_single-supporting-fact",
    2: "qa2_two-supporting-facts",
    3: "qa3_three-supporting-facts",
}
_SOURCE = (
    "download tasks_1-20_v1-2.tar.gz from the bAbI project (https://fb.ai/babi), unpack it, and "
    "set --config.task.data_dir to its folder 'en-10k'"
)
_LINE = re.compile(
    r"(?P<number>\d+) (?:(?P<sentence>[^\t|?]+\.)|"
    r"(?P<question>[^\t|?]+\?)\s*[\t|](?P<answer>[^\t|]+)[\t|](?P<supporting>[\d ]+))"
)
_SENTENCE = re.compile(
    r"(?P<person>[A-Z]\w*) (?:"
    r"(?P<move>(?:moved|went|travelled|journeyed|went back) to the (?P<place>\w+))|"
    r"(?P<take>(?:took|got|grabbed|picked up) the (?P<taken>\w+)(?: there)?)|"
    r"(?P<drop>(?:dropped|left|discarded|put down) the (?P<dropped>\w+)(?: there)?)"
    r")\."
)
_QUESTIONS = {
    1: re.compile(r"Where is (\w+)\?"),
    2: re.compile(r"Where is the (\w+)\?"),
    3: re.compile(r"Where was the (\w+) before the (\w+)\?"),
}


class FactCategory(enum.IntEnum):
    """What a sentence is about; OTHER_ means that it does not matter to the question."""

    MOVE = 0  # tasks 2 and 3: of the holder, or of anyone until the object is seen somewhere
    TAKE = 1
    DROP = 2
    OTHER_MOVE = 3
    OTHER_TAKE = 4
    OTHER_DROP = 5


@dataclasses.dataclass(frozen=True)
class BabiConfig:
    """Which task to read, and from where. Raises ValueError or FileNotFoundError."""

    task: int = 1
    data_dir: str = ""  # the folder that holds qa1_single-supporting-fact_train.txt and so on
    facts_per_chunk: int = 1
    validation_every: int = 10  # every so many-th training story goes to validation instead
    simulated_stories: int = 0  # task 3: so many of our own (`babi_simulator`) train beside them

    def __post_init__(self):
        object.__setattr__(self, "data_dir", paths.expand(self.data_dir))
        if self.task not in _STEMS:
            raise ValueError(f"config.task.task is {self.task!r}; allowed: 1, 2 or 3.")
        if self.facts_per_chunk < 1:
            found = self.facts_per_chunk
            raise ValueError(f"config.task.facts_per_chunk is {found!r}; allowed: 1 or more.")
        if self.facts_per_chunk > 1 and self.task > 1:
            raise ValueError(
                f"config.task.facts_per_chunk is {self.facts_per_chunk}, but in task {self.task} "
                "each sentence may change the note that the one before it changed, and a turn can "
                "update only what it was shown; allowed: 1."
            )
        if self.simulated_stories < 0 or (self.simulated_stories and self.task != 3):
            raise ValueError(
                f"config.task.simulated_stories is {self.simulated_stories!r} in task {self.task}; "
                "allowed: 0 or more in task 3, and 0 in the others, whose files are large."
            )
        if self.validation_every < 2:
            found = self.validation_every
            raise ValueError(f"config.task.validation_every is {found!r}; allowed: 2 or more.")


class _Event(NamedTuple):
    """What a sentence says."""

    person: str
    kind: str  # 'move', 'take' or 'drop'
    place: str | None  # moved to
    thing: str | None  # taken or dropped


class _Label(NamedTuple):
    """What is worth storing of a sentence."""

    support: bool = False
    supersedes: int = -1
    note: str = ""
    subject: str = ""


def data_file(config: BabiConfig, part: str) -> str:
    """Path of the published file, `part` being 'train' or 'test'; it exists.

    Raises FileNotFoundError, saying where the files come from, where it does not.
    """
    path = os.path.join(config.data_dir, f"{_STEMS[config.task]}_{part}.txt")
    if not config.data_dir or not os.path.isfile(path):
        found = config.data_dir or "not set"
        raise FileNotFoundError(
            f"config.task.data_dir is {found}: {os.path.basename(path)} is not there; {_SOURCE}."
        )
    return path


def read_stories(path: str) -> list[list[Line]]:
    """Reads a published file: 'ID text', or 'ID question<TAB>answer<TAB>supporting IDs'.

    Copies of the files in circulation separate the fields with '|' instead, which is read too, and
    have blank lines, which are passed over.
    Raises ValueError, naming file and line, where a line has neither form.
    """
    stories: list[list[Line]] = []
    for row, raw in enumerate(text_files.read_text(path).split("\n"), start=1):
        if not raw.strip():
            continue
        matched = _LINE.fullmatch(raw.strip())
        if matched is None or (not stories and matched["number"] != "1"):
            raise ValueError(
                f"{path}, line {row}: {raw.strip()!r} is neither 'ID sentence.' nor "
                f"'ID question?<TAB>answer<TAB>supporting IDs'; {_SOURCE}."
            )
        if matched["number"] == "1":
            stories.append([])
        supporting = tuple(map(int, (matched["supporting"] or "").split()))
        text = matched["sentence"] or matched["question"]
        stories[-1].append(Line(int(matched["number"]), text, matched["answer"], supporting))
    if not stories:
        raise ValueError(f"{path}: holds no story; {_SOURCE}.")
    return stories


def generate(config: BabiConfig, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples (`schema.Example`) of 'train', 'validation' or 'test' in file order.

    Simulated stories follow those of the training file. Validation takes whole stories out of that
    file, so that it shares none with training.
    """
    stories = read_stories(data_file(config, "test" if split == "test" else "train"))
    every = config.validation_every
    if split == "validation":
        stories = stories[every - 1 :: every]
    elif split == "train":
        stories = [story for i, story in enumerate(stories) if (i + 1) % every]
        stories += babi_simulator.simulate(config.simulated_stories, seed=0)
    elif split != "test":
        raise ValueError(f"split is {split!r}; allowed: train, validation, test.")
    index = 0
    for story in stories:
        for position, line in enumerate(story):
            if line.answer is not None:
                yield _make_example(config, index, story[:position], line)
                index += 1


def _make_example(
    config: BabiConfig, index: int, before: Sequence[Line], asked: Line
) -> dict[str, Any]:
    sentences = [line for line in before if line.answer is None]
    numbers = {line.number: fact for fact, line in enumerate(sentences)}
    matched = _QUESTIONS[config.task].fullmatch(asked.text)
    if matched is None:
        raise ValueError(
            f"{_STEMS[config.task]}: question {asked.text!r} has not the form of task "
            f"{config.task}; {_SOURCE}."
        )
    focus = matched[1]
    events = [_understand(line.text) for line in sentences]
    if config.task == 1:
        labels = _follow_person(events, focus)
        known = None
    else:
        place = matched[2] if config.task == 3 else None
        labels, known = _follow_object(events, focus, place)
    told = known is not None and labels[known].note.endswith(f" {asked.answer}")
    question = {
        "text": asked.text,
        "aliases": [asked.answer],
        "needs": [known] if told else [numbers[number] for number in asked.supporting],
    }
    facts = [_make_fact(*pair) for pair in zip(sentences, labels, strict=True)]
    size = config.facts_per_chunk
    return {
        "id": index,
        "chunks": [facts[start : start + size] for start in range(0, len(facts), size)],
        "questions": [question],
        "focus": focus,
    }


def _make_fact(line: Line, label: _Label) -> dict[str, Any]:
    event = _understand(line.text)
    category = FactCategory[("" if label.support else "OTHER_") + event.kind.upper()]
    fact = {
        "text": line.text,
        "subject": label.subject or event.person,
        "support": label.support,
        "supersedes": label.supersedes,
        "category": int(category),
    }
    return fact | ({"note": label.note} if label.note else {})


@functools.lru_cache(maxsize=4096)  # the files hold a few hundred different sentences
def _understand(text: str) -> _Event:
    matched = _SENTENCE.fullmatch(text)
    if matched is None:
        raise ValueError(f"the sentence {text!r} is none that bAbI tasks 1 to 3 use; {_SOURCE}.")
    kind = next(kind for kind in ("move", "take", "drop") if matched[kind])
    thing = matched["taken"] or matched["dropped"]
    return _Event(matched["person"], kind, matched["place"], thing)


def _follow_person(events: Sequence[_Event], asked: str) -> list[_Label]:
    """Task 1: the sentences about the asked person; no notes."""
    labels, last = [], -1
    for number, event in enumerate(events):
        support = event.kind == "move" and event.person == asked
        labels.append(_Label(support, last) if support else _Label())
        last = number if support else last
    return labels


def _follow_object(
    events: Sequence[_Event], asked: str, before: str | None
) -> tuple[list[_Label], int | None]:
    """Tasks 2 and 3: notes on the asked object, and on people as long as they may matter.

    Returns the labels, and which sentence made the last note about the object, if one did. In
    task 3 `before` is the place of the question.
    """
    labels: list[_Label] = []
    places: dict[str, str] = {}  # person -> place noted
    latest: dict[str, int] = {}  # subject of a note -> number of the sentence that made it
    holder = place = earlier = None
    for number, event in enumerate(events):
        subject = asked
        if event.kind != "move" and event.thing == asked:
            holder = event.person if event.kind == "take" else None
            place = place or places.get(event.person)
        elif event.kind == "move" and event.person == holder:
            earlier = place if event.place == before else earlier
            place = event.place
        elif event.kind == "move" and place is None and event.place is not None:
            subject = event.person
            places[subject] = event.place
        else:
            labels.append(_Label())
            continue
        about = (asked, holder, place, earlier) if subject == asked else (subject, event.place)
        note = " ".join(word for word in about if word)
        labels.append(_Label(True, latest.get(subject, -1), note, subject))
        latest[subject] = number
    return labels, latest.get(asked)


class Babi(builders.ExampleBuilder):
    """bAbI tasks 1 to 3 (https://fb.ai/babi)."""

    VERSION = tfds.core.Version("2.0.0")
    DESCRIPTION = "bAbI tasks 1 to 3, one example per question."

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        return self.store(generate(self.builder_config.task, split))


def make_builder(config: BabiConfig, data_root: str) -> Babi:
    """The TFDS builder of `config`, with a directory of its own under `data_root`.

    The directory depends on what the files say, so that other files under the same path are not
    mistaken for those already prepared. Raises FileNotFoundError where a file is missing.
    """
    fields = [config.facts_per_chunk, config.validation_every]
    fields += [config.simulated_stories] if config.simulated_stories else []
    digest = hashlib.sha256("/".join(map(str, fields)).encode())
    for part in ("train", "test"):
        with open(data_file(config, part), "rb") as file:
            digest.update(file.read())
    return Babi.make(f"qa{config.task}_{digest.hexdigest()[:12]}", config, data_root)
