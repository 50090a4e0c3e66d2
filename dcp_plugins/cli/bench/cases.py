"""What the benchmark saves: the state dicts of the single-process cases, by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["ALL_CASE_NAMES", "ASYNC", "CASE_NAMES", "STATE_CASES", "STATE_DICT", "StateCase", "estimate_bytes"]

_BIG_TENSORS, _BIG_ROWS, _BIG_COLUMNS = 200, 1520, 1000
_SMALL_TENSORS, _SMALL_ELEMENTS = 20_000, 1024
_LAYERS, _HIDDEN, _FEED_FORWARD, _VOCABULARY, _QUERY_HEADS_PER_KEY = 8, 1024, 2816, 22_528, 4
_SEED = 20260724


@dataclasses.dataclass(frozen=True, slots=True)
class StateCase:
    """A case that saves one state dict from one process."""

    name: str
    summary: str
    full_bytes: int
    """Bytes of tensors at scale 1."""

    build: Callable[[float], dict[str, Any]]
    """Makes the state dict for a scale; the same scale gives the same values."""


def estimate_bytes(name: str, scale: float) -> int:
    """Return about how many bytes of tensors a case holds at a scale."""
    return math.ceil(_FULL_BYTES[name] * scale)


def _big(scale: float) -> dict[str, Any]:
    """200 float32 matrices, 1.216 GB in all: the rate at which bytes move."""
    generator = _generator()
    rows = max(1, round(_BIG_ROWS * scale))
    shape = (rows, _BIG_COLUMNS)
    return {f"layers.{index}.weight": _random(shape, torch.float32, generator) for index in range(_BIG_TENSORS)}


def _small(scale: float) -> dict[str, Any]:
    """20,000 tensors of 4 KB: the cost of a tensor, whatever its size."""
    generator = _generator()
    count = max(1, round(_SMALL_TENSORS * scale))
    names = (f"blocks.{index // 100}.experts.{index % 100}.scale" for index in range(count))
    return {name: _random((_SMALL_ELEMENTS,), torch.float32, generator) for name in names}


def _llm(scale: float) -> dict[str, Any]:
    """A Llama-like model in bf16 with AdamW moments in fp32 and a step tensor for each parameter: 300 tensors."""
    generator = _generator()
    shapes = _llama_shapes(math.sqrt(scale))
    model = {name: _random(shape, torch.bfloat16, generator) for name, shape in shapes.items()}
    moments = {
        name: {
            "step": torch.tensor(1000.0),
            "exp_avg": _random(shape, torch.float32, generator),
            "exp_avg_sq": _random(shape, torch.float32, generator),
        }
        for name, shape in shapes.items()
    }
    group = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "params": list(shapes)}
    return {"model": model, "optimizer": {"state": moments, "param_groups": [group]}, "step": 1000}


def _llama_shapes(width_factor: float) -> dict[str, tuple[int, ...]]:
    def width(full: int) -> int:
        unit = _QUERY_HEADS_PER_KEY
        return max(unit, round(full * width_factor / unit) * unit)

    hidden, feed_forward, vocabulary = width(_HIDDEN), width(_FEED_FORWARD), width(_VOCABULARY)
    keys = hidden // _QUERY_HEADS_PER_KEY
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (keys, hidden),
            prefix + "self_attn.v_proj.weight": (keys, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (feed_forward, hidden),
            prefix + "mlp.up_proj.weight": (feed_forward, hidden),
            prefix + "mlp.down_proj.weight": (hidden, feed_forward),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).uniform_(-1, 1, generator=generator)


_BIG_BYTES = _BIG_TENSORS * _BIG_ROWS * _BIG_COLUMNS * 4
_SMALL_BYTES = _SMALL_TENSORS * _SMALL_ELEMENTS * 4
# A parameter costs 2 bytes of bf16 and two fp32 moments.
_LLM_BYTES = sum(math.prod(shape) for shape in _llama_shapes(1.0).values()) * 10

STATE_CASES = {
    case.name: case
    for case in (
        StateCase("big", "200 float32 tensors", _BIG_BYTES, _big),
        StateCase("small", "20,000 tensors of 4 KB", _SMALL_BYTES, _small),
        StateCase("llm", "a Llama-like model in bf16 with AdamW state in fp32", _LLM_BYTES, _llm),
    )
}

# The memory case saves the tensors of `big`; the FSDP2 model is sized to 1.2 GB in `fsdp2.py`.
_FULL_BYTES = {name: case.full_bytes for name, case in STATE_CASES.items()} | {
    "fsdp2": 1_208_000_000,
    "memory": _BIG_BYTES,
    # The largest of its states; twice, because two staged copies may exist beside it.
    "async": 2 * _LLM_BYTES,
}

# The cases that write, and so need a place to write in.
ASYNC = "async"
CASE_NAMES = ("big", "small", "llm", "fsdp2", "memory", ASYNC)
STATE_DICT = "state-dict"
ALL_CASE_NAMES = (*CASE_NAMES, STATE_DICT)
