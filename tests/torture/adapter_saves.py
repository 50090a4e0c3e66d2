"""Saves of the three adapters, for the campaigns on system calls."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointNotFoundError
from tests.torture.scenario import Scenario, unnamed

__all__ = ["ADAPTERS"]

# Frameworks are imported by the ranks that use them, not by every rank of a campaign.


def _weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(3, 5, generator=generator), "bias": torch.randn(3, generator=generator)}


def _stepped(model: torch.nn.Module, optimizer: Any, seed: int) -> None:
    """Give model and optimizer the state that belongs to a seed."""
    model.load_state_dict(_weights(seed))
    generator = torch.Generator().manual_seed(100 + seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def _fresh(seed: int | None = None) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    if seed is not None:
        _stepped(model, optimizer, seed)
    return model, optimizer


def _same(model: torch.nn.Module, optimizer: Any, seed: int) -> None:
    expected_model, expected_optimizer = _fresh(seed)
    for name, value in expected_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    found, expected = optimizer.state_dict()["state"], expected_optimizer.state_dict()["state"]
    assert found.keys() == expected.keys()
    for number, state in expected.items():
        for slot, value in state.items():
            assert torch.equal(torch.as_tensor(found[number][slot]), torch.as_tensor(value)), (number, slot)


# Lightning: Fabric's save is the strategy's, as the Trainer's is.


def _fabric() -> Any:
    import logging

    from lightning.fabric import Fabric

    import dcp_plugins.lightning  # noqa: F401  registers the flags

    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    fabric = Fabric(accelerator="cpu", strategy="dcp_ddp", devices=1)
    fabric.launch()
    return fabric


def _save_by_fabric(folder: Path, seed: int) -> None:
    fabric = _fabric()
    model, optimizer = fabric.setup(*_fresh(seed))
    fabric.save(folder, {"model": model, "optimizer": optimizer, "epoch": seed})


def _held_by_fabric(folder: Path) -> int | None:
    fabric = _fabric()
    model, optimizer = fabric.setup(*_fresh())
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    try:
        fabric.load(folder, state)
    except (dcp.CheckpointException, CheckpointNotFoundError, FileNotFoundError) as exc:
        if _says_that_there_is_none(exc):
            return None
        raise
    seed = int(state["epoch"])
    _same(model.module, optimizer.optimizer, seed)
    return seed


def _says_that_there_is_none(exc: Exception) -> bool:
    if isinstance(exc, dcp.CheckpointException):
        return any(isinstance(cause, CheckpointNotFoundError) for cause, _ in exc.failures.values())
    return True


def _litter_of_fabric(folder: Path) -> set[str]:
    return unnamed(folder, "meta.pt")


# Lightning's Trainer.


def _trainer(folder: Path) -> tuple[Any, Any]:
    import logging
    import warnings

    import lightning.pytorch as pl

    from tests.adapters.lightning.trainers import Regression, Ticks

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="dcp_ddp",
        devices=1,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder.parent,
    )
    return trainer, (Regression(), Ticks(20))


def _save_by_trainer(folder: Path, seed: int) -> None:
    trainer, (module, data) = _trainer(folder)
    trainer.fit(module, data)
    _set_all(module.net, seed)
    module.hparams["seed"] = seed
    trainer.save_checkpoint(folder)


def _set_all(net: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def _held_by_trainer(folder: Path) -> int | None:
    from tests.adapters.lightning.trainers import Regression

    trainer, (module, data) = _trainer(folder)
    try:
        trainer.fit(module, data, ckpt_path=folder)
    except (dcp.CheckpointException, FileNotFoundError, ValueError) as exc:
        if not (folder / ".metadata").exists():
            return None
        raise exc
    for seed in range(20):
        expected = Regression().net
        _set_all(expected, seed)
        same = [torch.equal(*pair) for pair in zip(module.net.parameters(), expected.parameters(), strict=True)]
        if all(same):
            return seed
        assert not any(same), "weights of two checkpoints"
    raise AssertionError("weights of no checkpoint")


# Accelerate.


def _save_by_accelerate(folder: Path, seed: int) -> None:
    from tests.adapters.accelerate.trainers import run

    one = run("plain")
    one.counter.counted = seed
    one.train(1)
    one.accelerator.save_state(folder)


def _held_by_accelerate(folder: Path) -> int | None:
    from tests.adapters.accelerate.trainers import run

    if not folder.exists():
        return None
    one = run("plain", seed=5)
    try:
        one.accelerator.load_state(folder)
    except (dcp.CheckpointException, CheckpointNotFoundError) as exc:
        if _says_that_there_is_none(exc):
            return None
        raise
    seed = one.counter.counted - 1
    expected = run("plain", plugin=None)
    expected.counter.counted = seed
    expected.train(1)
    found = one.whole_state()
    for name, value in expected.whole_state().items():
        assert torch.equal(found[name], value), name
    return seed


def _litter_of_accelerate(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if name.endswith((".tmp", ".new", ".replaced"))}


# The HF Trainer.

_MOST_STEPS = 20


def _fit(folder: Path, last: int, *callbacks: Any, **options: Any) -> Any:
    from tests.adapters.transformers.trainers import StopAt, fit

    return fit(folder, StopAt(last), *callbacks, max_steps=_MOST_STEPS, warmup_steps=0, **options)


def _save_by_callback(folder: Path, seed: int) -> None:
    """Train to the seed's step; each step saves a checkpoint, and the newest two are kept."""
    from dcp_plugins.transformers import DCPCallback, last_checkpoint

    last = last_checkpoint(folder)
    _fit(folder, seed, DCPCallback(), resume=last, save_steps=1, save_total_limit=2)


