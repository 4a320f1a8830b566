"""What a process remembers of the files of a run while it holds the run's lock, so that it reads none of them twice.

A published file never changes. One whose inode, size and times are still what they were is taken to have its bytes
still; any other is read again. The ledger remembers manifests, and which files had the bytes of their manifest, of one
step at a time: with the first file of another step all of that is forgotten. So damage that shows in no time and no
size is found, as without a memory, when a later step or process looks at the file.
"""

from pathlib import Path
from typing import Any

from kdrl_core.ledger.graph import node_at

MANIFEST, BYTES, DERIVED = "manifest", "bytes", "derived"
"""A manifest; the hash that a file's bytes had; rows that can be rebuilt, which are kept longer than a step."""

Stamp = tuple[int, ...]

_held: dict[Path, dict[tuple[str, Path], tuple[Stamp, Any]]] = {}
"""Run whose lock is held → what was read of which artifact → stamp of the file that was read, and what it held."""
_steps: dict[Path, tuple[str | None, object]] = {}
"""Run → stage and step of the artifacts that are remembered."""


def begin(root: Path) -> None:
    """The lock of the run in `root` is held from now on; nothing is known."""
    _held[root] = {}
    _steps.pop(root, None)


def end(root: Path) -> None:
    """The lock is let go: others may change what they like."""
    _held.pop(root, None)


def stamp(path: Path) -> Stamp | None:
    """What changes when a file does; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def renamed(before: Stamp | None, path: Path) -> Stamp | None:
    """The stamp of a file since it was renamed to `path`, which changes the last of its times alone; None if more is
    another."""
    after = stamp(path)
    return after if before is not None and after is not None and after[:-1] == before[:-1] else None


def keep(what: str, path: Path, at: Stamp | None, value: Any) -> None:
    """Remember what was read of the artifact at `path`, from a file that had the stamp `at`."""
    if at is None or (root := _root(path)) is None:
        return
    node = node_at(path.relative_to(root).as_posix())
    if node is not None and node.row.per == "step" and not node.row.is_pruned:
        if _steps.get(root) != (node.stage, node.at):
            _held[root] = {key: known for key, known in _held[root].items() if key[0] == DERIVED}
        _steps[root] = node.stage, node.at
    _held[root][what, path] = at, value


def recall(what: str, path: Path, at: Stamp | None) -> Any:
    """What was read of the artifact when the file had the stamp `at`; None if that is not known."""
    root = _root(path)
    known = None if root is None else _held[root].get((what, path))
    return known[1] if known is not None and known[0] == at else None


def _root(path: Path) -> Path | None:
    return next((root for root in tuple(_held) if path.is_relative_to(root)), None)
