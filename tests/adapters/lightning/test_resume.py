"""A run saved under one flag goes on under any other, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.trainers import Regression, Ticks, TwoOptimizers, digest, fit, trainer, whole_state

Outcome = tuple[dict[int, float], dict[str, str]]


def save_then_go_on(
    strategy: str, ranks: int, path: Path, module: type[Regression], steps: int, options: dict[str, Any]
) -> Outcome:
    """Train, save, and train on without a break: what a resumed run has to repeat."""
    saved = whole_state(fit(strategy, devices=ranks, steps=steps, save_to=path, module=module(), **options))
    return fit(strategy, devices=ranks, steps=2 * steps, module=module(), **options).losses, saved


def resume(
    strategy: str, ranks: int, path: Path, module: type[Regression], steps: int, options: dict[str, Any]
) -> Outcome:
    loaded = whole_state(fit(strategy, devices=ranks, steps=steps, resume=path, module=module(), **options))
    return fit(strategy, devices=ranks, steps=2 * steps, resume=path, module=module(), **options).losses, loaded


def check(
    saved_under: tuple[str, int],
    resumed_under: list[tuple[str, int]],
    path: Path,
    module: type[Regression] = Regression,
    steps: int = 3,
    tolerance: float = 1e-5,
    **options: Any,
) -> None:
    strategy, ranks = saved_under
    whole, saved = run_ranks(ranks, save_then_go_on, strategy, ranks, path, module, steps, options)[0]
    assert saved
    for strategy, ranks in resumed_under:
        for losses, loaded in run_ranks(ranks, resume, strategy, ranks, path, module, steps, options):
            assert loaded == saved, f"{strategy} on {ranks} ranks did not load the bits that were saved"
            assert losses
            rest = {step: whole[step] for step in losses}
            if (strategy, ranks) == saved_under:
                assert losses == rest
            else:
                assert losses == pytest.approx(rest, rel=tolerance)


def test_a_run_under_ddp_resumes_under_every_flag(tmp_path: Path) -> None:
    check(("dcp_ddp", 2), [("dcp_ddp", 2), ("dcp_fsdp", 2), ("dcp_fsdp2", 2), ("dcp", 1)], tmp_path / "a.ckpt")


def test_a_run_under_fsdp1_resumes_under_every_flag(tmp_path: Path) -> None:
    check(("dcp_fsdp", 2), [("dcp_fsdp", 2), ("dcp_fsdp2", 2), ("dcp_ddp", 2), ("dcp", 1)], tmp_path / "a.ckpt")


def test_a_run_under_fsdp1_resumes_on_1_and_4_ranks(tmp_path: Path) -> None:
    check(("dcp_fsdp", 2), [("dcp_fsdp", 1), ("dcp_fsdp", 4)], tmp_path / "a.ckpt")


def test_a_run_under_fsdp2_resumes_under_fsdp1(tmp_path: Path) -> None:
    check(("dcp_fsdp2", 2), [("dcp_fsdp", 2)], tmp_path / "a.ckpt")


def test_a_run_under_fsdp2_resumes_on_1_2_and_4_ranks(tmp_path: Path) -> None:
    check(("dcp_fsdp2", 2), [("dcp_fsdp2", 1), ("dcp_fsdp2", 2), ("dcp_fsdp2", 4)], tmp_path / "a.ckpt")


def test_a_run_on_one_device_resumes_on_several(tmp_path: Path) -> None:
    check(("dcp", 1), [("dcp", 1), ("dcp_fsdp", 2), ("dcp_fsdp2", 2)], tmp_path / "a.ckpt")


SHARDED = pytest.mark.parametrize("strategy", ["dcp_fsdp", "dcp_fsdp2"])


@SHARDED
def test_several_optimizers_resume_each_with_its_own_state(tmp_path: Path, strategy: str) -> None:
    check((strategy, 2), [(strategy, 2), ("dcp_ddp", 2)], tmp_path / "a.ckpt", module=TwoOptimizers, steps=4)


@SHARDED
def test_mixed_precision_resumes_on_the_cpu(tmp_path: Path, strategy: str) -> None:
    check(
        (strategy, 2),
        [(strategy, 2), ("dcp_ddp", 2)],
        tmp_path / "a.ckpt",
        tolerance=0.05,
        precision="bf16-mixed",
    )


def evaluate(strategy: str, ranks: int, path: Path) -> dict[str, float]:
    """Evaluate a checkpoint in modules with other weights, and in the trainer that has just fitted other ones."""
    expected = fit(strategy, devices=ranks, steps=3, save_to=path)
    reference = trainer(strategy, devices=ranks, steps=3)
    reference.validate(expected, Ticks(1), verbose=False)
    results = {"expected": expected.seen[-1]}
    for name in ("validate", "test", "predict"):
        module = scrambled()
        runner = trainer(strategy, devices=ranks, steps=3)
        verbose = {} if name == "predict" else {"verbose": False}
        answer = getattr(runner, name)(module, Ticks(1), ckpt_path=path, **verbose)
        results[name] = answer[0] if name == "predict" else module.seen[-1]
    module = scrambled()
    runner = trainer(strategy, devices=ranks, steps=1)
    runner.fit(module, Ticks(10))
    momenta = whole_state(module)
    runner.validate(module, Ticks(1), ckpt_path=path, verbose=False)
    results["validate after a fit"] = module.seen[-1]
    after = whole_state(module)
    assert {key: value for key, value in after.items() if key.startswith(".optimizer")} == {
        key: value for key, value in momenta.items() if key.startswith(".optimizer")
    }, "evaluation must not touch the optimizers"
    return results


def scrambled() -> Regression:
    module = Regression()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    return module


@pytest.mark.parametrize(("strategy", "ranks"), [("dcp_fsdp", 2), ("dcp_fsdp2", 2), ("dcp", 1)])
def test_validate_test_and_predict_load_the_weights_of_a_checkpoint(tmp_path: Path, strategy: str, ranks: int) -> None:
    for results in run_ranks(ranks, evaluate, strategy, ranks, tmp_path / "a.ckpt"):
        expected = results.pop("expected")
        assert results == dict.fromkeys(results, expected)


def weights_only(strategy: str, path: Path) -> tuple[float, float, str]:
    module = Regression()
    runner = trainer(strategy, devices=2, steps=3)
    runner.fit(module, Ticks(10))
    runner.save_checkpoint(path, weights_only=True)
    runner.validate(module, Ticks(1), verbose=False)
    other = scrambled()
    trainer(strategy, devices=2, steps=3).validate(other, Ticks(1), ckpt_path=path, verbose=False)
    try:
        fit(strategy, devices=2, steps=4, resume=path)
    except KeyError as exc:
        return module.seen[-1], other.seen[-1], str(exc)
    return module.seen[-1], other.seen[-1], ""


@SHARDED
def test_a_checkpoint_of_weights_alone_evaluates_but_does_not_resume_a_fit(tmp_path: Path, strategy: str) -> None:
    for expected, seen, refusal in run_ranks(2, weights_only, strategy, tmp_path / "a.ckpt"):
        assert seen == expected
        assert "save_weights_only" in refusal


class Larger(Regression):
    """Has one layer more than the checkpoint, and one less."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict_loading = strict
        self.extra = torch.nn.Linear(2, 2)
        self.net.scale_of_nothing = torch.nn.Linear(1, 1)
        del self.net.blocks[1]


