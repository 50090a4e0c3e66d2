"""Signals that ask for a last save: ranks save at one step, DataLoader workers live on, a second one ends it all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dcp_plugins.manager import CheckpointManager, EverySteps, Preemption, SaveOptions, shield_data_worker
from dcp_plugins.testing.ranks import preload, run_ranks
from tests.manager.test_saver import commits
from tests.programs import run_program

ROOT = Path(__file__).resolve().parent.parent.parent


# -- Several ranks ---------------------------------------------------------------------------------------------------


def train_until_asked(folder: Path, every: int, signum: int) -> dict[str, Any]:
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    steps, saved = [], []
    preemption = Preemption()
    with CheckpointManager(
        folder,
        save_policy=EverySteps(100),
        options=SaveOptions(asynchronous="thread", sync_files=False),
        preemption=preemption,
        agree_every_steps=every,
    ) as manager:
        for step in range(1, 20):
            if step == 5 and dist.get_rank() == 0:
                os.kill(pids[1], signum)
            dist.barrier()
            steps.append(step)
            if manager.save(step, {"x": step}):
                saved.append(step)
                # In the foreground: what asks to stop does not wait.
                assert manager.all_steps() == [step]
                assert not manager.should_save(step)
            if manager.preempted:
                break
        assert not manager.should_save(steps[-1] + every)  # one save is what was asked for
    return {"saved": saved, "last": steps[-1], "signalled": preemption.signalled, "left": handlers()}


def handlers() -> list[Any]:
    return [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize(("every", "signum"), [(1, signal.SIGUSR1), (4, signal.SIGTERM)])
def test_a_signal_to_one_rank_makes_all_ranks_save_at_the_same_step(tmp_path: Path, every: int, signum: int) -> None:
    first, second = run_ranks(2, train_until_asked, tmp_path, every, signum)
    assert not first["signalled"]
    assert second["signalled"]
    for seen in (first, second):
        # The signal is noticed while rank 1 is in step 5, or at the latest when that ends.
        assert seen["saved"] == [seen["last"]]
        assert seen["last"] in ((5, 6) if every == 1 else (8,))
        assert seen["left"] == [signal.SIG_DFL, signal.SIG_DFL]
    assert first["last"] == second["last"]


def fail_before_the_last(folder: Path) -> tuple[int, list[int]]:
    def fail(writer: Any, commit: Callable[[], None]) -> None:
        if writer.path.name == "step_1":
            raise OSError(28, "No space left on device")
        commit()

    options = SaveOptions(asynchronous="thread", sync_files=False)
    with commits(fail), CheckpointManager(folder, options=options, preemption=Preemption()) as manager:
        manager.save(1, {"x": 1})
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        manager.save(2, {"x": 2})
        return manager.restore({"x": 0}, step=2) or 0, manager.all_steps()


def test_the_last_save_is_made_although_the_one_before_it_failed(tmp_path: Path) -> None:
    assert run_ranks(2, fail_before_the_last, tmp_path) == [(2, [2]), (2, [2])]


# -- Handlers --------------------------------------------------------------------------------------------------------


def test_the_handler_that_was_there_is_called_once_and_put_back() -> None:
    calls: list[int] = []

    def earlier(signum: int, frame: Any) -> None:
        calls.append(signum)

    before = signal.signal(signal.SIGUSR1, earlier)
    try:
        with Preemption([signal.SIGUSR1]) as preemption:
            assert not preemption.check()
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)  # the launcher has forwarded it, too
            assert calls == [signal.SIGUSR1]
            assert preemption.signalled
            assert not preemption.requested
            assert preemption.check()
            assert preemption.requested
        assert signal.getsignal(signal.SIGUSR1) is earlier
        preemption.close()
        with Preemption([signal.SIGUSR1], repeat_after_seconds=0):
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR1)
        # The second is the other handler's again, and the third.
        assert len(calls) == 4
        with Preemption([signal.SIGUSR1]):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN  # somebody has replaced ours
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_python_does_not_allow_is_refused_clearly() -> None:
    caught: list[BaseException] = []

    def make() -> None:
        try:
            Preemption()
        except RuntimeError as exc:
            caught.append(exc)

    thread = threading.Thread(target=make, name="a-thread")
    thread.start()
    thread.join()
    assert "on the main thread" in str(caught[0])
    assert "'a-thread'" in str(caught[0])
    with pytest.raises(ValueError, match="such that can be caught, got SIGKILL"):
        Preemption([signal.SIGKILL])
    with Preemption(), pytest.raises(RuntimeError, match="active already"):
        Preemption()
    assert handlers() == [signal.SIG_DFL, signal.SIG_DFL]


def be_stubborn(sender: Connection) -> None:
    heard, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    with Preemption(repeat_after_seconds=0):
        sender.send("ready")
        while True:
            heard.recv(1)
            sender.send("asked")


def test_a_second_signal_ends_the_process_at_once() -> None:
    preload()
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=be_stubborn, args=(sender,))
    process.start()
    try:
        assert receiver.poll(20)
        assert receiver.recv() == "ready"
        # Another signal is still the first of its kind.
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(process.pid, number)
            assert receiver.poll(20)
            assert receiver.recv() == "asked"
        os.kill(process.pid, signal.SIGTERM)
        process.join(20)
        assert process.exitcode == -signal.SIGTERM
    finally:
        process.kill()
        process.join()
        receiver.close()
        sender.close()


def test_a_worker_that_is_started_otherwise_can_be_shielded_by_its_init_function() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    shield_data_worker(0)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- Workers ---------------------------------------------------------------------------------------------------------

LOADING = """
import multiprocessing, os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
from dcp_plugins.manager import Preemption, shield_data_worker


