"""The identity of files outside of a run: sizes and hashes of what a recipe names, and how they differ from before.

A file whose size, times and inode are as recorded is taken to be unchanged. Any other is read and its hash compared.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

from kdrl_core.config import Recipe
from kdrl_core.config.outside import files_of, slots_of, with_slots
from kdrl_core.ledger.manifest import digest, digest_of_listing
from kdrl_core.objectives.plugins import is_reference

Outside = dict[str, dict[str, Any]]
"""Slot of the recipe → `path` as the recipe gives it, `sha256` over the names and contents of its files, and `files`:
name → `size`, `sha256`, and a `stamp` that changes with the file."""

_READERS = 4
_digests: dict[tuple[str, tuple[int, ...]], str] = {}
"""Path and stamp → sha256 of what this process has read."""


def identify(recipe: Recipe, known: Outside | None = None, *, reads_all: bool = False) -> Outside:
    """The present identity of all that the recipe names; slots without files are left out.

    Args:
        known: an earlier result; hashes of files that are unchanged since are taken from it.
        reads_all: read every file, also those that seem unchanged.

    Raises:
        ModelError, RecipeError: as `files_of`.
    """
    found: Outside = {}
    for slot, text in slots_of(recipe).items():
        files = identify_files(files_of(recipe, slot, text), (known or {}).get(slot), reads_all=reads_all)
        if files:
            found[slot] = {"path": text, "sha256": digest_of_listing(files), "files": files}
    return found


def identify_files(
    paths: Mapping[str, Path], known: Mapping[str, Any] | None = None, *, reads_all: bool = False
) -> dict[str, dict[str, Any]]:
    """Size, sha256 and stamp of named files. `known`: their slot in an earlier result."""
    recorded = {} if known is None else known["files"]

    def identity(name: str) -> dict[str, Any]:
        path, status = paths[name], paths[name].stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        key, before = (str(path), tuple(stamp)), recorded.get(name, {})
        sha256 = _digests.get(key) if before.get("stamp") != stamp else before["sha256"]
        if sha256 is None or reads_all:
            sha256 = _digests[key] = digest(path)[1]
        return {"size": status.st_size, "sha256": sha256, "stamp": stamp}

    with ThreadPoolExecutor(_READERS) as pool:  # hashing large files leaves the interpreter free
        return dict(zip(paths, pool.map(identity, paths), strict=True))


def differences(recorded: Outside, found: Outside) -> Iterable[tuple[str, str, str]]:
    """Slot, path as the recipe gives it, and what differs, for each slot whose content is no longer the recorded one.
    Slots that have no files any more are passed over: whoever needs the files says that they are missing."""
    for slot in recorded.keys() & found.keys():
        before, after = recorded[slot], found[slot]
        if before["sha256"] != after["sha256"]:
            yield slot, after["path"], _told(before["files"], after["files"])


def unmoved(old: Recipe, new: Recipe, recorded: Outside) -> Recipe:
    """`new` with the path of `old` in each slot whose files lie somewhere else now, but have the recorded content."""
    before = slots_of(old)

    def told(slot: str, text: str) -> str:
        was, known = before.get(slot, text), recorded.get(slot)
        is_other_function = is_reference(text) and text.rpartition(":")[2] != was.rpartition(":")[2]
        if was == text or known is None or is_other_function:
            return text
        return was if digest_of_listing(identify_files(files_of(new, slot, text))) == known["sha256"] else text

    return with_slots(new, told)


def is_outside(value: object) -> TypeGuard[Outside]:
    """Whether a value read from JSON has the shape of `Outside`."""
    try:
        return all(
            isinstance(file["sha256"], str) and isinstance(file["size"], int) and isinstance(slot["sha256"], str)
            for slot in value.values()  # type: ignore[attr-defined]
            for file in slot["files"].values()
        )
    except (AttributeError, KeyError, TypeError):
        return False


def _told(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if gone := sorted(before.keys() - after.keys()):
        return f"{gone[0]} (sha256 {before[gone[0]]['sha256'][:12]}…) is gone{_more(gone)}"
    if new := sorted(after.keys() - before.keys()):
        return f"{new[0]} (sha256 {after[new[0]]['sha256'][:12]}…) was not there{_more(new)}"
    changed = sorted(name for name in before if before[name]["sha256"] != after[name]["sha256"])
    name = changed[0]
    return (
        f"{name} has sha256 {after[name]['sha256'][:12]}…, recorded was {before[name]['sha256'][:12]}…{_more(changed)}"
    )


def _more(names: list[str]) -> str:
    return "" if len(names) == 1 else f", and {len(names) - 1} more"
