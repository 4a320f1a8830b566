r"""Repair slips of writing before math-verify reads an answer or a ground truth. The meaning does not change.

Each repair is applied to answers and ground truths alike, to the whole content of a box:

================ =================================================== ==============================================
slip             from → to                                           without the repair
================ =================================================== ==============================================
unicode          ``½ √2 x² 3·4 −5 ５ （1，2）`` → LaTeX               not read, or ``x²`` read as ``x2``
marks            ``**5**  $5$  5.  5\  5~  \underline{5}  €5`` → 5   not read
sentence         ``The answer is 5``, ``\text{The sum is } 5`` → 5   a product of letters and 5
scientific       ``4.5e33  1.5 x 10^3`` → ``4.5 \cdot 10^{33}``      4.5 · e · 33
spaced thousands ``12 345  12\,345`` → 12345                         12 · 345, or the last of them
mixed number     ``3 1/2  -3 1/2`` → ``3\frac{1}{2}``                another number (2 for ``3 1/2``)
repeating        ``0.\overline{3}`` → ``\frac{3}{9}``                 not read
================ =================================================== ==============================================

The answer is taken out of a sentence only if the sentence announces it ("answer is", "answer:") or is words and a
verb ("The sum is"), and never if it holds two announcements or a denial. math-verify misreads two kinds of content,
which `as_word` and `as_based_integer` recognise: words (a product of letters, so that ``\text{even}`` equals
``neve``) and integers in a given base (it drops the base, so that ``1011_2`` equals ``1011_3``). `decimal_comma` reads
a comma in an answer as a decimal point.
"""

import itertools
import re
import string
import unicodedata
from contextlib import suppress

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
        "π": r"\pi ",
        "，": ",",
        "。": ".",
        "：": ":",
    }
)

_NAMES = re.compile(
    r"(?<![\\A-Za-z])(sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|pi|infinity)(?![A-Za-z])"
)
_COMMANDS = {"infinity": "infty"}
_CALLED_ROOT = re.compile(r"\\sqrt\s*\(([^()]*)\)")
_BARE_POINT = re.compile(r"(?<![\d.])\.(?=\d)")
_FLIPPED = re.compile(r"([+-]?[\d./]+)\s*=\s*([A-Za-z])", re.ASCII)
_PERCENT = re.compile(r"(?<=[\d}])\s*(?:\\text\s*\{\s*)?percent\s*\}?$")

_STYLE = re.compile(r"\\(?:underline|boldsymbol|bm|mathbf|emph|displaystyle|textstyle)\s*\{([^{}]*)\}")
_CURRENCY = re.compile(r"[€£¥₹]\s*(?=[\d.])|(?<=\d)\s*[€£¥₹]")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textsf|mbox)\s*\{([^{}]*)\}")
ANNOUNCEMENT = re.compile(
    r"\b(?:answer|result|antwort|ergebnis|respuesta|resultado|réponse|résultat|risposta|risultato|resposta|ответ)\b[\s:=]*"
    r"(?:(?:is|are|equals|equal to|lautet|ist|es|est|è|é)\b[\s:=]*)?"
    r"|答案\s*(?:是|为|[:：])?\s*",
    re.IGNORECASE,
)
_STATEMENT = re.compile(
    r"[A-Za-z][A-Za-z ,'’-]*(?:\b(?:is|are|equals|equal to)\b\s*+(?::\s*+(?=\S)|(?=\S))|(?=\s\$[^$]+\$\.?$)\s)"
    r"|[\u4e00-\u9fff，、]+(?:是|为|等于)\s*(?=\S)",
    re.IGNORECASE,
)
_CLOSING_WORDS = re.compile(r"\.\s+I hope (?:it|this|that) is correct\.?$")
_DENIAL = re.compile(
    r"\b(?:not|never|no|neither|nor|except|cannot|can|may|might|could|perhaps|maybe|unlikely|or|if|unless|"
    r"than|more|less|least|most|fewer|about|wrong|incorrect|false|opposite|negative|minus|plus|times|"
    r"twice|double|triple|half|third|quarter|reciprocal|inverse|square|cube|root)\b|n['’]t\b|[不非没]",
    re.IGNORECASE,
)
_DELIMITED = re.compile(r"\$[^$]*+(\$)?|\\\((?:(?!\\\)).)*+(\\\))?|\\\[(?:(?!\\\]).)*+(\\\])?")
"""A formula between delimiters. One that is not closed goes on to the end, and has no group."""
_PROSE = re.compile(r"[A-Za-zÀ-ÿ\u4e00-\u9fff ,.:;'’，。、*]*")
_STEP = re.compile(r"\bstep \d+\s*[:.]", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.;]\s*+[A-Za-z :]*+$")
_CONCLUSION = re.compile(r"\b(?:so|thus|hence|therefore)\b", re.IGNORECASE)
_WORDS_AT_END = string.ascii_letters + ", "
_WORD_FIRST = re.compile(r"[A-Za-z]{3,}")
_MATHS = re.compile(r"[\d$\\]")

