"""gke.sh against stubs of gcloud and kubectl: image, node pools, runs, their state and end."""

import re

import pytest
import yaml

from tests.conftest import ROOT
from tests.helpers import gcloud
from tests.helpers.gcloud import SETUP, TRAIN, Cloud

LAUNCH = ["launch", "--run=first", "--", *TRAIN]
ENDED, POOL = "terminalState", "node-pools describe"


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return gcloud.make_cloud(tmp_path)


def read_manifest(cloud: Cloud) -> dict:
    (manifest,) = yaml.safe_load_all((cloud.folder / "stdin").read_text())
    return manifest


def read_container(manifest: dict) -> dict:
    (job,) = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]["containers"][0]


# ---------------------------------------------------------------------------------------------
# Runs


def test_launch_creates_the_jobset_of_the_settings(cloud):
    cloud.set(SLICES="2", GKE_NAMESPACE="research", MAX_RESTARTS="7", GKE_RESTARTS="5")
    odd = ["--a=two words", '--b="q"', "--c=it's", "--f=a\\b&c"]
    printed = cloud.run("gke.sh", *LAUNCH, *odd)
    assert "first is started; 'tpu_setup/gke.sh status --run=first'" in printed
    manifest = read_manifest(cloud)
    assert manifest["metadata"]["name"] == "first"
    assert manifest["metadata"]["namespace"] == "research"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 5
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["completions"], spec["parallelism"]) == (2, 4, 4)
    assert spec["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu7x",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }
    container = read_container(manifest)
    assert "--max_restarts=7" in container["command"]
    assert container["args"] == [*TRAIN, *odd, "--workdir=gs://stub-bucket/runs/first"]
    assert re.fullmatch(r"us-central1-docker\.pkg\.dev/.*/train:\w+", container["image"])
    names = [" ".join(call.split()[:3]) for call in cloud.calls]
    assert names == [
        "gcloud container clusters",
        "kubectl --namespace=research explain",
        "kubectl --namespace=research create",
    ]


def test_a_dry_run_prints_what_a_run_calls_and_calls_nothing(cloud):
    printed = cloud.run("gke.sh", LAUNCH[0], "--dry-run", *LAUNCH[1:])
    assert cloud.calls == []
    commands, _, manifest = printed.partition("apiVersion")
    cloud.run("gke.sh", *LAUNCH)
    assert yaml.safe_load("apiVersion" + manifest) == read_manifest(cloud)
    joined = re.sub(r"\s+", " ", commands.replace("\\\n", " "))
    assert all(call in joined for call in cloud.calls)


def test_without_spot_the_nodes_are_others(cloud):
    cloud.set(SPOT="false")
    cloud.run("gke.sh", *LAUNCH)
    (job,) = read_manifest(cloud)["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
    assert "DoesNotExist" in str(pod["affinity"])


def test_a_workdir_must_lie_in_a_bucket(cloud):
    printed = cloud.run("gke.sh", *LAUNCH, "--workdir=runs/a", status=2)
    assert "--workdir=runs/a: allowed are folders in a bucket" in printed
    assert cloud.calls == []


def test_a_run_that_is_there_already_is_not_taken_for_a_new_one(cloud):
    cloud.answer("create", 'Error from server (AlreadyExists): jobsets "first" already exists', 1)
    printed = cloud.run("gke.sh", *LAUNCH, status=1)
    assert "there is a run first already: 'tpu_setup/gke.sh delete --run=first'" in printed


def test_an_older_controller_is_refused_with_the_command_that_installs_one(cloud):
    cloud.answer("explain", 'error: field "onJobFailureMessagePatterns" does not exist', 1)
    printed = cloud.run("gke.sh", *LAUNCH, status=1)
    assert "kubectl apply --server-side" in printed
    assert cloud.calls_of("create") == []


def test_check_looks_at_all_devices_of_all_slices_once(cloud):
    cloud.set(SLICES="2")
    cloud.run("gke.sh", "check")
    manifest = read_manifest(cloud)
    assert manifest["metadata"]["name"] == "check"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 0
    container = read_container(manifest)
    assert "--max_restarts=0" in container["command"]
    assert container["args"] == [
        "python",
        "tpu_setup/check_env.py",
        "--require_tpu",
        "--expect_devices=64",  # two slices of 16 chips, each chip two devices
        "--bucket=gs://stub-bucket",
    ]


@pytest.mark.parametrize(
    ("ended", "pods", "there", "state"),
    [
        ("Completed ", "", 0, "done"),
        ("Failed jobset failed due to FailJobSet", "", 0, "failed"),
        (" ", "Running Running", 0, "running"),
        (" ", "Running Pending", 0, "waiting"),
        (" ", "", 0, "waiting"),
        ("", "", 1, "none"),
    ],
)
def test_the_last_line_of_status_is_the_state_of_the_run(cloud, ended, pods, there, state):
    cloud.answer(ENDED, ended)
    cloud.answer("status.phase", pods)
    cloud.answer("get jobset first", "", there, keep=True)
    lines = cloud.run("gke.sh", "status", "--run=first").splitlines()
    assert lines[-1] == f"state: {state}"
    if state == "failed":
        assert lines[-2] == "why: jobset failed due to FailJobSet"


def test_logs_and_delete_are_of_the_run(cloud):
    for action in ("logs", "delete"):
        cloud.run("gke.sh", action, "--run=a")
    logs, delete = cloud.calls_of("kubectl")
    assert "logs --selector=atommem/run=a --all-containers --prefix" in logs
    assert "delete jobset a --ignore-not-found" in delete


# ---------------------------------------------------------------------------------------------
# Images and node pools


def test_an_image_holds_a_commit_and_is_named_by_it(cloud):
    cloud.run("gke.sh", "image")
    (call,) = cloud.calls_of("builds submit")
    commit = re.search(r"atommem_jax-(\w+)\.tar\.gz", call)[1]
    assert f"atommem/train:{commit},_PYTHON_VERSION=3.11.13" in call
    build = yaml.safe_load((SETUP / "gke" / "cloudbuild.yaml").read_text())
    assert f"--file={(SETUP / 'gke' / 'Dockerfile').relative_to(ROOT)}" in build["steps"][0]["args"]


def test_pools_of_tpu7x_take_their_topology_from_a_policy(cloud):
    cloud.set(SLICES="2", SERVICE_ACCOUNT="a@b.iam")
    cloud.answer("describe", "ERROR: code=404, message=Not found", 1, keep=True)
    cloud.run("gke.sh", "pool")
    policy, *pools = cloud.calls_of("create")
    assert policy == (
        "gcloud compute resource-policies create workload-policy atommem-2x2x4 "
        "--type=HIGH_THROUGHPUT --accelerator-topology=2x2x4 --region=us-central1 "
        "--project=stub-project"
    )
    assert pools == [
        f"gcloud container node-pools create atommem-{slice_id} --cluster=your-cluster "
        "--node-locations=us-central1-c --machine-type=tpu7x-standard-4t --num-nodes=4 "
        "--placement-policy=atommem-2x2x4 --spot --service-account=a@b.iam "
        "--scopes=cloud-platform --location=us-central1 --project=stub-project"
        for slice_id in range(2)
    ]


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"GKE_TOPOLOGY": "4x4"}, "ct6e-standard-4t --num-nodes=4 --tpu-topology=4x4 --scopes"),
        ({"GKE_TOPOLOGY": "2x4"}, "ct6e-standard-8t --num-nodes=1 --scopes"),
        (
            {"GKE_TOPOLOGY": "2x4", "GKE_CHIPS": "4"},
            "ct6e-standard-4t --num-nodes=2 --tpu-topology=2x4 --scopes",
        ),
    ],
)
def test_other_pools_are_told_their_topology_where_they_have_several_hosts(cloud, settings, flags):
    cloud.set(GKE_ACCELERATOR="tpu-v6e-slice", SPOT="false", **settings)
    cloud.answer("describe", "ERROR: NOT_FOUND", 1, keep=True)
    cloud.run("gke.sh", "pool")
    (call,) = cloud.calls_of("create")
    assert f"--machine-type={flags}" in call


