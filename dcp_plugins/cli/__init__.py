"""The command line, ``dcp-plugins``: one module or package per subcommand, gathered here.

A subcommand lives in ``dcp_plugins/cli/<name>.py`` (or a package of that name when it needs several files), defines a
click command of its name and has a line in the table below.
"""

from __future__ import annotations

import importlib.metadata
import platform

import click

__all__ = ["main"]

# Each subcommand's module and its line in the list of subcommands, so that the list needs no torch.
_SUBCOMMANDS = {
    "bench": ("dcp_plugins.cli.bench", "Measure this package against stock torch."),
    "launch": ("dcp_plugins.cli.launch", "Launch a training script as Accelerate does."),
}


class _Subcommands(click.Group):
    """Subcommands that are imported when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _SUBCOMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(_SUBCOMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in sorted(_SUBCOMMANDS.items())])


def _show_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    try:
        version = importlib.metadata.version("dcp_plugins")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    import torch

    click.echo(f"dcp-plugins {version}, torch {torch.__version__}, Python {platform.python_version()}")
    context.exit()


@click.group(cls=_Subcommands, context_settings={"help_option_names": ["-h", "--help"]})
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
