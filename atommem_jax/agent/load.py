"""Agents from checkpoints: config, tokenizer and parameters, onto the devices there are here."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from atommem_jax.agent import build, play, validate
from atommem_jax.agent import settings as settings_lib
from atommem_jax.config import ConfigError, Experiment, check, parse, paths
from atommem_jax.language import tokenizer as tokenizer_lib
from atommem_jax.language.tokenizer import HuggingFaceTokenizer, Tokenizer
from atommem_jax.model import lora
from atommem_jax.model.transformer import init_params, without_adapters
from atommem_jax.parallel import mesh as mesh_lib
from atommem_jax.parallel import processes
from atommem_jax.tasks import datasets, encoding
from atommem_jax.weights import fingerprint
from atommem_jax.weights.checkpoint import Checkpointer, CheckpointError, Restored


class Loaded:
    """An agent from a checkpoint, ready to play.

    `trained_shape` is that of the episodes it was trained on; None where the checkpoint does not
    say, as those of `convert.py`. `settings` is what was overridden of its config.
    """

    def __init__(
        self,
        workdir: str,
        step: int,
        parts: build.Parts,
        params: Any,
        mesh: Mesh,
        trained_shape: encoding.EpisodeShape | None = None,
        settings: Sequence[str] = (),
    ):
        self.rollout_tensor = 0  # devices that share every product of a rollout, see `make_player`
        self.workdir, self.step, self.parts = workdir, step, parts
        self.params, self.mesh = params, mesh
        self.trained_shape, self.settings = trained_shape, list(settings)
        self._players: dict[Any, Any] = {}
        self._segment_players: dict[Any, play.SegmentPlayer] = {}
        self._shapes: dict[tuple[tuple[str, ...], int], encoding.EpisodeShape] = {}

    def play_as(self, workflow: str) -> "Loaded":
        """The same parameters in another workflow of `tasks.workflows`.

        Raises ConfigError for an unknown one, and where a turn of it does not fit.
        """
        config = self.parts.config.replace({"workflow": workflow})
        validate.validate(config.replace({"sft.steps": 0, "rl.steps": 0}))
        parts = build.build(config, self.parts.tokenizer)
        # Adapters may be merged already.
        agent = parts.agent.replace(model=self.parts.agent.model)
        parts = dataclasses.replace(parts, agent=agent, embed=self.parts.embed)
        validate.validate_turns(config, parts)
        settings = [*self.settings, f"workflow={workflow}"]
        other = Loaded(
            self.workdir, self.step, parts, self.params, self.mesh, self.trained_shape, settings
        )
        other.rollout_tensor = self.rollout_tensor
        other._shapes = self._shapes  # of the data alone
        return other

    def player(self, shape: encoding.EpisodeShape):
        """The jitted rollout for episodes of this shape; compiled once a shape."""
        if shape not in self._players:
            self._players[shape] = play.make_player(
                self.parts, shape, self.mesh, tensor=self.rollout_tensor
            )
        return self._players[shape]

    def segment_player(self, shape: encoding.EpisodeShape) -> play.SegmentPlayer:
        """The jitted segments of rollouts in windows of this shape; compiled once a shape."""
        if shape not in self._segment_players:
            self._segment_players[shape] = play.make_segment_player(
                self.parts, shape, self.mesh, tensor=self.rollout_tensor
            )
        return self._segment_players[shape]

    def shape(
        self, dataset: datasets.Dataset, split: str, window: int = 0
    ) -> encoding.EpisodeShape:
        """What holds the episodes of all splits of the same part: all tests, for `test_1x`.

        window: see `encoding.fit_shape`. Of a task whose documents are long, which is one that is
          evaluated in segments, the whole is that of this split alone.

        They share a compiled program, and what a split's episodes come to does not depend on which
        others are evaluated. Raises ConfigError for an unknown split.
        """
        find_split(dataset, split)
        part = split.partition("_")[0]
        splits = tuple(name for name in dataset.splits if name.partition("_")[0] == part)
        if self.parts.config.eval.segment and not window:
            splits = (split,)
        if (splits, window) not in self._shapes:
            tokenizer = self.parts.tokenizer
            shapes = [encoding.fit_shape(dataset.split(n), tokenizer, window) for n in splits]
            joined = functools.reduce(encoding.EpisodeShape.join, shapes)
            self._shapes[splits, window] = joined
        return self._shapes[splits, window]


def load(
    path: str,
    which: str = "last",
    cpu_devices: int = 2,
    *,
    mesh: Mesh | None = None,
    rules: Mapping[str, Any] | None = None,
    base: str = "",
    settings: Sequence[str] = (),
    merge: bool = False,
) -> Loaded:
    """Reads config, tokenizer and parameters, onto the devices there are here.

    What is returned plays as in training. Adapters come merged into their base, as a plain model,
    but for a model that computes in bfloat16: merged and rounded it would be another policy.

    Args:
      path: a workdir, its checkpoints folder, or one step in it.
      which: step of a workdir: 'last', 'best' or a number.
      cpu_devices: into how many a host without an accelerator is split.
      mesh: where the parameters go; by default on devices that share an evaluation batch.
      rules: how they lie there, see `rules.Layout`; by default whole on every device.
      base: what adapters were trained on, where it is no longer at the run's `init_from`.
      settings: see `settings.override`.
      merge: merges adapters in any case, for those who need the matrices.

    Raises ConfigError where there is no such checkpoint, the base of its adapters is not there or
    is another one, or a setting cannot be.
    """
    found, restored = _restore(path, which, cpu_devices, mesh, rules or {}, settings)
    model, parts = found.parts.agent.model, found.parts
    if not model.config.lora.rank:
        return found
    base = base or restored.config.init_from
    below = _load_base(base, found.workdir, cpu_devices, found.mesh, rules or {})
    merge = merge or model.config.dtype == "float32"
    params = _join(found, below, base, restored, merge)
    if merge:
        agent = parts.agent.replace(model=without_adapters(model))
        parts = dataclasses.replace(parts, agent=agent)
    return Loaded(
        found.workdir, found.step, parts, params, found.mesh, found.trained_shape, settings
    )


def load_adapters(path: str, which: str = "last", cpu_devices: int = 2) -> Loaded:
    """Reads what was trained of a run with adapters, without its base: nothing that can play.

    Raises ConfigError where there is no such checkpoint, or all parameters were trained.
    """
    found, _ = _restore(path, which, cpu_devices, None, {})
    check(
        found.parts.agent.model.config.lora.rank > 0,
        f"{path} has no adapters: lora.rank=0 trains all parameters; export it whole",
    )
    return found


def _restore(
    path: str,
    which: str,
    cpu_devices: int,
    mesh: Mesh | None,
    rules: Mapping[str, Any],
    settings: Sequence[str] = (),
) -> tuple[Loaded, Restored]:
    """What a checkpoint holds: all parameters, or the trainable ones beside a base."""
    mesh_lib.prepare_devices(cpu_devices)
    folder, which = _find(path, which)
    try:
        with Checkpointer(folder, best_metric="em", read_only=True) as checkpointer:
            step = _choose(checkpointer, which)
            config = settings_lib.override(parse(checkpointer.restore_config(step)), settings)
            mesh = mesh or mesh_lib.make_mesh(_count_devices(config.eval.batch_size))
            tokenizer = tokenizer_lib.from_bytes(checkpointer.restore_tokenizer(step))
            parts = build.build(config, tokenizer)
            model = parts.agent.model
            shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
            shapes, _ = lora.partition(shapes, model.config.lora)
            abstract = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                shapes,
                model.config.layout.shardings(shapes, mesh, rules),
            )
            restored = checkpointer.restore(
                step, abstract_state={"train": {"params": abstract}}, partial=True
            )
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    if settings:
        validate.validate_turns(config, parts)
    params = restored.state["train"]["params"]
    shape = restored.progress.get("shape")
    trained = encoding.EpisodeShape(**shape) if shape else None
    found = Loaded(str(folder.parent), restored.step, parts, params, mesh, trained, settings)
    return found, restored


def _load_base(
    base: str, workdir: str, cpu_devices: int, mesh: Mesh, rules: Mapping[str, Any]
) -> Any:
    """The parameters that the adapters of a run were trained on."""
    try:
        return load(base, cpu_devices=cpu_devices, mesh=mesh, rules=rules, merge=True).params
    except ConfigError as error:
        raise type(error)(  # a bucket out of reach stays what a restart may mend
            f"{workdir} holds adapters of init_from={base}, which cannot be read: {error}. "
            "evaluate.py, answer.py and convert.py take the place where it is now as --base"
        ) from error


def _join(adapters: Loaded, below: Any, base: str, restored: Restored, merge: bool) -> Any:
    """Base and adapters as one tree, as they lie; merged as parameters of a plain model."""
    config = adapters.parts.agent.model.config.lora
    _, frozen = lora.partition(below, config)
    check_base(base, fingerprint.fingerprint_base(frozen), restored, adapters.workdir)

    def join(trained: Any, frozen: Any) -> Any:
        frozen = play.cast_matrices(frozen, config.base_dtype)  # what was trained on
        joined = lora.join(trained, frozen)
        return lora.merge(joined, config) if merge else joined

    parts = below if merge else lora.join(adapters.params, frozen)
    where = jax.tree.map(lambda x: x.sharding, parts)
    return jax.jit(join, out_shardings=where)(adapters.params, frozen)


def check_base(base: str, fingerprint: str, restored: Restored, workdir: str) -> None:
    """Raises ConfigError unless the adapters that were saved belong to this base.

    base: where it was read from, for the error; fingerprint: of it, see `fingerprint_base`.
    """
    saved = restored.progress.get("base")
    check(
        saved == fingerprint,
        f"init_from={base} has the fingerprint {fingerprint}, but step {restored.step} of "
        f"{workdir} holds adapters of a base with the fingerprint {saved}; pass the checkpoint "
        "that they were trained on",
    )


def choose_tokenizer(config: Experiment, dataset: datasets.Dataset) -> Tokenizer:
    """The tokenizer of the pretrained model that training starts from, else that of the data.

    Every process is to call it, at the same time: checkpoints are opened by all together.

    Raises ConfigError where `init_from` names no checkpoint.
    """
    if config.init_from:
        mesh_lib.prepare_devices(config.mesh.cpu_devices)
        folder, which = _find(config.init_from, "last")
        try:
            with Checkpointer(folder, best_metric="em", read_only=True) as checkpointer:
                data = checkpointer.restore_tokenizer(_choose(checkpointer, which))
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        tokenizer = tokenizer_lib.from_bytes(data)
        if isinstance(tokenizer, HuggingFaceTokenizer):
            return tokenizer
    return processes.main_first(lambda: build.fit_tokenizer(config, dataset))


def _find(path: str, which: str) -> tuple[pathlib.Path, str]:
    """The folder of checkpoints at a path, and which of them is meant."""
    folder = paths.locate(path)
    if folder.name.isdigit() and folder.parent.name == "checkpoints":
        folder, which = folder.parent, folder.name
    else:
        inner = folder / "checkpoints"
        folder = inner if paths.is_folder(inner, path) else folder
    check(
        which in ("last", "best") or which.isdigit(),
        f"--step={which}: allowed are last, best or a number",
    )
    return folder, which


def _choose(checkpointer: Checkpointer, which: str) -> int | None:
    """The step that `which` means."""
    if which == "last":
        return checkpointer.latest_step()
    return checkpointer.best_step() if which == "best" else int(which)


def find_split(dataset: datasets.Dataset, split: str, field: str = "--split") -> Sequence[Any]:
    """The examples of a split. Raises ConfigError, naming the field that asks for it."""
    try:
        return dataset.split(split)
    except KeyError as error:
        raise ConfigError(f"{field}={split}: {error.args[0]}") from error


def _count_devices(batch_size: int) -> int:
    """The most devices that share a batch evenly, however many the run was trained on.

    With several processes all devices, so that each holds the parameters.
    """
    if processes.process_count() > 1:
        return jax.device_count()
    return max(n for n in range(1, jax.device_count() + 1) if batch_size % n == 0)
