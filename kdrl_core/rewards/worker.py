"""The task of a worker: call the reward's functions on a batch of responses.

Whatever a function does ends as a finding: an exception, a wrong return value, a changed argument. What cannot be
caught (a loop that never ends, memory that runs out, `os._exit`) ends the worker; the pool then looks at each response
alone. `os.fork` is refused, since the child would answer in the worker's place. What a function prints goes nowhere
but into its reason.
"""

import copy
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Set
from functools import wraps
from typing import Any

from kdrl_core.errors import RecipeError
from kdrl_core.objectives.plugins import expect_code
from kdrl_core.rewards.loading import LoadedFunction, Term, failing_line, load_function
from kdrl_core.rewards.score import MAX_REASON_CHARS, BadReturnError, Found, Scored, as_found
from kdrl_core.types import VerdictKind
from kdrl_core.verify.accuracy import EXIT_OUT_OF_MEMORY, limit_worker

BUDGET_S = 0.25
"""A worker gives back a batch after this time, even if it is not through with it."""
_MAX_PRINTED = 80
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

Done = tuple[str | None, list[list[Found | None]]]
"""What is wrong with a function that cannot be loaded, or None; and for each item that was done, in order, what each
function found, None where it does not apply."""

_terms: list[Term] = []
_loaded: dict[int, LoadedFunction] = {}
_printed = io.StringIO()


def start_reward_worker(memory_limit_mb: int, terms: Sequence[Term], code: Mapping[str, str]) -> None:
    """Initializer of a worker. It runs no user code yet: what that does would break the pool.

    Args:
        terms: those of the reward.
        code: as `expect_code` takes it.
    """
    limit_worker(memory_limit_mb)
    expect_code(code)
    _terms[:] = terms
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.stdout = sys.stderr = _printed
    sys.addaudithook(_refuse_fork)


def _refuse_fork(event: str, _: tuple[Any, ...]) -> None:
    if event in ("os.fork", "os.forkpty"):
        raise PermissionError("os.fork is refused in a worker; use subprocess, or do without")


def load_functions(indices: Sequence[int]) -> str | None:
    """Load these terms. Returns what is wrong with the first that cannot be used; None if all can."""
    for index in indices:
        if index not in _loaded:
            loaded = loaded_or_fault(index, _terms[index])
            take_printed()  # else the first response of each worker would have it in its reason
            if isinstance(loaded, str):
                return loaded
            _loaded[index] = loaded
    return None


def loaded_function(index: int) -> LoadedFunction:
    """A term that `load_functions` has loaded."""
    return _loaded[index]


def loaded_or_fault(index: int, term: Term) -> LoadedFunction | str:
    """Load a term; if it cannot be used, what is wrong with it, with its field."""
    try:
        return load_function(term)
    except RecipeError as error:
        return f"field 'reward.functions.{index}': {error}"
    except MemoryError:
        os._exit(EXIT_OUT_OF_MEMORY)
    except BaseException as error:  # SystemExit: user code may raise anything
        return f"field 'reward.functions.{index}': {term.function}: {type(error).__name__}: {error}"


def contained(task: Callable[..., Any]) -> Callable[..., Any]:
    """A task out of which no exception comes, whatever it is: SystemExit would reach the caller's process."""

    @wraps(task)
    def call(items: Sequence[Scored], indices: Sequence[int], *rest: Any) -> Any:
        try:
            return task(items, indices, *rest)
        except BaseException as error:
            is_known = len(items) == len(indices) == 1
            return None, [[failure(_loaded[indices[0]], items[0], error)]] if is_known else []

    return call


@contained
def score_batch(items: Sequence[Scored], indices: Sequence[int], cpu_limit_s: float) -> Done:
    """Call the terms `indices` on as many of the items as the budget allows, one at least.

    The kernel's timer ends this process after `cpu_limit_s` of CPU time in one call.
    """
    if (fault := load_functions(indices)) is not None:
        return fault, []
    functions = [_loaded[index] for index in indices]
    found: list[list[Found | None]] = []
    end = time.monotonic() + BUDGET_S
    try:
        for item in items:
            found.append([_call(function, item, cpu_limit_s) for function in functions])
            if time.monotonic() > end:
                break
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    return None, found


