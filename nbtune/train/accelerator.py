"""Accelerate as a run uses it: for how processes share the work, not for precision or place."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin


def own_accelerator() -> Accelerator:
    """An accelerator that does what the run's spec says and nothing else.

    Accelerate keeps its settings in the process: once a TRL trainer has run in a notebook, every later accelerator
    casts to that trainer's precision, and steps only where that trainer's accumulation would; its environment variables
    do the same. The model stays on the device it was loaded on.
    """
    accelerator = Accelerator(
        device_placement=False, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1)
    )
    accelerator.native_amp, accelerator.scaler = False, None
    accelerator.gradient_state._set_sync_gradients(True)
    return accelerator
