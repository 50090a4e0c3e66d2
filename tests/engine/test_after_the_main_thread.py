"""An asynchronous save that is begun when the main thread has ended is refused, and the process fails."""

from __future__ import annotations

import pytest
import torch

import dcp_plugins as dcp
from tests.programs import run_program

PROGRAM = """
import sys, threading
import torch
import dcp_plugins as dcp
from dcp_plugins.engine.async_save import AsyncCheckpointerType

def late():
    threading.main_thread().join()
    kind = AsyncCheckpointerType(sys.argv[2])
    dcp.async_save({"x": torch.ones(3)}, checkpoint_id=f"{sys.argv[1]}/late", async_checkpointer_type=kind)

if __name__ == "__main__":
    if sys.argv[3] == "after another":
        dcp.async_save({"x": torch.ones(3)}, checkpoint_id=f"{sys.argv[1]}/early")
    threading.Thread(target=late, name="late-thread").start()
"""

SAVES = """
import sys, threading
import torch
import dcp_plugins as dcp

def late():
    threading.main_thread().join()
    dcp.save({"x": torch.ones(3)}, checkpoint_id=f"{sys.argv[1]}/late")

threading.Thread(target=late).start()
"""


@pytest.mark.parametrize(("kind", "order"), [("thread", "first"), ("thread", "after another"), ("process", "first")])
def test_an_asynchronous_save_after_the_main_thread_is_refused_and_the_process_fails(tmp_path, kind, order):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ended = run_program(program, str(tmp_path), kind, order, folder=tmp_path, warn="ignore")
    assert ended.returncode == 1, ended.stderr
    assert "RuntimeError: async_save was called on thread 'late-thread' after the main thread had ended" in ended.stderr
    assert "or call save" in ended.stderr
    assert not (tmp_path / "late").exists()
    assert (tmp_path / "early" / ".metadata").exists() is (order == "after another")


def test_a_synchronous_save_after_the_main_thread_works(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SAVES)
    ended = run_program(program, str(tmp_path), folder=tmp_path, warn="ignore")
    assert ended.returncode == 0, ended.stderr
    assert torch.equal(dcp.load_from_keys(checkpoint_id=tmp_path / "late")["x"], torch.ones(3))
