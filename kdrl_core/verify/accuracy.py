r"""The accuracy reward r_acc (B.1.2): is the answer mathematically equal to the ground truth? math-verify decides.

Everything here runs in a worker process of :mod:`kdrl_core.verify.workers`; math-verify, sympy and pint are
imported there and nowhere else. A comparison goes through these steps, and the first that decides ends it:

1. answer and truth are repaired (:mod:`kdrl_core.verify.normalise`); equal texts are right;
2. a truth of a form that math-verify reads in part, or not at all, is compared by the rules of this form: letters of
   choice and words (:mod:`~kdrl_core.verify.words`), sets and relations (:mod:`~kdrl_core.verify.sets`), units
   (:mod:`~kdrl_core.verify.quantities`), congruences, lists with dots, systems and families of solutions
   (:mod:`~kdrl_core.verify.sequences`), times, ratios, approximations (:mod:`~kdrl_core.verify.numbers`);
3. some answers are refused (:mod:`~kdrl_core.verify.objections`), such as a bound for a value;
4. both are read as mathematics (:mod:`~kdrl_core.verify.reading`). A truth of which a part is not read is compared as
   text, and an answer of which digits are not read is wrong;
5. the objects are compared (:mod:`~kdrl_core.verify.equality`). Gold goes first: math-verify is asymmetric.

If the truth cannot be read, the verdict is ``error``. If reading the answer or comparing it raises an exception, the
verdict is ``wrong``, and its reason names the exception. math-verify's SIGALRM timeouts are off (they need a main
thread and do not stop C code): the pool kills the process instead.
"""

import contextlib
import logging
import os
import resource
import signal
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from kdrl_core.types import VerdictKind
from kdrl_core.verify.equality import are_equal
from kdrl_core.verify.latex import same_text
from kdrl_core.verify.normalise import normalise
from kdrl_core.verify.numbers import same_approximation, same_based_integer, same_time
from kdrl_core.verify.objections import constants_of, objection
from kdrl_core.verify.quantities import same_amounts, same_quantity
from kdrl_core.verify.reading import content_of, is_whole, read_number, readings_of, readings_of_truth, words_left_out
from kdrl_core.verify.screening import Outcome
from kdrl_core.verify.sentences import is_doubtful, last_announced
from kdrl_core.verify.sequences import (
    same_assignments,
    same_congruence,
    same_family,
    same_function,
    same_list_with_dots,
    same_numbers,
    same_ratio,
)
from kdrl_core.verify.sets import same_relation, same_set
from kdrl_core.verify.words import same_choice, same_choice_and_value, same_words

EXIT_OUT_OF_MEMORY = 86
"""Exit code of a worker that hit its memory limit. It ends because its heap can no longer be trusted."""

PARTLY_READ = "the ground truth is readable only in part, so the texts are compared, and they differ"
UNREADABLE_TRUTH = "the ground truth is not readable as mathematics, and the texts differ"
FAILED_COMPARISON = "the comparison failed: "
"""The beginning of a reason. The answer is not taken for right, and the exception follows."""

_MAX_FORM_CHARS = 600
"""Longer contents are compared as mathematics alone."""
_MEMORY_ALARM = 0.75
_MAX_ANNOUNCED_CHARS = 80
"""In longer announcements math-verify looks for the answer."""
Form = Callable[[str, str], bool | None]
"""Whether a normalised answer equals a ground truth of this form; None if the truth does not have it."""


def _is_equal(answer: str, truth: str) -> bool:
    """Compare a part of an answer with a part of a truth."""
    answer, truth = normalise(answer), normalise(truth)
    return bool(answer and truth) and _compare_contents(answer, truth, truth).kind is VerdictKind.CORRECT


