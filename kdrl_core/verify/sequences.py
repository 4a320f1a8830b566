r"""Contents that math-verify reads only in part: congruences, lists with dots, ratios, families with a parameter.

Each function says whether an answer equals a ground truth of its form, and None if the truth is not of that form.
"""

import itertools
import re
from collections import Counter
from fractions import Fraction

from kdrl_core.verify.latex import Equal, canonical, plain_text, split_top, unwrapped

_COMMA = re.compile("[,;]")
_LIST = re.compile(r"[,;]|(?<![A-Za-z])(?:or|and)(?![A-Za-z])")
_CONGRUENCE = re.compile(
    r"(?:(?P<variable>(?:(?!\\not)[^=≡]){1,40}?)\s*+(?:\\equiv(?![A-Za-z])|≡|=))?+\s*+(?P<residues>[^=≡()]{1,80}?)\s*+"
    r"(?:\\pmod|\\bmod|\\mod|\(\s*+(?:\\?(?:mod|bmod)(?![A-Za-z])|\\operatorname\{mod\})|\\?(?:mod|modulo)(?![A-Za-z]))"
    r"\s*+\{?\s*+(?P<modulus>\d{1,12})\s*+\}?\s*+\)?",
    re.DOTALL,
)
_OR = re.compile(r"(?:, ?)?(?<![A-Za-z])or(?![A-Za-z])")
_LINEAR = re.compile(r"(?:[A-Za-z]\s*+=\s*+)?+([1-9]\d{0,11})\s*+[A-Za-z]\s*+([+-]\s*+\d{1,12})?+")
_INTEGER = re.compile(r"(\\pm\s*+)?([+-]?\s*+\d{1,18})", re.ASCII)
_DOTS = re.compile(r"\\dots(?![A-Za-z])")
_RATIO = re.compile(r":|(?<![A-Za-z\\])to(?![A-Za-z])")
_TIME = re.compile(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?\s*+(?:[AaPp]\.?[Mm]\.?)?", re.ASCII)
_QUALIFIER = re.compile(
    r"(?:[ ,;.(\[] ?(?P<words>(?:where|for|with|given|when|if)\b.*)|"
    r"[,;.(\[] ?(?P<several>(?:\\forall ?)?[A-Za-z](?: ?, ?[A-Za-z]){0,3}+ ?(?:\\in(?![A-Za-z])|∈).*)|"
    r" (?P<one>(?:\\forall ?)?[A-Za-z] ?(?:\\in(?![A-Za-z])|∈).*))[)\]]?",
    re.DOTALL,
)
_PARAMETER = re.compile(r"(?<![A-Za-z\\])([A-Za-z])(?:\s*+\\in(?![A-Za-z])|\s*+∈|\s++is\b|\s++are\b|\s*+$|\s*+[)\]]?$)")
_DOMAINS = (
    (re.compile(r"\\mathbb (?:N|Z ?\^ ?\{?\+)|\bnatural\b|\bpositive integers?\b", re.IGNORECASE), "natural"),
    (re.compile(r"\\mathbb Z|\bintegers?\b", re.IGNORECASE), "integer"),
    (re.compile(r"\\mathbb Q|\brational\b", re.IGNORECASE), "rational"),
    (re.compile(r"", re.IGNORECASE), "any"),
)
_WORDS_OF_QUALIFIERS = re.compile(
    r"(?:(?<![A-Za-z\\])(?:where|for|with|given|and|all|any|every|each|some|arbitrary|an?|the|is|are|be|being|can|in|of|let|"
    r"numbers?|constants?|values?|real|integers?|complex|rational|natural|positive integers?|parameters?|fixed|"
    r"[A-Za-z])(?![A-Za-z])|\\mathbb [CNQRZ](?: ?\^ ?\{?\+\}?)?|\\in(?![A-Za-z])|\\forall(?![A-Za-z])|[ ,.;])++",
    re.IGNORECASE,
)
_FUNCTION = re.compile(r"([A-Za-z])\s*+\(\s*+([A-Za-z])\s*+\)\s*+=\s*+([^=]+)")
_VALUE_OF_Y = re.compile(r"y\s*+=\s*+([^=]+)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_PLAIN_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?", re.ASCII)
_TUPLES = re.compile(r"\(([^()]*+)\)\s*+=\s*+\((.*)\)", re.DOTALL)
_VARIABLE = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?[A-Za-z0-9]+\}?)?")
_SET = re.compile(r"[<>]|\\(?:le|ge|ne|cup)(?![A-Za-z])|^ ?[(\[].*,")
"""A formula whose qualifier is no domain of a parameter, but restricts a set."""
_COMMAND_OR_LETTER = re.compile(r"\\[A-Za-z]+|[A-Za-z]")


