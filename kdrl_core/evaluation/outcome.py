"""Results of benchmarks: the responses that are kept, the figures over them, and their publication."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa

from kdrl_core.evaluation.evaluation_plan import EvaluationPlan
from kdrl_core.evaluation.lm_eval import LM_EVAL_RESULTS, lm_eval_results
from kdrl_core.evaluation.results import RESULTS
from kdrl_core.evaluation.statistics import accuracy, majority, pass_at_k, powers_of_two, standard_error
from kdrl_core.ledger import manifest_of, publish_directory
from kdrl_core.tables.files import read_table, write_table
from kdrl_core.types import FinishReason, VerdictKind

RESPONSES = "responses.parquet"


def publish_outcome(
    plan: EvaluationPlan,
    target: Path,
    shards: Mapping[str, Sequence[Path]],
    *,
    label: str,
    model: str,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Publish `target` with responses.parquet, results.json and lm_eval.json.

    Args:
        shards: published tables of responses (EVALUATION), by benchmark.
        label, model, settings: entries of results.json.
        inputs: of the manifest.

    Returns:
        results.json. Its `date` is the start of sampling; `seconds` is the time of sampling and judging in all calls.
    """
    recipe = plan.recipe
    tables = {name: pa.concat_tables(map(read_table, paths)) for name, paths in shards.items()}
    manifests = [manifest_of(path) for paths in shards.values() for path in paths]
    took = [float(manifest.metadata["seconds"]) for manifest in manifests]
    content = {
        "label": label,
        "model": model,
        "date": datetime.fromisoformat(manifests[0].created_at).timestamp() - took[0],
        "seconds": sum(took),
        **({} if settings is None else {"settings": settings}),
        "benchmarks": {
            benchmark.name: benchmark_result(tables[benchmark.name], benchmark.samples, seed=recipe.seed)
            for benchmark in plan.benchmarks
            if benchmark.name in tables
        },
    }
    shaped = lm_eval_results(content, temperature=recipe.evaluation.temperature, seed=recipe.seed)

    def write(folder: Path) -> None:
        write_table(pa.concat_tables(tables.values()), folder / RESPONSES)
        (folder / RESULTS).write_text(json.dumps(content, indent=1) + "\n")
        (folder / LM_EVAL_RESULTS).write_text(json.dumps(shaped, indent=1) + "\n")

    publish_directory(target, write, inputs=inputs)
    return content


def benchmark_result(table: pa.Table, samples: int, *, seed: int) -> dict[str, Any]:
    """The figures of one benchmark, as results.json holds them (Sec. 4.1: Avg@k, the accuracy reward alone).

    Args:
        table: EVALUATION of one benchmark; the `samples` responses to a problem are adjacent rows.
        samples: k of Avg@k.
        seed: of the bootstrap over problems.

    Returns:
        `accuracy` with `low` and `high` (95 %), `stderr`, `pass_at_k` by k and `maj_at_k` with their `intervals` and
        `stderrs`, all in [0, 1]; `length_mean` in tokens, `clip_ratio`, counts, `verdicts` by kind.
    """
    correct = table["accuracy_reward"].to_pylist()
    answers = table["extracted"].to_pylist()
    starts = range(0, len(correct), samples)
    groups = [correct[start : start + samples] for start in starts]
    votes = [answers[start : start + samples] for start in starts]
    found = accuracy(groups, seed=seed)
    per_problem = {
        f"pass@{k}": [pass_at_k(samples, round(sum(group)), k) for group in groups] for k in powers_of_two(samples)
    } | {f"maj@{samples}": [majority(vote, group) for vote, group in zip(votes, groups, strict=True)]}
    spread = {name: accuracy([[value] for value in values], seed=seed) for name, values in per_problem.items()}
    kinds = table["verdict"].to_pylist()
    return {
        "accuracy": found.mean,
        "low": found.low,
        "high": found.high,
        "stderr": standard_error(groups),
        "num_problems": len(groups),
        "num_samples": samples,
        "pass_at_k": {str(k): spread[f"pass@{k}"].mean for k in powers_of_two(samples)},
        "maj_at_k": spread[f"maj@{samples}"].mean,
        "intervals": {name: [each.low, each.high] for name, each in spread.items()},
        "stderrs": {name: standard_error([[value] for value in values]) for name, values in per_problem.items()},
        "length_mean": fmean(table["length"].to_pylist()),
        "clip_ratio": table["finish_reason"].to_pylist().count(FinishReason.LENGTH.value) / len(correct),
        "verdicts": {kind.value: kinds.count(kind.value) for kind in VerdictKind},
    }
