r"""Numbers with units. Dimensions, prefixes and conversion are pint's.

- Answer and ground truth have units: they must be of one dimension, and the answer is converted into the truth's unit
  exactly (``100\text{ cm}`` is ``1\text{ m}``). ``\text{cm}^3`` is not ``\text{cm}^2``.
- One of them has a unit: the numbers are compared, since the problem may have given the unit.
- What pint does not know (``5\text{ apples}``) is a noun. Nouns of answer and truth must share a word, unless one of
  them is only "units".

Amounts with names are ``3\text{ boys and }4\text{ girls}``; amounts of one dimension (``5\text{ hours }30\text{
minutes}``) are one quantity, their sum.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from kdrl_core.verify.latex import Equal, split_list, split_top, unwrapped
from kdrl_core.verify.objections import CHANGING
from kdrl_core.verify.words import looks_like_a_word

if TYPE_CHECKING:
    from pint import Unit, UnitRegistry

_KNOWN_TEXT = """
meter gram second minute hour day week month year kelvin degree_Celsius degree_Fahrenheit degree radian mole ampere
hertz newton joule watt volt coulomb ohm farad tesla weber henry pascal electron_volt liter bar standard_atmosphere
calorie inch foot yard mile pound ounce ton metric_ton gallon quart pint cup acre hectare knot mile_per_hour
kilometer_per_hour revolutions_per_minute dollar cent euro british_pound yen rupee siemens candela lumen lux byte
bit erg dyne gauss parsec light_year angstrom astronomical_unit
"""
_KNOWN = frozenset(_KNOWN_TEXT.split())
"""pint's names of the units that are taken for units; its others (``pair``, ``count``) are words here."""
_MONEY = (
    "dollar = [currency] = usd = bucks",
    "cent = 0.01 * dollar = cents",
    "euro = [euro_currency] = eur",
    "british_pound = [pound_currency] = gbp",
    "yen = [yen_currency] = jpy",
    "rupee = [rupee_currency] = inr",
)
_SPELLED = {
    "metres": "meter", "kilometres": "kilometer", "hrs": "hour", "mins": "minute", "secs": "second", "yrs": "year",
    "lbs": "pound", "Ohm": "ohm", "kph": "kilometer_per_hour", "kmph": "kilometer_per_hour",
    "kmh": "kilometer_per_hour", "rpm": "revolutions_per_minute",
    "Celsius": "degC", "Fahrenheit": "degF", "atm": "standard_atmosphere",
    "AU": "astronomical_unit", "ly": "light_year", "in": "inch", "USD": "dollar", "Dollars": "dollar", "cents": "cent",
    "kgs": "kilogram",
    "EUR": "euro", "euros": "euro", "rupees": "rupee", "Hours": "hour", "Minutes": "minute", "Seconds": "second",
}  # fmt: skip
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "british_pound", "¥": "yen", "₹": "rupee"}

_DEGREES = re.compile(
    r"(?:\^\s*+)?(?:\{\s*+\\circ\s*+\}|\\(?:circ|degree)(?![A-Za-z]))\s*+(?:\{?\s*+([CF])(?![A-Za-z])\s*+\}?)?+"
)
_WORDS = (
    (re.compile(r"\bdeg(?:ree)?s?\.? ?(?:C(?:elsius)?|centigrade)\b"), "degC"),
    (re.compile(r"\bdeg(?:ree)?s?\.? ?F(?:ahrenheit)?\b"), "degF"),
    (re.compile(r"\b(?:square|sq)\b\.? ?([A-Za-z]+)"), r"\1**2"),
    (re.compile(r"\b(?:cubic|cu)\b\.? ?([A-Za-z]+)"), r"\1**3"),
    (re.compile(r"\b([A-Za-z]+) squared\b"), r"\1**2"),
    (re.compile(r"\b([A-Za-z]+) cubed\b"), r"\1**3"),
    (re.compile(r"\b(?:per|an)\b|(?<=[a-z]) a (?=[a-z])"), "/"),
    (re.compile(r"\\(?:cdot|times)(?![A-Za-z])|·"), "*"),
    (re.compile(r"\\mu\s*+(?=[A-Za-z])|μ"), "µ"),
    (re.compile(r"\\Omega(?![A-Za-z])|Ω"), "ohm"),
    (re.compile(r" ?\^ ?\{? ?(-?\d) ?\}?"), r"**\1"),
    (re.compile(r"\\frac\s*+\{\s*+([A-Za-z*0-9 ]++)\}\s*+\{\s*+([A-Za-z*0-9 ]++)\}"), r"\1/(\2)"),
)
_SPLIT = re.compile(
    r"(?P<number>.*?(?:[\d})!\]]|\\pi)) ?(?P<unit>(?:\(?[A-Za-zµΩ]|\\(?:mu|Omega|frac)(?![A-Za-z])|[^\W\d_]).*)",
    re.DOTALL,
)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d[\d.,]*+|\\[dt]?frac\{\d++\}\{\d++\})(?: \\(?:cdot|times) 10\^\{?-?\d++\}?)?+")
_UNIT = re.compile(r"[A-Za-zµ_ /*().\d-]+")
_NAME = re.compile(r"[A-Za-zµ_]+")
_BLANK_BETWEEN = re.compile(r"(?<=[A-Za-zµ)\d]) (?=[A-Za-zµ(])")
_LETTERS_OF_UNITS = frozenset("mgshAKNJWVCFLlT")
_CURRENCY_FIRST = re.compile(r"([+-]?) ?((?:US)?\\?\$|[€£¥₹]|USD) ?(?=[\d.\\])")
_CURRENCY_LAST = re.compile(r"(?<=\d) ?(\\?\$|[€£¥₹])$")
_ONLY_UNITS = frozenset({"unit", "units", "square", "cubic"})
_SHORT = {"sq": "square", "cu": "cubic"}
_COMMA = re.compile(",")
_NOUN = re.compile(
    r"(?!(?:for|where|when|if|or|and|to|is|are|by|in|mod|with|as|at|of|from|than)\b)"
    r"(?:[A-Za-z]{2,}(?:[ '-][A-Za-z]+){0,5}\.?(?: ?\^ ?\{?\d\}?)?|[^\x00-\x7f]{1,20})"
)
_AMOUNT = re.compile(
    r"(?P<number>(?<![\d.,/])[-+]?\d[\d.,/]*+|\\frac\s*+\{\d++\}\s*+\{\d++\}) ?+"
    r"(?P<noun>[A-Za-z]{2,}(?: (?!and\b|or\b)[A-Za-z]+){0,3}|[hms]\b)\.?+"
)
_BETWEEN_AMOUNTS = re.compile(r"\s*+(?:[,;&]\s*+)?+(?:and\b\s*+)?+")
_MAX_ITEMS = 12
_MAX_NOUN_BLANKS = 2
_RELATING = frozenset(
    {"of", "per", "than", "or", "and", "fewer", "less", "more", "not", "no", "every", "each", "pair", "dozen"}
)


