"""LoRA-FA's optimiser (Zhang et al. 2023, arXiv:2308.03303): B learns what a trained weight would, while A stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class LoraFAOptimizer(Optimizer):
    """AdamW as transformers once had it, with the gradients of LoRA's B rescaled; `partners` are their A and scale."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        partners: dict[nn.Parameter, tuple[Tensor, float]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.partners = partners

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self._gradient(parameter), group)
        return loss

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient, of a B [out, r] times (A A' + 1e-8)^-1 / s^2; in fp32, where PEFT takes bf16."""
        assert parameter.grad is not None
        if parameter not in self.partners:
            return parameter.grad
        A, scaling = self.partners[parameter]
        A = A.flatten(1)
        gram = A @ A.T + 1e-8 * torch.eye(len(A), dtype=A.dtype, device=A.device)
        gradient = parameter.grad.flatten(1) @ torch.linalg.pinv(gram) / scaling**2
        return gradient.view_as(parameter)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        steps, (beta1, beta2) = int(state["step"]), group["betas"]
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        rate = group["lr"] * (1 - beta2**steps) ** 0.5 / (1 - beta1**steps)
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-rate)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
