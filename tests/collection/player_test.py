"""Collecting a teacher's trajectories: playing them, the format, and the loop.

No server is asked but one in a thread of this process (`stub_endpoint`).
"""

import itertools
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atommem_jax.agent import build
from atommem_jax.collection import endpoint, store
from atommem_jax.collection import player as player_lib
from atommem_jax.collection.player import Player, Tally
from atommem_jax.config import ConfigError, PassingError
from atommem_jax.documents.session import Session
from atommem_jax.language import chat
from atommem_jax.learning import environment
from atommem_jax.tasks import batches, encoding, teacher
from atommem_jax.types import Phase
from tests.helpers import tiny

# ---------------------------------------------------------------------------------------------
# Playing and the format, against the jitted rollout


class Scripted:
    """An endpoint that says what it is told, one reply after the other."""

    def __init__(self, replies):
        self.replies, self.said = list(replies), []

    def chat(self, messages):
        self.said.append(messages)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self):
        pass


def say(text, ended=endpoint.STOP, thoughts="") -> endpoint.Reply:
    return endpoint.Reply(text, ended, 100, 10, thoughts)


def list_examples() -> list:
    return tiny.make_examples()[:3]


def make_setting() -> environment.Setting:
    shape = encoding.fit_shape(list_examples(), tiny.make_tokenizer())
    return tiny.make_parts().setting(shape)


@pytest.fixture(scope="module")
def expected():
    """Of each example the trajectory of a scripted teacher (a batch of one), and its aliases."""
    policy = jax.jit(teacher.policy(teacher.SCRIPTED["clean"], tiny.make_parts().script))
    shape = encoding.fit_shape(list_examples(), tiny.make_tokenizer())
    samples = batches.EncodedDataset(list_examples(), tiny.make_tokenizer(), shape)
    played = []
    for b in range(3):
        episode, aliases = samples[b]
        batch = jax.tree.map(lambda x: jnp.asarray(x)[None], episode)
        one = Session(
            make_setting(), lambda view, keys, batch=batch: policy(view, batch, keys), episode
        )
        assert list(one.turns())
        played.append((jax.device_get(one.trajectory()), aliases))
    return played


def spell(ids) -> str:
    """The text of ids in which reserved tokens are written by name."""
    tokenizer = tiny.make_tokenizer()
    names = {i: name.encode() for name, i in tokenizer.reserved.items()}
    pieces = [names.get(i, tokenizer.token_bytes[i]) for i in ids]
    return b"".join(pieces).decode()


def list_replies(trajectory) -> list[endpoint.Reply]:
    """What a teacher would have to say for a trajectory to come about."""
    rows = zip(trajectory.turns.response[0], trajectory.turns.response_lengths[0], strict=True)
    return [say(spell(row[:size].tolist())) for row, size in rows]


@pytest.fixture(scope="module")
def records(expected):
    """The same three played through text."""
    found = []
    for b, (trajectory, _) in enumerate(expected):
        said = Scripted(list_replies(trajectory))
        found.append(Player(tiny.make_parts(), list_examples(), said).play((b, 0)))
        assert not said.replies
    return found


def write(folder, records, **source):
    setting = store.describe_setting(tiny.make_parts())
    with store.Writer(folder, setting, source) as writer:
        for record in records:
            writer.append(store.EPISODES, record)
    return folder


def test_a_batch_holds_what_was_played(expected, records, tmp_path):
    data = store.Collection(write(tmp_path, records), tiny.make_parts(), make_setting(), 0.0)
    sizes = make_setting().limits
    order = [2, 0, 1]
    batch = data.stack(order).trajectories
    assert batch.id.tolist() == order
    assert batch.turns.prompt.shape == (3, sizes.max_turns, sizes.prompt_width)
    assert not batch.turns.scripted.any()
    for row, b in enumerate(order):
        turns = expected[b][0].turns
        count = turns.live.shape[1]
        assert batch.turns.live[row].tolist() == [t < count for t in range(sizes.max_turns)]
        for name in (
            *("phase", "chunk", "question", "prompt", "prompt_lengths", "response"),
            *("response_lengths", "log_probs", "values"),
        ):
            found, whole = getattr(batch.turns, name)[row], getattr(turns, name)[0]
            assert found.dtype == whole.dtype
            np.testing.assert_array_equal(found[:count], whole, err_msg=name)


