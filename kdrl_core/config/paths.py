"""Paths in recipes: plain, `builtin:…` for files shipped with kdrl, `package:…` for files of an installed package."""

import importlib.util
from pathlib import Path

from kdrl_core.errors import RecipeError

ASSETS = Path(__file__).parent.parent / "assets"


def resolve_path(value: str) -> Path:
    """The absolute path that a recipe's `value` means. It need not exist, except for the package of `package:`.

    Raises:
        RecipeError: the path leaves the shipped assets or the package, or the package is not installed.
    """
    scheme, _, rest = value.partition(":")
    if scheme == "builtin":
        return _below(ASSETS, rest, value)
    if scheme == "package":
        package, _, inner = rest.partition("/")
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # no parent package, or no package name at all
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise RecipeError(f"path '{value}': package {package} is not installed; run pip install {package}")
        return _below(Path(spec.submodule_search_locations[0]), inner, value)
    return Path(value).expanduser().absolute()


def _below(root: Path, inner: str, value: str) -> Path:
    path = (root / inner).resolve()
    if not path.is_relative_to(root.resolve()):
        raise RecipeError(f"path '{value}' leaves {root}; name a file below it, or give a plain path")
    return path
