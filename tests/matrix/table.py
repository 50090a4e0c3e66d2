"""The matrix as a table in ``docs/parallelism.md``: rendered, parsed, and written by running the matrix.

    python -m tests.matrix.table

runs all cells, in a minute or two, and writes what it found between the markers of the page.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tests.matrix.cells import WORLD_SIZES, Shape, resume_from_all, save_all
from tests.matrix.parallelisms import KINDS

__all__ = ["PAGE", "SHAPES", "Findings", "documented", "rendered", "table_of"]

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "parallelism.md"
SHAPES: list[Shape] = [(kind, world_size) for world_size in WORLD_SIZES for kind in KINDS]

# Pairs (saved under, resumed under) that did not go on as if the run had never stopped.
Findings = set[tuple[Shape, Shape]]

_BEGIN = "<!-- matrix: written by `make parallelism-table` -->"
_END = "<!-- end of matrix -->"
_NUM_PAIRS = len(WORLD_SIZES) ** 2
_CELL = re.compile(rf"(\d+) of {_NUM_PAIRS}(?:: not (.*))?")


def rendered(failed: Findings) -> str:
    """Return the table: a row for each kind saved under, a column for each resumed under."""
    lines = [f"| saved under | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for source in KINDS:
        cells = []
        for target in KINDS:
            pairs = [(saved, resumed) for saved in WORLD_SIZES for resumed in WORLD_SIZES]
            not_working = [
                f"{saved}→{resumed}" for saved, resumed in pairs if ((source, saved), (target, resumed)) in failed
            ]
            cell = f"{_NUM_PAIRS - len(not_working)} of {_NUM_PAIRS}"
            cells.append(f"{cell}: not {', '.join(not_working)}" if not_working else cell)
        lines.append(f"| **{source}** | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of(page: str) -> str:
    """Return what stands between the markers of the page."""
    return page.partition(_BEGIN)[2].partition(_END)[0].strip()


def documented(table: str) -> Findings:
    """Return what a table says does not work."""
    failed: Findings = set()
    for line in table.splitlines()[2:]:
        source, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for target, cell in zip(KINDS, cells, strict=True):
            matched = _CELL.fullmatch(cell)
            assert matched is not None, f"'{cell}' in the table of {PAGE.name}; `make parallelism-table` writes it anew"
            for pair in (matched[2] or "").split(", "):
                if pair:
                    saved, _, resumed = pair.partition("→")
                    failed.add(((source.strip("*"), int(saved)), (target, int(resumed))))
    return failed


def _found() -> Findings:
    failed: Findings = set()
    with tempfile.TemporaryDirectory(prefix="dcp_matrix_") as folder:
        save_all(Path(folder), SHAPES)
        for target in SHAPES:
            for source, problem in resume_from_all(Path(folder), target, SHAPES).items():
                print(f"{source} -> {target}: {problem}")
                failed.add((source, target))
    return failed


def main() -> None:
    """Run the matrix and write its table into the page."""
    page = PAGE.read_text()
    before, _, rest = page.partition(_BEGIN)
    after = rest.partition(_END)[2]
    assert after, f"{PAGE} has no place for the table: expected the lines '{_BEGIN}' and '{_END}'"
    PAGE.write_text(f"{before}{_BEGIN}\n\n{rendered(_found())}\n\n{_END}{after}")


if __name__ == "__main__":
    main()
