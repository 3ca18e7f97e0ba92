"""What the tests' own processes leave behind: nothing, and nothing of others."""

import os
import signal

import pytest

from tests.helpers import processes


@pytest.mark.processes
def test_only_processes_that_still_run_are_killed(tmp_path, monkeypatch):
    killed = []

    def kill(pid, number):
        if pid is not None:  # it has no child
            killed.append((pid, number))
        os.kill(pid, number)

    monkeypatch.setattr(processes.os, "killpg", kill)
    commands = [["-c", "pass"], ["-c", "import time; time.sleep(600)"]]
    with processes.Group(commands, tmp_path, "group") as group:
        group.wait_until(lambda: group.alive() == [False, True], "the first has ended")
        running = group.pid(1)
    # The number of the first is free, and by now perhaps that of somebody else.
    assert killed == [(running, signal.SIGKILL)]
    assert group.alive() == [False, False]
