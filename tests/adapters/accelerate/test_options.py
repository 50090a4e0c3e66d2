"""Where options come from: code, environment, Accelerate's YAML file; and what is wrong in them is said."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from dcp_plugins.accelerate import DCPPlugin, launch, plugin
from dcp_plugins.manager import EveryMinutes, EverySteps, KeepBest, KeepEvery, KeepLatest, KeepNewerThan
from tests.programs import run_program

ROOT = Path(__file__).parents[3]

# As `accelerate config` writes it.
STOCK: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "FSDP",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "fsdp_config": {"fsdp_version": 2, "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_offload_params": False},
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "bf16",
    "num_machines": 1,
    "num_processes": 8,
    "rdzv_backend": "static",
    "same_network": True,
    "use_cpu": False,
}


def write(path: Path, *, inside: Any = None, top: Any = None) -> Path:
    config = {**STOCK, "fsdp_config": dict(STOCK["fsdp_config"])}
    if inside is not None:
        config["fsdp_config"]["dcp"] = inside
    if top is not None:
        config["dcp"] = top
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(autouse=True)
def _launched_with_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plugin, "_ancestors", lambda: iter(()))
    for name in [name for name in os.environ if name.startswith("DCP_PLUGINS_")]:
        monkeypatch.delenv(name)


def test_the_section_is_read_in_either_place_and_stock_accepts_the_inner_one(tmp_path: Path) -> None:
    options = {"asynchronous": "process", "thread_count": 3, "sync_files": False, "keep_every": 10}
    inner, outer = write(tmp_path / "a.yaml", inside=options), write(tmp_path / "b.yaml", top=options)
    assert DCPPlugin.from_file(inner) == DCPPlugin.from_file(outer) == DCPPlugin(**options)
    assert load_config_from_file(str(inner)).num_processes == 8
    with pytest.raises(ValueError, match="unknown keys"):
        load_config_from_file(str(outer))
    assert DCPPlugin.from_file(write(tmp_path / "c.yaml")) == DCPPlugin()
    (tmp_path / "off.yaml").write_text("dcp:\n  asynchronous: off\n")
    assert DCPPlugin.from_file(tmp_path / "off.yaml").asynchronous == "off", "which YAML reads as false"
    (tmp_path / "empty.yaml").write_text("")
    assert DCPPlugin.from_file(tmp_path / "empty.yaml") == DCPPlugin()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"async": "thread"}, r"section 'dcp' of .*x\.yaml: unknown option\(s\) async. Valid names: asynchronous, "),
        ({"asynchronous": "yes"}, r"x\.yaml: asynchronous must be one of off, process, thread, got 'yes'"),
        ({"thread_count": 0}, "thread_count must be at least 1"),
        ({"keep_every": 0}, "keep_every must be at least 1"),
        ({"keep_newer_than_hours": -1}, "keep_newer_than_hours must be more than 0"),
        ({"save_every_minutes": 0}, "save_every_minutes must be more than 0"),
        ({"in_flight": "queue"}, "in_flight must be one of skip, wait, got 'queue'"),
        ({"keep_best_mode": "least"}, "keep_best_mode must be one of max, min, got 'least'"),
        ([1], "to hold names and values"),
    ],
)
def test_a_wrong_section_is_refused_with_the_valid_names(tmp_path: Path, section: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DCPPlugin.from_file(write(tmp_path / "x.yaml", inside=section))


@pytest.mark.parametrize(
    "option",
    [
        "weights_only",
        "save_every",
        "save_every_minutes",
        "keep_every",
        "keep_newer_than_hours",
        "keep_best",
        "sync_files",
    ],
)
def test_a_value_of_another_type_is_refused(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} must be"):
        DCPPlugin(**{option: "three"})


def test_two_sections_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found one at the top level and one inside fsdp_config"):
        DCPPlugin.from_file(write(tmp_path / "x.yaml", inside={}, top={}))


def test_the_environment_goes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DCPPlugin.from_launch() == DCPPlugin()
    path = write(tmp_path / "a.yaml", inside={"asynchronous": "thread", "thread_count": 3})
    monkeypatch.setenv(plugin.CONFIG_FILE_VARIABLE, str(path))
    assert DCPPlugin.from_launch() == DCPPlugin(asynchronous="thread", thread_count=3)
    monkeypatch.setenv("DCP_PLUGINS_ASYNCHRONOUS", "off")
    monkeypatch.setenv("DCP_PLUGINS_SYNC_FILES", "false")
    assert DCPPlugin.from_launch() == DCPPlugin(thread_count=3, sync_files=False)
    monkeypatch.setenv("DCP_PLUGINS_THREAD_COUNT", "many")
    with pytest.raises(TypeError, match="environment variable DCP_PLUGINS_THREAD_COUNT: thread_count must be a number"):
        DCPPlugin.from_launch()


@pytest.mark.parametrize(
    "command",
    [
        "python /env/bin/accelerate launch --num_processes 2 --config_file a.yaml train.py --config_file b.yaml",
        "/env/bin/accelerate-launch --config-file=a.yaml train.py",
        "python -u -m accelerate.commands.launch --config_file a.yaml -m package.train",
        "python -m accelerate.commands.accelerate_cli launch --config_file a.yaml train.py",
        "python /site-packages/accelerate/commands/launch.py --config_file a.yaml train.py",
    ],
)
def test_the_launchers_file_is_found_in_its_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    write(tmp_path / "a.yaml", inside={"thread_count": 3})
    others = [(["numactl", "python", "train.py"], Path("/"))]
    monkeypatch.setattr(plugin, "_ancestors", lambda: iter([*others, (command.split(), tmp_path)]))
    assert DCPPlugin.from_launch() == DCPPlugin(thread_count=3)


def test_without_a_file_of_its_own_the_launcher_reads_the_default_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = write(tmp_path / "default_config.yaml", inside={"thread_count": 3})
    monkeypatch.setattr(plugin, "default_config_file", str(default))
    monkeypatch.setattr(plugin, "_ancestors", lambda: iter([(["accelerate", "launch", "train.py"], tmp_path)]))
    assert DCPPlugin.from_launch() == DCPPlugin(thread_count=3)
    monkeypatch.setattr(plugin, "_ancestors", lambda: iter([(["python", "train.py"], tmp_path)]))
    assert DCPPlugin.from_launch() == DCPPlugin(), "a script that nothing launched reads no file"


def test_the_launchers_take_no_default_file_with_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = write(tmp_path / "default_config.yaml", top={"thread_count": 3})
    monkeypatch.setattr(plugin, "default_config_file", str(default))
    launched: list[Any] = []
    monkeypatch.setattr(launch, "launch_command", launched.append)
    launch.main(["--cpu", "train.py"])
    assert launched[0].config_file is None
    assert plugin.variable_of("thread_count") not in os.environ
    monkeypatch.setattr(plugin, "_ancestors", lambda: iter([(["accelerate", "launch", "--cpu", "train.py"], tmp_path)]))
    assert DCPPlugin.from_launch() == DCPPlugin()


def test_the_limit_is_accelerates_and_what_goes_beyond_it_ours() -> None:
    options = DCPPlugin(keep_every=5, keep_newer_than_hours=1.5, keep_best_metric="score", keep_best_mode="max")
    assert options.keep_policy(None) is None
    policy: Any = options.keep_policy(3)
    assert [type(member) for member in policy.members] == [KeepLatest, KeepEvery, KeepNewerThan, KeepBest]
    assert policy.members[-1] == KeepBest(1, "score", "max")
    assert DCPPlugin().keep_policy(0) == KeepLatest(1), "the newest is always kept"


def test_when_to_save_is_a_union_of_policies_over_the_calls() -> None:
    policy: Any = DCPPlugin(save_every=3, save_every_minutes=10).save_policy
    assert policy.members == (EverySteps(3), EveryMinutes(10))
    assert DCPPlugin(save_every=3).save_policy == EverySteps(3)
    assert DCPPlugin().save_policy.is_due(1, 0.0)


def test_our_launcher_refuses_a_wrong_name_before_it_starts_anything(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", top={"threads": 2})
    arguments = ["launch", "--config_file", str(path), "no-such-script.py"]
    done = run_program(ROOT / "dcp_plugins" / "cli" / "__main__.py", *arguments, folder=tmp_path)
    assert done.returncode == 1
    assert "unknown option(s) threads. Valid names: asynchronous, in_flight, keep_best, " in done.stderr
    assert "Traceback" not in done.stderr
