"""The peers of the benchmark do the same work with the same results; the results are complete."""

import dataclasses
import json
import sys

import jax
import numpy as np
import optax
import pytest

from atommem_jax.config import ConfigError
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.runs import validity
from atommem_jax.types import ActionKind
from experiments import benchmark
from experiments.benchmarks import (
    growth,
    host_agent,
    memory_suite,
    phases,
    rollout_suite,
    suites,
    timing,
    train_suite,
)
from tests.conftest import COMPILATION_CACHE
from tests.helpers import runs, tiny

# Of these operations no two entries are so alike that ours and a float32 peer rank them otherwise.
LOAD = memory_suite.Load(
    trajectories=4, slots=8, entry_length=12, key_dim=128, shown=3, actions=4, turns=6
)
TRAJECTORIES = 16
PEERS_NEED = "a peer of the benchmark, in the extra 'bench'"


@pytest.fixture(autouse=True)
def _cache(monkeypatch):
    """What calls `mesh.prepare_devices` keeps the cache of the tests."""
    monkeypatch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make_mesh(2)


def make_scene(mesh, temperature, indices):
    """A tiny model whose every parameter is disturbed: sure of its tokens, and all code runs."""
    batch = tiny.make_dataset().stack(indices)
    return rollout_suite.Scene(
        parts=tiny.make_parts(),
        params=tiny.make_params(scale=0.3),
        mesh=mesh,
        shape=tiny.make_shape(),
        episodes=batch.episodes,
        aliases=batch.aliases,
        temperature=temperature,
    )


@pytest.fixture(scope="module")
def greedy(mesh):
    """(scene, our trajectories on the host)."""
    scene = make_scene(mesh, 0.0, range(TRAJECTORIES))
    return scene, jax.device_get(rollout_suite.Ours(scene).run())


@pytest.fixture(scope="module")
def sampled(mesh):
    scene = make_scene(mesh, 1.0, np.repeat([0, 1], 8))
    return scene, jax.device_get(rollout_suite.Ours(scene).run())


@pytest.fixture(scope="module")
def lesson(sampled):
    """All rows in one optimiser step, so that nothing depends on how mini-batches are dealt."""
    made = train_suite.make_lesson(sampled[0])
    return dataclasses.replace(made, ppo=dataclasses.replace(made.ppo, minibatches=1))


# ---------------------------------------------------------------------------------------------
# Memory


@pytest.fixture(scope="module", params=["lru", "oldest", "reject"])
def operations(request):
    load = dataclasses.replace(LOAD, eviction=request.param)
    return load, memory_suite.draw_operations(load, blocks=2, seed=4)


@pytest.fixture(scope="module")
def ours(operations, mesh):
    """(what was shown turn by turn, tables) of our side."""
    player = memory_suite.Ours(*operations, mesh)
    results = [*player.run(), *player.run()]
    return [read_rows(shown) for shown, _ in results], player.tables(), results


def read_rows(shown):
    """[B][K] texts without padding, those not shown left out."""
    rows = np.asarray(shown).tolist()
    pads = (memory_suite._PAD, memory_suite.VOCAB)
    texts = [[[t for t in text if t not in pads] for text in entries] for entries in rows]
    return [[text for text in entries if text] for entries in texts]


@pytest.mark.peer
@pytest.mark.parametrize("name", memory_suite.PEERS)
def test_a_memory_peer_shows_and_stores_the_same(operations, ours, name):
    if name == "faiss":
        pytest.importorskip("faiss", reason=PEERS_NEED)
    peer, _ = memory_suite.make_peer(name, *operations)
    results = [*peer.run(), *peer.run()]
    shown, tables, our_results = ours
    for turn, (peer_shown, applied) in enumerate(results):
        is_list = isinstance(peer_shown, list)
        assert (peer_shown if is_list else read_rows(peer_shown)) == shown[turn], turn
        counts = np.asarray(our_results[turn][1].applied).sum(axis=1)
        np.testing.assert_array_equal(np.sum(applied, axis=1), counts)
    assert peer.tables() == tables


