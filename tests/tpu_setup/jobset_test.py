"""What Kubernetes is asked for: shapes of slices, and the JobSet against one written by hand."""

import re

import pytest
import yaml
from jax._src.clusters import cloud_tpu_cluster

from atommem_jax.config import ConfigError
from tpu_setup import jobset

# Written by hand, after the documentation of GKE, JobSet and Kubernetes.
EXPECTED = """
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: first
  namespace: research
  labels: {atommem/run: first}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 4
    rules:
      - name: mistake
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: [".*failed with exit code 2 matching.*"]
      - name: preemption
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: [".*has condition DisruptionTarget matching.*"]
  replicatedJobs:
    - name: slice
      replicas: 2
      template:
        spec:
          parallelism: 16
          completions: 16
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [2]}
          template:
            metadata:
              labels: {atommem/run: first}
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: tpu7x
                cloud.google.com/gke-tpu-topology: 4x4x4
                cloud.google.com/gke-spot: "true"
              tolerations:
                - {key: google.com/tpu, operator: Exists, effect: NoSchedule}
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: "true"
                  effect: NoSchedule
              containers:
                - name: train
                  image: host/project/train:abc
                  command:
                    - python
                    - experiments/supervise.py
                    - --max_restarts=7
                    - --stopped_status=143
                    - --
                  args: [python, experiments/train.py, --workdir=gs://b/runs/first]
                  env: [{name: ATOMMEM_CACHE, value: /cache}]
                  ports: [{containerPort: 8471}, {containerPort: 8482}]
                  resources:
                    requests: {google.com/tpu: 4}
                    limits: {google.com/tpu: 4}
                  volumeMounts:
                    - {name: shared-memory, mountPath: /dev/shm}
                    - {name: cache, mountPath: /cache}
              volumes:
                - {name: shared-memory, emptyDir: {medium: Memory}}
                - {name: cache, emptyDir: {}}
"""


def make(shape: jobset.Shape, *command: str, **options) -> dict:
    return jobset.make_jobset("first", shape, command or ("true",), image="i:t", **options)


def read_pod(manifest: dict) -> dict:
    (job,) = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


def test_two_spot_slices_of_tpu7x_are_asked_for_as_by_hand():
    made = jobset.make_jobset(
        "first",
        jobset.find_shape("tpu7x", "4x4x4", slices=2),
        ["python", "experiments/train.py", "--workdir=gs://b/runs/first"],
        image="host/project/train:abc",
        namespace="research",
        spot=True,
        max_restarts=7,
        restarts=4,
    )
    assert made == yaml.safe_load(EXPECTED)


def test_without_spot_no_spot_node_is_taken():
    pod = read_pod(make(jobset.find_shape("tpu-v6e-slice", "4x4")))
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
    assert [each["key"] for each in pod["tolerations"]] == ["google.com/tpu"]
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term == {
        "matchExpressions": [{"key": "cloud.google.com/gke-spot", "operator": "DoesNotExist"}]
    }


# (label, topology, slices, chips asked for): machine, hosts, chips, devices, placement; from the
# tables of "Plan TPUs in GKE", and two devices a chip on TPU7x.
SHAPES = {
    ("tpu7x", "2x2x1", 1, 0): ("tpu7x-standard-4t", 1, 4, 8, "none"),
    ("tpu7x", "2x2x2", 1, 0): ("tpu7x-standard-4t", 2, 4, 16, "policy"),
    ("tpu7x", "4x4x8", 3, 0): ("tpu7x-standard-4t", 32, 4, 768, "policy"),
    ("tpu-v6e-slice", "1x1", 1, 0): ("ct6e-standard-1t", 1, 1, 1, "none"),
    ("tpu-v6e-slice", "2x2", 1, 0): ("ct6e-standard-4t", 1, 4, 4, "none"),
    ("tpu-v6e-slice", "2x4", 1, 0): ("ct6e-standard-8t", 1, 8, 8, "none"),
    ("tpu-v6e-slice", "2x4", 2, 4): ("ct6e-standard-4t", 2, 4, 16, "topology"),
    ("tpu-v6e-slice", "16x16", 1, 0): ("ct6e-standard-4t", 64, 4, 256, "topology"),
    ("tpu-v5-lite-podslice", "4x4", 1, 0): ("ct5lp-hightpu-4t", 4, 4, 16, "topology"),
    ("tpu-v5-lite-podslice", "1x1", 1, 1): ("ct5lp-hightpu-1t", 1, 1, 1, "none"),
    ("tpu-v5p-slice", "2x2x4", 1, 0): ("ct5p-hightpu-4t", 4, 4, 16, "topology"),
    ("tpu-v5p-slice", "16x20x28", 1, 0): ("ct5p-hightpu-4t", 2240, 4, 8960, "topology"),
    ("tpu-v4-podslice", "2x2x1", 1, 0): ("ct4p-hightpu-4t", 1, 4, 4, "none"),
}


