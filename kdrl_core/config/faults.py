"""Faults of a recipe in words: the field, what is wrong, and what to set instead."""

import difflib
import json
from collections.abc import Iterable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kdrl_core.config.plain_yaml import NotYamlError, parse_yaml
from kdrl_core.config.recipe import Recipe
from kdrl_core.config.secrets import may_hold_key, shown

_MAX_SHOWN = 20


def explain(error: ValidationError) -> str:
    """The first faults of a recipe, each as `field 'a.b': what; remedy`, and how many more there are."""
    faults = [_explain(fault) for fault in error.errors()[:_MAX_SHOWN]]
    if more := error.error_count() - len(faults):
        faults.append(f"and {more} more")
    return "; ".join(faults)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`, did you mean '…'?` with the nearest known word; empty if none is near, as to what is no text at all."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def _explain(fault: Any) -> str:
    location = [str(part) for part in fault["loc"]]
    field = ".".join(location) or "recipe"
    value = fault["input"]
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        known = sorted(_section_at(location[:-1]).model_fields)
        message = f"unknown field{did_you_mean(location[-1], known)}; known here: {', '.join(known)}"
    elif fault["type"] == "missing":
        message = "required but not given"
    elif fault["type"] == "model_type":
        message = _not_a_section(location, value)
    elif not isinstance(value, (dict, list)) and not _holds_key(location):
        message = f"{message}, got {shown(repr(value))}"
    return f"field '{field}': {message}"


def _not_a_section(location: Sequence[str], value: Any) -> str:
    """A value where a section is expected: the section's fields, and the field that the value was meant for."""
    fields, field = _section_at(location).model_fields, ".".join(location)
    got, remedy = "", f"set one of them, such as {field}.{next(iter(fields))}"
    if meant := _field_for(_section_at(location), value):
        name, text = meant
        remedy = f"set {field}.{name}"
        if _has_choices(fields[name].annotation) or (text == shown(text) and not _holds_key(location)):
            remedy += f"={text}"
    elif not isinstance(value, list) and not _holds_key(location):
        got = f", got {shown(repr(value))}"
    if _is_optional(location):
        remedy += f", or {field}=null for none"
    return f"it has fields of its own ({', '.join(fields)}){got}; {remedy}"


def _field_for(section: type[BaseModel], value: Any) -> tuple[str, str] | None:
    """The field of a section that a value was meant for, and the value as `--set` takes it; None if that is unclear.

    Among the fields that accept the value it is the only one with a list of choices, else the first required one, else
    the only one, if the section has no required fields.
    """
    if value is None or isinstance(value, list):
        return None
    fields = section.model_fields
    forms: dict[str, Any] = {}
    for name in fields:
        for form in (value, [value]):
            if name not in forms and _takes(section, name, form):
                forms[name] = form
    of_choice = [name for name in forms if isinstance(value, str) and _has_choices(fields[name].annotation)]
    required = [name for name in forms if fields[name].is_required()]
    others = [] if any(field.is_required() for field in fields.values()) else list(forms)
    for names in (of_choice, required[:1], others):
        if len(names) == 1:
            return names[0], _as_yaml(forms[names[0]])
    return None


def _takes(section: type[BaseModel], name: str, value: Any) -> bool:
    try:
        section.model_validate_json(json.dumps({name: value}))
    except ValidationError as error:
        return all(fault["loc"][:1] != (name,) for fault in error.errors())
    return True


def _has_choices(annotation: Any) -> bool:
    return get_origin(annotation) is Literal or any(map(_has_choices, get_args(annotation)))


def _as_yaml(value: Any) -> str:
    """A value as `--set` takes it: text without quotes where it means the same."""
    if isinstance(value, str):
        try:
            if parse_yaml(value) == value:
                return value
        except NotYamlError:
            pass
    return json.dumps(value, ensure_ascii=False)


def _holds_key(location: Iterable[str]) -> bool:
    return any(map(may_hold_key, location))


def _section_at(location: Iterable[str]) -> type[BaseModel]:
    """The innermost section on the way to a field."""
    section: type[BaseModel] = Recipe
    for part in location:
        if part in section.model_fields:
            section = _section_of(section.model_fields[part].annotation) or section
    return section


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in (Union, UnionType, list, dict):
        return next((found for option in get_args(annotation) if (found := _section_of(option))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _is_optional(location: Sequence[str]) -> bool:
    field = _section_at(location[:-1]).model_fields.get(location[-1])
    return field is not None and NoneType in get_args(field.annotation)
