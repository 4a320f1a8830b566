"""problems ─▶ filter ─▶ data/pool.parquet and data/filter.json, for every stage of the recipe (B.1.1, B.3)."""

import json
from pathlib import Path

import pyarrow as pa

from kdrl_core.boxes.session import initial_policy
from kdrl_core.config import Recipe
from kdrl_core.data import FilterReport, filter_problems, read_problems
from kdrl_core.errors import DataError
from kdrl_core.ledger import Run, find_intact, find_own, publish_file, required_sha256
from kdrl_core.ledger.progress import report_progress
from kdrl_core.models.loading import compare_tokenizers, load_tokenizer
from kdrl_core.models.prepare import prepared_model
from kdrl_core.tables.schemas import write_table


def filter_run(run: Run) -> dict[str, FilterReport]:
    """Filter each stage's problems and publish the pool. Returns the reports by stage; empty if it was there already.

    Raises:
        ModelError: a model cannot be prepared, or the teacher's tokenizer is another one.
        DataError: unreadable or malformed input, or a pool too small for one step (SFT: for one batch).
    """
    has_pool, has_report = find_own(run, run.paths.pool) is not None, find_intact(run.paths.filter_report) is not None
    if has_pool and has_report:
        return {}
    report_progress(run, stage="filter", phase="filter")
    recipe = run.recipe
    student = initial_policy(run, recipe.stages[0])
    if recipe.teacher is not None:  # again: models that were GGUF files have a readable tokenizer only now
        compare_tokenizers(student, prepared_model(recipe.teacher, run.paths.root))
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
    content = json.dumps({stage: report.to_json() for stage, report in reports.items()}, indent=1) + "\n"
    if not has_pool:
        publish_file(
            run.paths.pool,
            lambda path: write_table(pa.concat_tables(pools), path),
            expected=required_sha256(run, run.paths.pool),
        )

    def write_report(path: Path) -> None:
        path.write_text(content, encoding="utf-8")

    publish_file(run.paths.filter_report, write_report, inputs=run.inputs(run.paths.pool))
    return reports


def _check_size(recipe: Recipe, stage: str, num_problems: int) -> None:
    """Raise DataError if the pool cannot fill a step; of SFT, even if every sample of the teacher were right."""
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
