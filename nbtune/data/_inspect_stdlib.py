"""Run as a script by `stdlib_docs.py`: what modules written in C say about themselves, as JSON.

    python -I -S _inspect_stdlib.py

In a process of its own because a living one is changed by its programs: IPython replaces `input`, pytest a hook of
`sys`. The rows must be the same in a notebook, on the command line and when a run is resumed.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

# Importable without side effects.
MODULES = (
    "array", "binascii", "builtins", "cmath", "collections", "csv", "datetime", "errno", "functools", "gc", "io",
    "itertools", "marshal", "math", "operator", "os", "pickle", "re", "select", "socket", "sqlite3", "struct", "sys",
    "time", "unicodedata", "weakref", "zlib",
)  # fmt: skip

Entry = tuple[str, str, str, str | None, str | None]  # module, name, kind, docstring, signature


def entries() -> Iterator[Entry]:
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # a Python built without sqlite3
            continue
        for name, value in sorted(vars(module).items()):
            if not name.startswith("_") and _belongs(value, module_name):
                public = name if module_name == "builtins" else f"{module_name}.{name}"
                yield from _object_entries(value, module_name, public)


def _belongs(value: Any, module: str) -> bool:
    """Whether a C function or class is this module's own; its private twin (`_io`, `posix`) counts as itself."""
    if isinstance(value, types.BuiltinFunctionType | type):
        home = value.__module__ or module
        return home in (module, f"_{module}") or (module == "os" and home in ("posix", "nt"))
    return False


def _object_entries(value: Any, module: str, name: str) -> Iterator[Entry]:
    if not isinstance(value, type):
        yield module, name, "function", value.__doc__, _signature(value)
        return
    if "__dict__" in vars(value) and value.__module__ != "builtins":
        return  # a class written in Python: it is parsed
    yield module, name, "class", value.__doc__, None
    for inner, member in sorted(vars(value).items()):
        if isinstance(member, types.MethodDescriptorType | types.ClassMethodDescriptorType) and inner[0] != "_":
            yield module, f"{name}.{inner}", "method", member.__doc__, _signature(member)


def _signature(value: Any) -> str | None:
    text = value.__text_signature__
    if not text or "<" in text:  # "<unrepresentable>" defaults
        return None
    return re.sub(r"\(\$?(self|type|module|cls)(, /)?(, )?", "(", " ".join(text.split()))


if __name__ == "__main__":
    json.dump(list(entries()), sys.stdout)
