r"""Whether two objects of sympy are equal: their values at some points first, then math-verify.

math-verify proves equality by `simplify`, which takes most of the time of a comparison, most of all for a wrong answer,
and may not end. Values at points decide nearly all expressions in milliseconds: values that differ refute an identity,
and values that agree to 40 digits at points that no author has chosen prove it for all practical purposes. Variables
are taken for real: a point at which both values are complex is outside the domain, unless i occurs.
"""

from collections.abc import Iterator
from typing import Any

_DIGITS = 50
_EQUAL = 1e-40
"""Relative difference up to which exact values are one: rounding, at 50 digits."""
_LARGE = 1e30
"""Beyond it a difference of 1 may be lost: 2**1009 and 2**1009 - 1."""
_APART = 1e-5
"""Relative difference from which values are different, even if one of them is a decimal."""
_POINTS = (
    ("0.73190412", "1.31707113", "0.41873019", "2.10391771", "1.83201467"),
    ("1.67320508", "0.57721566", "2.30258509", "0.91596559", "1.20205690"),
    ("-0.62432998", "-1.26185950", "-0.83462684", "-1.70521114", "-0.35323637"),
    ("-1.45136923", "0.78539816", "-2.66514414", "1.11803398", "-0.64341054"),
)
_FAR = (
    ("37.29577951", "61.80339887", "-43.42944819", "25.50134164", "69.31471805"),
    ("-52.35987755", "14.14213562", "83.14462618", "-31.83098861", "57.29577951"),
)
"""Further points, for functions with steps."""


def are_equal(gold: Any, answer: Any) -> bool:
    """Whether an answer (a sympy object, or text that could not be read) is the ground truth, in any spelling."""
    from math_verify import verify

    for one, other in _spellings(gold, answer):
        known = _same_values(one, other)
        if known is None:
            known = verify(one, other, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
            known = known and not _are_tiny_and_apart(one, other)
        if known:
            return True
    return False


def _spellings(gold: Any, answer: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs to compare: as they were read, with i as the imaginary unit, vectors as tuples, i, j, k as a vector."""
    from sympy import Expr, I, MatrixBase, Tuple  # type: ignore[import-untyped, unused-ignore]

    if isinstance(gold, str) or isinstance(answer, str):
        yield gold, answer
        return
    letters = {symbol for each in (gold, answer) for symbol in each.free_symbols}
    units = {symbol: I for symbol in letters if symbol.name == "i"}
    if isinstance(gold, MatrixBase) and isinstance(answer, Expr):
        answer = _vector(answer, gold.shape)
    yield gold, answer
    if units:
        yield gold.subs(units), answer.subs(units)
    if isinstance(gold, MatrixBase) != isinstance(answer, MatrixBase):
        vector, other = (gold, answer) if isinstance(gold, MatrixBase) else (answer, gold)
        if 1 in vector.shape and not isinstance(other, Expr):
            yield (Tuple(*vector), other) if vector is gold else (other, Tuple(*vector))


def _vector(expression: Any, shape: tuple[int, int]) -> Any:
    """A scalar times a matrix, worked out; ``2i+3j`` as a column of its coefficients; other expressions as they are."""
    from sympy import Matrix, Symbol

    expression = expression.doit()
    letters = {symbol.name: symbol for symbol in getattr(expression, "free_symbols", ())}
    if shape[1] != 1 or not letters or not letters.keys() <= set("ijk"[: shape[0]]):
        return expression
    units = [letters.get(name, Symbol(name)) for name in "ijk"[: shape[0]]]
    expanded = expression.expand()
    column = Matrix([expanded.coeff(unit) for unit in units])
    return column if expanded == sum(a * b for a, b in zip(column, units, strict=True)) else expression


def _same_values(gold: Any, answer: Any) -> bool | None:
    """Whether two expressions have the same values wherever both are defined; None if values do not tell."""
    from sympy import (
        Derivative,
        Expr,
        I,
        Integral,
        Limit,
        MatrixExpr,
        Mod,
        Product,
        Sum,
        Tuple,
        UnevaluatedExpr,
        ceiling,
        floor,
    )

    if isinstance(gold, Tuple) and isinstance(answer, Tuple) and len(gold) == len(answer):
        return False if any(_same_values(*pair) is False for pair in zip(gold, answer, strict=True)) else None
    if not isinstance(gold, Expr) or not isinstance(answer, Expr) or isinstance(gold, MatrixExpr):
        return None
    if isinstance(answer, MatrixExpr) or any(
        each.has(Derivative, Integral, Limit, Product, Sum, UnevaluatedExpr) for each in (gold, answer)
    ):
        return None  # UnevaluatedExpr: a percentage, which may be a number as well as a share
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if len(symbols) > len(_POINTS[0]):
        return None
    is_complex = gold.has(I) or answer.has(I)
    has_steps = gold.has(floor, ceiling, Mod) or answer.has(floor, ceiling, Mod)
    points = _POINTS + (_FAR if has_steps else ()) if symbols else _POINTS[:1]
    found = [_compare_at(gold, answer, symbols, point, is_complex) for point in points]
    told = [each for each in found if each is not None]
    if False in told:
        return False
    return True if all(told) and len(told) >= min(2, len(found)) and None not in told else None


def _compare_at(gold: Any, answer: Any, symbols: list[Any], point: tuple[str, ...], is_complex: bool) -> bool | None:
    """Whether two values are one, to all digits; None if they are not values, or close without being one."""
    from sympy import Rational

    at = dict(zip(symbols, map(Rational, point), strict=False))
    values = [each.xreplace(at).evalf(_DIGITS) for each in (gold, answer)]
    if not all(value.is_number and value.is_finite for value in values):
        return None
    if not is_complex and not all(value.is_real for value in values):
        return None
    size = max(abs(value) for value in values)
    difference = abs(values[0] - values[1])
    if size < _EQUAL:  # zero but for rounding, or very small: math-verify knows
        return None
    if difference <= _EQUAL * size and size < _LARGE:
        return True
    return False if difference > _APART * max(size, 1e-3 if _has_decimal(gold, answer) else 0) else None


def _has_decimal(*expressions: Any) -> bool:
    from sympy import Float

    return any(each.has(Float) for each in expressions)


def _are_tiny_and_apart(gold: Any, answer: Any) -> bool:
    """Are both numbers below 1e-3 and over 0.1 % apart?

    math-verify compares in absolute terms (1e-15, or 6 decimals), so that 1/2004! and 1/2006! are equal to it.
    """
    from sympy import Eq, Expr

    values = []
    for side in (gold, answer):
        number = side.rhs if isinstance(side, Eq) else side
        if not isinstance(number, Expr) or number.free_symbols:
            return False
        try:
            value = abs(number.doit().evalf(30))
        except ValueError:  # 12/0: "can't evaluate nan or zoo"
            return False
        if not value.is_Float and value != 0:  # not a number after all: oo, an unevaluated sum, …
            return False
        if value.is_Float and value._prec == 1:  # sympy's mark for "no significant digit": zero up to rounding
            return False
        values.append(value)
    large = max(values)
    return bool(0 < large < 1e-3 and abs(values[0] - values[1]) > 1e-3 * large)