def test_the_operations_are_mixed_and_some_are_invalid(operations, ours):
    reports = [report for _, report in ours[2]]
    totals = {
        field: sum(np.asarray(getattr(report, field)).sum(axis=0) for report in reports)
        for field in ("applied", "invalid", "evicted", "rejected")
    }
    kinds = [k for k in ActionKind if k not in (ActionKind.NONE, ActionKind.ANSWER)]
    assert (totals["applied"][kinds] > 0).all()
    assert totals["invalid"][ActionKind.UPDATE] > 0
    refuses = operations[0].eviction == "reject"
    assert (totals["rejected" if refuses else "evicted"][ActionKind.CREATE] > 0).all()


# ---------------------------------------------------------------------------------------------
# Rollout


def test_the_host_parser_reads_as_the_grammar_does():
    parts, rng = tiny.make_parts(), np.random.default_rng(0)
    tokenizer = tiny.make_tokenizer()
    special = [*tokenizer.reserved.values(), tokenizer.eos_id]
    shape = (400, 14)
    tags = rng.choice(special, shape)
    rows = np.where(rng.random(shape) < 0.6, tags, rng.integers(0, tokenizer.vocab_size, shape))
    rows = rows.astype(np.int32)
    parse = jax.jit(jax.vmap(parts.agent.grammar.parse))
    expected = jax.device_get(parse(rows, np.full(len(rows), 14, np.int32)))
    parser = host_agent.HostParser(tokenizer, parts.agent)
    found = 0
    for i, row in enumerate(rows.tolist()):
        actions = parser(row)
        assert len(actions) == expected.count[i]
        for j, action in enumerate(actions):
            length = min(expected.length[i, j], parts.agent.grammar.max_text)
            assert action.kind == expected.kind[i, j]
            assert action.target == expected.target[i, j]
            assert action.text == expected.text[i, j, :length].tolist()
            assert action.well_formed == expected.well_formed[i, j]
            found += action.well_formed
    assert found > 20


def replay(name, scene):
    """The peer after one rollout."""
    peer = rollout_suite.make_peer(name, scene)
    peer.run(peer.prepare())
    return peer


def list_turns(trajectories):
    """{trajectory: [(phase, prompt, response, log-probs)]} of our side."""
    t = trajectories.turns
    return {
        i: [
            (
                int(t.phase[i, j]),
                t.prompt[i, j, t.prompt.shape[2] - t.prompt_lengths[i, j] :].tolist(),
                t.response[i, j, : t.response_lengths[i, j]].tolist(),
                t.log_probs[i, j, : t.response_lengths[i, j]],
            )
            for j in np.flatnonzero(t.live[i])
        ]
        for i in range(len(t.live))
    }


def list_host_turns(peer):
    turns = {}
    for turn in peer.turns:
        record = (int(turn.phase), turn.prompt, turn.reply.tokens, np.array(turn.reply.log_probs))
        turns.setdefault(turn.trajectory, []).append(record)
    return turns


@pytest.mark.parametrize("name", ["host_loop", "host_generate"])
def test_host_peers_play_our_trajectories_token_for_token(sampled, name):
    scene, trajectories = sampled
    peer = replay(name, scene)
    expected, found = list_turns(trajectories), list_host_turns(peer)
    for i, turns in expected.items():
        assert [turn[:3] for turn in found[i]] == [turn[:3] for turn in turns]
    assert rollout_suite.same_answers(trajectories, peer.played) == 1.0
    edits = [a.kind for turn in peer.turns for a in turn.actions]
    assert {ActionKind.CREATE, ActionKind.UPDATE, ActionKind.READ} <= set(edits)


@pytest.mark.peer
def test_torch_plays_our_greedy_trajectories(greedy):
    """Rounding may flip an argmax, and all that follows it: nine in ten episodes must be equal."""
    pytest.importorskip("torch", reason=PEERS_NEED)
    pytest.importorskip("faiss", reason=PEERS_NEED)
    scene, trajectories = greedy
    peer = replay("torch_faiss", scene)
    expected, found = list_turns(trajectories), list_host_turns(peer)
    equal = [
        i for i, turns in expected.items() if [t[:3] for t in turns] == [t[:3] for t in found[i]]
    ]
    assert len(equal) >= 0.9 * TRAJECTORIES
    assert rollout_suite.same_answers(trajectories, peer.played) >= 0.9
    for i in equal:
        for ours, theirs in zip(expected[i], found[i], strict=True):
            np.testing.assert_allclose(theirs[3], ours[3], atol=1e-4)


