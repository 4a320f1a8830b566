r"""Everything about a verdict that needs no mathematics: the format, the answer, and the rules around a comparison.

**Format** (r_format, B.1.2). A response has the expected structure when, in this order,

1. it opens with ``<think>``, after white space at most. If the prompt's chat template has already opened the thought
   (R1-Distill: ``think_opened=True``), ``<think>`` does not occur at all;
2. ``</think>`` occurs once, after it. If the chat template has also closed the thought (Qwen3 without thinking:
   ``think_opened="closed"``), neither tag occurs;
3. what follows has a last ``\boxed{…}`` that is closed and not empty.

The thought may be empty, and text may surround the box. A response that was cut off fails 2 or 3.

**Answer**: the content of the *last balanced* box outside the thought; earlier boxes, and boxes inside ``<think>``,
never count. Boxes with only separators between them (``\boxed{1}, \boxed{2} and \boxed{3}``) are one answer of several
parts, so that offering alternatives does not pay. If the last box is empty (an echo of the prompt's ``\boxed{}``),
there is no answer; the box before it does not count instead.

A response without a box has no answer. There is one exception, for ``require_format=False``, since base models often
do not box: if its last 2,000 characters, outside the thought, contain the word "answer", math-verify extracts the
answer that is announced there ("the final answer is $7$"). A bare last number is never taken for an answer.

**Verdict**: reward = r_format · r_acc (B.1.2). For R1-Zero (``require_format=False``) reward = r_acc;
``format_reward`` is reported all the same. If the format is wrong and ``require_format=True``, the kind is
``malformed`` or ``no_answer``; ``accuracy_reward`` still says whether the last box, if there is one, was right.

Answers over ``MAX_ANSWER_CHARS`` characters or ``MAX_NESTING`` brackets deep are not compared (kind ``wrong``, with
that reason) unless they are literally the ground truth. Everything here is linear in the response's length.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple, TypedDict, Unpack

from kdrl_core.errors import VerificationError
from kdrl_core.types import ThinkOpened, Verdict, VerdictKind

RULES = 3
"""Raise this with every change of kdrl_core.verify that changes a verdict. Then stored verdicts of other versions
are not used for this one."""

_OPEN, _CLOSE = "<think>", "</think>"
# `\\` before anything but `boxed` is a LaTeX line break and must not hide the brace that follows; `\{` is not a brace.
_SEPARATORS = re.compile(
    r"(?:[\s$,;.&:/|]|\\[()\[\],;:! ]|\\\\|\\q?quad\b|\\text\s*\{\s*+(?:(?:,\s*+)?(?:and|or)\s*+)?\}"
    r"|\b(?:and|or|either|perhaps|maybe|possibly)\b)*"
)
_MAX_SEPARATOR_CHARS = 70
_BARE_BOX = re.compile(r"\\boxed\s+([A-Za-z0-9.+-]{1,40})")
_NO_ANSWER = re.compile(r"(?:\\[a-z]+\{)?+\s*+(?:proof|not ?found|n/a|nan|null)\s*+\.?+\}?+", re.IGNORECASE)
"""What data sets write where there is no answer (NuminaMath: ``proof``, ``notfound``)."""
_INNER_BOX = re.compile(r"\\(?:boxed|fbox)\s*+\{([^{}]*+)\}")
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
MAX_ANSWER_CHARS = 4_096
MAX_TRUTH_CHARS = 32_768
MAX_NESTING = 64
_TAIL_CHARS = 2_000
_PLAIN = re.compile(r"[+-]?\d{1,100}(?:\.\d{1,100})?|[A-Za-z]\w{0,99}", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d{1,100}", re.ASCII)
_UNUSABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class VerdictOptions(TypedDict, total=False):
    """What a verdict depends on besides response and ground truth."""

    require_format: bool
    """Default True: reward = r_format · r_acc; else r_acc alone."""
    think_opened: ThinkOpened
    """Default False. True: the prompt ends with ``<think>``, so the response starts inside the thought. "closed": the
    prompt ends with ``</think>``, so the response has no thought."""


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


def check_format(response: str, *, think_opened: ThinkOpened = False) -> FormatResult:
    r"""Judge the structure of ``response`` and find its answer.

    ``think_opened``: as in :class:`VerdictOptions`.
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


def answer_region(response: str, *, think_opened: ThinkOpened = False) -> str:
    """The text outside the thought: after the last ``</think>``, or without one, before ``<think>``."""
    _, closing, after = response.rpartition(_CLOSE)
    if closing:
        # A second thought that is never closed is still a thought.
        return after.partition(_OPEN)[0]
    return "" if think_opened is True else response.partition(_OPEN)[0]


