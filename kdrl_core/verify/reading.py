r"""What math-verify reads in a content, as sympy objects, and whether it has read the whole of it.

A ground truth that is read only in part would reward wrong answers: of ``\{x \mid x \ge 0\}`` math-verify reads 0, of
``n \equiv 1 \pmod 3`` the residue. Such a truth is compared as text (`is_whole`). An answer of which digits were not
read has no readings at all.
"""

import re
from collections import Counter
from functools import lru_cache
from tokenize import TokenError
from typing import Any

from kdrl_core.verify.latex import TEXT, synonymous
from kdrl_core.verify.normalise import normalise
from kdrl_core.verify.numbers import decimal_comma
from kdrl_core.verify.objections import lost_digits
from kdrl_core.verify.screening import last_box

_ARITHMETIC = re.compile(r"[.+\-*/^()]*+\d[\d.+\-*/^()]*+", re.ASCII)
_DIVIDED_BY_ZERO = re.compile(r"/\(*+(?:0++(?:\.0++)?+|\.0++)(?![\d.])", re.ASCII)
_MAX_ARITHMETIC_CHARS = 1_000
_AROUND_OPERATOR = re.compile(r" ?([+\-*/^()]) ?")
_MATH = re.compile(r"\\boxed|(?<!\\)\$|\\\(|\\\[")
_NUMBER = re.compile(r"([+-]?)\s*+(?:(\d{1,30}(?:\.\d{1,30})?)|\\frac\{(\d{1,30})\}\{(\d{1,30})\}|(\\infty))", re.ASCII)
_RELATION = re.compile(
    r"[<>]|\\(?:le|ge|ne|equiv|in|notin|subset|subseteq|to|perp|parallel|Rightarrow|Leftrightarrow|iff|cong|sim|propto|"
    r"forall|exists|land|lor|neg|nmid|dots)(?![A-Za-z])"
)
_INDEX = re.compile(
    r"_\s*+\{?\s*+\\(?:text|mathrm|textrm)\s*+\{[^{}]*+\}|\\operatorname\s*+\{[^{}]*+\}|\\(?:text|mathrm)\{[^{}]*+\}(?=\s*+[(=_])"
)
_DECIMAL = re.compile(r"[+-]?[\d.,]+(?:\\?%)?", re.ASCII)
_SIGN = re.compile(r"[\dA-DF-Za-df-z]", re.ASCII)
_PRIMES = re.compile(r"(?<=[A-Za-z])(?:'+|\^\s*+(?:\{\s*+(?:\\prime\s*+)+\}|\\prime(?![A-Za-z])))")
_PRIME = "77"
_PRIME_INDEX = re.compile(r"_\{(?:77)++\}")
"""Of ``y'`` math-verify reads y. An index that nobody writes makes it another letter."""
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-zÀ-ÿ]{3,}[ ,:;][^=]*[A-Za-zÀ-ÿ]{3,}|[\u0590-\uffff]|%|(?<!\\)\$")
_COMMAND = re.compile(r"\\(?:begin|end)\s*+\{[^{}]*+\}|\\[A-Za-z]++|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_FIRST_ENTRY = re.compile(r"(\\begin\s*+\{[a-z]*matrix\})\s*+(?=\d)")
_ENERGY = re.compile(r"(?<![\\A-Za-z])(?<!\d)E(?![A-Za-z])|(?<=\d)E(?![A-Za-z\d+-])|(?<![\\A-Za-z])e(?=\s*+_)")
_JOINING = frozenset({"", "or", "and", "th", "st", "nd", "rd", "i", "e", "d"})


@lru_cache(maxsize=256)
def content_of(ground_truth: str) -> str:
    """The truth, or the content of its only box, normalised. A truth with several boxes is read as a whole solution."""
    content, _ = last_box(ground_truth) if ground_truth.count(r"\boxed") == 1 else (None, True)
    return normalise(content or ground_truth)


def readings_of_truth(ground_truth: str) -> list[Any]:
    """The readings of a ground truth; of a whole solution, those of its last formula."""
    from math_verify import parse

    truth = content_of(ground_truth)
    if _MATH.search(truth):
        return _with_value(parse(ground_truth, parsing_timeout=None, raise_on_error=True))
    return readings_of(truth, is_truth=True)


def readings_of(content: str, *, is_truth: bool = False) -> list[Any]:
    """All readings of a normalised content. An answer that math-verify read only in part has none."""
    readings = _read(content)
    text = next((reading for reading in readings if isinstance(reading, str)), content)
    if not is_truth and lost_digits(content, _PRIME_INDEX.sub("", text)):
        readings = []
    if (arithmetic := _read_arithmetic(content)) is not None:
        readings.append(arithmetic)
    if not is_truth and (decimal := decimal_comma(content)) is not None:
        readings += _read(decimal)
    return readings


def is_whole(truth: str, readings: list[Any]) -> bool:
    """Whether the readings of a normalised truth have all of its digits, relations and words.

    A truth that is a whole solution, with formulas between delimiters, is not looked at.
    """
    from sympy import Set  # type: ignore[import-untyped, unused-ignore]
    from sympy.logic.boolalg import Boolean  # type: ignore[import-untyped, unused-ignore]

    objects = [reading for reading in readings if not isinstance(reading, str)]
    if _MATH.search(truth) or not objects:
        return True  # if there is no object, the texts are compared anyway
    if words_left_out(truth):
        return False
    if _RELATION.search(synonymous(truth)) and not any(isinstance(each, (Boolean, Set)) for each in objects):
        return False
    text = next((reading for reading in readings if isinstance(reading, str)), truth)
    return bool(_DECIMAL.fullmatch(truth)) or not Counter(_signs(truth)) - Counter(_signs(text))


def _signs(content: str) -> list[str]:
    """The digits and letters of a content that stand for something; no commands, no text."""
    return _SIGN.findall(_COMMAND.sub("", TEXT.sub("", content)))


def words_left_out(content: str, known: str = "") -> bool:
    """Whether a content has text that math-verify would leave out, beside "and" and "or", and the text in `known`."""
    words, others = (
        {word.strip(" .,;:()").lower() for word in TEXT.findall(_INDEX.sub("", text))} for text in (content, known)
    )
    return bool(words - others - _JOINING)


def read_number(content: str) -> Any:
    """The real number, or infinity, that a text is; None if it is none."""
    from sympy import Expr, Rational, S

    if plain := _NUMBER.fullmatch(content.strip()):
        sign, decimal, top, bottom, infinity = plain.groups()
        if infinity:
            return S.NegativeInfinity if sign == "-" else S.Infinity
        if bottom and not int(bottom):
            return None
        value = Rational(decimal) if decimal else Rational(int(top), int(bottom))
        return -value if sign == "-" else value
    for reading in readings_of(normalise(content)):
        if isinstance(reading, Expr) and not reading.free_symbols:
            value = reading.doit()
            return value if value.is_extended_real else None
    return None


def _with_value(readings: list[Any]) -> list[Any]:
    """The readings without those that are no number at all: 1/0 and 0/0, which sympy cannot compare."""
    from sympy import nan, zoo

    return [reading for reading in readings if reading is not zoo and reading is not nan]


def _read(content: str) -> list[Any]:
    """What latex2sympy, math-verify's parser, reads in a content, if it can, and the text that it was given.

    math-verify's own `parse` searches for formulas first; of a content that it cannot read it takes the last number.
    """
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify import parse
    from math_verify.grader import should_treat_as_complex

    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    # Else \frac{1}{2}\begin{pmatrix}34 is read as \frac{1}{2}\begin{pmatrix}3·4.
    content = _FIRST_ENTRY.sub(r"\1\\,", content)
    content = _PRIMES.sub(
        lambda primes: f"_{{{_PRIME * max(primes[0].count(chr(39)), primes[0].count('prime'))}}}", content
    )
    text = normalize_latex(_ENERGY.sub(_renamed_e, content), config)
    try:
        found = latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except MemoryError:
        raise
    except Exception:  # the parser raises many types on what is no formula
        if _PROSE.search(content):  # math-verify looks for the formula, or the number, that prose ends with
            return _with_value(parse(rf"\boxed{{{content}}}", parsing_timeout=None, raise_on_error=True))
        return [text]
    return _with_value([found, text])


def _renamed_e(letter: "re.Match[str]") -> str:
    r"""Another letter for E, and for e with an index: to latex2sympy both are Euler's number."""
    return r"\varpi " if letter[0] == "E" else r"\varrho "


def _read_arithmetic(content: str) -> Any:
    """The value of a content of only numbers and operators (``2**3``, ``7 / 2``); None for any other content."""
    from sympy.parsing import parse_expr  # type: ignore[import-untyped, unused-ignore]

    if len(content) > _MAX_ARITHMETIC_CHARS:
        return None
    expression = _AROUND_OPERATOR.sub(r"\1", " ".join(content.split()))
    if not _ARITHMETIC.fullmatch(expression) or _DIVIDED_BY_ZERO.search(expression):
        return None
    try:
        return parse_expr(expression.replace("^", "**"), evaluate=False)
    except (SyntaxError, TokenError, TypeError, ValueError, ArithmeticError, AttributeError):
        return None
