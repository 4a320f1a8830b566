"""problems ─▶ filter ─▶ data/pool.parquet and data/filter.json, for every stage of the recipe (B.1.1, B.3)."""

import json
from functools import cached_property

import pyarrow as pa

from kdrl_core.boxes.builders import initial_policy
from kdrl_core.boxes.make import Product, box, make
from kdrl_core.config import Recipe
from kdrl_core.data import FilterReport, filter_problems, read_problems
from kdrl_core.errors import DataError
from kdrl_core.ledger import Run, settle_outside
from kdrl_core.ledger.graph import FILTER_REPORT, POOL
from kdrl_core.models.loading import compare_tokenizers, load_tokenizer
from kdrl_core.models.prepare import prepared_model


class Filtering:
    """The filter of one run. It runs once, when the first of its artifacts is made."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def result(self) -> tuple[pa.Table, dict[str, FilterReport]]:
        """The problems of every stage that remain, and the reports by stage.

        Raises:
            ModelError: a model cannot be prepared, or the teacher's tokenizer differs.
            RunError: models or data are not those that the run began with.
            DataError: unreadable or malformed input, or a pool too small for one step (SFT: for one batch).
        """
        recipe = self.run.recipe
        settle_outside(self.run)
        student = initial_policy(self.run, recipe.stages[0])
        if recipe.teacher is not None:  # again: models that were GGUF files have a readable tokenizer only now
            compare_tokenizers(student, prepared_model(recipe.teacher, self.run.paths.root))
        tokenizer = load_tokenizer(
            student,
            chat_template=recipe.student.chat_template,
            trust_remote_code=recipe.student.trust_remote_code,
        )
        pools: list[pa.Table] = []
        reports: dict[str, FilterReport] = {}
        for stage in recipe.stages:
            problems = read_problems(recipe.stage(stage).data)
            pool, reports[stage] = filter_problems(problems, recipe, stage=stage, tokenizer=tokenizer)
            _check_size(recipe, stage, len(pool))
            pools.append(pool)
        return pa.concat_tables(pools), reports


@box(POOL, phase="filter")
def pool(filtering: Filtering) -> Product:
    """The problems of every stage that remain."""
    return Product(content=filtering.result[0])


@box(FILTER_REPORT, phase="filter")
def filter_report(filtering: Filtering) -> Product:
    """What the filter kept and dropped, by rule and stage."""
    _, reports = filtering.result
    content = json.dumps({stage: report.to_json() for stage, report in reports.items()}, indent=1) + "\n"
    return Product(content=lambda path: path.write_text(content, encoding="utf-8"))


def filter_run(run: Run) -> dict[str, FilterReport]:
    """Filter each stage's problems and publish pool and report. Returns the reports by stage; empty if both were there.

    Raises as `Filtering.result` does.
    """
    filtering = Filtering(run)
    made = [make(filtering, each) for each in (pool, filter_report)]
    return {} if all(each.reused for each in made) else filtering.result[1]


def _check_size(recipe: Recipe, stage: str, num_problems: int) -> None:
    """Raise DataError if the pool cannot fill a step or, for SFT, a batch even if every teacher sample is right."""
    config = recipe.stage(stage)
    if num_problems < config.prompts_per_step:
        raise DataError(
            f"{stage}: {num_problems} problems are left after filtering, fewer than "
            f"prompts_per_step={config.prompts_per_step}; "
            f"loosen the rules of {stage}.data, give more problems, or lower {stage}.prompts_per_step"
        )
    num_samples = num_problems * config.sft.samples
    if config.objective == "sft" and num_samples < config.sft.batch_size:
        raise DataError(
            f"{stage}: {num_problems} problems are left after filtering, with {stage}.sft.samples={config.sft.samples} "
            f"each {num_samples} teacher samples, fewer than {stage}.sft.batch_size={config.sft.batch_size}; "
            f"start a new run with a smaller batch_size, more {stage}.sft.samples, or more problems"
        )
