"""Train a small GPT on the standard library's own sources with Lightning, checkpointed by dcp_plugins.

    python examples/lightning_train.py --dir checkpoints                    # 2 ranks on the CPU, FSDP2
    python examples/lightning_train.py --dir checkpoints --resume           # go on from the newest committed checkpoint
    python examples/lightning_train.py --dir checkpoints --resume --devices 4
    python examples/lightning_train.py --dir checkpoints --resume --devices 1 --strategy dcp

What makes it a user of dcp_plugins is one import and one flag: ``Trainer(strategy="dcp_fsdp2_async")``. A run may go on
under another: ``--strategy dcp_fsdp`` shards with FSDP1, ``dcp_ddp`` replicates; ``_async`` saves in the background.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_recorder import Recorder
from torch import Tensor, nn
from torch.nn import functional

# Importing dcp_plugins.lightning registers the strategy flags.
from dcp_plugins.lightning import last_checkpoint, remove_uncommitted

GLOBAL_BATCH = 8  # sequences of one step, over all ranks together: any number of ranks sees the same data


class Block(nn.Module):
    """Pre-norm Transformer block with causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        mixed: Tensor = x + self.mlp(self.norm_mlp(x))
        return mixed


class GPT(nn.Module):
    """A language model over bytes."""

    def __init__(self, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads=width // 32) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class LanguageModel(pl.LightningModule):
    """GPT with AdamW, and a learning rate that warms up and then follows a cosine."""

    def __init__(self, width: int, depth: int, length: int, steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.gpt = GPT(width, depth, length)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.gpt(batch[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        steps: int = self.hparams["steps"]
        warmup = max(1, steps // 10)

        def factor(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
            return min((step + 1) / warmup, 0.1 + 0.9 * cosine)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Sources:
    """Batches of random windows of the standard library's text, as a data loader with a position.

    A batch depends on its number alone. Each rank takes its part of it, and Lightning saves ``state_dict()`` with the
    checkpoint, so a resumed run on any number of ranks goes on with the batch that comes next.
    """

    def __init__(self, rank: int, num_ranks: int, length: int) -> None:
        if GLOBAL_BATCH % num_ranks:
            raise ValueError(f"{GLOBAL_BATCH} sequences a step cannot be divided among {num_ranks} ranks")
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        self.text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
        self.share = slice(rank * GLOBAL_BATCH // num_ranks, (rank + 1) * GLOBAL_BATCH // num_ranks)
        self.length = length
        self.next_batch = 0

    def __len__(self) -> int:
        return 1000

    def __iter__(self) -> Iterator[Tensor]:
        while self.next_batch < len(self):
            generator = torch.Generator().manual_seed(self.next_batch)
            starts = torch.randint(len(self.text) - self.length - 1, (GLOBAL_BATCH,), generator=generator)
            self.next_batch += 1
            windows = [self.text[start : start + self.length + 1] for start in starts[self.share].tolist()]
            yield torch.stack(windows).long()
        self.next_batch = 0

    def state_dict(self) -> dict[str, int]:
        return {"next_batch": self.next_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_batch = state["next_batch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--strategy", default="dcp_fsdp2_async", help="dcp, dcp_ddp, dcp_fsdp or dcp_fsdp2; _async")
    parser.add_argument("--devices", type=int, default=2, help="number of ranks")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="bytes of context")
    parser.add_argument(
        "--resume", nargs="?", const="newest", help="a checkpoint; by default the newest committed in --dir"
    )
    parser.add_argument("--record", help="file for losses and digests, one JSON object a line")
    options = parser.parse_args()

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|exists and is not empty|dirpath has).*")
    pl.seed_everything(1234, verbose=False)
    if options.resume and os.environ.get("LOCAL_RANK", "0") == "0":
        remove_uncommitted(options.dir)  # what a killed save has left; nothing else is saving there now
    resume = last_checkpoint(options.dir) if options.resume == "newest" else options.resume
    if options.resume == "newest" and resume is None:
        print(f"No committed checkpoint in {options.dir}: starting anew", flush=True)

    callbacks: list[Callback] = [
        ModelCheckpoint(
            options.dir, "{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=options.every
        )
    ]
    if options.record:
        callbacks.append(Recorder(options.record))
    trainer = pl.Trainer(
        strategy=options.strategy,
        accelerator="cpu",
        devices=options.devices,
        max_steps=options.steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=options.record is None,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    model = LanguageModel(options.width, options.depth, options.length, options.steps)
    trainer.fit(
        model,
        Sources(int(os.environ.get("LOCAL_RANK", "0")), options.devices, options.length),
        ckpt_path=None if resume is None else str(resume),
    )
    if options.record:
        # Somebody watches the exit code: leave without the interpreter's shutdown, in which a gloo thread of torch 2.13
        # now and then aborts the process after all work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
