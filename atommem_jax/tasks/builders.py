"""What the TFDS builders of all task families share: how examples are stored."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

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

    def store(self, examples: Iterable[Any]) -> Iterator[tuple[int, dict[str, str]]]:
        """Records of the examples, keyed by their id."""
        for example in examples:
            yield example["id"], {"example": json.dumps(example)}
