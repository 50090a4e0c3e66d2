"""Planning a load: which saved chunks a rank reads into which parts of its state dict."""

from __future__ import annotations

import difflib
import io
import math
import re
from collections.abc import Container, Hashable, Iterable, Sequence
from typing import Any, Literal, cast, get_args

import torch

from dcp_plugins.contract import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    LoadPlan,
    LoadPlanner,
    Metadata,
    MetadataIndex,
    ReadItem,
    TensorStorageMetadata,
)
from dcp_plugins.errors import PlanError, listing
from dcp_plugins.format.subclasses import handles_operators, moved, narrow_view
from dcp_plugins.format.trust import SafeGlobal, check_safe_globals
from dcp_plugins.plan.flatten import (
    FlattenMapping,
    actual_path,
    flatten_state_dict,
    keyed_by_strings,
    set_element,
)
from dcp_plugins.plan.reshard import Intersection, bytes_read_item, intersections, read_items, whole_read_item
from dcp_plugins.plan.restore import CompletionResult, complete_in_place
from dcp_plugins.plan.saved_keys import KeyDecoder
from dcp_plugins.plan.validate import box_of, coverage_problems, overlap_problems
from dcp_plugins.plan.values import load_value
from dcp_plugins.tensors import chunks, find_object, flatten_sharded_tensors, is_whole, materialize_meta
from dcp_plugins.tensors.checkpointable import is_checkpointable
from dcp_plugins.tensors.dtensor import like_sharded
from dcp_plugins.tensors.sharded import ShardedTensor, dtype_of, size_of
from dcp_plugins.user_warnings import warn_user

__all__ = [
    "DefaultLoadPlanner",
    "Unread",
    "create_default_global_load_plan",
    "create_default_local_load_plan",
]

Unread = Literal["warn", "error", "ignore"]

# An option of an optimizer's group: `param_groups.<number>.<option>`, or flat, `param_groups.<fqn>.<option>`.
_GROUP_KEY = re.compile(r"(?P<prefix>(?:.*\.)?)param_groups\.(?:(?P<number>\d+)\.[^.]+$)?")
_MAX_PROBLEMS = 24


