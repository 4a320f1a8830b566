"""Reads files that somebody else may have put there: ordinary files only, up to a size, without ever waiting.

A FIFO in place of a file would make its reader wait for ever, and a link to /dev/zero would fill the memory.
"""

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

from kdrl_core.errors import KdrlError, visible

MOST_BYTES = 2**27
"""Most bytes of a small file, unless its reader says otherwise. The largest are tokenizers, with 40 MB."""


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


def open_regular(path: Path, *, most_bytes: int = MOST_BYTES, follow_links: bool = False) -> io.BufferedReader:
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
        if not stat.S_ISREG(status.st_mode):
            raise UnusableFileError(path, f"is a {_kind(status.st_mode)}, not a file; remove it")
        if status.st_size > most_bytes:
            problem = f"has {status.st_size:,} bytes, and at most {most_bytes:,} are read; restore or remove it"
            raise UnusableFileError(path, problem)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def read_small(path: Path, *, most_bytes: int = MOST_BYTES, follow_links: bool = False) -> bytes:
    """The bytes of a small file. Arguments and errors as of `open_regular`."""
    with open_regular(path, most_bytes=most_bytes, follow_links=follow_links) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:  # it grew
        raise UnusableFileError(path, f"has more than {most_bytes:,} bytes; restore or remove it")
    return content


def read_json(path: Path, *, follow_links: bool = False) -> Any:
    """The value in a small JSON file. Raises ValueError if it is not JSON in UTF-8, and otherwise as `open_regular`."""
    try:
        return json.loads(read_small(path, follow_links=follow_links).decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def why(error: Exception) -> str:
    """Why a file cannot be read, without its path, which the message names anyway."""
    return str(getattr(error, "strerror", None) or error)
