"""Run a framework's own tests with this package swapped in, and with stock, and tell where the two differ.

    python -m tests.frameworks.run accelerate ../accelerate-1.15.0 tests/test_state_checkpointing.py
    python -m tests.frameworks.run lightning ../pytorch-lightning/tests tests_pytorch/loops --mode stock --mode sync

The framework's tests come from a checkout or a source distribution of the installed version; none of them is kept here.
Each difference needs a reason in ``reasons.json``: one without a reason makes the command fail. With ``--write`` the
table goes into ``docs/compatibility.md``. With ``--outcomes FOLDER`` the outcomes are added to those that earlier
commands have left in the folder, and the table is about all of them: a long list of files can run in parts, and a
change of this package needs no second run of stock.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Difference", "Reason", "collected", "differences", "main", "outcomes", "reasons", "rendered", "with_table"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
REASONS = HERE / "reasons.json"
STOCK = "stock"
MODES = {
    "accelerate": ("off", "thread", "process"),
    "lightning": ("sync", "async"),
    "transformers": ("off", "thread", "process"),
}
Outcomes = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why tests have another outcome with this package."""

    framework: str
    test: str
    """Test ids, as a pattern of the shell's."""
    why: str
    modes: tuple[str, ...] = ()
    """The modes that differ; empty for all."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A test that has another outcome with this package than with stock."""

    mode: str
    test: str
    stock: str
    ours: str
    reason: Reason | None
    """None if nobody has given one."""


def outcomes(framework: str, source: Path, files: Iterable[str], mode: str | None) -> Outcomes:
    """Run the framework's tests and return each one's outcome by its id.

    Args:
        framework: The framework's name.
        source: The folder that the framework's tests are run in.
        files: Files, folders and other arguments of pytest.
        mode: How this package saves; None runs stock.
    """
    with tempfile.TemporaryDirectory(prefix="dcp_frameworks_") as folder:
        report = Path(folder) / "outcomes.json"
        environment = os.environ | {"OUTCOMES": str(report)}
        # Python imports `sitecustomize` at its start, in the processes that tests start as well.
        paths = [HERE / "plugins", source, ROOT]
        if mode is not None:
            environment |= {"SWAPPED": framework, "SWAPPED_MODE": mode}
        environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "framework_outcomes", "-p", "no:cacheprovider", *files],
            cwd=source,
            env=environment,
            check=False,
        )
        if not report.exists():
            raise SystemExit(f"pytest in {source} ended without a result; its own output is above")
        found: dict[str, str] = json.loads(report.read_text())
        return found


def collected(folder: Path, framework: str, found: Mapping[str, Outcomes]) -> dict[str, Outcomes]:
    """Add outcomes to those that a folder holds for the framework, and return all of them.

    Args:
        folder: Holds one JSON file for each framework; it is made if it does not exist.
        framework: The framework's name.
        found: The new outcomes, by "stock" or the mode. A test that has run again has its newest outcome.
    """
    file = folder / f"{framework}.json"
    before: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.exists() else {}
    together: dict[str, Outcomes] = {side: {**before.get(side, {}), **found.get(side, {})} for side in before | found}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(together, indent=0))
    return together


def reasons() -> list[Reason]:
    """Read the reasons that are known."""
    return [Reason(**{**entry, "modes": tuple(entry.get("modes", ()))}) for entry in json.loads(REASONS.read_text())]


def differences(
    framework: str, stock: Outcomes, ours: Mapping[str, Outcomes], known: Iterable[Reason]
) -> list[Difference]:
    """Return the tests whose outcome with this package differs from stock's, or that ran on only one side.

    A file that a mode has not run at all is no difference.
    """
    known = [reason for reason in known if reason.framework == framework]
    found = []
    for mode, of_mode in ours.items():
        left_out = _left_out(stock, of_mode)
        for test in sorted((stock.keys() | of_mode.keys()) - left_out):
            one, other = stock.get(test, "not run"), of_mode.get(test, "not run")
            if one != other:
                found.append(Difference(mode, test, one, other, _reason(test, mode, known)))
    return found