def load_larger(strategy: str, path: Path) -> tuple[str, bool]:
    fit(strategy, devices=2, steps=2, save_to=path)
    refusal = ""
    try:
        trainer(strategy, devices=2, steps=2).validate(Larger(True), Ticks(1), ckpt_path=path, verbose=False)
    except RuntimeError as exc:
        refusal = str(exc)
    lenient = Larger(False)
    kept = digest({"weight": lenient.extra.weight})
    runner = trainer(strategy, devices=2, steps=2)
    runner.validate(lenient, Ticks(1), ckpt_path=path, verbose=False)
    loaded: Any = runner.strategy.lightning_module_state_dict()
    return refusal, digest({"weight": loaded["extra.weight"]}) == kept


@pytest.mark.parametrize("strategy", ["dcp_ddp", "dcp_fsdp"])
def test_strict_loading_reports_all_keys_and_its_absence_loads_what_is_shared(tmp_path: Path, strategy: str) -> None:
    for refusal, kept in run_ranks(2, load_larger, strategy, tmp_path / "a.ckpt"):
        assert "Missing key(s): extra.bias, extra.weight, net.scale_of_nothing.bias, net.scale_of_nothing" in refusal
        assert "Unexpected key(s): net.blocks.1.linear.bias" in refusal
        assert "strict_loading = False" in refusal
        assert "StateDictOptions" not in refusal
        assert kept
