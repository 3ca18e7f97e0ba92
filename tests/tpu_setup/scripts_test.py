"""Scripts for Cloud TPU, against a stub of gcloud: all of them, create and delete, the guide."""

import os
import re
import shlex
import subprocess

import pytest

from tests.conftest import ROOT
from tests.helpers import gcloud
from tests.helpers.gcloud import ARGUMENTS, NODE, QUEUE, SCRIPTS, SETUP, Cloud


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return gcloud.make_cloud(tmp_path)


# ---------------------------------------------------------------------------------------------
# All scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n", SETUP / script], check=True)
    assert os.access(SETUP / script, os.X_OK)


@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_dry_run_calls_nothing_and_prints_what_a_run_calls(cloud, script):
    arguments = ARGUMENTS[script]
    printed = cloud.run(script, "--dry-run", *arguments)
    assert cloud.calls == []
    if script == "create.sh":
        cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.ready()
    cloud.answer("tpu-vm ssh", "atommem w-0 first running", keep=True)
    cloud.run(script, *arguments, *(["--yes"] if script == "delete.sh" else []))
    lines = printed.replace("\\\n", " ").splitlines()
    commands = {" ".join(shlex.split(line)) for line in lines if line.startswith("gcloud")}
    assert cloud.calls
    assert set(cloud.calls) <= commands


