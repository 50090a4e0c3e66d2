"""What the process runner is made of: handles of tensors, messages with descriptors, meetings at a free port."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from dcp_plugins.engine import process_meeting
from dcp_plugins.engine.process_channel import Channel
from dcp_plugins.engine.process_handles import BlockTable, pack
from dcp_plugins.engine.process_received import Buffers, blocks, unpack, unpack_skeleton
from dcp_plugins.engine.process_worker import _loads
from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.staging import DefaultStager, StagingOptions
from dcp_plugins.staging.memory import HostMemory
from dcp_plugins.staging.shared import descriptor_of
from tests.unit.staging.test_snapshot import Named, Scaled


@pytest.fixture
def stager() -> Iterator[DefaultStager]:
    made = DefaultStager(StagingOptions(False, True, False, False))
    yield made
    made.close()
    blocks.clear()


def sent(state_dict: dict[str, Any], table: BlockTable | None = None) -> dict[str, Any]:
    """Send a state dict to this process itself."""
    table = BlockTable() if table is None else table
    packed = pack(state_dict, table)
    blocks.update(table.take_unsent())
    buffers = Buffers([tensor.nbytes for tensor in packed.private])
    waiting = iter(packed.private)
    buffers.fill(lambda memory: None)
    for target, source in zip(buffers.tensors, waiting, strict=True):
        target.copy_(source.reshape(-1).view(torch.uint8))
    skeleton = unpack_skeleton(packed.skeleton, buffers.tensors, _loads)
    received: dict[str, Any] = skeleton.filled(unpack(packed.values, buffers.tensors, _loads))
    return received


def test_shared_tensors_arrive_as_views_of_the_same_memory(stager: DefaultStager) -> None:
    checkpointable: Any = torch.arange(6.0)
    checkpointable.global_shape, checkpointable.global_offsets = (12,), ((6,),)
    checkpointable.local_offsets, checkpointable.local_sizes = ((0,),), ((6,),)
    original = {
        "plain": torch.arange(4.0),
        "bits": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "empty": torch.zeros(3, 0),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "named": torch.ones(3).as_subclass(Named),
        "scaled": Scaled(torch.ones(4, dtype=torch.int8), torch.tensor(2.0)),
        "checkpointable": checkpointable,
        "ordered": OrderedDict(x=torch.ones(1), y=2),
        "nested": [1, (torch.ones(2), "two"), {"three": 3}],
    }
    staged: Any = stager.stage(original)
    received = sent(staged)
    for key in ("plain", "bits", "empty", "scalar", "named", "checkpointable"):
        assert received[key].data_ptr() == staged[key].data_ptr(), key
        assert received[key].dtype is original[key].dtype
        assert torch.equal(received[key], staged[key])
    assert received["parameter"].requires_grad
    assert type(received["named"]) is Named
    assert received["checkpointable"].global_shape == (12,)
    assert type(received["scaled"]) is Scaled
    assert received["scaled"]._values.data_ptr() == staged["scaled"]._values.data_ptr()
    assert type(received["ordered"]) is OrderedDict
    assert received["ordered"]["y"] == 2
    assert received["nested"][0] == 1
    assert torch.equal(received["nested"][1][0], torch.ones(2))
    assert received["nested"][2] == {"three": 3}


def test_private_tensors_arrive_as_copies() -> None:
    original = {
        "strided": torch.arange(12.0).view(3, 4).t(),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "shards": LocalShardsWrapper([torch.ones(2, 3)], [(0, 0)]),
        "inside a value": {1, 2},
    }
    received = sent(original)
    assert torch.equal(received["strided"], original["strided"])
    assert torch.equal(received["conjugate"], original["conjugate"])
    assert received["strided"].data_ptr() != original["strided"].data_ptr()
    assert torch.equal(received["shards"].local_shards()[0], torch.ones(2, 3))
    assert received["inside a value"] == {1, 2}


def test_containers_are_new_for_each_receiver(stager: DefaultStager) -> None:
    staged: Any = stager.stage({"a": {"x": torch.ones(1)}, "b": [torch.ones(1), 2]})
    table = BlockTable()
    packed = pack(staged, table)
    blocks.update(table.take_unsent())
    skeleton = unpack_skeleton(packed.skeleton, [], _loads)
    values = _loads(packed.values)
    first = skeleton.filled(values)
    first["a"]["new"] = 1
    first["b"].append(3)
    second = skeleton.filled(values)
    assert list(second["a"]) == ["x"]
    assert len(second["b"]) == 2


def test_all_values_that_cannot_be_sent_are_named() -> None:
    with pytest.raises(UnsupportedValueError, match=r"cannot send a\.bad, worse "):
        pack({"a": {"bad": lambda: 1, "good": 2}, "worse": threading.Lock(), "x": torch.ones(1)}, BlockTable())


def test_memory_is_sent_once_and_told_of_when_it_is_gone() -> None:
    memory = HostMemory(shared=True)
    table = BlockTable()
    memory.begin_round()
    state_dict = {"x": memory.take("x", torch.Size([5]), torch.float32)}
    pack(state_dict, table)
    assert [number for number, _ in table.take_unsent()] == [0]
    pack(state_dict, table)
    assert table.take_unsent() == []
    assert table.take_freed() == []
    state_dict.clear()
    memory.close()
    assert table.take_freed() == [0]
    assert table.take_freed() == []
    memory.begin_round()
    pack({"x": memory.take("x", torch.Size([5]), torch.float32)}, table)
    assert [number for number, _ in table.take_unsent()] == [1]


def test_pages_of_slots_that_are_gone_are_freed_while_others_stay() -> None:
    memory = HostMemory(shared=True)
    for turn in range(6):
        memory.begin_round()
        kept = memory.take("kept", torch.Size([100]), torch.uint8).fill_(7)
        memory.take(f"changes {turn}", torch.Size([(turn + 5) << 20]), torch.uint8).fill_(1)
    # Three rounds are kept, of 8, 9 and 10 MiB.
    used_bytes = os.fstat(descriptor_of(kept.untyped_storage())).st_blocks * 512
    assert used_bytes < 45 << 20
    assert (kept == 7).all()
    assert len(memory.storages()) == 1
    memory.close()


def test_pages_of_small_slots_that_are_gone_are_freed_while_one_beside_them_stays() -> None:
    memory = HostMemory(shared=True)
    for turn in range(20):
        memory.begin_round()
        for number in range(turn):
            memory.take(f"history {number}", torch.Size([16]), torch.uint8)
        for number in range(12):
            memory.take(number, torch.Size([800_000 + turn]), torch.uint8).fill_(1)
        kept = memory.take("kept", torch.Size([16]), torch.uint8)
    used_bytes = os.fstat(descriptor_of(kept.untyped_storage())).st_blocks * 512
    assert used_bytes < 60 << 20
    memory.close()


def test_a_message_carries_a_descriptor_and_bytes() -> None:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    reader, writer = os.pipe()
    large = torch.arange(1_000_000.0)
    sender = threading.Thread(
        target=lambda: (
            ours.send(("first",), descriptor=writer),
            ours.send(("second", 2), followed_by=[large.numpy()]),
            ours.close(),
        )
    )
    sender.start()
    message, descriptor = theirs.receive()
    assert message == ("first",)
    assert descriptor is not None
    os.write(descriptor, b"x")
    assert os.read(reader, 1) == b"x"
    assert theirs.receive() == (("second", 2), None)
    received = torch.empty(1_000_000)
    theirs.receive_into(received.numpy())
    assert torch.equal(received, large)
    with pytest.raises(EOFError):
        theirs.receive()
    sender.join()
    for one in (reader, writer, descriptor):
        os.close(one)
    theirs.close()


def test_a_meeting_is_found_from_another_host_by_the_address_that_answers() -> None:
    meeting = process_meeting.open_meeting("127.0.0.1")
    other = process_meeting.open_meeting(None)
    assert meeting.port != other.port
    away = dataclasses.replace(other, host="another host", addresses=("host.invalid", "127.0.0.1"))
    assert process_meeting._connect(away).get("token").decode() == other.token
    wrong = dataclasses.replace(away, token="of a group that met elsewhere")
    with pytest.raises(ConnectionError, match="somebody else answers"):
        process_meeting._connect(wrong)
    process_meeting._open.clear()


def test_a_host_is_told_from_its_addresses() -> None:
    addresses = list(process_meeting._own_addresses())
    assert socket.gethostname() in addresses
    assert not [address for address in addresses if address.startswith("127.")]
    assert process_meeting._host_identity() == process_meeting._host_identity()
