"""Whole programs that save in a process of their own: how they end, and what they leave behind.

Where the claim is about the end of an interpreter, or about what its script defines, one is started; else it is forked.
"""

from __future__ import annotations

import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import torch

import dcp_plugins as dcp
from tests import programs

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def run_program(source: str, folder: Path, *, max_files: int | None = None) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"
    program.write_text(PREAMBLE + textwrap.dedent(source))
    return programs.run_program(program, str(folder), folder=programs.ROOT, warn="ignore", max_files=max_files)


PREAMBLE = """
import os, signal, sys, threading, time
import torch
import dcp_plugins as dcp
from dcp_plugins.engine import AsyncCheckpointerType
from dcp_plugins.engine.process_runner import process_runner
folder = sys.argv[1]

def save(state_dict, writer):
    return dcp.async_save(
        state_dict, storage_writer=writer, async_checkpointer_type=AsyncCheckpointerType.PROCESS
    )
"""


def is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + 20
    while is_running(process):
        assert time.monotonic() < deadline, f"{process} is still there"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return the folder and the outcome of a program that changes its directory, forks, and ends during a save."""
    folder = tmp_path_factory.mktemp("ended")
    result = run_program(
        """
        os.chdir(folder)
        for name in ("one", "two"):
            os.makedirs(name)
            os.chdir(name)
            save({"a": torch.ones(3)}, dcp.FileSystemWriter("here"))
            os.chdir("..")
        save({"a": torch.ones(3)}, dcp.FileSystemWriter(folder + "/1")).result()
        pid = process_runner._process.process.pid
        if not (child := os.fork()):
            print("child's", process_runner._process, flush=True)
            sys.exit(0)
        print("child ended with", os.waitpid(child, 0)[1])
        save({"a": torch.ones(3)}, dcp.FileSystemWriter(folder + "/2")).result()
        print("parent's is the same", process_runner._process.process.pid == pid)
        save({"a": torch.ones(8_000_000)}, dcp.FileSystemWriter(folder + "/good"))
        print(process_runner._process.process.pid)
        """,
        folder,
    )
    return folder, result


Ended = tuple[Path, subprocess.CompletedProcess[str]]


def test_a_save_in_flight_is_finished_when_the_program_ends_and_no_process_is_left(ended: Ended) -> None:
    folder, result = ended
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    target = {"a": torch.zeros(8_000_000)}
    dcp.load(target, checkpoint_id=folder / "good")
    assert (target["a"] == 1).all()
    wait_until_gone(int(result.stdout.split()[-1]))


def test_relative_paths_are_those_of_the_call(ended: Ended) -> None:
    folder, result = ended
    assert (folder / "one" / "here" / ".metadata").exists(), result.stderr
    assert (folder / "two" / "here" / ".metadata").exists()


def test_a_forked_child_leaves_the_process_to_its_parent(ended: Ended) -> None:
    folder, result = ended
    lines = result.stdout.splitlines()[:-1]
    assert lines == ["child's None", "child ended with 0", "parent's is the same True"], result.stderr
    assert (folder / "2" / ".metadata").exists()


def test_a_failure_nobody_asked_for_fails_the_program(tmp_path: Path) -> None:
    result = run_program(
        """
        from tests.engine.process_plugins import Full
        save({"a": torch.ones(3)}, Full(folder + "/bad"))
        """,
        tmp_path,
    )
    assert result.returncode == 1, result.stderr
    assert "nobody asked for its result" in result.stderr
    assert "OSError: [Errno 28] No space left on device" in result.stderr


def test_classes_of_the_script_itself_are_found(tmp_path: Path) -> None:
    result = run_program(
        """
        class Doubling(dcp.DefaultSavePlanner):
            def transform_object(self, item, value):
                value = super().transform_object(item, value)
                return value * 2 if isinstance(value, torch.Tensor) else value

        if __name__ == "__main__":
            dcp.async_save(
                {"a": torch.ones(3)}, checkpoint_id=folder + "/c", planner=Doubling(),
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            ).result()
        """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    target = {"a": torch.zeros(3)}
    dcp.load(target, checkpoint_id=tmp_path / "c")
    assert torch.equal(target["a"], torch.full((3,), 2.0))


def test_a_script_that_saves_unguarded_is_told_so(tmp_path: Path) -> None:
    result = run_program(
        """
        class Mine(dcp.DefaultSavePlanner):
            pass

        dcp.async_save(
            {"a": torch.ones(3)}, checkpoint_id=folder + "/c", planner=Mine(),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        ).result()
        """,
        tmp_path,
    )
    assert result.returncode == 1
    assert "if __name__ == '__main__':" in result.stderr


@pytest.mark.parametrize("started_on", ["main thread", "thread that ends"])
def test_the_process_dies_with_its_parent_and_not_before(tmp_path: Path, started_on: str) -> None:
    result = run_program(
        f"""
        from tests.engine.process_plugins import Gated, wait_for
        from pathlib import Path
        if {started_on!r} == "main thread":
            dcp.start_async_process()
        else:
            thread = threading.Thread(target=dcp.start_async_process)
            thread.start()
            thread.join()
        save({{"a": torch.ones(3)}}, dcp.FileSystemWriter(folder + "/good")).result()
        save({{"a": torch.ones(3)}}, Gated(folder + "/gated"))
        pid = wait_for(Path(folder + "/gated"))
        assert int(pid) == process_runner._process.process.pid
        # A process of its own that has inherited the channel must not keep the checkpoint process alive.
        if not (child := os.fork()):
            os.close(1)
            os.close(2)
            time.sleep(5)
            os._exit(0)
        print(pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    wait_until_gone(int(result.stdout))
    assert (tmp_path / "good" / ".metadata").exists()
    assert not (tmp_path / "gated" / ".metadata").exists()


def test_few_descriptors_are_enough_for_many_tensors(tmp_path: Path) -> None:
    result = run_program(
        """
        def save_and_load(count, elements):
            state_dict = {str(n): torch.full((elements,), float(n)) for n in range(count)}
            writer = dcp.FileSystemWriter(f"{folder}/{count}", sync_files=False)
            for step in range(2):
                save(state_dict, writer).result()
            target = {str(n): torch.zeros(elements) for n in range(0, count, 10)}
            dcp.load(target, checkpoint_id=f"{folder}/{count}")
            assert all((value == float(name)).all() for name, value in target.items())
            assert len(os.listdir("/proc/self/fd")) - before < 20
            assert len(os.listdir(f"/proc/{process_runner._process.process.pid}/fd")) < 30

        before = len(os.listdir("/proc/self/fd"))
        save_and_load(3_000, 1024)
        save_and_load(270, 300_000)
        """,
        tmp_path,
        max_files=256,
    )
    assert result.returncode == 0, result.stderr
