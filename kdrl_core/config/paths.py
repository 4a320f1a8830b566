"""Paths and files that come from others: what a path in a recipe means, and one reader for small files.

Paths in recipes are plain, `builtin:…` for files shipped with kdrl, `package:…` for files of an installed package,
`run:NAME` for the finished student of another run, `hf://…` for a repository of a hub (:mod:`kdrl_core.config.hub`).

The reader opens ordinary files only, up to a size, and never waits: a FIFO in place of a file would make it wait for
ever, and a link to /dev/zero would fill the memory.
"""

import errno
import importlib.util
import io
import json
import os
import re
import stat
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from kdrl_core.config.hub import HUB, HubPath
from kdrl_core.errors import KdrlError, ModelError, RecipeError, RunError, visible

ASSETS = Path(__file__).parent.parent / "assets"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
SCHEMES = ("run", "builtin", "package", HUB)
"""What may stand before a colon in place of a plain path."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MOST_BYTES = 2**27
"""Most bytes of a small file, unless its reader says otherwise. The largest are tokenizers, with 40 MB."""
_GROWTH = 2**16
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}


def artifacts_root() -> Path:
    """`$KDRL_ARTIFACTS`, or `artifacts/` in the current folder. It need not exist. Raises RunError if it is a file."""
    root = Path(os.environ.get("KDRL_ARTIFACTS") or "artifacts").absolute()
    if root.is_file():
        raise RunError(f"KDRL_ARTIFACTS: {root} is a file; give a folder, which is made if it is missing")
    return root


def validate_run_name(name: str) -> str:
    """`name`, if it is a plain folder name, so that no path leads out of the artifacts folder; else raises RunError."""
    if not _RUN_NAME.fullmatch(name) or ".." in name:
        raise RunError(
            f"run name {name!r} is not allowed: use letters, digits, '.', '_' and '-', at most 100, "
            "starting with a letter or digit and without '..'"
        )
    return name


def default_run_name(prefix: str) -> str:
    """The name of a run that was given none: `prefix` and the local time, like miniature-20260131-134502."""
    return f"{prefix}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"


def resolve_path(value: str) -> Path:
    """The absolute path that a recipe's `value` means. It need not exist, but the package of `package:` must.

    Raises:
        RecipeError: the path leaves the shipped assets or the package, the package is not installed, or the path has
            control characters.
        RunError: the text after `run:` is not a run name.
        DataError, ModelError: a repository of a hub has never been downloaded at this revision.
    """
    if _CONTROL.search(value):
        raise RecipeError(f"path {value!r} has control characters; no file that kdrl reads is named like that")
    scheme, _, rest = value.partition(":")
    if scheme == "run":
        return artifacts_root() / "runs" / validate_run_name(rest) / "student"
    if scheme == HUB:
        return HubPath.of(value).local()
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


class UnusableFileError(KdrlError, OSError):
    """Something that is no ordinary file, or is too large, stands where a file should be.

    Args:
        path: the file.
        problem: what is wrong with it, as the rest of a sentence.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return visible(f"{self.path} {self.problem}")


def require_regular(path: Path, status: os.stat_result) -> None:
    """Raise UnusableFileError unless what is at `path`, with this status, is an ordinary file."""
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "device")
        raise UnusableFileError(path, f"is a {kind}, not a file; remove it")


def open_regular(path: Path, *, most_bytes: int = _MOST_BYTES, follow_links: bool = False) -> io.BufferedReader:
    """Open an ordinary file for reading; never waits for another process.

    Args:
        most_bytes: a larger file is refused.
        follow_links: also open what a link leads to. On for files that the user names, off for files of a run.

    Raises:
        UnusableFileError: a link, folder, FIFO, socket or device, or too large.
        OSError: there is no such file, or it may not be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnusableFileError(path, "is a link; put the file itself in its place") from None
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise UnusableFileError(path, "is a socket or device, not a file; remove it") from None
        raise
    try:
        status = os.fstat(descriptor)
        require_regular(path, status)
        if status.st_size > most_bytes:
            problem = f"has {status.st_size:,} bytes, and at most {most_bytes:,} are read; restore or remove it"
            raise UnusableFileError(path, problem)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_small(path: Path, *, most_bytes: int = _MOST_BYTES, follow_links: bool = False) -> bytes:
    """The bytes of a small file. Arguments and errors as of `open_regular`."""
    with open_regular(path, most_bytes=most_bytes, follow_links=follow_links) as file:
        most = min(most_bytes, os.fstat(file.fileno()).st_size + _GROWTH)  # read() allocates as much as it is asked for
        content = file.read(most + 1)
    if len(content) > most:
        raise UnusableFileError(path, "grows while it is read; try again, or restore it")
    return content


def read_json(path: Path, *, follow_links: bool = False) -> Any:
    """The value in a small JSON file. Raises ValueError if it is not JSON in UTF-8, and otherwise as `open_regular`."""
    try:
        return json.loads(read_small(path, follow_links=follow_links).decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def shards(path: Path) -> list[str]:
    """Files that the weight index of a sharded model names; empty if there is no index, or if one file has all weights
    (transformers prefers it to an index as well).

    Raises:
        ModelError: the index cannot be read, or names anything but safetensors files of this directory.
    """
    return sorted(set(weight_map(path).values()))


def weight_map(path: Path) -> dict[str, str]:
    """Weight → its file, as the index says. Empty and errors as `shards`."""
    if (path / WEIGHTS[0]).is_file():
        return {}
    try:
        files = dict(read_json(path / WEIGHTS[1], follow_links=True)["weight_map"])
        names = sorted(set(files.values()))
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ModelError(f"{path / WEIGHTS[1]} cannot be read ({error}); download the model again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{path / WEIGHTS[1]} names {name!r}, which is no safetensors file beside it; "
                "convert the weights, or download the model again"
            )
    return files


def why(error: Exception) -> str:
    """Why a file cannot be read, in one line, without its path, which the message names anyway."""
    text = getattr(error, "problem", None) or getattr(error, "strerror", None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0]
