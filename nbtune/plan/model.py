"""What a run's model weighs and what its step allocates, from the model without its weights."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nbtune.fused import fused
from nbtune.kernels.linear_cross_entropy import chunk_budget
from nbtune.models import attach_adapter, compute_dtype, skeleton
from nbtune.models.training import prepare_for_training, trained_model
from nbtune.modules.checkpointing import blocks_of, checkpoint_blocks
from nbtune.peft.optimizers import create_lorafa_optimizer
from nbtune.plan.memory import TRACED, Step, extrapolated
from nbtune.plan.trace import Span, Trace, trace_step
from nbtune.spec import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT = 2**18  # numbers in the hidden states of a short row


@dataclasses.dataclass(frozen=True)
class Weights:
    """What stays in memory for the whole run, in bytes; and the gradients."""

    base: int
    adapter: int
    optimiser: int
    trained: int  # parameters, not bytes
    block_gradients: tuple[int, ...]
    other_gradients: int  # of what is trained outside the blocks
    embedding_gradient: int  # of it, the embedding's
    dequantised: int  # the largest quantised weight as floats, as it is while it is used
    block: int = 0  # the largest block of the base
    outside: int = 0  # the base's weights outside the blocks

    def sharded(self, processes: int, *, every_weight: bool) -> Weights:
        """What one of several processes has of sharded weights, in a step.

        Beside its share it has what lies outside the blocks whole, twice while it is gathered, and two blocks: the next
        is gathered while one is computed. An adapter's weights stay whole. Where every weight is trained, gradients are
        whole too until they are sent, from another buffer.
        """
        whole = 2 * (self.outside + self.block)

        def share(size: int) -> int:
            return -(-size // processes)

        if not every_weight:
            return dataclasses.replace(self, base=share(self.base) + whole)
        return dataclasses.replace(
            self,
            base=share(self.base) + whole + self.outside + self.block,
            optimiser=share(self.optimiser),
            block_gradients=tuple(map(share, self.block_gradients)),
            other_gradients=self.other_gradients,  # whole until the backward pass ends
        )


def weigh(spec: RunSpec, device: torch.device) -> Weights:
    """Raises ModelError where the model is not known, AdapterError where the method does not fit it."""
    model = _base(spec, device)
    base = _bytes(_tensors(model))
    linears = [
        module.weight for block in blocks_of(model) for module in block.modules() if isinstance(module, nn.Linear)
    ]
    blocks = [_bytes(_tensors(block)) for block in blocks_of(model)]
    _adapt(model, spec)
    gradients = tuple(_trained_bytes(block) for block in blocks_of(model))
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    weights = Weights(
        base=base,
        adapter=_bytes(_tensors(model)) - base,
        optimiser=spec.training.optimizer_bytes(sizes, device.type),
        trained=sum(sizes),
        block_gradients=gradients,
        other_gradients=_trained_bytes(model) - sum(gradients),
        embedding_gradient=_trained_bytes(model.get_input_embeddings()),
        dequantised=0,
        block=max(blocks, default=0),
        outside=base - sum(blocks),
    )
    return weights if spec.model.quantised_bytes is None else _quantised(weights, linears, spec.model.quantised_bytes)


def step(spec: RunSpec, device: torch.device, weights: Weights, rows: int, *, recomputed: bool) -> Step:
    """What a micro-batch of `rows` full rows allocates; with `recomputed` also where blocks are computed again.

    Raises what `trace_step` raises.
    """
    method = json.dumps(spec.to_dict()["method"], sort_keys=True, default=str)
    # Quantised weights are floats when they are used, and all optimisers but LoRA-FA's take the same gradients.
    floats = spec.model.model_copy(update={"load_in_4bit": False, "load_in_8bit": False, "chat_template": None})
    key = (
        floats.model_dump_json(exclude={"bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}),
        method,
        spec.training.optim if spec.training.optim == "lorafa" else "adamw_torch_fused",
        str(device),
        rows,
        spec.training.max_length,
    )
    kept = _trace(*key, recomputed=False)
    again = _trace(*key, recomputed=True) if recomputed else None
    offloaded = spec.training.activation_offloading and device.type == "cuda"
    return Step(
        kept, again, weights.block_gradients, weights.other_gradients, weights.embedding_gradient, offloaded=offloaded
    )


@functools.lru_cache(maxsize=64)  # a form plans again whenever a setting changes
def _trace(
    model_settings: str, method: str, optim: str, device_name: str, rows: int, length: int, *, recomputed: bool
) -> Trace:
    """A step on `rows` examples of `length` tokens.

    Kernels go through their rows in blocks that stay in the processor's cache, so the operations of a long row are
    many. What they allocate grows linearly with its tokens: of a long row, two short ones tell.
    """
    device = torch.device(device_name)
    spec = RunSpec.from_dict(
        {"model": json.loads(model_settings), "method": json.loads(method), "training": {"optim": optim}}
    )
    dtype = compute_dtype(spec.model.dtype, device)
    config = _base(spec, device).config.get_text_config()
    tokens = rows * length
    # The loss goes through labelled rows in chunks that are alike: one is traced.
    labelled = min(tokens - 1, max(1, chunk_budget(device) // (config.vocab_size * dtype.itemsize)))

    def traced(tokens: int, segment: int) -> Trace:
        model = _base(spec, device)
        checkpoint_blocks(model, len(blocks_of(model)) if recomputed else 0)
        _adapt(model, spec)
        _shorten(model)
        model.train()
        with fused(model):
            return trace_step(model, tokens, segment, labelled, compute_dtype=dtype, device=device)

    short = min(length, max(64, SHORT // config.hidden_size))
    virtual = spec.virtual_tokens
    if tokens <= 2 * short:
        trace = traced(tokens, length)
    else:
        growth = (tokens + rows * virtual - (short + virtual)) / (short + virtual)
        trace = extrapolated(traced(short, short), traced(2 * short, short), growth)
    # Of all labelled rows there are the hidden states and their gradient.
    peak = trace.loss.peak + 2 * (tokens - 1 - labelled) * config.hidden_size * dtype.itemsize
    loss = Span(peak, trace.loss.kept, trace.loss.flops * (tokens - 1) // labelled)
    return dataclasses.replace(trace, loss=loss)


def _base(spec: RunSpec, device: torch.device) -> PreTrainedModel:
    """The model as it is loaded, but for quantised weights, which are floats when they are used."""
    settings = trained_model(spec)
    model: Any = skeleton(settings)
    model.to(compute_dtype(settings.dtype, device))
    prepare_for_training(model)
    return model


def _adapt(model: PreTrainedModel, spec: RunSpec) -> None:
    if spec.method == "full":
        return
    adapted = attach_adapter(model, spec)
    if spec.training.optim == "lorafa":  # which freezes what it does not train
        create_lorafa_optimizer(adapted, r=1, lora_alpha=1, lr=1.0)


def _shorten(model: PreTrainedModel) -> None:
    """Leave three blocks where all are built alike."""
    blocks = blocks_of(model)
    stacks = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    for stack in stacks:
        if list(stack) == blocks and len({_build(block) for block in blocks}) == 1:
            del stack[TRACED:]


def _build(block: nn.Module) -> tuple[Any, ...]:
    """What decides on the memory of a block: its modules and the shapes of what they hold."""
    modules = tuple((path, type(module)) for path, module in block.named_modules())
    parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return modules, parameters, tuple((name, buffer.shape) for name, buffer in block.named_buffers())


def _quantised(weights: Weights, linears: list[Tensor], each: float) -> Weights:
    """The weights with these as codes and scales of `each` byte an element."""
    saved = _bytes(linears) - int(each * sum(weight.numel() for weight in linears))
    return dataclasses.replace(
        weights,
        base=weights.base - saved,
        dequantised=max(weight.numel() * weight.element_size() for weight in linears),
    )


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _trained_bytes(module: nn.Module) -> int:
    return _bytes(parameter for parameter in module.parameters() if parameter.requires_grad)