_REPEATING = re.compile(r"([+-]?)(\d{1,9})\.(\d{0,9})\\(?:overline|dot|bar)\{(\d{1,9})\}", re.ASCII)
_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})", re.ASCII)
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX*]\s*(?=10\s*\^)")
_SPACED_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?: |\\[,;: ]|~)\d{3})+(?:\.\d+)?", re.ASCII)
_MIXED = re.compile(r"([+-]?\d{1,12}) (\d{1,12})/(\d{1,12})", re.ASCII)
_NOT_DIGIT = re.compile(r"[^\d.+-]+", re.ASCII)

_COUNTED = re.compile(
    r"([+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)\s+"
    r"((?!(?:and|or|to|by)\b)[A-Za-z]{2,}(?:[ -][A-Za-z]+)*)(?:\^\{?[23]\}?)?",
    re.ASCII,
)
_WHOLE = (
    (_FLIPPED, r"\2=\1"),
    (_SCIENTIFIC, r"\1 \\cdot 10^{\2}"),
    (_MIXED, r"\1\\frac{\2}{\3}"),
    (_COUNTED, r"\1\\text{ \2}"),
)
"""Patterns of numbers that are the whole content, and their replacements."""

_TEXT_WITH_DIGITS = re.compile(r"\\text\s*\{([^{}\d]*+\d[^{}]*+)\}")
_SYNONYMS = (
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"^\\mathbb\s*(?:\{\s*R\s*\}|R)$"), r"(-\\infty,\\infty)"),
)
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"(?<!\d)(\d++(?:\.\d++)?+)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")

_DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d{1,2}|\d{4,})|([+-]?\d{4,}),(\d+)", re.ASCII)
_BASED = re.compile(r"\(?([0-9A-Za-z]+)\)?\s*_\s*(?:\{\s*(?:\\text\{)?(\d{1,2}|[a-z]{3,9})\}?\s*\}|(\d))", re.ASCII)
_WORD = re.compile(r"[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*", re.ASCII)
_ARTICLE = re.compile(r"^(?:an?|the) ")
_BASE_NAMES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12
}  # fmt: skip


def normalise(content: str) -> str:
    """The content of a box, repaired as in the table above. A content that is over MAX_CHARS, or would be after the
    repair (one character can become 18), is not changed."""
    written = content = content.strip()
    if len(content) > MAX_CHARS:
        return content
    if not content.isascii():
        content = _ascii_maths(content)
        if len(content) > MAX_CHARS:
            return written
    content = _without_marks(content)
    opened = _announced(content)
    if opened is not None:
        content = _without_marks(opened)
    for pattern, replacement in _SYNONYMS:
        content = pattern.sub(replacement, content)
    content = _CALLED_ROOT.sub(r"\\sqrt{\1}", _NAMES.sub(lambda name: rf"\{_COMMANDS.get(name[1], name[1])} ", content))
    content = _TEXT_WITH_DIGITS.sub(r"\1", content) if _TEXT_WITH_DIGITS.fullmatch(content) else content
    if _TRIGONOMETRIC.search(content):
        content = _DEGREES.sub(r"(\1\\pi/180)", content)
    content = _number(content)
    return content if len(content) <= MAX_CHARS else written