@pytest.mark.parametrize("script", [*ARGUMENTS, "gke.sh"])
def test_help_is_the_comment_at_the_top(cloud, script):
    printed = cloud.run(script, "--help")
    assert f"tpu_setup/{script}" in printed
    assert "#" not in printed
    assert "source" not in printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ZONE": "us-west4"}, "ZONE='us-west4' .*zones such as us-west4-a; .*locations list"),
        ({"BUCKET": "gs://b"}, "BUCKET='gs://b' .*without gs://"),
        ({"BUCKET": "your-bucket"}, "BUCKET='your-bucket' .*that of the example: set it"),
        ({"ACCELERATOR_TYPE": "v9-8"}, "ACCELERATOR_TYPE='v9-8' .*v5litepod-16, v6e-8"),
        ({"SPOT": "yes"}, "SPOT='yes' .*true and false"),
        ({"SLICES": "0"}, "SLICES='0' .*numbers from 1"),
        ({"SLICES": "2", "CREATE_WITH": "vm"}, "SLICES=2 .*needs CREATE_WITH=queued"),
        ({"PYTHON_VERSION": "3.10.12"}, "PYTHON_VERSION='3.10.12' .*from 3.11.0"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(cloud, settings, message):
    cloud.set(**settings)
    printed = cloud.run("create.sh", status=2)
    assert re.search(message, printed)
    assert cloud.calls == []


def test_a_setting_or_file_that_is_missing_is_named(cloud):
    cloud.env_file.write_text(cloud.env_file.read_text().replace("REMOTE_DIR=", "# "))
    assert "REMOTE_DIR is missing" in cloud.run("status.sh", status=2)
    cloud.env_file.unlink()
    assert "copy tpu_setup/env.sh.example" in cloud.run("status.sh", status=2)


def test_an_unknown_flag_is_refused(cloud):
    assert "--rum=a: no such flag" in cloud.run("launch.sh", "--rum=a", "--", "true", status=2)


def test_nothing_of_the_example_is_left_when_the_settings_are_others(cloud):
    other = {
        "PROJECT": "pp-pp-11",
        "ZONE": "qq-qq1-q",
        "BUCKET": "rrr-rrr",
        "TPU_NAME": "sss",
        "ACCELERATOR_TYPE": "v6e-32",
        "RUNTIME_VERSION": "ttt",
        "REMOTE_DIR": "uuu",
        "PYTHON_VERSION": "3.12.9",
        "UV_VERSION": "9.9.9",
        "MAX_RESTARTS": "77",
        "LOG_SECONDS": "88",
        "GKE_CLUSTER": "vvv",
        "GKE_LOCATION": "qq-qq1",
        "GKE_ZONE": "qq-qq1-p",
        "GKE_NAMESPACE": "www",
        "GKE_IMAGE": "yyy/zzz",
        "GKE_POOL": "xxx",
        "GKE_ACCELERATOR": "tpu-v6e-slice",
        "GKE_TOPOLOGY": "8x16",
        "GKE_RESTARTS": "99",
    }
    example = (SETUP / "env.sh.example").read_text()
    values = {name: re.search(f"^{name}=(\\S+)", example, re.MULTILINE)[1] for name in other}
    cloud.set(**other)
    printed = "".join(cloud.run(s, "--dry-run", *ARGUMENTS[s]) for s in ARGUMENTS)
    for action in ("image", "pool", "launch", "logs", "delete-pool"):
        command = ["--run=a", "--", "true"] if action == "launch" else ["--run=a"]
        printed += cloud.run("gke.sh", action, "--dry-run", *command)
    for name, value in other.items():
        assert value in printed, name
        if len(values[name]) > 5 and values[name] not in ("atommem", "atommem_jax", "default"):
            assert values[name] not in printed, name


# ---------------------------------------------------------------------------------------------
# create.sh, delete.sh


def test_create_queues_a_request_and_waits_for_it(cloud):
    cloud.answer(QUEUE, "NOT_FOUND: no such thing", 1)
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        cloud.answer(QUEUE, state)
        cloud.answer(QUEUE, state)
    cloud.ready()
    printed = cloud.run("create.sh", "--name=mine")
    (request,) = cloud.calls_of("create")
    assert request == (
        "gcloud compute tpus queued-resources create mine --node-id=mine "
        "--runtime-version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-16 --spot "
        "--zone=us-west4-a --project=stub-project"
    )
    assert "mine is PROVISIONING" in printed
    assert "mine is ready; next: tpu_setup/setup_vm.sh --name=mine" in printed


def test_create_leaves_alone_what_is_ready(cloud):
    cloud.ready()
    cloud.run("create.sh")
    assert cloud.calls_of("create ") == []


def test_create_of_slices_and_of_a_vm_without_spot(cloud):
    cloud.set(SLICES="2", SPOT="false", NETWORK="net", SERVICE_ACCOUNT="a@b.iam")
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.ready()
    cloud.run("create.sh")
    (request,) = cloud.calls_of("create")
    assert "--node-prefix=atommem --node-count=2" in request
    assert "--network=net --service-account=a@b.iam" in request
    assert "--spot" not in request
    assert [call.split()[5] for call in cloud.calls_of(NODE)] == ["atommem-0", "atommem-1"]
    cloud.set(SLICES="1", CREATE_WITH="vm")
    cloud.answer(NODE, "NOT_FOUND", 1)
    (cloud.folder / "answers" / "a_000").write_text(f"{NODE}\nNOT_FOUND\nexit 1\n")
    cloud.run("create.sh")
    assert cloud.calls_of("tpu-vm create")[0].startswith(
        "gcloud compute tpus tpu-vm create atommem --version=v2-alpha-tpuv5-lite "
    )


def test_a_quota_error_ends_it_at_once_with_the_next_step(cloud):
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.answer(
        "create",
        "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepod' has been exceeded.",
        1,
    )
    printed = cloud.run("create.sh", status=1)
    assert "TPUV5sPreemptibleLitepod" in printed
    assert re.search("quota of project stub-project is not enough for v5litepod-16", printed)
    assert "iam-admin/quotas?project=stub-project" in printed
    assert len(cloud.calls_of("create")) == 1


def test_a_lack_of_capacity_is_tried_again_up_to_the_limit(cloud):
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.answer("create", 'There is no more capacity in the zone "us-west4-a"', 1)
    cloud.ready()
    assert "try 1 of 2" in cloud.run("create.sh")
    assert len(cloud.calls_of("create")) == 2


def test_after_the_last_try_it_fails_and_says_what_else_there_is(cloud):
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.answer("create", "UNAVAILABLE: try again", 1, keep=True)
    printed = cloud.run("create.sh", status=1)
    assert "RETRIES=2" in printed
    assert len(cloud.calls_of("create")) == 3
    assert "CREATE_WITH=queued" not in printed  # it is
    cloud.set(CREATE_WITH="vm")
    cloud.answer(NODE, "NOT_FOUND", 1)
    assert "another ZONE, or with CREATE_WITH=queued" in cloud.run("create.sh", status=1)


def test_why_a_request_failed_in_the_queue_is_told_before_it_is_deleted(cloud):
    cloud.answer("value(state.failedData.error)", "code=8;message=No more capacity in the zone")
    cloud.answer(QUEUE, "FAILED")
    cloud.ready()
    printed = cloud.run("create.sh")
    assert "atommem has failed: code=8;message=No more capacity in the zone" in printed
    calls = [call for call in cloud.calls if "failedData" in call or "delete" in call]
    assert ["failedData" in call for call in calls] == [True, False], "asked first, then deleted"
    assert "try 1 of 2" in printed


def test_a_request_that_failed_for_want_of_quota_is_not_asked_for_again(cloud):
    cloud.answer("failedData", "Quota 'TPUV5sLitepodPerProjectPerZone' exhausted", keep=True)
    cloud.answer(QUEUE, "FAILED", keep=True)
    printed = cloud.run("create.sh", status=1)
    assert "has failed: Quota 'TPUV5s" in printed
    assert "https://console.cloud.google.com/iam-admin/quotas?project=stub-project" in printed
    assert not cloud.calls_of("delete")
    assert not cloud.calls_of("queued-resources create")


def test_a_request_that_failed_too_often_is_not_said_to_be_deleted(cloud):
    cloud.answer("failedData", "code=8;message=No more capacity in the zone", keep=True)
    cloud.answer(QUEUE, "FAILED", keep=True)
    printed = cloud.run("create.sh", status=1)
    assert "failed in the queue, and RETRIES=2 in" in printed
    assert printed.count("it is deleted") == len(cloud.calls_of("delete")) == 2


def test_settings_of_an_editor_on_windows_are_read(cloud):
    content = cloud.env_file.read_bytes()
    cloud.env_file.write_bytes(content.replace(b"\n", b"\r\n"))
    cloud.ready()
    assert "is ready" in cloud.run("create.sh")
    assert all("\r" not in call for call in cloud.calls)


def test_what_gcloud_refuses_for_another_reason_is_not_tried_again(cloud):
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    cloud.answer("create", "INVALID_ARGUMENT: --internal-ips and so on", 1)
    assert "INVALID_ARGUMENT" in cloud.run("create.sh", status=1)
    assert len(cloud.calls_of("create")) == 1


def test_a_refused_look_is_not_taken_for_absence(cloud):
    cloud.answer(QUEUE, "PERMISSION_DENIED: tpu.googleapis.com", 1)
    printed = cloud.run("create.sh", status=1)
    assert "gcloud services enable tpu.googleapis.com" in printed
    assert "could not look at 'atommem'" in printed
    assert len(cloud.calls) == 1
    assert cloud.calls_of("create ") == []


@pytest.mark.parametrize("queue", ["SUSPENDED", "ACTIVE"])
def test_a_preempted_vm_is_deleted_and_asked_for_anew(cloud, queue):
    # The queued resource stays ACTIVE for a while after its VM has gone.
    cloud.answer(QUEUE, queue)
    if queue == "ACTIVE":
        cloud.answer(NODE, "PREEMPTED")
    cloud.ready()
    printed = cloud.run("create.sh")
    assert re.search("atommem is (SUSPENDED|PREEMPTED): it is deleted and asked for anew", printed)
    verbs = [call.split()[4] for call in cloud.calls if "describe" not in call]
    assert verbs == ["delete", "create"]
    assert "--force --quiet" in cloud.calls_of("delete")[0]


def test_waiting_has_an_end_and_can_be_left_at_once(cloud):
    cloud.answer(QUEUE, "WAITING_FOR_RESOURCES", keep=True)
    assert "is in the queue" in cloud.run("create.sh", "--no-wait")
    assert "WAIT_SECONDS=3" in cloud.run("create.sh", status=1)


def test_delete_asks_or_is_told(cloud):
    cloud.ready()
    assert "pass --yes" in cloud.run("delete.sh", status=2)
    assert cloud.calls_of("delete ") == []
    cloud.run("delete.sh", "--yes")
    assert len(cloud.calls_of("queued-resources delete atommem --force")) == 1


def test_delete_of_nothing_is_no_error(cloud):
    cloud.answer(QUEUE, "NOT_FOUND", 1)
    assert "nothing to delete" in cloud.run("delete.sh", "--yes")


# ---------------------------------------------------------------------------------------------
# The guide


def read_transcripts() -> list[tuple[str, str]]:
    """(command, what it prints) of every dry run in docs/tpu.md."""
    text = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    found = []
    for block in blocks:
        command, _, output = re.sub(r"\\\n> +", "", block).partition("\n")
        assert command.startswith("$ tpu_setup/")
        found.append((command.removeprefix("$ "), output))
    return found


def test_the_guide_shows_every_script():
    shown = {command.split()[0].removeprefix("tpu_setup/") for command, _ in read_transcripts()}
    assert shown == {*ARGUMENTS, "gke.sh"}


@pytest.mark.parametrize(("command", "output"), read_transcripts())
def test_a_transcript_of_the_guide_is_what_the_script_prints(cloud, command, output):
    words = shlex.split(command)
    assert "--dry-run" in words
    first = words.index("--dry-run")
    done = subprocess.run(
        [*words[:first], f"--env={SETUP / 'env.sh.example'}", *words[first:]],
        cwd=ROOT,
        env={name: value for name, value in cloud.environment.items() if name != "TMPDIR"},
        capture_output=True,
        text=True,
        check=True,
    )

    def normalise(text: str) -> str:
        text = text.replace(str(ROOT), "/home/me/atommem_jax")
        commit = r"(?<=atommem_jax-)\w+(?=\.tar)|(?<=train:)\w+|(?<=echo )\w+(?= > COMMIT)"
        joined = re.sub(commit, "COMMIT", text)
        # Where lines are broken depends on the length of paths and names.
        return re.sub(r"\s+", " ", joined.replace("\\\n", " ")).strip()

    assert normalise(done.stdout) == normalise(output)
