"""What Kubernetes is asked for: the shape of a TPU slice, and the JobSet that trains on it.

    python tpu_setup/jobset.py --accelerator=tpu7x --topology=4x4x4
    python tpu_setup/jobset.py --accelerator=tpu7x --topology=4x4x4 --slices=2 --spot --run=first \\
        --image=IMAGE:TAG -- python experiments/train.py --workdir=gs://BUCKET/runs/first

Without --image it prints five words: the machine type, hosts a slice, chips a host, JAX devices of
all slices, and how a node pool is told its topology (none, topology or policy). With --image it
prints the JobSet as YAML. tpu_setup/gke.sh calls it with the settings of env.sh.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from absl import flags as absl_flags

from atommem_jax.config import ConfigError, check
from experiments import flags

GRACE_SECONDS = 300  # for a checkpoint after SIGTERM; on spot nodes GKE gives 15 to 120
MISTAKE, STOPPED = 2, 143  # statuses of supervise.py
_PORTS = (8471, 8482)  # between the hosts of a slice; the coordinator of jax.distributed


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A kind of TPU as Google Kubernetes Engine offers it.

    Attributes:
      machine: type of the hosts; {} is the number of chips.
      topologies: {topology: chips that a host may have}, the first by default.
      largest: chips of the largest slice whose sides are multiples of 4; 0 where the topologies
        above are all.
      devices: that JAX sees of a chip.
      policy: whether node pools of several hosts take their topology from a workload policy.
    """

    machine: str
    topologies: Mapping[str, tuple[int, ...]]
    largest: int = 0
    devices: int = 1
    policy: bool = False


_FLAT = {
    "1x1": (1,),
    "2x2": (4,),
    "2x4": (8, 4),
    **dict.fromkeys(("4x4", "4x8", "8x8", "8x16", "16x16"), (4,)),
}
_CUBES = dict.fromkeys(("2x2x1", "2x2x2", "2x2x4", "2x4x4"), (4,))

ACCELERATORS: Mapping[str, Accelerator] = {
    "tpu7x": Accelerator("tpu7x-standard-{}t", _CUBES, 9216, devices=2, policy=True),
    "tpu-v6e-slice": Accelerator("ct6e-standard-{}t", _FLAT),
    "tpu-v5p-slice": Accelerator("ct5p-hightpu-{}t", _CUBES, 8960),
    "tpu-v5-lite-podslice": Accelerator("ct5lp-hightpu-{}t", _FLAT),
    "tpu-v4-podslice": Accelerator("ct4p-hightpu-{}t", _CUBES, 4096),
}
"""By the label `cloud.google.com/gke-tpu-accelerator` of their nodes."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One or more slices.

    Attributes:
      accelerator: label of the nodes.
      topology: label of the nodes.
      slices: how many.
      hosts: of one slice.
      chips: of one host.
    """

    accelerator: str
    topology: str
    slices: int
    hosts: int
    chips: int

    @property
    def machine(self) -> str:
        """Type of the hosts."""
        return ACCELERATORS[self.accelerator].machine.format(self.chips)

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.slices * self.hosts * self.chips * ACCELERATORS[self.accelerator].devices

    @property
    def placement(self) -> str:
        """How a node pool is told its topology; `none` where its machine says all."""
        if self.hosts == 1:
            return "none"
        return "policy" if ACCELERATORS[self.accelerator].policy else "topology"