def decimal_comma(content: str, *, is_truth: bool = False) -> str | None:
    """``1,22`` or ``1000,99`` as a decimal; None if the comma can part thousands (``1,000``), or there is no comma.

    A ground truth with one digit after the comma (``2,5``) is more likely a list than a decimal, so it gives None too.
    """
    match = _DECIMAL_COMMA.fullmatch(content)
    if match is None or (is_truth and len(match[2] or match[4]) == 1):
        return None
    return content.replace(",", ".")


def as_word(content: str) -> str | None:
    r"""The words of a content that is only ``\text{…}`` of letters, for comparison; None for any other content."""
    bare, count = _TEXT.subn(r"\1", content)
    return _plain_words(bare) if count else None


def _plain_words(content: str) -> str | None:
    content = " ".join(content.strip().rstrip(".").lower().split())
    return _ARTICLE.sub("", content) if _WORD.fullmatch(content) else None


def same_word(answer: str, word: str) -> bool:
    """Whether an answer, with or without ``\\text``, is the word that `as_word` found in the ground truth."""
    return _plain_words(_TEXT.sub(r"\1", answer)) == word


def as_based_integer(content: str) -> tuple[str, int] | None:
    """Digits and base of ``1011_2`` or ``1011_{two}``; None for anything else."""
    match = _BASED.fullmatch(content)
    if match is None:
        return None
    name = match[2] or match[3]
    base = int(name) if name.isdigit() else _BASE_NAMES.get(name, 0)
    digits = match[1].upper().lstrip("0") or "0"
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    return digits, base


def _ascii_maths(content: str) -> str:
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
        if content.endswith("\\") and not content.endswith("\\\\"):
            content = content[:-1]
        if content.endswith(".") and not content.endswith("..") and not content.endswith(r"\."):
            content = content[:-1]
    return _CURRENCY.sub("", _STYLE.sub(r"\1", content))


def _announced(content: str) -> str | None:
    """The answer that a sentence announces; None if the content is not such a sentence.

    Before the announcement there may be only words, or formulas from which the answer is concluded.
    """
    text = " ".join(_TEXT.sub(r" \1 ", content).split())
    found = list(ANNOUNCEMENT.finditer(text))
    if any(_MATHS.search(text, one.end(), other.start()) for one, other in itertools.pairwise(found)):
        return None  # it announces twice
    match = found[-1] if found else _STATEMENT.match(text)
    if match is None:
        return None
    before = text[: match.start()]
    words = _DELIMITED.sub(lambda formula: " " if formula.lastindex else formula[0], _STEP.sub(" ", before))
    has_formula = any(formula.lastindex for formula in _DELIMITED.finditer(before))
    is_introduction = _PROSE.fullmatch(words) and (not has_formula or _SENTENCE_END.search(before))
    if not is_introduction and not _CONCLUSION.search(before, len(before.rstrip(_WORDS_AT_END))):
        return None
    said = _CLOSING_WORDS.sub("", text[match.end() :]).strip()
    is_denied = _DENIAL.search(words) or _DENIAL.search(text, match.start())
    return None if not said or is_denied or _WORD_FIRST.match(said) else said


def is_doubtful(announcement: str) -> bool:
    """Whether the words after the last "answer" in a text deny it, or name alternatives."""
    return bool(_DENIAL.search(announcement.lower().rpartition("answer")[2].partition("\n")[0]))


def _number(content: str) -> str:
    """Rewrite numbers in other notations. Except for a bare point, they must be the whole content."""
    content = _BARE_POINT.sub("0.", content)
    if match := _REPEATING.fullmatch(content):  # 0.1\overline{6} is 1/6
        sign, whole, fixed, period = match.groups()
        below = (10 ** len(period) - 1) * 10 ** len(fixed)
        return rf"{sign}\frac{{{int(whole + fixed + period) - int(whole + fixed)}}}{{{below}}}"
    content = _TIMES_TEN.sub(r" \\times ", _PERCENT.sub(r"\\%", content))
    if _SPACED_THOUSANDS.fullmatch(content):
        return _NOT_DIGIT.sub("", content)
    for pattern, replacement in _WHOLE:
        if match := pattern.fullmatch(content):
            return match.expand(replacement)
    return content


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
