"""Workflows: masks leave only their kinds, programs write what plain Python says they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.agent import build, validate
from atommem_jax.config import ConfigError, TeacherConfig
from atommem_jax.learning import rollout, trainer
from atommem_jax.tasks import teacher, workflows
from atommem_jax.types import EMPTY, ActionKind, Phase, Response
from tests.helpers import tiny

PROGRAMS = [name for name, flow in workflows.WORKFLOWS.items() if flow.program is not None]
EPISODES = range(12)


@functools.cache
def make_parts(name: str, **changes) -> build.Parts:
    """Fields of a section are written with two underscores."""
    changes = {path.replace("__", "."): value for path, value in changes.items()}
    config = tiny.make_config().replace({"workflow": name, "memory.slots": 5} | changes)
    return build.build(config, tiny.make_tokenizer())


@functools.cache
def episodes():
    return tiny.make_episodes(EPISODES)[0]


def play(name: str, rates: TeacherConfig | None = None, answers=None, **changes):
    """Every tiny episode with a teacher's answers, or those of another policy. NumPy leaves."""
    parts = make_parts(name, **changes)
    setting = parts.setting(tiny.make_shape())
    restricted = parts.workflow.restrict(rates or TeacherConfig())
    policy = answers or teacher.policy(restricted, parts.script)
    policy = parts.workflow.apply(policy, parts.make_teacher)
    ids = jnp.arange(len(EPISODES), dtype=jnp.int32)
    run = jax.jit(lambda setting, e, i: rollout.run(setting, policy, e, i, jax.random.key(0)))
    return jax.device_get(run(setting, episodes(), ids))


def read_facts(b: int) -> list[list[int]]:
    """The facts of an episode in reading order, one a chunk."""
    e = jax.device_get(episodes())
    lengths = e.chunk_lengths[b, : int(e.num_chunks[b])]
    return [e.chunks[b, c, :n].tolist() for c, n in enumerate(lengths)]


def read_table(played, b: int) -> list[list[int]]:
    """The entries at the end, oldest first."""
    table = jax.tree.map(lambda x: x[b], played.memory)
    slots = sorted(np.flatnonzero(table.valid), key=lambda s: table.created[s])
    return [table.entries[s, : table.lengths[s]].tolist() for s in slots]


def find_kinds(played) -> set[int]:
    return set(np.flatnonzero(played.turns.report.attempted.sum(axis=(0, 1))).tolist())


# ---------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("name", workflows.WORKFLOWS)
@pytest.mark.parametrize("phase", [Phase.READING, Phase.ANSWERING, Phase.FINAL])
def test_a_turn_can_open_only_actions_that_exist(name, phase):
    parts = make_parts(name)
    grammar, reserved = parts.agent.grammar, parts.tokenizer.reserved
    allowed = np.asarray(grammar.allowed(grammar.start(phase), 14))
    opens = {kind for kind in ActionKind if kind and allowed[reserved[f"<{kind.name.lower()}>"]]}
    permitted = {
        Phase.READING: set(ActionKind) - {ActionKind.NONE, ActionKind.ANSWER},
        Phase.ANSWERING: {ActionKind.READ, ActionKind.ANSWER},
        Phase.FINAL: {ActionKind.ANSWER},
    }[phase]
    assert opens == permitted & set(parts.workflow.kinds)
    assert allowed[parts.tokenizer.eos_id] == (phase == Phase.READING)


def test_an_action_without_a_tag_is_not_parsed():
    text = tiny.make_tokenizer().encode("tea")
    update = tiny.spell_action(ActionKind.UPDATE, text, target=1)
    create = tiny.spell_action(ActionKind.CREATE, text)
    tokens = jnp.asarray([*update, *create], jnp.int32)
    full = make_parts("learned").agent.grammar.parse(tokens, tokens.shape[0])
    part = make_parts("no_update").agent.grammar.parse(tokens, tokens.shape[0])
    assert full.kind.tolist()[:2] == [ActionKind.UPDATE, ActionKind.CREATE]
    assert part.kind.tolist()[:2] == [ActionKind.CREATE, ActionKind.NONE]


