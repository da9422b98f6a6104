"""Conditions on a row, such as `len(output) > 20 and "http" not in lower(output)`: read, never run as Python.

    condition = Condition('words(answer) >= 3')
    condition.columns                     # {"answer"}
    condition({"answer": "one two"})      # False

A name is a column; `row["my column"]` is one whose name is no word. There are comparisons, `and`, `or`, `not`, `in`,
arithmetic, numbers, texts, `None`, and the functions below. Nothing else is understood, so nothing else can happen.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
_Value = Callable[[Row], Any]

LONGEST = 2000  # characters of a condition
DEEPEST = 50  # operations within operations

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
# A null is as long as an empty text: conditions are written to find such rows.
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "len": lambda value: 0 if value is None else len(value),
    "lower": lambda value: "" if value is None else str(value).lower(),
    "strip": lambda value: "" if value is None else str(value).strip(),
    "words": lambda value: 0 if value is None else len(str(value).split()),
    "text": lambda value: "" if value is None else str(value),
}
_KNOWN = f"A condition has columns, texts, numbers, comparisons, and, or, not, in, + - * / and {', '.join(_FUNCTIONS)}"


class ConditionError(ValueError):
    """A condition cannot be understood, or not be answered for a row."""


class Condition:
    """A condition on a row. Raises ConditionError, when made, for what it does not understand."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: set[str] = set()
        if len(text) > LONGEST:
            raise ConditionError(f"the condition has {len(text):,} characters, more than {LONGEST:,}")
        try:
            self._holds = self._read(ast.parse(text.strip(), mode="eval").body, depth=0)
        except (SyntaxError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply"
            raise ConditionError(f"{text!r} cannot be read: {reason}") from error

    def __call__(self, row: Row) -> bool:
        """Whether it holds for `row`; a column that a row lacks is null. Raises ConditionError if that is unclear."""
        try:
            return bool(self._holds(row))
        except (TypeError, ArithmeticError) as error:
            raise ConditionError(str(error)) from error

    def _read(self, node: ast.expr, depth: int) -> _Value:
        if depth > DEEPEST:
            raise ConditionError(f"the condition is nested more than {DEEPEST} deep")
        depth += 1
        match node:
            case ast.Constant(value=str() | int() | float() | None as value):
                return lambda _: value
            case ast.Name(id=name):
                return self._column(name)
            case ast.Subscript(value=ast.Name(id="row"), slice=ast.Constant(value=str() as name)):
                return self._column(name)
            case ast.BoolOp(op=op, values=values):
                parts, both = [self._read(value, depth) for value in values], isinstance(op, ast.And)
                return lambda row: (all if both else any)(part(row) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                value = self._read(operand, depth)
                return lambda row: not value(row)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self._read(operand, depth)
                return lambda row: -value(row)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _calculated(_ARITHMETIC[type(op)], self._read(left, depth), self._read(right, depth))
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                return _compared([self._read(side, depth) for side in (left, *comparators)], ops)
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
                function, value = _FUNCTIONS[name], self._read(argument, depth)
                return lambda row: function(value(row))
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                values = [self._read(element, depth) for element in elements]
                return lambda row: [value(row) for value in values]
        raise ConditionError(f"`{ast.unparse(node)}` is not understood. {_KNOWN}")

    def _column(self, name: str) -> _Value:
        self.columns.add(name)
        return lambda row: row.get(name)


def _compared(values: list[_Value], ops: list[ast.cmpop]) -> _Value:
    compare = [_COMPARISONS[type(op)] for op in ops]

    def compared(row: Row) -> bool:
        found = [value(row) for value in values]
        return all(holds(found[i], found[i + 1]) for i, holds in enumerate(compare))

    return compared


def _calculated(operation: Callable[[Any, Any], Any], left: _Value, right: _Value) -> _Value:
    def calculated(row: Row) -> Any:
        values = left(row), right(row)
        # A text times a number could fill the memory; a text with % would be a format.
        if not all(isinstance(value, int | float) for value in values):
            raise TypeError(f"{operation.__name__} is for numbers, not {' and '.join(map(_kind, values))}")
        return operation(*values)

    return calculated


def _kind(value: Any) -> str:
    return {"str": "text", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)
