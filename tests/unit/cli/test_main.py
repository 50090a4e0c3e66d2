"""The command line itself."""

from __future__ import annotations

from pathlib import Path

import torch
from click.testing import CliRunner

from dcp_plugins.cli import main
from tests.programs import run_program

ROOT = Path(__file__).resolve().parents[3]


def test_version_names_the_package_and_torch():
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("dcp-plugins ")
    assert f"torch {torch.__version__}" in result.stdout


def test_help_lists_the_subcommands():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "bench" in result.stdout


def test_the_module_runs_as_the_console_script_does(tmp_path):
    # Neither the disk nor what Python collects beside the case is the point.
    quick = ["--scale", "0.0005", "--repeat", "1", "--no-sync", "--no-gc"]
    arguments = ["bench", "small", *quick, "--path", str(tmp_path)]
    result = run_program(ROOT / "dcp_plugins" / "cli" / "__main__.py", *arguments, folder=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("small: 10 tensors")
    assert "warm-up" in result.stderr
    assert "warm-up" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_subcommand_is_a_usage_error():
    result = CliRunner().invoke(main, ["nonsense"])
    assert result.exit_code == 2