def test_a_record_says_what_came_of_the_trajectory(expected, records):
    for b, (record, (trajectory, aliases)) in enumerate(zip(records, expected, strict=True)):
        turns = trajectory.turns.live.shape[1]
        assert (record["example"], record["sample"]) == (b, 0)
        assert record["em"] == record["f1"] == [1.0] * len(aliases)
        assert record["reward"] == 1.0
        assert record["answers"] == [accepted[0] for accepted in aliases]
        assert len(record["turns"]) == turns
        assert record["usage"] == {
            "requests": turns,
            "prompt_tokens": 100 * turns,
            "completion_tokens": 10 * turns,
        }
        applied = trajectory.turns.report.applied[0].sum(axis=0)
        assert list(record["applied"].values()) == applied[1:].tolist()
        assert not any(record["invalid"].values())
        assert all(turn["admitted"] and not turn["cut"] for turn in record["turns"])
        assert json.loads(json.dumps(record)) == record


def test_replies_that_break_the_rules_are_played_and_not_learned(tmp_path):
    """What each reply does is known: the protocol is compact, responses have 14 tokens."""
    example = tiny.make_examples()[0]  # six chunks, two questions
    replies = [
        "<create>" + example["chunks"][0][0]["text"],  # never closed
        "<create>" + "Drurvin " * 40 + "<end>",  # longer than a response
        "<update><3> Anna<end>",  # nothing is shown
        "no action",
        say("<create>Anna", "length"),  # the server cut it
        " words <create>Anna<end>\nwords ",
        "<create>no<end>",  # not while answering
        "<answer>" + example["questions"][1]["aliases"][0] + "<end>",
    ]
    replies = [say(reply) if isinstance(reply, str) else reply for reply in replies]
    record = Player(tiny.make_parts(), list_examples(), Scripted(replies)).play((0, 0))
    assert record["em"] == [0.0, 1.0]
    turns = record["turns"]
    assert [turn["cut"] for turn in turns] == [i in (1, 4) for i in range(8)]
    ended = {1: "longer than rollout.response_length", 4: "length"}
    assert [turn["ended"] for turn in turns] == [ended.get(i, "stop") for i in range(8)]
    # An update of what is not shown is well formed; an empty reading turn is a turn.
    assert [turn["admitted"] for turn in turns] == [i in (2, 3, 5, 7) for i in range(8)]
    assert [len(turn["response"]) for turn in turns][1] == 14
    assert {turn["response"][-1] for turn in turns} == {tiny.make_tokenizer().eos_id}
    assert record["applied"]["create"] == 1
    assert record["invalid"]["create"] == 3 + 1
    assert record["invalid"]["update"] == 1
    assert record["usage"] == {"requests": 8, "prompt_tokens": 800, "completion_tokens": 80}

    data = store.Collection(write(tmp_path, [record]), tiny.make_parts(), make_setting(), 0.5)
    learned = data.stack([0]).trajectories.turns
    np.testing.assert_array_equal(learned.live[0, :8], True)
    np.testing.assert_array_equal(
        learned.scripted[0, :8], [i not in (2, 3, 5, 7) for i in range(8)]
    )
    assert "4 of their 8 turns can be learned" in str(data)


def test_no_reply_that_is_not_whole_is_learned(tmp_path):
    """Each is a sound answer or note but for how it ended; the summary names all of them."""
    example = tiny.make_examples()[0]
    ends = ["content_filter", "tool_calls", "no finish_reason", "abort", "length", "length"]
    replies = [say("<create>Anna<end>", ended) for ended in ends]
    replies += [say("<answer>no<end>", "refusal"), say("<answer>yes<end>")]
    record = Player(tiny.make_parts(), [example], Scripted(replies)).play((0, 0))
    assert [turn["ended"] for turn in record["turns"]] == [*ends, "refusal", "stop"]
    data = store.Collection(write(tmp_path, [record]), tiny.make_parts(), make_setting(), 0.0)
    learned = ~data.stack([0]).trajectories.turns.scripted[0, :8]
    assert learned.tolist() == [False] * 7 + [True]
    tally = Tally(0.5, None)
    tally.add(record)
    summary = tally.summarise()
    assert (summary["turns_cut"], summary["turns_outside_grammar"]) == (7, 0)
    rest = dict.fromkeys([*ends[:4], "refusal"], 1)
    assert summary["turns_cut_by"] == {"length": 2, **rest}


