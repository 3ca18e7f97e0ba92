"""The suites of `experiments/benchmark.py`, their results as JSON, and the printed table."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from atommem_jax.agent import build
from atommem_jax.agent import load as load_lib
from atommem_jax.config import ConfigError, Experiment, check
from atommem_jax.model.transformer import init_params
from atommem_jax.parallel import rules
from atommem_jax.runs import validity
from atommem_jax.tasks import batches, encoding
from atommem_jax.weights.hf_config import PublishedError
from experiments.benchmarks import (
    convert_suite,
    decode_suite,
    embedding_suite,
    growth,
    memory_suite,
    phases,
    rollout_suite,
    timing,
    train_suite,
)

SUITES = ("memory", "rollout", "train", "task", "growth", "decode", "convert", "embedding")
DEFAULT_SUITES = ("memory", "rollout", "train", "task")

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say."""

    runs: int = 5
    load: memory_suite.Load = dataclasses.field(default_factory=memory_suite.Load)
    trajectories: int = 0  # of rollout and train; 0: a batch of training
    sampled: bool = False  # rollouts at rl.temperature; greedy otherwise
    episodes: int = 0  # of each split in suite task; 0: all
    plot: str | None = None
    torch_compile: bool = True
    pretrained: str | None = None  # of suite decode
    pad_token: str | None = None
    data_file: str | None = None  # of HotpotQA, for the turns of suite decode
    batches: tuple[int, ...] = decode_suite.BATCHES  # of suite decode


