"""A stub of gcloud for the tests of tpu_setup: it records calls and reaches nothing."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

from tests.conftest import ROOT

SETUP = ROOT / "tpu_setup"
SCRIPTS = sorted(path.name for path in SETUP.glob("*.sh") if path.name != "env.sh")
TRAIN = ["python", "experiments/train.py", "--config=experiments/configs/synthetic.py"]
# Of the scripts that act on a TPU VM.
ARGUMENTS = {
    "create.sh": [],
    "setup_vm.sh": [],
    "launch.sh": ["--run=first", "--", *TRAIN],
    "status.sh": ["--run=first"],
    "stop.sh": [],
    "delete.sh": [],
}

# Answers are files in $STUB: the first `<number>_<pattern>` whose pattern is found in the call is
# used up; one without a number stays. A line `exit N` at its end is the status, and what stands
# before it goes to stderr if N is not 0.
STUB = r"""#!/usr/bin/env bash
printf '%s\n' "$(basename "$0") $*" >>"$STUB/calls"
for word in "$@"; do # as ssh would: the home folder, and a shell that reads the line
  if [[ -e $STUB/is_worker && $word == --command=* ]]; then
    cd "$HOME" && exec bash -c "${word#--command=}"
  fi
done
if [[ "$*" == *--filename=-* ]]; then cat >"$STUB/stdin"; fi
for answer in "$STUB"/answers/*; do
  [[ -e $answer ]] || break
  name="$(basename "$answer")"
  pattern="$(head -n 1 "$answer")"
  [[ "$*" == *$pattern* ]] || continue
  code="$(sed -n 's/^exit //p' "$answer")"
  text="$(sed '1d;/^exit /d' "$answer")"
  [[ $name == keep_* ]] || rm "$answer"
  if [[ -n $text ]]; then
    if [[ ${code:-0} == 0 ]]; then printf '%s\n' "$text"; else printf '%s\n' "$text" >&2; fi
  fi
  exit "${code:-0}"
done
"""
QUEUE, NODE = "queued-resources describe", "tpu-vm describe"


@dataclasses.dataclass
class Cloud:
    """The stub, its answers and its record."""

    folder: pathlib.Path
    env_file: pathlib.Path
    answers: int = 0

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}:{pathlib.Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "STUB": str(self.folder),
            "ATOMMEM_TMUX": f"atommem-test-{os.getpid()}",
            "ATOMMEM_GRACE_SECONDS": "5",
            # Should a real gcloud ever be reached: it has no account and asks no metadata server.
            "CLOUDSDK_CONFIG": str(self.folder / "no_account"),
            "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        }

    def answer(self, pattern: str, text: str = "", status: int = 0, keep: bool = False) -> None:
        """The next call that contains the pattern gets this; in the order given."""
        self.answers += 1
        prefix = "keep_" if keep else "a_"
        path = self.folder / "answers" / f"{prefix}{self.answers:03d}"
        path.write_text(f"{pattern}\n{text}\nexit {status}\n")

    def ready(self, keep: bool = True) -> None:
        self.answer(QUEUE, "ACTIVE", keep=keep)
        self.answer(NODE, "READY", keep=keep)

    def set(self, **settings: str) -> None:
        with self.env_file.open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in settings.items())

    def run(self, script: str, *arguments: str, status: int = 0) -> str:
        first = 1 if script == "gke.sh" else 0  # its action
        done = subprocess.run(
            [SETUP / script, *arguments[:first], f"--env={self.env_file}", *arguments[first:]],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def calls_of(self, part: str) -> list[str]:
        return [call for call in self.calls if part in call]


def make_cloud(folder: pathlib.Path) -> Cloud:
    """A project in which everything has a name and nothing takes time."""
    for name in ("bin", "answers"):
        (folder / name).mkdir()
    for name in ("gcloud", "gsutil", "kubectl", "docker"):
        (folder / "bin" / name).write_text(STUB)
        (folder / "bin" / name).chmod(0o755)
    env_file = folder / "env.sh"
    shutil.copy(SETUP / "env.sh.example", env_file)
    made = Cloud(folder, env_file)
    made.set(PROJECT="stub-project", BUCKET="stub-bucket", RETRIES="2")
    made.set(RETRY_SECONDS="0", POLL_SECONDS="0", WAIT_SECONDS="3")
    return made
