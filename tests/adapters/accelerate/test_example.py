"""The example under the real launchers: killed in mid-save, and gone on with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dcp_plugins.accelerate import newest_checkpoint
from dcp_plugins.manager import is_committed

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "accelerate_train.py"
CONFIG = ROOT / "examples" / "accelerate_cpu.yaml"
STOCK = [sys.executable, "-m", "accelerate.commands.launch"]
OURS = [sys.executable, "-m", "dcp_plugins.cli", "launch"]

# Python runs a module of this name at its start: here in the second process, which dies when it has written a part of
# the checkpoint of step 12 and not the rest.
SITECUSTOMIZE = """
import os, signal

if os.environ.get("RANK") == "1":
    from dcp_plugins.storage import FileSystemWriter

    write = FileSystemWriter._write_runs

    def write_or_die(writer, runs, *args):
        if writer.path.name == "step_12" and runs[0].items[0].index.fqn.startswith("pytorch_model"):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(writer, runs, *args)

    FileSystemWriter._write_runs = write_or_die
"""


def start(launcher: list[str], folder: Path, *options: str, python_path: str = "") -> subprocess.Popen[str]:
    command = [*launcher, str(SCRIPT), "--cpu", "--output_dir", str(folder), "--num_epochs", "2"]
    command += ["--num_samples", "144", "--checkpointing_steps", "6", *options]
    environment = os.environ | {
        "PYTHONPATH": f"{python_path}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def losses(process: subprocess.Popen[str], *, succeeds: bool = True) -> dict[int, float]:
    output, errors = process.communicate(timeout=200)
    assert (process.returncode == 0) is succeeds, output + errors
    found = {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss (\S+)", output)}
    if succeeds:
        assert max(found) == 18, output + errors
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_example_goes_on_from_a_kill_in_mid_save_as_if_it_had_not_been(tmp_path: Path) -> None:
    stock = [*STOCK, "--config_file", str(CONFIG)]
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    whole = start(stock, tmp_path / "whole")
    killed = start(stock, tmp_path / "killed", python_path=str(tmp_path))
    expected = losses(whole)
    before = losses(killed, succeeds=False)
    assert before == {step: loss for step, loss in expected.items() if step in before}
    assert max(before) >= 12
    assert any((tmp_path / "killed" / "step_12").rglob("*.distcp")), "it was killed in mid-save"
    assert not is_committed(tmp_path / "killed" / "step_12")
    assert newest_checkpoint(tmp_path / "killed") == tmp_path / "killed" / "step_6"

    # The same file, with our section where only our launcher takes it, and other options in it.
    config = yaml.safe_load(CONFIG.read_text())
    config["dcp"] = config.pop("fsdp_config")["dcp"] | {"asynchronous": "off", "thread_count": 2}
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(config))
    options = ["--config_file", str(tmp_path / "ours.yaml")]
    resume = ["--resume_from_checkpoint", "newest"]
    again = losses(start([*OURS, *options], tmp_path / "killed", *resume))
    assert again == {step: loss for step, loss in expected.items() if step > 6}, "bit for bit"
    weights = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    for name, value in load_file(tmp_path / "killed" / "final" / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name
    assert is_committed(tmp_path / "killed" / "step_12")
    assert is_committed(tmp_path / "killed" / "step_18")
