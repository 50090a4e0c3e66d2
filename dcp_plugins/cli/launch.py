"""``dcp-plugins launch``: Accelerate's launcher, for YAML files with a section ``dcp``."""

from __future__ import annotations

import importlib.util
import os
import sys

import click

__all__ = ["launch"]


# Click keeps the lines of a paragraph that begins with a backspace.
_HELP = """Launch a training script as `accelerate launch` does, with checkpoints configured in the same YAML file.

The file may have a section `dcp`, with the fields of dcp_plugins.accelerate.DCPPlugin. It is checked before anything
starts, and reaches every worker:

\b
  dcp:
    asynchronous: thread    # off, thread or process
    thread_count: 4
    sync_files: true

All options are those of `accelerate launch`: see `accelerate launch --help`.
"""


@click.command(
    help=_HELP,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[OPTIONS OF accelerate launch]",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARGUMENTS]...")
def launch(arguments: tuple[str, ...]) -> None:
    """Become Accelerate's launcher."""
    if importlib.util.find_spec("accelerate") is None:
        raise click.ClickException("launch needs Accelerate. Install it with: pip install 'dcp_plugins[accelerate]'")
    # The adapter is no module of this floor; and the launcher that replaces this process gets its signals itself.
    os.execv(sys.executable, [sys.executable, "-m", "dcp_plugins.accelerate.launch", *arguments])  # noqa: S606
