r"""The accuracy reward r_acc (B.1.2): is the answer mathematically equal to the ground truth? math-verify decides.

Everything here runs in a worker process of :mod:`kdrl_core.verify.workers`; math-verify and sympy are imported
there and nowhere else. Departures from plain math-verify:

- its SIGALRM timeouts are off (they need a main thread and do not stop C code): the pool kills the process instead;
- gold always goes first: ``verify(gold, answer)`` is asymmetric;
- answers and truths are repaired first (:mod:`kdrl_core.verify.normalise`), and some answers are rejected
  (:mod:`kdrl_core.verify.objections`);
- the ground truth may have no ``\boxed{}`` or ``$``: it is then read as the content of a box; a plain expression
  (``7/2``, ``3*10^8``) is also read as arithmetic;
- an answer is wrong if math-verify reads only a part of it (digits are missing from what it read);
- intervals and inequalities are compared in both directions (``allow_set_relation_comp``);
- two tiny numbers are compared in relative terms, since math-verify takes them for equal;
- if the truth cannot be read, the verdict is ``error``. If reading the answer or comparing it raises an exception, the
  verdict is ``wrong``, and its reason names the exception;
- a reading without a value (``1:00`` is 1/0 to math-verify) is left out, and the text is compared.
"""

import contextlib
import logging
import os
import re
import resource
import signal
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import Any

from kdrl_core.types import VerdictKind
from kdrl_core.verify.normalise import as_based_integer, as_word, decimal_comma, is_doubtful, normalise, same_word
from kdrl_core.verify.objections import constants_of, lost_digits, objection
from kdrl_core.verify.screening import Outcome, last_box

EXIT_OUT_OF_MEMORY = 86
"""Exit code of a worker that hit its memory limit. It ends because its heap can no longer be trusted."""

UNREADABLE_TRUTH = "the ground truth is not readable as mathematics, and the texts differ"
FAILED_COMPARISON = "the comparison failed: "
"""The beginning of a reason. The answer is not taken for right, and the exception follows."""

_MEMORY_ALARM = 0.75
_ARITHMETIC = re.compile(r"[.+\-*/^()]*+\d[\d.+\-*/^()]*+", re.ASCII)
_DIVIDED_BY_ZERO = re.compile(r"/\(*+(?:0++(?:\.0++)?+|\.0++)(?![\d.])", re.ASCII)
_MAX_ARITHMETIC_CHARS = 1_000
_AROUND_OPERATOR = re.compile(r" ?([+\-*/^()]) ?")
_MATH = re.compile(r"\\boxed|(?<!\\)\$|\\\(|\\\[")


def start_worker(memory_limit_mb: int) -> None:
    """Initializer of a worker: set limits, then import and compare once, so that no item pays for the start."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's Python handler would wait for C code to return
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGPROF})  # the parent may block them
    limit = memory_limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # macOS refuses RLIMIT_AS
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.suppress(OSError):  # Linux: if memory runs out, a worker goes before the trainer
        Path("/proc/self/oom_score_adj").write_text("1000")
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
    answer, truth = normalise(answer), _content_of(ground_truth)
    if answer == truth:
        return _same(True, "text")
    if (word := as_word(truth)) is not None:
        return _same(same_word(answer, word), "word")
    if (given := as_based_integer(answer)) and (expected := as_based_integer(truth)):
        return _same(given == expected, "integer and base")
    if (reason := objection(answer, truth)) is not None:
        return Outcome(VerdictKind.WRONG, reason)
    golds = _read_truth(ground_truth)
    readings = _readings(answer)
    if not readings:
        return Outcome(VerdictKind.WRONG, "part of the answer is not readable as mathematics")
    outcome = _compare(golds, readings)
    if outcome.kind is VerdictKind.CORRECT and "=" not in truth:
        for side in constants_of(answer):
            if _compare(golds, _readings(side)).kind is not VerdictKind.CORRECT:
                return Outcome(VerdictKind.WRONG, "one side of its equality is not the ground truth")
    return outcome


def _same(is_same: bool, what: str) -> Outcome:
    if is_same:
        return Outcome(VerdictKind.CORRECT, f"the same {what} as the ground truth")
    return Outcome(VerdictKind.WRONG, f"another {what} than the ground truth")


def compare_text(text: str, ground_truth: str) -> Outcome:
    """Compare the answer that math-verify finds after the word "answer" in unboxed text with the ground truth."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    found = parse(
        text,
        [LatexExtractionConfig(try_extract_without_anchor=False), ExprExtractionConfig(False)],
        parsing_timeout=None,
        raise_on_error=True,
    )
    if not found:
        return Outcome(VerdictKind.NO_ANSWER, r"no \boxed{} and no answer that is announced as one")
    if is_doubtful(text):
        return Outcome(VerdictKind.NO_ANSWER, "what is announced as the answer is denied, or one of several")
    extracted = next((item for item in found if isinstance(item, str)), None)
    return _compare(_read_truth(ground_truth), found)._replace(extracted=extracted)