def _held_by_callback(folder: Path) -> int | None:
    from dcp_plugins.transformers import DCPCallback, last_checkpoint
    from tests.adapters.transformers.trainers import Digests

    newest = last_checkpoint(folder)
    if newest is None:
        return None
    step = int(str(newest).rsplit("-", 1)[1])
    resumed, expected = Digests(), Digests()
    # Elsewhere: faults are to meet the checkpoint, not what these runs write.
    with tempfile.TemporaryDirectory() as elsewhere:
        straight = Path(elsewhere)
        _fit(straight, step, DCPCallback(), resumed, resume=newest, save_strategy="no")
        _fit(straight, step + 1, expected, save_strategy="steps", save_steps=step)
    for name, digest in expected.at[step].items():
        assert resumed.begun_with[name] == digest, name
    return step


def _litter_of_callback(folder: Path) -> set[str]:
    from dcp_plugins.manager import is_committed

    found = set(os.listdir(folder))
    whole = {name for name in found if name.startswith("checkpoint-") and is_committed(folder / name)}
    assert len(whole) <= 2, f"kept are {whole}"
    return found - whole - {"trainer_state.json", "README.md", "runs"}


ADAPTERS = (
    Scenario(
        "fabric", _save_by_fabric, _held_by_fabric, _litter_of_fabric, is_slow=True, modules=("lightning.fabric",)
    ),
    Scenario(
        "lightning",
        _save_by_trainer,
        _held_by_trainer,
        _litter_of_fabric,
        is_slow=True,
        modules=("lightning.pytorch", "tests.adapters.lightning.trainers"),
    ),
    Scenario(
        "accelerate",
        _save_by_accelerate,
        _held_by_accelerate,
        _litter_of_accelerate,
        is_slow=True,
        modules=("accelerate", "tests.adapters.accelerate.trainers"),
    ),
    Scenario(
        "trainer",
        _save_by_callback,
        _held_by_callback,
        _litter_of_callback,
        numbered=True,
        is_slow=True,
        modules=("transformers", "tests.adapters.transformers.trainers"),
    ),
)
