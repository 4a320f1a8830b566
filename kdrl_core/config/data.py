"""The problems of a stage and the rules that filter them (B.1.1, B.3)."""

from typing import Literal

from pydantic import Field

from kdrl_core.config.section import Positive, Section, Share

PAPER_BENCHMARKS = ("aime24", "aime25", "math500", "amc23", "minerva_math", "olympiad_bench")
"""The six benchmarks of Table 1, shipped as `builtin:benchmarks/<name>.jsonl`."""


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

    files: list[str] = Field(
        [f"builtin:benchmarks/{name}.jsonl" for name in PAPER_BENCHMARKS],
        min_length=1,
        description="evaluation problems (JSON Lines with `problem`); default: the paper's six benchmarks",
    )
    ngram: Positive = Field(13, description="words per n-gram; shorter problems overlap only if they are equal")
    min_overlap: float = Field(
        0.5, gt=0.0, le=1.0, description="share of the shorter problem's n-grams that makes an overlap"
    )


class DataConfig(Section):
    """Problems of a stage and the rules that filter them (B.1.1, B.3)."""

    files: list[str] = Field(min_length=1, description="Parquet, JSON or JSON Lines; path, glob or `builtin:…`")
    format: Literal["auto", "problems", "skywork", "deepscaler"] = Field("auto", description="schema of `files`")
    difficulty: DifficultyConfig = DifficultyConfig()
    drop_passes_at_least: Positive | None = Field(None, description="B.1.1 rule 1: 15 of 16")
    drop_all_failed: bool = Field(False, description="B.1.1 rule 2: no model ever solves it")
    max_unsolved_share: Share | None = Field(None, description="B.1.1 rule 3: 0.10 of the result")
    min_pass_rate: Share | None = Field(None, description="B.3: 0.25 for the teacher's pool, 0.50 for the student's")
    missing_labels: Literal["keep", "drop", "fail"] = Field("fail", description="rows without a difficulty label")
    on_error: Literal["fail", "drop"] = Field("fail", description="malformed rows: stop, or drop and count")
    unparsable_answers: Literal["drop", "keep", "fail"] = Field(
        "drop", description="ground truths that math-verify cannot parse: no response could ever be right"
    )
    decontamination: DecontaminationConfig | None = Field(
        DecontaminationConfig(), description="drop problems that overlap benchmarks; null: keep them"
    )
    max_problems: Positive | None = Field(None, description="keep a seeded sample of this size")
