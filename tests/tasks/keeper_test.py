"""The village's script agrees with plain Python, sees what the agent sees, and needs all it has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.agent import build, play
from atommem_jax.config import TeacherConfig, parse
from atommem_jax.language.tokenizer import SentencePieceTokenizer
from atommem_jax.memory import slot_table
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.tasks import batches, encoding, keeper, village
from atommem_jax.tasks.keeper import Habits
from atommem_jax.types import NUM_KINDS, ActionKind, Phase
from experiments.configs import village as village_config
from tests.helpers import memory_reference
from tests.helpers import village_reference as reference

EXAMPLES = 48
NAMES = {kind.name.lower(): kind for kind in ActionKind if kind}


@functools.cache
def make_config(facts_per_chunk: str = "3"):
    config = village_config.get_config(facts_per_chunk)
    config.mesh.cpu_devices = 1
    return parse(config)


def make_examples(split: str = "test_1x", facts_per_chunk: str = "3") -> list:
    task = village.VillageConfig(**make_config(facts_per_chunk).task.fields)
    return [village.generate(task, split, i) for i in range(EXAMPLES)]


@functools.cache
def make_tokenizer() -> SentencePieceTokenizer:
    task = village.VillageConfig(**make_config().task.fields)
    texts = {
        text
        for i in range(400)
        for example in [village.generate(task, "train", i)]
        for text in [
            *(fact["text"] for chunk in example["chunks"] for fact in chunk),
            *(question["text"] for question in example["questions"]),
            *(question["aliases"][0] for question in example["questions"]),
            example["focus"],
        ]
    }
    config = make_config()
    return SentencePieceTokenizer.train(
        sorted(texts), config.tokenizer.vocab_size, build.reserved_names(config)
    )


@functools.cache
def make_parts(facts_per_chunk: str = "3") -> build.Parts:
    return build.build(make_config(facts_per_chunk), make_tokenizer())


@functools.cache
def make_shape() -> encoding.EpisodeShape:
    examples = [
        *make_examples("test_2x"),
        *make_examples("test_1x", "1"),
        *make_examples("test_1x", "2"),
    ]
    return encoding.fit_shape(examples, make_tokenizer())


@functools.cache
def _make_program():
    return play.make_scripted_program(make_parts(), mesh_lib.single())


def make_episodes(examples):
    dataset = batches.EncodedDataset(examples, make_tokenizer(), make_shape())
    return jax.device_put(dataset.stack(range(len(examples))).episodes)


def run(examples, rates=None, habits=None, episodes=None, seed=0):
    """Trajectories with NumPy leaves; one program for all."""
    play_script = play.bind_script(
        _make_program(),
        make_parts(),
        make_shape(),
        rates or TeacherConfig(),
        mesh_lib.single(),
        Habits() if habits is None else habits,
    )
    episodes = make_episodes(examples) if episodes is None else episodes
    ids = jnp.arange(len(examples), dtype=jnp.int32)
    return jax.device_get(play_script(episodes, ids, jax.random.key(seed)))


def decode(played) -> list[list[str]]:
    return [
        [make_tokenizer().decode(row[:size].tolist()) for row, size in zip(*answers, strict=True)]
        for answers in zip(played.answers, played.answer_lengths, strict=True)
    ]


def score(played, examples) -> float:
    """Share of the questions that are answered right."""
    right = [
        answer in question["aliases"]
        for answers, example in zip(decode(played), examples, strict=True)
        for answer, question in zip(answers, example["questions"], strict=True)
    ]
    return sum(right) / len(right)


@functools.cache
def key_of(*words: str) -> np.ndarray:
    """The key of a text on the table's grid, as integers."""
    ids = [token for word in words for token in make_tokenizer().encode(word)]
    key = make_parts().embed(jnp.asarray(ids, jnp.int32), jnp.asarray(len(ids), jnp.int32))
    return np.asarray(jnp.round(key / slot_table.GRID)).astype(np.int64)


def similarity(query: list[str], text: list[str]) -> float:
    return float(key_of(*query) @ key_of(*text))


