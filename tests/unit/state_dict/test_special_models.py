"""Models that load in ways of their own: other sizes, tied memory, adapters, averages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as stock
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dcp_plugins as dcp
from dcp_plugins.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from tests.unit.state_dict.samples import Net, TiedNet, assert_equal, snapshot, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    # Of compiling a module in the middle of a model.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

OPTIONS = [
    StateDictOptions(),
    StateDictOptions(full_state_dict=True),
    StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
]


def _compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [lambda model: model, checkpoint_wrapper, _compiled, nn.DataParallel])
def test_sizes_that_differ_are_all_told_and_nothing_is_loaded(wrap: Any) -> None:
    model = wrap(Net())
    before = snapshot(dict(model.state_dict()))
    state: dict[str, Any] = dict(get_model_state_dict(Net()))
    state["last.weight"] = torch.zeros(3, 9)
    state["norm.running_mean"] = torch.zeros(1, 8)
    with pytest.raises(RuntimeError) as caught:
        set_model_state_dict(model, state)
    assert "size mismatch for last.weight: found (3, 9), the model has (3, 8)" in str(caught.value)
    assert "size mismatch for norm.running_mean: found (1, 8), the model has (8,)" in str(caught.value)
    assert_equal(dict(model.state_dict()), before)


class _Padded(nn.Linear):
    """Takes a checkpoint of another vocabulary: rows are cut or added."""

    def __init__(self, rows: int) -> None:
        super().__init__(4, rows, bias=False)
        self.register_load_state_dict_pre_hook(self._fit)

    @staticmethod
    def _fit(module: _Padded, state: dict[str, Any], prefix: str, *_: Any) -> None:
        found = state[f"{prefix}weight"]
        state[f"{prefix}weight"] = torch.cat([found, module.weight.detach()[len(found) :]])[: len(module.weight)]


class _Resized(nn.Module):
    """As quantisation's observers: a buffer takes the size of what is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}seen" in state_dict:
            self.seen = torch.zeros_like(state_dict[f"{prefix}seen"])
        super()._load_from_state_dict(state_dict, prefix, *rest)


@pytest.mark.parametrize("wrap", [lambda model: model, checkpoint_wrapper, _compiled])
def test_modules_that_load_other_sizes_themselves_may(wrap: Any) -> None:
    model = nn.Sequential(wrap(_Padded(5)), nn.Sequential(wrap(_Resized())), nn.Linear(2, 2))
    state = {
        "0.weight": torch.ones(3, 4),
        "1.0.seen": torch.ones(7),
        "2.weight": torch.ones(2, 2),
        "2.bias": torch.ones(2),
    }
    assert set_model_state_dict(model, state) == ([], [])
    own = get_model_state_dict(model)
    assert torch.equal(own["0.weight"][:3], torch.ones(3, 4))
    assert torch.equal(own["1.0.seen"], torch.ones(7))
    with pytest.raises(RuntimeError, match=r"size mismatch for 2.bias"):
        set_model_state_dict(model, {**state, "2.bias": torch.ones(3)})


class _Silent(nn.Linear):
    """Loads in its own way, and does not return what the keys were."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, **options: Any) -> Any:
        super().load_state_dict({key.removeprefix("old."): value for key, value in state_dict.items()}, strict)


@pytest.mark.parametrize("load", [set_model_state_dict, stock.set_model_state_dict])
def test_a_model_that_judges_its_keys_itself_is_asked_to_be_strict(load: Any) -> None:
    model = _Silent(2, 2)
    load(model, {"old.weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert torch.equal(model.weight, torch.ones(2, 2))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"bias\""):
        load(model, {"old.weight": torch.ones(2, 2)})


class _Answering(nn.Linear):
    """Loads in its own way, and returns an object whose attributes are no keys."""

    class Answer:
        missing_keys = 0
        unexpected_keys = property(lambda self: (key for key in "ab"))

    def load_state_dict(self, state_dict: Any, strict: bool = True, **options: Any) -> Any:
        super().load_state_dict(state_dict, strict)
        return self.Answer()


def test_a_models_own_load_may_return_anything() -> None:
    model = _Answering(2, 2)
    options = StateDictOptions(strict=False)
    assert set_model_state_dict(model, {"weight": torch.ones(2, 2)}, options=options) == ([], [])
    assert torch.equal(model.weight, torch.ones(2, 2))


class _Transposed(nn.Module):
    """Decodes with the encoder's weight, transposed, and loads in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.zeros(2, 2))
        self.decoder = nn.Parameter(self.encoder.detach().t())

    def load_state_dict(self, state_dict: Any, strict: bool = True, **options: Any) -> Any:
        return super().load_state_dict(state_dict, strict)


