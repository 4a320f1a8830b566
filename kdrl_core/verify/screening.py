r"""The rules around a comparison: which answers need no worker, which no worker may see, and how a verdict is made.

reward = r_format · r_acc (B.1.2). For R1-Zero (``require_format=False``) reward = r_acc; ``format_reward`` is
reported all the same. If the format is wrong and ``require_format=True``, the kind is ``malformed`` or ``no_answer``;
``accuracy_reward`` still says whether the last box, if there is one, was right.

A response without a box has no answer. There is one exception, for ``require_format=False``, since base models often
do not box: if its last 2,000 characters, outside the thought, contain the word "answer", math-verify extracts the
answer that is announced there ("the final answer is $7$"). A bare last number is never taken for an answer.

Answers over ``MAX_ANSWER_CHARS`` characters or ``MAX_NESTING`` brackets deep are not compared (kind ``wrong``, with
that reason) unless they are literally the ground truth. Everything here is linear in the response's length.
"""

import re
from dataclasses import dataclass
from typing import Any

from kdrl_core.types import Verdict, VerdictKind
from kdrl_core.verify.accuracy import Outcome
from kdrl_core.verify.format import FormatResult, answer_region, check_format, last_box

MAX_ANSWER_CHARS = 4_096
MAX_TRUTH_CHARS = 32_768
MAX_NESTING = 64
_TAIL_CHARS = 2_000
_PLAIN = re.compile(r"[+-]?\d{1,100}(?:\.\d{1,100})?|[A-Za-z]\w{0,99}", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d{1,100}", re.ASCII)
_UNUSABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Job:
    """One comparison for a worker. Equal jobs have equal outcomes."""

    answer: str
    ground_truth: str
    is_text: bool


def screen(
    item: Any, *, require_format: bool, think_opened: bool
) -> Verdict | tuple[FormatResult, Outcome] | tuple[FormatResult, Job]:
    """Settle an item as far as possible without a worker: a verdict, an outcome, or a job for a worker."""
    try:
        response, ground_truth = item
    except (TypeError, ValueError):
        return _unusable("the item is not a (response, ground_truth) pair")
    if not isinstance(response, str) or not isinstance(ground_truth, str):
        return _unusable(f"response and ground truth must be text, not {_names(response, ground_truth)}")
    form = check_format(response, think_opened=think_opened)
    truth = ground_truth.strip()
    if not truth:
        return form, Outcome(VerdictKind.ERROR, "the ground truth is empty")
    if len(truth) > MAX_TRUTH_CHARS:
        return form, Outcome(VerdictKind.ERROR, f"the ground truth is longer than {MAX_TRUTH_CHARS:,} characters")
    truth = _UNUSABLE.sub("\ufffd", truth)
    if form.answer:
        answer = _UNUSABLE.sub("\ufffd", form.answer)
        quick = _without_worker(answer, truth)
        return (form, quick) if quick is not None else (form, Job(answer, truth, False))
    if form.answer is None and not require_format:
        tail = answer_region(response, think_opened=think_opened)[-_TAIL_CHARS:]
        if "answer" in tail.lower() and r"\boxed" not in tail:
            return form, Job(_UNUSABLE.sub("\ufffd", tail), truth, True)
    reason = r"no \boxed{} outside the thought" if form.answer is None else r"the last \boxed{} is empty"
    return form, Outcome(VerdictKind.NO_ANSWER, reason)


def _without_worker(answer: str, truth: str) -> Outcome | None:
    """Outcomes that need no mathematics, and refusals of answers that no worker may see; None for all others."""
    literal = _literal(truth)
    if _PLAIN.fullmatch(literal):
        given = _literal(answer)
        if given == literal:
            return Outcome(VerdictKind.CORRECT, "the same text as the ground truth")
        if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(literal):
            if int(given) == int(literal):
                return Outcome(VerdictKind.CORRECT, "the same integer as the ground truth")
            return Outcome(VerdictKind.WRONG, "another integer than the ground truth")
    if len(answer) > MAX_ANSWER_CHARS:
        reason = f"the answer has {len(answer):,} characters; over {MAX_ANSWER_CHARS:,} nothing is compared"
        return Outcome(VerdictKind.WRONG, reason)
    if _nesting(answer) > MAX_NESTING:
        return Outcome(VerdictKind.WRONG, f"the answer nests over {MAX_NESTING} brackets deep; it is not compared")
    return None


def _literal(text: str) -> str:
    """The text without an enclosing box, dollar signs and white space, and with a plain minus."""
    content, _ = last_box(text)
    return (content or text).strip().strip("$").strip().replace("\u2212", "-")


def _nesting(text: str) -> int:
    depth = deepest = 0
    for char in text:
        if char in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "})]":
            depth -= 1
    return deepest


def make_verdict(form: FormatResult, outcome: Outcome, *, require_format: bool) -> Verdict:
    accuracy = 1.0 if outcome.kind is VerdictKind.CORRECT else 0.0
    kind, reason = outcome.kind, outcome.reason
    if require_format and form.kind is not None:
        kind = form.kind
        reason = form.reason if form.answer is None else f"{form.reason}; the answer itself: {outcome.reason}"
    extracted = form.answer if form.answer is not None else outcome.extracted
    return Verdict(
        kind=kind,
        reward=form.reward * accuracy if require_format else accuracy,
        format_reward=form.reward,
        accuracy_reward=accuracy,
        extracted=None if extracted is None else _printable(extracted),
        reason=_printable(reason),
    )


def _unusable(reason: str) -> Verdict:
    return Verdict(
        kind=VerdictKind.ERROR, reward=0.0, format_reward=0.0, accuracy_reward=0.0, extracted=None, reason=reason
    )


def _names(*values: object) -> str:
    return " and ".join(type(value).__name__ for value in values)


def _printable(text: str) -> str:
    """Safe for Parquet and terminals: no lone surrogates or control characters, at most ``MAX_ANSWER_CHARS``."""
    text = text if len(text) <= MAX_ANSWER_CHARS else text[: MAX_ANSWER_CHARS - 1] + "…"
    return _UNUSABLE.sub("\ufffd", text)