def test_all_workflows_share_the_tokens_of_the_learned_policy():
    """So that one SFT checkpoint can start them all."""
    names = set()
    for workflow in workflows.WORKFLOWS:
        config = tiny.make_config().replace({"workflow": workflow})
        names.add(tuple(build.reserved_names(config)))
    assert len(names) == 1


def test_a_masked_teacher_stays_within_its_kinds():
    noisy = TeacherConfig(store_distractor=0.5)
    corrects = int((episodes().annotations.supersedes != EMPTY).sum())
    assert corrects > 0
    masked = play("no_update", noisy)
    assert ActionKind.UPDATE not in find_kinds(masked)
    assert ActionKind.CREATE in find_kinds(masked)
    notes = play("scratchpad_only", noisy)
    assert find_kinds(notes) == {ActionKind.SCRATCHPAD, ActionKind.ANSWER}
    assert not notes.turns.occupancy.any()
    assert not notes.turns.scripted.any()


# ---------------------------------------------------------------------------------------------
# Programs


def test_storing_everything_leaves_the_last_facts():
    """Without a standing query nothing is shown, so the entries of least recent touch go first."""
    parts = make_parts("store_all_one_read")
    played = play("store_all_one_read")
    assert parts.setting(tiny.make_shape()).limits.memory.slots == 5
    for b in EPISODES:
        assert read_table(played, b) == read_facts(b)[-5:]


def test_a_sliding_window_shows_the_last_chunks_whatever_is_asked():
    played = play("sliding_window")
    assert make_parts("sliding_window").setting(tiny.make_shape()).limits.memory.slots == 4
    answering = played.turns.live & (played.turns.phase != Phase.READING)
    assert answering.sum() >= len(EPISODES)
    for b in EPISODES:
        last = sorted(read_facts(b)[-4:])
        assert sorted(read_table(played, b)) == last
        for t in np.flatnonzero(answering[b]):
            shown = played.turns.shown_entries[b, t]
            lengths = (shown != tiny.make_tokenizer().pad_id).sum(axis=1)
            texts = [row[:n].tolist() for row, n in zip(shown, lengths, strict=True) if n]
            assert sorted(texts) == last


def test_the_strong_program_edits_what_is_corrected():
    played = play("store_all_update")
    counts = played.turns.report.applied.sum(axis=1)
    facts = np.array([len(read_facts(b)) for b in EPISODES])
    # Every fact becomes an entry or the new text of one.
    edits = counts[:, ActionKind.CREATE] + counts[:, ActionKind.UPDATE]
    np.testing.assert_array_equal(edits, facts)
    assert counts[:, ActionKind.UPDATE].sum() > 0
    assert counts[:, ActionKind.DELETE].sum() > 0
    assert not played.turns.report.invalid.any()
    first = played.turns.report.applied[:, 0, ActionKind.READ]
    np.testing.assert_array_equal(first, 1)  # the standing query


def test_no_memory_keeps_nothing():
    played = play("no_memory")
    assert find_kinds(played) == {ActionKind.ANSWER}
    assert not played.memory.valid.any()
    assert not played.memory.scratchpad_length.any()


def test_answers_may_be_looked_up_several_times():
    sizes = {
        name: make_parts(name).setting(tiny.make_shape()).limits.answer_read_budget
        for name in ("learned", "store_all", "store_all_update")
    }
    assert sizes == {"learned": 1, "store_all": 3, "store_all_update": 3}


def shout(views, episodes, keys) -> Response:
    """Writes rubbish wherever it is asked; NaN shows where its word counted."""
    del episodes, keys
    rows = views.phase.shape[0]
    asked = views.phase != Phase.DONE
    return Response.of_program(
        jnp.full((rows, 14), tiny.make_tokenizer().reserved["<answer>"], jnp.int32),
        jnp.where(asked, 14, 0),
        log_probs=jnp.where(asked[:, None], jnp.nan, 0.0) * jnp.ones((rows, 14)),
        values=jnp.full((rows,), jnp.nan),
    )


def test_the_policy_has_no_word_where_the_program_writes():
    played = play("store_all_one_read", answers=shout)
    turns = played.turns
    reading = turns.live & (turns.phase == Phase.READING)
    np.testing.assert_array_equal(turns.scripted, reading)
    assert np.isfinite(turns.log_probs[reading]).all()
    assert np.isnan(turns.log_probs[turns.live & ~reading]).all()
    for b in EPISODES:
        assert read_table(played, b) == read_facts(b)[-5:]