def test_a_transposed_view_of_a_weight_is_not_loaded_a_second_time() -> None:
    model = _Transposed()
    weight = torch.arange(4.0).reshape(2, 2)
    set_model_state_dict(model, {"encoder": weight})
    assert torch.equal(model.encoder, weight)


def test_lazy_modules_and_scalars_load_as_torch_loads_them() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    set_model_state_dict(model, {"0.weight": torch.ones(3, 5), "0.bias": torch.ones(3)})
    assert model[0].weight.shape == (3, 5)
    scalar = nn.Module()
    scalar.register_buffer("count", torch.tensor(0.0))
    set_model_state_dict(scalar, {"count": torch.tensor([4.0])})
    assert scalar.count == 4


class _Remembering(nn.Linear):
    """As TransformerEngine: extra state is a tensor, as long as what it holds."""

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__(2, 2)
        self.memory: Any = memory

    def get_extra_state(self) -> Any:
        return self.memory

    def set_extra_state(self, state: Any) -> None:
        self.memory = state


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("wrap", [lambda model: model, checkpoint_wrapper, _compiled])
def test_extra_state_may_have_another_size_than_the_models(options: StateDictOptions, wrap: Any) -> None:
    source = nn.Sequential(wrap(_Remembering(torch.arange(9, dtype=torch.uint8))), _Remembering({"a": [torch.ones(3)]}))
    model = nn.Sequential(wrap(_Remembering(torch.zeros(2))), _Remembering(None))
    with torch.device("meta"):
        on_meta = nn.Sequential(wrap(_Remembering(torch.zeros(2))), _Remembering(None))
    for target in (model, on_meta):
        assert set_model_state_dict(target, get_model_state_dict(source), options=options) == ([], [])
        assert_equal(dict(get_model_state_dict(target)), dict(get_model_state_dict(source)))


class _Views(nn.Module):
    """One memory under several names: two parameters over it, another shape, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.same = nn.Parameter(self.embed.weight.detach())
        self.flat = nn.Parameter(self.embed.weight.detach().view(-1))
        self.turned = nn.Parameter(self.embed.weight.detach().t())
        self.rows = nn.Parameter(self.embed.weight.detach()[:3])


@pytest.mark.parametrize("options", OPTIONS)
def test_parameters_over_one_memory_are_tied_and_a_part_of_it_is_not(options: StateDictOptions) -> None:
    model = _Views()
    for kept in ("embed.weight", "same", "flat", "turned"):
        state = {
            name: value.clone() for name, value in get_model_state_dict(_Views()).items() if name in (kept, "rows")
        }
        expected = state[kept].t() if kept == "turned" else state[kept].view(7, 4)
        state["rows"] = expected[:3].clone()
        assert set_model_state_dict(model, state, options=options) == ([], [])
        assert torch.equal(model.embed.weight, expected)
        assert torch.equal(model.turned, expected.t())
    with pytest.raises(RuntimeError, match="Missing key.*flat"):
        set_model_state_dict(model, {"rows": torch.zeros(3, 4)}, options=options)


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, _compiled, nn.DataParallel])
def test_what_is_tied_after_wrapping_is_tied(wrap: Any) -> None:
    model = TiedNet()
    model.head.weight = nn.Parameter(torch.zeros(7, 4))
    model.embed, model.head = wrap(model.embed), wrap(model.head)
    inner = next(module for module in model.head.modules() if isinstance(module, nn.Linear))
    inner.weight = next(module for module in model.embed.modules() if isinstance(module, nn.Embedding)).weight
    state = dict(get_model_state_dict(TiedNet()))
    for gone in ("head.weight", "embed.weight"):
        assert set_model_state_dict(model, {k: v for k, v in state.items() if k != gone}) == ([], [])
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    assert set(get_optimizer_state_dict(model, optimizer)["state"]) == {"embed.weight", "body.weight", "body.bias"}


def test_a_shared_module_has_all_its_names_and_one_optimizer_state() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[2] = checkpoint_wrapper(model[0])
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    state: Any = get_state_dict(model, optimizer)
    assert set(state[0]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert set(state[1]["state"]) == {"0.weight", "0.bias"}
    other = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    other[2] = other[0]
    fresh = torch.optim.Adam(other.parameters())
    half = {name: value for name, value in state[0].items() if name.startswith("2")}
    assert set_state_dict(other, fresh, model_state_dict=half, optim_state_dict=state[1]) == ([], [])
    train(model, optimizer)
    train(other, fresh)
    assert_equal(dict(get_model_state_dict(other)), dict(get_model_state_dict(model)))


class _LoRA(nn.Module):
    """A frozen layer and what is trained beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def _adapted(wrap: Any = lambda model: model) -> nn.Module:
    model = Net().requires_grad_(False)
    model.first = _LoRA(model.first)
    # Only what has no state of its own is checkpointed: it runs twice a step.
    model.last = wrap(_LoRA(model.last))
    return _compiled(model) if wrap is _compiled else model


