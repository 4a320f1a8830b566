r"""The shapes of problem files that kdrl reads: which columns hold the questions and the answers.

A shape is a row of `SHAPES`. The first row whose columns a file has is the file's shape. `data.format` names a row
instead, and `data.columns` replaces columns of the row. A name with dots is a field of a nested column. Of several
names the first that is there counts. What the values may look like is the same for all shapes
(:mod:`kdrl_core.verify.values`), so GSM8K's `#### 42`, lists of one and whole floats need no row.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One row of the table."""

    name: str
    question: tuple[str, ...]
    """Names of the column of questions: text, or lists of chat messages."""
    answer: tuple[str, ...]
    needs_box: bool = False
    r"""The answer column holds worked solutions; one without a \boxed{} has no answer."""
    problem_id: tuple[str, ...] = ("problem_id", "id")
    source: tuple[str, ...] = ("source", "data_source")

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Column of PROBLEM_SCHEMA → the names that it may have in a file."""
        return {name: getattr(self, name) for name in ("question", "answer", "problem_id", "source")}

    @property
    def used(self) -> set[str]:
        """The outermost columns that are read."""
        names = [*(name for some in self.columns.values() for name in some), *LABELS, *IMAGES]
        return {part for name in names for part in (name, name.split(".")[0])}

    def missing(self, found: set[str]) -> list[str]:
        """The columns that a file with these columns lacks, by the name that is usual for them."""
        return [names[-1] for names in (self.question, self.answer) if not any(has(found, name) for name in names)]


LABELS = ("failures", "extra_info.model_difficulty")
"""Columns of difficulty labels: name → failures. The second is Skywork-OR1's."""
IMAGES = ("images", "image")
"""Columns whose content is not read: a problem that needs them is malformed."""

SHAPES = (
    # verl's RL data; Skywork-OR1, DAPO-Math-17k
    Shape(name="verl", question=("prompt",), answer=("reward_model.ground_truth",)),
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

FORMATS = {shape.name: shape for shape in SHAPES}
"""What `data.format` may name, beside `auto`."""
FORMATS |= {"skywork": FORMATS["verl"], "deepscaler": FORMATS["problems"]}  # sets that recipes name


def has(names: Iterable[str], name: str) -> bool:
    """Whether there is a column of this name, or a column that may have such a field."""
    return name in names or name.split(".")[0] in names
