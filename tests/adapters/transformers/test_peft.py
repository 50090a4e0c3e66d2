"""PEFT: checkpoints hold the adapters, not the frozen base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dcp_plugins as dcp
from dcp_plugins.errors import PlanError
from dcp_plugins.testing.ranks import run_ranks
from dcp_plugins.transformers import DCPCallback
from tests.adapters.transformers.trainers import Digests, StopAt, digest, files, fit, fsdp, outcome, tiny

peft = pytest.importorskip("peft")

# PEFT asks Transformers under a name that is going to change.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def adapted(**options: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True, **options)
    return peft.get_peft_model(tiny(), config)


def saved_names(checkpoint: Path) -> set[str]:
    return set(dcp.load_from_keys("model", checkpoint_id=checkpoint)["model"])


def test_adapters_resume_exactly_and_the_base_is_not_saved(tmp_path: Path) -> None:
    expected = outcome(fit(tmp_path / "whole", model=adapted(modules_to_save=["ln_f"]), save_strategy="no"))
    model = adapted(modules_to_save=["ln_f"])
    model.add_adapter("idle", peft.LoraConfig(r=1, target_modules=["c_proj"], fan_in_fan_out=True))
    fit(tmp_path, StopAt(4), DCPCallback(asynchronous="thread", hf_weights=True), model=model)
    names = saved_names(tmp_path / "checkpoint-4")
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    assert any("idle" in name for name in names), "an adapter that does not train is part of the model all the same"
    assert {"adapter_model.safetensors", "adapter_config.json", ".metadata"} <= set(files(tmp_path / "checkpoint-4"))

    loaded = digest(peft.PeftModel.from_pretrained(tiny(), tmp_path / "checkpoint-4"))
    trained = {(name, value) for name, value in digest(model).items() if name in names}
    assert {(name, value) for name, value in loaded.items() if name in names} <= trained
    assert any("lora_" in name for name in loaded)

    fit(tmp_path / "run", StopAt(4), DCPCallback(), model=adapted(modules_to_save=["ln_f"]))
    resumed = fit(tmp_path / "run", DCPCallback(), resume=True, model=adapted(modules_to_save=["ln_f"]))
    assert outcome(resumed) == expected


def test_the_best_adapters_are_loaded_at_the_end(tmp_path: Path) -> None:
    seen = Digests()
    scores = iter((0.1, 0.9, 0.2, 0.3))
    runner = fit(
        tmp_path,
        seen,
        DCPCallback(),
        model=adapted(),
        parts={"compute_metrics": lambda prediction: {"score": next(scores)}},
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="score",
        load_best_model_at_end=True,
        label_names=["labels"],
    )
    assert digest(runner.model) == seen.at[4] != seen.at[8]


def test_a_checkpoint_without_the_adapters_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, StopAt(2), DCPCallback())
    with pytest.raises(PlanError, match="Expected the adapters of the model in the checkpoint"):
        fit(tmp_path, DCPCallback(), resume=True, model=adapted())


def under_fsdp(folder: Path) -> bool:
    expected = outcome(fit(folder / "whole", model=adapted(), save_strategy="no", **fsdp(2)))
    fit(folder, StopAt(4), DCPCallback(asynchronous="thread"), model=adapted(), **fsdp(2))
    return outcome(fit(folder, DCPCallback(), resume=True, model=adapted(), **fsdp(2))) == expected


def test_sharded_adapters_resume_exactly(tmp_path: Path) -> None:
    assert all(run_ranks(2, under_fsdp, tmp_path, timeout_seconds=60))
    assert all("lora_" in name for name in saved_names(tmp_path / "checkpoint-4"))
