"""The shape of a problem file: the row of the table that its columns fit."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from kdrl_core.config import DataConfig, did_you_mean
from kdrl_core.config.shapes import FORMATS, SHAPES, Shape, has
from kdrl_core.errors import DataError


def file_shape(found: Iterable[str], data: DataConfig, *, origin: str) -> Shape:
    """The shape of a file with these columns.

    Raises:
        DataError: none fits, or columns are missing that data.format or data.columns names.
    """
    names = set(found)
    listed = ", ".join(sorted(names)) or "none"
    own = data.columns.model_dump(exclude_none=True)
    for field, name in own.items():
        if not has(names, name):
            raise DataError(
                f"{origin}: no column '{name}', which <stage>.data.columns gives for {field} (found: {listed})"
                f"{did_you_mean(name, sorted(names))}; correct <stage>.data.columns.{field}"
            )
    places = {"problem": "question", "id": "problem_id"}
    changes: dict[str, Any] = {places.get(field, field): (name,) for field, name in own.items()}
    fitting = next((shape for shape in SHAPES if not replace(shape, **changes).missing(names)), None)
    chosen = fitting if data.format == "auto" else FORMATS[data.format]
    if chosen is None:
        raise DataError(
            f"{origin}: columns {listed} are of no known format; needed: problem (or question, prompt) and answer, or "
            f"the columns of a set that kdrl knows ({', '.join(FORMATS)}); rename them, or say which they are: "
            "<stage>.data.columns={problem: …, answer: …}, --columns problem=…,answer=…"
        )
    shape = replace(chosen, **changes)
    if missing := shape.missing(names):
        raise DataError(
            f"{origin}: no column {' and no column '.join(map(repr, missing))}, which format {data.format} needs "
            f"(found: {listed}); "
            + (
                "set <stage>.data.format=auto, which reads these columns"
                if fitting is not None
                else "rename the columns, set <stage>.data.format, or name them in <stage>.data.columns"
            )
        )
    return shape