class DefaultLoadPlanner(LoadPlanner):
    """Plan a load into a nested state dict, in place; every method is a place where a subclass may intervene.

    Args:
        flatten_state_dict: Enter nested dicts and lists, as ``DefaultSavePlanner`` does.
        flatten_sharded_tensors: Flatten a ``ShardedTensor`` of ``ShardedTensor``.
        allow_partial_load: Leave keys of the state dict that the checkpoint lacks as they are, instead of raising.
        weights_only: Decode non-tensor values as data: plain values, tensors, and what the standard library and NumPy
            define as data. False runs whatever code the checkpoint names: only for checkpoints that you trust as you
            trust a program.
        safe_globals: Classes of yours, such as enums and dataclasses, that non-tensor values may have all the same,
            beside those of ``torch.serialization.add_safe_globals``.
        cast_dtype: Convert a saved tensor to the dtype of the tensor it is loaded into, with a warning that names
            the keys. False raises instead.
        unread: What to do about saved values that no rank reads although they lie below a nested dict or list that the
            state dict has: "warn" (`UnreadValuesWarning`), raise an "error", or "ignore" them.
    """

    original_state_dict: dict[str, Any]
    mappings: FlattenMapping
    adopted_keys: Container[str] = frozenset()
    """Keys of plain tensors that a load replaces if the saved tensor is quantised or of a subclass."""

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        weights_only: bool = True,
        safe_globals: Iterable[SafeGlobal] = (),
        cast_dtype: bool = True,
        unread: Unread = "warn",
    ) -> None:
        if unread not in get_args(Unread):
            raise ValueError(f"unread must be one of {listing(get_args(Unread))}, got {unread!r}")
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.allow_partial_load = allow_partial_load
        self.weights_only = weights_only
        self.safe_globals = check_safe_globals(safe_globals)
        self.cast_dtype = cast_dtype
        self.unread: Unread = unread
        self.left_unread: set[str] = set()
        self.original_state_dict = {}
        self.mappings = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        completed = self.complete(state_dict, metadata)
        self.left_unread = completed.left_unread
        materialize_meta(state_dict)
        self.original_state_dict = state_dict
        if self.flatten_sharded_tensors:
            state_dict = flatten_sharded_tensors(state_dict)
        if self.flatten_state_dict:
            state_dict, self.mappings = flatten_state_dict(state_dict, key_texts=completed.key_texts)
        else:
            state_dict = keyed_by_strings(state_dict)
        own = completed.own_tensors
        if own is not None:
            self.adopted_keys = {
                fqn for fqn, value in state_dict.items() if isinstance(value, torch.Tensor) and id(value) not in own
            }
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def complete(self, state_dict: dict[str, Any], metadata: Metadata | None) -> CompletionResult:
        """Complete the dicts of a state dict that ask for the checkpoint's keys, in place."""
        if metadata is None or not self.flatten_state_dict:
            return CompletionResult()
        return complete_in_place(state_dict, metadata, self.key_decoder())

    def key_decoder(self) -> KeyDecoder:
        """Return a decoder of the keys that are no plain data, which admits what values may be."""
        return KeyDecoder(weights_only=self.weights_only, safe_globals=self.safe_globals)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None, "set_up_planner was called without the checkpoint's metadata"
        if self.flatten_state_dict and not self.state_dict.keys() >= self.metadata.state_dict_metadata.keys():
            self._use_keys_of_old_checkpoint(self.metadata)
        return create_default_local_load_plan(
            self.state_dict, self.metadata, not self.allow_partial_load, cast_dtype=self.cast_dtype
        )

    def _use_keys_of_old_checkpoint(self, metadata: Metadata) -> None:
        """Key the state dict as torch did before 2.4, if the checkpoint has keys that only that gives."""
        state_dict = self.original_state_dict
        if self.flatten_sharded_tensors:
            # As in set_up_planner: a ShardedTensor without a shard on this rank must have no key here either.
            state_dict = flatten_sharded_tensors(state_dict)
        old_state_dict, old_mappings = flatten_state_dict(state_dict, enter_plain_dicts=False)
        if any(fqn not in self.state_dict and fqn in metadata.state_dict_metadata for fqn in old_state_dict):
            self.state_dict, self.mappings = old_state_dict, old_mappings

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return create_default_global_load_plan(global_plan)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        return new_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        loaded = load_value(fqn, value, weights_only=self.weights_only, safe_globals=self.safe_globals)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, actual_path(self.mappings, fqn), loaded)
        else:
            self.state_dict[fqn] = loaded
            # A second dict, if sharded tensors were flattened: flattening copies the dict.
            self.original_state_dict[fqn] = loaded

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.transform_tensor(read_item, self.lookup_tensor(read_item.dest_index))

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: ``resolve_tensor`` returned a view of the state dict's own tensor."""

    def adopt_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> bool:
        """Put a whole saved tensor, of a class of its own, in the place of a plain one that was only allocated for it.

        Called by readers of this package, from any thread, before they would convert the tensor into the plain one.

        Returns:
            False if the tensor is not to be replaced (its key is not in ``adopted_keys``), or has other parts as well.
        """
        index = read_item.dest_index
        if index.fqn not in self.adopted_keys:
            return False
        value = self.state_dict[index.fqn]
        held = self.lookup_tensor(index)
        if handles_operators(held) or held.shape != tensor.shape:
            return False
        new = like_sharded(value, moved(tensor, held.device))
        if new is None:
            return False
        self.state_dict[index.fqn] = new
        if self.flatten_state_dict:
            set_element(self.original_state_dict, actual_path(self.mappings, index.fqn), new)
        else:
            self.original_state_dict[index.fqn] = new
        return True

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the local tensor, or view, for ``index``; to be overridden at will."""
        return cast("torch.Tensor", find_object(self.state_dict, index))

    def transform_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        """Narrow a looked-up tensor to the part that ``read_item`` fills."""
        if tensor.shape == read_item.lengths:
            return tensor
        if handles_operators(tensor):
            return narrow_view(tensor, read_item.dest_offsets, read_item.lengths, read_item.dest_index.fqn)
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            if length != tensor.size(dim):
                tensor = tensor.narrow(dim, start, length)
        return tensor

    @property
    def resolves_views(self) -> bool:
        """Whether targets are views of the state dict's tensors and nothing follows the read.

        A reader may then resolve all targets first and fill them from several threads.
        """
        hooks = ("resolve_tensor", "commit_tensor", "lookup_tensor", "transform_tensor")
        return all(getattr(type(self), hook) is getattr(DefaultLoadPlanner, hook) for hook in hooks)


def create_default_local_load_plan(
    state_dict: dict[str, Any], metadata: Metadata, strict: bool = True, *, cast_dtype: bool = True
) -> LoadPlan:
    """Return the reads that fill a flat state dict, whatever layout the checkpoint was saved in.

    Args:
        state_dict: Flat; tensors give their size, dtype and the boxes held here.
        metadata: The checkpoint's.
        strict: Whether a key that the checkpoint lacks is an error.
        cast_dtype: Whether a differing dtype is converted (with a warning) rather than an error.

    Raises:
        PlanError: Names every key that is missing, or differs in kind, size or dtype, or whose saved chunks overlap
            or leave elements of a wanted box uncovered.
    """
    items: list[ReadItem] = []
    missing: list[str] = []
    problems: list[str] = []
    casts: list[str] = []
    known_intersections = _Intersections()
    for fqn, value in state_dict.items():
        entry = metadata.state_dict_metadata.get(fqn)
        if entry is None:
            if strict:
                missing.append(fqn)
        elif isinstance(entry, BytesStorageMetadata):
            items.append(bytes_read_item(fqn))
        elif not isinstance(value, torch.Tensor) and not hasattr(value, "__create_chunk_list__"):
            problems.append(
                f"{fqn}: the checkpoint holds a tensor of size {tuple(entry.size)}, "
                f"the state dict a {type(value).__name__}"
            )
        else:
            size, dtype = _size_and_dtype(value)
            if size is not None and entry.size != tuple(size):
                problems.append(f"Size mismatch between saved {tuple(entry.size)} and current: {tuple(size)} for {fqn}")
                continue
            if dtype is not None and dtype != entry.properties.dtype:
                casts.append(f"{fqn} ({entry.properties.dtype} -> {dtype})")
            saved = entry.chunks
            if is_whole(value) and len(saved) == 1 and saved[0].sizes == size and 0 not in size:
                items.append(whole_read_item(fqn, saved[0]))
                continue
            wanted = chunks(value, fqn)
            found = known_intersections.between(entry, wanted)
            if found is None:
                problems += _chunk_problems(fqn, entry, wanted)
            else:
                items += read_items(fqn, saved, wanted, found)
    if missing:
        problems.insert(0, _missing_keys(missing, metadata))
    if casts and not cast_dtype:
        problems.append(f"dtypes differ and cast_dtype=False: {listing(casts)}")
    if problems:
        shown = problems[:_MAX_PROBLEMS]
        more = [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise PlanError("\n".join(["the checkpoint does not fit the state dict:", *shown, *more]))
    if casts:
        warn_user(f"tensors are converted while loading, their dtypes differ: {listing(casts)}")
    return LoadPlan(items)


def _size_and_dtype(value: Any) -> tuple[Sequence[int] | None, torch.dtype | None]:
    """Return what a target is in global terms; None where an object with hooks does not say."""
    if isinstance(value, ShardedTensor):
        return size_of(value), dtype_of(value)
    size = value.global_shape if is_checkpointable(value) else getattr(value, "shape", None)
    return size, getattr(value, "dtype", None)


class _Intersections:
    """The intersections of saved and wanted chunks, found once for all tensors that are saved and wanted alike."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[Intersection] | None] = {}

    def between(
        self, entry: TensorStorageMetadata, wanted: Sequence[ChunkStorageMetadata]
    ) -> list[Intersection] | None:
        """Return the intersections; None if saved chunks are out of bounds, overlap, or leave holes in wanted ones."""
        key = (tuple(entry.size), _as_key(entry.chunks), _as_key(wanted))
        if key not in self._known:
            fits = not _chunk_problems("", entry, wanted)
            self._known[key] = intersections([*map(box_of, entry.chunks)], [*map(box_of, wanted)]) if fits else None
        return self._known[key]


