r"""Train a small language model on the standard library's own sources with Accelerate, checkpointed by dcp_plugins.

    accelerate launch --config_file examples/accelerate_cpu.yaml examples/accelerate_train.py --cpu
    accelerate launch --config_file examples/accelerate_cpu.yaml examples/accelerate_train.py --cpu \
        --resume_from_checkpoint newest

It follows Accelerate's ``complete_nlp_example.py``; what makes it a user of dcp_plugins are the lines marked so. How it
saves, in the background for instance, stands in the YAML file. A run may go on with another ``--num_processes``.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dcp_plugins.accelerate import enable, newest_checkpoint  # dcp_plugins


class Sources(Dataset[tuple[Tensor, Tensor]]):
    """Windows of characters out of the standard library, and the characters that follow each."""

    def __init__(self, num_windows: int, length: int) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
        text = b"".join(file.read_bytes() for file in files)
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127)
        self.num_windows, self.length = num_windows, length

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * 997 % (len(self.text) - self.length - 1)
        window = self.text[start : start + self.length + 1]
        return window[:-1], window[1:]


class LanguageModel(nn.Module):
    """Embeds characters, lets them look back with one attention layer, and predicts the next one of each."""

    def __init__(self, width: int = 32, length: int = 32) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(128, width), nn.Embedding(length, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        hidden = self.token(tokens) + self.position(torch.arange(length, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        logits: Tensor = self.head(self.block(hidden, src_mask=mask, is_causal=True))
        return logits


def training_function(args: argparse.Namespace) -> None:
    # Each batch is split over the processes, so that any number of them sees the same data in the same order.
    data_config = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision, dataloader_config=data_config)
    enable(accelerator)  # dcp_plugins

    set_seed(args.seed)
    train_dataloader = DataLoader(Sources(args.num_samples, 32), shuffle=True, batch_size=args.batch_size)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    num_steps = len(train_dataloader) * args.num_epochs
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=num_steps)
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )

    overall_step = 0
    starting_epoch, resume_step = 0, 0
    if args.resume_from_checkpoint:
        checkpoint = Path(args.resume_from_checkpoint)
        if args.resume_from_checkpoint == "newest":
            checkpoint = newest_checkpoint(args.output_dir)  # dcp_plugins: one that a kill left half-written is none
        accelerator.load_state(checkpoint)
        accelerator.print(f"Resumed from checkpoint: {checkpoint}")
        overall_step = int(checkpoint.name.removeprefix("step_"))
        starting_epoch, resume_step = divmod(overall_step, len(train_dataloader))

    for epoch in range(starting_epoch, args.num_epochs):
        model.train()
        train_dataloader.set_epoch(epoch)
        active_dataloader = train_dataloader
        if epoch == starting_epoch and resume_step:
            # The batches of this epoch that the resumed run has seen already.
            active_dataloader = accelerator.skip_first_batches(train_dataloader, resume_step)
        for tokens, targets in active_dataloader:
            logits = model(tokens)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            overall_step += 1
            mean_loss = accelerator.reduce(loss.detach(), reduction="mean").item()
            accelerator.print(f"step {overall_step}: loss {mean_loss!r}")
            if overall_step % args.checkpointing_steps == 0:
                accelerator.save_state(Path(args.output_dir) / f"step_{overall_step}")

    accelerator.wait_for_everyone()
    accelerator.save_model(model, Path(args.output_dir) / "final")
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description="Simple example of a training script that saves and resumes.")
    parser.add_argument("--cpu", action="store_true", help="If passed, will train on the CPU.")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--output_dir", default="accelerate-runs", help="Where checkpoints are saved.")
    parser.add_argument("--checkpointing_steps", type=int, default=8)
    parser.add_argument("--resume_from_checkpoint", default=None, help="A checkpoint's directory, or 'newest'.")
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--num_samples", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16, help="Over all processes together.")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=42)
    training_function(parser.parse_args())


if __name__ == "__main__":
    main()
