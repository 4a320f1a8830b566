"""A user's own function, named in a recipe as `file.py:name` or `package.module:name`, or by the name that an installed
package gives it as an entry point. Imports no torch.

Reading a recipe checks the form of such a reference and runs nothing. The code runs where the loss is computed: in this
process, or in every rank of the DeepSpeed trainer. Both load it by the reference, which travels in the `Objective`.

A run's manifest holds the sha256 of that code (of `Reference.located`). A session tells it to `expect_code`, also in
the ranks; from then on other code at that place is refused. Of a file, the very bytes that were compared are run. A
module is imported as Python does it, once per process. What the code imports itself is not compared.
"""

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from kdrl_core.errors import RecipeError

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_expected: dict[str, str] = {}
"""`Reference.source` → sha256 that its file must have."""


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

    def located(self) -> Path | None:
        """The file that defines the function, without running code to find it. None: there is no such module, or its
        package is not a folder on the disk."""
        if self.file is not None:
            return self.file
        package, *inner = self.source.split(".")
        spec = importlib.util.find_spec(package) if _is_installed(package) else None
        if spec is None:
            return None
        places = [Path(place).joinpath(*inner) for place in spec.submodule_search_locations or ()]
        files = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
        if not inner and spec.origin is not None:
            files.append(Path(spec.origin))
        return next((file for file in files if file.is_file()), None)

    def load(self) -> Callable[..., Any]:
        """Import the file or module and return the function. What was imported once is not read again.

        Raises:
            RecipeError: it does not exist or cannot be imported, has no such function, or is not the expected code.
        """
        try:
            module = sys.modules.get(self._module) or self._imported()
        except RecipeError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise RecipeError(
                f"{self}: {self.source} cannot be imported: {type(error).__name__}: {error}; correct it there"
            ) from error
        found: Any = getattr(module, self.function, None)
        if not callable(found):
            what = "is not callable" if hasattr(module, self.function) else "is not there"
            raise RecipeError(f"{self}: {self.function} {what} in {self.source}; name a function that it defines")
        return cast("Callable[..., Any]", found)

    @property
    def _module(self) -> str:
        """Name in `sys.modules`. A file is in no package and may have any name; another content is another module."""
        if self.file is None:
            return self.source
        return f"kdrl_plugin_{hashlib.sha256(f'{self.source}{_expected.get(self.source)}'.encode()).hexdigest()[:16]}"

    def _imported(self) -> ModuleType:
        self.check()
        file = self.located()
        content = b"" if file is None else file.read_bytes()
        found, expected = hashlib.sha256(content).hexdigest(), _expected.get(self.source)
        if expected is not None and expected != found:
            raise RecipeError(
                f"{self}: {file} has sha256 {found[:12]}…, the run began with {expected[:12]}…; "
                "restore that file, or start a new run with the new code"
            )
        if self.file is None:
            return importlib.import_module(self.source)
        module = sys.modules[self._module] = ModuleType(self._module)
        module.__file__ = self.source
        try:
            exec(compile(content, self.source, "exec", dont_inherit=True), module.__dict__)  # noqa: S102 (the user's own)
        except BaseException:
            del sys.modules[self._module]
            raise
        return module


@contextmanager
def faults_told(name: str) -> Iterator[None]:
    """Around a call of the function that `name` refers to: what goes wrong becomes a RecipeError with its line. Around
    one of kdrl's own it does nothing."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # whatever the user's code raises
        if not is_reference(name):
            raise
        reference = parse_reference(name)
        file = str(reference.located())
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f"{reference}, line {lines[-1]}" if lines else f"{reference}"
        raise RecipeError(f"{where}: {type(error).__name__}: {error}; correct it there") from error


def expect_code(recorded: Mapping[str, str]) -> None:
    """From now on, `load` refuses other code: `recorded` maps `Reference.source` to the sha256 of its file."""
    _expected.update(recorded)


def expected_code() -> dict[str, str]:
    """What `expect_code` was told in this process."""
    return dict(_expected)


def is_reference(name: object) -> bool:
    """Whether `name` refers to a user's function; the names of kdrl's own variants have no colon."""
    return isinstance(name, str) and ":" in name


def reference_in(name: object, *, group: str) -> Reference | None:
    """The reference that a recipe's `name` is, or that it has as an entry point; None if it is neither. No code is run.

    Args:
        group: of entry points. A package declares one as `name = "package.module:function"`.

    Raises:
        RecipeError: as `parse_reference`; or packages give the name to different functions.
    """
    if is_reference(name):
        return parse_reference(str(name))
    found = sorted({each.value for each in entry_points(group=group) if each.name == name})
    if len(found) > 1:
        raise RecipeError(f"entry point {name!r} of {group} is {' and '.join(found)}; give the one that you mean")
    return parse_reference(found[0]) if found else None


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
