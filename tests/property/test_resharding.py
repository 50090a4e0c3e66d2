"""Whatever the layouts: what was saved in one is what is loaded into another."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import dcp_plugins as dcp
from dcp_plugins.contract import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from dcp_plugins.geometry import Box
from dcp_plugins.plan import create_read_items_for_chunk_list
from dcp_plugins.testing.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")

BUDGET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Cut an array into boxes, by cutting one of them in two a few times, anywhere and in any dimension."""
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, len(boxes) - 1))
        box = boxes[at]
        if not shape:
            break
        dim = draw(st.integers(0, len(shape) - 1))
        if box.sizes[dim] < 2:
            continue
        cut = draw(st.integers(1, box.sizes[dim] - 1))
        first, second = list(box.sizes), list(box.sizes)
        first[dim], second[dim] = cut, box.sizes[dim] - cut
        corner = list(box.offsets)
        corner[dim] += cut
        boxes[at : at + 1] = [Box(box.offsets, tuple(first)), Box(tuple(corner), tuple(second))]
    return list(draw(st.permutations(boxes)))


shapes = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)


@st.composite
def resharding(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box], list[Box]]:
    shape = draw(shapes)
    return shape, draw(tilings(shape)), draw(tilings(shape))


def chunk_of(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def at(box: Any, offsets: Any, lengths: Any) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))


@given(resharding())
@BUDGET
def test_the_planned_reads_fill_every_element_once_with_its_own_value(case):
    shape, saved, wanted = case
    whole = torch.arange(1, math.prod(shape) + 1).reshape(shape)
    entry = TensorStorageMetadata(TensorProperties(dtype=whole.dtype), torch.Size(shape), [*map(chunk_of, saved)])
    items = create_read_items_for_chunk_list("w", entry, [*map(chunk_of, wanted)])
    stored = {box.offsets: whole[box.slices()] for box in saved}
    targets = {box.offsets: torch.zeros(box.sizes, dtype=whole.dtype) for box in wanted}
    for item in items:
        assert entry.chunks[item.storage_index.index].offsets == item.storage_index.offset  # type: ignore[index]
        source = stored[tuple(item.storage_index.offset)][at(None, item.storage_offsets, item.lengths)]  # type: ignore[arg-type]
        target = targets[tuple(item.dest_index.offset)][at(None, item.dest_offsets, item.lengths)]  # type: ignore[arg-type]
        assert source.shape == target.shape == item.lengths
        assert not target.any(), "no element is read twice"
        target.copy_(source)
    for box in wanted:
        assert torch.equal(targets[box.offsets], whole[box.slices()])


def held_as(boxes: list[Box], whole: torch.Tensor, fill: bool) -> torch.Tensor:
    """Return one local tensor that carries ``boxes`` of ``whole``, laid out one behind the other with some padding."""
    ndim = whole.dim()
    extent = [max((box.sizes[dim] for box in boxes), default=0) for dim in range(ndim)]
    extent[0] = sum(box.sizes[0] + 1 for box in boxes)
    local = torch.full(extent, -1, dtype=whole.dtype)
    corners = []
    row = 0
    for box in boxes:
        corners.append((row, *[0] * (ndim - 1)))
        if fill:
            local[Box(corners[-1], box.sizes).slices()] = whole[box.slices()]
        row += box.sizes[0] + 1
    local.global_shape = tuple(whole.shape)  # type: ignore[attr-defined]
    local.global_offsets = tuple(box.offsets for box in boxes)  # type: ignore[attr-defined]
    local.local_offsets = tuple(corners)  # type: ignore[attr-defined]
    local.local_sizes = tuple(box.sizes for box in boxes)  # type: ignore[attr-defined]
    return local


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64]