def _left_out(stock: Outcomes, of_mode: Outcomes) -> set[str]:
    """Return the tests in files that a mode has not run at all."""
    files = {_file_of(test) for test in of_mode}
    return {test for test in stock if _file_of(test) not in files}


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def _reason(test: str, mode: str, known: Iterable[Reason]) -> Reason | None:
    for reason in known:
        if fnmatch.fnmatchcase(test, reason.test) and (not reason.modes or mode in reason.modes):
            return reason
    return None


def rendered(
    framework: str, version: str, stock: Outcomes, ours: Mapping[str, Outcomes], found: Iterable[Difference]
) -> str:
    """Return a page's section: the outcomes counted on each side, and the differences with their reasons.

    Tests that differ for one reason share a row. A difference without a reason has a row of its own.
    """

    def counts(side: Outcomes) -> str:
        kinds = [sum(one == kind for one in side.values()) for kind in ("passed", "skipped", "failed")]
        return " | ".join(map(str, [*kinds, len(_left_out(stock, side))]))

    lines = [
        f"### {framework} {version}",
        "",
        "| | passed | skipped | failed | in files not run |",
        "|---|---|---|---|---|",
        f"| stock | {counts(stock)} |",
        *(f"| ours, {mode} | {counts(of_mode)} |" for mode, of_mode in ours.items()),
    ]
    by_row: dict[tuple[str, str], list[Difference]] = {}
    for one in found:
        row = (one.test, "**none**") if one.reason is None else (one.reason.test, one.reason.why)
        by_row.setdefault(row, []).append(one)
    if by_row:
        lines += ["", "| tests that differ | number | mode | stock | ours | reason |", "|---|---|---|---|---|---|"]
        for (pattern, why), row_of in sorted(by_row.items()):
            modes, stocks, others = (
                ", ".join(dict.fromkeys(getattr(one, field) for one in row_of)) for field in ("mode", "stock", "ours")
            )
            number = len({one.test for one in row_of})
            lines.append(f"| `{pattern}` | {number} | {modes} | {stocks} | {others} | {why} |")
    return "\n".join(lines)


def with_table(page: str, framework: str, table: str) -> str:
    """Return the page with a framework's section between its markers replaced.

    Raises:
        ValueError: The page has no such markers.
    """
    begin, end = f"<!-- {framework}: written by tests.frameworks.run -->", f"<!-- end of {framework} -->"
    made, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", page, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"expected the lines {begin!r} and {end!r} once in the page, found them {count} times")
    return made


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=MODES)
    parser.add_argument("source", type=Path, help="the folder that the framework's tests are run in")
    parser.add_argument("files", nargs="+", help="its files of tests, relative to that folder")
    parser.add_argument("--mode", action="append", help="stock, or how this package saves [default: all of them]")
    parser.add_argument("--pytest", action="append", default=[], help="another argument of pytest")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    parser.add_argument("--outcomes", type=Path, help="a folder that collects the outcomes of several commands")
    options = parser.parse_args()
    framework: str = options.framework
    known = (STOCK, *MODES[framework])
    unknown = set(options.mode or ()).difference(known)
    if unknown:
        parser.error(f"--mode must be one of {', '.join(known)} for {framework}, got {', '.join(unknown)}")
    before = {} if options.outcomes is None else collected(options.outcomes, framework, {})
    if STOCK not in before and STOCK not in (options.mode or known):
        parser.error("ours are compared with stock, which has not run: add --mode stock, or its folder as --outcomes")
    arguments = [*options.files, *options.pytest]
    source = options.source.resolve()
    sides = {
        side: outcomes(framework, source, arguments, None if side == STOCK else side) for side in options.mode or known
    }
    if options.outcomes is not None:
        sides = collected(options.outcomes, framework, sides)
    stock, ours = sides[STOCK], {mode: sides[mode] for mode in MODES[framework] if mode in sides}
    found = differences(framework, stock, ours, reasons())
    table = rendered(framework, importlib.metadata.version(framework), stock, ours, found)
    print(table)
    if options.write:
        PAGE.write_text(with_table(PAGE.read_text(), framework, table))
    without = [one for one in found if one.reason is None]
    if without:
        print(f"\n{len(without)} difference(s) without a reason in {REASONS.name}", file=sys.stderr)
    return 1 if without else 0


if __name__ == "__main__":
    sys.exit(main())
