"""The command line, ``dcp-plugins``: one module or package per subcommand, gathered here.

A subcommand lives in ``dcp_plugins/cli/<name>.py`` (or a package of that name when it needs several files), defines a
click command and is added to ``main`` below.
"""

from __future__ import annotations

import importlib.metadata
import platform

import click
import torch

from dcp_plugins.cli.bench import bench
from dcp_plugins.cli.launch import launch

__all__ = ["main"]


def _show_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    try:
        version = importlib.metadata.version("dcp_plugins")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    click.echo(f"dcp-plugins {version}, torch {torch.__version__}, Python {platform.python_version()}")
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the versions of dcp-plugins, torch and Python, and exit.",
)
def main() -> None:
    """Work with distributed checkpoints of PyTorch from the command line."""


main.add_command(bench)
main.add_command(launch)
