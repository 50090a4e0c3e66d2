"""What a user sees whose torch is newer than the tested ones, or has lost a private name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(program: str, *arguments: str) -> list[str]:
    """Run a program in an interpreter of its own, and return the lines that it printed."""
    command = [sys.executable, "-W", "always", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


SAVE_AND_LOAD = """
import sys, warnings
import torch
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dcp_plugins as dcp
    dcp.save({{"w": torch.arange(3)}}, checkpoint_id=sys.argv[1])
    dcp.save({{"w": torch.arange(3)}}, checkpoint_id=sys.argv[1])
    state = {{"w": torch.zeros(3, dtype=torch.int64)}}
    dcp.load(state, checkpoint_id=sys.argv[1])
    {after}
print(state["w"].tolist())
for warning in caught:
    if "tested with" in str(warning.message):
        print(warning.message)
"""


def test_the_package_and_the_help_of_the_command_line_need_no_torch():
    program = """
import sys
sys.modules["torch"] = None
import dcp_plugins
from dcp_plugins.cli import main
try:
    main(["--help"])
except SystemExit as exc:
    print("exit", exc.code)
"""
    lines = run(program)
    assert lines[-1] == "exit 0"
    assert any(line.split()[:1] == ["bench"] for line in lines)


def test_a_newer_torch_works_with_one_warning(tmp_path):
    program = SAVE_AND_LOAD.format(before="torch.__version__ = '2.99.1+cpu'", after="")
    values, *told = run(program, str(tmp_path))
    assert values == "[0, 1, 2]"
    (line,) = told
    assert "tested with torch 2.9 to " in line
    assert "2.99.1" in line


def test_a_name_that_torch_has_lost_is_told_once_and_the_rest_works(tmp_path):
    before = """
import torch.distributed.checkpoint, torch.distributed.fsdp
import torch.distributed._shard.sharded_tensor.api as api
del api.ShardedTensor
torch.__version__ = "2.99.0"
"""
    after = "from dcp_plugins.state_dict import get_model_state_dict; get_model_state_dict(torch.nn.Linear(2, 2))"
    values, *told = run(SAVE_AND_LOAD.format(before=before, after=after), str(tmp_path))
    assert values == "[0, 1, 2]"
    (line,) = told
    for part in (
        "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
        "FSDP1",
        "2.99.0",
        "tested with torch 2.9",
    ):
        assert part in line


def test_a_lost_name_that_everything_needs_is_an_error_that_says_what_still_reads_the_files():
    program = """
import torch
import torch.distributed.checkpoint.filesystem as filesystem
del filesystem._StorageInfo
import dcp_plugins
try:
    dcp_plugins.save
except ImportError as exc:
    print(exc)
"""
    (line,) = run(program)
    for part in ("_StorageInfo", "tested with torch 2.9 to ", "torch.distributed.checkpoint loads them"):
        assert part in line


@pytest.mark.parametrize("name", ["load", "FileSystemWriter", "Metadata", "state_dict", "errors"])
def test_every_name_is_there_when_it_is_first_asked_for(name):
    assert run(f"import dcp_plugins; print(dcp_plugins.{name}.__name__)")[0].endswith(name)