def _compare(golds: list[Any], answers: list[Any]) -> Outcome:
    from math_verify import verify

    if not golds:
        return Outcome(VerdictKind.ERROR, "the ground truth holds nothing to compare with")
    failure: Exception | None = None
    for gold in golds:
        for answer in answers:
            try:
                equal = verify(gold, answer, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
                if equal and not _are_tiny_and_apart(gold, answer):
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


def _are_tiny_and_apart(gold: Any, answer: Any) -> bool:
    """Are both numbers below 1e-3 and over 0.1 % apart?

    math-verify compares in absolute terms (1e-15, or 6 decimals), so that 1/2004! and 1/2006! are equal to it.
    """
    from sympy import Eq, Expr  # type: ignore[import-untyped, unused-ignore]

    values = []
    for side in (gold, answer):
        number = side.rhs if isinstance(side, Eq) else side
        if not isinstance(number, Expr) or number.free_symbols:
            return False
        try:
            value = abs(number.doit().evalf(30))
        except ValueError:  # 12/0: "can't evaluate nan or zoo"
            return False
        if not value.is_Float and value != 0:  # not a number after all: oo, an unevaluated sum, …
            return False
        if value.is_Float and value._prec == 1:  # sympy's mark for "no significant digit": zero up to rounding
            return False
        values.append(value)
    large = max(values)
    return bool(0 < large < 1e-3 and abs(values[0] - values[1]) > 1e-3 * large)


@lru_cache(maxsize=256)  # the G responses of a prompt share it
def _read_truth(ground_truth: str) -> list[Any]:
    """The readings of a ground truth. Raises _BrokenTruthError if reading it raises an exception."""
    from math_verify import parse

    truth = _content_of(ground_truth)
    try:
        if _MATH.search(truth):  # a whole solution
            return _with_value(parse(ground_truth, parsing_timeout=None, raise_on_error=True))
        return _readings(truth, is_truth=True)
    except MemoryError:
        raise
    except Exception as error:
        raise _BrokenTruthError(_describe(error)) from error


def _with_value(readings: list[Any]) -> list[Any]:
    """The readings without those that are no number at all: 1/0 and 0/0, which sympy cannot compare."""
    from sympy import nan, zoo  # type: ignore[import-untyped, unused-ignore]

    return [reading for reading in readings if reading is not zoo and reading is not nan]


@lru_cache(maxsize=256)
def _content_of(ground_truth: str) -> str:
    """The truth, or the content of its only box, normalised. A truth with several boxes is read as a whole solution."""
    content, _ = last_box(ground_truth) if ground_truth.count(r"\boxed") == 1 else (None, True)
    return normalise(content or ground_truth)


def _readings(content: str, *, is_truth: bool = False) -> list[Any]:
    """All readings of a normalised content. An answer that math-verify read only in part has none."""
    readings = _read_content(content)
    read = next((reading for reading in readings if isinstance(reading, str)), content)
    if not is_truth and lost_digits(content, read):
        readings = []
    if (arithmetic := _read_arithmetic(content)) is not None:
        readings.append(arithmetic)
    if (decimal := decimal_comma(content, is_truth=is_truth)) is not None:
        readings += _read_content(decimal)
    return readings


def _read_content(content: str) -> list[Any]:
    """math-verify's readings of a box with this content: a sympy object if it finds one, then the text that it read."""
    from math_verify import parse

    return _with_value(parse(rf"\boxed{{{content}}}", parsing_timeout=None, raise_on_error=True))


def _read_arithmetic(content: str) -> Any:
    """The value of a content of only numbers and operators (``2**3``, ``7 / 2``); None for any other content."""
    from sympy.parsing import parse_expr  # type: ignore[import-untyped, unused-ignore]

    if len(content) > _MAX_ARITHMETIC_CHARS:
        return None
    expression = _AROUND_OPERATOR.sub(r"\1", " ".join(content.split()))
    if not _ARITHMETIC.fullmatch(expression) or _DIVIDED_BY_ZERO.search(expression):
        return None
    try:
        return parse_expr(expression.replace("^", "**"), evaluate=False)
    except (SyntaxError, TokenError, TypeError, ValueError, ArithmeticError, AttributeError):
        return None


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
