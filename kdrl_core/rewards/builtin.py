r"""The reward functions that kdrl ships. Their contract is that of a user's own: `(response, answer, problem, …)`.

`exact`, `choice` and `numeric` compare the *given* answer with the true one. It is the last match of `pattern` (its
first group, if it has one); without a pattern, the last ``\boxed{}`` outside the thought. `math` is the verifier's
comparison (docs/verification.md). A recipe's `math` runs in the verifier's own workers; this one is for functions that
build on it.
"""

import ast
import json
import math as maths
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from textwrap import dedent
from typing import Any

from kdrl_core.rewards.code_runs import run_tests
from kdrl_core.rewards.score import Score
from kdrl_core.verify.accuracy import compare_answer, compare_text
from kdrl_core.verify.screening import Outcome, answer_region, last_box, make_verdict, screen
from kdrl_core.verify.words import same_choice

Problem = dict[str, Any]
_NUMBER = re.compile(r"[+-]?(?:(?:\d+(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{(\d{1,50})\}\{(\d{1,50})\}|([+-]?)(\d{1,50})\s*/\s*(\d{1,50})")
_BLOCK = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\n`]*)\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
_LANGUAGE = re.compile(r"[\w+#-]*")
_ANSWER = re.compile(r".*\banswer(?:\s+is)?\b\s*:?\s*(\S.*)", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Ja-j])\)?\.?")
_DEFINING = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
_LONGEST_CPU_S = 3_600
_MAX_SHOWN = 200


def math(response: str, answer: str, problem: Problem, *, require_format: bool = True) -> Score:
    """1 if the answer is mathematically equal to the true one (and the format is right), else 0."""
    options: Any = {"require_format": require_format, "think_opened": problem.get("think_opened", False)}
    settled = screen((response, answer), **options)
    if isinstance(settled, tuple):
        form, found = settled
        if not isinstance(found, Outcome):
            found = (compare_text if found.is_text else compare_answer)(found.answer, found.ground_truth)
        settled = make_verdict(form, found, **options)
    return Score(settled.reward, settled.reason, extracted=settled.extracted)


def exact(
    response: str, answer: str, problem: Problem, *, pattern: str | None = None, ignore_case: bool = False
) -> Score:
    """1 if the given answer has the text of the true one, apart from white space, else 0."""
    given = _given(response, problem, pattern)
    if given is None:
        return _nothing(pattern)
    texts = [" ".join(text.split()) for text in (given, answer)]
    if ignore_case:
        texts = [text.casefold() for text in texts]
    return _judged(texts[0] == texts[1], "text", given)


def choice(response: str, answer: str, problem: Problem, *, pattern: str | None = None) -> Score:
    """1 if the given answer chooses the true letter, A to J, else 0. Without pattern and box, the last line counts, or
    what stands in it behind the word "answer". A lone letter may be small; marks of Markdown do not count."""
    given = _given(response, problem, pattern)
    if given is None and pattern is None:
        lines = answer_region(response, think_opened=problem.get("think_opened", False)).strip().splitlines()
        line = _unmarked(lines[-1]) if lines else ""
        said = _ANSWER.fullmatch(line)
        given = said[1] if said else line or None
    if given is None:
        return _nothing(pattern)
    is_right = same_choice(_letter(given), _letter(answer))
    if is_right is None:
        raise ValueError(
            f"the true answer is {answer[:_MAX_SHOWN]!r}, which is not a letter A to J; correct the problem's answer"
        )
    return _judged(is_right, "choice", given)


def numeric(
    response: str,
    answer: str,
    problem: Problem,
    *,
    pattern: str | None = None,
    absolute: float = 0.0,
    relative: float = 0.0,
) -> Score:
    """1 if the given number is the true one within `absolute` or `relative` × the true one, else 0.

    A number is decimal (with thousands separators or an exponent) or a fraction; dollar signs around it do not count.
    """
    if absolute < 0 or relative < 0:
        raise ValueError(f"absolute={absolute} and relative={relative} must not be negative; correct the arguments")
    true = _number_in(answer)
    if true is None:
        raise ValueError(
            f"the true answer is {answer[:_MAX_SHOWN]!r}, which is not a number; correct the problem's answer"
        )
    given = _given(response, problem, pattern)
    if given is None:
        return _nothing(pattern)
    number = _number_in(given)
    if number is None:
        return Score(0.0, "no number is given", extracted=given)
    difference = abs(number - true)
    # As text: the number nearest to 0.3 that a computer has is below 0.3.
    is_right = difference <= max(Fraction(str(absolute)), Fraction(str(relative)) * abs(true))
    return Score(float(is_right), f"differs by {_size(difference)}", extracted=given)


def regex(response: str, answer: str, problem: Problem, *, pattern: str, is_whole: bool = False) -> Score:
    """1 if the response without its thought has a match of `pattern` (`is_whole`: is one), else 0."""
    text = answer_region(response, think_opened=problem.get("think_opened", False)).strip()
    found = re.fullmatch(pattern, text) if is_whole else re.search(pattern, text)
    return Score(float(found is not None), "the pattern matches" if found else "the pattern does not match")


def json_schema(response: str, answer: str, problem: Problem, *, schema: dict[str, Any]) -> Score:
    """1 if the last block of JSON outside the thought, else the response without its thought, is JSON that meets the
    schema, else 0. A schema refers to itself alone."""
    from jsonschema.validators import validator_for
    from referencing import Registry

    text = answer_region(response, think_opened=problem.get("think_opened", False))
    block = _last_block(text, "json")
    try:
        value = json.loads(text if block is None else block, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return Score(0.0, f"no JSON: {error}")
    fault = next(validator_for(schema)(schema, registry=Registry()).iter_errors(value), None)
    if fault is None:
        return Score(1.0, "meets the schema")
    place = "/".join(map(str, fault.absolute_path)) or "the whole"
    return Score(0.0, f"{place}: {fault.message[:_MAX_SHOWN]}")


def length_penalty(response: str, answer: str, problem: Problem, *, max_tokens: int, cache: int) -> Score:
    """The soft overlong punishment of DAPO (Eq. 13), in [−1, 0], of the |y| tokens of a response, EOS included:

    0 up to L_max − L_cache; then it falls linearly to −1 at L_max; −1 beyond. `max_tokens` is L_max, `cache` L_cache.
    """
    if not 0 < cache <= max_tokens:
        raise ValueError(f"cache={cache} must be above 0 and at most max_tokens={max_tokens}; correct the arguments")
    length: int = problem["length"]
    value = min(0.0, max(-1.0, (max_tokens - cache - length) / cache))
    return Score(value, f"{length} tokens of {max_tokens}")


def python_tests(response: str, answer: str, problem: Problem, *, cpu_s: int = 5, memory_mb: int = 512) -> Score:
    """1 if the Python code of the last code block outside the thought passes the tests, which are the true answer, else
    0. Tests are Python code that runs behind it and raises if it is wrong, such as lines of `assert`.

    Code and tests run in a process of their own (:mod:`kdrl_core.rewards.jail`).
    """
    if not 1 <= cpu_s <= _LONGEST_CPU_S or memory_mb < 64:
        bounds = f"cpu_s={cpu_s} must be from 1 to {_LONGEST_CPU_S}, memory_mb={memory_mb} at least 64"
        raise ValueError(f"{bounds}; correct the arguments")
    compile(answer, "tests", "exec", dont_inherit=True)
    if not answer.strip():
        raise ValueError("the true answer has no tests; correct the problem's answer")
    if all(isinstance(one, _DEFINING) for one in ast.parse(answer).body):
        raise ValueError("the tests only define things, so any code passes; add the lines that call them")
    code = _last_block(
        answer_region(response, think_opened=problem.get("think_opened", False)), "python", "python3", "py"
    )
    if code is None:
        return Score(0.0, "no code block outside the thought")
    told = run_tests(code, answer, cpu_s=cpu_s, memory_mb=memory_mb)
    return Score(float(told is None), told or "the tests pass", extracted=code)


BUILT_IN_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (math, exact, choice, numeric, regex, json_schema, length_penalty, python_tests)
}
_TRIALS = {"choice": (r"\boxed{A}", "A"), "json_schema": ("1", ""), "python_tests": ("```\npass\n```", "pass")}
"""Response and answer with which a function looks at all of its arguments."""


def try_built_in(name: str, arguments: dict[str, Any]) -> None:
    """Call a function of kdrl once. Raises ValueError, or what the function raises, if an argument is wrong."""
    from pydantic import ConfigDict, ValidationError, validate_call

    response, answer = _TRIALS.get(name, (r"\boxed{1}", "1"))
    if name == "json_schema":
        from jsonschema.validators import validator_for

        _check_schema(validator_for, arguments["schema"])
    checked = validate_call(config=ConfigDict(strict=True))(BUILT_IN_FUNCTIONS[name])
    try:
        checked(response, answer, {"length": 1, "think_opened": False}, **arguments)
    except ValidationError as error:
        told = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ValueError(f"{'; '.join(told)}; correct the arguments") from error


def _check_schema(validator_for: Callable[..., Any], schema: Any) -> None:
    """Raise ValueError if a schema is none, or refers to something that it does not hold."""
    from jsonschema.exceptions import SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    if not isinstance(schema, dict):
        raise TypeError(f"schema: expected a JSON schema, an object, given {schema!r:.50}")
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"schema: {error.message}") from error
    named = list(_references(schema))
    if any(name == "$id" for name, _ in named):
        return  # it gives its parts addresses of their own
    resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
    for _, reference in named:
        try:
            resolver.lookup(reference)
        except Unresolvable as error:
            raise ValueError(f"schema: $ref {reference!r} is not in the schema; nothing is fetched for it") from error


def _references(part: Any) -> Iterator[tuple[str, str]]:
    """Each `$ref` and `$id` in a schema."""
    if isinstance(part, dict):
        yield from ((name, part[name]) for name in ("$ref", "$id") if isinstance(part.get(name), str))
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    for one in inner:
        yield from _references(one)


def _given(response: str, problem: Problem, pattern: str | None) -> str | None:
    """The given answer; None if there is none."""
    text = answer_region(response, think_opened=problem.get("think_opened", False))
    if pattern is None:
        found = last_box(text)[0]
        return found or None
    matches = list(re.finditer(pattern, text))
    given: str | None = matches[-1][1 if matches[-1].re.groups else 0] if matches else None
    return None if given is None else given.strip()


def _last_block(text: str, *languages: str) -> str | None:
    """The last code block in one of these languages; without one, the last that names no language; None: there is
    none. Each fence is read, so that the end of another block is not taken for a beginning."""
    found: dict[bool, str] = {}
    for block in _BLOCK.finditer(text.replace("\r\n", "\n")):
        named = _LANGUAGE.match(block[2].strip().lstrip("{."))
        language = named[0].lower() if named else ""
        if language in languages or not language:
            found[bool(language)] = dedent(block[3])
    return found.get(True, found.get(False))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _unmarked(line: str) -> str:
    return re.sub(r"[*`$]", "", line).strip()


