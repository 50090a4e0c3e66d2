"""`DCPPlugin`: how checkpoints are saved, said in code, in the environment, or in Accelerate's YAML file.

What is said in code goes before the environment, and that before the file. ``accelerate launch`` reads the file and
hands on what it knows, as variables of the environment; further keys it accepts inside ``fsdp_config``, and drops them.
Workers therefore ask which file it was given: the launcher is their parent process, and its command line says it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser

from dcp_plugins.format.trust import SafeGlobal, check_safe_globals
from dcp_plugins.manager import (
    EveryMinutes,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLatest,
    KeepNewerThan,
    KeepPolicy,
    SaveOptions,
    SavePolicy,
)
from dcp_plugins.manager.options import check_amount, check_choice, check_count, check_flag
from dcp_plugins.manager.policies import Whenever
from dcp_plugins.manager.retention import Mode

__all__ = ["CONFIG_FILE_VARIABLE", "SECTION", "DCPPlugin", "file_read_by", "read_config", "section_of", "variable_of"]

SECTION = "dcp"
"""The section of the YAML file: inside ``fsdp_config``, where stock Accelerate tolerates it, or at the top level."""

CONFIG_FILE_VARIABLE = "DCP_PLUGINS_CONFIG_FILE"


InFlight = Literal["wait", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DCPPlugin(SaveOptions):
    """How ``save_state`` saves and ``load_state`` loads; the fields are also the keys of the YAML section.

    Raises:
        ValueError: A value is not one of those that are possible; names the field.
        TypeError: A value is of another type than its field.
    """

    save_every: int | None = None
    """Let only calls of ``save_state`` save whose number, counted from 1, this divides; the others do nothing."""
    save_every_minutes: float | None = None
    """Let a call of ``save_state`` save once so much time has passed since the last save, by the clock of the main
    process; and do nothing before, unless ``save_every`` says to."""
    in_flight: InFlight = "wait"
    """What a call of ``save_state`` does while a save in the background is still being written: "wait" for it, or
    "skip", which is to do nothing."""
    keep_every: int | None = None
    """With automatic checkpoint naming and a ``total_limit``: keep, beyond the limit, each checkpoint whose number is a
    multiple of this."""
    keep_newer_than_hours: float | None = None
    """With automatic checkpoint naming and a ``total_limit``: keep, beyond the limit, what was saved less long ago."""
    keep_best_metric: str | None = None
    """With automatic checkpoint naming and a ``total_limit``: keep, beyond the limit, the checkpoint with the best
    value of this one of the ``metrics`` that ``save_state`` was given."""
    keep_best_mode: Mode = "min"
    """Whether the least or the greatest value is the best: "min" or "max"."""
    keep_best: int = 1
    """How many of the best."""
    weights_only: bool = True
    """Whether the states of schedulers, data loaders, scaler and registered objects load as plain data only. False
    unpickles them, which can run code: for checkpoints that you trust."""
    safe_globals: tuple[SafeGlobal, ...] = ()
    """Classes of yours that these states may have all the same, beside those of
    ``torch.serialization.add_safe_globals``. In code only: a YAML file or a variable has no classes."""

    def __post_init__(self) -> None:
        # Without arguments, super() would look for the class that the decorator has replaced.
        SaveOptions.__post_init__(self)
        check_flag("weights_only", self.weights_only)
        check_safe_globals(self.safe_globals)
        check_count("save_every", self.save_every)
        check_amount("save_every_minutes", self.save_every_minutes)
        check_count("keep_every", self.keep_every)
        check_amount("keep_newer_than_hours", self.keep_newer_than_hours)
        check_count("keep_best", self.keep_best, or_none=False)
        check_choice("in_flight", self.in_flight, get_args(InFlight))
        check_choice("keep_best_mode", self.keep_best_mode, get_args(Mode))
        if self.keep_best_metric is not None and not isinstance(self.keep_best_metric, str):
            raise TypeError(f"keep_best_metric must be a metric's name or None, got {self.keep_best_metric!r}")

    @property
    def save_policy(self) -> SavePolicy:
        """At which calls of ``save_state`` to save, by their number."""
        policies: list[SavePolicy] = []
        if self.save_every is not None:
            policies.append(EverySteps(self.save_every))
        if self.save_every_minutes is not None:
            policies.append(EveryMinutes(self.save_every_minutes))
        return functools.reduce(operator.or_, policies) if policies else Whenever()

    def keep_policy(self, total_limit: int | None) -> KeepPolicy | None:
        """Return what to keep of the checkpoints that are named automatically; None keeps all."""
        if total_limit is None:
            return None
        policy: KeepPolicy = KeepLatest(max(1, total_limit))
        if self.keep_every is not None:
            policy |= KeepEvery(self.keep_every)
        if self.keep_newer_than_hours is not None:
            policy |= KeepNewerThan(timedelta(hours=self.keep_newer_than_hours))
        if self.keep_best_metric is not None:
            policy |= KeepBest(self.keep_best, self.keep_best_metric, self.keep_best_mode)
        return policy

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, where: str) -> DCPPlugin:
        """Make options of what a configuration says; see ``SaveOptions.from_mapping``."""
        # The base makes an instance of the class it is called on.
        plugin = super(DCPPlugin, cls).from_mapping(mapping, where=where)
        assert isinstance(plugin, DCPPlugin)
        return plugin

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> DCPPlugin:
        """Make options of the section in a YAML file of Accelerate; the defaults if it has none."""
        return cls.from_mapping(section_of(read_config(Path(path))), where=f"section {SECTION!r} of {os.fspath(path)}")

    @classmethod
    def from_launch(cls) -> DCPPlugin:
        """Make options of what this process was launched with: the environment, and the file the launcher was given.

        The file is the one that ``DCP_PLUGINS_CONFIG_FILE`` names, or that of ``--config_file`` in the command line of
        the ``accelerate launch`` which started this process, or Accelerate's default file if it was given none. Command
        lines of other processes can be read on Linux only.
        """
        options: dict[str, Any] = {}
        file = launchers_file()
        if file is not None:
            options.update(section_of(read_config(file)))
            cls.from_mapping(options, where=f"section {SECTION!r} of {file}")
        for field in dataclasses.fields(cls):
            text = os.environ.get(variable_of(field.name))
            if text is not None:
                said = section_of({SECTION: {field.name: yaml.safe_load(text)}})
                cls.from_mapping(said, where=f"environment variable {variable_of(field.name)}")
                options.update(said)
        return cls(**options)


def variable_of(field: str) -> str:
    """Name the environment variable of a field."""
    return f"DCP_PLUGINS_{field.upper()}"


def section_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our section of a configuration that was read from Accelerate's YAML file.

    Raises:
        ValueError: There are two sections, or one that is no mapping.
    """
    inside = config.get("fsdp_config") or {}
    found = [place[SECTION] for place in (config, inside) if isinstance(place, Mapping) and SECTION in place]
    if len(found) > 1:
        raise ValueError(f"expected one section {SECTION!r}, found one at the top level and one inside fsdp_config")
    section = found[0] if found else None
    if section is None:
        return {}
    # YAML 1.1 reads a bare `off` as false.
    if isinstance(section, Mapping):
        return {key: "off" if key == "asynchronous" and value is False else value for key, value in section.items()}
    raise ValueError(f"expected the section {SECTION!r} to hold names and values, found {section!r}")


