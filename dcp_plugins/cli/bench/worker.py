"""The entry of the benchmark's own processes: reads its request from the command line, leaves its answer in a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dcp_plugins.cli.bench import async_saves, fsdp2, memory, state_dict

__all__: list[str] = []

_TASKS: dict[str, Callable[[dict[str, Any], str | None], dict[str, Any]]] = {
    "async": async_saves.run_state,
    "async-few-files": async_saves.run_few_files,
    "fsdp2": fsdp2.run_rank,
    "memory": memory.run_child,
    "state-dict": state_dict.run_rank,
}


def _main() -> None:
    request = json.loads(sys.argv[1])
    try:
        answer = _TASKS[request["task"]](request["arguments"], request["store"])
    except click.ClickException as exc:
        # A failure meant for the user is one line, not a traceback.
        raise SystemExit(f"Error: {exc.format_message()}") from exc
    if os.environ["RANK"] == "0":
        Path(request["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    _main()