def _as_key(boxes: Iterable[ChunkStorageMetadata]) -> Hashable:
    return tuple([(tuple(box.offsets), tuple(box.sizes)) for box in boxes])


def _chunk_problems(fqn: str, entry: TensorStorageMetadata, wanted: Sequence[ChunkStorageMetadata]) -> list[str]:
    saved = entry.chunks
    if len(saved) == 1 and saved[0].sizes == entry.size and not any(saved[0].offsets):
        return []
    problems = overlap_problems(fqn, saved, entry.size)
    if not problems and sum(math.prod(chunk.sizes) for chunk in saved) == math.prod(entry.size):
        # Disjoint chunks inside the tensor, of its volume together, leave no hole.
        return []
    for chunk in [] if problems else wanted:
        problems += coverage_problems(fqn, saved, box_of(chunk))
    return problems


def _missing_keys(missing: list[str], metadata: Metadata) -> str:
    message = f"Missing key in checkpoint state_dict: {listing(missing)}."
    known = list(metadata.state_dict_metadata)
    close = difflib.get_close_matches(sorted(missing)[0], known[:5000], n=1, cutoff=0.8)
    if close:
        message += f" Closest key of the checkpoint to the first: {close[0]}."
    message += " To load what is there: DefaultLoadPlanner(allow_partial_load=True)"
    return message + _about_groups(missing, known)