# ---------------------------------------------------------------------------------------------
# Thoughts

WRONG, RIGHT = "perhaps <create>wrong<end> then", "<create>right<end>"


@pytest.mark.parametrize(
    "reply",
    [
        f"<think>{WRONG}</think>\n\n{RIGHT}",
        f"{WRONG}\n</think>\n\n{RIGHT}",  # the prompt had opened them
        f"{WRONG}</think> no, {WRONG}</think>{RIGHT}",
        f"Well.\n<think>{WRONG}</think>{RIGHT}",
        f"{RIGHT}<think>{WRONG}</think>",
        f"<think>{WRONG}</think>{RIGHT}</think>",
        f"<think></think><think>{WRONG}</think>{RIGHT}",
        f"<think>no <think> {WRONG}</think>{RIGHT}",
        f"<think>so I write <create></think>{RIGHT}",
        f"so I write <create>wrong</think>{RIGHT}",
        f"<THINK>{WRONG}</Think>{RIGHT}",
        f"[THINK]{WRONG}[/THINK]{RIGHT}",
        f"{WRONG}[/THINK]{RIGHT}",
        f"<thought>{WRONG}</thought>{RIGHT}",
        f"<reasoning>{WRONG}</reasoning>{RIGHT}",
        f"<seed:think>{WRONG}</seed:think>{RIGHT}",
        f"◁think▷{WRONG}◁/think▷{RIGHT}",
        f"<|channel|>analysis<|message|>{WRONG}<|end|><|start|>assistant<|channel|>final<|message|>"
        f"{RIGHT}<|return|>",
        f"<|channel|>analysis<|message|>{WRONG}<|channel|>final<|message|>{RIGHT}",
        f"{WRONG}<|end|><|start|>assistant<|channel|>final <|constrain|>text<|message|>{RIGHT}",
        f"<|channel|>commentary to=functions.x<|message|>{WRONG}<|call|>"
        f"<|start|>assistant<|channel|>final<|message|>{RIGHT}",
        f"analysis{WRONG}assistantfinal{RIGHT}",  # where control tokens are dropped
    ],
)
def test_thoughts_are_taken_out_of_a_reply(reply):
    said = player_lib.split_thoughts(reply, build.find_protocol(tiny.make_config()).tags)
    assert said.over
    assert said.text.replace("Well.", "").replace("</think>", "").strip() == RIGHT
    assert "wrong" in said.thoughts or "so I write <create>" in said.thoughts
    assert RIGHT not in said.thoughts


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (f"<think>{WRONG}", ""),
        (f"[THINK]{WRONG}", ""),
        (f"<|channel|>analysis<|message|>{WRONG}", ""),
        (f"{RIGHT}<think>{WRONG}", RIGHT),
    ],
)
def test_thoughts_may_never_end(reply, text):
    tags = build.find_protocol(tiny.make_config()).tags
    assert player_lib.split_thoughts(reply, tags) == (WRONG, text, False)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no action at all",
        f"I think: {RIGHT}",
        "<create>the tag </think> ends thoughts<end><create>and [THINK] begins them<end>",
        "analysis of the document: <create>assistant<end>",
    ],
)
def test_a_reply_without_thoughts_stays(reply):
    tags = build.find_protocol(tiny.make_config()).tags
    assert player_lib.split_thoughts(reply, tags) == ("", reply, True)


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<create>", "<end></think>", "<|channel|>", "analysis", "a"]
)
def test_a_long_reply_is_split_in_linear_time(piece):
    """A second for a megabyte: what is quadratic would take minutes."""
    tags = build.find_protocol(tiny.make_config()).tags
    begin = time.monotonic()
    player_lib.split_thoughts(piece * (1_000_000 // len(piece)), tags)
    player_lib.split_thoughts("<|channel|>a<|message|>" + piece * (10**6 // len(piece)), tags)
    assert time.monotonic() - begin < 10.0


@pytest.mark.parametrize("name", ["a", "a ", "1", "\u00e9"])
def test_the_name_of_a_channel_may_have_any_length(name):
    """What follows it is looked for once, and not from each of its characters: that took hours."""
    tags = build.find_protocol(tiny.make_config()).tags
    name = name * 1_000_000
    unfinished = f"<|channel|>{name}<|constrain|>{name}"
    assert player_lib.split_thoughts(unfinished, tags) == ("", unfinished, True)
    whole = (
        f"<|channel|>{name}<|constrain|>{name}<|message|>Hm.<|end|><|channel|>final<|message|>So."
    )
    assert player_lib.split_thoughts(whole, tags) == ("Hm.", "So.", True)


def test_thoughts_are_kept_beside_the_turn_and_neither_played_nor_learned(expected, tmp_path):
    replies = list_replies(expected[0][0])
    plain = Player(tiny.make_parts(), list_examples(), Scripted(replies)).play((0, 0))
    thinking = [say(f"{WRONG}\n</think>\n{reply.text}", thoughts="hm ") for reply in replies]
    record = Player(tiny.make_parts(), list_examples(), Scripted(thinking)).play((0, 0))
    assert {turn.pop("thoughts") for turn in record["turns"]} == {f"hm {WRONG}\n"}
    for turn in record["turns"]:
        turn["reply"] = turn["reply"].removeprefix("\n")
    assert record == plain
    assert record["em"] == [1.0] * len(record["em"])

    # Thoughts that never end are no reply, whatever the server says of it.
    unfinished = [say(f"<think>{WRONG}{reply.text}") for reply in replies]
    record = Player(tiny.make_parts(), list_examples(), Scripted(unfinished)).play((0, 0))
    assert {turn["ended"] for turn in record["turns"]} == {"thoughts without a reply"}
    assert not any(record["applied"].values())
    tally = Tally(0.5, None)
    tally.add(record)
    assert tally.summarise()["turns_empty"] == len(record["turns"])


def test_thoughts_are_part_of_a_turn_where_text_is_free():
    parts = build.build(
        tiny.make_config().replace({"protocol.free_text": True}), tiny.make_tokenizer()
    )
    said = Scripted([say("<think>hm</think>")] * 99)
    turns = Player(parts, list_examples(), said).play((0, 0))["turns"]
    assert {turn["reply"] for turn in turns} == {"<think>hm</think>"}
    assert all(len(turn["response"]) > 1 for turn in turns)


def test_the_teacher_sees_the_turn_as_text(expected, records):
    said = Scripted(list_replies(expected[0][0]))
    Player(tiny.make_parts(), list_examples(), said).play((0, 0))
    example = tiny.make_examples()[0]
    questions = "".join(f"\n\nQuestion:\n{q['text']}" for q in example["questions"])
    chunk = example["chunks"][0][0]["text"]
    assert said.said[0] == [
        {
            "role": "system",
            "content": chat.system_message(build.find_protocol(tiny.make_config())),
        },
        {
            "role": "user",
            "content": f"{questions}\n\nPart of the document:\n{chunk}\n\n"
            f"{chat.task_message(Phase.READING)}",
        },
    ]
    assert f"\n\nQuery:\n{example['focus']}\n\nMemory 1:\n{chunk}" in said.said[1][1]["content"]
    assert "Part of the document" not in said.said[-1][1]["content"]


# ---------------------------------------------------------------------------------------------
# Reading


def test_batches_are_of_the_seed_and_resume_and_are_shared(records, tmp_path):
    folder = write(tmp_path, [dict(r, sample=s) for s in range(3) for r in records])
    data = store.Collection(folder, tiny.make_parts(), make_setting(), 0.5)
    assert len(data) == 9

    def draw(count, seed=3, rows=range(4), state=None):
        stream = data.batches(batch_size=4, seed=seed, rows=np.asarray(rows))
        if state is not None:
            stream.set_state(state)
        return [next(stream).trajectories.id.tolist() for _ in range(count)], stream.get_state()

    whole, _ = draw(9)
    assert sorted(itertools.chain(*whole)) == sorted(list(range(9)) * 4)  # 4 epochs
    assert draw(9, seed=4)[0] != whole
    assert draw(9, rows=[1, 2])[0] == [batch[1:3] for batch in whole]
    _, state = draw(5)
    assert draw(4, state=json.loads(json.dumps(state)))[0] == whole[5:]
    assert draw(4, rows=[0], state=state)[0] == [batch[:1] for batch in whole[5:]]

    write(folder, [dict(records[0], sample=7)])
    data = store.Collection(folder, tiny.make_parts(), make_setting(), 0.5)
    with pytest.raises(ConfigError, match=r"sft\.data=.* has changed since the checkpoint"):
        draw(1, state=state)


def test_only_rewarded_trajectories_are_kept(records, tmp_path):
    worse = dict(records[1], em=[0.0, 1.0, 0.0], reward=1 / 3)
    folder = write(tmp_path, [records[0], worse, dict(records[2], em=[0.0, 1.0], reward=0.5)])
    data = store.Collection(folder, tiny.make_parts(), make_setting(), 0.5)
    assert len(data) == 2
    assert str(data).startswith("2 of 3 trajectories of ")
    lessons = data.stack([1, 0])
    np.testing.assert_array_equal(lessons.rewards, [1.0, len(records[0]["em"])])
    np.testing.assert_array_equal(lessons.counts, [2.0, len(records[0]["em"])])
    folder = write(tmp_path / "bad", [worse])
    with pytest.raises(ConfigError, match=r"of 1 trajectories 0 have .*lower sft\.min_reward"):
        store.Collection(folder, tiny.make_parts(), make_setting(), 0.5)


def test_data_of_another_agent_is_refused_by_field(records, tmp_path):
    folder = write(tmp_path, records)
    config = tiny.make_config().replace({"memory.slots": 5, "rollout.response_length": 16})
    parts = build.build(config, tiny.make_tokenizer())
    with pytest.raises(
        ConfigError,
        match=r"another agent: memory\.slots=5 \(collected with 6\); "
        r"rollout\.response_length=16 \(collected with 14\)\. Pass",
    ):
        store.Collection(folder, parts, parts.setting(tiny.make_shape()), 0.5)
    with pytest.raises(ConfigError, match=r"collection\.json cannot be read"):
        store.Collection(tmp_path / "none", tiny.make_parts(), make_setting(), 0.5)
    short = encoding.fit_shape(
        [dict(e, chunks=e["chunks"][:1]) for e in tiny.make_examples()], tiny.make_tokenizer()
    )
    with pytest.raises(ConfigError, match=r"example 0 has \d+ turns; .* have at most \d+"):
        store.Collection(folder, tiny.make_parts(), tiny.make_parts().setting(short), 0.5)


def test_a_torn_line_is_dropped_and_a_broken_one_named(records, tmp_path):
    folder = write(tmp_path, records[:1])
    path = folder / store.EPISODES
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])
    assert len(store.Collection(folder, tiny.make_parts(), make_setting(), 0.5)) == 1
    write(folder, [])
    assert path.read_bytes() == whole
    for broken in (b"{}\n", whole.replace(b'"fingerprint": "', b'"fingerprint": "0')):
        path.write_bytes(whole + broken)
        with pytest.raises(ConfigError, match=r"episodes\.jsonl, line 2 .*emove the line"):
            store.Collection(folder, tiny.make_parts(), make_setting(), 0.5)


def test_a_folder_belongs_to_one_collection_and_one_writer(tmp_path):
    setting = store.describe_setting(tiny.make_parts())
    with (
        store.Writer(tmp_path, setting, {"model": "a"}),
        pytest.raises(ConfigError, match=rf"--out=.* is in use by process {os.getpid()} on "),
    ):
        store.Writer(tmp_path, setting, {"model": "a"})
    for changed, source, message in (
        ({}, {"model": "b"}, r"model='b' \(collected with 'a'\)"),
        ({"prompt": "chat"}, {"model": "a"}, r"prompt='chat' \(collected with 'compact'\)"),
    ):
        with pytest.raises(ConfigError, match=rf"another collection: {message}\. Pass"):
            store.Writer(tmp_path, setting | changed, source)


# ---------------------------------------------------------------------------------------------
# The loop


def collect_here(player, folder, *, samples=1, concurrency=2, max_failures=2):
    tally = Tally(0.5, (1.0, 10.0))
    setting = store.describe_setting(tiny.make_parts())
    with store.Writer(folder, setting, {}) as writer:
        for name in (store.EPISODES, store.FAILURES):
            for record in writer.read(name):
                tally.add(record)
        try:
            player_lib.collect(
                player,
                writer,
                tally,
                samples=samples,
                concurrency=concurrency,
                max_failures=max_failures,
            )
        except ConfigError as error:
            return tally.summarise(), error
    return tally.summarise(), None


def test_failures_are_counted_paid_and_made_good(expected, tmp_path):
    replies = [list_replies(trajectory) for trajectory, _ in expected]
    down = endpoint.OutOfRetriesError("it is down")

    def player(*said):
        return Player(tiny.make_parts(), list_examples(), Scripted(itertools.chain(*said)))

    first = player(replies[0][:3], [down], replies[1], replies[2])
    summary, error = collect_here(first, tmp_path, concurrency=1)
    assert error is None
    assert (summary["trajectories"], summary["kept"], summary["failures"]) == (2, 2, 1)
    assert summary["requests"] == 3 + len(replies[1]) + len(replies[2])
    assert summary["cost"] == pytest.approx(summary["requests"] * (100 + 10 * 10) / 1e6)
    # The same command plays what has failed, and nothing else.
    summary, error = collect_here(player(replies[0]), tmp_path, concurrency=1)
    assert error is None
    turns = sum(map(len, replies))
    assert (summary["trajectories"], summary["failures"], summary["em"]) == (3, 0, 1.0)
    assert (summary["turns"], summary["requests"]) == (turns, 3 + turns)
    # Nothing is left; then one more sample of each.
    assert collect_here(player([]), tmp_path)[0] == summary
    summary, _ = collect_here(player(*replies), tmp_path, samples=2, concurrency=1)
    assert (summary["trajectories"], summary["turns"]) == (6, 2 * turns)


def test_a_server_that_is_down_or_refuses_ends_the_run(tmp_path):
    down = endpoint.OutOfRetriesError("it is down")
    player = Player(tiny.make_parts(), list_examples(), Scripted([down] * 9))
    summary, error = collect_here(player, tmp_path / "down", concurrency=1)
    assert "2 episodes in a row failed (--max_failures), the last one with: it is down" in str(
        error
    )
    assert isinstance(error, PassingError)
    assert (summary["trajectories"], summary["failures"]) == (0, 2)
    refused = endpoint.EndpointError("status 401. Put a valid key")  # for all requests
    player = Player(tiny.make_parts(), list_examples(), Scripted([refused] * 9))
    summary, error = collect_here(player, tmp_path / "refused")
    assert str(error) == "status 401. Put a valid key"
    assert not isinstance(error, PassingError)
    assert (summary["trajectories"], summary["failures"]) == (0, 0)


@pytest.mark.parametrize(
    ("fates", "said"),
    [
        (["down"] * 3, "(episodes without an answer: 3, refused: 0)"),
        (["refused", "down"], "(episodes without an answer: 1, refused: 1)"),
    ],
)
def test_a_collection_of_failures_alone_has_failed(records, tmp_path, fates, said):
    taught = Taught(records[0], fates)
    summary, error = collect_here(taught, tmp_path, max_failures=10, concurrency=1)
    assert isinstance(error, PassingError)
    assert f"nothing was collected {said}; the last one failed with: down. Look" in str(error)
    assert str(error).endswith("when it answers, the same command goes on")
    assert (summary["trajectories"], summary["failures"]) == (0, len(fates))
    # One that is played is enough.
    more = Taught(records[0], ["down", "played", "down"])
    summary, error = collect_here(more, tmp_path, max_failures=10, concurrency=1)
    assert (error, summary["trajectories"]) == (None, 1)


REFUSED = endpoint.RefusedError("status 400, 'too long'")


class Taught:
    """A player whose teacher refuses some episodes, after some time; `played` has their order."""

    def __init__(self, record, fates):
        self.endpoint = Scripted([])
        self.played, self._record, self._fates = [], record, fates

    def __len__(self):
        return len(self._fates)

    def name(self, key):
        return key

    def play(self, key):
        self.played.append(key[0])
        fate = self._fates[key[0]]
        record = {"example": key[0], "sample": key[1], "usage": {"requests": 1}}
        if fate == "slow":
            time.sleep(0.3)
        if fate in ("refused", "down"):
            return record | {"error": fate} | ({"refused": True} if fate == "refused" else {})
        return self._record | record


def test_a_refused_prompt_costs_its_episode_alone(expected, tmp_path):
    replies = [list_replies(trajectory) for trajectory, _ in expected]
    said = itertools.chain(replies[0], replies[1][:2], [REFUSED], replies[2])
    player = Player(tiny.make_parts(), list_examples(), Scripted(said))
    summary, error = collect_here(player, tmp_path, concurrency=1)
    assert error is None
    assert (summary["trajectories"], summary["failures"], summary["refused"]) == (2, 1, 1)
    (failure,) = map(json.loads, (tmp_path / store.FAILURES).read_text().splitlines())
    assert failure["example"] == 1
    assert failure["error"] == "status 400, 'too long'"
    assert failure["usage"]["requests"] == 2
    # Again, and then the server takes it.
    player = Player(tiny.make_parts(), list_examples(), Scripted([REFUSED]))
    summary, error = collect_here(player, tmp_path, concurrency=1)
    assert (error, summary["trajectories"], summary["refused"]) == (None, 2, 1)
    player = Player(tiny.make_parts(), list_examples(), Scripted(replies[1]))
    summary, error = collect_here(player, tmp_path, concurrency=1)
    assert (error, summary["trajectories"], summary["refused"]) == (None, 3, 0)


def test_refused_prompts_never_keep_others_from_being_played(records, tmp_path):
    """Not even more of them than --max_failures, which an earlier run has met."""
    fates = ["played", *["refused", "refused", "played"] * 3]
    taught = Taught(records[0], fates)
    summary, error = collect_here(taught, tmp_path, max_failures=3, concurrency=1)
    assert (error, summary["trajectories"], summary["refused"]) == (None, 4, 6)
    more = Taught(records[0], [*fates, "played"])
    summary, error = collect_here(more, tmp_path, max_failures=3, concurrency=1)
    assert (error, summary["trajectories"], summary["refused"]) == (None, 5, 6)
    assert more.played == [10, 1, 2, 4, 5, 7, 8]  # what is new, then what was refused
    # A server that is down is still found out while they are tried again.
    down = Taught(records[0], ["played", *["down"] * 10])
    _, error = collect_here(down, tmp_path, max_failures=3, concurrency=1)
    assert "3 episodes in a row failed" in str(error)
    assert down.played == [1, 2, 4]


def test_a_server_that_refuses_everything_ends_the_run_soon(records, tmp_path):
    everything = Taught(records[0], ["refused"] * 50)
    summary, error = collect_here(everything, tmp_path / "a", max_failures=10, concurrency=1)
    assert "the server refused the first 3 episodes, the last one with: refused" in str(error)
    assert (summary["refused"], summary["trajectories"]) == (3, 0)
    # The next call begins with others.
    again = Taught(records[0], ["refused"] * 50)
    collect_here(again, tmp_path / "a", max_failures=10, concurrency=1)
    assert again.played[:3] == [3, 4, 5]
    few = Taught(records[0], ["refused"] * 2)
    for _ in range(2):
        _, error = collect_here(few, tmp_path / "b", max_failures=10)
        assert "refused all episodes that there were to play (2), the last one with: ref" in str(
            error
        )
    # Where something was played once, it takes as many as any other failure.
    later = Taught(records[0], ["played"] + ["refused"] * 50)
    summary, error = collect_here(later, tmp_path / "c", max_failures=10, concurrency=1)
    assert "10 episodes in a row failed (--max_failures), the last one with: refused" in str(error)
    assert summary["trajectories"] == 1


def test_refusals_in_a_row_are_counted_in_the_order_of_episodes(records, tmp_path):
    """A refusal comes at once: many of them may come before an answer, and mean nothing."""
    fates = ["slow"] + ["refused", "refused", "slow"] * 5
    taught = Taught(records[0], fates)
    summary, error = collect_here(taught, tmp_path, max_failures=3, concurrency=8)
    assert (error, summary["trajectories"], summary["refused"]) == (None, 6, 10)
