"""The task of a worker: call the reward's functions on a batch of responses.

Whatever a function does ends as a finding: an exception, a wrong return value, a changed argument. What cannot be
caught (a loop that never ends, memory that runs out, `os._exit`) ends the worker; the pool then looks at each response
alone. `os.fork` is refused, since the child would answer in the worker's place. What a function prints goes nowhere
but into its reason.
"""

import copy
import io
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_core.config.rewards import RewardFunction
from kdrl_core.errors import RecipeError
from kdrl_core.objectives.plugins import expect_code
from kdrl_core.rewards.loading import LoadedFunction, failing_line, load_function
from kdrl_core.rewards.score import MAX_REASON_CHARS, Found, Scored, as_found
from kdrl_core.types import VerdictKind
from kdrl_core.verify.accuracy import EXIT_OUT_OF_MEMORY, limit_worker

BUDGET_S = 0.25
"""A worker gives back a batch after this time, even if it is not through with it."""
_MAX_PRINTED = 80

_configs: list[RewardFunction] = []
_loaded: dict[int, LoadedFunction] = {}
_printed = io.StringIO()


def start_reward_worker(memory_limit_mb: int, configs: Sequence[dict[str, Any]], code: Mapping[str, str]) -> None:
    """Initializer of a worker. It runs no user code yet: what that does would break the pool.

    Args:
        configs: the terms of the reward, as plain values.
        code: as `expect_code` takes it.
    """
    limit_worker(memory_limit_mb)
    expect_code(code)
    _configs[:] = [RewardFunction.model_validate(config) for config in configs]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.stdout = sys.stderr = _printed
    sys.addaudithook(_refuse_fork)


def _refuse_fork(event: str, _: tuple[Any, ...]) -> None:
    if event in ("os.fork", "os.forkpty"):
        raise PermissionError("it forks, which a worker cannot survive; use subprocess, or do without")


def load_functions(indices: Sequence[int]) -> str | None:
    """Load these terms. Returns what is wrong with the first that cannot be used; None if all can."""
    for index in indices:
        if index not in _loaded:
            loaded = loaded_or_fault(index, _configs[index])
            if isinstance(loaded, str):
                return loaded
            _loaded[index] = loaded
    return None


def loaded_or_fault(index: int, config: RewardFunction) -> LoadedFunction | str:
    """Load a term; if it cannot be used, what is wrong with it, with its field."""
    try:
        return load_function(config)
    except RecipeError as error:
        return f"field 'reward.functions.{index}': {error}"
    except MemoryError:
        os._exit(EXIT_OUT_OF_MEMORY)
    except BaseException as error:  # SystemExit: user code may raise anything
        return f"field 'reward.functions.{index}': {config.function}: {type(error).__name__}: {error}"


def score_batch(
    items: Sequence[Scored], indices: Sequence[int], cpu_limit_s: float
) -> tuple[str | None, list[list[Found | None]]]:
    """Call the terms `indices` on as many of the items as the budget allows, one at least.

    The kernel's timer ends this process after `cpu_limit_s` of CPU time in one call.

    Returns:
        what is wrong with a function that cannot be loaded, or None; and for each item that was done, in order, what
        each function found, None where it does not apply.
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
    arguments = copy.deepcopy(loaded.arguments) if loaded.may_change_arguments else loaded.arguments
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    try:
        found = as_found(loaded.function(response, answer, given, **arguments))
    except MemoryError:
        os._exit(EXIT_OUT_OF_MEMORY)
    except BaseException as error:  # SystemExit too
        text = _text_of(error)
        is_return = error.__traceback__ is not None and _is_own(error)
        line = loaded.where if is_return else failing_line(error, loaded.function)
        return _failure(line, item, text if is_return else f"{type(error).__name__}: {text}".removesuffix(": "))
    if given != problem:
        changed = sorted(name for name in {*given, *problem} if given.get(name) != problem.get(name))
        return _failure(loaded.where, item, f"it changed its argument problem ({', '.join(map(str, changed))[:200]})")
    if loaded.may_change_arguments and arguments != loaded.arguments:
        return _failure(loaded.where, item, "it changed an argument that the recipe gives; copy it first")
    if _printed.tell():
        found = _with_printed(found)
    return found


def _is_own(error: BaseException) -> bool:
    """Whether `as_found` refused the return value: the function itself is no longer on the stack."""
    trace = error.__traceback__
    assert trace is not None
    return trace.tb_next is not None and trace.tb_next.tb_frame.f_code is as_found.__code__


def _text_of(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:MAX_REASON_CHARS]
    except Exception:
        return ""


def _failure(line: str, item: Scored, what: str) -> Found:
    _take_printed()
    problem = item[2]
    who = f"problem {problem.get('problem_id')}, sample {problem.get('sample')}"
    return Found(0.0, f"{line}, {who}: {what}", failed=VerdictKind.ERROR)


def _take_printed() -> str:
    text = " ".join(_printed.getvalue().split())
    _printed.seek(0)
    _printed.truncate(0)
    return text if len(text) <= _MAX_PRINTED else text[:_MAX_PRINTED] + "…"


def _with_printed(found: Found | None) -> Found | None:
    text = _take_printed()
    return None if found is None else found._replace(reason=f"{found.reason} (printed: {text})".lstrip())
