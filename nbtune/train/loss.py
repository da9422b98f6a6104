"""From a packed batch to its loss, through the decoder and past the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nbtune._transformers import PreTrainedModel
from nbtune.errors import ModelError
from nbtune.kernels.attention import segment_arguments
from nbtune.kernels.linear_cross_entropy import LossOutput, cross_entropy_of_head
from nbtune.peft.prompt import packed

T = TypeVar("T")

# What architectures do to the logits after the head, by the name of the setting in their config.
SOFTCAP = "final_logit_softcapping"  # Gemma 2 and later
SCALE = "logit_scale"  # Cohere: logits * scale
DIVISOR = "logits_scaling"  # Granite: logits / scaling


class CausalLMLoss(nn.Module):
    """The next-token loss of a causal language model on packed rows.

    A module, so that an engine for several processes can wrap it: its forward pass is the whole of what training needs.
    `label_smoothing` holds while it is in training mode: the loss of held-out rows is the plain one, so that runs with
    and without it can be compared.
    """

    def __init__(self, model: PreTrainedModel, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        config = model.config.get_text_config().to_dict()
        self.vocabulary = config["vocab_size"]
        self.softcap = config.get(SOFTCAP)
        self.scale = (config.get(SCALE) or 1.0) / (config.get(DIVISOR) or 1.0)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        cu_seq_lens: Tensor,
        max_length: int,
        num_items: int | Tensor | None = None,
    ) -> LossOutput:
        """The loss, summed over the labelled tokens and divided by `num_items` (None: by their number), and their
        accuracy and entropy, summed.

        Args:
            input_ids: Tokens of a flat row [1, T].
            labels: Targets [1, T], not shifted; the first of each segment is -100.
            position_ids: Positions [1, T] that restart in each segment.
            cu_seq_lens: Segment borders [segments + 1], int32.
            max_length: Longest segment.
            num_items: Labelled tokens of the whole accumulated batch.
        """
        hidden = self.hidden(input_ids, position_ids, cu_seq_lens, max_length)
        return self.of_hidden(hidden, labels, num_items, self.label_smoothing if self.training else 0.0)

    def of_hidden(
        self, hidden: Tensor, labels: Tensor, num_items: int | Tensor | None = None, label_smoothing: float = 0.0
    ) -> LossOutput:
        """The same from the decoder's last hidden states [1, T, D]."""
        hidden, labels = hidden[0, :-1], labels[0, 1:]  # each token predicts the next; segments begin with -100
        head = self.model.get_output_embeddings()
        assert head is not None
        return cross_entropy_of_head(
            head,
            hidden,
            labels,
            vocabulary=self.vocabulary,
            num_items=num_items,
            softcap=self.softcap,
            scale=self.scale,
            label_smoothing=label_smoothing,
        )

    def hidden(self, input_ids: Tensor, position_ids: Tensor, cu_seq_lens: Tensor, max_length: int) -> Tensor:
        """The decoder's last hidden states [1, T, D]; the arguments are those of the loss."""
        arguments, places = self._arguments(input_ids, position_ids, cu_seq_lens, max_length)
        return self.model.get_decoder()(**arguments).last_hidden_state[:, places]  # [1, T, D]

    def _arguments(
        self, input_ids: Tensor, position_ids: Tensor, cu_seq_lens: Tensor, max_length: int
    ) -> tuple[dict[str, Any], Tensor | slice]:
        """The decoder's, with the virtual tokens of a prompt that is trained; and the places of the row's tokens."""
        segments = segment_arguments(cu_seq_lens, max_length)
        return packed(
            self.model, {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, **segments}
        )

    def within(self, work: Callable[[], T]) -> T:
        """Do some `work` with the model as in a forward pass: sharded weights are gathered for it."""
        return work()

    @torch.no_grad()
    def verify(self, input_ids: Tensor, position_ids: Tensor, cu_seq_lens: Tensor, max_length: int) -> None:
        """Raise ModelError where this model's logits are not what the loss above assumes."""
        arguments, places = self._arguments(input_ids, position_ids, cu_seq_lens, max_length)
        theirs = self.model(**arguments).logits[:, places].float()
        hidden = self.hidden(input_ids, position_ids, cu_seq_lens, max_length)
        head = self.model.get_output_embeddings()
        assert head is not None
        ours = head(hidden).float() * self.scale
        if self.softcap is not None:
            ours = self.softcap * torch.tanh(ours / self.softcap)
        tolerance = 0.05 * theirs.abs().max().clamp(min=1.0)  # bf16 resolves about 1 part in 128
        if (ours - theirs).abs().max() > tolerance:
            raise ModelError(
                f"{type(self.model).__name__} cannot be trained yet",
                "Its logits are more than the output head's product with the hidden states.",
                "Choose a model of another architecture, and report this one.",
            )