class Quantity(NamedTuple):
    """A number, as LaTeX, and what it counts."""

    number: str
    unit: "Unit | None" = None
    words: str = ""
    """The unit as it is written, or a noun."""


@lru_cache(maxsize=1)
def _registry() -> "UnitRegistry":
    import pint

    registry: UnitRegistry = pint.UnitRegistry(on_redefinition="ignore")
    for definition in _MONEY:
        registry.define(definition)
    return registry


@lru_cache(maxsize=1_024)
def _unit(text: str) -> "Unit | None":
    """The unit that a text is; None if it is none."""
    for pattern, replacement in _WORDS:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split()).rstrip(".")
    if not _UNIT.fullmatch(text):
        return None
    registry = _registry()
    spelled = _NAME.sub(lambda name: _SPELLED.get(name[0], name[0]), text)
    for name in _NAME.findall(spelled):
        is_letter = len(name) == 1 and name not in _LETTERS_OF_UNITS
        if is_letter or not any(unit in _KNOWN for _, unit, _ in registry.parse_unit_name(name)):
            return None
    try:
        return registry.parse_units(_BLANK_BETWEEN.sub(" * ", spelled))
    except Exception:  # pint raises many types on what is no unit
        return None


@lru_cache(maxsize=1_024)
def quantity_of(content: str, *, is_truth: bool = False) -> Quantity | None:
    """The quantity that a content is; None if it has neither unit nor noun.

    A bare letter is a unit only after a plain number; in a ground truth with a blank between: ``5m`` is a product.
    """
    text = _DEGREES.sub(lambda match: f" deg{match[1]} " if match[1] else " degree ", unwrapped(content))
    text = " ".join(text.split())
    if first := _CURRENCY_FIRST.match(text):
        return Quantity(first[1] + text[first.end() :], *_currency(first[2]))
    if last := _CURRENCY_LAST.search(text):
        return Quantity(text[: last.start()], *_currency(last[1]))
    match = _SPLIT.fullmatch(text)
    if match is None:
        return None
    number, words = match["number"], match["unit"]
    is_text = text != content
    is_sure = is_text or (
        _PLAIN_NUMBER.fullmatch(number) and (len(words) > 1 or not is_truth or f" {words}" in content)
    )
    if is_sure and (unit := _unit(words)) is not None:
        return Quantity(number, unit, words)
    is_noun = _NOUN.fullmatch(words) and (is_text or looks_like_a_word(max(words.split(), key=len)))
    return Quantity(number, None, words) if is_noun and not CHANGING.search(words) else None


def _currency(sign: str) -> "tuple[Unit | None, str]":
    name = _CURRENCIES.get(sign[-1], "dollar")
    return _unit(name), name


