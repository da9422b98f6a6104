"""Questions and answers about Python's standard library, made on the spot from its own docstrings and signatures.

Real text that is on every machine: `stdlib-docs` needs no download. Modules written in Python are parsed, not imported
(nothing runs, nothing prints); a fixed list of modules written in C is inspected, in a process of its own. The same
Python gives the same rows, in the same order. Whole top-level modules are held out and no answer occurs twice, so that
nothing leaks into the evaluation.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nbtune.errors import DataError

# Nothing a user of Python asks about: tests, applications, easter eggs, the other platform's twin of a module.
_SKIPPED = {
    "__future__", "antigravity", "distutils", "encodings", "ensurepip", "genericpath", "idlelib", "lib2to3", "nt",
    "ntpath", "nturl2path", "opcode", "posix", "posixpath", "pydoc_data", "sre_compile", "sre_constants", "sre_parse",
    "test", "this", "tkinter", "turtle", "turtledemo", "xxlimited", "xxlimited_35",
}  # fmt: skip

# Files whose contents people know under another name.
_ALIASES = {
    "posixpath": "os.path",
    "genericpath": "os.path",
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_weakrefset": "weakref",
}

_ABOUT = {
    "module": ("What is the Python module `{name}` for?", "What does Python's `{name}` module provide?"),
    "class": ("What is `{name}` in Python?", "What is the Python class `{name}` for?", "Explain the class `{name}`."),
    "function": (
        "What does `{name}` do in Python?",
        "What does the Python function `{name}` do?",
        "Explain `{name}` from Python's standard library.",
    ),
    "method": (
        "What does `{name}` do in Python?",
        "What does the method `{name}` do?",
        "Explain `{name}` from Python's standard library.",
    ),
    "property": ("What is `{name}` in Python?", "What does the property `{name}` hold?"),
}
_SIGNATURE = (
    "What is the signature of `{name}`?",
    "How is `{name}` called in Python?",
    "Which arguments does `{name}` take?",
)

_SHORTEST, _LONGEST = 20, 480  # characters of an answer
_LONGEST_SIGNATURE = 160


class Row(NamedTuple):
    """One question and its answer; `module` is the top-level module, the unit that is held out."""

    module: str
    question: str
    answer: str


class _Entry(NamedTuple):
    module: str  # "textwrap"
    name: str  # "textwrap.TextWrapper.fill"
    kind: str  # a key of _ABOUT
    docstring: str | None
    signature: str | None  # "(text, width=70)"


@functools.cache
def rows() -> tuple[Row, ...]:
    """Every row, sorted by module. Raises DataError where this Python comes without the library's source."""
    entries = sorted((*_parsed(), *_inspected()), key=lambda entry: (entry.module, entry.name))
    found: list[Row] = []
    questions: set[str] = set()
    answers: set[str] = set()
    for entry in entries:
        for question, answer in _questions(entry):
            # One answer, one row: a docstring that a subclass or another module repeats would leak or bore.
            key = answer.casefold()
            if question not in questions and key not in answers:
                questions.add(question)
                answers.add(key)
                found.append(Row(entry.module, question, answer))
    if len(found) < 1000:
        raise DataError(
            "stdlib-docs cannot be made here",
            f"This Python's standard library gave {len(found)} rows; its source files or docstrings are missing.",
            "Use a Python that was installed with its sources and runs without -OO, or name a data file.",
        )
    return tuple(found)


