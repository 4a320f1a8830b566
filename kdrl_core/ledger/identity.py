"""The identity of files outside of a run: sizes and hashes of what a recipe names, and how they differ from before.

A file whose size, times and inode are as recorded is taken to be unchanged. Any other is read and its hash compared.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

from kdrl_core.config import Recipe
from kdrl_core.config.outside import files_of, function_of, is_code, slots_of, with_slots
from kdrl_core.errors import RunError
from kdrl_core.ledger.manifest import digest, digest_of_listing

Outside = dict[str, dict[str, Any]]
"""Slot of the recipe → `path` as the recipe gives it, `sha256` over the names and contents of its files, and `files`:
name → `size`, `sha256`, and a `stamp` that changes with the file."""

_READERS = 4
_digests: dict[tuple[str, tuple[int, ...]], str] = {}
"""Path and stamp → sha256 of what this process has read."""


def identify(recipe: Recipe, known: Outside | None = None) -> Outside:
    """The present identity of all that the recipe names; slots without files are left out.

    Args:
        known: an earlier result; hashes of files that are unchanged since are taken from it.

    Raises:
        ModelError, RecipeError, RunError: as `identify_slot`.
    """
    known = known or {}
    found = {slot: identify_slot(recipe, slot, text, known.get(slot)) for slot, text in slots_of(recipe).items()}
    return {slot: identity for slot, identity in found.items() if identity is not None}


def identify_code(recipe: Recipe) -> Outside:
    """The present identity of the users' functions that the recipe names."""
    found = {slot: identify_slot(recipe, slot, text) for slot, text in slots_of(recipe).items() if is_code(slot)}
    return {slot: identity for slot, identity in found.items() if identity is not None}


def reward_settings(recipe: Recipe) -> dict[str, Any]:
    """What a judgement by functions depends on, with the content of users' code in place of its path, under the key
    `reward`; empty if the recipe's reward has no functions."""
    if not recipe.reward.functions:
        return {}
    code, told = identify_code(recipe), []
    for index, function in enumerate(recipe.reward.functions):
        content = code.get(slot := f"reward.functions.{index}.function")
        named = function.function
        if content is not None:
            named = f"{content['sha256']} {function_of(slot, named)}"
        told.append([function.label, named, function.weight, function.arguments])
    return {"reward": {"functions": told, "success_above": recipe.reward.success_above}}


def identify_slot(
    recipe: Recipe, slot: str, text: str, known: Mapping[str, Any] | None = None, *, reads_all: bool = False
) -> dict[str, Any] | None:
    """The present identity of what `text` means in a slot; None if there are no files.

    Args:
        known: the slot in an earlier result.
        reads_all: read every file, also those that seem unchanged.

    Raises:
        ModelError, RecipeError: as `files_of`.
        RunError: a file may not be read.
    """
    try:
        files = _identities(files_of(recipe, slot, text), {} if known is None else known["files"], reads_all=reads_all)
    except OSError as error:
        raise RunError(f"{slot}={text} cannot be read ({error}); make its files readable") from error
    return {"path": text, "sha256": digest_of_listing(files), "files": files} if files else None


def _identities(
    paths: Mapping[str, Path], recorded: Mapping[str, Any], *, reads_all: bool
) -> dict[str, dict[str, Any]]:
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


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first file that differs between two identities of a slot, with both hashes; None if their content is the
    same."""
    if before["sha256"] == after["sha256"]:
        return None
    was, now = ({name: file["sha256"] for name, file in each["files"].items()} for each in (before, after))
    name, *more = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    told = f"has sha256 {now[name][:12]}…" if name in now else "is gone"
    began = f"recorded was {was[name][:12]}…" if name in was else "it was not there"
    return f"{name} {told}, {began}" + (f", and {len(more)} more" if more else "")


def unmoved(old: Recipe, new: Recipe, recorded: Outside) -> Recipe:
    """`new` with the path of `old` in each slot whose files lie somewhere else now, but have the recorded content."""
    before = slots_of(old)

    def told(slot: str, text: str) -> str:
        was = before.get(slot, text)
        if was == text or slot not in recorded or function_of(slot, text) != function_of(slot, was):
            return text
        found = identify_slot(new, slot, text)
        return was if found is not None and found["sha256"] == recorded[slot]["sha256"] else text

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
