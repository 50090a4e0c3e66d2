"""The command that runs a framework's own tests finds differences from stock and demands a reason for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frameworks.run import Difference, Reason, differences, outcomes, reasons, rendered, with_table

STOCK = {"t.py::one": "passed", "t.py::two": "passed", "t.py::three": "skipped"}
OURS = {"off": dict(STOCK), "thread": {"t.py::one": "failed", "t.py::two": "passed"}}


def test_only_another_outcome_is_a_difference_and_a_reason_is_found_by_framework_test_and_mode() -> None:
    known = [
        Reason("lightning", "t.py::*", "another framework's"),
        Reason("accelerate", "t.py::one", "another mode's", ("process",)),
        Reason("accelerate", "t.py::o*", "it is late", ("thread",)),
    ]
    assert differences("accelerate", STOCK, OURS, known) == [
        Difference("thread", "t.py::one", "passed", "failed", "it is late"),
        Difference("thread", "t.py::three", "skipped", "not run", None),
    ]


def test_the_table_counts_what_passes_and_shows_where_a_reason_is_missing() -> None:
    found = differences("accelerate", STOCK, OURS, [])
    table = rendered("accelerate", "1.2", STOCK, OURS, found)
    assert "| stock | 2 of 3 |" in table
    assert "| ours, thread | 1 of 2 |" in table
    assert "| `t.py::one` | thread | passed | failed | **none** |" in table
    page = "before\n<!-- accelerate: written by tests.frameworks.run -->\nold\n<!-- end of accelerate -->\nafter\n"
    assert with_table(page, "accelerate", table).splitlines()[2] == "### accelerate 1.2"
    assert "old" not in with_table(page, "accelerate", table)
    with pytest.raises(ValueError, match="found them 0 times"):
        with_table(page, "lightning", table)


def test_every_known_reason_says_why() -> None:
    assert all(reason.why and reason.test for reason in reasons())


TESTS = """
import subprocess, sys

from accelerate import Accelerator


def test_a_program_that_a_test_starts_has_stocks_class():
    lines = "from accelerate import Accelerator; print(type(Accelerator(cpu=True)) is Accelerator)"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_nothing():
    pass
"""


@pytest.mark.slow
def test_the_package_is_swapped_in_for_the_tests_and_the_programs_that_they_start(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(TESTS)
    found = outcomes("accelerate", tmp_path, ["test_theirs.py"], "off")
    assert {test.partition("::")[2]: outcome for test, outcome in found.items()} == {
        "test_a_program_that_a_test_starts_has_stocks_class": "failed",
        "test_nothing": "passed",
    }