def split(found: Iterable[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows: whole modules are held out, about `fraction` of the rows."""
    found = list(found)
    sizes: dict[str, int] = {}
    for row in found:
        sizes[row.module] = sizes.get(row.module, 0) + 1
    wanted = fraction * len(found)
    held_out: set[str] = set()
    taken = 0
    for module in sorted(sizes, key=lambda module: _digest(f"{seed}:{module}")):
        if taken + sizes[module] <= 1.1 * wanted:  # a module that would take far more is left in training
            held_out.add(module)
            taken += sizes[module]
        if taken >= wanted:
            break
    return [row for row in found if row.module not in held_out], [row for row in found if row.module in held_out]


def _entry(name: str, kind: str, docstring: str | None, signature: str | None) -> _Entry:
    return _Entry(name.partition(".")[0], name, kind, docstring, signature)


def _questions(entry: _Entry) -> Iterator[tuple[str, str]]:
    if about := _clean(entry.docstring, entry.name):
        yield _choose(_ABOUT[entry.kind], entry.name), about
        if entry.signature is not None and len(entry.signature) <= _LONGEST_SIGNATURE:
            yield _choose(_SIGNATURE, entry.name), f"`{entry.name}{entry.signature}`"


def _choose(templates: tuple[str, ...], name: str) -> str:
    return templates[_digest(name) % len(templates)].format(name=name)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# Docstrings to prose


def _clean(docstring: str | None, name: str) -> str | None:
    """The first paragraph that is prose, as one line; None where there is none worth asking for."""
    if not docstring:
        return None
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring))[:3]:
        if not _is_signature(paragraph, name):
            return _sentence(paragraph)
    return None


def _is_signature(paragraph: str, name: str) -> bool:
    """Whether it is a line such as `S.find(sub[, start[, end]]) -> int`, with which docstrings from C often open."""
    own = re.escape(name.rpartition(".")[2])
    return bool(re.match(rf"([A-Za-z_][\w.]*\.)?{own}\s*\(", paragraph)) or "->" in paragraph.split("\n")[0]


def _sentence(paragraph: str) -> str | None:
    lines: list[str] = []
    for line in paragraph.splitlines():
        if re.match(r"\s*(>>>|[-*•] |@|:\w+|\.\. |={3,}|-{3,}|~{3,})", line) or (lines and line.startswith("   ")):
            break  # an example, a list, parameters: no longer prose
        lines.append(line.strip())
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    text = re.sub(r":[a-z:]+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    if text.endswith(":") or len(text) > _LONGEST:
        text = text[: text.rfind(". ", 0, _LONGEST) + 1]
    if len(text) < _SHORTEST or text.count(" ") < 3 or not text.isprintable() or ">>>" in text:
        return None
    if text.partition(" ")[0].isalpha():
        text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else text.rstrip(" ,;") + "."


# Modules written in Python: parsed


def _parsed() -> Iterator[_Entry]:
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in _SKIPPED)
    for name in (*names, *_ALIASES):
        if (file := library / f"{name}.py").is_file():
            yield from _module_entries(ast.parse(file.read_bytes()), _ALIASES.get(name, name))
        elif (folder := library / name).is_dir():
            yield from _package_entries(folder, name)


def _package_entries(folder: Path, package: str) -> Iterator[_Entry]:
    trees: dict[str, ast.Module] = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") or part in ("test", "tests", "idle_test") for part in parts):
            trees[".".join((package, *parts))] = ast.parse(file.read_bytes())
    for name, tree in trees.items():
        parent = name.rpartition(".")[0]
        exported = _exported(trees[parent], name.rpartition(".")[2], tree) if parent in trees else set()
        yield from _module_entries(tree, name, parent, exported)


def _exported(package: ast.Module, submodule: str, tree: ast.Module) -> set[str]:
    """The names of `submodule` that its package offers as its own (`json.JSONDecoder`)."""
    names: set[str] = set()
    for node in package.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module == submodule:
            listed = {alias.name for alias in node.names if alias.asname is None}
            names |= (_all(tree) or set()) if "*" in listed else listed
    return names


def _all(tree: ast.Module) -> set[str] | None:
    """The module's `__all__` where it is written out."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Tuple):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "__all__" in names:
                return {str(item.value) for item in node.value.elts if isinstance(item, ast.Constant)}
    return None


def _module_entries(tree: ast.Module, module: str, parent: str = "", exported: Iterable[str] = ()) -> Iterator[_Entry]:
    yield _entry(module, "module", ast.get_docstring(tree), None)
    public = _all(tree)
    for node in _definitions(tree.body):
        if public is not None and node.name not in public and node.name not in exported:
            continue
        yield from _definition_entries(node, parent if node.name in exported else module, in_class=False)


def _definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public definitions, also those under `if` and `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not node.name.startswith("_"):
                yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions(node.body + node.orelse)


def _definition_entries(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, owner: str, *, in_class: bool
) -> Iterator[_Entry]:
    name = f"{owner}.{node.name}"
    docstring = ast.get_docstring(node)
    if isinstance(node, ast.ClassDef):
        initialisers = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        signature = _arguments(initialisers[0], bound=True) if initialisers else None
        yield _entry(name, "class", docstring, signature)
        for inner in _definitions(node.body):
            yield from _definition_entries(inner, name, in_class=True)
        return
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    if decorators & {"overload", "setter", "deleter"}:
        return
    if decorators & {"property", "cached_property"}:
        yield _entry(name, "property", docstring, None)
    else:
        bound = in_class and "staticmethod" not in decorators
        yield _entry(name, "method" if in_class else "function", docstring, _arguments(node, bound=bound))


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, *, bound: bool) -> str:
    """`(text, width=70, **kwargs)`: without annotations, and without `self` where `bound`."""
    arguments = node.args
    plain = ast.arguments(
        posonlyargs=[ast.arg(a.arg) for a in arguments.posonlyargs],
        args=[ast.arg(a.arg) for a in arguments.args],
        vararg=ast.arg(arguments.vararg.arg) if arguments.vararg else None,
        kwonlyargs=[ast.arg(a.arg) for a in arguments.kwonlyargs],
        kw_defaults=arguments.kw_defaults,
        kwarg=ast.arg(arguments.kwarg.arg) if arguments.kwarg else None,
        defaults=arguments.defaults,
    )
    if bound and (positional := plain.posonlyargs or plain.args):
        del positional[0]
        plain.defaults = plain.defaults[max(0, len(plain.defaults) - len(plain.posonlyargs) - len(plain.args)) :]
    return f"({ast.unparse(plain)})"


# Modules written in C: inspected


def _inspected() -> Iterator[_Entry]:
    script = Path(__file__).with_name("_inspect_stdlib.py")
    # -I -S: no environment variables, no site-packages, nothing that could change what is inspected.
    process = subprocess.run(  # noqa: S603 - this interpreter, on a file of this package
        [sys.executable, "-I", "-S", str(script)], capture_output=True, text=True, encoding="utf-8", check=False
    )
    if process.returncode != 0:
        raise DataError(
            "stdlib-docs cannot be made here",
            f"{sys.executable} ended with status {process.returncode}: {process.stderr[-200:]}",
            "Name a data file instead.",
        )
    for entry in json.loads(process.stdout):
        yield _Entry(*entry)
