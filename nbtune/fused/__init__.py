"""A model's blocks computed by nbtune's kernels while it is trained.

    with fused(model) as blocks:
        loss = model(...).loss      # the same numbers, in less time and memory
        loss.backward()
    blocks.counts                   # {"attention": 30, "mlp": 30, "norm": 61, "linear": 210}

Blocks are found by structure, in any architecture that has it, and each is compared with what it replaces on a few
tokens before it is used. Only these module objects are touched, and only inside the `with`.
"""

from nbtune.fused.bind import Fused, fused

__all__ = ["Fused", "fused"]
