"""Moving over is a find-and-replace: what torch's checkpoint package offers is here, under the same names and calls."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import pytest
import torch.distributed.checkpoint as torch_dcp
import torch.distributed.checkpoint.state_dict as torch_state_dict

import dcp_plugins as dcp
import dcp_plugins.state_dict as our_state_dict

# What torch's `__init__` binds on purpose; it has no `__all__`.
TORCH_NAMES = [
    name for name, value in vars(torch_dcp).items() if not name.startswith("_") and not inspect.ismodule(value)
]

# Module paths that DCP's documentation names, and those that its users import besides.
MODULES = [
    "api",
    "default_planner",
    "filesystem",
    "hf_storage",
    "logger",
    "logging_handlers",
    "metadata",
    "optimizer",
    "planner",
    "planner_helpers",
    "quantized_hf_storage",
    "resharding",
    "staging",
    "state_dict",
    "state_dict_loader",
    "state_dict_saver",
    "stateful",
    "storage",
    "utils",
]
# Names without an `__all__` entry that programs and frameworks import from there.
BESIDES_ALL = [
    ("_extension", "StreamTransformExtension"),
    ("_extension", "ZStandard"),
    ("default_planner", "_EmptyStateDictLoadPlanner"),
    ("metadata", "STATE_DICT_TYPE"),
    ("metadata", "STORAGE_TYPES"),
    ("state_dict_loader", "_load_state_dict"),
]
# Ours differs from torch's on purpose; (call, parameter) -> reason.
OTHER_DEFAULTS = dict.fromkeys(
    (
        ("FileSystemWriter", "thread_count"),
        ("HuggingFaceStorageReader", "thread_count"),
        ("HuggingFaceStorageWriter", "thread_count"),
        ("HuggingFaceStorageWriter", "thread_count_consolidation"),
        ("QuantizedHuggingFaceStorageReader", "thread_count"),
    ),
    "None: as many threads as measured best (docs/design/0006-threads.md)",
)


def test_torchs_names_are_what_this_test_believes() -> None:
    assert {"save", "load", "async_save", "FileSystemWriter", "DefaultLoadPlanner", "Metadata"} <= set(TORCH_NAMES)


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_every_name_of_torchs_package_is_here(name: str) -> None:
    assert hasattr(dcp, name)
    assert name in dcp.__all__


def test_what_is_exported_exists_once() -> None:
    assert len(set(dcp.__all__)) == len(dcp.__all__)
    missing = [name for name in dcp.__all__ if not hasattr(dcp, name)]
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_every_documented_module_path_resolves_with_torchs_names(module: str) -> None:
    theirs = importlib.import_module(f"torch.distributed.checkpoint.{module}")
    ours = importlib.import_module(f"dcp_plugins.{module}")
    missing = [name for name in theirs.__all__ if not hasattr(ours, name)]
    assert not missing


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'dcp_plugins' has no attribute 'state_dct'"):
        dcp.state_dct  # noqa: B018
    assert not hasattr(dcp, "no_such_module")


@pytest.mark.parametrize(("module", "name"), BESIDES_ALL)
def test_names_that_programs_import_from_a_module_are_there(module: str, name: str) -> None:
    theirs = getattr(importlib.import_module(f"torch.distributed.checkpoint.{module}"), name)
    ours = getattr(importlib.import_module(f"dcp_plugins.{module}"), name)
    if inspect.isfunction(theirs):
        assert_accepts(name, theirs, ours)


def test_the_protocol_of_local_tensors_that_are_shards_is_exported() -> None:
    from dcp_plugins.protocol import CheckpointableTensor

    assert dcp.CheckpointableTensor is CheckpointableTensor


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("planner_helpers", "create_read_items_for_chunk_list"),
        ("utils", "find_state_dict_object"),
        ("utils", "find_tensor_shard"),
    ],
)
def test_helpers_take_what_torchs_take(module: str, name: str) -> None:
    theirs = getattr(importlib.import_module(f"torch.distributed.checkpoint.{module}"), name)
    ours = getattr(importlib.import_module(f"dcp_plugins.{module}"), name)
    assert ours.__module__.startswith("dcp_plugins.")
    assert_accepts(name, theirs, ours)


@pytest.mark.parametrize(
    "name",
    [
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "LoadPlan",
        "LoadPlanner",
        "Metadata",
        "ReadItem",
        "SavePlan",
        "SavePlanner",
        "StorageReader",
        "StorageWriter",
        "TensorStorageMetadata",
        "WriteItem",
    ],
)
def test_the_shared_vocabulary_is_torchs_own(name: str) -> None:
    assert getattr(dcp, name) is getattr(torch_dcp, name)


def test_our_exception_is_caught_where_torchs_is_and_as_an_exception() -> None:
    assert issubclass(dcp.CheckpointException, torch_dcp.CheckpointException)
    assert issubclass(dcp.CheckpointException, Exception)


@pytest.mark.parametrize(
    "name",
    [
        "save",
        "save_state_dict",
        "async_save",
        "load",
        "load_state_dict",
        "DefaultSavePlanner",
        "DefaultLoadPlanner",
        "FileSystemReader",
        "FileSystemWriter",
        "HuggingFaceStorageReader",
        "HuggingFaceStorageWriter",
        "QuantizedHuggingFaceStorageReader",
        "load_sharded_optimizer_state_dict",
    ],
)
def test_calls_take_what_torchs_take(name: str) -> None:
    assert_accepts(name, getattr(torch_dcp, name), getattr(dcp, name))


@pytest.mark.parametrize(
    "name",
    [
        "get_model_state_dict",
        "get_optimizer_state_dict",
        "get_state_dict",
        "set_model_state_dict",
        "set_optimizer_state_dict",
        "set_state_dict",
    ],
)
def test_state_dict_functions_take_what_torchs_take(name: str) -> None:
    assert_accepts(name, getattr(torch_state_dict, name), getattr(our_state_dict, name))


def test_state_dict_options_have_torchs_fields_and_defaults() -> None:
    def described(options: Any) -> dict[str, Any]:
        return {field.name: getattr(options(), field.name) for field in dataclasses.fields(options)}

    theirs, ours = described(torch_state_dict.StateDictOptions), described(our_state_dict.StateDictOptions)
    assert {name: ours.get(name) for name in theirs} == theirs


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        (
            "DefaultSavePlanner",
            [
                "set_up_planner",
                "create_local_plan",
                "create_global_plan",
                "finish_plan",
                "resolve_data",
                "lookup_object",
                "transform_object",
            ],
        ),
        (
            "DefaultLoadPlanner",
            [
                "set_up_planner",
                "create_local_plan",
                "create_global_plan",
                "finish_plan",
                "load_bytes",
                "resolve_tensor",
                "commit_tensor",
                "resolve_bytes",
                "lookup_tensor",
                "transform_tensor",
            ],
        ),
        (
            "FileSystemWriter",
            [
                "reset",
                "set_up_storage_writer",
                "prepare_local_plan",
                "prepare_global_plan",
                "write_data",
                "finish",
                "storage_meta",
                "validate_checkpoint_id",
            ],
        ),
        (
            "FileSystemReader",
            [
                "reset",
                "read_metadata",
                "set_up_storage_reader",
                "prepare_local_plan",
                "prepare_global_plan",
                "read_data",
                "validate_checkpoint_id",
            ],
        ),
    ],
)
def test_what_subclasses_override_is_at_the_same_methods(name: str, methods: list[str]) -> None:
    for method in methods:
        if not hasattr(getattr(torch_dcp, name), method):
            continue  # e.g. lookup_object is DefaultSavePlanner's only
        assert_accepts(
            f"{name}.{method}", getattr(getattr(torch_dcp, name), method), getattr(getattr(dcp, name), method)
        )


def assert_accepts(name: str, theirs: Any, ours: Any) -> None:
    """Assert that every call which torch's accepts means the same with ours; ours may take more, by keyword."""
    their_named = _named_parameters(theirs)
    our_parameters = _named_parameters(ours)
    assert list(our_parameters)[: len(their_named)] == list(their_named), name
    for key, wanted in their_named.items():
        found = our_parameters[key]
        assert found.kind is wanted.kind, f"{name}({key})"
        if (name, key) not in OTHER_DEFAULTS:
            assert _default(found) == _default(wanted), f"{name}({key})"
    for key in list(our_parameters)[len(their_named) :]:
        extra = our_parameters[key]
        assert extra.kind is inspect.Parameter.KEYWORD_ONLY, f"{name}({key}): what torch lacks is keyword-only"
        assert extra.default is not inspect.Parameter.empty, f"{name}({key}): what torch lacks has a default"


def _named_parameters(call: Any) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(call.__init__ if inspect.isclass(call) else call).parameters
    catch_all = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {key: value for key, value in parameters.items() if key != "self" and value.kind not in catch_all}


def _default(parameter: inspect.Parameter) -> Any:
    default = parameter.default
    # Enumerations of ours equal torch's by name: they are never mixed in one call.
    return getattr(default, "name", default)
