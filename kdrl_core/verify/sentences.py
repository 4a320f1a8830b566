r"""Answers within sentences: ``The answer is 5``, in a box or at the end of a response without one.

A sentence announces an answer if it says so ("answer is", "answer:") or is words and a verb ("The sum is"). It does not
if it holds two announcements, or words that deny or change what it says.
"""

import itertools
import re
import string

from kdrl_core.verify.latex import TEXT

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
_YES_OR_NO = re.compile(r"(?:yes|no),", re.IGNORECASE)
_FILLER = re.compile(r"(?:therefore|thus|hence|then|simply|just|exactly|indeed|clearly|now|,|:)\s+", re.IGNORECASE)
_CLOSING_WORDS = re.compile(r"\.\s+I hope (?:it|this|that) is correct\.?$|,?\s(?:because|since)\b.*$", re.DOTALL)
_DENIAL = re.compile(
    r"\b(?:not|never|no|neither|nor|except|cannot|can|may|might|could|perhaps|maybe|unlikely|or|if|unless|"
    r"than|more|less|least|most|fewer|about|wrong|incorrect|false|opposite|negative|minus|plus|times|"
    r"twice|double|triple|half|first|second|third|last|next|lower|upper|bound|digit|logarithm|excluded|"
    r"quarter|reciprocal|inverse|square|cube|root)\b|n['’]t\b|[不非没]",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(?:not|never|neither|nor|except|cannot|can|may|might|could|perhaps|maybe|unlikely|if|unless|than|more|less|least|"
    r"most|fewer|about|wrong|incorrect|false|opposite|times|twice|double|triple|half|reciprocal|inverse|but)\b|n['’]t\b|[不非没]",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"\b(?:not|never|neither|nor|except|cannot|may|might|could|perhaps|maybe|unlikely|unless|than|wrong|incorrect|false|"
    r"opposite|twice|half|reciprocal)\b|n['’]t\b|[不非没]"
)
_CORRECTION = re.compile(r"\b(?:wait|no|actually|mistake|wrong|instead|correction|incorrect)\b")
_DELIMITED = re.compile(r"\$[^$]*+(\$)?|\\\((?:(?!\\\)).)*+(\\\))?|\\\[(?:(?!\\\]).)*+(\\\])?")
"""A formula between delimiters. One that is not closed goes on to the end, and has no group."""
_PROSE = re.compile(r"[A-Za-zÀ-ÿ\u4e00-\u9fff ,.:;'’，。、*]*")
_STEP = re.compile(r"\bstep \d+\s*[:.]", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.;]\s*+[A-Za-z :]*+$")
_CONCLUSION = re.compile(r"\b(?:so|thus|hence|therefore)\b", re.IGNORECASE)
_WORDS_AT_END = string.ascii_letters + ", "
_WORD_FIRST = re.compile(r"[A-Za-z]{3,}")
_END_OF_SENTENCE = re.compile(r"\n|\.(?=\s|$)")
_MATHS = re.compile(r"[\d$\\]")


def announced(content: str) -> str | None:
    """The answer that a sentence announces; None if the content is not such a sentence.

    Before the announcement there may be only words, or formulas from which the answer is concluded.
    """
    text = " ".join(TEXT.sub(r" \1 ", content).split())
    found = list(ANNOUNCEMENT.finditer(text))
    if any(_MATHS.search(text, one.end(), other.start()) for one, other in itertools.pairwise(found)):
        return None  # it announces twice
    match = found[-1] if found else _STATEMENT.match(text)
    if match is None or _YES_OR_NO.match(text):
        return None
    before = text[: match.start()]
    words = _DELIMITED.sub(lambda formula: " " if formula.lastindex else formula[0], _STEP.sub(" ", before))
    has_formula = any(formula.lastindex for formula in _DELIMITED.finditer(before))
    is_introduction = _PROSE.fullmatch(words) and (not has_formula or _SENTENCE_END.search(before))
    if not is_introduction and not _CONCLUSION.search(before, len(before.rstrip(_WORDS_AT_END))):
        return None
    said = _CLOSING_WORDS.sub("", text[match.end() :]).strip()
    said = said[filler.end() :] if (filler := _FILLER.match(said)) else said
    is_denied = _DENIAL.search(words) or _DENIAL.search(match[0]) or _DENIED.search(said)
    return None if not said or is_denied or _WORD_FIRST.match(said) else said


def is_doubtful(text: str) -> bool:
    """Whether words on the line of the last "answer", or after it, deny what it announces."""
    before, _, after = text.lower().rpartition("answer")
    said, _, later = after.partition("\n")
    return bool(_DOUBT.search(before.rpartition("\n")[2]) or _DOUBT.search(said) or _CORRECTION.search(later))


def last_announced(text: str) -> str | None:
    """What the last announcement of a text announces, up to the end of its line; None if there is none, or nothing."""
    last = None
    for last in ANNOUNCEMENT.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    said = _END_OF_SENTENCE.split(text[last.end() :].lstrip("* \n"), maxsplit=1)[0].strip("* ")
    said = said[filler.end() :] if (filler := _FILLER.match(said)) else said
    return said or None