def test_a_pool_that_is_there_stays_and_a_refused_look_is_no_absence(cloud):
    cloud.set(SLICES="2")
    cloud.answer(POOL, "ERROR: code=404, message=Not found", 1)
    cloud.run("gke.sh", "pool")
    assert [call.split()[4] for call in cloud.calls_of("create")] == ["atommem-0"]
    cloud.answer(POOL, "ERROR: PERMISSION_DENIED: container.nodePools.get", 1)
    assert "PERMISSION_DENIED" in cloud.run("gke.sh", "pool", status=1)
    assert len(cloud.calls_of("create")) == 1


def test_pools_are_deleted_after_a_question(cloud):
    cloud.set(SLICES="2")
    assert "delete atommem-0 atommem-1: pass --yes" in cloud.run("gke.sh", "delete-pool", status=2)
    assert cloud.calls == []
    cloud.run("gke.sh", "delete-pool", "--yes")
    assert [call.split()[4] for call in cloud.calls_of("delete")] == [
        "atommem-0",
        "atommem-1",
        "atommem-2x2x4",
    ]


# ---------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"GKE_TOPOLOGY": "4x4"}, "GKE_TOPOLOGY=4x4: for GKE_ACCELERATOR=tpu7x allowed are 2x2x1"),
        ({"GKE_ACCELERATOR": "v7"}, "GKE_ACCELERATOR=v7: allowed are tpu7x, tpu-v6e-slice"),
        ({"GKE_CHIPS": "8"}, "GKE_CHIPS=8: a host .*2x2x4 has 4"),
        ({"GKE_CHIPS": "four"}, "GKE_CHIPS='four' .*numbers from 1, or nothing"),
        ({"GKE_TOPOLOGY": "2x2x1", "SLICES": "2"}, "SLICES=2: GKE joins slices of several hosts"),
        ({"GKE_IMAGE": "img:latest"}, "GKE_IMAGE='img:latest' .*without a tag"),
        ({"GKE_ZONE": "us-central1"}, "GKE_ZONE='us-central1' .*zones such as us-central1-c"),
        ({"GKE_POOL": "a_b"}, "GKE_POOL='a_b' .*lower-case letters"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_called(cloud, settings, message):
    cloud.set(**settings)
    assert re.search(message, cloud.run("gke.sh", *LAUNCH, status=2))
    assert cloud.calls == []


def test_pools_of_a_wrong_topology_are_not_made(cloud):
    cloud.set(GKE_TOPOLOGY="4x4")
    assert "GKE_TOPOLOGY=4x4" in cloud.run("gke.sh", "pool", status=2)
    assert cloud.calls == []


def test_actions_and_names_are_checked(cloud):
    assert "allowed actions are image, pool" in cloud.run("gke.sh", "destroy", status=2)
    printed = cloud.run("gke.sh", "status", f"--run={'x' * 41}", status=2)
    assert "40 characters are allowed" in printed
    assert "there is no command" in cloud.run("gke.sh", "launch", "--run=a", status=2)
