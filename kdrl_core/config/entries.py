"""An entry of `data.files` → the files that it means: one file, those that match a glob, or those of a saved set."""

import glob
import re
from pathlib import Path
from typing import Any

from kdrl_core.config.paths import read_json, resolve_path
from kdrl_core.errors import DataError

_SPLITS = "dataset_dict.json"
"""In a folder of `datasets.DatasetDict.save_to_disk`: the names of its splits, each a folder with `state.json`."""
_STATE = "state.json"
"""In a folder of `datasets.Dataset.save_to_disk`: the names of its Arrow files."""


def expanded(entry: str) -> list[Path]:
    """The file of a recipe's entry, the files that match it as a glob, or those of a set in a folder, in order. Empty:
    there are none.

    Raises:
        DataError: a folder has several splits, or is no complete set.
        RecipeError: as `resolve_path`.
    """
    path = resolve_path(entry)
    if path.is_dir():
        return _set_files(path, entry)
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        return []
    root = Path(path.anchor)
    pattern = list(path.parts[1:])
    while (root / pattern[0]).exists():  # so that a folder may be called data[1]
        root /= pattern.pop(0)
    return sorted(found for found in root.glob("/".join(pattern)) if found.is_file())


def _set_files(folder: Path, entry: str) -> list[Path]:
    """The files of a set: one saved by `datasets`, or a folder of Parquet files. Empty if the folder is none."""
    if (folder / _SPLITS).is_file():
        splits = [str(name) for name in _read(folder / _SPLITS, entry).get("splits", [])]
        _require_one_split(splits, entry)
        return _set_files(folder / splits[0], entry)
    if (folder / _STATE).is_file():
        names = [str(each["filename"]) for each in _read(folder / _STATE, entry).get("_data_files", [])]
        files = [folder / Path(name).name for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise DataError(f"{entry}: {missing[0]} is missing, which {_STATE} names; save or copy the set again")
        return files
    files = sorted(folder.rglob("*.parquet"))
    # Files whose names differ in numbers alone are parts of one split: train-*-of-*.parquet, but not test.parquet.
    patterns = {(file.parent / re.sub(r"\d+", "*", file.name)).relative_to(folder).as_posix() for file in files}
    if patterns:
        _require_one_split(sorted(patterns), entry)
    return files


def _require_one_split(splits: list[str], entry: str) -> None:
    if len(splits) != 1:
        entries = ", ".join(f"{entry}/{name}" for name in splits) or "there are none"
        raise DataError(f"{entry}: the set has {len(splits)} splits; name one of them: {entries}")


def _read(path: Path, entry: str) -> Any:
    try:
        return dict(read_json(path, follow_links=True))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{entry}: {path.name} cannot be read ({error}); save the set again") from error