class Data(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
        ours = any("Preemption" in str(handler) for handler in handlers)
        return torch.tensor([index, os.getpid(), ours])


def default_everywhere(queue):
    queue.put([signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGUSR1)])
    time.sleep(60)


def load(context, signals, **options):
    loader = DataLoader(Data(), batch_size=2, num_workers=2, multiprocessing_context=context, **options)
    batches = iter(loader)
    seen = [next(batches) for _ in range(4)]
    pids = {int(batch[0, 1]) for batch in seen}
    assert len(pids) == 2 and os.getpid() not in pids
    for pid in pids:
        for number in signals:
            os.kill(pid, number)
    seen += list(batches)
    assert sorted(int(row[0]) for batch in seen for row in batch) == list(range(40))
    assert {int(row[1]) for batch in seen for row in batch} == pids
    assert not any(bool(row[2]) for batch in seen for row in batch)


if __name__ == "__main__":
    preemption = Preemption()
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=default_everywhere, args=(queue,))
    child.start()
    assert queue.get(timeout=20) == [True, True]
    child.terminate()
    child.join(20)
    assert child.exitcode == -signal.SIGTERM

    load("fork", [signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1])
    assert not preemption.signalled

    # A worker that hangs has to be got rid of: the second SIGTERM ends it, and the loader says so.
    batches = iter(DataLoader(Data(), num_workers=1, multiprocessing_context="fork"))
    pid = int(next(batches)[0, 1])
    os.kill(pid, signal.SIGTERM)
    int(next(batches)[0, 1])
    try:
        for _ in range(200):
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.05)
        raise SystemExit("the worker lives")
    except RuntimeError as exc:
        assert "Terminated" in str(exc), exc
    del batches
    preemption.close()

    if sys.argv[1:] == ["left open"]:
        # The program ends with workers waiting, which Python terminates and waits for.
        with Preemption():
            left = iter(DataLoader(Data(), num_workers=2, multiprocessing_context="fork", persistent_workers=True))
            next(left)
        others = iter(DataLoader(Data(), num_workers=1, multiprocessing_context="fork"))
        next(others)
        keep = [left, others]
        multiprocessing.keep = keep
    print("done")
"""


def test_dataloader_workers_outlive_the_signals_and_end_with_the_program(tmp_path: Path) -> None:
    script = tmp_path / "loading.py"
    script.write_text(LOADING)
    done = run_program(script, "left open", folder=tmp_path, warn="ignore")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "done\n"
