"""Recipes as YAML: shipped by name or read from a file, changed by `--set a.b=value`, hashed and written back."""

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from kdrl_core.config.recipe import Recipe
from kdrl_core.errors import RecipeError

RECIPES_DIR = Path(__file__).parent / "recipes"
_MERGE_TAG = "tag:yaml.org,2002:merge"
_MAX_CHARS = 2**17
"""Of a recipe, and of one with its aliases written out: shipped ones have 5,000. A few lines of aliases can stand for
terabytes."""
_MAX_SHOWN_CHARS = 200
_MAY_HOLD_KEY = ("server", "api_key", "mlflow_uri")
"""Fields in which somebody may write a key, though none belongs there: what they hold is shown nowhere."""
_MAX_SHOWN_FAULTS = 20


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-6 is a number (YAML 1.2), not the string that PyYAML reads, 2026-01-31 is a string,
    and keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE_TAG]
        seen: set[Any] = set()
        for key in keys:
            if isinstance(key, Hashable):  # the standard method refuses the others
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def list_recipes() -> list[str]:
    """Names of the recipes that are shipped."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        source: name of a shipped recipe, or path of a YAML file.
        overrides: `a.b.c=value` each; value is YAML (`null` clears a field, lists as `[a, b]`).

    Raises:
        RecipeError: no such recipe, not YAML, or a field that is unknown, of the wrong type, out of bounds or in
            contradiction with another; every fault is named with its field and remedy.
    """
    values = read_fields(_find(source), what="recipe")
    for override in overrides:
        _apply(values, override)
    return validate_recipe(values, origin=str(source))


def read_fields(path: Path, *, what: str) -> dict[str, Any]:
    """The plain values of a YAML file with named fields. Raises RecipeError, which calls it `what`, if it is none."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_CHARS + 1)
        values = _parse(text, may_hold_key=_may_hold_key(text))
    except (_NotYamlError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{what} {path}: cannot be read as YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{what} {path}: a mapping of fields is expected, found {type(values).__name__}")
    return values


def parse_value(text: str, *, field: str) -> Any:
    """A value as YAML, as `--set` takes it. Raises RecipeError that names the field."""
    try:
        return _parse(text, may_hold_key=_may_hold_key(f"{field}={text}"))
    except _NotYamlError as error:
        raise RecipeError(f"{field}: the value is not YAML: {_one_line(error)}") from error


def validate_recipe(values: Mapping[str, Any], *, origin: str) -> Recipe:
    """Validate plain values as a recipe; `origin` names their source in errors. Raises RecipeError."""
    try:
        return Recipe.model_validate_json(json.dumps(values))
    except ValidationError as error:
        faults = [_explain(fault) for fault in error.errors()[:_MAX_SHOWN_FAULTS]]
        if more := error.error_count() - len(faults):
            faults.append(f"and {more} more")
        # Not `from error`: pydantic keeps the values, and a log would show them with the traceback.
        raise RecipeError(f"recipe {origin}: {'; '.join(faults)}") from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"recipe {origin}: {_one_line(error)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out; `load_recipe` of it gives an equal recipe.

    Raises RecipeError if it is too long for that, which texts of unusual characters can bring about.
    """
    values = recipe.model_dump(mode="json")
    # PyYAML writes U+0085 and U+2028 so that it misreads them itself; escaped they come back.
    plain = json.dumps(values, ensure_ascii=False).isprintable()
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=plain, width=100)
    if len(text) > _MAX_CHARS:
        raise RecipeError(f"recipe {recipe.name}: written out it has more than {_MAX_CHARS:,} characters; shorten it")
    return text


