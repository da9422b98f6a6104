"""Triton kernels compiled ahead of time: needs no GPU, since Triton brings NVIDIA's assembler."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

CAPABILITIES = (80, 90)  # Ampere, Hopper


def machine_code(kernel: Any, capability: int, /, num_warps: int = 4, **arguments: Any) -> bytes:
    """The kernel's code for a GPU of this capability.

    `arguments` are types ("*bf16", "i32", "fp32") or, for constants and for tensors that are not there, values.
    """
    constants = {
        parameter.name: arguments[parameter.name]
        for parameter in kernel.params
        if parameter.is_constexpr or not isinstance(arguments[parameter.name], str)
    }
    signature = {p.name: "constexpr" if p.name in constants else arguments[p.name] for p in kernel.params}
    source = ASTSource(kernel, signature, constants)
    return compile_source(source, GPUTarget("cuda", capability, 32), {"num_warps": num_warps}).asm["cubin"]
