"""Train a small Llama on the standard library's own sources with the Hugging Face Trainer, checkpointed by dcp_plugins.

    torchrun --nproc-per-node 2 examples/transformers_train.py --dir run
    torchrun --nproc-per-node 2 examples/transformers_train.py --dir run     # go on from the newest good checkpoint
    python examples/transformers_train.py --dir run                          # ... or with one process

What makes it a user of dcp_plugins is an import and two lines: the callback, and `last_checkpoint`, which unlike
``get_last_checkpoint`` never names what a killed save has left. (``resume_from_checkpoint=True`` does not either, but
wants a checkpoint to be there.)
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from dcp_plugins.transformers import DCPCallback, last_checkpoint

GLOBAL_BATCH = 8  # sequences of one step, over all processes together: any number of processes sees the same data


class Sources(Dataset[dict[str, Tensor]]):
    """The text of the standard library in pieces of so many bytes, which are the tokens."""

    def __init__(self, length: int) -> None:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)
        whole = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.pieces = whole[: len(whole) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.pieces[index].long()
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--keep", type=int, default=2, help="number of checkpoints that stay")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--length", type=int, default=128, help="bytes of context")
    options = parser.parse_args()

    set_seed(1234)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=options.length,
        bos_token_id=None,
        eos_token_id=None,
    )
    args = TrainingArguments(
        output_dir=str(options.dir),
        max_steps=options.steps,
        per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        logging_steps=1,
        save_steps=options.every,
        save_total_limit=options.keep,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=Sources(options.length),
        callbacks=[DCPCallback(asynchronous="thread")],
    )
    options.dir.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=last_checkpoint(options.dir))


if __name__ == "__main__":
    main()
