"""Rates of a run's own steps, in place of data sheets: tokens per second of its engine, FLOPs per second of its scorer
and trainer. They hold for the same kind of GPU and engines; FLOPs carry over to other models, roughly."""

from statistics import median

from kdrl_core.errors import RunError
from kdrl_core.ledger import open_run
from kdrl_core.planning.cluster import Work, work_of
from kdrl_core.planning.cost import Rates
from kdrl_core.planning.shapes import ModelShape
from kdrl_core.rollouts.metrics import load_metrics
from kdrl_core.rollouts.schema import read_table


def rates_of_run(run_name: str, *, stage: str | None = None, gpus: int = 1) -> tuple[Rates, Work]:
    """Medians over the steps of a stage (default: the last that was trained), the first step left out as warm-up.

    Args:
        gpus: that the run used; its rates are per GPU.

    Returns:
        The rates, and the work of a mean step of the run, with its own prompt and response lengths.

    Raises:
        RunError: no such run, or it has trained no step.
        ModelError: the shape of one of its models is not known.
    """
    run = open_run(run_name)
    trained = [name for name in run.recipe.stages if load_metrics(run, name)]
    if not trained or (stage is not None and stage not in trained):
        raise RunError(
            f"run {run_name} has no trained steps{f' in {stage}' if stage else ''}, so nothing is measured in it; "
            "give --rollout-tokens-per-s and --mfu, or another run"
        )
    chosen = stage or trained[-1]
    rows = load_metrics(run, chosen)
    rows = rows[1:] or rows
    prompts = read_table(run.paths.rollouts(chosen, rows[-1]["step"]))["prompt_token_ids"]
    mean_prompt = sum(len(ids) for ids in prompts.to_pylist()) / len(prompts)
    response = sum(row["response/length_mean"] for row in rows) / len(rows)
    work = work_of(run.recipe, chosen, mean_response=response, mean_prompt=mean_prompt)

    def rate(phase: str, flops: float) -> float | None:
        seconds = median(row[phase] for row in rows)
        return flops / seconds / gpus if seconds > 0.0 else None

    scored: ModelShape | None = work.teacher or (work.student if work.has_reference else None)
    phase = "time/teacher_score_s" if work.teacher is not None else "time/reference_score_s"
    update = work.student.update_flops(work.tokens, context=work.mean_sequence, is_checkpointed=False)
    return Rates(
        rollout_tokens_per_s=median(row["throughput/rollout_tokens_per_s"] for row in rows) / gpus,
        score_flops=rate(phase, scored.forward_flops(work.tokens, context=work.mean_sequence)) if scored else None,
        update_flops=rate("time/update_s", update),
    ), work


def scaled(rates: Rates, measured: Work, planned: Work) -> Rates:
    """Rates for another student: generation slows as parameters grow; FLOPs per second are taken as they are."""
    if rates.rollout_tokens_per_s is None:
        return rates
    factor = measured.student.matmul_parameters / planned.student.matmul_parameters
    return Rates(
        rollout_tokens_per_s=rates.rollout_tokens_per_s * factor,
        score_flops=rates.score_flops,
        update_flops=rates.update_flops,
    )
