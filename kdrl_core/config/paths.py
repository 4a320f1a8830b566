"""Paths in recipes: plain, `builtin:…` for files shipped with kdrl, `package:…` for files of an installed package,
`run:NAME` for the finished student of another run."""

import importlib.util
import os
import re
from pathlib import Path

from kdrl_core.errors import RecipeError, RunError

ASSETS = Path(__file__).parent.parent / "assets"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def artifacts_root() -> Path:
    """`$KDRL_ARTIFACTS`, or `artifacts/` in the current folder."""
    return Path(os.environ.get("KDRL_ARTIFACTS", "artifacts")).absolute()


def validate_run_name(name: str) -> str:
    """`name` if it is one plain folder name, else RunError: run names never lead out of the artifacts folder."""
    if not _RUN_NAME.fullmatch(name) or ".." in name:
        raise RunError(
            f"run name {name!r} is not allowed: use letters, digits, '.', '_' and '-', at most 100, "
            "starting with a letter or digit and without '..'"
        )
    return name


def resolve_path(value: str) -> Path:
    """The absolute path that a recipe's `value` means. It need not exist, except for the package of `package:`.

    Raises:
        RecipeError: the path leaves the shipped assets or the package, or the package is not installed.
        RunError: what stands after `run:` is no run name.
    """
    scheme, _, rest = value.partition(":")
    if scheme == "run":
        return artifacts_root() / "runs" / validate_run_name(rest) / "student"
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
