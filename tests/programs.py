"""Programs that tests run: forked from a server that has imported torch, seconds sooner than they would be started.

The programs end as an interpreter does. A test of how an interpreter begins, or of what it imports, has to start one.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from dcp_plugins.testing.ranks import preload

ROOT = Path(__file__).resolve().parent.parent


def run_program(
    program: Path,
    *arguments: str,
    folder: Path,
    warn: str = "default",
    max_files: int | None = None,
    before: Callable[[], Any] | None = None,
    timeout_seconds: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, as ``python script.py`` would, and return what ``subprocess.run`` would.

    Args:
        program: The script.
        arguments: Follow its name in ``sys.argv``.
        folder: Where it runs.
        warn: What becomes of warnings, as in ``PYTHONWARNINGS``.
        max_files: Its limit of open files.
        before: Called in the process first; picklable.
        timeout_seconds: It is killed when this has passed.
    """
    preload()
    with tempfile.TemporaryDirectory(prefix="dcp_program_") as logs:
        outputs = [Path(logs, name) for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("forkserver").Process(
            target=_main, args=(program, arguments, folder, warn, max_files, before, outputs)
        )
        process.start()
        try:
            process.join(timeout_seconds)
            stdout, stderr = (path.read_text() if path.exists() else "" for path in outputs)
            assert process.exitcode is not None, f"no end within {timeout_seconds} s\n{stdout}\n{stderr}"
            return subprocess.CompletedProcess([str(program), *arguments], process.exitcode, stdout, stderr)
        finally:
            if process.is_alive():
                process.kill()
            process.join()


def _main(
    program: Path,
    arguments: tuple[str, ...],
    folder: Path,
    warn: Any,
    max_files: int | None,
    before: Callable[[], Any] | None,
    outputs: list[Path],
) -> None:
    def run() -> None:
        if max_files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))
        os.chdir(folder)
        if before is not None:
            before()
        warnings.resetwarnings()
        warnings.simplefilter(warn)
        sys.argv = [str(program), *arguments]
        sys.path.insert(0, str(program.parent))
        module = types.ModuleType("__main__")
        module.__file__ = str(program)
        sys.modules["__main__"] = module
        exec(compile(program.read_text(), str(program), "exec"), module.__dict__)

    run_as_a_program(run, *outputs)


def run_as_a_program(run: Callable[[], None], stdout: Path, stderr: Path) -> NoReturn:
    """Call a function and end this process, which has to be a forked one, as an interpreter would.

    Args:
        run: What the program does.
        stdout: Where its output goes.
        stderr: May be the same file.
    """
    for descriptor, path in enumerate((stdout, stderr), start=1):
        with path.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    code = 1
    try:
        run()
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 0 if exc.code is None else 1
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
    # Whatever ends a program ends it with a traceback.
    except BaseException:
        traceback.print_exc()
    # The interpreter ends as it does when a script has come to its end. What multiprocessing does for a child is less.
    ctypes.pythonapi.Py_Exit(code)
    raise AssertionError("the interpreter has ended")
