"""How a step is laid out in the memory there is: as planned, and smaller once that runs out."""

from __future__ import annotations

import torch

from nbtune._transformers import PreTrainedModel
from nbtune.data import Batch
from nbtune.data.packing import halves
from nbtune.errors import RunError
from nbtune.modules.checkpointing import blocks_of, checkpoint_blocks
from nbtune.plan import Plan, format_bytes


class Room:
    """The layout of a step; `give_way` makes it smaller when memory ran out.

    Neither computing blocks again nor smaller micro-batches change the result of a step, but for rounding and for which
    numbers dropout draws: every token still counts the same.
    """

    def __init__(self, model: PreTrainedModel, planned: Plan, *, may_recompute: bool = True) -> None:
        self._model = model
        self._planned = planned
        self._blocks = len(blocks_of(model)) if may_recompute else planned.checkpointed_layers
        self.checkpointed = planned.checkpointed_layers
        self.most_tokens: int | None = None  # in a micro-batch; None is no bound
        checkpoint_blocks(model, self.checkpointed)

    def micro_batches(self, batches: list[Batch]) -> list[Batch]:
        """The same examples in micro-batches that are small enough, as far as whole examples allow."""
        return [part for batch in batches for part in self._parts(batch)]

    def _parts(self, batch: Batch) -> list[Batch]:
        if self.most_tokens is None or batch.tokens <= self.most_tokens or len(batch.cu_seq_lens) == 2:
            return [batch]
        return [part for half in halves(batch) for part in self._parts(half)]

    def give_way(self, batch: Batch, used_bytes: int) -> str:
        """Lay steps out smaller from now on, for memory ran out in `batch` with `used_bytes` in use; says how.

        Half of the blocks that are not computed again are from now on, then all; then micro-batches are halved. Raises
        RunError where nothing is left to give.
        """
        if self.checkpointed < self._blocks:
            left = self._blocks - self.checkpointed
            self.checkpointed += left if self.checkpointed else -(-left // 2)
            checkpoint_blocks(self._model, self.checkpointed)
            return f"{self.checkpointed} of {self._planned.layers} layers are computed again in the backward pass"
        if len(batch.cu_seq_lens) > 2:
            self.most_tokens = max(half.tokens for half in halves(batch))
            return f"micro-batches have at most {self.most_tokens} tokens"
        raise self._exhausted(batch, used_bytes)

    def _exhausted(self, batch: Batch, used_bytes: int) -> RunError:
        parts = self._planned.parts
        largest = max((name for name in parts if name != "overhead"), key=parts.__getitem__)
        remedies = {
            "base weights": "Load the model in 4 bits (load_in_4bit), or choose a smaller one.",
            "optimiser": "Set optim to adamw_8bit, or train an adapter instead of every weight.",
            "gradients": "Train an adapter instead of every weight.",
        }
        return RunError(
            "There is not enough memory for one example",
            f"Memory ran out at {format_bytes(used_bytes)}, with one example of {batch.tokens} tokens and"
            f" {self.checkpointed} of {self._planned.layers} layers computed again."
            f" Planned were {format_bytes(self._planned.peak_bytes)}, most of it {largest}"
            f" ({format_bytes(parts[largest])}).",
            remedies.get(largest, f"Lower max_length below {batch.tokens}.") + " Or close other programs and resume.",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch or Python say that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("DefaultCPUAllocator", "std::bad_alloc", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