@pytest.mark.parametrize("wrap", [lambda model: model, checkpoint_wrapper, _compiled])
@pytest.mark.parametrize("trained_only", [False, True])
def test_adapters_beside_a_frozen_base_continue(tmp_path: Any, wrap: Any, trained_only: bool) -> None:
    options = StateDictOptions(ignore_frozen_params=True)
    model = _adapted(wrap)
    every, some = list(model.parameters()), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(some if trained_only else every, lr=0.02)
    train(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    assert {name for name in model_state if name.endswith("weight")} == {
        "first.down.weight", "first.up.weight", "last.down.weight", "last.up.weight",
    }  # fmt: skip
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "c")

    other = _adapted()
    with torch.no_grad():
        for name, value in get_model_state_dict(model).items():
            if isinstance(value, torch.Tensor) and name not in model_state:
                get_model_state_dict(other)[name].copy_(value)
    own = [p for p in other.parameters() if p.requires_grad] if trained_only else list(other.parameters())
    fresh = torch.optim.AdamW(own, lr=9.0)
    state = dict(zip(("model", "optimizer"), get_state_dict(other, fresh, options=options), strict=True))
    dcp.load(state, checkpoint_id=tmp_path / "c")
    found = set_state_dict(
        other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    assert found == ([], [])
    train(model, optimizer)
    train(other, fresh)
    assert_equal(dict(get_model_state_dict(other)), dict(get_model_state_dict(model)))
    assert_equal(get_optimizer_state_dict(other, fresh), get_optimizer_state_dict(model, optimizer))


def test_adapters_of_peft_continue(tmp_path: Any) -> None:
    import peft

    def adapted() -> Any:
        config = peft.LoraConfig(r=2, target_modules=["first", "last", "blocks.0.0"], init_lora_weights=False)
        torch.manual_seed(3)
        return peft.get_peft_model(Net(), config)

    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    train(model, optimizer)
    options = StateDictOptions(ignore_frozen_params=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    assert_equal(dict(model_state), dict(stock.get_model_state_dict(model, options=options)))
    assert_equal(optimizer_state["state"], stock.get_optimizer_state_dict(model, optimizer)["state"])
    assert all(("lora_" in name) for name in optimizer_state["state"])
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "c")
    other = _compiled(adapted())
    net = other.base_model.model
    net.last = checkpoint_wrapper(net.last)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    fresh = torch.optim.AdamW(other.parameters(), lr=9.0)
    state = dict(zip(("model", "optimizer"), get_state_dict(other, fresh, options=options), strict=True))
    dcp.load(state, checkpoint_id=tmp_path / "c")
    found = set_state_dict(
        other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    assert found == ([], [])
    train(model, optimizer)
    train(other, fresh)
    assert_equal(dict(get_model_state_dict(other)), dict(get_model_state_dict(model)))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, _compiled])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_the_model_continues(tmp_path: Any, wrap: Any, use_buffers: bool) -> None:
    def averaged(model: nn.Module) -> AveragedModel:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)

    model = wrap(Net())
    ema, optimizer = averaged(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        train(model, optimizer, steps=1)
        ema.update_parameters(model)
    state = {"model": get_model_state_dict(model), "ema": get_model_state_dict(ema)}
    assert set(state["ema"]) == {"n_averaged", *(f"module.{name}" for name in state["model"])}
    dcp.save(state, checkpoint_id=tmp_path / "c")
    other = Net()
    other_ema, other_optimizer = averaged(other), torch.optim.SGD(other.parameters(), lr=0.1)
    loaded = {"model": get_model_state_dict(other), "ema": get_model_state_dict(other_ema)}
    dcp.load(loaded, checkpoint_id=tmp_path / "c")
    assert set_model_state_dict(other, loaded["model"]) == ([], [])
    assert set_model_state_dict(other_ema, loaded["ema"]) == ([], [])
    assert other_ema.n_averaged == 2
    for one, two, average in ((model, optimizer, ema), (other, other_optimizer, other_ema)):
        train(one, two, steps=1)
        average.update_parameters(one)
    assert_equal(dict(get_model_state_dict(other_ema)), dict(get_model_state_dict(ema)))


class _Hiding(nn.Module):
    """Leaves out ``inner`` from its keys and says so under a name of its own choice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self._register_state_dict_hook(self._hide)
        self.register_load_state_dict_pre_hook(self._show)

    @staticmethod
    def _hide(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in ("weight", "bias"):
            state[f"{prefix}{name}"] = state.pop(f"{prefix}inner.{name}")

    @staticmethod
    def _show(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}{name}" in state:
                state[f"{prefix}inner.{name}"] = state.pop(f"{prefix}{name}")

    def hidden(self) -> dict[str, str]:
        return {"": "inner"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("wrap", [lambda model: model, checkpoint_wrapper, _compiled])
@pytest.mark.parametrize("flat", [False, True])
def test_the_caller_names_the_method_that_tells_hidden_children(wrap: Any, flat: bool) -> None:
    options = StateDictOptions(dsd_fqn_modifiers="hidden", flatten_optimizer_state_dict=flat)
    model = nn.Sequential(wrap(_Hiding()))
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    assert set(model_state) == {"0.weight", "0.bias"}
    # As from a run whose optimizer was keyed like the model.
    renamed = _renamed(snapshot(optimizer_state))
    other = nn.Sequential(_Hiding())
    for state in (optimizer_state, renamed):
        fresh = torch.optim.Adam(other.parameters())
        set_state_dict(other, fresh, model_state_dict=model_state, optim_state_dict=state, options=options)
        assert_equal(fresh.state_dict(), optimizer.state_dict())
    with pytest.raises(RuntimeError, match="Missing optimizer state"):
        set_optimizer_state_dict(other, torch.optim.Adam(other.parameters()), renamed)


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {_renamed(key): _renamed(element) for key, element in value.items()}
    if isinstance(value, list):
        return [_renamed(element) for element in value]
    return value.replace("0.inner.", "0.") if isinstance(value, str) else value


def test_submodules_of_a_wrapped_model_select_the_same_keys() -> None:
    model = Net()
    wrapped = copy.deepcopy(model)
    wrapped.blocks[1] = checkpoint_wrapper(wrapped.blocks[1])
    wrapped = nn.DataParallel(_compiled(wrapped))
    inner = wrapped.module._orig_mod
    for keep in (True, False):
        options = StateDictOptions(keep_submodule_prefixes=keep)
        with pytest.warns(FutureWarning, match="submodules"):
            expected = get_model_state_dict(model, submodules={model.blocks[1], model.norm}, options=options)
        with pytest.warns(FutureWarning, match="submodules"):
            found = get_model_state_dict(wrapped, submodules={inner.blocks[1], inner.norm}, options=options)
        with pytest.warns(FutureWarning, match="submodules"):
            theirs = stock.get_model_state_dict(model, submodules={model.blocks[1], model.norm}, options=options)
        assert_equal(dict(found), dict(expected))
        assert_equal(dict(expected), dict(theirs))
