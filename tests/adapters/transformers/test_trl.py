"""TRL's SFTTrainer, a subclass of Trainer that overrides how it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dcp_plugins.transformers import DCPCallback
from tests.adapters.transformers.trainers import VOCABULARY, StopAt, digest, files, losses, tiny

pytest.importorskip("trl", reason="TRL, which needs Python 3.11 and brings datasets with it, is not installed")
import pyarrow
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


def tokenizer() -> PreTrainedTokenizerFast:
    letters = {letter: number for number, letter in enumerate("<abcdefghijklmnopqrstuvwxyz .,>")}
    assert len(letters) <= VOCABULARY
    plain = Tokenizer(models.WordLevel(letters, unk_token="."))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=">", pad_token="<", unk_token=".")


def fit(folder: Path, *callbacks: Any, resume: bool | None = None, **options: Any) -> Any:
    texts = [f"{word} is a word, {word}." for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
    args = SFTConfig(
        output_dir=str(folder),
        max_length=8,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    runner = SFTTrainer(
        tiny(),
        args,
        # Its fingerprint given: dill, which makes one, cannot pickle tables of some versions of pyarrow.
        train_dataset=Dataset(pyarrow.table({"text": texts}), fingerprint="words"),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )
    runner.train(resume_from_checkpoint=resume)
    return runner


@pytest.mark.filterwarnings("ignore")
def test_an_sft_run_resumes_exactly(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", save_strategy="no")
    fit(tmp_path / "run", StopAt(4), DCPCallback(asynchronous="thread"))
    assert files(tmp_path / "run" / "checkpoint-4") == [".metadata", "data", "trainer_state.json"]
    assert (tmp_path / "run" / "README.md").exists(), "what SFTTrainer adds to a save is done"
    resumed = fit(tmp_path / "run", DCPCallback(), resume=True)
    assert (losses(resumed), digest(resumed.model)) == (losses(whole), digest(whole.model))