def launchers_file() -> Path | None:
    """Return the YAML file that the launcher of this process reads, or None if no Accelerate launcher can be seen."""
    named = os.environ.get(CONFIG_FILE_VARIABLE)
    if named:
        return Path(named)
    for arguments, folder in _ancestors():
        launch = _launch_arguments(arguments)
        if launch is not None:
            parsed, _ = launch_command_parser().parse_known_args(launch)
            return file_read_by(parsed, folder)
    return None


def file_read_by(parsed: Namespace, folder: Path) -> Path | None:
    """Return the file that ``accelerate launch`` with these arguments, called in a directory, reads; None if none."""
    if parsed.config_file is not None:
        return folder / Path(parsed.config_file)
    default = Path(default_config_file)
    return default if default.is_file() and not parsed.cpu else None


def _launch_arguments(arguments: list[str]) -> list[str] | None:
    """Return what a command line hands to ``accelerate launch``; None if it is another program's."""
    for position, argument in enumerate(arguments[:4]):
        name = os.path.basename(argument)
        is_module = position > 0 and arguments[position - 1] == "-m"
        if name == "accelerate-launch" or (is_module and name == "accelerate.commands.launch"):
            return arguments[position + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and arguments[position + 1 :][:1] == ["launch"]:
            return arguments[position + 2 :]
        if name == "launch.py" and "accelerate" in Path(argument).parts:
            return arguments[position + 1 :]
    return None


def _ancestors() -> Iterator[tuple[list[str], Path]]:
    """Yield command line and working directory of this process's ancestors, as far as they can be read."""
    process = os.getppid()
    while process > 1:
        entry = Path(f"/proc/{process}")
        try:
            arguments = (entry / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
            folder = (entry / "cwd").readlink()
            status = (entry / "status").read_text()
        except OSError:
            return
        yield arguments, folder
        process = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))


def read_config(path: Path) -> Mapping[str, Any]:
    """Return what a configuration file of Accelerate says, YAML or JSON; an empty one says nothing."""
    with path.open(encoding="utf-8") as stream:
        config = yaml.safe_load(stream)
    return config if isinstance(config, Mapping) else {}
