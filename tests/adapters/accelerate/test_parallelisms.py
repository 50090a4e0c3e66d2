"""Single process, DDP, FSDP1 and FSDP2: each saves, and each loads what any of them, or stock Accelerate, has saved."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader as TorchReader
from torch.distributed.checkpoint import load as torch_load

from dcp_plugins.accelerate import DCPPlugin, disable, enable, stock
from dcp_plugins.errors import CheckpointException, PlanError
from dcp_plugins.manager import verify_checkpoint
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.accelerate.trainers import Net, accelerator_for, run, same

KINDS = ("plain", "fsdp1", "fsdp1-flat", "fsdp2")
State = dict[str, torch.Tensor]
FULL = "FULL_STATE_DICT"


def save_each(root: Path, kinds: tuple[str, ...] = KINDS) -> dict[str, tuple[State, list[float]]]:
    """Save under every kind, and return what was saved and how each run went on."""
    saved = {}
    for kind in kinds:
        one = run(kind)
        one.train(3)
        one.accelerator.step = 7
        assert one.accelerator.save_state(root / kind) == root / kind
        saved[kind] = one.whole_state(), one.train(2)
    return saved


def load_each(root: Path, sources: tuple[str, ...], kinds: tuple[str, ...]) -> dict[tuple[str, str], Any]:
    """Load every source under every kind, and return what was loaded and how the run goes on."""
    loaded = {}
    for source in sources:
        for kind in kinds:
            one = run(kind, seed=5)
            one.accelerator.load_state(root / source)
            counters = one.counter.counted, one.accelerator.step, one.scheduler.state_dict()["last_epoch"]
            loaded[source, kind] = one.whole_state(), counters, one.train(2)
    return loaded


def test_each_kind_goes_on_from_what_any_kind_saved(tmp_path: Path) -> None:
    saved = run_ranks(2, save_each, tmp_path)
    for kind in KINDS:
        verify_checkpoint(tmp_path / kind)
    loaded = run_ranks(2, load_each, tmp_path, KINDS, KINDS)
    for rank in range(2):
        for (source, kind), (state, counters, losses) in loaded[rank].items():
            assert same(state, saved[rank][source][0]), (source, kind)
            assert counters == (3, 7, 6), (source, kind)
            if source == kind:
                assert losses == saved[rank][source][1], f"{kind}: other random numbers, or another optimizer"


def test_the_number_of_processes_may_change(tmp_path: Path) -> None:
    saved = run_ranks(2, save_each, tmp_path, ("plain", "fsdp1", "fsdp2"))[0]
    (alone,) = run_ranks(1, load_each, tmp_path, tuple(saved), ("plain",))
    for (source, _), (state, counters, _) in alone.items():
        assert same(state, saved[source][0]), source
        assert counters == (3, 7, 6)
    one = run_ranks(1, save_each, tmp_path / "one", ("plain",))[0]["plain"]
    more = run_ranks(4, load_each, tmp_path / "one", ("plain",), KINDS)
    for rank in range(4):
        for state, counters, _ in more[rank].values():
            assert same(state, one[0])
            assert counters == (3, 7, 3)
    assert len({tuple(ranks["plain", "plain"][2]) for ranks in more}) == 4, "ranks that are new keep their own numbers"


def save_stock(root: Path, kinds: tuple[str, ...], state_dict_type: str) -> dict[str, tuple[State, list[float]]]:
    saved = {}
    for kind in kinds:
        one = run(kind, plugin=None, state_dict_type=state_dict_type)
        one.train(3)
        one.accelerator.step = 7
        one.accelerator.save_state(str(root / kind))
        one.accelerator.wait_for_everyone()
        saved[kind] = one.whole_state(), one.train(2)
    return saved


def test_what_stock_accelerate_saved_is_loaded(tmp_path: Path) -> None:
    saved = run_ranks(2, save_stock, tmp_path, KINDS, "SHARDED_STATE_DICT")
    loaded = run_ranks(2, load_each, tmp_path, KINDS, KINDS)
    for rank in range(2):
        for (source, kind), (state, counters, losses) in loaded[rank].items():
            assert same(state, saved[rank][source][0]), (source, kind)
            assert counters == (3, 7, 6)
            if source == kind:
                assert losses == saved[rank][source][1]


def test_stocks_files_with_full_tensors_are_loaded(tmp_path: Path) -> None:
    # FSDP2's: torch's own FSDP1 dies of a segmentation fault when it collects full tensors on the CPU.
    saved = run_ranks(2, save_stock, tmp_path, ("fsdp2",), FULL)[0]
    assert (tmp_path / "fsdp2" / "pytorch_model_fsdp.bin").exists()
    for (_, kind), (state, counters, _) in run_ranks(2, load_each, tmp_path, ("fsdp2",), KINDS)[0].items():
        assert same(state, saved["fsdp2"][0]), kind
        assert counters == (3, 7, 6)


def load_with_stock(root: Path, sources: tuple[str, ...]) -> dict[tuple[str, str], Any]:
    loaded = {}
    for source in sources:
        for kind in ("fsdp1", "fsdp2"):
            one = run(kind, plugin=None, seed=5)
            # Of FSDP1, stock loads no optimizer state into an optimizer that has none, not even its own checkpoint's.
            one.train(1)
            one.accelerator.load_state(str(root / source))
            loaded[source, kind] = one.whole_state(), one.counter.counted, one.train(2)
    return loaded


def test_stock_accelerate_loads_ours_and_goes_on_alike(tmp_path: Path) -> None:
    saved = run_ranks(2, save_each, tmp_path)
    loaded = run_ranks(2, load_with_stock, tmp_path, KINDS)
    for rank in range(2):
        for (source, kind), (state, counted, losses) in loaded[rank].items():
            assert same(state, saved[rank][source][0]), (source, kind)
            assert counted == 3
            assert losses == saved[rank][source][1] or source != kind, kind


def two_models(kind: str, seed: int) -> tuple[Any, list[Any]]:
    accelerator = enable(accelerator_for(kind), DCPPlugin())
    torch.manual_seed(seed)
    generator, critic = Net(), torch.nn.Linear(3, 2)
    ours = torch.optim.AdamW(generator.parameters(), lr=0.1)
    theirs = torch.optim.SGD(critic.parameters(), lr=0.1, momentum=0.9)
    generator, ours = accelerator.prepare(generator, ours)
    critic, theirs = accelerator.prepare(critic, theirs)
    # Over both models, and made after they have been wrapped, which `prepare` refuses under FSDP2.
    both = accelerator.prepare_optimizer(torch.optim.Adagrad([*generator.parameters(), *critic.parameters()], lr=0.01))
    return accelerator, [generator, critic, ours, theirs, both]


def steps_of_two_models(accelerator: Any, prepared: list[Any], num_steps: int) -> list[float]:
    losses = []
    for step in range(num_steps):
        generator, critic, *optimizers = prepared
        torch.manual_seed(10 * step + accelerator.process_index)
        loss = critic(generator(torch.randn(4, 5))).square().mean()
        accelerator.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save_two_models(root: Path) -> dict[str, list[float]]:
    losses = {}
    for kind in ("plain", "fsdp1", "fsdp2"):
        accelerator, prepared = two_models(kind, 0)
        steps_of_two_models(accelerator, prepared, 2)
        accelerator.save_state(root / kind)
        losses[kind] = steps_of_two_models(accelerator, prepared, 2)
    return losses


def load_two_models(root: Path) -> dict[str, list[float]]:
    losses = {}
    for kind, source in (("plain", "fsdp1"), ("fsdp1", "fsdp2"), ("fsdp1", "fsdp1"), ("fsdp2", "fsdp2")):
        accelerator, prepared = two_models(kind, 1)
        accelerator.load_state(root / source)
        losses[f"{kind} from {source}"] = steps_of_two_models(accelerator, prepared, 2)
    return losses


def test_several_models_and_an_optimizer_over_both_go_on_under_any_kind(tmp_path: Path) -> None:
    saved = run_ranks(2, save_two_models, tmp_path)
    for rank, losses in enumerate(run_ranks(2, load_two_models, tmp_path)):
        for name, again in losses.items():
            kind, _, source = name.partition(" from ")
            expected = saved[rank][source]
            assert again == (expected if kind == source else pytest.approx(expected, rel=1e-5)), name


class Loader:
    """What the adapter sees of a stateful data loader: each process has its own position."""

    use_stateful_dataloader = True
    dataset: tuple[int, ...] = ()

    def __init__(self, position: int) -> None:
        self.position = position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def save_positions(path: Path) -> None:
    one = run("plain")
    one.accelerator._dataloaders.append(Loader(10 + dist.get_rank()))
    one.accelerator.save_state(path)


def load_positions(path: Path) -> int:
    one = run("plain", seed=5)
    loader = Loader(0)
    one.accelerator._dataloaders.append(loader)
    one.accelerator.load_state(path)
    return loader.position


def test_each_process_has_its_position_in_the_data_back_and_on_another_number_the_first_ones(tmp_path: Path) -> None:
    run_ranks(2, save_positions, tmp_path / "a")
    assert run_ranks(2, load_positions, tmp_path / "a") == [10, 11]
    assert run_ranks(3, load_positions, tmp_path / "a") == [10, 10, 10]


def go_back_to_stock(root: Path) -> tuple[State, State]:
    over = run("fsdp2", plugin=None, seed=4)
    over.accelerator.save_state(str(root / "over"))
    over.accelerator.wait_for_everyone()
    with pytest.raises(PlanError, match=r"in optimizer_0/\.metadata, pytorch_model_fsdp_0/\.metadata, one of stock"):
        enable(over.accelerator, DCPPlugin()).load_state(root / "over")
    one = run("plain", seed=5)
    one.accelerator.load_state(root / "fsdp2")
    disable(one.accelerator).save_state(str(root / "stock"))
    other = run("plain", plugin=None, seed=6)
    other.accelerator.wait_for_everyone()
    other.accelerator.load_state(str(root / "stock"))
    return one.whole_state(), other.whole_state()


def test_a_run_goes_back_to_stock_under_ddp_by_disabling_the_plugin(tmp_path: Path) -> None:
    saved = run_ranks(2, save_each, tmp_path, ("fsdp2",))[0]
    shutil.copytree(tmp_path / "fsdp2", tmp_path / "over")
    ours, stock = run_ranks(2, go_back_to_stock, tmp_path)[0]
    assert same(ours, stock)
    assert same(ours, saved["fsdp2"][0])


def test_merge_weights_and_torch_read_the_parts(tmp_path: Path) -> None:
    saved = run_ranks(2, save_each, tmp_path, ("plain", "fsdp2"))[0]
    for kind, (state, _) in saved.items():
        target = {"optimizer": {"state": {"inner.weight": {"exp_avg": torch.zeros(7, 5)}}}}
        whole = {"pytorch_model_fsdp_0": {"model": {"outer.bias": torch.zeros(3)}}}
        for state_dict, part in ((target, "optimizer_0"), (whole, "")):
            with pytest.warns(UserWarning, match="torch.distributed is"):
                torch_load(state_dict, storage_reader=TorchReader(tmp_path / kind / part), no_dist=True)
        assert torch.equal(target["optimizer"]["state"]["inner.weight"]["exp_avg"], state["inner.weight/exp_avg"])
        assert torch.equal(whole["pytorch_model_fsdp_0"]["model"]["outer.bias"], state["outer.bias"])
    part, merged = tmp_path / "fsdp2" / "pytorch_model_fsdp_0", tmp_path / "merged"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "merge-weights", str(part), str(merged)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    weights = load_file(merged / "model.safetensors")
    assert same(weights, {name: value for name, value in saved["fsdp2"][0].items() if "/" not in name})


def fail_on_one_rank(root: Path) -> list[str]:
    def fail(*_: Any) -> None:
        if dist.get_rank() == 1:
            raise OSError("a hook without luck")

    messages = []
    for asynchronous in ("off", "thread"):
        one = run("fsdp2", plugin=DCPPlugin(asynchronous=asynchronous))
        one.train(1)
        one.accelerator.save_state(root / asynchronous)
        handle = one.accelerator.register_save_state_pre_hook(fail)
        try:
            one.accelerator.save_state(root / asynchronous)
        except Exception as exc:
            messages.append(str(exc))
        handle.remove()
        one.train(1)
        one.accelerator.save_state(root / f"{asynchronous}-again")
        disable(one.accelerator)
    return messages


def test_a_failure_of_one_process_is_raised_on_all_and_the_next_save_succeeds(tmp_path: Path) -> None:
    for messages in run_ranks(2, fail_on_one_rank, tmp_path):
        assert len(messages) == 2
        assert all("a hook without luck" in message for message in messages)
    for name in ("off", "thread", "off-again", "thread-again"):
        verify_checkpoint(tmp_path / name)


def disagree(root: Path) -> list[str]:
    messages = []
    one = run("plain", plugin=DCPPlugin(asynchronous=("off", "thread")[dist.get_rank()]))
    with pytest.raises(ValueError, match="Expected asynchronous to be the same") as caught:
        one.accelerator.save_state(root / "a")
    messages.append(str(caught.value))
    disable(one.accelerator).save_state(str(root / "stock"))
    one.accelerator.wait_for_everyone()
    enable(one.accelerator, DCPPlugin())
    if dist.get_rank() == 1:
        stock._read_weights = lambda *_: {}["not on this node"]
    with pytest.raises(CheckpointException, match="not on this node"):
        one.accelerator.load_state(root / "stock")
    return messages


def test_processes_that_cannot_save_or_load_together_all_raise_at_once(tmp_path: Path) -> None:
    for (message,) in run_ranks(2, disagree, tmp_path, timeout_seconds=25):
        assert "found 'off' on process 0, 'thread' on process 1" in message


def load_damaged(root: Path) -> str:
    one = run("fsdp2")
    with pytest.raises(Exception, match="rank") as caught:
        one.accelerator.load_state(root / "fsdp2")
    return str(caught.value)


def test_a_missing_part_is_named_on_every_process(tmp_path: Path) -> None:
    run_ranks(2, save_each, tmp_path, ("fsdp2",))
    shutil.rmtree(tmp_path / "fsdp2" / "optimizer_0")
    for message in run_ranks(2, load_damaged, tmp_path):
        assert "optimizer_0/" in message
        assert "is missing" in message
