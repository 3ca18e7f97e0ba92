"""What the TFDS builders of all task families share: how examples are stored, and made.

A family that reads files derives from `ExampleBuilder`; one whose examples are a pure function of
(config, split, index) from `GeneratedBuilder`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import tensorflow_datasets as tfds


@dataclasses.dataclass(eq=False)
class TaskBuilderConfig(tfds.core.BuilderConfig):
    """What TFDS names a prepared data set by; `task` is the family's own config."""

    task: Any = None


class ExampleBuilder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # TFDS is not typed
):
    """Writes examples with TFDS; read them back with `datasets.prepare`.

    A family gives VERSION, DESCRIPTION, and `_split_generators` over `store`.
    """

    DESCRIPTION = ""
    # Nothing is downloaded. (TFDS 4.9.10 needs importlib_resources, which it does not install, to
    # look for the checksums of downloads.)
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        # One JSON text: without TensorFlow, TFDS cannot store lists of lists.
        features = tfds.features.FeaturesDict({"example": tfds.features.Text()})
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=features,
            disable_shuffling=True,  # example i of a split is record i
        )

    @classmethod
    def make(cls, name: str, task: Any, data_root: str) -> Any:
        """The builder of a family's config, with the directory `name` under `data_root`."""
        config = TaskBuilderConfig(name=name, task=task)
        return cls(config=config, data_dir=data_root, file_format="array_record")

    def store(self, examples: Iterable[Any]) -> Iterator[tuple[int, dict[str, str]]]:
        """Records of the examples, keyed by their id."""
        for example in examples:
            yield example["id"], {"example": json.dumps(example)}


class Scaled(Protocol):
    """The part of a generator's config that says how many examples there are, and how long."""

    @property
    def train_examples(self) -> int: ...

    @property
    def test_examples(self) -> int:
        """In each test split and in validation."""

    @property
    def scales(self) -> tuple[int, ...]:
        """Document lengths to test at, times that of training."""


def refuse(field: str, found: object, allowed: str) -> None:
    """Raises ValueError for a field of a task's config."""
    raise ValueError(f"config.task.{field} is {found!r}; allowed: {allowed}.")


def check_scales(config: Scaled) -> None:
    """Raises ValueError unless there are scales, each of them once."""
    scales = config.scales
    if not scales or min(scales) < 1 or len(set(scales)) < len(scales):
        refuse("scales", scales, "one or more distinct integers of at least 1")


def split_sizes(config: Scaled) -> dict[str, int]:
    """Number of examples of each split: train, validation_1x, test_1x, test_2x, ..."""
    sizes = {"train": config.train_examples, "validation_1x": config.test_examples}
    return sizes | {f"test_{scale}x": config.test_examples for scale in config.scales}


def read_split(config: Scaled, split: str) -> tuple[str, str]:
    """(part of the data, scale) of a split; the scale of training is ''. Raises ValueError."""
    sizes = split_sizes(config)
    if split not in sizes:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(sizes)}.")
    part, _, scale = split.removesuffix("x").partition("_")
    return part, scale


class GeneratedBuilder(
    ExampleBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """Writes what `GENERATE` makes of (config, split, index), for all of `split_sizes`."""

    GENERATE: Callable[[Any, str, int], Any]

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        sizes = split_sizes(self.builder_config.task)
        return {split: self._generate_examples(split, size) for split, size in sizes.items()}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, dict[str, str]]]:
        task = self.builder_config.task
        return self.store(self.GENERATE(task, split, index) for index in range(size))


def name_by_digest(prefix: str, config: object) -> str:
    """Name of the directory of what follows from a config alone: another config has another."""
    return f"{prefix}_{hashlib.sha256(repr(config).encode()).hexdigest()[:12]}"
