"""Optimisers that treat LoRA's two factors differently, under PEFT's names (`peft.optimizers`).

LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns faster than A.
LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): A stays as it is, so the inputs of A need not be kept for the backward
pass; B's gradient is rescaled to what a trained weight would get: g_B (A A')^-1 / s^2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nbtune.errors import AdapterError
from nbtune.kernels.lorafa import LoraFAOptimizer
from nbtune.peft.config import invalid
from nbtune.peft.methods.lora import Lora, LoraEmbedding
from nbtune.peft.model import PeftModel


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimiser of a class, with four groups: A and matrices, LoRA on embeddings, B, and vectors.

    B and vectors learn with lr * loraplus_lr_ratio. Biases and the weights of LayerNorms do not decay.
    """
    if loraplus_lr_ratio <= 0:
        raise invalid("loraplus_lr_ratio", loraplus_lr_ratio, "must be more than 0")
    embeddings = _parameters_of(model, (LoraEmbedding,))
    norms = _parameters_of(model, (nn.LayerNorm,))
    slow, embedded, fast, vectors = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter in embeddings:
            embedded.append(parameter)
        elif "lora_B" not in name and parameter.ndim != 1:
            slow.append(parameter)
        else:
            (vectors if "bias" in name or parameter in norms else fast).append(parameter)
    rate = lr * loraplus_lr_ratio
    groups = [
        {"params": slow, "weight_decay": loraplus_weight_decay, "lr": lr},
        {"params": embedded, "weight_decay": loraplus_weight_decay, "lr": loraplus_lr_embedding},
        {"params": fast, "weight_decay": loraplus_weight_decay, "lr": rate},
        {"params": vectors, "weight_decay": 0.0, "lr": rate},
    ]
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]


def _parameters_of(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[nn.Parameter]:
    return {p for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}


def create_lorafa_optimizer(
    model: PeftModel,
    r: int,  # noqa: ARG001 - PEFT's, as is the next
    lora_alpha: float,  # noqa: ARG001
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
) -> LoraFAOptimizer:
    """LoRA-FA for all that is trained in a model; freezes its LoRA's A.

    `r`, `lora_alpha` and `use_rslora` are PEFT's; each layer's own scale counts. Raises AdapterError where
    `use_rslora` is not what the active adapters have.
    """
    is_rslora = {name: model.peft_config[name].to_dict().get("use_rslora", False) for name in model.active_adapters}
    wrong = [name for name, is_so in is_rslora.items() if use_rslora not in (None, is_so)]
    if wrong:
        message = f"use_rslora is {use_rslora}; the adapters {', '.join(wrong)} were made otherwise."
        raise AdapterError("use_rslora differs", message, "Leave it out: the adapters know their scale.")
    partners: dict[nn.Parameter, tuple[Tensor, float]] = {}
    for module in model.modules():
        if isinstance(module, Lora) and module.lora_B.requires_grad:
            module.lora_A.requires_grad_(False)
            partners[module.lora_B] = (module.lora_A, module.scaling)
    if not partners:
        raise AdapterError("No LoRA to train", "LoRA-FA trains LoRA's B.", "Use it with a LoraConfig.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return LoraFAOptimizer(trained, partners, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