@given(
    st.lists(resharding().filter(lambda case: len(case[0]) > 0), min_size=1, max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from([None, *DTYPES[:3]]),
    st.booleans(),
)
@BUDGET
def test_what_one_layout_saved_another_loads_from_real_files(tmp_path_factory, cases, dtype, other_dtype, split):
    folder = tmp_path_factory.mktemp("c")
    state, target, expected = {}, {}, {}
    into = other_dtype if other_dtype is not None and not dtype.is_complex else dtype
    for number, (shape, saved, wanted) in enumerate(cases):
        whole = (torch.arange(math.prod(shape)) % 113).reshape(shape).to(dtype)
        state[f"w{number}"] = held_as(saved, whole, fill=True)
        target[f"w{number}"] = held_as(wanted, whole.to(into), fill=False)
        expected[f"w{number}"] = held_as(wanted, whole.to(into), fill=True)
        target[f"plain{number}"], expected[f"plain{number}"] = torch.zeros(shape, dtype=dtype), whole
        state[f"plain{number}"] = held_as(saved, whole, fill=True)
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=split, sync_files=False)
    dcp.save(state, storage_writer=writer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(target, checkpoint_id=folder)
    for key, value in expected.items():
        assert torch.equal(target[key], value), key


@given(resharding().filter(lambda case: len(case[1]) > 1), st.data())
@BUDGET
def test_a_layout_with_a_box_missing_or_doubled_is_refused(tmp_path_factory, case, data):
    shape, boxes, wanted = case
    folder = tmp_path_factory.mktemp("c")
    whole = torch.ones(shape)
    at = data.draw(st.integers(0, len(boxes) - 1))
    lost = boxes[at]
    # A single process may save a part, since it may be one rank of many: the hole is found by who needs it.
    dcp.save({"w": held_as(boxes[:at] + boxes[at + 1 :], whole, fill=True)}, checkpoint_id=folder)
    with pytest.raises(dcp.CheckpointException, match="w: the chunks do not cover the tensor"):
        dcp.load({"w": torch.zeros(shape)}, checkpoint_id=folder)
    target = {"w": held_as(wanted, whole, fill=False)}
    with pytest.raises(dcp.CheckpointException, match="w: the chunks do not cover the tensor"):
        dcp.load(target, checkpoint_id=folder)
    found = held_as(boxes[:at] + boxes[at + 1 :], whole, fill=False)
    dcp.load({"w": found}, checkpoint_id=folder)
    assert torch.equal(found, held_as(boxes[:at] + boxes[at + 1 :], whole, fill=True)), "the rest is all there"
    wider = Box(lost.offsets, lost.sizes)
    other = boxes[at - 1]
    with pytest.raises(dcp.CheckpointException, match="overlap"):
        cut = Box(other.offsets, other.sizes)
        merged = Box(
            tuple(min(a, b) for a, b in zip(wider.offsets, cut.offsets, strict=True)),
            tuple(
                max(a + m, b + n) - min(a, b)
                for a, m, b, n in zip(wider.offsets, wider.sizes, cut.offsets, cut.sizes, strict=True)
            ),
        )
        dcp.save({"w": held_as([merged, *boxes[:at], *boxes[at + 1 :]], whole, fill=True)}, checkpoint_id=folder)


def _random_layouts(seed: int, world_size: int, keys: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return a random layout of each key, the same on every rank."""
    choose = random.Random(seed)
    meshes = [init_device_mesh("cpu", (world_size,))]
    if world_size % 2 == 0:
        meshes.append(init_device_mesh("cpu", (2, world_size // 2)))
    made = {}
    for key, shape in keys.items():
        mesh = choose.choice(meshes)
        placements = []
        for _ in range(mesh.ndim):
            dim = choose.randrange(len(shape))
            placements.append(
                choose.choice(
                    [Shard(dim), Shard(dim), Replicate(), _StridedShard(dim, split_factor=choose.choice([2, 3]))]
                )
            )
        made[key] = (mesh, placements)
    return made


def _keys(seed: int) -> dict[str, tuple[int, ...]]:
    choose = random.Random(seed)
    return {f"k{at}": tuple(choose.randint(1, 12) for _ in range(choose.randint(1, 3))) for at in range(24)}


def _value(key: str, shape: tuple[int, ...], factor: int = 1) -> torch.Tensor:
    return (torch.arange(math.prod(shape)).reshape(shape) + int(key[1:]) * 1000.0) * factor


def _save_random(folder: str, seed: int) -> None:
    keys = _keys(seed)
    layouts = _random_layouts(seed + 1, dist.get_world_size(), keys)
    state = {
        key: distribute_tensor(_value(key, shape), *layouts[key], src_data_rank=None) for key, shape in keys.items()
    }
    dcp.save(state, checkpoint_id=folder)


def _load_random(folders: list[str], seeds: list[int]) -> None:
    for folder, seed in zip(folders, seeds, strict=True):
        keys = _keys(seed)
        for turn in range(2):
            layouts = _random_layouts(seed + 100 + turn, dist.get_world_size(), keys)
            target = {
                key: distribute_tensor(torch.zeros(shape), *layouts[key], src_data_rank=None)
                for key, shape in keys.items()
            }
            dcp.load(target, checkpoint_id=folder)
            for key, shape in keys.items():
                expected = distribute_tensor(_value(key, shape), *layouts[key], src_data_rank=None)
                assert torch.equal(target[key].to_local(), expected.to_local()), (key, layouts[key])


def test_random_layouts_of_dtensors_load_into_others_on_other_numbers_of_ranks(tmp_path):
    folders, seeds = [], []
    for world_size in (1, 2, 4):
        for seed in (world_size, world_size + 50):
            folders.append(str(tmp_path / str(seed)))
            seeds.append(seed)
            run_ranks(world_size, _save_random, folders[-1], seed)
    for world_size in (2, 4, 3, 1):
        run_ranks(world_size, _load_random, folders, seeds)
