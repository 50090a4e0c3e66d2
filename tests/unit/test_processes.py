"""What is known of processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

_WITH_THE_PROC_OF_ANOTHER_NAMESPACE = """
import os
from dcp_plugins.format.names import may_be_running, new_save_id

ours, theirs = os.pipe()
if not os.fork():
    os.write(theirs, new_save_id().encode())
    os._exit(0)
print(may_be_running(os.read(ours, 32).decode()))
"""


def test_nothing_is_known_of_processes_where_proc_shows_those_of_another_namespace() -> None:
    """As in a container that was given the host's: the numbers are of other processes."""
    alone = ["unshare", "--map-root-user", "--pid", "--fork"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces are allowed here")
    program = [*alone, sys.executable, "-c", _WITH_THE_PROC_OF_ANOTHER_NAMESPACE]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip() == "None"
