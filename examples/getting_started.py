"""Save a model and its optimizer, change them, and load them back.

    python examples/getting_started.py [directory]

The same calls work unchanged on many ranks: see fsdp2_resharding.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import dcp_plugins as dcp


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(torch.randn(16, 32)).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def main(folder: Path) -> None:
    checkpoint_id = folder / "step-3"
    model, optimizer = make()
    for _ in range(3):
        train_step(model, optimizer)

    # Anything with state_dict() and load_state_dict() is asked for its state. Plain values are saved as they are.
    dcp.save({"model": model, "optimizer": optimizer, "progress": {"step": 3}}, checkpoint_id=checkpoint_id)
    print(f"saved {checkpoint_id}: {', '.join(sorted(path.name for path in checkpoint_id.iterdir()))}")

    # A new process would start here: new objects, other weights.
    restored_model, restored_optimizer = make()
    train_step(restored_model, restored_optimizer)  # gives the optimizer the state that the load fills
    progress = {"step": 0}
    dcp.load(
        {"model": restored_model, "optimizer": restored_optimizer, "progress": progress}, checkpoint_id=checkpoint_id
    )

    assert progress["step"] == 3
    saved, restored = model.state_dict(), restored_model.state_dict()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)

    # From here on both runs do the same, bit for bit.
    torch.manual_seed(0)
    loss = train_step(model, optimizer)
    torch.manual_seed(0)
    assert train_step(restored_model, restored_optimizer) == loss
    print(f"loaded at step {progress['step']}; the next loss is {loss:.6f} in both runs")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