@pytest.mark.parametrize("name", ["store_all_one_read", "learned"])
def test_only_what_the_policy_wrote_is_learned(name):
    played = play(name)
    batch = jax.device_get(trainer.make_batch(jax.tree.map(jnp.asarray, played)))
    turns = played.turns
    written = turns.live & ~(turns.scripted if name != "learned" else np.zeros_like(turns.live))
    lengths = np.where(written, turns.response_lengths, 0).reshape(-1)
    np.testing.assert_array_equal(batch.response_lengths, lengths)
    np.testing.assert_array_equal((batch.weights > 0).sum(axis=1), lengths)
    if name != "learned":
        assert (lengths == 0).sum() > (lengths > 0).sum()


# ---------------------------------------------------------------------------------------------
# Without reading


def read_questions(b: int) -> list[list[int]]:
    e = jax.device_get(episodes())
    lengths = e.question_lengths[b, : int(e.num_questions[b])]
    return [e.questions[b, q, :n].tolist() for q, n in enumerate(lengths)]


@pytest.mark.parametrize(("name", "last"), [("full_context", False), ("recent_context", True)])
def test_a_question_stands_before_as_much_of_the_document_as_fits(name, last):
    played = play(name, rollout__context_length=9)
    turns = played.turns
    for b in EPISODES:
        document = [token for fact in read_facts(b) for token in fact]
        assert len(document) > 9
        expected = [
            tiny.spell_prompt(
                phase=Phase.FINAL,
                questions=[question],
                query=question[:8],
                chunk=document[-9:] if last else document[:9],
            )
            for question in read_questions(b)
        ]
        lengths = turns.prompt_lengths[b][turns.live[b]]
        prompts = turns.prompt[b][turns.live[b]]
        shown = [row[-n:].tolist() for row, n in zip(prompts, lengths, strict=True)]
        assert shown == expected
    assert not turns.scripted.any()


def test_without_a_limit_the_whole_document_is_shown():
    parts = make_parts("full_context")
    shape = tiny.make_shape()
    assert parts.setting(shape).limits.context == shape.chunks * shape.chunk_length
    limits = parts.setting(shape).limits
    assert limits.turn_bound(shape.chunks, shape.questions) == shape.questions


