"""DDP whose processes are forked or spawned by Lightning, as in notebooks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import run_program

PROGRAM = """
import sys
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from dcp_plugins.lightning import DCPDDPStrategy, is_committed
from tests.adapters.lightning.trainers import Regression, Ticks, digest, trainer

if __name__ == "__main__":
    method, folder = sys.argv[1], Path(sys.argv[2])
    strategy = DCPDDPStrategy(start_method=method, process_group_backend="gloo", asynchronous=method == "fork")
    module, before = Regression(), digest(Regression().state_dict())
    runner = trainer(strategy, devices=2, steps=2, callbacks=[ModelCheckpoint(folder, "a")])
    runner.fit(module, Ticks(2))
    assert is_committed(folder / "a.ckpt")
    assert runner.checkpoint_callback.best_model_path == str(folder / "a.ckpt")
    after = digest(module.state_dict())
    assert after != before, "the main process gets the weights that its children have trained"
    assert digest(Regression.load_from_checkpoint(folder / "a.ckpt").state_dict()) == after
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_launcher_hands_the_trained_weights_to_the_main_process(tmp_path: Path, method: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = run_program(program, method, str(tmp_path / "run"), folder=tmp_path, warn="ignore")
    assert done.returncode == 0, done.stderr
