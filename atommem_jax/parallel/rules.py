"""Where parameters and batches lie: ordered rules from paths to logical axes, and on to mesh axes.

The mesh has three axes. `data` holds replicas of the parameters: whole slices of a pod, or all
devices of a laptop. `fsdp` splits the parameters and the batch alike: a layer is gathered when it
is needed. `tensor` splits heads, the MLP and the vocabulary. A batch lies over `data` and `fsdp`.

`PARAMETERS` gives the logical axes of each parameter by its path, and a rule set maps logical axes
to mesh axes: `TRAINING` for updates, `ROLLOUT` for rollouts. Optimiser moments have the paths of
their parameters.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
BATCH = (DATA, FSDP)
"""The mesh axes that a batch of trajectories lies over."""

AXES = (DATA, FSDP, TENSOR)

PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Of adapters A follows the input of its matrix and B the output; the rank is whole everywhere.
    (r"embedder_lora/a", ("vocab", None)),
    (r"layers/(query|key|value|gate|up)_lora/a", (None, "embed", None)),
    (r"layers/out_lora/a", (None, "heads", None)),
    (r"layers/down_lora/a", (None, "mlp", None)),
    (r"head_lora/a", ("embed", None)),
    (r"layers/query_lora/b", (None, None, "heads")),
    (r"layers/(key|value)_lora/b", (None, None, "kv_heads")),
    (r"layers/(gate|up)_lora/b", (None, None, "mlp")),
    (r"layers/(out|down)_lora/b", (None, None, "embed")),
    (r"embedder_lora/b", (None, "embed")),
    (r"head_lora/b", (None, "vocab")),
    (r"embedder/embedding", ("vocab", "embed")),
    (r"head", ("embed", "vocab")),
    (r"layers/query/kernel", (None, "embed", "heads")),
    (r"layers/(key|value)/kernel", (None, "embed", "kv_heads")),
    (r"layers/query/bias", (None, "heads")),
    (r"layers/(key|value)/bias", (None, "kv_heads")),
    (r"layers/out/kernel", (None, "heads", "embed")),
    (r"layers/(gate|up)/kernel", (None, "embed", "mlp")),
    (r"layers/down/kernel", (None, "mlp", "embed")),
    (r"layers/\w+_norm/scale", (None, None)),
    (r"final_norm/scale", (None,)),
    (r"features/kernel", (None, "embed")),
    (r"shift", (None, "embed")),
    (r"value_head/kernel", ("embed", None)),
    (r"value_head/bias", (None,)),
    # Of int8 matrices: small, and whole everywhere.
    (r"(embedder|layers/\w+)/scale|head_scale", (None, None)),
    (r"ns_coeffs", (None,)),  # not of the model: Muon's constants
)
"""Path of a parameter -> logical axes of its dimensions. The first rule that matches counts."""

TRAINING: Mapping[str, str | tuple[str, ...]] = {
    "rows": BATCH,
    "embed": FSDP,
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
    "draws": TENSOR,
}
"""Logical axis -> mesh axis, for updates; axes that are not named are whole everywhere.

`draws` are rows whose next token a device draws: it has all of their logits, and only theirs.
"""

ROLLOUT: Mapping[str, Any] = {name: axis for name, axis in TRAINING.items() if axis == TENSOR}
"""The same for rollouts."""

_FIELDS = {
    "embed": "model.width",
    "vocab": "the vocabulary",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
    "mlp": "model.mlp_width",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parameters of one model lie, and all that follows their paths.

    `num_heads` and `num_kv_heads` are the units that must not be cut: a head lies on one device.
    """

    num_heads: int
    num_kv_heads: int

    def specs(self, tree: Any, mesh: Mesh, rules: Mapping[str, Any] = TRAINING) -> Any:
        """A PartitionSpec for every leaf: parameters, or a training state that holds them.

        Counters, factored moments and other leaves without the shape of their parameter are whole
        everywhere. Raises ValueError, naming the field, for a parameter that no rule matches and
        for an axis that does not divide.
        """

        def spec(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return self.spec(name, leaf.shape, mesh, rules)

        return jax.tree_util.tree_map_with_path(spec, tree)

    def shardings(self, tree: Any, mesh: Mesh, rules: Mapping[str, Any] = TRAINING) -> Any:
        """`specs` as NamedShardings: for `jax.jit`, `jax.device_put` and restores."""
        specs = self.specs(tree, mesh, rules)
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    def spec(
        self, name: str, shape: tuple[int, ...], mesh: Any, rules: Mapping[str, Any]
    ) -> PartitionSpec:
        if not shape:
            return PartitionSpec()
        axes = next((a for rule, a in PARAMETERS if re.search(rf"(^|/){rule}$", name)), None)
        if axes is None:
            raise ValueError(
                f"parameter {name} {list(shape)}: no rule of parallel.rules.PARAMETERS matches it; "
                "add one that names its logical axes"
            )
        if len(axes) != len(shape) or 1 in shape[-2:]:
            return PartitionSpec()  # a factored moment, or a dimension of one
        entries = []
        for logical, size in zip(axes, shape, strict=True):
            axis = rules.get(logical) if logical else None
            entries.append(
                axis if axis and self._divides(logical, size, mesh, axis, name) else None
            )
        return PartitionSpec(*entries)

    def _divides(self, logical, size, mesh, axis, name) -> bool:
        """Whether to split. False for key/value heads that every device needs; or raises."""
        count = math.prod(mesh.shape[each] for each in ((axis,) if isinstance(axis, str) else axis))
        if count == 1:
            return False
        units = {"heads": self.num_heads, "kv_heads": self.num_kv_heads}.get(logical, size)
        if units % count == 0:
            return True
        if logical == "kv_heads" and count % units == 0:
            return False  # fewer heads than devices: each device computes the one it needs
        raise ValueError(
            f"{name}: {_FIELDS[logical]}={units} does not divide over mesh.{axis}={count}; choose "
            f"a divisor of {units} for mesh.{axis}"
        )
