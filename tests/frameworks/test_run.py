"""The command that runs a framework's own tests finds differences from stock and demands a reason for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frameworks.run import Difference, Reason, collected, differences, outcomes, reasons, rendered, with_table

STOCK = {"t.py::one": "passed", "t.py::two": "passed", "t.py::three": "skipped"}
OURS = {"off": dict(STOCK), "thread": {"t.py::one": "failed", "t.py::two": "passed"}}


def test_only_another_outcome_is_a_difference_and_a_reason_is_found_by_framework_test_and_mode() -> None:
    known = [
        Reason("lightning", "t.py::*", "another framework's"),
        Reason("accelerate", "t.py::one", "another mode's", ("process",)),
        Reason("accelerate", "t.py::o*", "it is late", ("thread",)),
    ]
    assert differences("accelerate", STOCK, OURS, known) == [
        Difference("thread", "t.py::one", "passed", "failed", known[2]),
        Difference("thread", "t.py::three", "skipped", "not run", None),
    ]


def test_files_that_a_mode_has_not_run_are_counted_and_are_no_differences() -> None:
    stock = STOCK | {"u.py::one": "passed", "u.py::two": "failed"}
    ours = {"off": STOCK, "thread": stock}
    assert differences("accelerate", stock, ours, []) == []
    table = rendered("accelerate", "1.2", stock, ours, [])
    assert "| ours, off | 2 | 1 | 0 | 2 |" in table
    assert "| ours, thread | 3 | 1 | 1 | 0 |" in table


def test_the_table_has_one_row_for_each_reason_and_shows_where_a_reason_is_missing() -> None:
    late = Reason("accelerate", "t.py::t*", "it is late")
    ours = OURS | {"off": STOCK | {"t.py::two": "failed"}}
    table = rendered("accelerate", "1.2", STOCK, ours, differences("accelerate", STOCK, ours, [late]))
    assert "| stock | 2 | 1 | 0 | 0 |" in table
    assert "| ours, thread | 1 | 0 | 1 | 0 |" in table
    assert "| `t.py::one` | 1 | thread | passed | failed | **none** |" in table
    assert "| `t.py::t*` | 2 | off, thread | passed, skipped | failed, not run | it is late |" in table
    page = "before\n<!-- accelerate: written by tests.frameworks.run -->\nold\n<!-- end of accelerate -->\nafter\n"
    assert with_table(page, "accelerate", table).splitlines()[2] == "### accelerate 1.2"
    assert "old" not in with_table(page, "accelerate", table)
    with pytest.raises(ValueError, match="found them 0 times"):
        with_table(page, "lightning", table)


def test_the_outcomes_of_several_commands_come_together_and_the_newest_counts(tmp_path: Path) -> None:
    folder = tmp_path / "outcomes"
    collected(folder, "accelerate", {"stock": {"one": "failed", "two": "passed"}, "off": {"one": "passed"}})
    collected(folder, "lightning", {"stock": {"three": "passed"}})
    assert collected(folder, "accelerate", {"stock": {"one": "passed"}, "thread": {"one": "passed"}}) == {
        "stock": {"one": "passed", "two": "passed"},
        "off": {"one": "passed"},
        "thread": {"one": "passed"},
    }


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
