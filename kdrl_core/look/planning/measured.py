"""Rates from a run's own steps, in place of data sheets: tokens per second of its engine, FLOPs per second of scorer
and trainer, each per GPU of the run's recipe. They hold for the same kind of GPU and engines; FLOPs per second hold
roughly for other models too. The FLOPs of an update include recomputed activations if the run recomputes them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from kdrl_core.config import Recipe
from kdrl_core.errors import RunError
from kdrl_core.ledger import open_run
from kdrl_core.look.planning.cluster import Role, Work, engines_of, gpus_of, work_of
from kdrl_core.look.planning.cost import Rates, busiest
from kdrl_core.tables.metrics import load_metrics
from kdrl_core.tables.schemas import read_table


def rates_of_run(run_name: str, *, gpus: int | None = None) -> tuple[Rates, Work]:
    """Medians over the steps of the last stage that was trained; the first step is left out as warm-up.

    Args:
        gpus: GPUs of each phase of the run; None: as its recipe says, for each engine and for the trainer.

    Returns:
        The rates, and the work of a mean step of the run with its measured prompt and response lengths.

    Raises:
        RunError: no such run, or it has trained no step.
        ModelError: the shape of one of its models is not known.
    """
    run = open_run(run_name)
    trained = [name for name in run.recipe.stages if load_metrics(run, name)]
    if not trained:
        raise RunError(
            f"run {run_name} has no trained steps, so nothing is measured in it; "
            "give --rollout-tokens-per-s and --mfu, or another run"
        )
    stage = trained[-1]
    rows = load_metrics(run, stage)
    rows = rows[1:] or rows
    prompts = read_table(run.paths.rollouts(stage, rows[-1]["step"]))["prompt_token_ids"]
    mean_prompt = sum(len(ids) for ids in prompts.to_pylist()) / len(prompts)
    response = sum(row["response/length_mean"] for row in rows) / len(rows)
    work = work_of(run.recipe, stage, mean_response=response, mean_prompt=mean_prompt)
    return rates_of(run.recipe, work, rows, gpus=gpus), work


def rates_of(recipe: Recipe, work: Work, rows: Sequence[Mapping[str, Any]], *, gpus: int | None = None) -> Rates:
    """Rates per GPU, from the timings `rows` of steps with the mean work `work`. `gpus` as in `rates_of_run`."""
    used = gpus_of(recipe) if gpus is None else dict.fromkeys(gpus_of(recipe), gpus)

    def rate(phase: str, flops: float) -> float | None:
        seconds = median(row[phase] for row in rows)
        return flops / seconds if seconds > 0.0 else None

    role: Role = "teacher" if work.teacher is not None else "reference"
    scored = work.teacher or (work.student if work.has_reference else None)
    scoring = scored.forward_flops(work.tokens, context=work.mean_sequence) / used[role] if scored else 0.0
    is_checkpointed = engines_of(recipe).is_checkpointed
    update = work.student.update_flops(
        busiest(work, used["update"]), context=work.mean_sequence, is_checkpointed=is_checkpointed
    )
    return Rates(
        rollout_tokens_per_s=median(row["throughput/rollout_tokens_per_s"] for row in rows) / used["rollout"],
        score_flops=rate(f"time/{role}_score_s", scoring) if scored else None,
        update_flops=rate("time/update_s", update),
        has_collectives=used["update"] > 1,
    )


def scaled(rates: Rates, measured: Work, planned: Work) -> Rates:
    """Rates for another student: tokens per second fall as parameters grow; FLOPs per second stay."""
    if rates.rollout_tokens_per_s is None:
        return rates
    factor = measured.student.matmul_parameters / planned.student.matmul_parameters
    return replace(rates, rollout_tokens_per_s=rates.rollout_tokens_per_s * factor)