def find_shape(accelerator: str, topology: str, slices: int = 1, chips: int = 0) -> Shape:
    """Returns the shape that settings ask for.

    Args:
      accelerator: label of the nodes.
      topology: chips a side of one slice.
      slices: how many.
      chips: of one host; 0 for the most that the topology allows.

    Raises ConfigError where GKE does not offer it.
    """
    kind = ACCELERATORS.get(accelerator)
    if kind is None:
        raise ConfigError(
            f"GKE_ACCELERATOR={accelerator}: allowed are {', '.join(ACCELERATORS)}; take the label "
            "cloud.google.com/gke-tpu-accelerator of your nodes"
        )
    allowed = kind.topologies.get(topology) or ((4,) if _is_large(topology, kind.largest) else ())
    larger = (
        f", and AxBxC with A <= B <= C, each a multiple of 4, of {kind.largest} chips at most"
        if kind.largest
        else ""
    )
    check(
        bool(allowed),
        f"GKE_TOPOLOGY={topology}: for GKE_ACCELERATOR={accelerator} allowed are "
        f"{', '.join(kind.topologies)}{larger}; take that of your node pool",
    )
    chips = chips or allowed[0]
    check(
        chips in allowed,
        f"GKE_CHIPS={chips}: a host of GKE_ACCELERATOR={accelerator} and GKE_TOPOLOGY={topology} "
        f"has {' or '.join(map(str, allowed))}; correct it, or leave it empty",
    )
    hosts = math.prod(map(int, topology.split("x"))) // chips
    check(
        slices == 1 or hosts > 1,
        f"SLICES={slices}: GKE joins slices of several hosts only, and one of GKE_TOPOLOGY="
        f"{topology} is a single host of {chips} chips; set SLICES=1, a larger GKE_TOPOLOGY"
        + (f", or GKE_CHIPS={allowed[-1]}" if len(allowed) > 1 else ""),
    )
    return Shape(accelerator, topology, slices, hosts, chips)


def _is_large(topology: str, largest: int) -> bool:
    """Whether it is a box of cubes with 4 chips a side, no larger than `largest`."""
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){2}", topology):
        return False
    sides = [int(side) for side in topology.split("x")]
    return (
        sides == sorted(sides)
        and all(side % 4 == 0 for side in sides)
        and math.prod(sides) <= largest
    )


# ---------------------------------------------------------------------------------------------
# The JobSet


def make_jobset(
    run: str,
    shape: Shape,
    command: Sequence[str],
    *,
    image: str,
    namespace: str = "default",
    spot: bool = False,
    max_restarts: int = 20,
    restarts: int = 3,
) -> dict[str, Any]:
    """Returns the manifest of a run: a job a slice, a pod a host.

    How it ends: a mistake in flags, config or files (status 2) ends the JobSet at once. When a node
    is preempted, drained or lost, all pods start anew, as often as it happens. What dies otherwise,
    as without an answer of the bucket (status 1), is started again in its pod by the supervisor,
    and after `max_restarts` of these all pods start anew, `restarts` times.

    Args:
      run: name of the JobSet, and the label `atommem/run` of all that belongs to it.
      shape: of the slices.
      command: program and arguments, the same on all hosts.
      image: with its tag.
      namespace: of the JobSet.
      spot: whether to run on spot nodes; otherwise on no such node.
      max_restarts: of the command in its pod, while it brings no new checkpoint.
      restarts: of all pods, apart from those after a preemption.
    """
    labels = {"atommem/run": run}
    pods = {
        "metadata": {"labels": labels},
        "spec": _make_pod(shape, command, image, spot, max_restarts),
    }
    job = {
        "parallelism": shape.hosts,
        "completions": shape.hosts,
        "completionMode": "Indexed",
        # A slice works with all of its hosts or not at all: no pod is replaced alone.
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "train",
                        "operator": "In",
                        "values": [MISTAKE],
                    },
                },
            ]
        },
        "template": pods,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": run,
            "namespace": namespace,
            "labels": labels,
            # A slice is a node pool: its job has the pool to itself.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": restarts,
                # Both have the reason PodFailurePolicy; only the message tells which rule it was.
                "rules": [
                    _make_rule(
                        "mistake", "FailJobSet", f"failed with exit code {MISTAKE} matching"
                    ),
                    _make_rule(
                        "preemption",
                        "RestartJobSetAndIgnoreMaxRestarts",
                        "has condition DisruptionTarget matching",
                    ),
                ],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": shape.slices, "template": {"spec": job}}
            ],
        },
    }


