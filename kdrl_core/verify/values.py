r"""What a value of a data file means: as a ground truth, as the question of a prompt, as a response.

Published sets write the same things in several ways. A truth is text, a whole number, a decimal, a list of one, a JSON
text of such a list (`["204"]`, Skywork), the line after `####` (GSM8K), or the last `\boxed{}` of a solution (MATH). A
question is text or a list of chat messages with one message of a user.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from kdrl_core.verify.faults import Fault
from kdrl_core.verify.screening import last_box

MISSING = object()
"""Stands for a field that a row does not have."""

FINAL_LINE = "####"
"""GSM8K writes the answer in a last line that begins so."""

_BOX = re.compile(r"\\(?:boxed|fbox)")
_OTHER_BOXES = re.compile(r"\\(?:boxed|fbox)(?: +(?P<bare>[^{}$\n]+)|(?= *\{))")
r"""`\boxed 2` up to the dollar, and `\fbox{2}`: a few solutions of MATH."""

_SYSTEM = ("system", "developer")
_MAX_SHOWN = 40


class RowError(Exception):
    """Why a row cannot be used: the problem, and the field in which it is."""

    def __init__(self, problem: str, name: str | None = None) -> None:
        super().__init__(problem)
        self.name = name

    def at(self, where: str, row: int) -> Fault:
        """The fault of a row with this place and number."""
        return Fault(where=where, row=row, field=self.name, problem=str(self))


def value_at(row: Mapping[str, Any], path: str) -> object:
    """The value at a path like `reward_model.ground_truth`; a column whose name itself has dots comes first. MISSING if
    the row has no such field."""
    if path in row or "." not in path:
        return row.get(path, MISSING)
    value: object = row
    for name in path.split("."):
        value = value.get(name, MISSING) if isinstance(value, Mapping) else MISSING
    return value


def truth_text(value: object) -> str:
    """The ground truth that a value means, as text. Raises RowError if it means none, or more than one."""
    if isinstance(value, str):
        return _truth_in_text(value)
    if type(value) in (int, float, Decimal):
        return number_text(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return _only_one(value)
    raise RowError(f"text is expected, found {kind_of(value)}")


def number_text(value: Any) -> str:
    """A number in digits: 5.0, which often was an integer before pandas read it, is `5`; 1e-05 is `0.00001`."""
    if isinstance(value, int):  # may be larger than any float
        return str(value)
    if not math.isfinite(value):
        raise RowError(f"{value} is no number")
    exact = Decimal(repr(value) if isinstance(value, float) else value)
    return str(int(exact)) if exact == int(exact) else format(exact.normalize(), "f")


def exact_floats(column: Any) -> Any:
    """An Arrow column of floats in double precision, with the digits that were written: 5.1 stays 5.1."""
    return column.cast("string").cast("double")


def _truth_in_text(text: str) -> str:
    if FINAL_LINE in text:
        return text.rpartition(FINAL_LINE)[2]
    if has_box(text):
        content, is_closed = last_box(_OTHER_BOXES.sub(_as_box, text))
        if content is None or not is_closed:
            raise RowError(r"the last \boxed{ is not closed")
        return content
    return _truth_in_json(text) if text.lstrip().startswith(("[", '{"')) else text


def has_box(text: str) -> bool:
    r"""Whether a text has a \boxed{} or \fbox{}."""
    return _BOX.search(text) is not None


def _as_box(found: re.Match[str]) -> str:
    return r"\boxed" if found["bare"] is None else rf"\boxed{{{found['bare'].strip()}}}"


def _truth_in_json(text: str) -> str:
    """The truth in a JSON text. A list of several numbers is left as it is: it may be an interval."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if text.lstrip().startswith(('["', "['", '{"')):
            raise RowError(f'{shortened(text)} begins like JSON but is not; write ["204"] or 204') from None
        return text
    if not isinstance(value, list):
        raise RowError(f"text is expected, found JSON of {kind_of(value)}")
    if len(value) > 1 and all(type(each) in (int, float) for each in value):
        return text
    return _only_one(value)


def _only_one(values: Sequence[object]) -> str:
    found = list(dict.fromkeys((each if isinstance(each, str) else truth_text(each)).strip() for each in values))
    if not found:
        raise RowError("an empty list; one answer is expected")
    if len(found) > 1:
        raise RowError(
            f"{len(found)} answers ({', '.join(map(shortened, found[:2]))}); a list may mean any of them or all of "
            "them: leave one, or write them as one text"
        )
    return found[0]


def question_text(value: object) -> tuple[str, bool]:
    """The question that a prompt asks, and whether it has a system message, which is left out.

    Raises RowError if it is not one message of a user; its `name` is the place within the prompt, such as `[0].role`.
    """
    if isinstance(value, str) and value.startswith("[{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("begins like a list of messages but is not JSON; write it as JSON") from None
    if isinstance(value, str):
        return value, False
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise RowError(f"text or a list of messages is expected, found {kind_of(value)}")
    asked = [(place, message) for place, message in enumerate(value) if _role(message) not in _SYSTEM]
    if len(asked) != 1:
        raise RowError(f"{len(asked)} messages without the system's, one is expected")
    [(place, message)] = asked
    if _role(message) != "user":
        raise RowError(f"{_role(message)!r}, 'user' is expected", f"[{place}].role")
    return _content(message, f"[{place}].content"), len(value) > 1


def response_text(value: object) -> str:
    """A response: text, or the content of the last message of an assistant. Raises RowError if there is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes) and value and isinstance(value[0], Mapping):
        own = [message for message in value if _role(message) == "assistant"]
        if not own:
            raise RowError("no message of an assistant among the messages")
        return _content(own[-1], ".content")
    raise RowError(f"text is expected, found {kind_of(value)}")


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, Mapping) else None


def _content(message: Mapping[str, Any], name: str) -> str:
    """The text of a message: text, or a list of parts that are all text."""
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            raise RowError(f"a part of type {other[0]!r}, kdrl reads text alone", name)
        return "".join(str(part.get("text") or "") for part in content)
    if content is None:
        raise RowError("missing", name)
    if not isinstance(content, str):
        raise RowError(f"text is expected, found {kind_of(content)}", name)
    return content


def kind_of(value: object) -> str:
    """Type and value as messages name them."""
    if value is None:
        return "null"
    kinds = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return f"{kinds.get(type(value), type(value).__name__)} ({shortened(value)})"


def shortened(value: object) -> str:
    """The value as Python writes it, at most 40 characters of it."""
    shown = repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