def _congruence(content: str) -> tuple[str, int, frozenset[int]] | None:
    r"""Left side, modulus and residues of ``n \equiv 1, 2 \pmod 5`` or ``n = 5k+1``; None for any other content.

    The left side is empty if it is one letter, or missing.
    """
    text = plain_text(content)
    if _OR.search(text) and all(parts := [_congruence(part) for part in split_top(text, _OR)]):
        kinds = {part[:2] for part in parts if part}
        return (*kinds.pop(), frozenset().union(*(part[2] for part in parts if part))) if len(kinds) == 1 else None
    formula, _, domain = split_qualifier(text) or (text, "", "integer")
    if domain == "integer" and (linear := _LINEAR.fullmatch(formula)):
        return "", int(linear[1]), frozenset({int("".join((linear[2] or "0").split())) % int(linear[1])})
    match = _CONGRUENCE.fullmatch(text)
    if match is None or not int(match["modulus"]):
        return None
    modulus, residues = int(match["modulus"]), set()
    for part in _LIST.split(match["residues"]):
        number = _INTEGER.fullmatch(part.strip())
        if number is None:
            return None
        value = int("".join(number[2].split()))
        residues |= {value % modulus, (-value if number[1] else value) % modulus}
    left = canonical(match["variable"] or "").lower()
    return left if len(left) > 1 else "", modulus, frozenset(residues)


def same_congruence(answer: str, truth: str) -> bool | None:
    r"""``n \equiv 4 \pmod 3`` is ``n \equiv 1 \pmod{3}``; the residue alone is not."""
    expected = _congruence(truth) if "mod" in truth else None
    return None if expected is None else _congruence(answer) == expected


def same_list_with_dots(answer: str, truth: str) -> bool | None:
    r"""``1,2,3,\dots,n`` is ``1,2,\dots,n``: the same ends, and what one of them writes out continues the other."""
    given, expected = map(plain_text, (answer, truth))
    if not _DOTS.search(given + expected) or "," not in expected:
        return None
    one, other = _parted(given), _parted(expected)
    if one is None or other is None:
        return None if not _DOTS.search(expected) else False
    if one[1] is None or other[1] is None:  # one is written out
        short, full = (other, one) if one[1] is None else (one, other)
        return _continues(full[0], short)
    (head, tail), (other_head, other_tail) = one, other
    if tail != other_tail:
        return False
    shorter, longer = sorted((head, other_head), key=len)
    return shorter == longer or (len(shorter) > 1 and longer[: len(shorter)] == shorter and _is_progression(longer))


def _parted(text: str) -> tuple[list[str], list[str] | None] | None:
    """Items before and after the dots (None: there are none); None if the text is no list."""
    left, right = ("", "")
    for opening, closing in ((r"\{", r"\}"), ("(", ")"), ("{", "}")):
        if text.startswith(opening) and text.endswith(closing):
            left, right = opening, closing
            break
    items = [canonical(item) for item in split_top(text[len(left) : len(text) - len(right)], _COMMA)]
    dots = [place for place, item in enumerate(items) if item == r"\dots"]
    if len(items) < 2 or len(dots) > 1 or any(_DOTS.search(item) for item in items if item != r"\dots"):
        return None
    return (items[: dots[0]], items[dots[0] + 1 :]) if dots else (items, None)


def _is_progression(items: list[str]) -> bool:
    """Whether the items are numbers in arithmetic or geometric progression, or have such indices (``x_1, x_2``)."""
    if len({_NUMBER.sub("#", item) for item in items}) > 1 or any(len(_NUMBER.findall(item)) != 1 for item in items):
        return False
    values = [Fraction(_NUMBER.findall(item)[0]) for item in items]
    steps = [(b - a, b / a if a else None) for a, b in itertools.pairwise(values)]
    return any(len(set(step)) == 1 and step[0] is not None for step in zip(*steps, strict=True))


def _continues(full: list[str], short: tuple[list[str], list[str] | None]) -> bool:
    head, tail = short[0], short[1] or []
    is_alike = len(head) > 1 and bool(tail) and full[: len(head)] == head and full[-len(tail) :] == tail
    return is_alike and len(full) > len(head) + len(tail) and _is_progression(full)


def same_ratio(answer: str, truth: str, equal: Equal) -> bool | None:
    """``2:4:6`` is ``1:2:3``. Times of a day (``3:05``) are no ratios."""
    parts = split_top(unwrapped(truth), _RATIO)
    given = split_top(unwrapped(answer), _RATIO)
    is_in_words = "to" in truth or "to" in answer
    if len(parts) == 2 < len(given) and all(given):
        return False
    if len(parts) < (2 if is_in_words else 3) or _TIME.fullmatch(unwrapped(truth)) or not all(parts):
        return None
    if len(given) != len(parts) or not all(given) or "0" in (given[0], parts[0]):
        return False
    return all(
        equal(rf"({given[0]}) \cdot ({part})", rf"({parts[0]}) \cdot ({own})")
        for own, part in zip(given[1:], parts[1:], strict=True)
    )


