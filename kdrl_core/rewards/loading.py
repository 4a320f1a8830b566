"""The functions of a recipe's reward: found, imported and checked. User code runs here, so only in workers.

A function is a `def` of a file or module, with the arguments `(response, answer, problem)` and those that the recipe
gives; an `async def` if the recipe says how it is called. Everything else is refused with file, line and remedy: a
lambda, a method, an object.
"""

import inspect
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from kdrl_core.errors import RecipeError
from kdrl_core.objectives.plugins import Reference, is_reference, parse_reference
from kdrl_core.rewards.builtin import BUILT_IN_FUNCTIONS

_CONTRACT = "def score(response: str, answer: str, problem: dict) -> float"


class Term(NamedTuple):
    """A term of the reward as a worker takes it: the fields of `RewardFunction` as plain values. Workers do without
    the recipe's models, whose import would take half of their start."""

    function: str
    label: str
    arguments: dict[str, Any]
    batch_size: int | None = None
    calls: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class LoadedFunction:
    """A function that is ready to be called."""

    label: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    where: str
    """File and line of its `def`."""
    may_change_arguments: bool = field(init=False)
    """Whether an argument of the recipe is a list or a dictionary, which the function could change."""

    def __post_init__(self) -> None:
        held = any(isinstance(value, list | dict) for value in self.arguments.values())
        object.__setattr__(self, "may_change_arguments", held)


def load_function(term: Term) -> LoadedFunction:
    """Import the function of a term and check that it can be called.

    Raises:
        RecipeError: it is not there, cannot be imported, is no function, or has another signature.
    """
    if is_reference(term.function):
        reference = parse_reference(term.function)
        found = _imported(reference)
        _require_function(found, reference, is_called=term.calls is not None)
    else:
        found = BUILT_IN_FUNCTIONS[term.function]
    where = place_of_function(found)
    try:
        inspect.signature(found).bind("", "", {}, **term.arguments)
    except TypeError as error:
        remedy = "correct `arguments` in the recipe"
        if is_reference(term.function):
            remedy = f"write {_contract(term)}, with a parameter for each of the recipe's `arguments`"
        raise RecipeError(
            f"{term.function}, {where}: it cannot be called as {_called(term)}: {error}; {remedy}"
        ) from error
    return LoadedFunction(term.label, found, dict(term.arguments), where)


def place_of_function(function: Any) -> str:
    """`file:line` of a function's `def`."""
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def failing_line(error: BaseException, function: Any) -> str:
    """`file:line` of the innermost call in the function's own file that raised; of its `def` if none is there."""
    file = inspect.unwrap(function).__code__.co_filename
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}:{lines[-1]}" if lines else place_of_function(function)


def _contract(term: Term) -> str:
    if term.batch_size:
        return "def score(responses: list[str], answers: list[str], problems: list[dict]) -> list[float]"
    return f"async {_CONTRACT}" if term.calls is not None else _CONTRACT


def _called(term: Term) -> str:
    given = ("responses", "answers", "problems") if term.batch_size else ("response", "answer", "problem")
    return f"{term.function.rpartition(':')[2]}({', '.join([*given, *(f'{key}=…' for key in term.arguments)])})"


def _imported(reference: Reference) -> Any:
    try:
        return reference.load()
    except RecipeError as error:
        cause = error.__cause__
        if cause is None:
            raise
        lines = [frame for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == reference.source]
        line = cause.lineno if isinstance(cause, SyntaxError) else lines[-1].lineno if lines else None
        raise RecipeError(f"{error}" + (f" (line {line})" if line else "")) from cause


def _require_function(found: Any, reference: Reference, *, is_called: bool) -> None:
    """Refuse what is no plain `def`, or no `async def` where the recipe has `calls`."""
    code = getattr(found, "__code__", None)
    line = code.co_firstlineno if code is not None else line_of(reference)
    where = f"{reference}, line {line}" if line else f"{reference}"
    if not isinstance(found, FunctionType):
        what = "a method" if inspect.ismethod(found) else f"{type(found).__name__}"
        raise RecipeError(f"{where}: it is {what} and not a function; write a `{_CONTRACT}` that calls it")
    plain = inspect.unwrap(found)
    if plain.__name__ == "<lambda>":
        raise RecipeError(f"{where}: it is a lambda, whose errors could not be named; write {_CONTRACT}")
    if "." in plain.__qualname__ and "<locals>" not in plain.__qualname__:
        raise RecipeError(f"{where}: {plain.__qualname__} is a method; write a `{_CONTRACT}` that calls it")
    if inspect.isgeneratorfunction(found) or inspect.isasyncgenfunction(found):
        raise RecipeError(f"{where}: it is a generator; write {_CONTRACT} that returns the value itself")
    if inspect.iscoroutinefunction(found) and not is_called:
        raise RecipeError(f"{where}: it is an async def; say in the recipe how it is called, at least `calls: {{}}`")
    if is_called and not inspect.iscoroutinefunction(found):
        raise RecipeError(f"{where}: it is no async def; leave `calls` out of the recipe, or write async def")


def line_of(reference: Reference) -> int | None:
    """The line on which a name of the module is first set; None if it cannot be read."""
    file = reference.located()
    try:
        text = "" if file is None else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = re.search(rf"^(?:class\s+|(?:async\s+)?def\s+)?{re.escape(reference.function)}\b", text, re.M)
    return text.count("\n", 0, match.start()) + 1 if match else None