def _make_rule(name: str, action: str, message: str) -> dict[str, Any]:
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [f".*{message}.*"],
    }


def _make_pod(
    shape: Shape, command: Sequence[str], image: str, spot: bool, max_restarts: int
) -> dict[str, Any]:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": shape.accelerator,
        "cloud.google.com/gke-tpu-topology": shape.topology,
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        # Slices talk by the network of their hosts. The bucket then sees the nodes' account.
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        "tolerations": tolerations,
    }
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append(
            {
                "key": "cloud.google.com/gke-spot",
                "operator": "Equal",
                "value": "true",
                "effect": "NoSchedule",
            }
        )
    else:
        other = {"key": "cloud.google.com/gke-spot", "operator": "DoesNotExist"}
        pod["affinity"] = {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [other]}]
                }
            }
        }
    chips = {"google.com/tpu": shape.chips}
    container = {
        "name": "train",
        "image": image,
        "command": [
            "python",
            "experiments/supervise.py",
            f"--max_restarts={max_restarts}",
            f"--stopped_status={STOPPED}",
            "--",
        ],
        # Kubernetes fills in $(NAME) and reads $$ as $.
        "args": [word.replace("$", "$$") for word in command],
        "env": [{"name": "ATOMMEM_CACHE", "value": "/cache"}],
        "ports": [{"containerPort": port} for port in _PORTS],
        "resources": {"requests": dict(chips), "limits": dict(chips)},
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "cache", "mountPath": "/cache"},
        ],
    }
    volumes = [
        # Data workers hand arrays over through it; it has 64 MiB by default.
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        # Compiled programs outlive a restart of the command.
        {"name": "cache", "emptyDir": {}},
    ]
    return pod | {"containers": [container], "volumes": volumes}


class _Dumper(yaml.SafeDumper):
    """Writes the same list twice rather than a reference to it."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def define_flags() -> None:
    """Defines the flags. Not on import: other scripts have some of the same names."""
    absl_flags.DEFINE_string("accelerator", "", "As the nodes are labelled: tpu7x.")
    absl_flags.DEFINE_string("topology", "", "Chips of one slice, by side: 4x4x4.")
    absl_flags.DEFINE_integer("chips", 0, "Of one host; 0 for as many as the topology allows.", 0)
    absl_flags.DEFINE_integer("slices", 1, "Slices, each a node pool.", 1)
    absl_flags.DEFINE_bool(
        "spot", False, "Whether to run on spot nodes; otherwise on no such node."
    )
    absl_flags.DEFINE_string("run", "", "Name of the JobSet.")
    absl_flags.DEFINE_string("namespace", "default", "Namespace of the JobSet.")
    absl_flags.DEFINE_string("image", "", "Image with the code, and its tag.")
    absl_flags.DEFINE_integer(
        "max_restarts", 20, "Of the command in its pod, by experiments/supervise.py.", 0
    )
    absl_flags.DEFINE_integer("restarts", 3, "Of all pods; preemptions are not counted.", 0)


def main(argv: Sequence[str]) -> None:
    """See the module docstring."""
    values = absl_flags.FLAGS
    shape = find_shape(values.accelerator, values.topology, values.slices, values.chips)
    command = list(argv[1:])
    if not values.image:
        check(not command, f"{command}: without --image there is nothing to run a command in")
        print(shape.machine, shape.hosts, shape.chips, shape.devices, shape.placement)
        return
    check(bool(values.run), "--run is missing: it is the name of the JobSet")
    check(bool(command), "there is no command: end with -- python experiments/train.py ...")
    manifest = make_jobset(
        values.run,
        shape,
        command,
        image=values.image,
        namespace=values.namespace,
        spot=values.spot,
        max_restarts=values.max_restarts,
        restarts=values.restarts,
    )
    print(yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=10**6), end="")


if __name__ == "__main__":
    define_flags()
    flags.run(main)
