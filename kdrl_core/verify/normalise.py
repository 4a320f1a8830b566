r"""Repair slips of writing before an answer or a ground truth is compared. The meaning does not change.

Each repair is applied to answers and ground truths alike, to the whole content of a box:

================ =================================================== ==============================================
slip             from → to                                           without the repair
================ =================================================== ==============================================
unicode          ``½ √2 x² 3·4 −5 ５ （1，2） x≤5`` → LaTeX          not read, or ``x²`` read as ``x2``
marks            ``**5**  $5$  5.  5\  5~  \underline{5}`` → 5       not read
sentence         ``The answer is 5``, ``\text{The sum is } 5`` → 5   a product of letters and 5
plain text       ``sqrt(2)  x**2  2*pi/omega  (-inf, 2) U (3, inf)`` products of letters
no and all       ``no solution`` → ``\emptyset``, ``all reals``      products of letters
several lines    ``\begin{cases} x=1 \\ y=2 \end{cases}`` → a list   the last line
signs            ``(\pm3,\pm2)`` → four points                       four numbers
numbers          see :mod:`kdrl_core.verify.numbers`
================ =================================================== ==============================================

The answer is taken out of a sentence only if the sentence announces it ("answer is", "answer:") or is words and a
verb ("The sum is"), and never if it holds two announcements or a denial.
"""

import itertools
import re
import unicodedata
from contextlib import suppress

from kdrl_core.verify.latex import TEXT, split_top, unwrapped, without_look
from kdrl_core.verify.numbers import plain_number
from kdrl_core.verify.sentences import announced

MAX_CHARS = 4_096
_MAX_VOTE_CHARS = 300
"""Longer answers are votes as they stand: math-verify's patterns take quadratic time, and there is no deadline here."""
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")
_SUPERSCRIPT_RUN = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPT_RUN = re.compile(r"[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+")
_VULGAR = re.compile(r"(?<=\d) ?(?=[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒])")
_ROOT = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))")
_ROOT_NAMES = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("·⋅∙•", r" \cdot "),
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000", " "),
        "×": r" \times ",
        "÷": "/",
        "\u2044": "/",
        "\u2215": "/",
        "∞": r"\infty ",
        "°": r"^{\circ}",
        "¢": r"\text{ cents}",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≡": r"\equiv ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∉": r"\notin ",
        "∅": r"\emptyset ",
        "±": r"\pm ",
        "≈": r"\approx ",
        "…": r"\ldots ",
        "→": r"\to ",
        **{letter: rf"\mathbb{{{name}}}" for letter, name in zip("ℂℕℚℝℤ", "CNQRZ", strict=True)},
        "π": r"\pi ",
        "，": ",",
        "。": ".",
        "：": ":",
    }
)

_NAMES = re.compile(
    r"(?<![\\A-Za-z])(sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|pi|infinity|inf|asin|acos|atan|"
    r"alpha|beta|gamma|delta|epsilon|zeta|theta|lambda|sigma|tau|phi|psi|omega|rho|mu)(?![A-Za-z])"
)
_COMMANDS = {"infinity": "infty", "inf": "infty", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_CALLED_ROOT = re.compile(r"\\sqrt\s*\(([^()]*)\)")

_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))

_ALIGNMENT = re.compile(r"&\s*+(?==)|(?<==)\s*+&")
_ONLY_WORDS = re.compile(r"[A-Za-z .]*+")
_DOLLAR = re.compile(r"(?<!\\)\$")
_JOINT = re.compile(r"[\s,;.]*+(?:(?:\\text\s*+\{\s*+)?(?:and|or)\s*+\}?[\s,;]*+)?+")


def _in_one_line(lines: "re.Match[str]") -> str:
    """Equations below each other as a list. Pieces of a function, and tables, stay as they are."""
    content = _ALIGNMENT.sub("", lines[2])
    if "&" in content:
        return lines[0]
    return ", ".join(filter(None, (row.strip() for row in _ROW.split(content))))


