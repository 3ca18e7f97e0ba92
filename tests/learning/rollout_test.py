"""The turn loop against a simulation in plain Python, driven by scripts of given responses."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.config import MemoryConfig
from atommem_jax.language import prompt as prompting
from atommem_jax.learning import rollout
from atommem_jax.learning.environment import EpisodeLimits, Setting
from atommem_jax.types import EMPTY, ActionKind, Annotations, Episode, Phase, Response
from tests.helpers import memory_reference as reference
from tests.helpers import tiny
from tests.helpers.memory_reference import Action

ROWS, CHUNKS, CHUNK, QUESTIONS, QUESTION, RESPONSE = 4, 3, 4, 10, 3, 28
KEYS = 4  # texts are alike when their first tokens are, modulo this
CAPS = reference.Caps(entry=4, scratchpad=2, query=3, answer=8, shown=4)
PERMITTED = {
    Phase.READING: set(reference.KINDS) - {reference.ANSWER},
    Phase.ANSWERING: {reference.READ, reference.ANSWER},
    Phase.FINAL: {reference.ANSWER},
}


def embed(tokens, length):
    return jax.nn.one_hot(jnp.where(length > 0, tokens[..., 0] % KEYS, -1), KEYS)


def similarity(a, b):
    return float(a[0] % KEYS == b[0] % KEYS)


@functools.cache
def make_setting(read_budget=2, answer_read_budget=1, eviction="lru"):
    agent = tiny.make_parts().agent
    limits = EpisodeLimits(
        max_turns=0,
        prompt_width=prompting.width(
            agent.template,
            questions=QUESTIONS,
            question_length=QUESTION,
            scratchpad_length=CAPS.scratchpad,
            query_length=CAPS.query,
            entry_length=CAPS.entry,
            chunk_length=CHUNK,
        ),
        memory=MemoryConfig(
            slots=4,
            entry_length=CAPS.entry,
            scratchpad_length=CAPS.scratchpad,
            query_length=CAPS.query,
            shown=CAPS.shown,
            key_dim=KEYS,
            eviction=eviction,
        ),
        read_budget=read_budget,
        answer_read_budget=answer_read_budget,
    )
    limits = dataclasses.replace(limits, max_turns=limits.turn_bound(CHUNKS, QUESTIONS))
    return Setting(
        grammar=agent.grammar,
        template=agent.template,
        limits=limits,
        embed=jax.tree_util.Partial(embed),  # a function as a pytree
    )


class Document(NamedTuple):
    """An episode as lists of token ids."""

    chunks: list
    questions: list


def make_episodes(documents) -> Episode:
    def pack(texts, count, width):
        tokens, lengths = np.full((count, width), words(99)[0], np.int32), np.zeros(count, np.int32)
        for i, text in enumerate(texts):
            tokens[i, : len(text)], lengths[i] = text, len(text)
        return tokens, lengths

    def make(number, document):
        chunks, chunk_lengths = pack(document.chunks, CHUNKS, CHUNK)
        questions, question_lengths = pack(document.questions, QUESTIONS, QUESTION)
        shapes = jax.tree.map(np.zeros_like, tiny.make_dataset()[0][0].annotations)
        return Episode(
            id=np.int32(number),
            chunks=chunks,
            chunk_lengths=chunk_lengths,
            first_chunk=np.int32(0),
            num_chunks=np.int32(len(document.chunks)),
            questions=questions,
            question_lengths=question_lengths,
            num_questions=np.int32(len(document.questions)),
            annotations=Annotations(**vars(shapes)),
        )

    made = [make(i, document) for i, document in enumerate(documents)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *made)


@functools.cache
def text_ids():
    return [i for i, piece in enumerate(tiny.make_tokenizer().token_bytes) if piece]


def words(*numbers):
    """Token ids of the given words of an imaginary language."""
    return [text_ids()[number] for number in numbers]


def spell(turn) -> list[int]:
    ids = [
        token
        for a in turn
        for token in tiny.spell_action(
            ActionKind[a.kind.upper()], a.text, a.target, closed=a.well_formed
        )
    ]
    return [*ids, tiny.make_tokenizer().eos_id]


@jax.jit
def play(setting, episodes, ids, seed, table, responses, lengths):
    """Runs a policy that finds its line, responses[b, t], by the key that a turn must have."""

    def respond(views, episodes, keys):
        same = jnp.all(table[None] == jax.random.key_data(keys)[:, None, None], axis=-1)
        line = jnp.argmax(same.reshape(same.shape[0], -1), axis=1)
        turn = line % table.shape[1]
        found = jnp.any(same, axis=(1, 2))
        size = lengths.reshape(-1)[line]
        real = jnp.arange(RESPONSE)[None] < size[:, None]
        log_prob = jnp.where(found, -0.5 * (turn + 1).astype(jnp.float32), jnp.nan)
        return Response.of_program(
            responses.reshape(-1, RESPONSE)[line],
            size,
            log_probs=jnp.where(real, log_prob[:, None], 0.0),
            values=turn.astype(jnp.float32),
        )

    return rollout.run(setting, respond, episodes, ids, seed)


def run(setting, documents, scripts, first_id=0):
    """Plays one script (a list of turns, each a list of Actions) per document."""
    turns = setting.limits.max_turns
    documents = [*documents, *[documents[0]] * (ROWS - len(documents))]
    scripts = [*scripts, *[[]] * (ROWS - len(scripts))]
    responses = np.full((ROWS, turns, RESPONSE), setting.pad_id, np.int32)
    lengths = np.zeros((ROWS, turns), np.int32)
    for b, script in enumerate(scripts):
        for t in range(turns):
            ids = spell(script[t] if t < len(script) else [])
            responses[b, t, : len(ids)], lengths[b, t] = ids, len(ids)
    seed = jax.random.key(3)
    ids = first_id + np.arange(ROWS, dtype=np.int32)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    table = jax.vmap(fold, in_axes=(0, None))(fold(seed, ids), np.arange(turns, dtype=np.int32))
    data = jax.random.key_data(table)
    played = play(setting, make_episodes(documents), ids, seed, data, responses, lengths)
    return jax.device_get(jax.tree.map(jnp.asarray, played))


# ---------------------------------------------------------------------------------------------
# The same in plain Python


def simulate(limits, document, script):
    """Returns (turns as dicts, answers, memory) by the rules of "Memory semantics"."""
    memory = reference.Memory(limits.memory.slots, CAPS)
    state = {"phase": Phase.READING, "chunk": 0, "question": 0, "reads": 0}
    answers = [([], 0.0)] * len(document.questions)
    turns = []

    def put_question():
        state["reads"] = 0
        if state["question"] == len(document.questions):
            state["phase"] = Phase.DONE
            return
        memory.set_query(document.questions[state["question"]])
        state["phase"] = Phase.ANSWERING if limits.answer_read_budget else Phase.FINAL

    if not document.chunks:
        put_question()
    while state["phase"] != Phase.DONE and len(turns) < limits.max_turns:
        reading = state["phase"] == Phase.READING
        occupancy = sum(entry is not None for entry in memory.slots)
        scores = memory.retrieve(similarity)
        turn = {
            "phase": state["phase"],
            "chunk": state["chunk"] if reading else EMPTY,
            "question": EMPTY if reading else state["question"],
            "prompt": tiny.spell_prompt(
                phase=state["phase"],
                questions=document.questions
                if reading
                else [document.questions[state["question"]]],
                scratchpad=memory.scratchpad,
                query=memory.query,
                shown=[[] if s is None else memory.slots[s].text for s in memory.shown],
                chunk=document.chunks[state["chunk"]] if reading else [],
            ),
            "shown": [EMPTY if slot is None else slot for slot in memory.shown],
            "scores": scores,
            "occupancy": occupancy,
        }
        actions = script[len(turns)] if len(turns) < len(script) else []
        permitted = PERMITTED[state["phase"]]
        turn["report"] = memory.transition(actions, permitted, limits.memory.eviction)
        applied = {kind for kind in reference.KINDS if turn["report"]["applied", kind]}
        turns.append(turn)

        only_read = reference.READ in applied and not applied & {"create", "update", "delete"}
        if reading:
            if only_read and state["reads"] < limits.read_budget:
                state["reads"] += 1
                continue
            state["reads"] = 0
            state["chunk"] += 1
            if state["chunk"] == len(document.chunks):
                put_question()
        elif reference.READ in applied and reference.ANSWER not in applied:
            state["reads"] += 1
            if state["reads"] == limits.answer_read_budget:
                state["phase"] = Phase.FINAL
        else:
            given = [a.text for a in actions if a.kind == "answer" and a.well_formed and a.text]
            if given:
                log_prob = -0.5 * len(turns) * len(spell(actions))
                answers[state["question"]] = (given[0], log_prob)
            state["question"] += 1
            put_question()
    return turns, answers, memory


def check(setting, played, b, document, script):
    """Compares row b of a rollout with the simulation, turn by turn and at the end."""
    turns, answers, memory = simulate(setting.limits, document, script)
    record = jax.tree.map(lambda x: x[b], played.turns)
    assert record.live.tolist() == [t < len(turns) for t in range(setting.limits.max_turns)]
    for t, turn in enumerate(turns):
        found = (record.phase[t], record.chunk[t], record.question[t], record.occupancy[t])
        assert found == (turn["phase"], turn["chunk"], turn["question"], turn["occupancy"]), t
        assert record.shown[t].tolist() == turn["shown"], t
        assert record.shown_scores[t].tolist() == turn["scores"], t
        assert record.prompt_lengths[t] == len(turn["prompt"]), t
        padding = [setting.pad_id] * (setting.limits.prompt_width - len(turn["prompt"]))
        assert record.prompt[t].tolist() == padding + turn["prompt"], t
        said = spell(script[t] if t < len(script) else [])
        assert record.response[t].tolist()[: record.response_lengths[t]] == said, t
        assert record.values[t] == t
        for (outcome, kind), count in turn["report"].items():
            counted = getattr(record.report, outcome)[t, ActionKind[kind.upper()]]
            assert counted == count, (t, outcome, kind)
    for leaf in jax.tree.leaves(record):
        assert not np.any(leaf[len(turns) :]), "something was recorded after the end"

    lengths = played.answer_lengths[b].tolist()
    assert lengths == [len(a) for a, _ in answers] + [0] * (QUESTIONS - len(answers))
    for q, (text, log_prob) in enumerate(answers):
        assert played.answers[b, q, : lengths[q]].tolist() == text
        assert played.answer_log_prob[b, q] == log_prob
    table = jax.tree.map(lambda x: x[b], played.memory)
    for slot, entry in enumerate(memory.slots):
        assert table.valid[slot] == (entry is not None)
        if entry is not None:
            assert table.entries[slot, : table.lengths[slot]].tolist() == entry.text
            assert (table.created[slot], table.touched[slot]) == (entry.created, entry.touched)
    assert table.clock == memory.clock
    assert table.scratchpad[: table.scratchpad_length].tolist() == memory.scratchpad


def draw_document(rng):
    def text(most):
        return words(*rng.integers(0, 60, rng.integers(1, most + 1)))

    return Document(
        chunks=[text(CHUNK) for _ in range(rng.integers(0, CHUNKS + 1))],
        questions=[text(QUESTION) for _ in range(rng.integers(1, QUESTIONS + 1))],
    )


def draw_turn(rng):
    def action():
        kind = str(rng.choice(reference.KINDS, p=[0.2, 0.35, 0.1, 0.05, 0.1, 0.2]))
        text = words(*rng.integers(0, 60, rng.integers(0, 6)))
        target = int(rng.integers(1, 5)) if kind in ("update", "delete") else 0
        # A delete with text is malformed in itself.
        well_formed = bool(rng.random() < 0.9)
        return Action(kind, target, [] if kind == "delete" else text, well_formed)

    return [action() for _ in range(rng.choice(4, p=[0.1, 0.6, 0.2, 0.1]))]


@pytest.mark.parametrize(
    ("budgets", "seeds"),
    [
        ((2, 1, "lru"), range(8)),
        ((0, 0, "reject"), range(8, 11)),
        ((1, 3, "oldest"), range(11, 15)),
    ],
)
def test_random_scripts_play_as_in_plain_python(budgets, seeds):
    setting = make_setting(*budgets)
    phases = set()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        documents = [draw_document(rng) for _ in range(ROWS)]
        scripts = [[draw_turn(rng) for _ in range(setting.limits.max_turns)] for _ in range(ROWS)]
        played = run(setting, documents, scripts, first_id=10 * seed)
        for b in range(ROWS):
            check(setting, played, b, documents[b], scripts[b])
        phases |= set(played.turns.phase[played.turns.live].tolist())
    assert phases >= {Phase.READING, Phase.FINAL}


# ---------------------------------------------------------------------------------------------
# The rules one by one, with literal expectations


def read(*numbers):
    return Action("read", text=words(*numbers))


def create(*numbers):
    return Action("create", text=words(*numbers))


def answer(*numbers):
    return Action("answer", text=words(*numbers))


TWO_CHUNKS = Document(chunks=[words(1, 2), words(3)], questions=[words(5), words(6)])


def live(played, b, field):
    return getattr(played.turns, field)[b][played.turns.live[b]].tolist()


def test_reading_advances_by_the_rule():
    update_nothing = Action("update", target=1, text=words(4))
    scripts = [
        # With a budget of 2 the third read in a row moves on; then reading starts afresh.
        [[read(1)]] * 6,
        # A read beside an applied edit moves on; so does a turn that does nothing.
        [[read(1), create(2)], []],
        # A read beside an edit that fails keeps the chunk.
        [[read(1), update_nothing], [create(1)], [Action("scratchpad", text=words(1))]],
        # Reads that ask for nothing are no reads.
        [[Action("read")], [Action("read", text=words(1), well_formed=False)]],
    ]
    played = run(make_setting(), [TWO_CHUNKS] * 4, scripts)
    assert live(played, 0, "chunk") == [0, 0, 0, 1, 1, 1, EMPTY, EMPTY]
    assert live(played, 1, "chunk") == [0, 1, EMPTY, EMPTY]
    assert live(played, 2, "chunk") == [0, 0, 1, EMPTY, EMPTY]
    assert live(played, 3, "chunk") == [0, 1, EMPTY, EMPTY]


def test_answers_go_to_their_own_question():
    reading, answering, final = Phase.READING, Phase.ANSWERING, Phase.FINAL
    skim = [[], []]
    scripts = [
        [*skim, [answer(11)], [answer(12)]],
        [*skim, [read(1)], [answer(11)], []],  # no answer to the second
        [*skim, [read(1)], [read(2)], [read(1)], [answer(12)]],  # a read on the last turn: none
        [*skim, [Action("answer"), answer(13, 14), answer(15)], [read(1), answer(12)]],
    ]
    played = run(make_setting(), [TWO_CHUNKS] * 4, scripts)
    assert live(played, 0, "phase") == [reading, reading, answering, answering]
    assert live(played, 1, "phase") == [reading, reading, answering, final, answering]
    assert live(played, 2, "phase") == [reading, reading, answering, final, answering, final]
    assert live(played, 2, "question") == [EMPTY, EMPTY, 0, 0, 1, 1]
    given = [
        [played.answers[b, q, : played.answer_lengths[b, q]].tolist() for q in range(2)]
        for b in range(ROWS)
    ]
    assert given == [
        [words(11), words(12)],
        [words(11), []],
        [[], words(12)],
        [words(13, 14), words(12)],
    ]
    assert not played.answer_lengths[:, 2:].any()


def test_answers_while_reading_are_no_actions():  # defect 10
    played = run(make_setting(), [TWO_CHUNKS], [[[answer(11)], [create(2), answer(12)]]])
    turns = played.turns
    assert live(played, 0, "chunk") == [0, 1, EMPTY, EMPTY]
    assert turns.report.invalid[0, :2, ActionKind.ANSWER].tolist() == [1, 1]
    assert turns.report.applied[0, :2, ActionKind.CREATE].tolist() == [0, 1]
    assert not turns.report.applied[0, :, ActionKind.ANSWER].any()
    assert not played.answer_lengths[0].any()


def test_memory_cannot_be_edited_while_answering():
    script = [[create(1, 2)], [], [create(3), answer(7)], [Action("delete", target=1), answer(8)]]
    document = TWO_CHUNKS._replace(questions=[words(1), words(1)])
    played = run(make_setting(), [document], [script])
    assert played.turns.occupancy[0, :4].tolist() == [0, 1, 1, 1]
    assert played.turns.shown[0, 3].tolist() == [0, EMPTY, EMPTY, EMPTY]
    assert played.memory.valid[0].tolist() == [True, False, False, False]
    assert played.answer_lengths[0, :2].tolist() == [1, 1]


def test_query_starts_anew_with_each_question():  # defect 9
    script = [[read(1), create(9)], [], [read(2)], [answer(7)], [answer(8)]]
    played = run(make_setting(), [TWO_CHUNKS], [script])
    query = tiny.make_tokenizer().reserved["<query>"]

    def standing(t):
        prompt = played.turns.prompt[0, t].tolist()
        return prompt[prompt.index(query) + 1] if query in prompt else None

    asked = [words(1)[0], words(5)[0], words(2)[0], words(6)[0]]
    assert [standing(t) for t in range(5)] == [None, *asked]


def test_a_malformed_action_does_not_stop_the_others():  # defect 3
    broken = Action("create", text=words(1), well_formed=False)
    played = run(make_setting(), [TWO_CHUNKS], [[[broken, create(2), create(3)]]])
    assert played.turns.report.attempted[0, 0, ActionKind.CREATE] == 3
    assert played.turns.report.applied[0, 0, ActionKind.CREATE] == 2
    assert played.memory.entries[0, :2, 0].tolist() == words(2, 3)


@pytest.mark.parametrize("questions", [1, 2, 10])
def test_every_question_is_put_once_in_turn(questions):
    document = Document([words(1)], [words(20 + q) for q in range(questions)])
    script = [[], *([answer(40 + q)] for q in range(questions))]
    played = run(make_setting(), [document], [script])
    assert live(played, 0, "question") == [EMPTY, *range(questions)]
    assert played.answers[0, :questions, 0].tolist() == words(*range(40, 40 + questions))


def test_siblings_never_touch_each_others_memory():  # defect 1
    text = (1, 2)
    same = [[read(1), create(*text)], [create(*text)]]
    scripts = [
        [*same, []],
        [*same[:1], [Action("delete", target=1)]],
        [*same[:1], [Action("update", target=1, text=words(9))]],
        [],
    ]
    played = run(make_setting(), [TWO_CHUNKS] * 4, scripts)
    assert [int(n) for n in played.memory.valid.sum(axis=1)] == [2, 0, 1, 0]
    assert played.memory.entries[0, :2, :2].tolist() == [words(*text)] * 2
    assert played.memory.entries[2, 0, 0] == words(9)[0]


def test_the_turn_bound_is_reached_exactly_and_never_exceeded():
    setting = make_setting()
    document = Document([words(1)] * CHUNKS, [words(2)] * QUESTIONS)
    reader = [[read(1)]] * setting.limits.max_turns
    played = run(setting, [document, TWO_CHUNKS], [reader, reader])
    assert setting.limits.max_turns == CHUNKS * 3 + QUESTIONS * 2
    assert played.turns.live[0].all()
    assert played.turns.live[1].sum() == 2 * 3 + 2 * 2
    assert played.turns.question[0, -1] == QUESTIONS - 1


def test_a_trajectory_cut_off_keeps_the_answers_it_gave():
    setting = make_setting()
    setting = setting.replace(limits=dataclasses.replace(setting.limits, max_turns=3))
    played = run(setting, [TWO_CHUNKS], [[[], [], [answer(11)]]])
    assert played.turns.live.shape == (ROWS, 3)
    assert played.turns.live[0].all()
    assert played.answer_lengths[0, :2].tolist() == [1, 0]


# ---------------------------------------------------------------------------------------------
# With a model


def sample(params, indices, ids, seed=0, temperature=1.0, widths=None):
    episodes, _ = tiny.make_episodes(indices)
    return tiny.play(params, episodes, ids, seed, temperature, widths)


def assert_same_row(one, i, other, j):
    """Equal in every bit, but for which row tells how many lanes its group had."""
    one, other = (x.replace(turns=x.turns.replace(lanes=None)) for x in (one, other))
    leaves = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, ours), theirs in leaves:
        np.testing.assert_array_equal(
            np.asarray(ours)[i], np.asarray(theirs)[j], err_msg=jax.tree_util.keystr(path)
        )


def test_a_trajectory_is_replayed_exactly_whoever_else_is_in_the_batch():
    params = tiny.make_params(scale=0.3)
    first = sample(params, [0, 1, 2, 3], [7, 8, 9, 10])
    widths = np.asarray(first.turns.width)
    assert len(np.unique(widths[first.turns.live])) > 1
    elsewhere = widths[[3, 1, 0, 2]]
    again = sample(params, [3, 5, 0, 11], [10, 99, 7, 100], widths=elsewhere)
    assert_same_row(first, 0, again, 2)
    assert_same_row(first, 3, again, 0)
    # Without them the policy chooses by the company, and rounding is all that changes.
    free = sample(params, [3, 5, 0, 11], [10, 99, 7, 100])
    np.testing.assert_array_equal(free.turns.response[2], first.turns.response[0])
    np.testing.assert_allclose(free.turns.log_probs[2], first.turns.log_probs[0], atol=1e-5)

    # One episode under several ids, as in a group: each has its own randomness.
    group = sample(params, [0, 0, 0, 0], [7, 8, 9, 10], widths=widths)
    assert_same_row(first, 0, group, 0)
    responses = np.asarray(group.turns.response)
    assert len({row.tobytes() for row in responses}) == ROWS
    # And under another seed everything differs but the first prompt.
    other = sample(params, [0, 1, 2, 3], [7, 8, 9, 10], seed=1)
    assert (
        (np.asarray(other.turns.response) != np.asarray(first.turns.response))
        .any(axis=2)[:, 0]
        .all()
    )
    np.testing.assert_array_equal(other.turns.prompt[:, 0], first.turns.prompt[:, 0])


def test_masked_turns_are_sound_and_every_token_is_accounted_for():
    played = jax.device_get(sample(tiny.make_params(scale=0.3), [4, 5, 6, 7], [0, 1, 2, 3]))
    turns = played.turns
    real = np.arange(turns.response.shape[2]) < turns.response_lengths[..., None]
    assert (turns.log_probs[real] <= 0).all()
    assert not turns.log_probs[~real].any()
    assert ((turns.response_lengths > 0) == turns.live).all()
    rows = np.arange(turns.actions.kind.shape[2]) < turns.actions.count[..., None]
    assert turns.actions.well_formed[rows].all()
    # The grammar does not let an answer be forgotten on the last permitted turn.
    questions = np.asarray(tiny.make_episodes([4, 5, 6, 7])[0].num_questions)
    np.testing.assert_array_equal((played.answer_lengths > 0).sum(axis=1), questions)
    assert (played.answer_log_prob[played.answer_lengths > 0] < 0).all()


def test_other_episodes_and_temperatures_compile_nothing():
    before = tiny.count_compilations()
    params = tiny.make_params(seed=2)
    sample(params, [0, 1, 2, 3], [0, 1, 2, 3])
    jax.jit(lambda x: x * 3.25 + 1.5)(1.0)
    warm = tiny.count_compilations()
    assert warm > before, "compilations are not being counted"
    played = sample(params, [8, 9, 10, 11], [40, 50, 60, 70], seed=5, temperature=0.0)
    jax.block_until_ready(played)
    assert tiny.count_compilations() == warm
