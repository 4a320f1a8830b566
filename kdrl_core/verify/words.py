r"""Answers in words: sentences and names, lists of them, and letters of multiple choice.

To math-verify ``even`` is a product of four letters, equal to ``neve``. So a ground truth of words is compared as
words: without case, articles, quotes and points, and a list of words in any order. The letter of a choice may be
dressed (``\textbf{(A)}``) and followed by what it stands for, but by no other letter.
"""

import re
from collections import Counter

from kdrl_core.verify.latex import Equal, plain_text, unwrapped

_LETTERS = re.compile(r"[A-Za-zÀ-ÿ]+")
_ALLOWED = re.compile(r"(?:[A-Za-zÀ-ÿ ,;.:!?'’\"“”`&()-]|\\[{}])+")
_VOWEL_WITHIN = re.compile(r"[eiouEIOU]|(?<=.)[aA]|(?<=[^XYZxyz])[yY]")
_SHORT_WORDS = frozenset({"no", "on", "ok", "up", "am", "pm", "or", "if", "is", "it"})
_MARKS = re.compile(r"[\"“”`’'.!?:(){}\\]|(?<=[A-Za-z])-(?=[A-Za-z])")
_ARTICLE = re.compile(r"^(?:an?|the) ")
_LEAD = re.compile(
    r"(?:(?:the|my) )?(?:final |correct )?(?:answer|result) (?:is )?(?=.)|(?:it|they|this|that) (?:is|are) |its (?=.)"
)
_YES_OR_NO = re.compile(r"(yes|no)(?:\s*+[,.;:]|\s*+$)", re.IGNORECASE)
_CONTRARY = {
    "yes": re.compile(r"\b(?:no|not|never|false|but|or|wait|however|else)\b|n't\b", re.IGNORECASE),
    "no": re.compile(r"\b(?:yes|true|but|or|wait|however|else)\b", re.IGNORECASE),
}
_LIST = re.compile(r"[,;&]|\band\b")

_CHOICE = re.compile(r"\(?\s*+([A-J])\s*+\)?[.,:)\s]*+")
_CHOSEN = re.compile(
    r"(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?\s*+:?\s*+)?+"
    r"(?:\(\s*+([A-Z])\s*+\)|\[\s*+([A-Z])\s*+\]|([A-Z])(?=\s*+[.,:)]|\s*+$))\s*+[.,:)=]*+\s*+",
    re.IGNORECASE,
)
_OTHER_CHOICE = re.compile(
    r"(?<![A-Za-z])[A-HJ-UWYZ](?![A-Za-z])|(?:^|[,;(]|\b(?:or|and)) ?[a-j](?: ?[,;.)]|$)"
    r"|\b(?:or|not|wrong)\b"
)
"""Another letter, or a word that takes the choice back. I, V and X may be numerals."""
_WITH_VALUE = re.compile(r"(?:\(\s*+([A-J])\s*+\)|([A-J])\s*+[.:)])\s*+(?=\S)")


def word_items(content: str) -> Counter[str] | None:
    r"""The items of a content that is words; None if it is mathematics.

    Letters in ``\text{…}`` are words. Bare letters are words if they look it: ``Yes``, ``ace``, ``a parabola``, but not
    ``abc`` or ``xy``, which are products.
    """
    bare = unwrapped(content)
    if not _ALLOWED.fullmatch(bare):
        return None
    found = _LETTERS.findall(bare)
    is_text = bare != " ".join(content.split()) or '"' in bare or "“" in bare
    items = _items(bare)
    is_list_of_letters = is_text and len(items) > 1 and all(len(item) == 1 for item in items)
    has_word = any(len(word) > 1 and (is_text or looks_like_a_word(word)) for word in found)
    return items if has_word or is_list_of_letters else None


def same_words(answer: str, truth: str) -> bool | None:
    """Whether an answer has the same words as a ground truth of words, in any order; None if that is mathematics."""
    words = word_items(truth)
    if words is None:
        return None
    bare = unwrapped(answer)
    if words.keys() <= {"yes", "no"} and (said := _YES_OR_NO.match(bare)):
        return said[1].lower() in words and not _CONTRARY[said[1].lower()].search(bare, said.end())
    return bool(_ALLOWED.fullmatch(bare)) and _items(bare) == words


def looks_like_a_word(word: str) -> bool:
    """Whether bare letters are a word, and no product of variables."""
    if len(word) == 2:
        return word.lower() in _SHORT_WORDS or (word[0].isupper() and word[1] in "aeiouy")
    return len(word) > 2 and bool(_VOWEL_WITHIN.search(word))


def _items(bare: str) -> Counter[str]:
    return Counter(filter(None, map(_plain, _LIST.split(bare))))


def _plain(item: str) -> str:
    item = " ".join(_MARKS.sub(lambda mark: " " if mark[0] == "-" else "", item).lower().split())
    return _ARTICLE.sub("", _LEAD.sub("", item, count=1))


def same_choice(answer: str, truth: str) -> bool | None:
    """Whether an answer chooses the letter that the ground truth is; None if that is no letter of A to J.

    The letter may be followed by its text or value. Another letter beside it is refused.
    """
    letter = _CHOICE.fullmatch(plain_text(truth).strip("$ "))
    if letter is None:
        return None
    given = plain_text(answer).strip("$ ")
    chosen = _CHOSEN.match(given)
    if chosen is None:
        return False
    rest = given[chosen.end() :]
    return (chosen[1] or chosen[2] or chosen[3]) == letter[1] and not _OTHER_CHOICE.search(rest)


def same_choice_and_value(answer: str, truth: str, equal: Equal) -> bool | None:
    """Whether an answer is the letter, the value, or both, of a ground truth such as ``(B) 12``; None for others."""
    text = plain_text(truth)
    match = _WITH_VALUE.match(text)
    if match is None:
        return None
    letter, value = match[1] or match[2], text[match.end() :]
    given = plain_text(answer)
    if own := _WITH_VALUE.match(given):
        return (own[1] or own[2]) == letter and equal(given[own.end() :], value)
    return bool(same_choice(answer, letter)) or equal(answer, value)
