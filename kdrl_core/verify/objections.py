r"""Forms that a right answer cannot have, although math-verify may accept them: it ignores units, bounds and logic.

Each objection compares a normalised answer with a normalised ground truth. Tests:
``FOOLED`` and ``STILL_RIGHT`` in tests/unit/verify/test_verify_accuracy.py.
"""

import re

from kdrl_core.verify.normalise import MAX_CHARS
from kdrl_core.verify.sentences import ANNOUNCEMENT

_SENTENCE_CHARS = 200
_RELATION = re.compile(r"\\(?:n?leq?|n?geq?|neq?|lt|gt|not|leqslant|geqslant)(?![A-Za-z])|[<>]|!=")
_PRIME = re.compile(r"(?:(?<![A-Za-z])[A-Za-z]|[)}'])'(?![A-Za-z])|\\prime(?![A-Za-z])")
_PAIR = re.compile(r"\([^()]*+\)")
_ALTERNATIVES = re.compile(r"^[^(\[]*\bor\b|^\\\{")
_CLOSED_AT_INFINITY = re.compile(r"\[ ?-? ?\\infty|\\infty ?\]")
_ALTERNATIVES_IN_BRACKETS = re.compile(r"[(\[](?:(?!\bor\b)[^()\[\],])*+or\b[^()\[\],]*+[)\]]")
CHANGING = re.compile(
    r"(?<![\\A-Za-z])(?:(?:hundred|thousand|million|billion|trillion|dozen|score)(?:th)?s?|hal(?:f|ves)|thirds?|fourths?|"
    r"quarters?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|zero|one|two|three|four|five|six|seven|eight|nine|ten|"
    r"eleven|twelve|times|plus|minus|over|squared|cubed|factorial|twice|doubled?|tripled?|halved|percent|rounded|octal|binary|"
    r"hexadecimal|inverse|reciprocal|less|more|fewer|than|not|no|never|except|perhaps|possibly|maybe|alternatively|otherwise|"
    r"unless|if|or|else|something|versus|vs|complement|wrong|incorrect|false)(?![A-Za-z])",
    re.IGNORECASE,
)
"""Words that make another number of the one before them."""
_LOGIC = re.compile(
    r"\\(?:lor|vee|land|wedge|to|rightarrow|Rightarrow|implies|iff|Leftrightarrow|Leftarrow|mid|equiv|sim)(?![A-Za-z])"
    r"|(?<=\S)\s*\\approx(?![A-Za-z])|\\neg(?![A-Za-z])|\\[lc]?dots(?![A-Za-z])"
)
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_SUBSCRIPT = re.compile(r"\d\s*+_")
_PAIRS = ((r"\lceil", r"\rceil"), (r"\lfloor", r"\rfloor"), (r"\lvert", r"\rvert"), (r"\begin", r"\end"))
_COMMANDS_TEXT = """
frac dfrac tfrac cfrac over sqrt left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr begin end text
textbf textit textrm textsf textnormal mbox mathrm mathbf mathit mathsf mathbb mathcal operatorname displaystyle
textstyle limits quad qquad thinspace enspace hspace boxed rm bf it cdot times div pm mp ast star circ degree prime
bmod pmod mod gcd lcm max min sup inf det dim ker deg arg log ln lg exp sin cos tan cot sec csc sinh cosh tanh coth
arcsin arccos arctan arccot arcsec arccsc arsinh arcosh artanh arcsinh arccosh arctanh lim sum prod int iint iiint
oint binom dbinom tbinom choose partial nabla infty le leq leqslant ge geq geqslant ne neq lt gt equiv approx sim
simeq cong propto parallel perp mid nmid vert lvert rvert Vert lVert rVert lfloor rfloor lceil rceil langle rangle
lbrace rbrace lbrack rbrack in notin not ni subset subseteq supset supseteq subsetneq cup cap setminus backslash
emptyset varnothing forall exists land lor wedge vee neg to rightarrow Rightarrow leftarrow Leftarrow iff implies
Leftrightarrow leftrightarrow longrightarrow mapsto because therefore colon ldots cdots dots dotsc dotsb vdots ddots
overline bar vec hat widehat tilde dot ddot overrightarrow angle triangle overarc overset underset alpha beta gamma
Gamma delta Delta epsilon varepsilon zeta eta theta Theta vartheta iota kappa lambda Lambda mu nu xi Xi omicron pi
Pi varpi rho varrho sigma Sigma varsigma tau upsilon Upsilon phi Phi varphi chi psi Psi omega Omega ell hbar imath
jmath Re Im i e R Z N Q C mathscr mathfrak
"""
_COMMANDS = frozenset(_COMMANDS_TEXT.split())
"""Commands that math-verify reads, or that only change the look."""
_ROW_BREAK = re.compile(r"\\\\(?![A-Za-z])")
_BRACKET = re.compile(r"[(\[{]")
_ANY_LETTER = re.compile(r"[A-Za-z]")
_OPERATOR = re.compile(r"[+\-*/]")
_OF_NUMBERS = re.compile(
    r"\\(?:[dt]?frac|sqrt|pi|cdot|times|div|left|right|log|ln|sin|cos|tan|binom|overline|dot|circ|infty|text|mathrm|bmod|pmod|"
    r"mod|approx|pm|over|lim|sum|prod|int|quad)(?![A-Za-z])"
)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_NO_DIGIT = re.compile(r"\D+")
_QUANTITY = re.compile(r"[-+]?(?:\d|\\(?:d?frac|sqrt|pi)(?![A-Za-z]))")
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|[^\x00-\x7f]|\\lim(?![A-Za-z])")
_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\s*\^\s*+(?:\{\s*+)?-?\d\s*\}?", re.ASCII)


