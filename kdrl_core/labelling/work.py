"""The work folder of a labelling, beside its output: what was sampled so far, bound to the settings that made it.

    labels.parquet.work/label.json                  the settings
    labels.parquet.work/shards/shard-00000.parquet  responses and verdicts of some problems, published (docs/labels.md)

A response is a function of the settings, so a labelling that was killed goes on behind its last response and ends with
the labels of one that was not.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdrl_core.errors import RunError
from kdrl_core.ledger import replace_file
from kdrl_core.sampling.work import hold_work

SETTINGS = "label.json"
SHARDS = "shards"


def work_folder(output: Path) -> Path:
    """Where the labelling that writes `output` works."""
    return output.with_name(f"{output.name}.work")


@contextmanager
def open_work(work: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold the folder, which is new or was begun with the same settings.

    Raises:
        RunLockedError: another process works in it.
        RunError: it was begun with other settings; each difference is named.
    """
    with hold_work(work, "label.lock", remedy="; wait for it, stop it, or give another output"):
        _bind(work, settings)
        yield


def _bind(work: Path, settings: dict[str, Any]) -> None:
    file = work / SETTINGS
    remedy = "give another --output, or delete the folder to begin again"
    if not file.is_file():
        replace_file(file, (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode())
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} cannot be read ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise RunError(f"{file} holds no settings; {remedy}")
    names = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
    if names:
        shown = ", ".join(f"{name}: {found.get(name)} → {settings.get(name)}" for name in names)
        raise RunError(f"{work} was begun with other settings ({shown}); set them back, {remedy}")
