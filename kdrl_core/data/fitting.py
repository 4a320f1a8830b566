"""Whether the rest of a `data` section fits its files: a look at their columns, before any expensive work.

Who changes `data.files` alone keeps format, columns and label rules of the files that the recipe had.
"""

from collections.abc import Iterable
from pathlib import Path

from kdrl_core.config import Recipe, expanded
from kdrl_core.config.shapes import LABELS, has
from kdrl_core.data.files import raw_rows
from kdrl_core.data.read import shown_path
from kdrl_core.data.shapes import file_shape
from kdrl_core.errors import DataError

_LABEL_RULES = ("drop_passes_at_least", "drop_all_failed", "max_unsolved_share", "min_pass_rate")


def require_fitting(recipe: Recipe, stage: str) -> None:
    """Look at the first file of each entry of the stage's `data.files`.

    Raises:
        DataError: a file cannot be read, or what the section sets beside `files` does not fit its columns.
    """
    data = recipe.stage(stage).data
    found: set[str] = set()
    for path in [expanded(entry)[0] for entry in data.files]:
        if not (names := column_names(path)):  # no rows: said where problems are read
            return
        try:
            file_shape(names, data, origin=shown_path(path))
        except DataError as error:
            raise DataError(str(error).replace("<stage>", stage)) from error
        found |= names
    rules = [rule for rule in _LABEL_RULES if getattr(data, rule) not in (None, False)]
    if rules and data.missing_labels == "fail" and not any(has(found, name) for name in LABELS):
        raise DataError(
            f"{stage}.data.files: no file has difficulty labels, which {', '.join(rules)} of {stage}.data need; "
            f"measure them with `kdrl label`, or set {stage}.data.missing_labels=keep to leave these rules out"
        )


def column_names(path: Path) -> set[str]:
    """The columns of a problem file; of JSON, those of its first rows. Raises DataError if it cannot be read."""
    found: set[str] = set()

    def look(names: Iterable[str]) -> list[str]:
        found.update(names)
        return []

    next(raw_rows(path, shown_path(path), look), None)
    return found