_TEXT_WITH_DIGITS = re.compile(r"\\text\s*\{([^{}\d]*+\d[^{}]*+)\}")
_SYNONYMS = (
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\not\s*+\\in(?![A-Za-z])"), r"\\notin "),
    (re.compile(r"\\not\s*+="), r"\\neq "),
    (re.compile(r"~(?!=)"), " "),
    (re.compile(r"\\!\s*+"), ""),
    (re.compile(r"(?<=\d)\s*+(?:\\text\s*+\{\s*+)?\b([ap])\.?\s?m\b\.?(?:\s*+\})?", re.IGNORECASE), r" \\text{ \1m}"),
    (re.compile(r"\+\s*+-"), "-"),
    (re.compile(r"^(?:negative|minus)\s+(?=[\d\\(])"), "-"),
    (
        re.compile(r"\\(?:hat|vec|mathbf|bm)\s*+\{\s*+\\?([ij])(?:math)?\s*+\}|\\(?:hat|vec)\s*+\{\s*+(k)\s*+\}"),
        r"\1\2",
    ),
    (re.compile(r"(?<=\))\s*+\^\s*+\{?\s*+(?:T|\\top|\\mathrm\{T\})\s*+\}?$"), ""),
    (re.compile(r"\\\\\s*+\[\s*+[\d.]+\s*+(?:pt|em|ex|mm|cm)\s*+\]"), r"\\\\"),
    (re.compile(r"\{smallmatrix\}"), "{pmatrix}"),
    (re.compile(r" ?(?:\\checkmark(?![A-Za-z])|✓)"), ""),
    (re.compile(r"\{:\}"), ":"),
    (re.compile(r"(?<=[\d}])\s*+(?<!\\)%"), r"\\%"),
    (re.compile(r"_\s*+\{\s*+\\(max|min)\s*+\}"), r"_{\1}"),
    (re.compile(r"\(\s*+\\approx([^()]+)\)$"), r"\\approx \1"),
    (re.compile(r"(?<=[)\]])\s*+U\s*+(?=[(\[])"), r" \\cup "),
    (re.compile(r"\\text\s*+\{\s*+,\s*+(?:(?:and|or)\s*+)?\}"), ", "),
    (re.compile(r"(?<=[\w)}])(?:\*\*|\s\*\*\s)(-?\w+)"), r"^{\1}"),
    (re.compile(r"(?<=[\w)}])\*\*(?=\()"), "^"),
    (re.compile(r"(?<![A-Za-z\\])(?:np|math)\.(?=[a-z])"), ""),
    (
        re.compile(
            r"\\begin\s*+\{(cases|aligned|gathered|split|array)\}(?:\{[lcr|]*+\})?+((?:(?!\\begin|\\end).)*+)\\end\s*+\{\1\}",
            re.DOTALL,
        ),
        _in_one_line,
    ),
)
"""Another spelling with the same meaning, anywhere in the content."""
_ROW = re.compile(r"\\\\|,")
_NOTHING = re.compile(
    r"(?:there (?:is|are) |(?:it|the (?:equation|system|inequality|problem)) has |has )?(?:"
    r"no (?:such |real |valid |possible )*"
    r"(?:solutions?|roots?|values?|answers?|numbers?|integers?|pairs?|triples?)"
    r"(?: of [a-z])?(?: exists?)?|(?:the )?empty ?set|none|\\\{\s*+\\\})",
    re.IGNORECASE,
)
_EVERYTHING = re.compile(
    r"(?:[a-z] (?:is |can be )?)?(?:all|any|every|the set of(?: all)?) "
    r"(?:real numbers?|reals?|real)(?: values?)?(?: of)?(?: [a-z])?"
    r"|(?:[a-z]\s*+\\in\s*+)?\\mathbb\s*(?:\{\s*R\s*\}|R)",
    re.IGNORECASE,
)
_INTEGERS = re.compile(
    r"(?:[a-z] (?:is |can be )?)?(?:all|any|every|the set of(?: all)?) integers?(?: values?)?(?: of [a-z])?",
    re.IGNORECASE,
)
_DISJUNCTION = re.compile(r"\\(?:lor|vee)(?![A-Za-z])")
_ROWS = re.compile(r"\[\s*+\[([^\[\]]*+)\](?:\s*+,\s*+\[[^\[\]]*+\])++\s*+\]")
_ROW_END = re.compile(r"\]\s*+,\s*+\[")
_COMMA = re.compile(r"(?<!\\),")
_SIGN = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_PLUS_FIRST = re.compile(r"(^|[=(,{]\s*+)\+\s*+")
_MAX_SIGNS = 4
_FIGURE_WITH_TOLERANCE = re.compile(r"[\d.]++\s*+\\pm\s*+[\d.]++.*")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"(?<!\d)(\d++(?:\.\d++)?+)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")


def normalise(content: str) -> str:
    """The content of a box, repaired as in the table above. A content that is over MAX_CHARS, or would be after the
    repair (one character can become 18), is not changed."""
    written = content = content.strip()
    if len(content) > MAX_CHARS:
        return content
    content = " ".join(content.split())
    if not content.isascii():
        content = _ascii_maths(content)
        if len(content) > MAX_CHARS:
            return written
    content = _without_marks(content)
    opened = announced(content)
    if opened is not None:
        content = _without_marks(opened)
    content = TEXT.sub(r"\1", content) if _TEXT_WITH_DIGITS.fullmatch(content) else content
    for pattern, replacement in _SYNONYMS:
        content = pattern.sub(replacement, content)
    content = _CALLED_ROOT.sub(r"\\sqrt{\1}", _NAMES.sub(lambda name: rf"\{_COMMANDS.get(name[1], name[1])} ", content))
    if _TRIGONOMETRIC.search(content):
        content = _DEGREES.sub(r"(\1\\pi/180)", content)
    content = plain_number(_as_set_or_matrix(content))
    return content if len(content) <= MAX_CHARS else written


