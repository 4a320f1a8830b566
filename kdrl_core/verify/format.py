r"""The format reward r_format (B.1.2) and the answer that a response gives. The rules take linear time.

A response has the expected structure when, in this order,

1. it opens with ``<think>``, after white space at most. If the prompt's chat template has already opened the thought
   (R1-Distill: ``think_opened=True``), ``<think>`` does not occur at all;
2. ``</think>`` occurs once, after it;
3. what follows has a last ``\boxed{…}`` that is closed and not empty.

The thought may be empty, and text may surround the box. A response that was cut off fails 2 or 3.

The answer is the content of the *last balanced* box outside the thought: earlier boxes, and boxes inside
``<think>``, never count. Boxes with only separators between them (``\boxed{1}, \boxed{2} and \boxed{3}``) are one
answer of several parts, so that offering alternatives does not pay. If the last box is empty (an echo of the prompt's
``\boxed{}``), there is no answer; the box before it does not count instead.
"""

import re
from dataclasses import dataclass

from kdrl_core.types import VerdictKind

_OPEN, _CLOSE = "<think>", "</think>"
# `\\` before anything but `boxed` is a LaTeX line break and must not hide the brace that follows; `\{` is no brace.
_SEPARATORS = re.compile(
    r"(?:[\s$,;.&:/|]|\\[()\[\],;:! ]|\\\\|\\q?quad\b|\\text\s*\{\s*(?:,?\s*(?:and|or))?\s*\}"
    r"|\b(?:and|or|either|perhaps|maybe|possibly)\b)*"
)
_MAX_SEPARATOR_CHARS = 70
_TOKEN = re.compile(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatResult:
    """``kind`` is None if the format is right, else ``MALFORMED`` or ``NO_ANSWER``; ``reason`` says why in words.

    ``answer`` is the last balanced box outside the thought, even if the format is wrong; None without a box.
    """

    kind: VerdictKind | None
    answer: str | None
    reason: str

    @property
    def is_valid(self) -> bool:
        return self.kind is None

    @property
    def reward(self) -> float:
        """r_format ∈ {0, 1}."""
        return 1.0 if self.is_valid else 0.0


def check_format(response: str, *, think_opened: bool = False) -> FormatResult:
    r"""Judge the structure of ``response`` and find its answer.

    ``think_opened``: the prompt ends with ``<think>``, so the response starts inside the thought.
    A wrong tag structure or an unclosed last box is ``MALFORMED``; a missing or empty box is ``NO_ANSWER``.
    """
    answer, is_last_closed = last_box(answer_region(response, think_opened=think_opened))
    tags = _tag_fault(response, think_opened=think_opened)
    if tags is not None:
        kind, reason = VerdictKind.MALFORMED, tags
    elif not is_last_closed:
        kind, reason = VerdictKind.MALFORMED, r"the last \boxed{ is not closed"
    elif answer is None:
        kind, reason = VerdictKind.NO_ANSWER, r"no \boxed{} after </think>"
    elif not answer:
        kind, reason = VerdictKind.NO_ANSWER, r"the last \boxed{} is empty"
    else:
        return FormatResult(kind=None, answer=answer, reason="the format is right")
    return FormatResult(kind=kind, answer=answer, reason=reason)


def answer_region(response: str, *, think_opened: bool = False) -> str:
    """The text outside the thought: after the last ``</think>``, or without one, before ``<think>``."""
    _, closing, after = response.rpartition(_CLOSE)
    if closing:
        # A second thought that is never closed is still a thought.
        return after.partition(_OPEN)[0]
    return "" if think_opened else response.partition(_OPEN)[0]


def last_box(text: str) -> tuple[str | None, bool]:
    r"""Content of the balanced ``\boxed{…}`` that starts last, and whether no box opened after it.

    Boxes that only separators part from it are included, joined by commas and without repetitions.
    ``(None, True)`` without any box, ``(None, False)`` if all boxes are unclosed. O(len(text)).
    """
    if r"\boxed" not in text:
        return None, True
    open_braces: list[tuple[int, int, bool]] = []  # (start of the token, of the content, is it a box)
    boxes: list[tuple[int, int, int]] = []  # (start of \boxed, of its content, of its closing brace), by closing brace
    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark[-1] == "{" and mark != r"\{":
            open_braces.append((token.start(), token.end(), len(mark) > 1))
        elif mark == "}" and open_braces:
            start, content, is_box = open_braces.pop()
            if is_box:
                boxes.append((start, content, token.start()))
    last_unclosed = max((start for start, _, is_box in open_braces if is_box), default=-1)
    if not boxes:
        return None, last_unclosed < 0
    boxes.sort()
    first_of_run, content, end = boxes.pop()
    is_last_closed = last_unclosed < first_of_run
    parts = [text[content:end].strip()]
    while boxes and parts[-1]:
        start, content, end = boxes.pop()
        gap = text[end + 1 : first_of_run]
        if end > first_of_run or len(gap) > _MAX_SEPARATOR_CHARS or not _SEPARATORS.fullmatch(gap):
            break
        first_of_run = start
        part = text[content:end].strip()
        if part and part != parts[-1]:
            parts.append(part)
    return ", ".join(reversed(parts)), is_last_closed


def _tag_fault(response: str, *, think_opened: bool) -> str | None:
    """What is wrong with the think tags, in words; None if they are right."""
    num_open, num_close = response.count(_OPEN), response.count(_CLOSE)
    if num_close == 0:
        return "the thought is never closed: no </think>"
    if num_close > 1:
        return f"</think> occurs {num_close} times instead of once"
    if think_opened:
        return "<think> occurs again although the prompt opened it" if num_open else None
    if num_open != 1:
        return f"<think> occurs {num_open} times instead of once"
    if not response.lstrip().startswith(_OPEN):
        return "the response does not open with <think>"
    return None