def objection(answer: str, truth: str) -> str | None:
    r"""Why an answer cannot be right, although math-verify may find it equal; None if nothing is against it.

    A bound is not a value (``\leq 5``, ``\neq 7``), nor is a chain of logic (``5 \lor 6``). Alternatives are not a pair
    (``(3 or 4)``), a value is not an equation (2 for ``x+y=2``), minutes are not hours, and 5 million are not 5.
    """
    if _RELATION.match(answer) and not _RELATION.search(truth):
        return "a bound where the ground truth is a value"
    if len(answer) <= _SENTENCE_CHARS and len(_PRIME.findall(answer)) != len(_PRIME.findall(truth)):
        return "another number of primes"
    if "," in truth and _PAIR.fullmatch(truth) and _ALTERNATIVES.search(answer):
        return "alternatives, or a set, where the ground truth is a pair"
    if _CLOSED_AT_INFINITY.search(answer) and not _CLOSED_AT_INFINITY.search(truth):
        return "an interval that contains infinity"
    if _ALTERNATIVES_IN_BRACKETS.search(answer) and not _ALTERNATIVES_IN_BRACKETS.search(truth):
        return "alternatives where the ground truth has one"
    if len(answer) <= _SENTENCE_CHARS and ANNOUNCEMENT.search(answer) and not ANNOUNCEMENT.search(truth):
        return "a sentence that does not announce one answer"
    is_formula = not _WORDS.search(answer)
    if is_formula and _LOGIC.search(answer) and not _LOGIC.search(truth):
        return "a chain of logic where the ground truth is a value"
    if is_formula and _UNION.search(answer) and not _BRACKET.search(answer):
        return "a union of what are no sets"
    if is_formula and _ROW_BREAK.search(answer) and r"\begin" not in answer and not _ROW_BREAK.search(truth):
        return "several lines where the ground truth has one"
    if _is_sum_of_symbols(truth[:MAX_CHARS]) and "=" not in answer and not _LETTER.search(answer):
        return "a value where the ground truth is an equation"
    changing = {word.lower() for word in CHANGING.findall(answer)} - {w.lower() for w in CHANGING.findall(truth)}
    if changing - {"or"} and _QUANTITY.match(answer):
        return f"'{min(changing)}' changes the answer"
    if (command := _unknown_command(answer, truth)) is not None:
        return f"{command} is not read by math-verify, which would take the rest for the answer"
    if _SUBSCRIPT.search(answer) and not _SUBSCRIPT.search(truth):
        return "a number with a subscript"
    return None


def _unknown_command(answer: str, truth: str) -> str | None:
    """The first command that math-verify leaves out as if it were nothing; brackets of one side only among them."""
    known = set(_COMMAND.findall(truth))
    for command in _COMMAND.findall(answer):
        if command[1:] not in _COMMANDS and command not in known:
            return str(command)
    for left, right in _PAIRS:
        if answer.count(left) != answer.count(right):
            return left if answer.count(left) > answer.count(right) else right
    return None


def _is_sum_of_symbols(truth: str) -> bool:
    """Whether the truth is one equation with a letter and an operator on its left side: ``x + y = 2``."""
    left, equals, right = truth.partition("=")
    return bool(equals and "=" not in right and _ANY_LETTER.search(left) and _OPERATOR.search(left))


def constants_of(content: str) -> list[str]:
    """The sides without letters in a chain of equalities, if there are several: each must be the answer."""
    if _WORDS.search(content):
        return []
    sides = [side.strip() for side in content.strip("()").split("=")]
    constants = [side for side in sides if side and not _ANY_LETTER.search(_OF_NUMBERS.sub("", side))]
    return constants if len(constants) > 1 else []


def lost_digits(content: str, read: str) -> bool:
    r"""Whether math-verify has read fewer digits than the answer has.

    It drops what it takes for a unit: of ``3 \text{ or so, or } 4 \text{ m}`` it reads 3. Powers of units do not count.
    """
    written, understood = (_NO_DIGIT.sub("", _UNIT_POWER.sub("", text)) for text in (content, read))
    return written != understood
