"""Which modules are chosen on the map, and how a config says so: names, layers, or the shortest regular expression.

    rows = rows_of(info.modules)
    settings_of(rows, {0: {15, 16, 17}}, places)      # Choice("q_proj" of three layers)

A cell is a kind of module in one layer; where a layer holds many of a kind (experts), a cell is all of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from nbtune.models import ModuleInfo

Cells = Mapping[int, Collection[int]]  # layers by the index of the row


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of module through the layers."""

    label: str  # "q_proj": the shortest ending that no other row has
    stem: str  # "model.layers"
    rest: str  # "self_attn.q_proj"; * for a number
    shape: str  # "576→192"
    modules: Mapping[int, tuple[str, ...]]  # paths by layer


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a config has to say."""

    target_modules: list[str] | str
    layers_to_transform: list[int] | None = None


def rows_of(modules: Iterable[ModuleInfo]) -> list[Row]:
    """The rows of a map: the linear layers in the blocks, in the order of the forward pass."""
    found: dict[tuple[str, str], dict[int, list[str]]] = {}
    shapes: dict[tuple[str, str], str] = {}
    for module in modules:
        if module.layer is None:
            continue
        stem, _, rest = module.name.partition(f".{module.layer}.")
        key = stem, re.sub(r"(?<=\.)\d+(?=\.)", "*", rest)
        found.setdefault(key, {}).setdefault(module.layer, []).append(module.name)
        shapes.setdefault(key, f"{module.in_features}→{module.out_features}")
    labels = _labels([f"{stem}.{rest}" for stem, rest in found])
    return [
        Row(label, *key, shapes[key], {layer: tuple(names) for layer, names in layers.items()})
        for label, (key, layers) in zip(labels, found.items(), strict=True)
    ]


def cells_of(rows: Sequence[Row], paths: Collection[str]) -> dict[int, set[int]]:
    """The cells whose modules are all among these paths."""
    wanted = set(paths)
    return {
        index: {layer for layer, names in row.modules.items() if wanted.issuperset(names)}
        for index, row in enumerate(rows)
    }


def settings_of(rows: Sequence[Row], cells: Cells, places: Collection[str], all_linear: Collection[str]) -> Choice:
    """The shortest settings that mean exactly the modules of these cells.

    Args:
        rows: Of the map.
        cells: The chosen ones; at least one.
        places: The paths of all modules of the model, of which a regular expression might match some.
        all_linear: The paths that "all-linear" means.
    """
    chosen = {index: frozenset(layers) for index, layers in cells.items() if layers}
    wanted = {name for index, layers in chosen.items() for layer in layers for name in rows[index].modules[layer]}
    if wanted == set(all_linear):
        return Choice("all-linear")
    names = [rows[index].label for index in chosen]
    layers = next(iter(chosen.values()))
    whole = all(layers == rows[index].modules.keys() for index, layers in chosen.items())
    if whole and _named(names, None, places) == wanted:
        return Choice(names)
    if len(set(chosen.values())) == 1 and _named(names, layers, places) == wanted:
        return Choice(names, sorted(layers))
    return Choice(_expression(rows, chosen, places))


def numbers(of: Collection[int]) -> str:
    r"""The regular expression of some whole numbers: {15, ..., 29} is `1[5-9]|2\d`."""
    digits: dict[int | None, list[int]] = {}
    for number in sorted(of):
        digits.setdefault(number // 10 if number > 9 else None, []).append(number % 10)
    prefixes: dict[str, list[int]] = {}
    pieces = []
    for prefix, ends in digits.items():
        if prefix is None:
            pieces.append(_digits(ends))
        else:
            prefixes.setdefault(_digits(ends), []).append(prefix)
    for end, before in prefixes.items():
        expression = numbers(before)
        pieces.append((f"({expression})" if "|" in expression else expression) + end)
    return "|".join(pieces)


def _digits(of: Sequence[int]) -> str:
    if len(of) == 10:
        return r"\d"
    if len(of) == 1:
        return str(of[0])
    runs: list[list[int]] = []
    for digit in of:
        if runs and digit == runs[-1][-1] + 1:
            runs[-1].append(digit)
        else:
            runs.append([digit])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else "".join(map(str, run)) for run in runs]
    return f"[{''.join(parts)}]"


def _expression(rows: Sequence[Row], chosen: Mapping[int, frozenset[int]], places: Collection[str]) -> str:
    """Terms joined by |, one for the rows that share a place in the block and the layers that are chosen."""
    groups: dict[tuple[frozenset[int], str, str], list[Row]] = {}
    for index, layers in chosen.items():
        row = rows[index]
        groups.setdefault((layers, row.stem, row.rest.rpartition(".")[0]), []).append(row)
    terms = []
    for (layers, stem, parent), members in groups.items():
        wanted = {name for row in members for layer in layers for name in row.modules[layer]}
        everywhere = all(layers == row.modules.keys() for row in members)
        candidates = _terms(members, layers, stem, parent, everywhere=everywhere)
        exact = (term for term in candidates if _matched(term, places) == wanted)
        terms.append(next(exact, None) or "|".join(map(re.escape, sorted(wanted))))
    return "|".join(terms)


def _terms(members: Sequence[Row], layers: Collection[int], stem: str, parent: str, *, everywhere: bool) -> list[str]:
    """Expressions of these rows in these layers, the shortest first; the first may match more."""
    inside = "".join(rf"{re.escape(part)}\.".replace(r"\*", r"\d+") for part in parent.split(".") if part)
    last = inside + _alternatives([row.rest.rpartition(".")[2] for row in members])
    short = inside.rpartition(r"\.")[0].rpartition(r"\.")[2]
    name = _alternatives([row.rest.rpartition(".")[2] for row in members])
    number = numbers(layers)
    number = f"({number})" if "|" in number else number
    blocks = stem.rpartition(".")[2]
    of_layers = [rf".*{blocks}\.{number}\.{last}", rf"{re.escape(stem)}\.{number}\.{last}"]
    if not everywhere:
        return of_layers
    near = [rf".*{short}\.{name}"] if short else [rf".*\.{name}"]
    return [*near, rf".*\.{last}", rf"{re.escape(stem)}\.\d+\.{last}", *of_layers]


def _alternatives(names: Sequence[str]) -> str:
    """q_proj, k_proj: (q|k)_proj."""
    if len(names) == 1:
        return re.escape(names[0])
    ends = {name.partition("_")[2] for name in names}
    if len(ends) == 1 and (end := ends.pop()):
        return f"({'|'.join(re.escape(name.partition('_')[0]) for name in names)})_{re.escape(end)}"
    return f"({'|'.join(map(re.escape, names))})"


def _matched(expression: str, places: Iterable[str]) -> set[str]:
    return {path for path in places if re.fullmatch(expression, path)}


def _named(names: Sequence[str], layers: Collection[int] | None, places: Iterable[str]) -> set[str]:
    """What these names mean in these layers, by PEFT's rules."""
    from nbtune.modules.paths import ends_with, in_layers

    blocks = None if layers is None else sorted(layers)
    return {path for path in places if ends_with(path, names) and in_layers(path, blocks, None)}


def _labels(paths: Sequence[str]) -> list[str]:
    """The shortest ending of each path, from a dot on, that no other path has."""
    labels = []
    for path in paths:
        parts = path.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        others = [other for other in paths if other != path]
        alone = (end for end in endings if not any(f".{other}".endswith(f".{end}") for other in others))
        labels.append(next(alone, path))
    return labels