def _letter(text: str) -> str:
    """A single letter as a capital; any other text as it is, without marks of Markdown."""
    plain = _unmarked(text)
    found = _LETTER.fullmatch(plain)
    return found[1].upper() if found else plain


def _size(difference: Fraction) -> str:
    try:
        shown = float(difference)
    except OverflowError:
        return "more than 1e308"
    return f"{shown:.3g}" if shown or not difference else "less than 1e-300"


def _nothing(pattern: str | None) -> Score:
    return Score(0.0, r"no \boxed{} outside the thought" if pattern is None else "no match of the pattern")


def _judged(is_right: bool, what: str, given: str) -> Score:
    return Score(float(is_right), f"{'the same' if is_right else 'another'} {what}", extracted=given)


def _number_in(text: str) -> Fraction | None:
    """The number that a text is; None if it is none."""
    text = (
        text.replace(r"\$", "").strip().strip("$").strip().replace("\u2212", "-").replace(r"\,", "").replace("{,}", ",")
    )
    if found := _FRACTION.fullmatch(text):
        sign, above, below = found[1] or found[4], found[2] or found[5], found[3] or found[6]
        return Fraction(int(above), int(below)) * (-1 if sign == "-" else 1) if int(below) else None
    if len(text) > _MAX_SHOWN or not any(char.isdigit() for char in text) or not _NUMBER.fullmatch(text):
        return None
    number = text.replace(",", "")
    return Fraction(number) if maths.isfinite(float(number)) else None