def _call(loaded: LoadedFunction, item: Scored, cpu_limit_s: float) -> Found | None:
    response, answer, problem = item
    given = problem.copy()  # its values are plain: nothing deeper can be changed
    arguments = arguments_of(loaded)
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    try:
        found = as_found(loaded.function(response, answer, given, **arguments))
        refuse_changes(loaded, item, given, arguments)
    except BaseException as error:  # SystemExit too
        return failure(loaded, item, error)
    return _with_printed(found) if _printed.tell() else found


@contained
def score_list(items: Sequence[Scored], indices: Sequence[int], cpu_limit_s: float) -> Done:
    """Call one term, a function of lists, on all of the items at once.

    No rows: the call failed as a whole, and there are several items; then each must be looked at alone.
    """
    if (fault := load_functions(indices)) is not None:
        return fault, []
    loaded = _loaded[indices[0]]
    responses, answers, problems = [list(column) for column in zip(*items, strict=True)]
    given, arguments = [problem.copy() for problem in problems], arguments_of(loaded)
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    try:
        values = _list_of(loaded.function(responses, answers, given, **arguments), len(items))
        is_same = (responses, answers) == ([item[0] for item in items], [item[1] for item in items])
        if not is_same or len(given) != len(items):
            raise BadReturnError("it changed a list that it was given; copy it first")
    except BaseException as error:
        return None, [] if len(items) > 1 else [[failure(loaded, items[0], error)]]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    take_printed()  # of which response, nobody knows
    return None, [
        [_checked(loaded, item, value, changed, arguments)]
        for item, value, changed in zip(items, values, given, strict=True)
    ]


def _checked(
    loaded: LoadedFunction, item: Scored, value: Any, given: dict[str, Any], arguments: dict[str, Any]
) -> Found | None:
    try:
        refuse_changes(loaded, item, given, arguments)
        return as_found(value)
    except BaseException as error:
        return failure(loaded, item, error)


def _list_of(returned: Any, length: int) -> list[Any]:
    if isinstance(returned, str | bytes | Mapping | Set) or not hasattr(returned, "__len__"):
        raise BadReturnError(f"it returned {type(returned).__name__}; return a list with a value for each response")
    if len(returned) != length:
        raise BadReturnError(f"it returned {len(returned)} values for {length} responses; return one for each")
    return list(returned)


def arguments_of(loaded: LoadedFunction) -> dict[str, Any]:
    """The recipe's arguments for one call."""
    return copy.deepcopy(loaded.arguments) if loaded.may_change_arguments else loaded.arguments


def refuse_changes(loaded: LoadedFunction, item: Scored, given: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Raise BadReturnError if a call has changed what it was given."""
    problem = item[2]
    if not _equal(given, problem):
        changed = sorted(str(name) for name in {*given, *problem} if not _equal(given.get(name), problem.get(name)))
        raise BadReturnError(f"it changed its argument problem ({', '.join(changed)[:200]})")
    if loaded.may_change_arguments and not _equal(arguments, loaded.arguments):
        raise BadReturnError("it changed an argument that the recipe gives; copy it first")


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are equal; those that cannot be compared (an array) are not."""
    try:
        return bool(one == other)
    except Exception:
        return False


def failure(loaded: LoadedFunction, item: Scored, error: BaseException, kind: VerdictKind = VerdictKind.ERROR) -> Found:
    """A failed call, told with file, line and the response's id. Ends this process if its memory has run out."""
    if isinstance(error, MemoryError):
        os._exit(EXIT_OUT_OF_MEMORY)
    take_printed()
    text = _text_of(error)
    if isinstance(error, BadReturnError):
        line = loaded.where
    else:
        line, text = failing_line(error, loaded.function), f"{type(error).__name__}: {text}".removesuffix(": ")
    text = _ADDRESS.sub("", text)  # else a step that is done again would have another reason
    problem = item[2]
    who = f"problem {problem.get('problem_id')}, sample {problem.get('sample')}"
    return Found(0.0, f"{line}, {who}: {text}", failed=kind)


def _text_of(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:MAX_REASON_CHARS]
    except BaseException:  # the user's own class may raise anything
        return ""


def take_printed() -> str:
    """What was printed since the last call, in one line."""
    text = _ADDRESS.sub("", " ".join(_printed.getvalue().split()))
    _printed.seek(0)
    _printed.truncate(0)
    return text if len(text) <= _MAX_PRINTED else text[:_MAX_PRINTED] + "…"


def _with_printed(found: Found | None) -> Found | None:
    text = take_printed()
    return None if found is None else found._replace(reason=f"{found.reason} (printed: {text})".lstrip())
