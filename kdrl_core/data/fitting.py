"""Whether the rest of a `data` section fits its files: a look at their columns, before any expensive work.

Who changes `data.files` alone keeps format, columns and label rules of the files that the recipe had.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kdrl_core.config import Recipe
from kdrl_core.data.files import raw_rows
from kdrl_core.data.read import find_files, shown_path
from kdrl_core.data.shapes import file_shape
from kdrl_core.errors import DataError

_LABEL_RULES = ("drop_passes_at_least", "drop_all_failed", "max_unsolved_share", "min_pass_rate")


def require_fitting(recipe: Recipe, stage: str) -> None:
    """Look at the first file of each entry of the stage's `data.files`.

    Raises:
        DataError: a file is missing or cannot be read, or what the section sets beside `files` does not fit its
            columns. The message names all of that.
    """
    data = recipe.stage(stage).data
    faults: list[str] = []
    has_labels = False
    shown = ""
    for entry in data.files:
        path = find_files(data.model_copy(update={"files": [entry]}))[0]
        shown = shown_path(path)
        if not (names := column_names(path)):  # no rows: said where problems are read
            return
        try:
            shape = file_shape(names, data, origin=shown)
        except DataError as error:
            faults.append(str(error).replace("<stage>", stage))
            continue
        has_labels |= shape.labels.split(".")[0] in names
    rules = [rule for rule in _LABEL_RULES if getattr(data, rule) not in (None, False)]
    if rules and data.missing_labels == "fail" and not has_labels and not faults:
        faults.append(
            f"{stage}.data.files: {shown} has no difficulty labels, which {', '.join(rules)} of {stage}.data need; "
            f"measure them with `kdrl label`, or set {stage}.data.missing_labels=keep to leave these rules out"
        )
    if faults:
        raise DataError("; ".join(faults))


class _Seen(Exception):  # noqa: N818 (no error: enough is known)
    pass


def column_names(path: Path) -> set[str]:
    """The columns of a problem file; of JSON, those of its first rows. Raises DataError if it cannot be read."""
    found: set[str] = set()

    def look(names: Iterable[str]) -> list[str]:
        found.update(names)
        raise _Seen

    with suppress(_Seen):
        next(raw_rows(path, shown_path(path), look), None)
    return found
