"""The language of `where=`: comparisons of metadata fields, parsed against an allow-list.

    label == "red panda" and 2019 <= year < 2024 and artist not in ["noto", "twemoji"]

A field is a name, or `meta["a name"]` where that is no identifier; Milvus reads the same text. As
in SQL, a row that lacks a field, or holds a value of another type there, matches no comparison with
it, nor `not` of one.
"""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce
from itertools import pairwise
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlm.errors import ConfigError

Kind = Literal["text", "number", "bool"]
Column = Callable[[str, Kind], Any]  # the Arrow array of a field's values of one kind
Value = str | int | float | bool

MAX_LENGTH = 10_000  # characters: Python's parser is recursive
_HINT = 'write comparisons such as label == "cat" and year >= 2019, joined by and, or, not'
_KINDS: dict[type, Kind] = {str: "text", int: "number", float: "number", bool: "bool"}
_INT64 = range(-(2**63), 2**63)
_COMPARE: dict[type[ast.cmpop], tuple[str, str]] = {  # and what it is with its sides exchanged
    ast.Eq: ("equal", "equal"),
    ast.NotEq: ("not_equal", "not_equal"),
    ast.Lt: ("less", "greater"),
    ast.LtE: ("less_equal", "greater_equal"),
    ast.Gt: ("greater", "less"),
    ast.GtE: ("greater_equal", "less_equal"),
}


@dataclass(frozen=True)
class Filter:
    """A parsed expression: the fields it reads, and the rule that finds the rows that match."""

    fields: frozenset[str]
    rule: Callable[[Column], Any]

    def mask(self, column: Column) -> npt.NDArray[np.bool_]:
        """Whether each row matches."""
        matches = pc.fill_null(self.rule(column), False)
        return np.asarray(matches.to_numpy(zero_copy_only=False), dtype=np.bool_)


def parse(expression: str) -> Filter:
    """The filter that an expression spells. Its text is parsed, and never run.

    Raises:
        ConfigError: It has anything but comparisons of a field with a value, `and`, `or`, `not`.
    """
    if len(expression) > MAX_LENGTH:
        raise ConfigError(f"where: longer than {MAX_LENGTH} characters")
    try:
        return _filter(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "it cannot be parsed"
        raise ConfigError(f"where: {expression[:200]}: {reason}; {_HINT}") from None


def parse_known(expression: str, known: Sequence[str]) -> Filter:
    """As `parse`, for rows whose fields are known.

    Raises:
        ConfigError: As `parse`, or a field that no row has.
    """
    rule = parse(expression)
    for field in sorted(rule.fields - set(known)):
        near = get_close_matches(field, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'none'}"
        raise ConfigError(f"where: no picture has the field {field!r}; {hint}")
    return rule


def column_of(values: Sequence[object], kind: Kind) -> Any:
    """An Arrow array of the values of one kind, null in the place of all others."""
    kept = [value if _kind(value) == kind else None for value in values]
    if kind == "number" and any(isinstance(value, float) for value in kept):
        floats = [float(value) if isinstance(value, int | float) else None for value in kept]
        return pa.array(floats, pa.float64())
    return pa.array(kept, {"number": pa.int64(), "text": pa.string(), "bool": pa.bool_()}[kind])


def _filter(node: ast.expr) -> Filter:
    match node:
        case ast.BoolOp(op=ast.And(), values=values):
            return _joined("and_kleene", [_filter(value) for value in values])
        case ast.BoolOp(op=ast.Or(), values=values):
            return _joined("or_kleene", [_filter(value) for value in values])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _negated(_filter(operand))
        case ast.Compare(left=left, ops=ops, comparators=rest):
            pairs = zip(ops, pairwise([left, *rest]), strict=True)  # 1 < x < 5 is 1 < x and x < 5
            return _joined("and_kleene", [_compared(op, *pair) for op, pair in pairs])
    _refuse(node)


def _joined(function: str, parts: list[Filter]) -> Filter:
    join = getattr(pc, function)
    fields = frozenset[str]().union(*(part.fields for part in parts))
    return Filter(fields, lambda column: reduce(join, [part.rule(column) for part in parts]))


def _negated(part: Filter) -> Filter:
    return Filter(part.fields, lambda column: pc.invert(part.rule(column)))


def _compared(op: ast.cmpop, left: ast.expr, right: ast.expr) -> Filter:
    if isinstance(op, ast.In | ast.NotIn):
        among = _among(left, right)
        return among if isinstance(op, ast.In) else _negated(among)
    if type(op) not in _COMPARE:
        _refuse(right, "`is` compares objects; write == or !=")
    name, mirrored = _COMPARE[type(op)]
    if not _is_field(left):
        left, right, name = right, left, mirrored
    field, value = _field(left), _value(right)
    kind, compare = _KINDS[type(value)], getattr(pc, name)
    if kind == "bool" and not isinstance(op, ast.Eq | ast.NotEq):
        _refuse(right, "true and false have no order; write == or !=")

    def rule(column: Column) -> Any:
        found, values = _aligned(column(field, kind), [value])
        return compare(found, values[0])

    return Filter(frozenset([field]), rule)


def _among(left: ast.expr, right: ast.expr) -> Filter:
    if not isinstance(right, ast.List | ast.Tuple) or not right.elts:
        _refuse(right, 'after `in` comes a list, as ["cat", "dog"]')
    field, values = _field(left), [_value(element) for element in right.elts]
    kind = _KINDS[type(values[0])]
    if any(_KINDS[type(value)] != kind for value in values):
        _refuse(right, "the values of a list must all be texts, or all numbers")

    def rule(column: Column) -> Any:
        found, wanted = _aligned(column(field, kind), values)
        return pc.if_else(pc.is_valid(found), pc.is_in(found, wanted), pa.scalar(None, pa.bool_()))

    return Filter(frozenset([field]), rule)


def _aligned(found: Any, values: list[Value]) -> tuple[Any, Any]:
    """A column and values in one type: whole numbers stay exact until a fraction meets them."""
    if pa.types.is_floating(found.type) or any(isinstance(value, float) for value in values):
        return found.cast(pa.float64(), safe=False), pa.array(map(float, values), pa.float64())
    return found, pa.array(values, found.type)


def _is_field(node: ast.expr) -> bool:
    return isinstance(node, ast.Name | ast.Subscript)


def _field(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Subscript(value=ast.Name(id="meta"), slice=ast.Constant(value=str(name))):
            return name
    _refuse(node, "each comparison is of one field with one value")


def _value(node: ast.expr) -> Value:
    match node:
        case ast.Constant(value=str() | int() | float() as value) if _kind(value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            if _kind(value) == "number":
                return -value
    _refuse(node, "a value is a text in quotes, a number, True or False")


def _kind(value: object) -> Kind | None:
    """What a value compares with: None for null, lists, objects and integers above 64 bits."""
    if type(value) is int and value not in _INT64:
        return None
    return _KINDS.get(type(value))


def _refuse(node: ast.expr, rule: str = "this is not part of the language") -> NoReturn:
    raise ConfigError(f"where: {ast.unparse(node)[:200]}: {rule}; {_HINT}")