SCRIPTS = {
    "clean": (reference.Keeper(), Habits()),
    "no_update": (
        reference.Keeper(lacks=("update",), order=("city", "thing", "bells"), resets=True),
        Habits(keeper._without(ActionKind.UPDATE), (0, 1, 2), reset=True),
    ),
    "no_delete": (
        reference.Keeper(lacks=("delete",), recycle=True, resets=True),
        Habits(keeper._without(ActionKind.DELETE), recycle=True, reset=True),
    ),
    "no_scratchpad": (
        reference.Keeper(lacks=("scratchpad",), tally=True, resets=True),
        Habits(keeper._without(ActionKind.SCRATCHPAD), tally=True, reset=True),
    ),
    "no_read": (
        reference.Keeper(lacks=("read",)),
        Habits(keeper._without(ActionKind.READ)),
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_on_the_slot_table_is_that_of_plain_python(name):
    plain, habits = SCRIPTS[name]
    examples = make_examples("test_2x")
    played = run(examples, habits=habits)
    applied = played.turns.report.applied.sum(axis=1)
    for i, (example, answers) in enumerate(zip(examples, decode(played), strict=True)):
        expected, counts = reference.play(plain, example, similarity)
        assert answers == expected
        assert {kind: applied[i, NAMES[kind]] for kind in counts} == counts
    assert set(counts) == set(memory_reference.KINDS)


@pytest.mark.parametrize("facts_per_chunk", ["1", "2", "3"])
def test_the_clean_script_answers_every_question(facts_per_chunk):
    examples = make_examples(facts_per_chunk=facts_per_chunk)
    played = run(examples)
    assert score(played, examples) == 1.0
    assert not played.turns.report.invalid.any()
    assert not played.turns.report.rejected.any()
    assert not played.turns.report.truncated.any()
    used = played.turns.report.applied.sum(axis=(0, 1))
    assert (used[[kind for kind in ActionKind if kind]] > 0).all()


def test_what_the_agent_does_not_see_changes_nothing():
    examples = make_examples()
    episodes = make_episodes(examples)
    known = {"start", "length", "category"}  # where sentences begin, and what each is about
    a = episodes.annotations
    hidden = {name: jnp.zeros_like(value) for name, value in vars(a).items() if name not in known}
    blind = episodes.replace(annotations=a.replace(**hidden))
    for rates in (TeacherConfig(), make_config().teacher):
        seen, unseen = run(examples, rates), run(examples, rates, episodes=blind)
        assert (seen.turns.response == unseen.turns.response).all()
    # Nor does it know whom a sentence is about, but from its words.
    kinds = jnp.asarray(
        [village.FactCategory["OTHER_" + c.name] if "OTHER_" + c.name in
         village.FactCategory.__members__ else c for c in village.FactCategory], jnp.int32
    )  # fmt: skip
    merged = jnp.where(a.category >= 0, kinds[jnp.maximum(a.category, 0)], a.category)
    said = episodes.replace(annotations=a.replace(category=merged))
    assert (run(examples).turns.response == run(examples, episodes=said).turns.response).all()
    # Negative control: it does look at the text.
    other = episodes.replace(chunks=jnp.roll(episodes.chunks, 1, axis=0))
    assert (run(examples).turns.response != run(examples, episodes=other).turns.response).any()


def test_without_any_operation_the_script_falls_short():
    examples = make_examples("test_2x")
    for name, (_, habits) in SCRIPTS.items():
        if name != "clean":
            assert score(run(examples, habits=habits), examples) < 0.8
    for name, scripts in keeper.ABLATED.items():
        lacking = {kind for kind in ActionKind if not scripts[0].kinds[kind]}
        assert lacking, name
        assert all(s.kinds == scripts[0].kinds for s in scripts)
        assert len(set(scripts)) == len(scripts)


def _count_wanted(turns, examples) -> dict[str, tuple[int, int]]:
    """Operation -> turns (of a chunk, the last) that want it, and those that use it."""
    counts = {name: [0, 0] for name in ("create", "read", "update", "delete", "scratchpad")}
    for b, example in enumerate(examples):
        questions = [question["text"] for question in example["questions"]]
        asked = dict(map(reference.asked, questions))
        for c, chunk in enumerate(example["chunks"]):
            said = [reference.read(fact["text"]) for fact in chunk]
            at = np.flatnonzero(turns.live[b] & (turns.chunk[b] == c))
            done = turns.report.applied[b, at].sum(axis=0)
            entry = turns.shown_entries[b, at[-1], 0].tolist()
            shown = make_tokenizer().decode(entry)
            holds = {f"{s.subject} {s.object}" for s in said if s.relation == "loses"}
            mine = {s.relation for s in said if s.subject in asked.values()}
            wanted = {
                "create": "gets" in mine,
                "read": bool({"now", "loses"} & mine),
                "update": "now" in mine and shown.startswith(asked["city"]),
                "delete": "loses" in mine and shown in holds,
                "scratchpad": any(s.relation == "bell" for s in said),
            }
            for name, wants in wanted.items():
                counts[name][0] += wants
                counts[name][1] += bool(wants and done[NAMES[name]])
    return {name: (wants, used) for name, (wants, used) in counts.items()}


def test_the_teacher_uses_each_operation_in_most_of_the_turns_that_want_it():
    examples = make_examples()
    clean, noisy = (run(examples, rates) for rates in (TeacherConfig(), make_config().teacher))
    for wants, used in _count_wanted(clean.turns, examples).values():
        assert wants == used > 0
    for wants, used in _count_wanted(noisy.turns, examples).values():
        assert used > 0.8 * wants > 0
    assert 0.5 < score(noisy, examples) < 1.0


@pytest.mark.parametrize(
    ("rate", "kind"),
    [
        ("update_shown", ActionKind.UPDATE),
        ("forget", ActionKind.DELETE),
        ("count", ActionKind.SCRATCHPAD),
        ("store_support", ActionKind.CREATE),
    ],
)
def test_a_rate_moves_the_operation_that_it_names(rate, kind):
    examples = make_examples()
    used = [
        run(examples, TeacherConfig(**{rate: value})).turns.report.applied[..., kind].sum()
        for value in (0.0, 0.5, 1.0)
    ]
    assert used[0] == 0
    assert 0.1 * used[2] < used[1] < 0.9 * used[2]


def test_distractors_are_stored_at_their_rate():
    examples = make_examples()
    stored = [
        run(examples, TeacherConfig(store_distractor=rate))
        .turns.report.attempted[..., ActionKind.CREATE]
        .sum()
        for rate in (0.0, 0.5)
    ]
    assert stored[1] > 1.5 * stored[0]


def test_a_city_that_is_no_ones_is_stored_at_the_rate_of_distractors():
    examples = make_examples("test_2x")
    said = [fact for example in examples for chunk in example["chunks"] for fact in chunk]
    others = sum(fact["category"] == village.FactCategory.OTHER_CITY for fact in said)
    for rate in (0.0, 0.2):
        played = run(examples, TeacherConfig(store_distractor=rate))
        actions = played.turns.actions
        made = played.turns.live[..., None] & (actions.kind == ActionKind.CREATE)
        firms = np.isin(actions.text[..., 0], keeper.Words.compile(make_tokenizer()).firms)
        # Some find no room among the actions of their turn.
        assert 0.5 * rate * others <= (made & firms).sum() <= 1.3 * rate * others


def test_every_response_is_a_sound_turn_that_ends():
    examples = make_examples("test_2x")
    for rates in (make_config().teacher, TeacherConfig(store_distractor=1.0, update_shown=0.5)):
        turns = run(examples, rates).turns
        last = np.maximum(turns.response_lengths - 1, 0)[..., None]
        ends = np.take_along_axis(turns.response, last, 2)[..., 0]
        assert (ends[turns.live] == make_tokenizer().eos_id).all()
        assert (turns.actions.count <= make_config().rollout.max_actions).all()
        rows = np.arange(turns.actions.kind.shape[2]) < turns.actions.count[..., None]
        assert turns.actions.well_formed[rows].all()
        assert (turns.response_lengths <= keeper.longest_turn(make_parts().script, 2)[0]).all()


def test_answering_reads_where_the_entry_leads_on():
    # A script that stores each firm's city by itself has two hops to go, a turn each.
    examples = make_examples()
    turns = run(examples, habits=Habits(all_cities=True)).turns
    asks = turns.live & (turns.phase == Phase.ANSWERING)
    assert turns.report.applied[asks][:, ActionKind.READ].sum() > 0
    clean = run(examples).turns
    asks = clean.live & (clean.phase == Phase.ANSWERING)
    assert clean.report.applied[asks][:, ActionKind.READ].sum() == 0


def test_a_word_of_several_tokens_is_refused():
    small = SentencePieceTokenizer.train(["a b c"], 300, [])
    with pytest.raises(ValueError, match=r"'Bells' has \d+ tokens.*Raise tokenizer\.vocab_size"):
        keeper.Words.compile(small)


def test_habits_name_every_kind():
    assert len(Habits().kinds) == NUM_KINDS