def test_one_retrieval_answers_what_is_among_the_nearest():
    """Of an index of all parts the four nearest to the question are shown; here by NumPy."""
    played = play("rag_chunks")
    setting = make_parts("rag_chunks").setting(tiny.make_shape())
    a = jax.device_get(episodes().annotations)
    embed = jax.jit(setting.embed)
    pieces = -(-tiny.make_shape().chunk_length // 8)  # of a part, in entries

    def key(text):
        row = np.zeros(8, np.int32)
        row[: len(text)] = text[:8]
        vector = np.asarray(embed(jnp.asarray(row), jnp.int32(min(len(text), 8))))
        return np.round(vector * 2048) / 2048

    known = 0
    for b in EPISODES:
        facts = read_facts(b)
        keys = np.stack([key(fact) for fact in facts])
        for q, question in enumerate(read_questions(b)):
            scores = keys @ key(question)
            nearest = np.argsort(-scores, kind="stable")[:4]
            needed = [c for c in a.needs[b, q] if c != EMPTY]
            found = set(needed) <= set(nearest.tolist())
            gold = a.gold[b, q, : a.gold_length[b, q]].tolist()
            given = played.answers[b, q, : played.answer_lengths[b, q]].tolist()
            if found:
                assert given == gold
            (turn,) = np.flatnonzero(played.turns.live[b] & (played.turns.question[b] == q))
            # A part is a fact, which its first piece holds.
            assert played.turns.shown[b, turn].tolist() == (nearest * pieces).tolist()
            known += found
    assert known >= 3


def test_an_index_without_what_was_corrected_answers_all():
    played = play("store_everything_update")
    a = jax.device_get(episodes().annotations)
    for b in EPISODES:
        for q, _ in enumerate(read_questions(b)):
            gold = a.gold[b, q, : a.gold_length[b, q]].tolist()
            assert played.answers[b, q, : played.answer_lengths[b, q]].tolist() == gold
    assert (played.turns.phase[played.turns.live] != Phase.READING).all()


# ---------------------------------------------------------------------------------------------
# Pairs of turns


def test_the_turns_of_a_pair_have_masks_of_their_own():
    for name, second in (
        ("extract_reconcile", set(workflows.EDITS)),
        ("linked_notes", {ActionKind.CREATE, ActionKind.UPDATE}),
    ):
        parts = make_parts(name)
        reserved = parts.tokenizer.reserved
        opens = []
        for grammar in parts.pair:
            allowed = np.asarray(grammar.allowed(grammar.start(Phase.READING), 14))
            assert allowed[parts.tokenizer.eos_id], "nothing is an answer too"
            kinds = [kind for kind in ActionKind if kind]
            opens.append({k for k in kinds if allowed[reserved[f"<{k.name.lower()}>"]]})
        assert opens == [{ActionKind.READ}, second]
    assert make_parts("linked_notes").setting(tiny.make_shape()).limits.linked == 2


def write_pairs(parts, extracts: bool = True):
    """Extracts the first two tokens of a part, and adds what is its query then."""
    script = parts.script

    def respond_one(view):
        o, yes = view.observation, jnp.ones((), bool)
        reading = view.phase == Phase.READING
        first = reading & (view.reads % 2 == 0) & extracts
        second = reading & (view.reads % 2 == 1)
        return script.write(
            [
                script.action(ActionKind.READ, first, o.chunk[:2], 2),
                script.action(ActionKind.CREATE, second, o.query, o.query_length),
                script.action(ActionKind.ANSWER, yes & ~reading, o.questions[0], 1),
            ]
        )

    def respond(views, episodes, keys):
        del episodes, keys
        return Response.of_program(*jax.vmap(respond_one)(views))

    return respond


@pytest.mark.parametrize(("budget", "pairs"), [(0, 1), (1, 1), (2, 2)])
def test_what_is_extracted_is_reconciled_in_the_next_turn(budget, pairs):
    changes = {"rollout__read_budget": budget, "memory__slots": 6}
    parts = make_parts("extract_reconcile", **changes)
    played = play("extract_reconcile", answers=write_pairs(parts), **changes)
    for b in EPISODES:
        reading = played.turns.live[b] & (played.turns.phase[b] == Phase.READING)
        chunks = len(read_facts(b))
        assert played.turns.chunk[b][reading].tolist() == [
            c for c in range(chunks) for _ in range(2 * pairs)
        ]
        expected = [fact[:2] for fact in read_facts(b) for _ in range(pairs)][-6:]
        assert sorted(read_table(played, b)) == sorted(expected) or pairs > 1
        report = played.turns.report.applied[b].sum(axis=0)
        assert report[ActionKind.READ] == report[ActionKind.CREATE] == chunks * pairs


def test_where_nothing_is_extracted_the_next_part_follows():
    parts = make_parts("extract_reconcile")
    played = play("extract_reconcile", answers=write_pairs(parts, extracts=False))
    for b in EPISODES:
        reading = played.turns.live[b] & (played.turns.phase[b] == Phase.READING)
        assert reading.sum() == len(read_facts(b))


# ---------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("name", ["rag_documents", "full_context", "extract_reconcile"])
def test_what_is_there_to_be_compared_with_is_not_trained(name):
    config = tiny.make_config().replace({"workflow": name})
    with pytest.raises(ConfigError, match=rf"workflow='{name}'.*evaluate with --workflow"):
        validate.validate(config)
    validate.validate(config.replace({"sft.steps": 0, "rl.steps": 0}))


def test_an_unknown_workflow_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"workflow='rag': allowed are learned, .*no_store"):
        workflows.find("rag")
    config = tiny.make_config().replace({"workflow": "rag"})
    with pytest.raises(ConfigError, match="workflow='rag': allowed are"):
        validate.validate(config)


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_are_not_learned_of_turns_that_a_program_writes(name):
    config = tiny.make_config().replace({"workflow": name})
    validate.validate(config)
    config = config.replace({"rl.ppo.estimator": "gae"})
    with pytest.raises(ConfigError, match=f"estimator='gae'.*workflow='{name}'.*use"):
        validate.validate(config)