def _as_set_or_matrix(content: str) -> str:
    """``no solution`` as the empty set, ``all real numbers`` as an interval, ``[[1,2],[3,4]]`` as a matrix."""
    bare = unwrapped(content).rstrip(".")
    if _NOTHING.fullmatch(bare):
        return r"\emptyset"
    if _EVERYTHING.fullmatch(bare):
        return r"(-\infty,\infty)"
    if r"\equiv" in content and "mod" not in content:
        content = content.replace(r"\equiv", "=")
    if "=" in content:
        content = _DISJUNCTION.sub(r"\\text{ or }", content)
    if r"\pm" in content and content.startswith(r"\{") and content.endswith(r"\}"):
        return rf"\{{{_as_set_or_matrix(content[2:-2])}\}}"
    if r"\pm" in content:
        return ", ".join(sign for item in split_top(content, _COMMA) for sign in _both_signs(item))
    if _INTEGERS.fullmatch(bare):
        return r"\mathbb{Z}"
    if _ROWS.fullmatch(content):
        rows = _ROW_END.sub(r" \\\\ ", content.strip("[] ")).replace(",", " & ")
        return rf"\begin{{pmatrix}} {rows} \end{{pmatrix}}"
    return content


def _both_signs(item: str) -> list[str]:
    r"""``\frac{1\pm\sqrt5}{2}`` as two numbers, ``(\pm3,\pm2)`` as four points; an item of over four signs as it is."""
    places = list(_SIGN.finditer(item))
    if not 0 < len(places) <= _MAX_SIGNS or _FIGURE_WITH_TOLERANCE.fullmatch(item):
        return [item]
    is_tied = any(place[0] == r"\mp" for place in places)
    choices = ("+-", "-+") if is_tied else itertools.product("+-", repeat=len(places))
    found = []
    for choice in choices:
        signs = iter(choice if not is_tied else [choice[place[0] == r"\mp"] for place in places])
        found.append(_PLUS_FIRST.sub(r"\1", _SIGN.sub(lambda _, signs=signs: next(signs), item)))  # type: ignore[misc]
    return found


def _ascii_maths(content: str) -> str:
    content = "".join(char for char in content if unicodedata.category(char) != "Cf")  # zero-width spaces and the like
    content = _SUPERSCRIPT_RUN.sub(lambda run: f"^{{{run[0].translate(_SUPERSCRIPTS)}}}", content)
    content = _SUBSCRIPT_RUN.sub(lambda run: f"_{{{run[0].translate(_SUBSCRIPTS)}}}", content)
    content = unicodedata.normalize("NFKC", _VULGAR.sub(" ", content).translate(_SYMBOLS))  # ½ → 1⁄2, ５ → 5
    content = content.translate(_SYMBOLS)
    return _ROOT.sub(lambda root: f"{_ROOT_NAMES[root[1]]}{{{root[2] or root[3] or root[4]}}}", content).strip()


def _without_marks(content: str) -> str:
    """The content without marks that carry no meaning. Delimiters are removed only in pairs around the whole."""
    before = None
    while content != before:
        before = content
        content = content.strip().strip("~").strip()
        for left, right in _DELIMITERS:
            if len(content) > len(left) + len(right) and content.startswith(left) and content.endswith(right):
                inner = content[len(left) : -len(right)]
                if left not in inner and right not in inner:
                    content = inner.strip()
        content = _without_inner_dollars(content)
        if content.endswith("\\") and not content.endswith("\\\\"):
            content = content[:-1]
        if content.endswith(".") and not content.endswith("..") and not content.endswith(r"\."):
            content = content[:-1]
    return without_look(content)


def _without_inner_dollars(content: str) -> str:
    """``$90^\\circ$, $60^\\circ$`` without its delimiters. Dollars of money have numbers outside."""
    parts = _DOLLAR.split(content)
    is_maths = len(parts) % 2 == 1 and len(parts) > 1 and all(_JOINT.fullmatch(part) for part in parts[::2])
    if len(parts) == 3 and not is_maths:  # one formula, then a unit; or delimiters the wrong way round
        is_maths = not parts[1].strip() or (not parts[0] and _ONLY_WORDS.fullmatch(parts[2]) is not None)
    return " ".join(" ".join(parts).split()) if is_maths else content


def vote_of(answer: str) -> str:
    r"""The vote of an answer for maj@k; empty if the answer is blank.

    Two answers cast the same vote if they are written alike after slips are repaired; the ground truth plays no part.
    The spelling is math-verify's own normalisation of LaTeX: ``\dfrac{1}{2}``, ``1/2`` and ``0.5`` are one vote, as are
    ``$5$`` and ``5.``. Expressions that are equal only by algebra are different votes.
    """
    text = " ".join(normalise(answer).split())
    if len(text) <= _MAX_VOTE_CHARS:
        from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex

        config = NormalizationConfig(basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none")
        with suppress(Exception):  # the parser may fail on a model's text, which is the vote then
            text = normalize_latex(text, config)
    return "".join(text.split())
