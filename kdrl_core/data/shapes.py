"""The shape of a problem file: the row of the table that its columns fit."""

from collections.abc import Iterable
from dataclasses import replace

from kdrl_core.config import ColumnsConfig, DataConfig, did_you_mean
from kdrl_core.config.shapes import FORMATS, SHAPES, Shape, has
from kdrl_core.errors import DataError


def file_shape(found: Iterable[str], data: DataConfig, *, origin: str) -> Shape:
    """The shape of a file with these columns.

    Raises:
        DataError: none fits, or columns are missing that data.format or data.columns names.
    """
    names = set(found)
    _check_mapping(names, data.columns, origin=origin)
    if data.format != "auto":
        shape = mapped(FORMATS[data.format], data.columns)
        if missing := shape.missing(names):
            raise DataError(
                f"{origin}: no column {' and no column '.join(map(repr, missing))}, which format {data.format} needs "
                f"(found: {listed(names)}); {_remedy(names, data)}"
            )
        return shape
    candidates = [mapped(shape, data.columns) for shape in _in_order(data.columns)]
    fitting = next((shape for shape in candidates if not shape.missing(names)), None)
    if fitting is None:
        raise DataError(
            f"{origin}: columns {listed(names)} are of no known format; needed: problem (or question, prompt) and "
            "answer, or a set's own columns (docs/data.md lists them); say which they are, "
            "<stage>.data.columns={problem: …, answer: …}, or rename them"
        )
    return fitting


def _in_order(columns: ColumnsConfig) -> tuple[Shape, ...]:
    """The shapes as they are tried. If both columns are given, the rest is that of plain problems."""
    return (FORMATS["problems"],) if columns.problem and columns.answer else SHAPES


def mapped(shape: Shape, columns: ColumnsConfig) -> Shape:
    """The shape with the columns that the user has named."""
    places = {"question": columns.problem, "answer": columns.answer, "ids": columns.id, "source": columns.source}
    changes = {place: (name,) for place, name in places.items() if name is not None}
    return replace(shape, **changes)  # type: ignore[arg-type]


def _check_mapping(names: set[str], columns: ColumnsConfig, *, origin: str) -> None:
    for field, name in columns.model_dump(exclude_none=True).items():
        if not has(names, name):
            raise DataError(
                f"{origin}: no column '{name}', which <stage>.data.columns gives for {field} (found: {listed(names)})"
                f"{did_you_mean(name, sorted(names))}; correct <stage>.data.columns.{field}"
            )


def _remedy(names: set[str], data: DataConfig) -> str:
    fits = any(not mapped(shape, data.columns).missing(names) for shape in _in_order(data.columns))
    if fits:
        return "set <stage>.data.format=auto, which reads these columns"
    return "rename the columns, set <stage>.data.format, or name them in <stage>.data.columns"


def listed(names: Iterable[str]) -> str:
    """The names in order, for messages."""
    return ", ".join(sorted(names)) or "none"
