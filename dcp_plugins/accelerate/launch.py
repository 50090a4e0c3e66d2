"""``python -m dcp_plugins.accelerate.launch``: Accelerate's launcher, with the section ``dcp`` in its YAML file.

It takes the arguments of ``accelerate launch``. The section is checked before anything starts, and reaches the workers
in their environment. One at the top level, which Accelerate would refuse, is left out of the file that it gets to read.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from accelerate.commands.launch import launch_command, launch_command_parser

from dcp_plugins.accelerate.plugin import SECTION, DCPPlugin, file_read_by, read_config, section_of, variable_of

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Launch a script as ``accelerate launch`` does; exits with a message if the section has a wrong name or value."""
    parsed = launch_command_parser().parse_args(sys.argv[1:] if arguments is None else list(arguments))
    file = file_read_by(parsed, Path())
    if file is None or not file.is_file():
        launch_command(parsed)  # which has its own opinion of a file that is missing
        return
    config = dict(read_config(file))
    try:
        section = section_of(config)
        DCPPlugin.from_mapping(section, where=f"section {SECTION!r} of {file}")
    except (TypeError, ValueError) as exc:
        sys.exit(f"dcp-plugins launch: {exc}")
    for name, value in section.items():
        # JSON is YAML, which the workers read. What the user has set in the environment goes before the file.
        os.environ.setdefault(variable_of(name), json.dumps(value))
    if config.pop(SECTION, None) is None:
        launch_command(parsed)
        return
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix="accelerate_", encoding="utf-8") as stripped:
        yaml.safe_dump(config, stripped)
        stripped.flush()
        parsed.config_file = stripped.name
        launch_command(parsed)


if __name__ == "__main__":
    main()
