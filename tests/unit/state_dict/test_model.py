"""Getting and setting a model's state on one process."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint.state_dict as stock
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dcp_plugins.errors import PlanError
from dcp_plugins.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from tests.unit.state_dict.samples import Net, TiedNet, assert_equal, snapshot, train, with_frozen_first_layer


def test_the_state_dict_of_a_plain_model_is_its_own_and_torchs() -> None:
    model = Net()
    assert_equal(dict(get_model_state_dict(model)), dict(model.state_dict()))
    assert_equal(dict(get_model_state_dict(model)), dict(stock.get_model_state_dict(model)))


def test_tensors_of_the_state_dict_are_the_models_memory() -> None:
    model = Net()
    state = get_model_state_dict(model)
    for name, parameter in model.named_parameters():
        assert state[name].data_ptr() == parameter.data_ptr()


def test_a_state_dict_moves_everything_to_another_model_and_stays_as_it_is() -> None:
    model, other = Net(), Net()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state = get_model_state_dict(model)
    before = snapshot(dict(state))
    assert set_model_state_dict(other, state) == ([], [])
    assert_equal(dict(get_model_state_dict(other)), dict(get_model_state_dict(model)))
    assert other.counted.count == 3
    assert_equal(dict(state), before)


@pytest.mark.parametrize("backwards", [False, True])
def test_state_dicts_are_interchangeable_with_torchs(backwards: bool) -> None:
    getter, setter = (
        (stock.get_model_state_dict, set_model_state_dict)
        if backwards
        else (get_model_state_dict, stock.set_model_state_dict)
    )
    model, other = Net(), Net()
    setter(other, getter(model))
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))


def test_wrappers_leave_no_trace_in_the_keys() -> None:
    plain = Net()
    wrapped = copy.deepcopy(plain)
    wrapped.blocks[0] = torch.compile(checkpoint_wrapper(wrapped.blocks[0]), backend="eager")
    wrapped.blocks[1] = checkpoint_wrapper(torch.compile(wrapped.blocks[1], backend="eager"))
    wrapped = nn.DataParallel(torch.compile(wrapped, backend="eager"))
    assert_equal(dict(get_model_state_dict(wrapped)), dict(plain.state_dict()))


def test_a_wrapped_model_loads_and_names_keys_canonically() -> None:
    plain = Net()
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    wrapped = Net()
    wrapped.blocks[0] = torch.compile(checkpoint_wrapper(wrapped.blocks[0]), backend="eager")
    wrapped.blocks[1] = checkpoint_wrapper(torch.compile(wrapped.blocks[1], backend="eager"))
    wrapped = torch.compile(wrapped, backend="eager")
    assert set_model_state_dict(wrapped, get_model_state_dict(plain)) == ([], [])
    assert_equal(dict(get_model_state_dict(wrapped)), dict(get_model_state_dict(plain)))
    state = dict(get_model_state_dict(plain))
    del state["blocks.0.0.weight"], state["blocks.1.0.bias"]
    state["blocks.0.0.extra"] = torch.zeros(1)
    found = set_model_state_dict(wrapped, state, options=StateDictOptions(strict=False))
    assert sorted(found.missing_keys) == ["blocks.0.0.weight", "blocks.1.0.bias"]
    assert found.unexpected_keys == ["blocks.0.0.extra"]


def test_strict_loading_tells_all_keys_and_suggests_similar_ones() -> None:
    model = Net()
    state = dict(get_model_state_dict(model))
    state["model.last.weight"] = state.pop("last.weight")
    state["norm.wieght"] = state.pop("norm.weight")
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        set_model_state_dict(model, state)
    message = str(caught.value)
    assert '"last.weight" (did you mean "model.last.weight"?)' in message
    assert '"norm.weight" (did you mean "norm.wieght"?)' in message
    assert "Unexpected key" in message


def test_loading_that_is_not_strict_returns_missing_and_unexpected_keys() -> None:
    model = Net()
    state = dict(get_model_state_dict(model))
    state["abc"] = state.pop("last.weight")
    found = set_model_state_dict(model, state, options=StateDictOptions(strict=False))
    assert found.missing_keys == ["last.weight"]
    assert found.unexpected_keys == ["abc"]


@pytest.mark.parametrize("full", [False, True])
def test_a_size_mismatch_names_both_sizes(full: bool) -> None:
    model = Net()
    state = dict(get_model_state_dict(model))
    state["last.weight"] = torch.zeros(3, 9)
    with pytest.raises(RuntimeError, match=r"size mismatch for last.weight.*3, 9.*3, 8"):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=full))


def test_whole_tensors_that_do_not_fit_change_nothing() -> None:
    model = Net()
    state = {key: value + 1 if isinstance(value, torch.Tensor) else value for key, value in model.state_dict().items()}
    state["last.weight"] = torch.zeros(3, 9)
    before = snapshot(dict(model.state_dict()))
    with pytest.raises(PlanError):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    assert_equal(dict(model.state_dict()), before)


@pytest.mark.parametrize("broadcast", [False, True])
def test_a_full_state_dict_loads_without_a_process_group(broadcast: bool) -> None:
    model, other = Net(), Net()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    parameters = list(other.parameters())
    assert set_model_state_dict(other, get_model_state_dict(model, options=options), options=options) == ([], [])
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))
    assert all(one is two for one, two in zip(parameters, other.parameters(), strict=True))


def test_frozen_parameters_are_left_out_and_not_missed() -> None:
    model, other = with_frozen_first_layer(Net()), with_frozen_first_layer(Net())
    options = StateDictOptions(ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    assert_equal(dict(state), dict(stock.get_model_state_dict(model, options=options)))
    assert not any(key.startswith("first.") for key in state)
    assert set_model_state_dict(other, state, options=options) == ([], [])
    with pytest.raises(RuntimeError, match=r"Missing key.*first.bias"):
        set_model_state_dict(other, state)


def test_submodules_select_keys_and_warn() -> None:
    model = Net()
    with pytest.warns(FutureWarning, match="submodules"):
        kept = get_model_state_dict(model, submodules={model.blocks[1]})
    assert set(kept) == {"blocks.1.0.weight", "blocks.1.0.bias"}
    options = StateDictOptions(keep_submodule_prefixes=False)
    with pytest.warns(FutureWarning, match="submodules"):
        cut = get_model_state_dict(model, submodules={model.blocks[1]}, options=options)
    assert set(cut) == {"0.weight", "0.bias"}
    with pytest.warns(FutureWarning, match="keyed by submodules"):
        found = set_model_state_dict(model, {model.blocks[1]: cut}, options=StateDictOptions(strict=False))
    assert found.unexpected_keys == []


def test_tied_weights_have_both_names_and_load_from_either() -> None:
    model = TiedNet()
    state = dict(get_model_state_dict(model))
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    for gone in ("head.weight", "embed.weight"):
        other = TiedNet()
        partial = {key: value for key, value in state.items() if key != gone}
        assert set_model_state_dict(other, partial) == ([], [])
        assert_equal(dict(other.state_dict()), dict(model.state_dict()))
    with pytest.raises(RuntimeError, match="Missing key"):
        set_model_state_dict(other, {"body.weight": state["body.weight"], "body.bias": state["body.bias"]})


@pytest.mark.parametrize("full", [False, True])
def test_a_model_on_meta_is_filled_and_stays_tied(full: bool) -> None:
    source = TiedNet()
    with torch.device("meta"):
        model = TiedNet()
        model.body.bias.requires_grad_(False)
    options = StateDictOptions(full_state_dict=full)
    assert set_model_state_dict(model, get_model_state_dict(source), options=options) == ([], [])
    assert_equal(dict(model.state_dict()), dict(source.state_dict()))
    assert model.head.weight is model.embed.weight
    assert not model.body.bias.requires_grad
    assert model.body.weight.requires_grad
    assert model.body.weight.data_ptr() != source.body.weight.data_ptr()


def test_parameters_that_are_real_stay_the_same_objects_when_others_are_filled() -> None:
    model = Net()
    model.last.to("meta")
    first = model.first.weight
    set_model_state_dict(model, get_model_state_dict(Net()))
    assert model.first.weight is first
    assert not model.last.weight.is_meta


class _Renaming(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.other = nn.Linear(2, 2)
        self._register_state_dict_hook(self._hide)
        self.register_load_state_dict_pre_hook(self._show)

    @staticmethod
    def _hide(module: nn.Module, state_dict: dict, prefix: str, _: object) -> None:
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "embedding.weight")

    @staticmethod
    def _show(module: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
        if prefix + "weight" in state_dict:
            state_dict[prefix + "embedding.weight"] = state_dict.pop(prefix + "weight")

    def _fqn_modifiers(self) -> dict[str, str]:
        return {"weight": "embedding"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.embedding(x.abs().long().clamp(max=3)).mean(1))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_hooks_that_rename_keys_are_honoured(full: bool, meta: bool) -> None:
    model = nn.Sequential(_Renaming())
    with torch.device("meta" if meta else "cpu"):
        other = nn.Sequential(_Renaming())
    state = get_model_state_dict(model)
    assert "0.weight" in state
    set_model_state_dict(other, state, options=StateDictOptions(full_state_dict=full))
    assert torch.equal(other[0].embedding.weight, model[0].embedding.weight)


def test_optimizer_state_under_a_renaming_hook_loads_under_either_name() -> None:
    from dcp_plugins.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = nn.Sequential(_Renaming())
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    state = get_optimizer_state_dict(model, optimizer)
    assert "0.embedding.weight" in state["state"]
    expected = snapshot(optimizer.state_dict())
    state["state"]["0.weight"] = state["state"].pop("0.embedding.weight")
    state["param_groups"][0]["params"][0] = "0.weight"
    other = torch.optim.Adam(model.parameters())
    set_optimizer_state_dict(model, other, state)
    assert_equal(other.state_dict(), expected)


def test_versions_of_modules_travel_with_the_state_dict() -> None:
    model = nn.DataParallel(Net())
    state = get_model_state_dict(model)
    assert state._metadata["norm"] == {"version": 2}  # type: ignore[attr-defined]


def test_cpu_offload_and_full_on_one_process_keep_everything() -> None:
    model = TiedNet()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    ours, theirs = (
        get_state_dict(model, optimizer, options=options),
        stock.get_state_dict(model, optimizer, options=options),
    )
    assert_equal(dict(ours[0]), dict(theirs[0]))
    assert_equal(ours[1], theirs[1])


def test_broadcasting_needs_full_tensors_and_the_error_says_so() -> None:
    options = StateDictOptions(broadcast_from_rank0=True)
    with pytest.raises(ValueError, match="full_state_dict must be True when broadcast_from_rank0"):
        set_model_state_dict(Net(), {}, options=options)


def test_a_model_without_state_has_an_empty_state_dict() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dict(get_model_state_dict(nn.ReLU())) == {}
        assert set_model_state_dict(nn.ReLU(), {}) == ([], [])


def test_strict_loading_that_is_refused_changes_nothing() -> None:
    source, model = Net(), Net()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    before = snapshot(model.state_dict())
    state = dict(get_model_state_dict(source))
    removed = next(iter(state))
    del state[removed]
    with pytest.raises(PlanError, match="Nothing has been loaded"):
        set_model_state_dict(model, state)
    assert_equal(dict(model.state_dict()), dict(before))
    state[removed] = source.state_dict()[removed]
    with pytest.raises(PlanError, match="Nothing has been loaded"):
        set_model_state_dict(
            model, {**state, "unheard_of": torch.ones(1)}, options=StateDictOptions(full_state_dict=True)
        )
    assert_equal(dict(model.state_dict()), dict(before))


def test_a_model_that_does_not_fit_leaves_its_optimizer_alone() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    state, optim = get_state_dict(model, optimizer)
    optim["param_groups"][0]["lr"] = 0.5
    wrong = {**state, next(iter(state)): torch.zeros(1, 1, 1)}
    for options in (StateDictOptions(), StateDictOptions(full_state_dict=True)):
        with pytest.raises(PlanError, match="size mismatch"):
            set_state_dict(model, optimizer, model_state_dict=wrong, optim_state_dict=optim, options=options)
        assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_state_dict_keyed_by_submodules_warns_once_and_at_the_caller() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keyed = {model[0]: model[0].state_dict()}
    _, optim = get_state_dict(model, optimizer)
    with pytest.warns(FutureWarning, match="keyed by submodules") as found:
        set_model_state_dict(model, keyed)
    assert [warning.filename for warning in found] == [__file__]
    with pytest.warns(FutureWarning, match="keyed by submodules") as found:
        set_state_dict(model, optimizer, model_state_dict=keyed, optim_state_dict=optim)
    assert [warning.filename for warning in found] == [__file__]