def split_qualifier(content: str) -> tuple[str, str, str] | None:
    """Formula, parameter and its domain of ``x = k\\pi, k \\in \\mathbb{Z}``; None without a qualifier.

    The domain is "integer", "natural", "rational", "any", or the qualifier's own text if it restricts more.
    """
    text = plain_text(content)
    match = _QUALIFIER.search(text)
    if match is None or match.end() != len(text) or not text[: match.start()].strip():
        return None
    qualifier = (match["words"] or match["several"] or match["one"]).strip(" )]")
    parameter = _PARAMETER.search(qualifier)
    domain = next(name for pattern, name in _DOMAINS if pattern.search(qualifier))
    if not _WORDS_OF_QUALIFIERS.fullmatch(qualifier):
        domain = canonical(qualifier)
    return text[: match.start()].strip(" ,;.("), parameter[1] if parameter else "", domain


def same_family(answer: str, truth: str, equal: Equal) -> bool | None:
    """Whether formulas with parameters are equal; None if neither says what its parameter is.

    One of them may leave out that its parameter is an integer, or any number. Parameters may have other names.
    """
    expected, given = split_qualifier(truth), split_qualifier(answer)
    if expected is None:  # the answer says more than the truth
        is_harmless = given and given[2] in ("integer", "any") and given[1] and given[1] in _letters(given[0])
        return True if given and is_harmless and not _SET.search(given[0]) and equal(given[0], truth) else None
    formula, parameter, domain = expected
    own_formula, own_parameter, own_domain = given or (answer, "", "")
    is_left_out = not own_domain and domain in ("integer", "any") and not _SET.search(formula)
    if own_domain != domain and not is_left_out:
        return False
    if parameter and own_parameter and parameter != own_parameter:
        own_formula = _renamed(own_formula, own_parameter, parameter)
    return equal(own_formula, formula)


def same_function(answer: str, truth: str, equal: Equal) -> bool | None:
    """Whether an answer is the function of a truth ``f(x)=…``: the name of its argument does not matter, and ``y=…``
    or the term alone will do. None if the truth is not of this form, or the answer has another name of a function."""
    expected, given = _FUNCTION.fullmatch(truth), _FUNCTION.fullmatch(answer)
    if expected is None:
        own = _VALUE_OF_Y.fullmatch(truth)
        return True if given and (own or "=" not in truth) and equal(given[3], own[1] if own else truth) else None
    if given is not None:
        if given[1] != expected[1]:
            return None
        term = _renamed(given[3], given[2], expected[2])
        return (given[2] == expected[2] or expected[2] not in _letters(given[3])) and equal(term, expected[3])
    term = value[1] if (value := _VALUE_OF_Y.fullmatch(answer)) else answer
    return True if "=" not in term and equal(term, expected[3]) else None


def _letters(formula: str) -> set[str]:
    return set(_COMMAND_OR_LETTER.findall(formula))


def _renamed(formula: str, old: str, new: str) -> str:
    """A formula with another letter for a variable, unless it has that letter. Commands keep their letters."""
    if new != old and new in _letters(formula):
        return formula
    return _COMMAND_OR_LETTER.sub(lambda part: new if part[0] == old else part[0], formula)


def same_numbers(answer: str, truth: str) -> bool | None:
    """Whether two lists of numbers have the same numbers as often; None unless one of them has a number twice."""
    given, expected = (Counter(map(str.strip, _COMMA.split(text))) for text in (answer, truth))
    is_list = all(_PLAIN_NUMBER.fullmatch(item) for item in given | expected)
    is_repeated = max(given.values()) > 1 or max(expected.values()) > 1
    return given == expected if is_list and is_repeated and given.total() == expected.total() else None


def same_assignments(answer: str, truth: str, equal: Equal) -> bool | None:
    """Whether an answer gives every variable of ``x=3, y=-1`` its value; None for any other truth.

    Values without names come in the truth's order. Roots (``x_1, x_2``) have none, so they are left to math-verify.
    """
    expected = _assignments(truth)
    if len(expected) < 2 or len({name[0] for name in expected}) < 2:
        return None
    given = _assignments(answer)
    if not given and "=" not in answer:
        values = split_top(answer[1:-1] if answer[:1] + answer[-1:] == "()" else answer, _COMMA)
        given = dict(zip(expected, values, strict=True)) if len(values) == len(expected) else {}
    return given.keys() == expected.keys() and all(equal(given[name], expected[name]) for name in expected)


def _assignments(content: str) -> dict[str, str]:
    """Variable → value, of ``x=3, y=-1`` or ``(x,y)=(3,-1)``; empty for others, or if a variable comes twice."""
    text = unwrapped(content)
    if tuples := _TUPLES.fullmatch(text):
        names, values = (split_top(part, _COMMA) for part in tuples.groups())
        pairs = list(zip(names, values, strict=True)) if len(names) == len(values) else []
    elif _OR.search(text):
        return {}
    else:
        pairs = [
            (name.strip(), value.strip()) for name, _, value in (item.partition("=") for item in split_top(text, _LIST))
        ]
    found = {
        canonical(name): value for name, value in pairs if _VARIABLE.fullmatch(name) and value and "=" not in value
    }
    return found if len(found) == len(pairs) else {}
