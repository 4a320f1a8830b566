"""Paths in recipes: plain, `builtin:…` for files shipped with kdrl, `package:…` for files of an installed package,
`run:NAME` for the finished student of another run."""

import importlib.util
import os
import re
from contextlib import suppress
from pathlib import Path

from kdrl_core.errors import RecipeError, RunError

ASSETS = Path(__file__).parent.parent / "assets"
SCHEMES = ("run", "builtin", "package")
"""What may stand before a colon in place of a plain path."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def artifacts_root() -> Path:
    """`$KDRL_ARTIFACTS`, or `artifacts/` in the current folder."""
    return Path(os.environ.get("KDRL_ARTIFACTS", "artifacts")).absolute()


def validate_run_name(name: str) -> str:
    """`name`, if it is a plain folder name, so that no path leads out of the artifacts folder; else raises RunError."""
    if not _RUN_NAME.fullmatch(name) or ".." in name:
        raise RunError(
            f"run name {name!r} is not allowed: use letters, digits, '.', '_' and '-', at most 100, "
            "starting with a letter or digit and without '..'"
        )
    return name


def resolve_path(value: str) -> Path:
    """The absolute path that a recipe's `value` means. It need not exist, but the package of `package:` must.

    Raises:
        RecipeError: the path leaves the shipped assets or the package, the package is not installed, or the path has
            control characters.
        RunError: the text after `run:` is not a run name.
    """
    if _CONTROL.search(value):
        raise RecipeError(f"path {value!r} has control characters; no file that kdrl reads is named like that")
    scheme, _, rest = value.partition(":")
    if scheme == "run":
        return artifacts_root() / "runs" / validate_run_name(rest) / "student"
    if scheme == "builtin":
        return _below(ASSETS, rest, value)
    if scheme == "package":
        package, _, inner = rest.partition("/")
        spec = None
        if package.isidentifier():  # to find a package inside another, Python would import the other, so run its code
            with suppress(ValueError):  # a module without a spec, like __main__
                spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise RecipeError(f"path '{value}': package {package} is not installed; run pip install {package}")
        return _below(Path(spec.submodule_search_locations[0]), inner, value)
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:  # no such user
        raise RecipeError(f"path '{value}': {error} Give the folder itself") from error


def _below(root: Path, inner: str, value: str) -> Path:
    path = (root / inner).resolve()
    if not path.is_relative_to(root.resolve()):
        raise RecipeError(f"path '{value}' leaves {root}; name a file below it, or give a plain path")
    return path
