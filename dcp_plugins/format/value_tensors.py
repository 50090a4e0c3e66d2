"""Builders of torch's values: tensors from checked descriptions, and the small values that describe tensors.

torch's own functions set the sizes and strides that they are given on a storage. Here each description is compared with
its storage first, as far as torch does not do that itself in every version that this package supports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dcp_plugins.format.tensor_pickle import STORAGE_DTYPES, StoredTensor
from dcp_plugins.format.value_decoder import Builders, Decoder, Function
from dcp_plugins.format.value_errors import DecodingError, RefusedError

__all__ = ["StorageKind", "builders"]


class StorageKind:
    """Stands for a storage class in a pickle, which says the dtype; bytes if the storage is untyped."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


_NAMES = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
    "_rebuild_qtensor",
    "_rebuild_sparse_tensor",
    "_rebuild_meta_tensor_no_storage",
    "_rebuild_nested_tensor",
    "_rebuild_wrapper_subclass",
    "_rebuild_device_tensor_from_numpy",
    "_rebuild_device_tensor_from_cpu_tensor",
)
_FUNCTIONS = {name: Function(f"torch._utils.{name}") for name in _NAMES}
_FROM_TYPE = Function("torch._tensor._rebuild_from_type_v2")
_LAYOUT = Function("torch.serialization._get_layout")
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_QUANTIZED = {
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def _strided(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> torch.Tensor:
    if type(storage) is not torch.storage.TypedStorage or not isinstance(dtype, torch.dtype):
        raise DecodingError("a tensor without a storage")
    untyped = storage._untyped_storage
    size, stride, (offset,) = _integers(size), _integers(stride), _integers((offset,))
    stored = StoredTensor(dtype, size, stride, offset, untyped.nbytes())
    if not stored.fits():
        raise DecodingError(f"a tensor of shape {size} with strides {stride} that leaves its storage")
    made = torch.empty((0,), dtype=dtype, device=untyped.device)
    return made.set_(untyped, offset, size, stride)


def _integers(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, (tuple, list)) or not all(type(number) is int for number in numbers):
        raise DecodingError("sizes that are no integers")
    return tuple(numbers)


def _finish(tensor: torch.Tensor, requires_grad: Any, hooks: Any, bits: Any = None) -> torch.Tensor:
    if hooks:
        raise DecodingError("a tensor with hooks")
    tensor.requires_grad = bool(requires_grad)
    if bits:
        # The bits say whether torch conjugates or negates the elements lazily.
        if type(bits) is not dict or not all(type(bit) is bool for bit in bits.values()):
            raise DecodingError("bits of a tensor that are no booleans")
        torch._utils.set_tensor_metadata(tensor, bits)  # type: ignore[no-untyped-call]
    return tensor


def _tensor(decoder: Decoder, args: tuple[Any, ...]) -> torch.Tensor:
    storage, offset, size, stride = args
    return _strided(storage, storage.dtype, offset, size, stride)


def _tensor_v2(decoder: Decoder, args: tuple[Any, ...]) -> torch.Tensor:
    storage, offset, size, stride, requires_grad, hooks, *bits = args
    return _finish(_strided(storage, storage.dtype, offset, size, stride), requires_grad, hooks, *bits)


def _tensor_v3(decoder: Decoder, args: tuple[Any, ...]) -> torch.Tensor:
    storage, offset, size, stride, requires_grad, hooks, dtype, *bits = args
    return _finish(_strided(storage, dtype, offset, size, stride), requires_grad, hooks, *bits)


def _parameter(decoder: Decoder, args: tuple[Any, ...]) -> torch.nn.Parameter:
    data, requires_grad, hooks, *state = args
    if not isinstance(data, torch.Tensor) or hooks:
        raise DecodingError("a parameter without a tensor")
    made = torch.nn.Parameter(data, bool(requires_grad))
    if state:
        _set_attributes(made, state[0])
    return made


def _set_attributes(target: torch.Tensor, state: Any) -> None:
    """Give a tensor the attributes that Python code has set on it."""
    attributes, slots = state if type(state) is tuple else (state, None)
    if slots or type(attributes) not in (dict, type(None)) or not all(type(name) is str for name in attributes or ()):
        raise DecodingError("attributes of a tensor that have no names")
    # Not by setattr, which would also reach properties of the tensor, such as its data.
    target.__dict__.update(attributes or {})


def _quantized(decoder: Decoder, args: tuple[Any, ...]) -> torch.Tensor:
    storage, offset, size, stride, quantizer, requires_grad, hooks = args
    size, stride, (offset,) = _integers(size), _integers(stride), _integers((offset,))
    dtype = storage.dtype
    stored = StoredTensor(dtype, size, stride, offset, storage._untyped_storage.nbytes())
    # Torch allocates it in full before it uses the storage.
    if not stored.fits() or torch.Size(size).numel() * dtype.itemsize > stored.storage_nbytes or hooks:
        raise DecodingError(f"a quantized tensor of shape {size} that leaves its storage")
    untyped = storage._untyped_storage
    if quantizer[0] == torch.per_tensor_affine:
        _, scale, zero_point = quantizer
        made = torch._empty_affine_quantized(
            size, scale=scale, zero_point=zero_point, dtype=dtype, device=untyped.device
        )
    else:
        _, scales, zero_points, axis = quantizer
        if type(axis) is not int or not 0 <= axis < len(size):
            raise DecodingError("a quantized tensor whose axis it does not have")
        if not scales.shape == zero_points.shape == (size[axis],):
            raise DecodingError("a quantized tensor with scales for another size")
        made = torch._empty_per_channel_affine_quantized(
            size, scales=scales, zero_points=zero_points, axis=axis, dtype=dtype, device=untyped.device
        )
    return _finish(made.set_(untyped, offset, size, stride), requires_grad, hooks)


def _sparse(decoder: Decoder, args: tuple[Any, ...]) -> torch.Tensor:
    layout, data = args
    make: Callable[..., torch.Tensor]
    if layout == torch.sparse_coo:
        indices, values, size, *rest = data
        make = functools.partial(torch.sparse_coo_tensor, indices, values, size, is_coalesced=rest[0] if rest else None)
    elif layout in _COMPRESSED:
        make = functools.partial(torch.sparse_compressed_tensor, *data, layout=layout)
    else:
        raise DecodingError(f"a sparse tensor of layout {layout!r:.80}")

    def check() -> None:
        make(check_invariants=True)

    decoder.deferred.append(check)
    return make(check_invariants=False)


def _meta(decoder: Decoder, args: tuple[Any, ...]) -> torch.Tensor:
    dtype, size, stride, requires_grad = args
    return torch.empty_strided(
        _integers(size), _integers(stride), dtype=dtype, device="meta", requires_grad=bool(requires_grad)
    )


def _nested(decoder: Decoder, args: tuple[Any, ...]) -> torch.Tensor:
    buffer, sizes, strides, offsets = args

    def check() -> None:
        for size, stride, offset in zip(sizes.tolist(), strides.tolist(), offsets.tolist(), strict=True):
            stored = StoredTensor(
                buffer.dtype, tuple(size), tuple(stride), offset, buffer.numel() * buffer.dtype.itemsize
            )
            if not stored.fits():
                raise DecodingError("a nested tensor that leaves its buffer")

    is_described = isinstance(buffer, torch.Tensor) and buffer.dim() == 1 and buffer.is_contiguous()
    if not is_described or not all(part.dtype is torch.int64 for part in (sizes, strides, offsets)):
        raise DecodingError("a nested tensor without its sizes")
    decoder.deferred.append(check)
    return torch._nested_view_from_buffer(buffer, sizes, strides, offsets)


def _wrapper(decoder: Decoder, args: tuple[Any, ...]) -> Any:
    kind = args[0]
    if not decoder.trust.holds(kind):
        raise RefusedError(f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else "a tensor's class")
    return torch._utils._rebuild_wrapper_subclass(*args)  # type: ignore[no-untyped-call]


def _on_device(decoder: Decoder, args: tuple[Any, ...]) -> torch.Tensor:
    data, dtype, device, requires_grad = args
    tensor = data if isinstance(data, torch.Tensor) else torch.from_numpy(data)
    decoder.limits.charge(tensor.numel() * dtype.itemsize)
    return _finish(tensor.to(dtype=dtype, device=device), requires_grad, None)


def _from_type(decoder: Decoder, args: tuple[Any, ...]) -> torch.Tensor:
    """Return a tensor with attributes, or of a subclass that is trusted."""
    function, kind, inner, state = args
    made: torch.Tensor = decoder.reduce(function, inner)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        if type(made) is not kind:
            raise DecodingError(f"a {kind.__name__} of a {type(made).__name__}")
        _set_attributes(made, state)
        return made
    if not decoder.trust.holds(kind):
        raise RefusedError(f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else "a tensor's class")
    if type(made) is not kind:
        made = made.as_subclass(kind)
    own = getattr(kind, "__setstate__", torch.Tensor.__setstate__)
    if own is not torch.Tensor.__setstate__:
        made.__setstate__(state)  # type: ignore[no-untyped-call]
        return made
    restored: torch.Tensor = torch._utils._set_obj_state(made, state)  # type: ignore[no-untyped-call]
    return restored


def _size(decoder: Decoder, args: tuple[Any, ...]) -> torch.Size:
    return torch.Size(_integers(*args))


def _device(decoder: Decoder, args: tuple[Any, ...]) -> torch.device:
    if not args or type(args[0]) is not str or not all(type(index) is int for index in args[1:]):
        raise DecodingError("a device without a name")
    return torch.device(*args)


def _layout(decoder: Decoder, args: tuple[Any, ...]) -> torch.layout:
    return _LAYOUTS[args[0]] if type(args[0]) is str else _LAYOUTS[""]


def _version(decoder: Decoder, args: tuple[Any, ...]) -> Any:
    if len(args) != 1 or type(args[0]) is not str:
        raise DecodingError("a version that is no string")
    decoder.limits.charge(len(args[0]))
    return torch.torch_version.TorchVersion(args[0])


@functools.cache
def builders() -> Builders:
    """Return the builders of torch's values."""
    names: dict[tuple[str, str], Any] = {
        ("torch._tensor", "_rebuild_from_type_v2"): _FROM_TYPE,
        ("torch.serialization", "_get_layout"): _LAYOUT,
        ("torch.torch_version", "TorchVersion"): torch.torch_version.TorchVersion,
        ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
        ("torch", "Size"): torch.Size,
        ("torch", "Tensor"): torch.Tensor,
        ("torch", "device"): torch.device,
        ("torch.storage", "UntypedStorage"): StorageKind(torch.uint8),
        **{("torch._utils", name): function for name, function in _FUNCTIONS.items()},
    }
    for name, value in vars(torch).items():
        if isinstance(value, (torch.dtype, torch.qscheme)):
            names["torch", name] = value
    for name, dtype in (STORAGE_DTYPES | _QUANTIZED).items():
        # Old files have the name of a device's storage class.
        names["torch", name] = names["torch.cuda", name] = StorageKind(dtype)
    rebuild = (
        _tensor,
        _tensor_v2,
        _tensor_v3,
        _parameter,
        _parameter,
        _quantized,
        _sparse,
        _meta,
        _nested,
        _wrapper,
        _on_device,
        _on_device,
    )
    reducers: dict[Any, Any] = {
        _FROM_TYPE: _from_type,
        _LAYOUT: _layout,
        torch.Size: _size,
        torch.device: _device,
        **dict(zip(_FUNCTIONS.values(), rebuild, strict=True)),
    }
    return Builders(names, reducers, {torch.torch_version.TorchVersion: _version}, {})
