"""How a step is laid out in the memory there is: as planned, and smaller once that runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nbtune._transformers import PreTrainedModel
from nbtune.data import Batch
from nbtune.data.packing import halves
from nbtune.errors import RunError
from nbtune.modules.checkpointing import blocks_of, checkpoint_blocks
from nbtune.plan import Plan, format_bytes

WORK = "activations and overhead"  # gradients and the loss too: they cannot be told apart once memory has run out
REMEDIES = {
    "base weights": "Load the model in 4 bits (load_in_4bit), or choose a smaller one.",
    "adapter": "Lower r, or adapt fewer modules (target_modules).",
    "optimiser": "Set optim to adamw_8bit, or train an adapter instead of every weight.",
}


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
        planned, measured = _grouped(self._planned.parts), self._measured(used_bytes)
        sizes = [
            f"{name} {format_bytes(measured[name])}, planned {format_bytes(planned[name])}"
            for name in measured
            if measured[name] or planned[name]
        ]
        grown = max(measured, key=lambda name: measured[name] - planned[name])
        if measured[grown] > 1.05 * planned[grown]:
            cause = f"What grew is {grown}."
        else:
            grown = max(measured, key=measured.__getitem__)
            cause = f"Nothing grew, there was less memory than planned with; most of it is {grown}."
        return RunError(
            "There is not enough memory for one example",
            f"Memory ran out at {format_bytes(used_bytes)}, with one example of {batch.tokens} tokens and"
            f" {self.checkpointed} of {self._planned.layers} layers computed again. {cause}"
            f" In use: {'; '.join(sizes)}.",
            REMEDIES.get(grown, f"Lower max_length below {batch.tokens}.") + " Or close other programs and resume.",
        )

    def _measured(self, used_bytes: int) -> dict[str, int]:
        """Bytes by part: weights as they are, the optimiser as planned, and for the work all the rest."""
        parts: dict[str, int] = {"base weights": 0, "adapter": 0}
        trained = "adapter" if self._planned.parts.get("adapter") else "base weights"
        for parameter in self._model.parameters():
            parts[trained if parameter.requires_grad else "base weights"] += parameter.nbytes
        parts["optimiser"] = self._planned.parts.get("optimiser", 0)
        return parts | {WORK: max(0, used_bytes - sum(parts.values()))}


def _grouped(parts: dict[str, int]) -> dict[str, int]:
    """The plan's parts, those of the work in one."""
    kept = {name: parts.get(name, 0) for name in ("base weights", "adapter", "optimiser")}
    return kept | {WORK: sum(parts.values()) - sum(kept.values())}


@contextmanager
def naming_lack_of_memory(planned: Plan, part: str, doing: str) -> Iterator[None]:
    """Inside, a lack of memory that `Room` does not see is an error that names the plan's part and a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sizes = "; ".join(f"{name} {format_bytes(size)}" for name, size in planned.parts.items() if size)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = REMEDIES.get(part, "Lower per_device_train_batch_size or max_length.")
        raise RunError(
            f"Memory ran out while {doing}",
            f"{reason} There was no room for {part}. Planned were {format_bytes(planned.peak_bytes)}: {sizes}.",
            f"{remedy} Or close other programs and resume.",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch or Python say that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("DefaultCPUAllocator", "std::bad_alloc", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