def same_quantity(answer: str, truth: str, equal: Equal) -> bool | None:
    """Whether two contents are the same quantity, or lists of the same; None if they have neither unit nor noun."""
    items, own_items = split_list(truth), split_list(answer)
    has_unit = any(quantity_of(item, is_truth=True) for item in items)
    if 1 < len(items) <= _MAX_ITEMS and (
        has_unit or (len(own_items) == len(items) and any(map(quantity_of, own_items)))
    ):
        return _same_items(own_items, items, equal)
    given, expected = quantity_of(answer), quantity_of(truth, is_truth=True)
    if (given is None and expected is None) or (len(own_items) > 1 and given is not None and expected is None):
        return None
    given, expected = given or Quantity(answer), expected or Quantity(truth)
    if given.unit is not None and expected.unit is not None:
        converted = _converted(given, expected.unit)
        return converted is not None and equal(converted, expected.number)
    if ("%" in answer) != ("%" in truth):
        return False
    if given.words and expected.words and not _share_a_word(given, expected):
        return False
    if given.words and not expected.words and given.unit is None and given.words.count(" ") > _MAX_NOUN_BLANKS:
        return False
    return equal(given.number, expected.number)


def _same_items(answers: list[str], truths: list[str], equal: Equal) -> bool:
    left = list(answers)
    if len(answers) != len(truths):
        return False
    for truth in truths:
        match = next((item for item in left if equal(item, truth)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _share_a_word(given: Quantity, expected: Quantity) -> bool:
    phrase, other = (list(map(_singular, _NAME.findall(each.words.lower()))) for each in (given, expected))
    if "per" in phrase or "per" in other:
        return phrase == other
    words, others = set(phrase), set(other)
    if ("square" in words) != ("square" in others) and "cubic" in words | others:
        return False
    is_part = (words <= others or others <= words) and not (words ^ others) & _RELATING
    return is_part or others <= _ONLY_UNITS or words <= _ONLY_UNITS


def _singular(word: str) -> str:
    if word in _SHORT:
        return _SHORT[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word


def _converted(given: Quantity, unit: "Unit") -> str | None:
    """The number of a quantity in another unit, as LaTeX; None if the unit is of another dimension."""
    if given.unit is None or given.unit.dimensionality != unit.dimensionality:
        return None
    if given.unit == unit:
        return given.number
    if "degree" in (str(given.unit), str(unit)):  # the only factor that is no fraction
        return rf"({given.number}) \cdot \frac{{\pi}}{{180}}" if str(unit) == "radian" else None
    quantity = _registry().Quantity
    at_0, at_1 = (_exact(quantity(float(x), given.unit).to(unit).magnitude) for x in (0, 1))
    return rf"({given.number}) \cdot {_latex(at_1 - at_0)}" + (f" + {_latex(at_0)}" if at_0 else "")


def _exact(value: float) -> Fraction:
    """The simple fraction that a factor of conversion is, to 12 digits: 5/18 for 0.2777777777777778."""
    if abs(value) < 1 and value:
        return 1 / _exact(1 / value)
    return Fraction(value).limit_denominator(10**12 // max(1, round(abs(value))) or 1)


def _latex(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return rf"({sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}})"


def amounts_of(content: str) -> dict[str, str] | None:
    """Noun or unit → number, for a content that is at least two amounts; None for any other content."""
    text = unwrapped(content)
    found: dict[str, str] = {}
    position = 0
    for match in _AMOUNT.finditer(text):
        if not _BETWEEN_AMOUNTS.fullmatch(text, position, match.start()):
            return None
        position = match.end()
        if match["noun"] in found:
            return None
        found[match["noun"]] = match["number"].rstrip(",")
    return found if len(found) > 1 and not text[position:].strip() else None


def same_amounts(answer: str, truth: str, equal: Equal) -> bool | None:
    """Whether an answer has the amounts of a ground truth of several; None for any other truth.

    Amounts with names may come in any order, numbers alone in the truth's. Amounts of one dimension are one quantity.
    """
    expected = amounts_of(truth)
    if expected is None:
        total, quantity = _total(amounts_of(answer) or {}), quantity_of(truth, is_truth=True)
        converted = None if total is None or quantity is None or not quantity.unit else _converted(total, quantity.unit)
        return None if converted is None or quantity is None else equal(converted, quantity.number)
    given = amounts_of(answer)
    total = _total(expected)
    if total is not None and total.unit is not None:
        quantity = (_total(given) if given else None) or quantity_of(answer)
        converted = None if quantity is None else _converted(quantity, total.unit)
        return converted is not None and equal(converted, total.number)
    if given is None:
        numbers = split_top(unwrapped(answer).strip("() "), _COMMA)
        given = dict(zip(expected, numbers, strict=True)) if len(numbers) == len(expected) else {}
    own, named = ({_singular(name.lower()): number for name, number in each.items()} for each in (given, expected))
    return own.keys() == named.keys() and all(equal(own[name], named[name]) for name in named)


def _total(amounts: dict[str, str]) -> Quantity | None:
    """The sum of amounts of one dimension, in the first one's unit; None if they are not of one."""
    quantities = [Quantity(number, _unit(name), name) for name, number in amounts.items()]
    unit = quantities[0].unit if quantities else None
    terms = [None if unit is None else _converted(each, unit) for each in quantities]
    return None if None in terms or unit is None else Quantity(" + ".join(filter(None, terms)), unit)
