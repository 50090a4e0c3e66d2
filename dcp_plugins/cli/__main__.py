"""Runs ``dcp-plugins`` as ``python -m dcp_plugins.cli``."""

from __future__ import annotations

from dcp_plugins.cli import main

if __name__ == "__main__":
    main(prog_name="dcp-plugins")