_FORMS: tuple[tuple[str, Form], ...] = (
    ("choice", same_choice),
    ("word", same_words),
    ("integer and base", same_based_integer),
    ("residue class", same_congruence),
    ("list", same_list_with_dots),
    ("list", same_numbers),
    ("time", same_time),
    ("value", lambda answer, truth: same_approximation(answer, truth, _is_equal, read_number)),
    ("ratio", lambda answer, truth: same_ratio(answer, truth, _is_equal)),
    ("relation", same_relation),
    ("set", lambda answer, truth: same_set(answer, truth, read_number)),
    ("amounts", lambda answer, truth: same_amounts(answer, truth, _is_equal)),
    ("quantity", lambda answer, truth: same_quantity(answer, truth, _is_equal)),
)
_FORMS_AFTER_OBJECTIONS: tuple[tuple[str, Form], ...] = (
    ("choice and value", lambda answer, truth: same_choice_and_value(answer, truth, _is_equal)),
    ("solution", lambda answer, truth: same_assignments(answer, truth, _is_equal)),
    ("formula and parameter", lambda answer, truth: same_family(answer, truth, _is_equal)),
    ("function", lambda answer, truth: same_function(answer, truth, _is_equal)),
)
"""Forms of which some answers are refused first (:mod:`kdrl_core.verify.objections`)."""


def limit_worker(memory_limit_mb: int) -> None:
    """Make this worker killable at any moment, limit its address space, and let the kernel end it first of all."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's Python handler would wait for C code to return
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGPROF})  # the parent may block them
    limit = memory_limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # macOS refuses RLIMIT_AS
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.suppress(OSError):  # Linux: if memory runs out, a worker goes before the trainer
        Path("/proc/self/oom_score_adj").write_text("1000")


def start_worker(memory_limit_mb: int) -> None:
    """Initializer of a worker: set limits, then import and compare once, so that no item pays for the start."""
    limit_worker(memory_limit_mb)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    compare_answer(r"\frac{1}{2}+\sqrt{2}", r"0.5+\sqrt{2}")


class _BrokenTruthError(Exception):
    """The ground truth cannot be read."""


def judge(answer: str, ground_truth: str, is_text: bool, cpu_limit_s: float, memory_limit_mb: int) -> Outcome:
    """The task of a worker: compare a box's content, or (``is_text``) the end of an unboxed response, with the truth.

    The kernel's timer ends this process after ``cpu_limit_s`` of its CPU time. A stopped process, a suspended machine
    and a step of the clock use none. The parent waits for the outcome, for a limited time.
    """
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    peak_before = _peak_memory_mb()
    try:
        outcome = compare_text(answer, ground_truth) if is_text else compare_answer(answer, ground_truth)
    except MemoryError:
        os._exit(EXIT_OUT_OF_MEMORY)
    except _BrokenTruthError as error:
        outcome = Outcome(VerdictKind.ERROR, f"the ground truth cannot be read: {error}")
    except Exception as error:  # whatever sympy raises on this answer is a finding about the answer
        outcome = Outcome(VerdictKind.WRONG, f"{FAILED_COMPARISON}{_describe(error)}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    # sympy and math-verify catch MemoryError in places and then say "not equal": do not believe that answer.
    peak = _peak_memory_mb()
    if outcome.kind is not VerdictKind.CORRECT and peak > peak_before and peak > _MEMORY_ALARM * memory_limit_mb:
        os._exit(EXIT_OUT_OF_MEMORY)
    return outcome


def compare_answer(answer: str, ground_truth: str) -> Outcome:
    """Compare the content of a box with the ground truth."""
    return _compare_contents(normalise(answer), content_of(ground_truth), ground_truth)


def _compare_contents(answer: str, truth: str, ground_truth: str) -> Outcome:
    """Compare normalised contents: as text, by the first form that the truth has, or as mathematics."""
    if answer == truth or same_text(answer, truth):
        return _same(True, "text")
    is_short = len(answer) <= _MAX_FORM_CHARS and len(truth) <= _MAX_FORM_CHARS
    if is_short and (outcome := _by_form(_FORMS, answer, truth)) is not None:
        return outcome
    if (reason := objection(answer, truth)) is not None:
        return Outcome(VerdictKind.WRONG, reason)
    if is_short and (outcome := _by_form(_FORMS_AFTER_OBJECTIONS, answer, truth)) is not None:
        return outcome
    golds = _read_truth(ground_truth)
    if truth.endswith(r"\%") and "%" not in answer:  # 62.5 where the problem asks for percent
        golds = golds + _read_truth(truth[:-2])
    if not is_whole(truth, golds):
        return Outcome(VerdictKind.WRONG, PARTLY_READ)
    readings = readings_of(answer)
    if not readings or words_left_out(answer, truth):
        return Outcome(VerdictKind.WRONG, "part of the answer is not readable as mathematics")
    outcome = _compare(golds, readings)
    if outcome.kind is VerdictKind.CORRECT and truth.count("=") < 2:
        for side in constants_of(answer):
            if _compare(golds, readings_of(normalise(side))).kind is not VerdictKind.CORRECT:
                return Outcome(VerdictKind.WRONG, "one side of its equality is not the ground truth")
    return outcome


def _by_form(forms: tuple[tuple[str, Form], ...], answer: str, truth: str) -> Outcome | None:
    """The outcome of the first form that the truth has; None if it has none of them."""
    for what, compare in forms:
        if (is_same := compare(answer, truth)) is not None:
            return _same(is_same, what)
    return None


def _same(is_same: bool, what: str) -> Outcome:
    if is_same:
        return Outcome(VerdictKind.CORRECT, f"the same {what} as the ground truth")
    return Outcome(VerdictKind.WRONG, f"another {what} than the ground truth")


def compare_text(text: str, ground_truth: str) -> Outcome:
    """Compare the answer that math-verify finds after the word "answer" in unboxed text with the ground truth."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    if is_doubtful(text):
        return Outcome(VerdictKind.NO_ANSWER, "what is announced as the answer is denied, or one of several")
    said = last_announced(text)
    if said is not None and len(said) <= _MAX_ANNOUNCED_CHARS:
        return compare_answer(said, ground_truth)._replace(extracted=said)
    found = parse(
        text,
        [LatexExtractionConfig(try_extract_without_anchor=False), ExprExtractionConfig(False)],
        parsing_timeout=None,
        raise_on_error=True,
    )
    if not found:
        return Outcome(VerdictKind.NO_ANSWER, r"no \boxed{} and no answer that is announced as one")
    extracted = next((item for item in found if isinstance(item, str)), None)
    return _compare(_read_truth(ground_truth), found)._replace(extracted=extracted)