def config_hash(recipe: Recipe) -> str:
    """sha256 over the canonical JSON of every field that is not at its default: equal recipes have equal hashes."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)  # so that a field that is added changes no old hash
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(
                f"recipe file {path} does not exist; give a YAML file or one of {', '.join(list_recipes())}"
            )
        return path
    if str(source) in list_recipes():
        return RECIPES_DIR / f"{source}.yaml"
    raise RecipeError(
        f"no recipe '{source}'{did_you_mean(str(source), list_recipes())}; "
        f"shipped: {', '.join(list_recipes())}, or give the path of a .yaml file"
    )


class _NotYamlError(ValueError):
    """The text is no YAML, or more of it than a recipe can be."""


def _parse(text: str, *, may_hold_key: bool = False) -> Any:
    """The plain values of a YAML text. Raises _NotYamlError before much time or memory is spent on a hostile one.

    Errors show a piece of the text, unless it may hold a key.
    """
    too_long = f"it has more than {_MAX_CHARS:,} characters, aliases written out"
    if len(text) > _MAX_CHARS:
        raise _NotYamlError(too_long)
    try:
        node = (loader := _Loader(text)).get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > _MAX_CHARS:
            raise _NotYamlError(too_long)
        return _unshared(loader.construct_document(node))
    except _NotYamlError:
        raise
    except (yaml.YAMLError, RecursionError) as error:
        if may_hold_key:
            raise _NotYamlError(_place(error)) from None
        raise _NotYamlError(str(error)) from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:  # of `!!int x`, …
        if may_hold_key:
            raise _NotYamlError("a value is not of the kind that its tag says") from None
        raise _NotYamlError(f"a value is not of the kind that its tag says ({error})") from error


def _may_hold_key(text: str) -> bool:
    return any(name in text for name in _MAY_HOLD_KEY)


def _place(error: Exception) -> str:
    """Where a YAML text is wrong, without what stands there."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "too deeply nested"
    return f"{where} (not shown, as it may hold a key)"


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters of a node with its aliases written out; about, and without writing them."""
    if (size := known.get(id(node))) is not None:
        return size
    if isinstance(node, yaml.ScalarNode):
        size = 1 + len(node.value)
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        size = 1 + sum(_written_out(child, known) for child in children)
    known[id(node)] = size
    return size


def _unshared(value: Any) -> Any:
    """A copy in which what YAML aliases share stands apart, so that an override changes one field only."""
    if isinstance(value, dict):
        return {key: _unshared(child) for key, child in value.items()}
    return [_unshared(child) for child in value] if isinstance(value, list) else value


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"--set {_short(override)}: expected FIELD=VALUE, e.g. --set stage2.beta.init=2e-3")
    try:
        value = _parse(text, may_hold_key=_may_hold_key(override))
    except _NotYamlError as error:
        raise RecipeError(f"--set {_short(override)}: the value is not YAML: {_one_line(error)}") from error
    *parents, leaf = name.split(".")
    target: Any = values
    for key in parents:
        target = _child(target, key, override)
    if isinstance(target, list):
        target[_index(target, leaf, override)] = value
    else:
        target[leaf] = value


def _child(target: Any, key: str, override: str) -> Any:
    child: Any
    if isinstance(target, list):
        child = target[_index(target, key, override)]
    else:
        if target.get(key) is None:
            target[key] = {}
        child = target[key]
    if not isinstance(child, (dict, list)):
        raise RecipeError(f"--set {_short(override)}: '{key}' is a single value, it has no fields")
    return child


def _index(target: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(target):
        raise RecipeError(
            f"--set {_short(override)}: '{key}' is no position in a list of {len(target)} (counted from 0)"
        )
    return int(key)


def _explain(fault: Any) -> str:
    """One pydantic error as `field 'a.b': what; remedy`."""
    location = [str(part) for part in fault["loc"]]
    field = ".".join(location) or "recipe"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        known = sorted(_fields_at(location[:-1]))
        guess = did_you_mean(location[-1], known)
        message = f"unknown field{guess}; known here: {', '.join(known)}"
    elif fault["type"] == "missing":
        message = "required but not given"
    elif not isinstance(fault["input"], (dict, list)) and not any(_may_hold_key(part) for part in location):
        message = f"{message}, got {_short(repr(fault['input']))}"
    return f"field '{field}': {message}"


def _fields_at(location: Iterable[str]) -> set[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        if part in model.model_fields:
            model = _section_of(model.model_fields[part].annotation) or model
    return set(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in (Union, UnionType, list):
        for option in get_args(annotation):
            if option is not NoneType and (found := _section_of(option)):
                return found
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean '…'?` of the nearest known word; empty if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def _short(text: str) -> str:
    """Of a text that somebody gave, as much as a message needs; of what may hold a key, its field alone."""
    if _may_hold_key(text):
        name, equals, _ = text.partition("=")
        return name if equals else "(not shown, as it may hold a key)"
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
