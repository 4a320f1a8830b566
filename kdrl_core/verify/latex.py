r"""The writing of LaTeX, without its mathematics: what is text, what only changes the look, where a list parts.

Everything here is linear in the length of its argument.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

Equal = Callable[[str, str], bool]
"""Whether a part of an answer (first) equals a part of a ground truth (second)."""

TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mbox|hbox|mathrm|mathsf|mathit|mathbf|operatorname)\s*+"
    r"\{((?:[^{}]|\{[^{}]*+\})*+)\}"
)
"""A command whose argument is text, or upright letters."""
_UPRIGHT = re.compile(
    r"\\(?:mathrm|rm|text|textrm|textnormal|operatorname)\s*+(?:\{\s*+([ei])\s*+\}|([ei])(?![A-Za-z]))"
)
_SPACE = re.compile(r"\\(?:[,;:! ]|(?:q?quad|thinspace|enspace)(?![A-Za-z])|hspace\*?+\{[^{}]*+\})|~(?!=)")
_BRACKET_SIZE = re.compile(r"\\(?:(?:left|right|middle)(?![A-Za-z])\s*+\.?|[bB]igg?[lr]?(?![A-Za-z]))")
_SIZE = re.compile(
    r"\\(?:(?:display|text|script)style|(?:no)?limits|normalsize|small|large|Large|LARGE|huge|bf|it|boldmath)(?![A-Za-z])\s*+"
    r"|\\color\s*+\{[^{}]*+\}\s*+"
)
_STYLED = re.compile(
    r"\\(?:underline|boldsymbol|bm|mathbf|mathcal|mathscr|emph|fbox|(?:display|text)style|textcolor\s*+\{[^{}]*+\})\s*+"
    r"\{([^{}]*+)\}"
)
_SYNONYMS = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\leq?(?:slant|q)?+(?![A-Za-z])|<="), r"\\le "),
    (re.compile(r"\\geq?(?:slant|q)?+(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\neq?(?![A-Za-z])|\\not\s*+=|!="), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\not\s*+\\in(?![A-Za-z])"), r"\\notin "),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\(?:[lc]|h)?dots[cbo]?(?![A-Za-z])|\.\.\.+"), r"\\dots "),
    (re.compile(r"\\(?:mid|l?r?vert)(?![A-Za-z])"), "|"),
    (re.compile(r"\\\|"), r"\\parallel "),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:long)?rightarrow(?![A-Za-z])"), r"\\to "),
    (re.compile(r"\\mathbb\s*+(?:\{\s*+([A-Z])\s*+\}|([A-Z])(?![A-Za-z]))"), r"\\mathbb \1\2 "),
    (re.compile(r"\\backslash(?![A-Za-z])"), r"\\setminus "),
)
_ORDINAL = re.compile(r"(?<=\d)(?:st|nd|rd|th)(?![A-Za-z])")
_SUCH_THAT = re.compile(":")
_LONE = re.compile(r"\{([A-Za-z0-9])\}")
_NEEDED_BLANK = re.compile(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])")
_LIST = re.compile(
    r"(?:(?<!\\),(?!\d{3}(?!\d))|(?<![\d\\]),|(?<!\\);|(?:\\text\s*+\{\s*+|(?<![A-Za-z]))(?:and|or)(?![A-Za-z])(?:\s*+\})?+)(?:\s*+(?:and|or)(?![A-Za-z]))?+\s*+"
)
_CONDITION = re.compile(r"[,;]?+ ?& ?(?:(?:if|for|when)\b ?)?+")
_POINT = re.compile(r"(?<![A-Za-z])([A-Z]) ?= ?(?=\()")
"""``A=(1,2)`` and ``A(1,2)`` name a point."""
_BLANK_OF_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")
_OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])")
_OPENING, _CLOSING = "([{", ")]}"


def unwrapped(content: str) -> str:
    r"""The content with ``\text{…}`` and its like replaced by their arguments, and LaTeX's spaces by blanks."""
    return " ".join(TEXT.sub(r" \1 ", _SPACE.sub(" ", content)).split())


def without_look(content: str) -> str:
    r"""The content without commands that only change how it looks: sizes, colours, ``\mathcal{O}``, ``\fbox{…}``."""
    if "\\" not in content:
        return content
    content = _UPRIGHT.sub(lambda letter: f"{{{letter[1] or letter[2]}}}", content)
    return _SIZE.sub("", _STYLED.sub(r"\1", content))


def synonymous(content: str) -> str:
    r"""The content with one command for each meaning: ``\leq`` is ``\le``, ``\mid`` is ``|``, and so on."""
    content = _BRACKET_SIZE.sub("", content)
    for pattern, replacement in _SYNONYMS:
        content = pattern.sub(replacement, content)
    return content


@lru_cache(maxsize=256)
def plain_text(content: str) -> str:
    """The content without text commands, with one command for each meaning. The forms of a truth all ask for it."""
    return synonymous(unwrapped(content)).strip()


def canonical(content: str) -> str:
    """One spelling for texts that differ only in LaTeX's synonyms, style, white space and needless braces."""
    content = _LONE.sub(r"\1", synonymous(_ORDINAL.sub("", unwrapped(without_look(content)))))
    if content.startswith(r"\{"):
        content = _SUCH_THAT.sub("|", content, count=1)
    if r"\begin{cases}" in content:
        content = _CONDITION.sub("&", content)
    content = _POINT.sub(r"\1", content)
    return "".join(_NEEDED_BLANK.sub("\\1\0", _BLANK_OF_DIGITS.sub("\0", content)).split()).replace("\0", " ")


def split_top(content: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between the matches of `separator` that stand outside all brackets, stripped."""
    parts: list[str] = []
    begin = depth = position = 0
    while position < len(content):
        char = content[position]
        if depth == 0 and (match := separator.match(content, position)) is not None and match.end() > position:
            parts.append(content[begin:position].strip())
            begin = position = match.end()
            continue
        depth += (char in _OPENING) - (char in _CLOSING)
        position += 1
    parts.append(content[begin:].strip())
    return parts


def split_list(content: str) -> list[str]:
    """The items of a list, which commas, "and" or "or" part; a content that is no list is its only item."""
    return split_top(content, _LIST)


def same_text(answer: str, truth: str) -> bool:
    """Whether two contents have one canonical spelling, or are lists of the same items in another order."""
    if canonical(answer) == canonical(truth):
        return True
    items, others = (Counter(map(canonical, split_list(text))) for text in (answer, truth))
    is_or = bool(_OR.search(answer)) != bool(_OR.search(truth))
    return items == others and items.total() > 1 and not (is_or and any("=" in item for item in items))