class Benchmark:
    """Runs suites one after the other and gathers their results."""

    def __init__(
        self,
        config: Experiment,
        data_root: str,
        options: Options,
        *,
        checkpoint: str | None = None,
        step: str = "last",
    ):
        """Builds the agent: of a checkpoint, with its own config, or with fresh parameters."""
        self._options = options
        if checkpoint:
            loaded = load_lib.load(checkpoint, step, config.mesh.cpu_devices)
            self.parts, self.params, self.mesh = loaded.parts, loaded.params, loaded.mesh
            self._dataset = build.load_dataset(self.config, data_root)
            parameters = f"{loaded.workdir}, step {loaded.step}"
        else:
            parameters = "fresh"
            self.mesh = build.make_mesh(config)
            self._dataset = build.load_dataset(config, data_root)
            self.parts = build.build(config, build.fit_tokenizer(config, self._dataset))
            key = jax.random.key(config.seed)
            self.params = jax.jit(lambda: init_params(self.parts.agent.model, key))()
        check(
            self.config.workflow == "learned",
            f"workflow={self.config.workflow!r}: the host peers know 'learned' only; "
            "leave --config.workflow as it is",
        )
        check(
            self.config.rollout.top_p == 1.0,
            f"rollout.top_p={self.config.rollout.top_p}: the PyTorch peer samples with 1.0 only",
        )
        self._clock = timing.CompileClock()
        self.results: Results = {
            "machine": timing.describe_machine(),
            "settings": dataclasses.asdict(options) | {"parameters": parameters},
            "compile_seconds": self._clock.seconds,
        }

    @property
    def config(self) -> Experiment:
        return self.parts.config

    def run(self, suite: str) -> None:
        """Runs one suite and adds what it found to `results`."""
        {
            "memory": self._run_memory,
            "rollout": self._run_rollout,
            "train": self._run_train,
            "task": self._run_task,
            "growth": self._run_growth,
            "decode": self._run_decode,
            "convert": self._run_convert,
            "embedding": self._run_embedding,
        }[suite]()

    def _run_memory(self) -> None:
        load, devices = self._options.load, self.mesh.shape[rules.DATA]
        check(
            load.trajectories % devices == 0,
            f"--trajectories={load.trajectories}: must be a multiple of the {devices} devices",
        )
        with self._clock.of("memory"):
            self.results["memory"] = memory_suite.run(load, self.mesh, runs=self._options.runs)

    def _run_rollout(self) -> None:
        scene = self._make_scene("train", self._temperature)
        found = rollout_suite.run(scene, self._clock, runs=self._options.runs)
        self.results["rollout"] = found
        shares = phases.measure_rollout(scene, _our_seconds(found))
        self.results.setdefault("phases", {})["rollout"] = shares

    def _run_train(self) -> None:
        # Always sampled: siblings of a greedy group would all be worth the same.
        scene = self._make_scene("train", self.config.rl.temperature, grouped=True)
        lesson = train_suite.make_lesson(scene)
        peers = train_suite.PEERS if self._options.torch_compile else ("torch",)
        found = train_suite.run(scene, lesson, self._clock, runs=self._options.runs, peers=peers)
        if "torch_compile" not in found:
            found["torch_compile"] = timing.failed("--notorch_compile")
        self.results["train"] = found
        shares = phases.measure_update(scene, lesson, _our_seconds(found))
        self.results.setdefault("phases", {})["train"] = shares

    def _run_task(self) -> None:
        episodes = self._options.episodes
        rows = validity.list_rows(self.config)
        table = validity.measure(self.config, self._dataset, rows, episodes=episodes)
        self.results["task"] = table

    def _run_growth(self) -> None:
        curves = growth.measure_memory(self._options.load, self.mesh, runs=self._options.runs)
        splits = [name for name in self._dataset.splits if name.startswith("test")]
        curves["turns"] = growth.measure_turns(
            lambda split: self._make_scene(split, self._temperature),
            splits,
            runs=self._options.runs,
        )
        self.results["growth"] = curves
        self._plot(growth.plot, curves)

    def _plot(self, draw: Callable[[Any, pathlib.Path], None], found: Any) -> None:
        if self._options.plot:
            path = pathlib.Path(self._options.plot)
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(found, path)

    def _run_decode(self) -> None:
        path = self._options.pretrained
        check(bool(path), "--suite=decode needs --pretrained, a .gguf file or a directory")
        try:
            subject = decode_suite.load(str(path), self._options.pad_token)
        except PublishedError as error:
            raise ConfigError(str(error)) from error
        with self._clock.of("decode"):
            self.results["decode"] = decode_suite.run(
                subject,
                runs=self._options.runs,
                data_file=self._options.data_file,
                batches=self._options.batches,
            )

    def _run_convert(self) -> None:
        self.results["convert"] = points = convert_suite.run()
        self._plot(convert_suite.plot, points)

    def _run_embedding(self) -> None:
        with self._clock.of("embedding"):
            self.results["embedding"] = embedding_suite.run(runs=self._options.runs)

    def _check_count(self, count: int) -> None:
        """Raises ConfigError where the trajectories cannot be shared out as training does."""
        ppo, devices = self.config.rl.ppo, self.mesh.shape[rules.DATA]
        unit = math.lcm(ppo.group_size, ppo.minibatches)
        check(
            count % (devices * unit) == 0,
            f"--trajectories={count}: must be a multiple of {devices * unit}, for {devices} "
            f"devices with rl.ppo.group_size={ppo.group_size} and "
            f"rl.ppo.minibatches={ppo.minibatches}",
        )

    @property
    def _temperature(self) -> float:
        return self.config.rl.temperature if self._options.sampled else 0.0

    def _make_scene(
        self, split: str, temperature: float, grouped: bool = False
    ) -> rollout_suite.Scene:
        """Episodes of a split; `grouped` puts siblings next to each other, as training does."""
        size = self.config.rl.ppo.group_size if grouped else 1
        count = (
            self._options.trajectories or self.config.rl.episodes * self.config.rl.ppo.group_size
        )
        self._check_count(count)
        examples = self._dataset.split(split)
        examples = examples[: max(count // size, 1)]
        shape = encoding.fit_shape(examples, self.parts.tokenizer)
        dataset = batches.EncodedDataset(examples, self.parts.tokenizer, shape)
        batch = dataset.stack(range(len(examples)))
        return rollout_suite.Scene(
            parts=self.parts,
            params=self.params,
            mesh=self.mesh,
            shape=shape,
            episodes=jax.tree.map(lambda x: np.repeat(x, size, axis=0), batch.episodes),
            aliases=[accepted for accepted in batch.aliases for _ in range(size)],
            temperature=temperature,
        )


def _our_seconds(found: Results) -> list[float]:
    """Our side's seconds, from any peer that ran; [nan] where none did."""
    return next((r["ours_seconds"] for r in found.values() if "ours_seconds" in r), [float("nan")])


def write(results: Results, path: str) -> None:
    """Writes the JSON, whole or not at all."""
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)


def render(results: Results, config: Experiment) -> str:
    """All results as text; `config` is that of the experiment they were measured with."""
    lines = []
    found = dict(results.get("decode", {}))
    if found:
        if "grammar" in found:
            share = found.pop("grammar")["share"]
            lines.append(f"the grammar's share of decoding at batch 8: {share:.1%}")
        if "bandwidth" in found:
            reads = found.pop("bandwidth")
            lines.append(
                f"weights read at batch 1: {reads['ours']:.1f} GB a second, {reads['share']:.0%} "
                f"of the {reads['limit']:.1f} that memory gives"
            )
    results = results | {"decode": found}
    for suite in ("memory", "rollout", "train", "decode"):
        for peer, result in results.get(suite, {}).items():
            lines.append(f"{suite + '.' + peer:32} {_render_peer(result)}")
    for suite, found in results.get("phases", {}).items():
        shares = "  ".join(f"{name} {share:.1%}" for name, share in found["share"].items())
        lines.append(
            f"phases of {suite}: {shares}  (sum {found['sum_seconds']:.2f} s, "
            f"whole {found['whole_seconds']:.2f} s)"
        )
    for name, seconds in results["compile_seconds"].items():
        lines.append(f"compilation of {name}: {seconds:.1f} s")
    if "task" in results:
        lines.append(validity.render(results["task"], validity.list_rows(config)))
    for point in results.get("convert", ()):
        lines.append(
            f"beside a model of {point['model_mib']:.0f} MiB the host held "
            f"{point['beside_mib']:.0f} MiB"
        )
    for point in results.get("embedding", ()):
        sizes = point["trajectories"], point["entry_length"]
        cells = "  ".join(f"{n}: {ms:.1f}" for n, ms in point.items() if isinstance(ms, float))
        lines.append(f"ms a turn of {sizes[0]} trajectories, entries of {sizes[1]}: {cells}")
    for axis, points in results.get("growth", {}).items():
        cells = (f"{p[axis]:g}: {p['ours']:.2f}" for p in points)
        lines.append(f"ms against {axis}: {'  '.join(cells)}")
    return "\n".join(lines)


def _render_peer(result: Results) -> str:
    if result["ratio"] is None:
        return f"not run: {result['reason']}"
    return (
        f"{result['ours']:10.4g} {result['peer']:10.4g} {result['unit']:22} "
        f"{result['ratio']:6.2f}x  ({result['ratio_min']:.2f} to {result['ratio_max']:.2f})"
    )
