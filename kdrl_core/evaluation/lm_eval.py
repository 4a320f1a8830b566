"""Results in the shape of lm-evaluation-harness 0.4's results file, for the tools that read it."""

from collections.abc import Mapping
from typing import Any

LM_EVAL_RESULTS = "lm_eval.json"


def lm_eval_results(content: Mapping[str, Any], *, temperature: float, seed: int) -> dict[str, Any]:
    """`results.json` of an evaluation as lm-evaluation-harness writes it; metric keys are `<metric>,none`.

    `exact_match` is Avg@k by kdrl's verifier, which is none of the harness's own metrics: figures compare with those
    of other kdrl evaluations, not with a harness task of the same name.

    Args:
        content: `model` and `benchmarks` of results.json.
        temperature: of sampling.
        seed: of the recipe.
    """
    benchmarks: Mapping[str, Any] = content["benchmarks"]
    return {
        "results": {name: _metrics(name, found) for name, found in benchmarks.items()},
        "group_subtasks": {name: [] for name in benchmarks},
        "configs": {
            name: {
                "task": name,
                "output_type": "generate_until",
                "num_fewshot": 0,
                "repeats": found["num_samples"],
                "generation_kwargs": {"do_sample": temperature > 0.0, "temperature": temperature, "top_p": 1.0},
            }
            for name, found in benchmarks.items()
        },
        "versions": dict.fromkeys(benchmarks, 1),
        "n-shot": dict.fromkeys(benchmarks, 0),
        "higher_is_better": {
            name: {metric.partition(",")[0]: True for metric in _values(found)} for name, found in benchmarks.items()
        },
        "n-samples": {
            name: {"original": found["num_problems"], "effective": found["num_problems"]}
            for name, found in benchmarks.items()
        },
        "config": {"model": "kdrl", "model_args": f"pretrained={content['model']}", "limit": None, "random_seed": seed},
        "total_evaluation_time_seconds": str(content["seconds"]),
    }


def _values(found: Mapping[str, Any]) -> dict[str, float]:
    passes = {f"pass@{k},none": value for k, value in found["pass_at_k"].items()}
    return {"exact_match,none": found["accuracy"], **passes, "maj,none": found["maj_at_k"]}


def _metrics(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    stderr = found["stderr"] if found["num_problems"] > 1 else "N/A"  # as the harness says that there is none
    return {"alias": name, **_values(found), "exact_match_stderr,none": stderr}
