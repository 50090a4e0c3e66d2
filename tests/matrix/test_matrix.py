"""A run saved under any parallelism goes on under any other, on 1, 2 and 4 ranks, as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix.cells import WORLD_SIZES, Shape, resume_from_all, shared_checkpoints
from tests.matrix.parallelisms import KINDS
from tests.matrix.table import PAGE, SHAPES, documented, rendered, table_of


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_checkpoints(tmp_path_factory, "matrix", SHAPES)


def sources_of(target: Shape) -> list[Shape]:
    """Return one shape of each kind, a third of all shapes. The three targets of a kind together cover every shape.

    `make parallelism-table` runs all pairs of shapes.
    """
    kind, world_size = KINDS.index(target[0]), WORLD_SIZES.index(target[1])
    return [(KINDS[at], WORLD_SIZES[(kind + at + world_size) % len(WORLD_SIZES)]) for at in range(len(KINDS))]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", SHAPES, ids=lambda shape: f"{shape[0]}-on-{shape[1]}")
def test_a_run_saved_under_any_parallelism_goes_on_under(target: Shape, checkpoints: Path) -> None:
    sources = sources_of(target)
    problems = resume_from_all(checkpoints, target, sources)
    report = "\n".join(f"{kind} on {world_size}: {problem}" for (kind, world_size), problem in problems.items())
    assert not problems, report
    # The column of this target: the table promises what is found here, no less and no more.
    in_docs = {source for source, resumed in documented(table_of(PAGE.read_text())) if resumed == target}
    assert in_docs.intersection(sources) == set(problems), "`make parallelism-table` writes the table anew"


def test_the_table_in_the_docs_is_the_one_that_is_generated() -> None:
    table = table_of(PAGE.read_text())
    assert table == rendered(documented(table)), "`make parallelism-table` writes it anew"


def test_the_table_can_say_what_does_not_work() -> None:
    failed = {(("PP", 4), ("TP", 2)), (("PP", 1), ("TP", 2)), (("plain", 2), ("FSDP2+TP", 1))}
    assert documented(rendered(failed)) == failed
    assert "7 of 9: not 1→2, 4→2" in rendered(failed)
