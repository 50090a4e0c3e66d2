"""Pushing to the hub: what is uploaded is committed, and loads on the other side."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from transformers import GPT2LMHeadModel

from dcp_plugins.manager import verify_checkpoint
from dcp_plugins.transformers import DCPCallback
from tests.adapters.transformers import hub
from tests.adapters.transformers.trainers import Quiet, digest, trainer

ROOT = Path(__file__).parents[3]


def test_checkpoints_are_pushed_whole_with_weights_that_from_pretrained_loads(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with hub.hub() as server:
        environment |= {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, hub.__file__, str(tmp_path / "run")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.unknown}"
    assert "Training in progress, step 2" in server.messages
    for name, content in server.files.items():
        path = tmp_path / "pushed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for step in (2, 4):
        verify_checkpoint(tmp_path / "pushed" / f"checkpoint-{step}")
    newest = digest(GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "checkpoint-4"))
    assert digest(GPT2LMHeadModel.from_pretrained(tmp_path / "pushed")) == newest
    assert digest(GPT2LMHeadModel.from_pretrained(tmp_path / "pushed" / "checkpoint-4")) == newest


class Pushing(Quiet):
    """Notes what is in its directory when a push begins; the upload itself is not made."""

    seen: list[list[str]]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.seen.append(sorted(path.name for path in Path(checkpoint_folder).parent.glob("checkpoint-*")))


def test_no_checkpoint_is_deleted_while_the_upload_lists_the_directory(tmp_path: Path) -> None:
    runner = trainer(tmp_path, DCPCallback(asynchronous="thread"), kind=Pushing, max_steps=4, save_total_limit=1)
    assert isinstance(runner, Pushing)
    runner.seen = []
    # Set here: the constructor would ask the hub.
    runner.args.push_to_hub = True
    runner.train()
    assert runner.seen == [["checkpoint-2"], ["checkpoint-4"]]
