"""P-tuning (Liu et al. 2021, arXiv:2103.10385): [h(P); X], embeddings from a network h before those of the text."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from nbtune.modules.base import compute_dtype, empty
from nbtune.peft.configs.prompts import PromptEncoderConfig
from nbtune.peft.prompt import Prompt


class PromptEncoder(Prompt):
    """P [num_virtual_tokens * submodules, token_dim], and h: an MLP, or the paper's bidirectional LSTM and MLP.

    The network couples the virtual tokens in training, where alone they are hard to optimise; it is not needed after,
    so the file holds h(P), and a loaded prompt goes on as plain embeddings.
    """

    @classmethod
    def create(cls, base: Any, config: PromptEncoderConfig, path: str, shared: None) -> Self:
        width = config.token_dim or base.embedding_dim
        count = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
        embedding = nn.init.normal_(empty(base, count, width))
        if config.inference_mode:
            return cls(embedding, config)
        hidden = config.encoder_hidden_size or width
        where = {"device": base.weight.device, "dtype": compute_dtype(base)}
        if config.encoder_reparameterization_type == "LSTM":
            return cls(embedding, config, _RecurrentEncoder(width, hidden, config, where))
        first, second = nn.Linear(width, hidden, **where), nn.Linear(hidden, hidden, **where)
        mlp = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(hidden, width, **where))
        return cls(embedding, config, mlp)


class _RecurrentEncoder(nn.Module):
    """MLP([LSTM forwards; LSTM backwards]), over the virtual tokens in their order."""

    def __init__(self, width: int, hidden: int, config: PromptEncoderConfig, where: dict[str, Any]) -> None:
        super().__init__()
        layers = {"num_layers": config.encoder_num_layers, "dropout": config.encoder_dropout}
        self.lstm = nn.LSTM(width, hidden, bidirectional=True, **layers, **where)
        self.mlp = nn.Sequential(
            nn.Linear(2 * hidden, 2 * hidden, **where), nn.ReLU(), nn.Linear(2 * hidden, width, **where)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        states: Tensor = self.lstm(tokens)[0]  # [tokens, 2 * hidden]
        return self.mlp(states)
