"""A user's own function, named in a recipe as `file.py:name` or `package.module:name`. Imports no torch.

Reading a recipe checks the form of such a reference and runs nothing. The code runs where the loss is computed: in this
process, or in every rank of the DeepSpeed trainer. Both load it by the reference, which travels in the `Objective`.

The run's manifest does not hold the sha256 of that code (of `Reference.file`) yet.
"""

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from kdrl_core.errors import RecipeError

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Where a function is."""

    source: str
    """Absolute path of a Python file, or the dotted name of a module."""
    function: str

    @property
    def file(self) -> Path | None:
        """The Python file; None for a module of an installed package."""
        return Path(self.source) if self.source.endswith(".py") else None

    def __str__(self) -> str:
        return f"{self.source}:{self.function}"

    def check(self) -> None:
        """Raise RecipeError if the file does not exist or the package is not installed. Runs no code of it."""
        package = self.source.partition(".")[0]
        if self.file is None and not _is_installed(package):
            raise RecipeError(f"{self}: package {package} is not installed; install it, or give file.py:name")
        if self.file is not None and not self.file.is_file():
            raise RecipeError(f"{self}: file {self.file} does not exist; correct the path before ':{self.function}'")

    def load(self) -> Callable[..., Any]:
        """Import the file or module and return the function.

        Raises:
            RecipeError: it does not exist or cannot be imported, or has no such function.
        """
        self.check()
        try:
            module = importlib.import_module(self.source) if self.file is None else _import_file(self.file)
        except Exception as error:  # whatever the user's code raises
            raise RecipeError(
                f"{self}: {self.source} cannot be imported: {type(error).__name__}: {error}; correct it there"
            ) from error
        found: Any = getattr(module, self.function, None)
        if not callable(found):
            what = "is not callable" if hasattr(module, self.function) else "is not there"
            raise RecipeError(f"{self}: {self.function} {what} in {self.source}; name a function that it defines")
        return cast("Callable[..., Any]", found)


def is_reference(name: object) -> bool:
    """Whether `name` refers to a user's function; the names of kdrl's own variants have no colon."""
    return isinstance(name, str) and ":" in name


def parse_reference(text: str) -> Reference:
    """The reference in `text`. A file path relative to the current folder becomes absolute.

    Raises:
        RecipeError: `text` is not a reference, or there is no file at a relative path.
    """
    source, _, function = text.rpartition(":")
    is_file = source.endswith(".py") and source.isprintable()
    if not function.isidentifier() or not (is_file or _MODULE.fullmatch(source)):
        raise RecipeError(f"{text!r} is no reference to a function; give file.py:name or package.module:name")
    if not is_file:
        return Reference(source=source, function=function)
    path = Path(source).expanduser()
    reference = Reference(source=str(path.absolute()), function=function)
    if not path.is_absolute():
        reference.check()  # an absolute path may be from a finished run, which is shown without the file
    return reference


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec, like __main__
        return False


def _import_file(file: Path) -> ModuleType:
    """The module of a file, imported once per process. It is in no package and may have any name."""
    name = f"kdrl_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None  # the name ends with .py
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
