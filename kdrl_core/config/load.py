"""Recipes as YAML: shipped by name or read from a file, changed by `--set a.b=value`, hashed and written back."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kdrl_core.config.earlier import completed, hashed
from kdrl_core.config.faults import did_you_mean, explain
from kdrl_core.config.paths import read_small
from kdrl_core.config.plain_yaml import MAX_CHARS, NotYamlError, parse_yaml
from kdrl_core.config.recipe import Recipe
from kdrl_core.config.secrets import may_hold_key, shown
from kdrl_core.errors import RecipeError

RECIPES_DIR = Path(__file__).parent / "recipes"


def list_recipes() -> list[str]:
    """Names of the recipes that are shipped."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        source: name of a shipped recipe, or path of a YAML file.
        overrides: `a.b.c=value` each; value is YAML (`null` clears a field, lists as `[a, b]`).

    Raises:
        RecipeError: no such recipe, not YAML, or a field that is unknown, has the wrong type, is out of bounds or
            contradicts another. The message names the field and the remedy of every fault.
    """
    values = completed(read_fields(_find(source), what="recipe"))
    for override in overrides:
        _apply(values, override)
    return validate_recipe(values, origin=str(source))


def read_fields(path: Path, *, what: str) -> dict[str, Any]:
    """The fields of a YAML file. Raises RecipeError if it has none; the message calls the file `what`."""
    try:
        text = read_small(path, most_bytes=4 * MAX_CHARS, follow_links=True).decode()
        values = parse_yaml(text, hide=may_hold_key(text))
    except (NotYamlError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{what} {path}: cannot be read as YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{what} {path}: a mapping of fields is expected, found {type(values).__name__}")
    return values


def parse_value(text: str, *, field: str) -> Any:
    """A value as YAML, as `--set` takes it. Raises RecipeError that names the field."""
    try:
        return parse_yaml(text, hide=may_hold_key(f"{field}={text}"))
    except NotYamlError as error:
        raise RecipeError(f"{field}: the value is not YAML: {_one_line(error)}") from error


def validate_recipe(values: Mapping[str, Any], *, origin: str) -> Recipe:
    """Validate plain values as a recipe; `origin` names their source in errors. Raises RecipeError."""
    try:
        return Recipe.model_validate_json(json.dumps(values))
    except ValidationError as error:
        # Not `from error`: pydantic keeps the values, and a log would show them with the traceback.
        raise RecipeError(f"recipe {origin}: {explain(error)}") from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"recipe {origin}: {_one_line(error)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out; `load_recipe` of it gives an equal recipe.

    Raises RecipeError if it is too long to be read again: unusual characters take more room when written out.
    """
    values = recipe.model_dump(mode="json")
    # PyYAML writes U+0085 and U+2028 so that it misreads them itself; escaped they come back.
    plain = json.dumps(values, ensure_ascii=False).isprintable()
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=plain, width=100)
    if len(text) > MAX_CHARS:
        raise RecipeError(f"recipe {recipe.name}: written out it has more than {MAX_CHARS:,} characters; shorten it")
    return text


def config_hash(recipe: Recipe) -> str:
    """sha256 over the canonical JSON of every field that is not at its default: equal recipes have equal hashes, and a
    field that is added changes no old hash."""
    canonical = json.dumps(hashed(recipe), sort_keys=True, separators=(",", ":"))
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


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"--set {shown(override)}: expected FIELD=VALUE, e.g. --set stage2.beta.init=2e-3")
    try:
        value = parse_yaml(text, hide=may_hold_key(override))
    except NotYamlError as error:
        raise RecipeError(f"--set {shown(override)}: the value is not YAML: {_one_line(error)}") from error
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
        raise RecipeError(f"--set {shown(override)}: '{key}' is a single value, it has no fields")
    return child


def _index(target: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(target):
        raise RecipeError(
            f"--set {shown(override)}: '{key}' is no position in a list of {len(target)} (counted from 0)"
        )
    return int(key)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
