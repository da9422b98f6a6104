"""Which examples a step trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nbtune.data import Batch, Batches, Example, collate
from nbtune.spec import TrainingSpec


class Schedule:
    """How many optimiser steps there are, and which micro-batches each consumes."""

    def __init__(self, examples: Sequence[Example], training: TrainingSpec, virtual_tokens: int = 0) -> None:
        self._examples = examples
        self._accumulation = training.gradient_accumulation_steps
        self._batches = Batches(
            examples,
            training.per_device_train_batch_size,
            training.max_length,
            packing=training.packing,
            seed=training.seed,
            virtual_tokens=virtual_tokens,
        )
        self.steps_per_epoch = self._batches.steps_per_epoch(self._accumulation)
        epochs = training.num_train_epochs * self.steps_per_epoch
        self.total_steps = training.max_steps if training.max_steps > 0 else max(1, math.ceil(epochs))
        self._epoch: tuple[int, list[list[list[int]]]] | None = None

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of the 0-based optimiser `step`; the last step of an epoch may have fewer."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._batches.epoch(epoch)
        start = index * self._accumulation
        return [self._collate(rows) for rows in self._epoch[1][start : start + self._accumulation]]

    def _collate(self, rows: list[list[int]]) -> Batch:
        return collate([[self._examples[index] for index in row] for row in rows])


def eval_batches(examples: Sequence[Example], training: TrainingSpec, virtual_tokens: int = 0) -> list[Batch]:
    """The held-out examples, packed whatever `training.packing` says: packing is exact, and quicker."""
    size, longest = training.per_device_train_batch_size, training.max_length
    batches = Batches(examples, size, longest, virtual_tokens=virtual_tokens)
    return [collate([[examples[index] for index in row] for row in rows]) for rows in batches.in_order()]