def _about_groups(missing: list[str], known: list[str]) -> str:
    """Explain missing options of an optimizer's parameter groups: what was saved has another form, or fewer groups."""
    wanted = next((found for found in map(_GROUP_KEY.match, missing) if found), None)
    if wanted is None:
        return ""
    groups = f"{wanted['prefix']}param_groups"
    saved = [found for found in map(_GROUP_KEY.match, known) if found and found["prefix"] == wanted["prefix"]]
    numbers = {found["number"] for found in saved} - {None}
    flat = "StateDictOptions(flatten_optimizer_state_dict=True)"
    if not saved:
        return ""
    if numbers and not wanted["number"]:
        return (
            f"\nThe checkpoint holds '{groups}' as a list of groups, the state dict asks for it by parameter: it was "
            f"made with {flat}, what was saved was not. Make the state dict without. Pipeline stages need that option, "
            "as their ranks hold different parameters: load the checkpoint once in a run without stages, save it again "
            "with the option, and load what that saved."
        )
    if numbers:
        return (
            f"\nThe checkpoint holds {len(numbers)} group(s) in '{groups}', the state dict asks for more. Group the "
            f"parameters as they were when it was saved; or save and load with {flat}, which does not depend on groups."
        )
    if wanted["number"]:
        return (
            f"\nThe checkpoint holds '{groups}' by parameter, the state dict asks for a list of groups: make it with "
            f"{flat}, as what was saved was."
        )
    return ""


def create_default_global_load_plan(all_plans: list[LoadPlan]) -> list[LoadPlan]:
    """Return the plans as they are: each rank reads for itself."""
    return all_plans