@pytest.mark.parametrize("asked", SHAPES, ids=lambda asked: "-".join(map(str, asked)))
def test_hosts_and_chips_of_a_topology(asked):
    shape = jobset.find_shape(*asked)
    found = (shape.machine, shape.hosts, shape.chips, shape.devices, shape.placement)
    assert found == SHAPES[asked]
    pod = read_pod(make(shape))
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == asked[1]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": shape.chips}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ("v6e", "4x4"),
            "GKE_ACCELERATOR=v6e: allowed are tpu7x, tpu-v6e-slice, .*; take the label",
        ),
        (("tpu7x", "4x4"), "GKE_TOPOLOGY=4x4: for .*tpu7x allowed are 2x2x1, .*of 9216 chips"),
        (("tpu7x", "4x4x6"), "each a multiple of 4"),
        (("tpu7x", "8x4x4"), "A <= B <= C"),
        (("tpu7x", "16x24x28"), "of 9216 chips at most"),
        (("tpu-v6e-slice", "2x2x2"), "allowed are 1x1, 2x2, 2x4, .*16x16; take that of your"),
        (("tpu-v6e-slice", ""), "GKE_TOPOLOGY=: "),
        (("tpu-v6e-slice", "4x4", 1, 8), "GKE_CHIPS=8: a host .*4x4 has 4; correct it, or leave"),
        (("tpu-v6e-slice", "2x4", 1, 1), "GKE_CHIPS=1: a host .* has 8 or 4"),
        (
            ("tpu7x", "2x2x1", 2),
            "SLICES=2: GKE joins slices of several hosts only, .* set SLICES=1",
        ),
        (("tpu-v6e-slice", "2x4", 2), "or GKE_CHIPS=4"),
    ],
)
def test_what_gke_does_not_offer_is_named_with_what_is_allowed(asked, message):
    with pytest.raises(ConfigError, match=message):
        jobset.find_shape(*asked)


def expand(word: str) -> str:
    """What Kubernetes makes of an argument, where no variable is defined: $$ is $."""
    return re.sub(r"\$\$", "$", word)


def test_arguments_reach_the_command_word_for_word():
    words = [
        "a b",
        '"q"',
        "it's",
        "$(HOME)",
        "$$(HOME)",
        "${X}",
        "$$",
        "$",
        "a\\b&c",
        "x\ny\t",
        "é",
        "",
    ]
    manifest = yaml.safe_load(yaml.dump(make(jobset.find_shape("tpu7x", "2x2x2"), *words)))
    args = read_pod(manifest)["containers"][0]["args"]
    assert [expand(word) for word in args] == words
    assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", word) for word in args), "a variable"


# Messages of the job controller, as KEP-262 of JobSet quotes them.
@pytest.mark.parametrize(
    ("message", "actions"),
    [
        ("Container train for pod ns/a-slice-0-1 failed with exit code 2 matching FailJob rule at "
         "index 1", ["FailJobSet"]),
        ("Pod ns/a-slice-0-1 has condition DisruptionTarget matching FailJob rule at index 0",
         ["RestartJobSetAndIgnoreMaxRestarts"]),
        ("Container train for pod ns/a-slice-0-1 failed with exit code 22 matching FailJob rule",
         []),
        ("Job has reached the specified backoff limit", []),
    ],
)  # fmt: skip
def test_a_mistake_ends_the_set_and_a_preemption_costs_no_restart(message, actions):
    rules = make(jobset.find_shape("tpu7x", "2x2x2"))["spec"]["failurePolicy"]["rules"]
    found = [
        rule["action"]
        for rule in rules
        if any(re.fullmatch(each, message) for each in rule["onJobFailureMessagePatterns"])
    ]
    assert found == actions


def test_the_ports_are_those_that_jax_opens():
    ports = read_pod(make(jobset.find_shape("tpu7x", "2x2x2")))["containers"][0]["ports"]
    assert {"containerPort": int(cloud_tpu_cluster.coordinator_port)} in ports


def test_pods_of_two_slices_find_their_places(monkeypatch):
    """As GKE numbers the hosts of a slice, and the slices, by variables in the pods."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "first-slice-1-0.first,first-slice-1-1.first")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "first-slice-0-0.first")
    cluster = cloud_tpu_cluster.GkeTpuCluster
    assert cluster.is_env_present()
    assert (cluster.get_process_count(), cluster.get_process_id()) == (4, 3)
    assert cluster.get_coordinator_address(5, None) == "first-slice-0-0.first:8482"


@pytest.mark.peer
@pytest.mark.parametrize("spot", [True, False])
def test_the_job_of_a_slice_holds_the_schema_of_kubernetes(spot):
    validator = pytest.importorskip("kubernetes_validate")
    manifest = make(jobset.find_shape("tpu7x", "4x4x4", 2), "true", spot=spot)
    (job,) = manifest["spec"]["replicatedJobs"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": manifest["metadata"]}
    whole["spec"] = job["template"]["spec"]
    validator.validate(whole, "1.34", strict=True)
    whole["spec"]["backofLimit"] = 0
    with pytest.raises(validator.ValidationError):
        validator.validate(whole, "1.34", strict=True)
