"""Base layers that bitsandbytes quantised: their weight as floats, and layers that hold another one.

Nothing here imports bitsandbytes before it is needed: where nobody did, no module can be such a layer.

A trap, on CPUs with AVX512-BF16: in its first eval forward, `Linear4bit` repacks its weight for another kernel. Its
scales are rounded to bf16 for good, fp32 is computed in bf16, bitsandbytes' own dequantisation returns garbage, some
shapes fail, and, even back in train mode, the gradient through the layer is zero. `keep_unpacked` prevents it.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn

from nbtune.errors import AdapterError

_HALVES = (torch.float16, torch.bfloat16)


def bitsandbytes() -> Any:
    """The bitsandbytes package, told not to log that an optional kernel is absent, nor each cast of an input."""
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def _is_4bit(module: nn.Module) -> bool:
    return "bitsandbytes" in sys.modules and isinstance(module, bitsandbytes().nn.Linear4bit)


def _is_8bit(module: Any) -> bool:
    if "bitsandbytes" not in sys.modules or not isinstance(module, bitsandbytes().nn.Linear8bitLt):
        return False
    return not module.state.has_fp16_weights  # else its weight is stored in floats


def is_quantised(module: nn.Module) -> bool:
    """Whether this is a linear layer of bitsandbytes, which stores its weight in 4 or 8 bits."""
    return _is_4bit(module) or _is_8bit(module)


def kind(module: Any) -> str:
    """Of a quantised layer: `4-bit nf4`, `4-bit fp4` or `8-bit`."""
    return f"4-bit {module.weight.quant_type}" if _is_4bit(module) else "8-bit"


def dequantised(module: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [out, in] that a quantised layer computes with, as floats; also where bitsandbytes 0.50 errs, on a CPU
    in 4 bits with rows that are no whole number of blocks. By default in the precision that was quantised (4 bits), or
    fp32 (8 bits). Raises AdapterError for a layer whose weight is still to be quantised.
    """
    functional = bitsandbytes().functional
    if _is_4bit(module):
        codes, state = _unpacked(module)
        state = copy.copy(state)
        if dtype is not None:
            state.dtype = dtype if dtype in _HALVES else torch.float32
        weight = functional.dequantize_4bit(codes, state)
    else:
        # The first forward moves the scales from the weight to the layer's state.
        scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        if scales is None:
            raise _not_quantised()
        weight = functional.int8_vectorwise_dequant(module.weight.data, scales.to(module.weight.device))
    return weight if dtype is None else weight.to(dtype)


def _unpacked(module: Any) -> tuple[Tensor, Any]:
    """A 4-bit layer's codes and QuantState in the usual layout; the layer stays as it is."""
    weight = module.weight
    state = module.quant_state if weight.quant_state is None else weight.quant_state  # FSDP drops the weight's
    if state is None:
        raise _not_quantised()
    if not vars(state).get("packing_format_for_cpu", False):
        return weight.data, state
    usual = copy.copy(state)
    usual.original_nested = False  # or the inverse would quantise the scales once more
    codes, usual = bitsandbytes().functional._convert_weight_packed_for_cpu_inverse(weight.data, usual)
    usual.absmax = state.absmax.T.reshape(-1).float()  # which the inverse leaves transposed
    return codes, usual


def _not_quantised() -> AdapterError:
    message = "The layer is one of bitsandbytes, but its weight is not quantised yet."
    return AdapterError("No quantised weight", message, "Move the model to its device first, e.g. model.to('cpu').")


def keep_unpacked(module: Any) -> None:
    """Keep a layer's 4-bit weight in the usual layout on a CPU, and bring it back to that; see the trap above.

    Does nothing to other modules. A weight that was repacked before keeps the scales that were rounded then.
    """
    if not _is_4bit(module):
        return
    module.support_avx512bf16_for_cpu = False
    if module.weight.quant_state is not None:
        module.weight.data, module.weight.quant_state = _unpacked(module)
        module.quant_state = module.weight.quant_state


class MergedLinear(nn.Linear):
    """A linear layer in the place of a quantised one: like that, it takes and returns any precision."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


def merged_layer(module: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> nn.Linear:
    """A layer with this weight [out, in] and bias [out] that is not quantised.

    By default in the precision that the base had before it was quantised, where that is known (4 bits), or in bf16.
    """
    if dtype is None:
        dtype = _unpacked(module)[1].dtype if _is_4bit(module) else torch.bfloat16
    layer = MergedLinear(module.in_features, module.out_features, bias is not None, device="meta")
    bias = bias if bias is None else bias.to(dtype)
    return _filled(layer, nn.Parameter(weight.to(dtype), requires_grad=False), bias, module.training)


def requantised(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A quantised layer of the same kind and settings with this weight [out, in] and bias [out]."""
    bnb, old, sizes = bitsandbytes(), module.weight, (module.in_features, module.out_features, bias is not None)
    weight = weight.detach().float().contiguous()
    if _is_8bit(module):
        settings = {"has_fp16_weights": False, "threshold": module.state.threshold, "index": module.index}
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        new = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        return _filled(bnb.nn.Linear8bitLt(*sizes, **settings, device="meta"), new, bias, module.training)
    settings = {"blocksize": old.blocksize, "compress_statistics": old.compress_statistics}
    settings |= {"quant_type": old.quant_type, "quant_storage": old.quant_storage}
    codes, state = bnb.functional.quantize_4bit(weight, **settings)
    state.dtype = _unpacked(module)[1].dtype
    layer = bnb.nn.Linear4bit(*sizes, compute_dtype=module.compute_dtype, device="meta")
    layer.quant_storage, layer.quant_state = old.quant_storage, state
    layer.support_avx512bf16_for_cpu = module.support_avx512bf16_for_cpu
    new = bnb.nn.Params4bit(codes, quant_state=state, module=layer, bnb_quantized=True, **settings)
    return _filled(layer, new, bias, module.training)


def _filled(layer: Any, weight: nn.Parameter, bias: Tensor | None, training: bool) -> Any:
    layer.weight = weight
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer.train(training)


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """How far the layer that took a merged weight is from that weight."""

    path: str
    kind: str  # of the layer that was merged into, such as "4-bit nf4"
    relative_error: float  # |held - exact| / |exact|, Frobenius norms


def merge_report(path: str, module: nn.Module, exact: Tensor, merged: Any) -> MergeReport:
    """Compare the exact merged weight [out, in] of the quantised `module` with what the layer `merged` holds."""
    held = dequantised(merged, torch.float32) if is_quantised(merged) else merged.weight.float()
    error = torch.linalg.vector_norm(held - exact.float(), dtype=torch.float64)
    size = torch.linalg.vector_norm(exact.float(), dtype=torch.float64)
    return MergeReport(path, kind(module), float(error / size) if error else 0.0)
