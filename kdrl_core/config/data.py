"""The problems of a stage and the rules that filter them (B.1.1, B.3)."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field

from kdrl_core.config.hub import as_data
from kdrl_core.config.section import Positive, Section, Share, require_one_of
from kdrl_core.config.shapes import FORMATS
from kdrl_core.errors import RecipeError

PAPER_BENCHMARKS = ("aime24", "aime25", "math500", "amc23", "minerva_math", "olympiad_bench")
"""The six benchmarks of Table 1, shipped as `builtin:benchmarks/<name>.jsonl`."""


DataFile = Annotated[str, AfterValidator(as_data)]
"""A path, glob or folder of problems; `hf://owner/name` means the repository of data."""


class DifficultyConfig(Section):
    """Which published labels to read. A label counts the failures of one model out of `num_samples` (B.1.1)."""

    student: str = Field("DeepSeek-R1-Distill-Qwen-1.5B", description="label of the model that stands for the student")
    others: list[str] = Field(
        ["DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Qwen-32B"], description="labels of the stronger models"
    )
    num_samples: Positive = Field(16, description="samples behind each label (B.1.1: 16)")

    @property
    def names(self) -> list[str]:
        """Every label that is read."""
        return [self.student, *self.others]


class DecontaminationConfig(Section):
    """Drops training problems that overlap evaluation problems, measured by shared n-grams of words."""

    files: list[DataFile] = Field(
        [f"builtin:benchmarks/{name}.jsonl" for name in PAPER_BENCHMARKS],
        min_length=1,
        description="evaluation problems (JSON Lines with `problem`); default: the paper's six benchmarks",
    )
    ngram: Positive = Field(13, description="words per n-gram; shorter problems overlap only if they are equal")
    min_overlap: float = Field(
        0.5, gt=0.0, le=1.0, description="share of the shorter problem's n-grams that makes an overlap"
    )


class ColumnsConfig(Section):
    """Which columns hold what, where a file names them in its own way; null: as its format says."""

    problem: str | None = Field(None, min_length=1, description="questions; `prompt`, or `a.b` for a field of column a")
    answer: str | None = Field(None, min_length=1, description="right answers; `reward_model.ground_truth`, say")
    id: str | None = Field(None, min_length=1, description="unique names of the problems")
    source: str | None = Field(None, min_length=1, description="where each problem comes from")

    @classmethod
    def of(cls, text: str) -> Self:
        """The columns in a text like `problem=question,answer=label`. Raises RecipeError if it is none."""
        found: dict[str, str] = {}
        for part in text.split(","):
            field, _, column = (each.strip() for each in part.partition("="))
            if field not in cls.model_fields or not column or field in found:
                known = ", ".join(cls.model_fields)
                raise RecipeError(
                    f"columns '{text}': '{part}' is not FIELD=COLUMN, with each FIELD of {known} once; "
                    "write problem=question,answer=label"
                )
            found[field] = column
        return cls(**found)


class DataConfig(Section):
    """Problems of a stage and the rules that filter them (B.1.1, B.3)."""

    files: list[DataFile] = Field(
        min_length=1, description="Parquet, Arrow, JSON (Lines) or CSV; path, glob, folder, `builtin:…` or `hf://…`"
    )
    format: Annotated[str, BeforeValidator(lambda name: require_one_of(name, ("auto", *FORMATS)))] = Field(
        "auto", description="which set's columns `files` have; auto: looked at, file by file"
    )
    columns: ColumnsConfig = Field(ColumnsConfig(), description="columns of your own: {problem: question, answer: key}")
    difficulty: DifficultyConfig = DifficultyConfig()
    drop_passes_at_least: Positive | None = Field(None, description="B.1.1 rule 1: 15 of 16")
    drop_all_failed: bool = Field(False, description="B.1.1 rule 2: no model ever solves it")
    max_unsolved_share: Share | None = Field(None, description="B.1.1 rule 3: 0.10 of the result")
    min_pass_rate: Share | None = Field(None, description="B.3: 0.25 for the teacher's pool, 0.50 for the student's")
    missing_labels: Literal["keep", "drop", "fail"] = Field("fail", description="rows without a difficulty label")
    on_error: Literal["fail", "drop"] = Field("fail", description="malformed rows: stop, or drop and count")
    max_malformed_share: Share = Field(0.1, description="a larger share of malformed rows stops also on_error=drop")
    conflicting_answers: Literal["drop", "keep", "fail"] = Field(
        "drop", description="one question with different answers: drop all its rows, keep one as of duplicates, or stop"
    )
    unparsable_answers: Literal["drop", "keep", "fail"] = Field(
        "drop", description="ground truths that math-verify cannot parse: no response could ever be right"
    )
    decontamination: DecontaminationConfig | None = Field(
        DecontaminationConfig(), description="drop problems that overlap benchmarks; null: keep them"
    )
    max_problems: Positive | None = Field(None, description="keep a seeded sample of this size")