@pytest.mark.peer
def test_rows_that_torch_drops_do_not_change_the_others(greedy):
    pytest.importorskip("torch", reason=PEERS_NEED)
    pytest.importorskip("faiss", reason=PEERS_NEED)
    scene, _ = greedy
    together = replay("torch_faiss", scene)
    alone = rollout_suite.make_peer("torch_faiss", scene, torch_batch=3)
    alone.run(alone.prepare())
    same = [a.answers == b.answers for a, b in zip(together.played, alone.played, strict=True)]
    assert np.mean(same) >= 0.9


# ---------------------------------------------------------------------------------------------
# Train


def make_update(sampled, lesson, microbatch):
    torch = pytest.importorskip("torch", reason=PEERS_NEED)
    from experiments.benchmarks import torch_model, torch_training

    scene = sampled[0]
    agent = scene.parts.agent
    update = torch_training.TorchUpdate(
        agent,
        torch_model.from_params(agent.model.config, jax.device_get(scene.params)),
        lesson.ppo,
        lesson.optimizer,
        temperature=scene.temperature,
        microbatch=microbatch,
    )
    return torch, update, torch_training.Rows.of(lesson.batch), torch_model.name_parameters


@pytest.mark.peer
def test_torch_finds_our_gradient(sampled, lesson):
    _, update, rows, name = make_update(sampled, lesson, microbatch=32)
    ours = train_suite.Ours(sampled[0], lesson, optax.sgd(1.0))
    state, metrics = ours.run(ours.prepare())
    before, after = map(name, jax.device_get((sampled[0].params, state.params)))
    theirs = update.accumulate(rows)
    assert float(metrics["gradient_norm"]) > 1e-3
    for parameter, leaf in update.model.named_parameters():
        expected = before[parameter] - after[parameter]
        if parameter.startswith("value_head"):
            assert leaf.grad is None
            assert not expected.any()
            continue
        np.testing.assert_allclose(leaf.grad.numpy(), expected, atol=1e-5, err_msg=parameter)
    scored = float(metrics["scored_share"])
    for metric in ("ratio", "clip_fraction", "entropy"):
        ours_mean = float(metrics[metric]) * scored
        np.testing.assert_allclose(theirs[metric], ours_mean, atol=1e-4, err_msg=metric)


@pytest.mark.peer
@pytest.mark.relaxed_promotion
def test_torch_takes_our_step(sampled, lesson):
    """Adam's first step is the sign of the gradient: where that is nothing but rounding, it may
    differ."""
    _, update, rows, name = make_update(sampled, lesson, microbatch=1000)
    ours = train_suite.Ours(sampled[0], lesson)
    state, metrics = ours.run(ours.prepare())
    theirs = update.step(rows)
    np.testing.assert_allclose(theirs["gradient_norm"], metrics["gradient_norm"], rtol=1e-3)
    after = name(jax.device_get(state.params))
    for parameter, leaf in update.model.named_parameters():
        if leaf.grad is None:
            continue
        sure = np.abs(leaf.grad.numpy()) > 1e-5
        np.testing.assert_allclose(
            leaf.detach().numpy()[sure], after[parameter][sure], atol=2e-5, err_msg=parameter
        )


@pytest.mark.peer
def test_an_update_that_torch_does_not_implement_is_refused(lesson):
    pytest.importorskip("torch", reason=PEERS_NEED)
    from experiments.benchmarks import torch_training

    ppo = dataclasses.replace(lesson.ppo, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"rl\.ppo\.kl_coef=0\.1"):
        torch_training.check_supported(ppo, lesson.optimizer)


# ---------------------------------------------------------------------------------------------
# Growth


def test_growth_is_measured_along_every_axis(mesh):
    load = dataclasses.replace(LOAD, turns=1)
    curves = growth.measure_memory(load, mesh, runs=1, axes={"slots": (8, 16)})
    assert [point["slots"] for point in curves["slots"]] == [8, 16]
    assert all(point["ours"] > 0 and point["numpy"] > 0 for point in curves["slots"])


