r"""The shapes of problem files that kdrl reads: which columns each has, and what is taken from which.

A shape is a row of `SHAPES`. The first row whose columns a file has is the file's shape; `data.format` names one in its
place, and `data.columns` puts other columns in its row. Names with dots are fields of nested columns. Of several names,
the first that is there counts. What the values themselves may look like is the same for all shapes
(:mod:`kdrl_core.verify.values`), so GSM8K's `#### 42`, lists of one and whole floats need no row.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from kdrl_core.config import ColumnsConfig, DataConfig, did_you_mean
from kdrl_core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One row of the table."""

    name: str
    question: tuple[str, ...]
    """Names of the column of questions: text, or lists of chat messages."""
    answer: tuple[str, ...]
    ids: tuple[str, ...] = ("problem_id", "id")
    source: tuple[str, ...] = ("source", "data_source")
    labels: str = "failures"
    """The difficulty labels: name → failures."""
    needs_box: bool = False
    r"""The answer column holds worked solutions; one without a \boxed{} has no answer."""

    @property
    def used(self) -> set[str]:
        """The outermost columns that are read."""
        names = (*self.question, *self.answer, *self.ids, *self.source, self.labels, *IMAGES)
        return {part for name in names for part in (name, name.split(".")[0])}

    def missing(self, found: Iterable[str]) -> list[str]:
        """The columns that a file with these columns lacks, by the name that is usual for them."""
        columns = set(found)
        return [names[-1] for names in (self.question, self.answer) if not any(has(columns, name) for name in names)]


IMAGES = ("images", "image")
"""Columns whose content is not read: a problem that needs them is malformed."""

SHAPES = (
    # verl's RL data; Skywork-OR1, DAPO-Math-17k
    Shape(
        name="verl",
        question=("prompt",),
        answer=("reward_model.ground_truth",),
        ids=(),
        source=("data_source",),
        labels="extra_info.model_difficulty",
    ),
    # slime
    Shape(name="slime", question=("prompt",), answer=("label",)),
    # DeepScaleR, GSM8K, NuminaMath-1.5, OpenR1-Math, Big-Math, kdrl's own
    Shape(name="problems", question=("question", "problem"), answer=("answer",)),
    # TRL
    Shape(name="prompts", question=("prompt",), answer=("answer",)),
    Shape(name="trl", question=("prompt",), answer=("solution",)),
    # MATH
    Shape(name="math", question=("question", "problem"), answer=("solution",), needs_box=True),
)

_BY_NAME = {shape.name: shape for shape in SHAPES}
_BY_NAME |= {"skywork": _BY_NAME["verl"], "deepscaler": _BY_NAME["problems"]}  # sets that recipes name


def file_shape(found: Iterable[str], data: DataConfig, *, origin: str) -> Shape:
    """The shape of a file with these columns.

    Raises:
        DataError: none fits, or columns are missing that data.format or data.columns names.
    """
    names = set(found)
    _check_mapping(names, data.columns, origin=origin)
    if data.format != "auto":
        shape = mapped(_BY_NAME[data.format], data.columns)
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
    return (_BY_NAME["problems"],) if columns.problem and columns.answer else SHAPES


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


def has(names: set[str], name: str) -> bool:
    """Whether a file has a column of this name, or a column that may have such a field."""
    return name in names or name.split(".")[0] in names


def listed(names: Iterable[str]) -> str:
    """The names in order, for messages."""
    return ", ".join(sorted(names)) or "none"