def _compare(golds: list[Any], answers: list[Any]) -> Outcome:
    if not golds:
        return Outcome(VerdictKind.ERROR, "the ground truth holds nothing to compare with")
    failure: Exception | None = None
    for gold in golds:
        for answer in answers:
            try:
                if are_equal(gold, answer):
                    return Outcome(VerdictKind.CORRECT, "equal to the ground truth")
            except MemoryError:
                raise
            except Exception as error:
                failure = error
    if failure is not None:
        return Outcome(VerdictKind.WRONG, f"{FAILED_COMPARISON}{_describe(failure)}")
    if all(isinstance(answer, str) for answer in answers):
        return Outcome(VerdictKind.WRONG, "not readable as mathematics, and its text differs from the ground truth")
    if all(isinstance(gold, str) for gold in golds):
        return Outcome(VerdictKind.WRONG, UNREADABLE_TRUTH)
    return Outcome(VerdictKind.WRONG, "not equal to the ground truth")


@lru_cache(maxsize=256)  # the G responses of a prompt share it
def _read_truth(ground_truth: str) -> list[Any]:
    """The readings of a ground truth. Raises _BrokenTruthError if reading it raises an exception."""
    try:
        return readings_of_truth(ground_truth)
    except MemoryError:
        raise
    except Exception as error:
        raise _BrokenTruthError(_describe(error)) from error


def _describe(error: Exception) -> str:
    # str() of a sympy error can take for ever; its first argument is enough if it is text.
    text = error.args[0] if error.args and isinstance(error.args[0], str) else ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _peak_memory_mb() -> float:
    """Peak resident memory of this process.

    `ru_maxrss` is only the fall-back: on Linux it starts at the peak of the parent, which may hold models, and so hides
    the worker's own memory.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