def test_growth_is_drawn(tmp_path):
    curves = {
        "slots": [{"slots": 64, "ours": 1.0, "faiss": None}, {"slots": 128, "ours": 2.0}],
        "turns": [{"split": "test_1x", "turns": 14.0, "ours": 1.0}],
    }
    growth.plot(curves, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


# ---------------------------------------------------------------------------------------------
# Timing and results


def test_contestants_take_turns_and_the_first_round_does_not_count():
    order = []
    contestants = {
        name: timing.Contestant(order.append, lambda name=name: name) for name in ("a", "b")
    }
    seconds = timing.measure(contestants, runs=2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_above_one_means_that_ours_is_faster():
    found = timing.compare([1.0, 2.0, 1.0], [4.0, 4.0, 3.0], work=8, unit="turns")
    assert found["unit"] == "turns a second"
    assert (found["ours"], found["peer"], found["ratio"]) == (8.0, 2.0, 4.0)
    assert (found["ratio_min"], found["ratio_max"], found["runs"]) == (2.0, 4.0, 3)


def test_without_a_library_its_peer_says_what_to_install_and_the_others_run(mesh, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    peers = ("faiss", "numpy")
    found = memory_suite.run(LOAD, mesh, runs=1, peers=peers, one_core=False)
    assert found["faiss"]["ratio"] is None
    assert found["faiss"]["reason"].endswith("pip install -e '.[bench]'")
    assert found["numpy"]["ratio"] > 0


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The JSON of all comparing suites on the tiniest of runs."""
    pytest.importorskip("torch", reason=PEERS_NEED)
    pytest.importorskip("faiss", reason=PEERS_NEED)
    folder = tmp_path_factory.mktemp("benchmark")
    options = suites.Options(runs=1, load=LOAD, trajectories=16, torch_compile=False, episodes=8)
    table = {"clean": {"test_1x": {"em": 1.0, "episodes": 8}}}
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("ATOMMEM_CACHE", str(COMPILATION_CACHE))
        # Threads that wait for each other are very slow beside other tests.
        patch.setattr(timing, "count_cores", lambda: 1)
        # Its own tests are in scripts_test.
        patch.setattr(validity, "measure", lambda *arguments, **options: table)
        # With what the PyTorch update does not implement left out.
        config = runs.make_config(rl__ppo__kl_coef=0.0, rl__ppo__entropy_coef=0.0)
        bench = suites.Benchmark(config, str(folder / "data"), options)
        for name in suites.DEFAULT_SUITES:
            bench.run(name)
            suites.write(bench.results, str(folder / "results" / "benchmark.json"))
            # Whatever is run next has the same parameters.
            assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(bench.params))
    return json.loads((folder / "results" / "benchmark.json").read_text())


@pytest.mark.peer
@pytest.mark.parametrize(
    ("suite", "peers"),
    [
        ("memory", ("faiss", "numpy")),
        ("rollout", ("host_loop", "torch_faiss")),
        ("train", ("torch",)),
    ],
)
def test_the_json_holds_every_comparison(results, suite, peers):
    for peer in peers:
        found = results[suite][peer]
        assert found["ratio"] == pytest.approx(found["ours"] / found["peer"])
        assert found["ratio_min"] <= found["ratio"] <= found["ratio_max"]
        assert found["unit"].endswith(" a second")


@pytest.mark.peer
def test_the_json_holds_what_surrounds_the_comparisons(results):
    assert results["machine"]["versions"]["jax"] == jax.__version__
    assert results["train"]["torch_compile"]["ratio"] is None
    for suite, names in (("rollout", phases.TURN), ("train", phases.UPDATE)):
        found = results["phases"][suite]
        assert tuple(found["seconds"]) == names
        assert sum(found["share"].values()) == pytest.approx(1.0)
        assert all(seconds >= 0 for seconds in found["seconds"].values())
    assert results["task"]["clean"]["test_1x"]["episodes"] == 8
    assert {"rollout", "update", "memory"} <= set(results["compile_seconds"])
    text = suites.render(results, runs.make_config())
    for part in ("memory.faiss ", "train.torch_compile", "not run", "phases of rollout", "clean"):
        assert part in text


def test_unknown_suites_are_refused():
    with pytest.raises(ConfigError, match=r"--suite=memory,speed: allowed are memory, rollout"):
        benchmark.check_suites(["memory", "speed"])