def last_box(text: str) -> tuple[str | None, bool]:
    r"""Content of the last balanced ``\boxed{…}`` that lies in no other, and whether no box opened after it.

    Boxes with only separators between them and it are included, joined by commas and without repetitions.
    ``(None, True)`` without any box, ``(None, False)`` if all boxes are unclosed. O(len(text)).
    """
    if r"\boxed" not in text and r"\fbox" not in text:
        return None, True
    text = _BARE_BOX.sub(r"\\boxed{\1}", text)
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
    boxes = _outermost(sorted(boxes))
    first_of_run, content, end = boxes.pop()
    is_last_closed = last_unclosed < first_of_run
    parts = [_INNER_BOX.sub(r"\1", text[content:end]).strip()]
    while boxes and parts[-1]:
        start, content, end = boxes.pop()
        gap = text[end + 1 : first_of_run]
        if end > first_of_run or len(gap) > _MAX_SEPARATOR_CHARS or not _SEPARATORS.fullmatch(gap):
            break
        first_of_run = start
        part = _INNER_BOX.sub(r"\1", text[content:end]).strip()
        if part and part != parts[-1]:
            parts.append(part)
    return ", ".join(reversed(parts)), is_last_closed


def _outermost(boxes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The boxes, sorted by their start, that lie in no other."""
    found: list[tuple[int, int, int]] = []
    for box in boxes:
        if not found or box[0] > found[-1][2]:
            found.append(box)
    return found


def _tag_fault(response: str, *, think_opened: ThinkOpened) -> str | None:
    """What is wrong with the think tags, in words; None if they are right."""
    num_open, num_close = response.count(_OPEN), response.count(_CLOSE)
    if think_opened == "closed":
        tag = _OPEN if num_open else _CLOSE
        return f"{tag} occurs although the prompt closed the thought" if num_open or num_close else None
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


class Outcome(NamedTuple):
    """What a worker found: correct, wrong, no_answer or error. ``extracted`` is an answer that it had to search for."""

    kind: VerdictKind
    reason: str
    extracted: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One comparison for a worker. Equal jobs have equal outcomes."""

    answer: str
    ground_truth: str
    is_text: bool


def screen(
    item: Any, **options: Unpack[VerdictOptions]
) -> Verdict | tuple[FormatResult, Outcome] | tuple[FormatResult, Job]:
    """Settle an item as far as possible without a worker: a verdict, an outcome, or a job for a worker."""
    think_opened = options.get("think_opened", False)
    try:
        response, ground_truth = item
    except (TypeError, ValueError):
        return _unusable("the item is not a (response, ground_truth) pair")
    if not isinstance(response, str) or not isinstance(ground_truth, str):
        kinds = f"{type(response).__name__} and {type(ground_truth).__name__}"
        return _unusable(f"response and ground truth must be text, not {kinds}")
    form = check_format(response, think_opened=think_opened)
    truth = ground_truth.strip()
    if not truth:
        return form, Outcome(VerdictKind.ERROR, "the ground truth is empty")
    if _NO_ANSWER.fullmatch(truth):
        return form, Outcome(VerdictKind.ERROR, f"the ground truth is {truth!r}: the data set has no answer here")
    if len(truth) > MAX_TRUTH_CHARS:
        return form, Outcome(VerdictKind.ERROR, f"the ground truth is longer than {MAX_TRUTH_CHARS:,} characters")
    truth = _UNUSABLE.sub("\ufffd", truth)
    if form.answer:
        answer = _UNUSABLE.sub("\ufffd", form.answer)
        quick = _without_worker(answer, truth)
        return (form, quick) if quick is not None else (form, Job(answer, truth, False))
    if form.answer is None and not options.get("require_format", True):
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


def make_verdict(form: FormatResult, outcome: Outcome, **options: Unpack[VerdictOptions]) -> Verdict:
    """The verdict and its reward from the two parts, format and accuracy."""
    require_format = options.get("require_format", True)
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
        extracted=None if extracted is None else printable(extracted),
        reason=printable(reason),
    )


def verifier_version() -> str:
    """The versions of kdrl's rules and of the installed math-verify. Verdicts of one version can be compared."""
    return f"{RULES}, math-verify {version('math-verify')}"


def refuse_failures(verdicts: Sequence[Verdict], where: str, limit: float) -> None:
    """Raise VerificationError if a share above `limit` of the verdicts of `where` are timeouts or errors."""
    failed = [v for v in verdicts if v.kind in (VerdictKind.TIMEOUT, VerdictKind.ERROR)]
    if len(failed) > limit * len(verdicts):
        counts = ", ".join(f"{n} {kind}" for kind, n in Counter(v.kind.value for v in failed).items())
        raise VerificationError(
            f"{where}: {counts} of {len(verdicts)} verdicts, above verification.max_failed_share={limit}; "
            f"first: {failed[0].reason}. Raise verification.timeout_s or memory_limit_mb, then resume"
        )


def _unusable(reason: str) -> Verdict:
    return Verdict(
        kind=VerdictKind.ERROR, reward=0.0, format_reward=0.0, accuracy_reward=0.0, extracted=None, reason=reason
    )


def printable(text: str) -> str:
    """Safe for Parquet and terminals: no lone surrogates or control characters, at most ``MAX_ANSWER_CHARS``."""
    text = text if len(text) <= MAX_ANSWER_CHARS else text[: MAX_ANSWER_CHARS - 1] + "…"
    return _UNUSABLE.sub("\ufffd", text)
