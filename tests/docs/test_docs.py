"""What the documentation shows, runs: every Python block of README and docs, every example, every link to a file.

The blocks of one page run in order, as one program, in an empty directory and a process of their own. It is forked, and
frameworks may be imported in it already, but nothing of ours is plugged into them. A block that cannot run says so in a
comment before it: ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import dcp_plugins
from dcp_plugins.testing.ranks import run_ranks
from tests.programs import run_program

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(r"^```(\w*)\s*$")
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
_LINK = re.compile(r"\[[^\]]*\]\((?!https?://|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Return the runnable Python blocks with the number of lines before each."""
    blocks = []
    lines = text.splitlines()
    position = 0
    while position < len(lines):
        opening = _FENCE.match(lines[position])
        if opening is None:
            position += 1
            continue
        end = next(i for i in range(position + 1, len(lines)) if lines[i].rstrip() == "```")
        excused = any(_NOT_RUN.search(line) for line in lines[max(0, position - 2) : position])
        if opening.group(1) == "python" and not excused:
            blocks.append((position + 1, "\n".join(lines[position + 1 : end])))
        position = end + 1
    return blocks


def run(program: Path, folder: Path) -> str:
    result = run_program(program, folder=folder, before=unplug)
    assert result.returncode == 0, f"{program}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def unplug() -> None:
    """Forget what plugs itself into a framework when it is imported: a page that needs it has to import it."""
    for name in [name for name in sys.modules if name.startswith("dcp_plugins.")]:
        package, _, rest = name.removeprefix("dcp_plugins.").partition(".")
        if package in PLUGS:
            del sys.modules[name]
            if not rest:
                delattr(dcp_plugins, package)
    for registry, attribute in REGISTRIES.items():
        if registry in sys.modules:
            flags = getattr(sys.modules[registry], attribute)
            for flag in [flag for flag in flags if flag.startswith("dcp")]:
                del flags[flag]


PLUGS = ("lightning", "accelerate", "transformers")
REGISTRIES = {
    "lightning.pytorch.strategies": "StrategyRegistry",
    "lightning.fabric.strategies": "STRATEGY_REGISTRY",
}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page.read_text())], ids=lambda page: name_of(page)
)
def test_the_python_blocks_of_the_page_run(page: Path, tmp_path: Path) -> None:
    program: list[str] = []
    for num_lines_before, block in python_blocks(page.read_text()):
        # Blank lines keep the line numbers of a traceback those of the page.
        program += [""] * (num_lines_before - len(program))
        program += block.splitlines()
    # Not the page's own name: a script called `accelerate` would hide the package.
    path = tmp_path / f"{page.stem}_page.py"
    path.write_text("\n".join(program) + "\n")
    folder = tmp_path / "empty"
    folder.mkdir()
    run(path, folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: name_of(page))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    broken = [target for target in _LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not broken


def test_getting_started_runs(tmp_path: Path) -> None:
    output = run(ROOT / "examples/getting_started.py", tmp_path)
    assert "the next loss is" in output
    assert "in both runs" in output


RESHARDING = ROOT / "examples/fsdp2_resharding.py"


def resharding_rank(folder: str) -> None:
    runpy.run_path(str(RESHARDING))["main"](Path(folder))


def test_the_resharding_example_continues_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    # The example itself compares what it loaded with what was saved.
    for world_size in (2, 3, 1):
        run_ranks(world_size, resharding_rank, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-15", "step-5"]


@pytest.mark.slow
def test_the_resharding_example_runs_under_torchrun(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Gloo's threads may outlive the interpreter where DTensors were used, and abort a process that has done its work
    # (torch 2.13 on Python before 3.14). So the output is asked, and the checkpoint, rather than the exit status.
    result = subprocess.run(
        [*launcher, str(RESHARDING), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    excused = "terminate called without an active" in result.stderr
    assert result.returncode == 0 or excused, f"{result.stdout}\n{result.stderr}"
    assert "2 ranks: steps 0 to 5" in result.stdout
    assert (tmp_path / "step-5" / ".metadata").exists()


def test_every_example_is_run_by_some_test() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    unused = [path.name for path in (ROOT / "examples").glob("*.py") if path.name not in tests]
    # The demo runs for minutes: `make demo` is its test, and that of what it imports and starts.
    demo = {f"lightning_{part}.py" for part in ("demo", "overhead", "recorder", "runs", "train")}
    assert set(unused) <= demo
