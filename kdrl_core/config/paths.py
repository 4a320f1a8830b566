"""Paths in recipes: plain, `builtin:…` for files shipped with kdrl, `package:…` for files of an installed package."""

import importlib.util
from pathlib import Path

from kdrl_core.errors import RecipeError

ASSETS = Path(__file__).parent.parent / "assets"


def resolve_path(value: str) -> Path:
    """The absolute path that a recipe's `value` means. It need not exist, except for the package of `package:`.

    Raises:
        RecipeError: `builtin:` leaves the shipped assets, or the package of `package:` is not installed.
    """
    scheme, _, rest = value.partition(":")
    if scheme == "builtin":
        path = (ASSETS / rest).resolve()
        if not path.is_relative_to(ASSETS.resolve()):
            raise RecipeError(f"path '{value}' leaves kdrl's assets; name a file below builtin:")
        return path
    if scheme == "package":
        package, _, inner = rest.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise RecipeError(f"path '{value}': package {package} is not installed; run pip install {package}")
        return Path(spec.submodule_search_locations[0], inner).resolve()
    return Path(value).expanduser().absolute()
