"""The precisions that an export can be written in, and how near to the adapter in memory each must come."""

from __future__ import annotations

import dataclasses

from nbtune.errors import ExportError


@dataclasses.dataclass(frozen=True)
class Precision:
    """How weights are written."""

    name: str  # as in GGUF
    bits: float  # a weight, scales included
    bound: float  # on the relative difference of the logits
    torch_name: str | None = None  # None for block types

    @property
    def in_blocks(self) -> bool:
        """Whether blocks of weights share a scale."""
        return self.torch_name is None


# Bounds are some times what is measured on SmolLM2-135M and on small random models, see docs/export.md. A wrong layout
# gives 0.5 and more, which 4 bits come near to: block types are also held against the same weights rounded in memory.
ROUNDED_BOUND = 0.002
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("f32", 32, 0.001, "float32"),
        Precision("f16", 16, 0.02, "float16"),
        Precision("bf16", 16, 0.1, "bfloat16"),
        Precision("q8_0", 8.5, 0.3),
        Precision("q4_1", 5, 0.8),
        Precision("q4_0", 4.5, 0.8),
    )
}
FLOATS = ("f32", "f16", "bf16")
_OTHER_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "fp32": "f32", "fp16": "f16"}

# What each format can be written in; the first is the default.
FORMATS = {
    "adapter": (),
    "merged": ("bf16", "f16", "f32"),
    "gguf": ("f16", "f32", "bf16", "q8_0", "q4_1", "q4_0"),
    "gguf-lora": ("f16", "f32", "bf16"),
}


def choose(format: str, dtype: str | None) -> Precision | None:
    """The precision for a format; None for `adapter`, which is copied as it is.

    Raises ExportError for an unknown format, or a precision that the format does not have.
    """
    if format not in FORMATS:
        raise ExportError(f"There is no export format {format!r}", "", f"Choose one of {', '.join(FORMATS)}.")
    possible = FORMATS[format]
    if not possible:
        if dtype is not None:
            raise ExportError(f"The format {format} has no dtype", "Its files are copied as they are.", "Leave it out.")
        return None
    name = possible[0] if dtype is None else _OTHER_NAMES.get(dtype.lower(), dtype.lower())
    if name not in possible:
        raise ExportError(f"{format} cannot be written in {dtype}", "", f"Choose one of {', '.join(possible)}.")
    return PRECISIONS[name]
